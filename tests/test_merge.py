"""python -m qlora.merge: the merged model is the adapter on its base, or is not there."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from qlora import merge
from qlora.merge import Prediction, differences
from qlora.model.adapter import ADAPTER
from qlora.model.base import load_base, load_tokenizer
from tests.conftest import ROWS
from tests.test_train import metrics

FP32 = partial(torch.autocast, "cpu", enabled=False)


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


def test_its_perplexity_is_the_adapters(run, base, rows_file, tmp_path):
    _, folder = run("--max_steps 4 --validation_split 0.2 --dtype float16")
    logged = [line["eval_perplexity"] for line in metrics(folder) if "eval_loss" in line][-1]
    whole = merged(tmp_path / "merged", base, folder)
    from qlora import evaluate

    flags = f"--model {whole} --dataset {rows_file} --validation_split 0.2 --no_load_in_4bit --max_length 512"
    evaluate.main([*flags.split(), "--output_file", str(tmp_path / "e.json")])
    perplexity = json.loads((tmp_path / "e.json").read_text())["base"]["perplexity"]
    assert perplexity == pytest.approx(logged, rel=1e-3)


def test_the_original_weights_get_the_same_update(run, base, tmp_path, capsys):
    model, folder = run("--max_steps 3 --learning_rate 3e-2")
    whole = merged(tmp_path / "merged", base, folder, "--base", "original")
    assert "the adapter on the 4-bit base, where it was trained" in capsys.readouterr().out
    before, after = (load_file(Path(path) / "model.safetensors") for path in (base, whole))
    assert before.keys() == after.keys()
    for name, layer in model.get_base_model().named_modules():
        if name.endswith(("q_proj", "v_proj")):
            update = layer.get_delta_weight("default")
            torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + update)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def peft_adapter(base, folder, **settings) -> str:
    """An adapter as other code makes it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **settings)
    get_peft_model(model, config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_modules": ["q_proj"], "lora_bias": True}, "a bias of its own at .*q_proj"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "trains lm_head beside LoRA"),
        ({"target_modules": ["embed_tokens"]}, "is a Embedding: only linear layers"),
    ],
)
def test_an_adapter_with_more_than_lora_is_refused_by_name(base, tmp_path, settings, message):
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
    with pytest.raises(SystemExit, match=r"on lm_head, whose weight the embeddings share"):
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
    for flags in ("--no_load_in_4bit", "--load_in_4bit"):
        with pytest.raises(SystemExit, match=r"merged here|cannot be loaded again|has no|have no"):
            merged(tmp_path / "merged", str(tmp_path / "gpt2"), adapter, "--dtype", "float32", flags)


def test_many_shards_are_one_model(run, base, tmp_path, monkeypatch):
    _, folder = run("--max_steps 1")
    whole = merged(tmp_path / "one", base, folder)
    monkeypatch.setattr(merge, "SHARD_BYTES", 100_000)
    parts = merged(tmp_path / "many", base, folder)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(files) > 2 and set(files) == set(index["weight_map"].values())
    left, right = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (whole, parts))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_one_shard_is_held_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "SHARD_BYTES", 4000)
    held = []
    monkeypatch.setattr(
        merge,
        "save_file",
        lambda shard, *args, **kw: held.append(len(shard)) or save_file(shard, *args, **kw),
    )
    merge.write_shards(tmp_path, ((str(i), torch.zeros(300)) for i in range(7)), torch.float32)
    assert held == [3, 3, 1]


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_like_any_other_with_settings_tokenizer_and_card(run, base, tmp_path, tied):
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


@pytest.mark.parametrize("max_kl", ["0.01", "9"])  # 9: then by the adapter's own effect
def test_a_merged_model_that_answers_otherwise_is_refused_and_leaves_nothing(
    run, base, tmp_path, monkeypatch, max_kl
):
    _, folder = run("--max_steps 3 --learning_rate 3e-2 --lora_target_modules all-linear")
    monkeypatch.setattr(merge, "add_lora", lambda weight, layer: weight)
    with pytest.raises(SystemExit, match=r"is not the adapter on its base: a KL divergence of .*--max_kl"):
        merged(tmp_path / "merged", base, folder, "--max_kl", max_kl)
    assert not list(tmp_path.glob("merged*"))


def test_kl_is_that_of_the_two_distributions():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    ids = torch.tensor([0, 1])
    before, after, kl = differences([Prediction(ids, p.log())], [Prediction(ids, q.log())])
    assert (before, after) == pytest.approx((4, 2))
    assert kl == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))


def test_a_base_that_is_stored_in_4_bits_has_no_original(run, base, tmp_path):
    stored = load_base(base, torch.float32, torch.device("cpu"))
    stored.save_pretrained(tmp_path / "stored")
    load_tokenizer(base).save_pretrained(tmp_path / "stored")
    model, folder = run("--max_steps 1 --learning_rate 3e-2", model=str(tmp_path / "stored"))
    with pytest.raises(SystemExit, match=r"--base original: .* itself is quantized"):
        merged(tmp_path / "merged", str(tmp_path / "stored"), folder, "--base", "original")
    whole = AutoModelForCausalLM.from_pretrained(merged(tmp_path / "m", str(tmp_path / "stored"), folder))
    tokenizer = load_tokenizer(base)
    want, got = logits(model, tokenizer), logits(whole, tokenizer)
    assert (got - want).norm() < 1e-4 * want.norm()


def test_what_stands_in_the_way_is_said_before_anything_is_loaded(run, base, tmp_path, monkeypatch, capsys):
    _, folder = run("--max_steps 1")
    monkeypatch.setattr("qlora.commands.load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match="is there and not empty"):
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
