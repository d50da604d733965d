"""python -m qlora.merge: the merged model equals the adapter on its base, or it is not saved."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
)

import generate
from qlora import evaluate, merge
from qlora.commands import parse_for_adapter
from qlora.config import EvaluateConfig, GenerateConfig
from qlora.data.formatting import Formatting
from qlora.model.adapter import ADAPTER, BASE, SETTINGS
from qlora.model.base import load_base, load_tokenizer
from qlora.model.generation import PromptWriter
from qlora.model.weights import INDEX, write_weights
from tests.conftest import ROWS
from tests.test_train import metrics


def merged(folder, base, adapter, *flags: str) -> Path:
    merge.main(["--model", base, "--adapter", str(adapter), "--output_dir", str(folder), *flags])
    return folder


def logits(model, tokenizer) -> torch.Tensor:
    ids = tokenizer([" ".join(row.values()) for row in ROWS[:1]], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("flags", ["", "--use_dora", "--use_rslora", "--bnb_4bit_quant_type fp4"])
def test_the_merged_model_has_the_logits_of_the_adapter_on_its_base(run, base, tmp_path, flags, capsys):
    model, folder = run(f"--max_steps 3 --learning_rate 3e-2 --lora_target_modules all-linear {flags}")
    whole = AutoModelForCausalLM.from_pretrained(merged(tmp_path / "merged", base, folder))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    want, got = logits(model, tokenizer), logits(whole, tokenizer)
    with model.disable_adapter():
        assert (logits(model, tokenizer) - want).norm() > 0.05 * want.norm()
    assert (got - want).norm() < 1e-4 * want.norm()
    assert "KL divergence" in capsys.readouterr().out


def test_the_merged_model_has_the_adapters_perplexity(run, base, rows_file, tmp_path):
    _, folder = run("--max_steps 4 --validation_split 0.2 --dtype float16")
    logged = [line["eval_perplexity"] for line in metrics(folder) if "eval_loss" in line][-1]
    whole = merged(tmp_path / "merged", base, folder)
    flags = f"--model {whole} --dataset {rows_file} --validation_split 0.2 --no_load_in_4bit --max_length 512"
    evaluate.main([*flags.split(), "--output_file", str(tmp_path / "e.json")])
    perplexity = json.loads((tmp_path / "e.json").read_text())["base"]["perplexity"]
    assert perplexity == pytest.approx(logged, rel=1e-3)


def test_the_original_weights_get_the_same_update(run, base, tmp_path, capsys):
    model, folder = run("--max_steps 3 --learning_rate 3e-2")
    whole = merged(tmp_path / "merged", base, folder, "--base", "original")
    assert "against the adapter on the 4-bit base, where it was trained" in capsys.readouterr().out
    before, after = (load_file(Path(path) / "model.safetensors") for path in (base, whole))
    assert before.keys() == after.keys()
    for name, layer in model.get_base_model().named_modules():
        if name.endswith(("q_proj", "v_proj")):
            update = layer.get_delta_weight("default")
            torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + update)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def peft_adapter(base, folder, **settings) -> str:
    """An adapter made by other code."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **settings)
    get_peft_model(model, config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_modules": ["q_proj"], "lora_bias": True}, "a bias of its own on .*q_proj"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "besides LoRA it trains lm_head"),
        (
            {"target_modules": ["embed_tokens"]},
            "only linear layers can be merged, and .*embed_tokens is of type Embedding",
        ),
    ],
)
def test_an_adapter_with_more_than_lora_is_refused_and_the_layer_named(base, tmp_path, settings, message):
    adapter = peft_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(SystemExit, match=message):
        merged(tmp_path / "merged", base, adapter, "--dtype", "float32", "--no_load_in_4bit")
    assert not list(tmp_path.glob("merged*"))


def test_an_adapter_on_a_weight_that_two_layers_share_is_refused(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    load_tokenizer(base).save_pretrained(tmp_path / "tied")
    adapter = peft_adapter(tmp_path / "tied", tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(SystemExit, match=r"lm_head shares its weight with the embeddings"):
        merged(
            tmp_path / "merged", str(tmp_path / "tied"), adapter, "--dtype", "float32", "--no_load_in_4bit"
        )


def test_gpt2s_layers_are_refused_in_one_line(base, tmp_path):
    config = GPT2Config(vocab_size=448, n_embd=64, n_layer=1, n_head=2, n_positions=256)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    load_tokenizer(base).save_pretrained(tmp_path / "gpt2")
    adapter = peft_adapter(
        tmp_path / "gpt2", tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True
    )
    messages = {
        "--no_load_in_4bit": "only linear layers can be merged",
        "--load_in_4bit": "the merged model cannot be loaded and run",  # its weights are transposed
    }
    for flags, message in messages.items():
        with pytest.raises(SystemExit, match=message):
            merged(tmp_path / "merged", str(tmp_path / "gpt2"), adapter, "--dtype", "float32", flags)
    assert not list(tmp_path.glob("merged*"))


def test_a_model_in_many_shards_loads_as_the_same_model(run, base, tmp_path, monkeypatch):
    _, folder = run("--max_steps 1")
    whole = merged(tmp_path / "one", base, folder)
    monkeypatch.setattr(merge, "write_weights", partial(write_weights, shard_bytes=100_000))
    parts = merged(tmp_path / "many", base, folder)
    index = json.loads((parts / INDEX).read_text())
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(files) > 2 and set(files) == set(index["weight_map"].values())
    left, right = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (whole, parts))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_has_weights_settings_tokenizer_and_card(run, base, tmp_path, tied):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    model.generation_config.max_length = 77
    model.save_pretrained(tmp_path / "base")
    load_tokenizer(base).save_pretrained(tmp_path / "base")
    _, folder = run("--max_steps 1 --dtype bfloat16", model=str(tmp_path / "base"))
    whole = merged(tmp_path / "merged", str(tmp_path / "base"), folder)
    config = json.loads((whole / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert json.loads((whole / "generation_config.json").read_text())["max_length"] == 77
    assert ("lm_head.weight" in load_file(whole / "model.safetensors")) != tied
    assert "merged into `base`" in (whole / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(whole).dtype == torch.bfloat16


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize("scaling", [None, LLAMA3_ROPE], ids=["plain", "llama3"])
def test_transformers_4_reads_the_settings_of_rotary_embeddings_under_its_own_names(tmp_path, scaling):
    """It knows no rope_parameters: a theta of 500,000 would silently become 10,000."""
    rope = {"rope_theta": 500000.0, **(scaling or {"rope_type": "default"})}
    config = LlamaConfig(rope_parameters=rope)
    merge.write_settings(tmp_path, "none", config, "LlamaForCausalLM", torch.float32)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == 500000.0 and written.get("rope_scaling") == scaling
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters
    earlier = dict(written)
    del earlier["rope_parameters"]  # what 4 reads is what it means
    (tmp_path / "config.json").write_text(json.dumps(earlier))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


@pytest.mark.parametrize("max_kl", ["0.01", "9"])  # with 9 the limit is the adapter's own effect
def test_a_merged_model_that_differs_from_the_adapter_is_refused_and_leaves_no_files(
    run, base, tmp_path, monkeypatch, max_kl
):
    _, folder = run("--max_steps 3 --learning_rate 3e-2 --lora_target_modules all-linear")
    monkeypatch.setattr("qlora.model.merging.add_lora", lambda weight, layer: weight)
    with pytest.raises(SystemExit, match=r"differs from the adapter on its base: KL divergence .*--max_kl"):
        merged(tmp_path / "merged", base, folder, "--max_kl", max_kl)
    assert not list(tmp_path.glob("merged*"))


def test_a_base_that_is_stored_in_4_bits_has_no_original_weights(run, base, tmp_path):
    stored = load_base(base, torch.float32, torch.device("cpu"))
    stored.save_pretrained(tmp_path / "stored")
    load_tokenizer(base).save_pretrained(tmp_path / "stored")
    model, folder = run("--max_steps 1 --learning_rate 3e-2", model=str(tmp_path / "stored"))
    with pytest.raises(SystemExit, match=r"--base original: .* is itself quantized"):
        merged(tmp_path / "merged", str(tmp_path / "stored"), folder, "--base", "original")
    whole = AutoModelForCausalLM.from_pretrained(merged(tmp_path / "m", str(tmp_path / "stored"), folder))
    tokenizer = load_tokenizer(base)
    want, got = logits(model, tokenizer), logits(whole, tokenizer)
    assert (got - want).norm() < 1e-4 * want.norm()


def test_a_merged_folder_is_asked_as_it_was_trained(run, base, tmp_path, capsys):
    rows = tmp_path / "alpaca.jsonl"
    rows.write_text(json.dumps({"instruction": "What is red?", "output": "A leaf."}) + "\n")
    flags = "--max_steps 40 --learning_rate 1e-2 --lora_target_modules all-linear --bnb_4bit_quant_type fp4"
    _, folder = run(flags, "--dtype bfloat16", dataset=str(rows))
    capsys.readouterr()
    whole = str(merged(tmp_path / "merged", base, folder))
    capsys.readouterr()
    config = parse_for_adapter(GenerateConfig, ["--model", whole])
    assert (config.dataset_format, config.dtype) == ("alpaca", "bfloat16")
    assert not config.load_in_4bit  # else the update would be rounded away
    assert parse_for_adapter(GenerateConfig, ["--model", whole, "--load_in_4bit"]).load_in_4bit
    assert parse_for_adapter(GenerateConfig, ["--model", whole, "--dtype", "float32"]).dtype == "float32"
    scores = parse_for_adapter(EvaluateConfig, ["--model", whole, "--dataset", str(rows)])
    assert (scores.dataset_format, scores.load_in_4bit) == ("alpaca", False)
    settings = json.loads((Path(whole) / SETTINGS).read_text())
    assert BASE not in settings and BASE in json.loads((folder / SETTINGS).read_text())

    tokenizer = AutoTokenizer.from_pretrained(whole)  # as other programs ask it
    question = [{"role": "user", "content": "What is red?"}]
    asked = tokenizer.apply_chat_template(question, return_dict=False)
    assert asked == PromptWriter(load_tokenizer(base), Formatting("alpaca"), 999).chat(question)
    class_name = json.loads((Path(whole) / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert class_name == "PreTrainedTokenizerFast"  # transformers 4 knows no TokenizersBackend

    generate.main(["--model", whole, "--prompt", "What is red?", "--max_new_tokens", "9"])
    assert capsys.readouterr().out.strip() == "A leaf."
    del settings["dataset_format"]
    (Path(whole) / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match=r"of --model .*merged is incomplete: dataset_format"):
        generate.main(["--model", whole, "--prompt", "What is red?"])


def test_of_an_adapter_that_other_code_trained_a_merged_folder_has_no_defaults(base, tmp_path):
    adapter = peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    whole = merged(tmp_path / "merged", base, adapter, "--dtype", "float32", "--no_load_in_4bit")
    assert not (whole / SETTINGS).exists()
    assert parse_for_adapter(GenerateConfig, ["--model", str(whole)]).dataset_format == "auto"


def test_mistakes_are_reported_before_the_model_is_loaded(run, base, tmp_path, monkeypatch, capsys):
    _, folder = run("--max_steps 1")
    monkeypatch.setattr("qlora.commands.load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match="already exists and is not empty"):
        merged(folder, base, folder)
    with pytest.raises(SystemExit, match="no adapter folder"):
        merged(tmp_path / "merged", base, tmp_path)
    with pytest.raises(SystemExit):
        merge.main(["--model", base])
    assert "--adapter is missing" in capsys.readouterr().err
    assert (folder / ADAPTER).exists()


def test_another_base_is_refused(run, base, tmp_path):
    _, folder = run("--max_steps 1")
    settings = json.loads((folder / "generate_defaults.json").read_text())
    settings["base_fingerprint"] = "0" * 64
    (folder / "generate_defaults.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match=r"trained on another base than --model.*--allow_other_base"):
        merged(tmp_path / "merged", base, folder)
    assert merged(tmp_path / "merged", base, folder, "--allow_other_base").exists()
