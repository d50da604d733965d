"""train.py as a whole: gradients, clipping, overflow, trained weights, resume, evaluation, data, models."""

import importlib.util
import json
import shutil
import subprocess
import sys
from datetime import date
from types import SimpleNamespace

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import qlora.model.base
import train
from qlora.data.chat_template import FALLBACK_CHAT_TEMPLATE
from qlora.data.sources import read_rows
from qlora.data.tokenize import tokenize_rows
from qlora.errors import InputError
from qlora.evaluation.validation import Validation, eval_batches
from qlora.model.adapter import ADAPTER, add_adapter
from qlora.model.base import load_base, load_tokenizer, trainable_weights
from qlora.model.generation import generate
from qlora.run import fingerprint
from qlora.run.checkpoint import STATE, STATE_TENSORS
from qlora.run.log import RunLog
from tests.conftest import ROOT, ROWS
from tests.data.chat_templates import use_template
from tests.results import adapter, assert_same, metrics
from tests.run.faults import interrupt, out_of_memory


def first_gradient(run, *flags: str, out: str = "out") -> dict[str, torch.Tensor]:
    """The gradient that the optimizer got in step 1: AdamW's first moment is then (1 - beta1) times it."""
    _, folder = run("--optim adamw_torch --max_steps 1 --save_steps 1", *flags, out=out)
    tensors = load_file(folder / "checkpoint-1" / STATE_TENSORS)
    return {name: tensor / 0.1 for name, tensor in tensors.items() if name.endswith("/exp_avg")}


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return torch.stack([tensor.double().norm() for tensor in tensors.values()]).norm().item()


def batch(rows: int, accumulation: int) -> str:
    return f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulation}"


def test_the_split_into_micro_batches_does_not_change_the_gradient(run):
    whole = first_gradient(run, "--max_grad_norm 0", batch(8, 1), out="8x1")
    for rows, accumulation in ((1, 8), (2, 4)):
        split = first_gradient(
            run, "--max_grad_norm 0", batch(rows, accumulation), out=f"{rows}x{accumulation}"
        )
        difference = {name: split[name] - whole[name] for name in whole}
        assert norm(difference) < 1e-5 * norm(whole)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_clipping_sees_unscaled_gradients(run, dtype):
    true_norm = norm(first_gradient(run, "--max_grad_norm 0", out="unclipped"))
    assert true_norm > 0.05
    clipped = first_gradient(run, f"--max_grad_norm 0.05 --dtype {dtype}", out="clipped")
    assert norm(clipped) == pytest.approx(0.05, rel=1e-3)
    logged = metrics(run(f"--max_steps 1 --dtype {dtype}", out="logged")[1])[0]["grad_norm"]
    assert logged == pytest.approx(true_norm, rel=0.02)


def test_an_overflow_leaves_the_weights_unchanged_and_halves_the_scale(run, base, tmp_path):
    model = load_base(base, torch.float32, torch.device("cpu"), load_in_4bit=False)
    model.lm_head.weight.data *= 300  # its gradients overflow float16 at the initial scale of 65536
    model.save_pretrained(tmp_path / "steep")
    load_tokenizer(base).save_pretrained(tmp_path / "steep")
    flags = "--dtype float16 --warmup_ratio 0 --lr_scheduler_type constant --max_steps 2 --save_steps 1"
    _, folder = run(flags, "--logging_steps 1", model=str(tmp_path / "steep"))
    first = metrics(folder)[0]
    assert first["skipped_steps"] == 1
    assert first["loss"] is None and first["grad_norm"] is None
    state = json.loads((folder / "checkpoint-1" / "training_state.json").read_text())
    assert state["scaler"]["scale"] == 2**15
    saved = adapter(folder / "checkpoint-1")
    assert all(
        not tensor.any() for name, tensor in saved.items() if "lora_B" in name
    )  # as LoRA initializes B
    assert not any(
        "exp_avg" in name or "state1" in name for name in load_file(folder / "checkpoint-1" / STATE_TENSORS)
    )


def test_a_non_finite_loss_never_reaches_the_weights(run, base, tmp_path):
    model = load_base(base, torch.float32, torch.device("cpu"), load_in_4bit=False)
    model.lm_head.weight.data[5] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    load_tokenizer(base).save_pretrained(tmp_path / "broken")
    flags = "--dtype float32 --warmup_ratio 0 --max_steps 2 --logging_steps 1"
    _, folder = run(flags, model=str(tmp_path / "broken"))
    assert [line["skipped_steps"] for line in metrics(folder)] == [1, 2]
    assert all(not tensor.any() for name, tensor in adapter(folder).items() if "lora_B" in name)


def test_only_lora_is_trained_and_the_base_stays_bit_identical(run, base):
    model, folder = run("--max_steps 4 --save_steps 4")
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    assert all("lora_" in name for name, _ in trained)
    state = load_file(folder / "checkpoint-4" / STATE_TENSORS)["optimizer/0.0/state1"]
    assert state.numel() == sum(weight.numel() for _, weight in trained)
    fresh = load_base(base, torch.float32, torch.device("cpu")).state_dict()
    trained = {
        name.replace(".base_layer", ""): value
        for name, value in model.get_base_model().state_dict().items()
        if "lora_" not in name
    }
    assert_same(trained, fresh)
    assert any(tensor.any() for name, tensor in adapter(folder).items() if "lora_B" in name)


def test_loss_falls_in_every_dtype(run):
    for dtype in ("float32", "bfloat16", "float16"):
        _, folder = run(
            "--num_train_epochs 6 --logging_steps 1 --lora_target_modules all-linear",
            f"--dtype {dtype}",
            "--learning_rate 1e-2",
            out=dtype,
        )
        losses = [line["loss"] for line in metrics(folder) if line["loss"] is not None]
        assert losses[-1] < 0.6 * losses[0], dtype


RESUME_FLAGS = (
    "--max_steps 8 --save_steps 4 --logging_steps 3 --lora_r 64 --lora_dropout 0.1 --save_total_limit 0"
)


def rest_of_state(folder) -> dict:
    """Progress, scaler and Python's random state at the end, without times and flags."""
    state = json.loads((folder / "checkpoint-8" / STATE).read_text())
    del state["progress"]["window_seconds"], state["progress"]["window_waited"], state["config"]
    return state


def test_only_a_new_adapter_is_initialized(run, base, tmp_path):
    """loftq and qera take minutes on a large model, and need weights that a resume may not find."""
    model = tmp_path / "model"
    shutil.copytree(base, model)
    flags = "--init_lora_weights loftq", "--max_steps 2", "--save_steps 1"
    run(*flags, model=str(model))
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora.model.initialization.correct_quantization", None)
        run(*flags, "--resume_from_checkpoint latest", model=str(model))


@pytest.mark.parametrize(
    "flags",
    [
        "--optim paged_adamw_8bit",
        "--optim adamw_8bit --dtype float16",
        "--optim paged_adamw_32bit --group_by_length",
        "--optim adamw_torch --dtype bfloat16 --gradient_checkpointing none",
        "--packing --max_length 40 --per_device_train_batch_size 2 --init_lora_weights loftq",
        "--init_lora_weights gaussian --loraplus_lr_ratio 16",
    ],
)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(run, flags):
    _, folder = run(RESUME_FLAGS, flags)
    want, want_metrics = adapter(folder), metrics(folder)
    want_state, want_rest = load_file(folder / "checkpoint-8" / STATE_TENSORS), rest_of_state(folder)
    if "8bit" in flags:
        assert any(
            tensor.dtype == torch.uint8 for name, tensor in want_state.items() if name.endswith("/state1")
        )
    shutil.rmtree(folder / "checkpoint-8")  # as if killed after step 4, the first step of the second epoch
    (folder / ADAPTER).unlink()
    run(RESUME_FLAGS, flags, "--resume_from_checkpoint latest")
    assert_same(adapter(folder), want)
    assert_same(load_file(folder / "checkpoint-8" / STATE_TENSORS), want_state)
    assert rest_of_state(folder) == want_rest
    for line in (*want_metrics, *(resumed := metrics(folder))):
        del line["tokens_per_s"], line["data_wait"]
    assert resumed == want_metrics


def test_a_chat_template_with_a_date_does_not_break_a_resume_after_midnight(run, base, tmp_path, monkeypatch):
    model = shutil.copytree(base, tmp_path / "dated")
    tokenizer = load_tokenizer(base)
    use_template(tokenizer, "Llama 3.2")
    tokenizer.save_pretrained(model)
    rows = tmp_path / "chats.jsonl"
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{n}"}] for n in range(8)]
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    flags = "--max_steps 2 --save_steps 1 --max_length 200"
    run(flags, model=str(model), dataset=str(rows))
    folder = tmp_path / "out"
    want = adapter(folder)
    shutil.rmtree(folder / "checkpoint-2")
    later = SimpleNamespace(today=lambda: date(2099, 1, 1), fromisoformat=date.fromisoformat)
    for module in (fingerprint, qlora.model.base):
        monkeypatch.setattr(module, "date", later)
    run(flags, "--resume_from_checkpoint latest", model=str(model), dataset=str(rows))
    assert_same(adapter(folder), want)
    asked = load_tokenizer(str(model), str(folder)).apply_chat_template(chats[0], tokenize=False)
    assert date.today().strftime("Today Date: %d %b %Y") in asked


GROUPS = "groups = lora_groups(trainable, config.weight_decay, config.loraplus_lr_ratio)"
TWO_GROUPS = """groups = [
        {"params": [pair for pair in trainable if "lora_A" in pair[0]], "lr_multiple": 1.0,
         "weight_decay": config.weight_decay},
        {"params": [pair for pair in trainable if "lora_B" in pair[0]], "lr_multiple": 4.0,
         "weight_decay": 0.0},
    ]"""


@pytest.fixture
def two_groups(tmp_path):
    """train.py with two optimizer groups, as someone would change it."""
    source = (ROOT / "train.py").read_text()
    assert source.count(GROUPS) == 1
    path = tmp_path / "train_two_groups.py"
    path.write_text(source.replace(GROUPS, TWO_GROUPS))
    spec = importlib.util.spec_from_file_location("train_two_groups", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch"])
def test_a_run_with_two_optimizer_groups_resumes_bit_identical(run, two_groups, monkeypatch, optim):
    flags = (
        f"--max_steps 4 --save_steps 2 --save_total_limit 0 --lora_r 64 --weight_decay 0.1 --optim {optim}"
    )
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", two_groups.train)
        _, folder = run(flags)
        want, want_state = adapter(folder), load_file(folder / "checkpoint-4" / STATE_TENSORS)
        shutil.rmtree(folder / "checkpoint-4")  # as if killed after step 2
        (folder / ADAPTER).unlink()
        run(flags, "--resume_from_checkpoint latest")
    state = load_file(folder / "checkpoint-4" / STATE_TENSORS)
    moment = "exp_avg" if optim == "adamw_torch" else "state1"
    for group in (0, 1):
        tensor = state[f"optimizer/{group}.0/{moment}"]
        assert tensor.any() and tensor.dtype == (torch.float32 if optim == "adamw_torch" else torch.uint8)
    assert_same(adapter(folder), want)
    assert_same(state, want_state)
    shutil.rmtree(folder / "checkpoint-4")
    with pytest.raises(InputError, match="other library versions or optimizer groups"):
        run(flags, "--resume_from_checkpoint latest")  # by the unchanged train.py


def test_optimizer_groups_have_their_own_learning_rate_and_weight_decay(run, two_groups, monkeypatch):
    """In its first step Adam moves each weight by the learning rate, against the sign of the gradient.

    B starts at 0. So does the gradient of A, which is multiplied by B: weight decay alone changes A.
    """
    flags = (
        "--max_steps 1 --optim adamw_torch --warmup_ratio 0 --lr_scheduler_type constant --adam_epsilon 1e-30"
    )
    start = adapter(run(flags, "--learning_rate 1e-30", out="start")[1])
    monkeypatch.setattr(train, "train", two_groups.train)
    end = adapter(run(flags, "--learning_rate 1e-3 --weight_decay 10")[1])
    for name, weight in end.items():
        want = start[name] * (1 - 1e-3 * 10) if "lora_A" in name else torch.full_like(weight, 4e-3)
        assert torch.allclose(weight if "lora_A" in name else weight.abs(), want, rtol=1e-4), name


def test_evaluating_and_sampling_do_not_change_the_training(run, base, rows_file, monkeypatch):
    flags = "--max_steps 5 --lora_dropout 0.1"
    want = adapter(run(flags, "--validation_dataset", rows_file, "--eval_steps 100", out="plain")[1])
    modes, loss = [], Validation.loss

    def loss_after_an_answer(validation, model, stop):
        prompt, tokenizer = [[1, 300, 301]], load_tokenizer(base)
        generate(model, tokenizer, prompt, validation.autocast, max_new_tokens=4, do_sample=True)
        modes.append(model.training)
        return loss(validation, model, stop)

    monkeypatch.setattr(Validation, "loss", loss_after_an_answer)
    got = adapter(run(flags, "--validation_dataset", rows_file, "--eval_steps 1", out="evaluated")[1])
    assert modes == [True] * 5
    assert_same(got, want)


def test_the_validation_loss_is_the_mean_over_targets(run, tokenizer, rows_file):
    model, folder = run("--max_steps 2 --validation_dataset", rows_file, "--per_device_eval_batch_size 5")
    rows = tokenize_rows(read_rows(rows_file, "train"), tokenizer)
    total = 0.0
    model.eval()
    for input_ids, labels in (rows[index] for index in range(len(rows))):
        with torch.no_grad():
            logits = model(input_ids=input_ids.long().unsqueeze(0)).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[1:].long(), reduction="sum").item()
    (logged,) = [line for line in metrics(folder) if "eval_loss" in line]
    assert logged["eval_loss"] == pytest.approx(total / rows.targets, rel=1e-5)
    assert logged["eval_perplexity"] == pytest.approx(
        torch.tensor(total / rows.targets).exp().item(), rel=1e-5
    )


def test_an_evaluation_batch_has_no_more_tokens_than_a_training_step():
    lengths = np.array([5, 100, 40, 41, 7, 90, 300])
    assert eval_batches(lengths, 4, 200) == [[6], [1, 5], [3, 2, 4, 0]]
    assert eval_batches(lengths, 2, 10**6) == [[6, 1], [5, 3], [2, 4], [0]]


@pytest.mark.parametrize(
    "flags",
    [
        "--weight_decay 10",
        "--adam_beta1 0.5",
        "--adam_beta2 0.5",
        "--adam_epsilon 0.01",
        "--learning_rate 1e-3",
        "--lr_scheduler_type linear",
        "--warmup_ratio 0.5",
        "--warmup_steps 3",
        "--max_grad_norm 0.01",
        "--loraplus_lr_ratio 4",
        "--init_lora_weights gaussian",
        "--init_lora_weights loftq",
        "--init_lora_weights qera",
        "--lora_alpha 64",
        "--lora_dropout 0.5",
        "--use_rslora",
        "--seed 1",
        "--group_by_length",
        "--max_length 16",
        "--no_completion_only_loss",
        "--bnb_4bit_quant_type fp4",
        "--no_load_in_4bit",
    ],
)
def test_each_of_these_flags_changes_the_trained_weights(run, flags):
    plain = adapter(run("--optim adamw_torch --max_steps 4", out="plain")[1])
    changed = adapter(run("--optim adamw_torch --max_steps 4", flags, out="changed")[1])
    assert any(not torch.equal(plain[name], changed[name]) for name in plain)


@pytest.mark.parametrize("choice, forwards", [("all", [2, 2]), ("none", [1, 1]), ("1", [2, 1])])
def test_checkpointed_layers_run_forward_twice(run, choice, forwards):
    model, _ = run(f"--max_steps 1 --gradient_checkpointing {choice}")
    calls = [0, 0]

    def count(number):
        calls[number] += 1

    for number, layer in enumerate(model.get_base_model().model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, number=number: count(number))
    model(input_ids=torch.tensor([[1, 300, 301]])).logits.sum().backward()
    assert calls == forwards


def test_a_trained_weight_without_a_gradient_is_refused_in_the_first_step(run, monkeypatch):
    def load_with_an_unused_layer(*arguments):
        base = load_base(*arguments)
        base.model.unused_proj = torch.nn.Linear(64, 64)
        return base

    monkeypatch.setattr(train, "load_base", load_with_an_unused_layer)
    with pytest.raises(InputError, match=r"unused_proj.* got no gradient"):
        run("--max_steps 1 --lora_target_modules q_proj unused_proj")


def test_float16_lora_weights_are_refused(base):
    model = load_base(base, torch.float16, torch.device("cpu"))
    model = add_adapter(model, 4, 8, 0.0, ["q_proj"], False, False).half()
    with pytest.raises(InputError, match="must be float32"):
        trainable_weights(model)


def test_max_steps_overrides_epochs_and_an_epoch_ends_with_a_smaller_step(run):
    _, folder = run("--num_train_epochs 2 --logging_steps 1", out="epochs")  # 42 rows: 16 + 16 + 10
    lines = metrics(folder)
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], abs=1e-4)
    assert lines[2]["tokens_seen"] * 2 == lines[5]["tokens_seen"]  # every row once an epoch
    _, folder = run("--num_train_epochs 9 --max_steps 2 --logging_steps 1", out="steps")
    assert [line["step"] for line in metrics(folder)] == [1, 2]


def test_resuming_from_an_older_checkpoint_replaces_the_later_ones(run, monkeypatch, capsys):
    flags = "--save_steps 1 --logging_steps 1 --max_steps 5 --save_total_limit"
    _, folder = run(flags, "0")
    older = ("--resume_from_checkpoint", str(folder / "checkpoint-2"))
    with pytest.raises(InputError, match="only 2 steps"):
        run(flags, "2", *older, "--max_steps 2 --allow_changes max_steps")
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # killed after its first step
        patch.setattr(RunLog, "step_done", interrupt)
        run(flags, "2", *older)
    assert "replacing checkpoint-3, checkpoint-4, checkpoint-5" in capsys.readouterr().out
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert [line["step"] for line in metrics(folder)] == [1, 2]
    assert not (folder / ADAPTER).exists()
    run(flags, "2", "--resume_from_checkpoint latest --max_steps 3 --allow_changes max_steps")
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_a_finished_adapter_without_checkpoints_is_not_replaced_by_a_resume(run):
    _, folder = run("--max_steps 1")
    shutil.rmtree(folder / "checkpoint-1")
    with pytest.raises(InputError, match="finished adapter"):
        run("--max_steps 1 --resume_from_checkpoint latest")


def test_a_run_of_a_single_step_changes_the_weights(run):
    """The last step is never part of the warmup, which starts at a learning rate of 0."""
    _, folder = run("--max_steps 1")
    assert any(tensor.any() for name, tensor in adapter(folder).items() if "lora_B" in name)


def test_a_mixture_in_which_a_dataset_has_no_usable_row_is_refused(run, rows_file, tmp_path):
    other = tmp_path / "long.jsonl"
    other.write_text(json.dumps({"prompt": "What? " * 40, "completion": "A leaf."}))
    flags = ["--dataset", rows_file, str(other), "--dataset_weights 0.5 0.5", "--max_length 32"]
    with pytest.raises(InputError, match=r"no row of .*long\.jsonl is left"):
        run("--max_steps 1", *flags)


def test_datasets_of_different_formats_can_be_mixed(run, rows_file, tmp_path, capsys):
    other = tmp_path / "chat.jsonl"
    other.write_text('{"text": "### Human: What?### Assistant: A leaf."}\n' * 10 + '{"text": ""}\n')
    flags = ["--dataset", rows_file, str(other)]
    _, folder = run("--max_steps 4 --logging_steps 1", *flags, "--dataset_weights 0.5 0.5")
    printed = capsys.readouterr().out
    assert f"{rows_file} + {other}: 53 rows read = 52 used + 1 dropped (1 empty text" in printed
    assert "the formats prompt_completion, guanaco: generate.py will use the first" in printed
    assert metrics(folder)[-1]["step"] == 4


def test_packing_does_not_change_the_gradient(run, capsys):
    """All rows in one step: each in a sequence of its own, or several in one."""
    alone = first_gradient(run, "--max_grad_norm 0", batch(42, 1), out="alone")
    packed = first_gradient(run, "--max_grad_norm 0 --packing --max_length 64", batch(8, 2), out="packed")
    assert "1 x 42 rows" in (printed := capsys.readouterr().out) and "2 x 8 packs of 64 tokens" in printed
    assert norm({name: packed[name] - alone[name] for name in alone}) < 1e-5 * norm(alone)


def test_only_the_newest_checkpoints_are_kept(run):
    _, folder = run("--max_steps 5 --save_steps 1 --save_total_limit 2")
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def test_an_earlier_run_is_only_overwritten_on_request(run, monkeypatch):
    _, folder = run("--max_steps 2 --logging_steps 1")
    before = sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())
    with pytest.raises(InputError, match="holds an earlier run"):
        run("--max_steps 2")
    with pytest.raises(InputError, match="no such data file"):
        run("--max_steps 1 --overwrite_output_dir", dataset="mistyped.jsonl")
    with pytest.raises(InputError, match="would delete what --adapter"):
        run("--max_steps 1 --overwrite_output_dir --adapter", str(folder / "checkpoint-2"))
    with monkeypatch.context() as patch, pytest.raises(InputError, match="out of memory after step 0"):
        patch.setattr(train, "target_logprobs", out_of_memory)
        run("--max_steps 1 --overwrite_output_dir")
    after = sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())
    assert after == before  # none of these mistakes has touched the earlier run
    run("--max_steps 1 --overwrite_output_dir --logging_steps 1")
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    assert [line["step"] for line in metrics(folder)] == [1]


def test_a_run_that_failed_in_its_first_step_can_be_started_again(run, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(InputError, match="out of memory after step 0"):
        patch.setattr(train, "target_logprobs", out_of_memory)
        run("--max_steps 1")
    run("--max_steps 1")


def test_an_adapter_can_be_trained_further(run, tmp_path):
    _, first = run("--max_steps 3 --lora_r 4 --lora_target_modules k_proj", out="first")
    _, second = run("--max_steps 3 --adapter", str(first), out="second")
    before, after = adapter(first), adapter(second)
    assert {name: tensor.shape for name, tensor in before.items()} == {
        name: t.shape for name, t in after.items()
    }
    assert not torch.equal(*(next(iter(tensors.values())) for tensors in (before, after)))
    _, untouched = run("--max_steps 1 --warmup_steps 1 --adapter", str(first), out="untouched")  # rate 0
    assert_same(adapter(untouched), before)


@pytest.mark.parametrize(
    "flags",
    [
        "--use_rslora",
        "--use_dora",
        "--bnb_4bit_quant_type fp4",
        "--no_bnb_4bit_use_double_quant",
        "--no_load_in_4bit",
    ],
)
def test_variants_of_lora_and_quantization_train_and_load_in_peft(run, base, flags):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, folder = run("--max_steps 3", flags)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    config = loaded.peft_config["default"]
    assert (config.use_rslora, config.use_dora) == ("rslora" in flags, "dora" in flags)
    weights = {
        name.replace(".default", ""): value for name, value in loaded.state_dict().items() if "lora_" in name
    }
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)


def test_a_model_that_is_already_4_bit_keeps_its_quantization(run, base, tmp_path):
    quantized = load_base(base, torch.bfloat16, torch.device("cpu"), quant_type="fp4", double_quant=False)
    quantized.save_pretrained(tmp_path / "fp4")
    load_tokenizer(base).save_pretrained(tmp_path / "fp4")
    model, _ = run("--max_steps 2", model=str(tmp_path / "fp4"))
    layer = model.get_base_model().model.layers[0].self_attn.k_proj
    assert layer.weight.quant_state.quant_type == "fp4" and not layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.float32
    with pytest.raises(InputError, match="already 4-bit"):
        run("--max_steps 2 --no_load_in_4bit", model=str(tmp_path / "fp4"), out="refused")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lora_target_modules q_proj nope", "no linear layer named 'nope'"),
        ("--split test", "single file"),
        ("--validation_split 1e-6", "holds out 0 of 42 rows"),
        ("--resume_from_checkpoint nowhere", "is incomplete or corrupt: it has no manifest.json"),
        ("--adapter {base}", "no adapter folder"),
    ],
)
def test_mistakes_in_flags_are_refused(run, base, flags, message):
    with pytest.raises(InputError, match=message):
        run("--max_steps 1", flags.format(base=base))


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "--max_steps 1 --allow_changes max_steps",
            "checkpoint-2 is at step 2, and this run has only 1 steps",
        ),
        ("--dtype float16", "dtype was float32, now it is float16"),
        ("--optim adamw_torch --allow_changes optim", "another --optim"),
        ("--lora_r 8 --allow_changes lora_r", "other shapes"),
        ("--packing", "packing was False, now it is True"),
        ("--packing --allow_changes packing", "pack_length was None, now it is 256"),
        (
            "--seed 3 --learning_rate 1e-3",
            "learning_rate was 0.003, now it is 0.001; seed was 42, now it is 3",
        ),
        (
            "--per_device_train_batch_size 2",
            "16 sequences in a step, .* make 8. Keep them with --per_device_train_batch_size 2 "
            "--gradient_accumulation_steps 8, .* --allow_changes packs_per_step$",
        ),
        (
            "--max_length 16 --allow_changes max_length",
            r"data is not the same .* --allow_changes max_length data$",
        ),
        ("--streaming", "streaming was False, now it is True"),
        ("--lora_target_modules q_proj k_proj", "lora_target_modules was"),
    ],
)
def test_resuming_with_different_settings_is_refused_by_name(run, flags, message):
    _, folder = run("--max_steps 2 --save_steps 2")
    with pytest.raises(InputError, match=message):
        run("--max_steps 2 --resume_from_checkpoint latest", flags)
    assert (folder / "checkpoint-2" / STATE).exists()


def test_resuming_a_run_of_another_folder_does_not_overwrite_the_run_in_this_one(run):
    _, first = run("--max_steps 2 --save_steps 1", out="first")
    _, second = run("--max_steps 3 --save_steps 1", out="second")
    checkpoint = str(first / "checkpoint-1")
    with pytest.raises(InputError, match="holds an earlier run"):
        run("--max_steps 2 --resume_from_checkpoint", checkpoint, out="second")
    assert (second / "checkpoint-3").exists()
    _, third = run("--max_steps 2 --resume_from_checkpoint", checkpoint, out="third")
    assert_same(adapter(third), adapter(first))


def test_a_tokenizer_with_several_chat_templates_can_be_saved_again(run, base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    tokenizer = load_tokenizer(base)
    templates = {"default": FALLBACK_CHAT_TEMPLATE, "tool_use": "{{ messages }}{{ tools }}"}
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A leaf."}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    chats = str(tmp_path / "chats.jsonl")  # other rows bring a template of their own
    run("--max_steps 1", model=model, dataset=chats)
    _, folder = run("--max_steps 1 --resume_from_checkpoint latest", model=model, dataset=chats)
    assert load_tokenizer(str(folder)).chat_template == templates


def test_padded_rows_never_exceed_the_context_of_the_model(run, base, tmp_path):
    """Rows are padded to multiples of 8, so a context of 37 holds rows of 32: 37 would be padded to 40."""
    config = GPT2Config(vocab_size=448, n_positions=37, n_embd=64, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    load_tokenizer(base).save_pretrained(tmp_path / "gpt2")
    rows = tmp_path / "long.jsonl"
    rows.write_text(json.dumps({"text": "a red leaf " * 40}) + "\n")
    flags = "--max_steps 1 --lora_target_modules c_attn --gradient_checkpointing none --logging_steps 1"
    _, folder = run(flags, model=str(tmp_path / "gpt2"), dataset=str(rows))
    assert metrics(folder)[0]["tokens_seen"] == 32


def test_a_tokenizer_of_another_model_is_refused(run, base, tmp_path):
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    load_tokenizer(base).save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match="the model has only 100 tokens"):
        run("--max_steps 1", model=str(tmp_path / "small"))


def test_inference_repacking_is_off_in_every_layer(run):
    model, _ = run("--max_steps 1")
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_the_start_screen_shows_the_share_of_weights_in_4_bits(run, capsys):
    run("--max_steps 1")
    linear = 2 * 36864
    total = linear + 2 * 448 * 64 + 5 * 64  # embedding, head and norms are not quantized
    assert f"{linear / total:.1%} of them nf4, the others float32" in capsys.readouterr().out


def test_a_truncated_model_or_adapter_file_is_refused(run, base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    _, folder = run("--max_steps 1")
    for file in (tmp_path / "model" / "model.safetensors", folder / ADAPTER):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot load"):
        run("--max_steps 1", model=str(tmp_path / "model"), out="other")
    with pytest.raises(InputError, match="cannot load an adapter"):
        run("--max_steps 1 --adapter", str(folder), out="another")


def test_losses_match_those_of_the_transformers_trainer(run, base, rows_file, tmp_path):
    """50 steps of transformers' Trainer with PEFT on the same rows in the same order, in float32."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments, set_seed

    from qlora.data.order import StepOrder

    flags = "--split train[:40] --max_steps 50 --logging_steps 1 --optim adamw_torch --save_steps 100"
    _, folder = run(flags, batch(4, 2))  # 40 rows: an epoch is five full steps, as the Trainer counts them
    ours = torch.tensor([line["loss"] for line in metrics(folder)])

    tokenizer = load_tokenizer(base)
    rows = tokenize_rows(read_rows(rows_file, "train[:40]"), tokenizer)
    order = StepOrder(rows.lengths, 8, seed=42)
    examples = [rows[index] for step in range(50) for (index,) in order.packs(step)]
    model = load_base(base, torch.float32, torch.device("cpu"))
    set_seed(42)
    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )

    def collate(rows):
        return {
            "input_ids": torch.nn.utils.rnn.pad_sequence([ids.long() for ids, _ in rows], batch_first=True),
            "attention_mask": torch.nn.utils.rnn.pad_sequence(
                [torch.ones(len(ids)) for ids, _ in rows], True
            ),
            "labels": torch.nn.utils.rnn.pad_sequence([labels.long() for _, labels in rows], True, -100),
        }

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    trainer = InOrder(
        model=model,
        train_dataset=examples,
        data_collator=collate,
        args=TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=50,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            max_grad_norm=0.3,
            optim="adamw_torch",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            seed=42,
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
    )
    trainer.train()
    theirs = torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])
    difference = (ours - theirs).abs()
    assert ours[-1] < 0.9 * ours[0]
    assert difference.max() < 1e-3 and difference.mean() < 1e-4


def test_the_command_line_trains_and_generates(base, rows_file, tmp_path):
    out = str(tmp_path / "out")
    run = {"cwd": ROOT, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    flags = "--dtype float32 --max_steps 3 --validation_split 4 --report_to wandb".split()
    argv = [sys.executable, "train.py", "--model", base, "--dataset", rows_file, "--output-dir", out, *flags]
    result = subprocess.run(argv, **run)
    assert result.returncode == 0, result.stderr
    for fact in (
        "38 rows read = 38 used + 0 dropped", "float32 on the CPU", "does not page", "trainable parameters"
    ):  # fmt: skip
        assert fact in result.stdout
    assert "Traceback" not in result.stderr
    argv = [sys.executable, "generate.py", "--model", base, "--adapter", out, "--dtype", "float32"]
    result = subprocess.run([*argv, "--prompt", ROWS[0]["prompt"], "--max_new_tokens", "5"], **run)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "no-such-org/no-such-model"], "no-such-org/no-such-model"),
        (["--model", "{base}", "--dataset", "no-such-org/no-such-data"], "no-such-org/no-such-data"),
        (["--model", "{base}", "--dataset", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_a_missing_model_or_dataset_is_reported_in_one_line(base, tmp_path, flags, message):
    flags = [flag.format(base=base) for flag in flags]
    result = subprocess.run(
        [sys.executable, "train.py", *flags, "--output_dir", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_full_determinism_allows_only_deterministic_operations(run):
    try:
        run("--full_determinism --max_steps 1")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
