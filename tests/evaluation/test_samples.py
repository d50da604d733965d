"""--sample_prompts: answers of base and tuned model at every evaluation."""

import json
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora.errors import InputError
from qlora.evaluation.samples import Samples
from qlora.model.generation import generate
from qlora.run.tracker import _log_wandb
from tests.conftest import ROWS
from tests.test_train import adapter, assert_same, metrics


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in ROWS[:2]))
    return str(path)


def test_samples_are_logged_at_every_evaluation_and_change_nothing(run, rows_file, prompts, capsys):
    flags = f"--max_steps 4 --lora_dropout 0.1 --learning_rate 3e-2 --validation_dataset {rows_file}"
    want = adapter(run(flags, "--eval_steps 2", out="plain")[1])
    _, folder = run(flags, f"--eval_steps 2 --sample_prompts {prompts} --sample_max_new_tokens 5")
    assert_same(adapter(folder), want)
    evaluated = [line for line in metrics(folder) if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    first, last = (line["samples"] for line in evaluated)
    assert [sample["prompt"] for sample in first] == [row["prompt"] for row in ROWS[:2]]
    assert [sample["base"] for sample in first] == [sample["base"] for sample in last]
    assert any(sample["tuned"] != sample["base"] for sample in last)
    assert f"tuned: {last[0]['tuned'].strip()}" in capsys.readouterr().out


def test_the_base_answers_without_the_adapter(run, base, prompts, rows_file):
    flags = f"--max_steps 1 --validation_dataset {rows_file} --sample_prompts {prompts}"
    _, folder = run(flags, "--learning_rate 9", out="wild")
    _, tame = run(flags, "--learning_rate 1e-9", out="tame")
    wild, tame = (metrics(path)[-1]["samples"] for path in (folder, tame))
    assert [sample["base"] for sample in wild] == [sample["base"] for sample in tame]
    assert [sample["tuned"] for sample in tame] == [sample["base"] for sample in tame]


def test_an_out_of_memory_error_costs_only_the_samples(run, rows_file, prompts, monkeypatch, capsys):
    flags = f"--max_steps 3 --eval_steps 1 --lora_dropout 0.2 --validation_dataset {rows_file}"
    want = adapter(run(flags, out="plain")[1])

    def runs_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.GenerationMixin.generate", runs_out)
    _, folder = run(flags, f"--sample_prompts {prompts}")
    assert_same(adapter(folder), want)  # with dropout: the model was in training mode again
    assert (
        capsys.readouterr().out.count("no samples at this evaluation: out of memory (CUDA out of memory)")
        == 3
    )
    assert not any("samples" in line for line in metrics(folder))


def test_samples_are_not_logged_if_the_run_was_stopped(tokenizer, monkeypatch):
    monkeypatch.setattr("qlora.evaluation.samples.generate", lambda *_, **__: ["half an ans"])
    model = SimpleNamespace(disable_adapter=nullcontext)
    samples = Samples([[1, 2]], tokenizer, 4)
    assert samples.ask(model, None, should_stop=lambda: True, say=print) is None
    (answered,) = samples.ask(model, None, should_stop=lambda: False, say=print)
    assert answered["tuned"] == answered["base"] == "half an ans"


def test_other_errors_are_raised(base, tokenizer, monkeypatch):
    def fail(*_, **__):
        raise TypeError("a mistake in the loop")

    model = AutoModelForCausalLM.from_pretrained(base)
    monkeypatch.setattr("transformers.GenerationMixin.generate", fail)
    with pytest.raises(TypeError, match="a mistake in the loop"):
        Samples([[1, 2]], tokenizer, 4).ask(model, nullcontext, should_stop=lambda: False, say=print)


def test_wandb_gets_a_table():
    logged = {}

    class Run:
        def log(self, values, step):
            logged[step] = values

    sample = {"prompt": "a", "base": "b", "tuned": "c"}
    _log_wandb(Run(), {"step": 3, "eval_loss": 1.0, "samples": [sample]})
    assert logged[3]["eval_loss"] == 1.0
    assert logged[3]["samples"].data == [["a", "b", "c"]]


def test_an_invalid_prompt_ends_the_run_before_the_model_is_loaded(run, rows_file, tmp_path, monkeypatch):
    monkeypatch.setattr("train.load_base", lambda *_: pytest.fail("loaded"))
    (tmp_path / "bad.jsonl").write_text('{"question": "What?"}\n')
    flags = f"--validation_dataset {rows_file} --sample_prompts"
    with pytest.raises(InputError, match=r"bad\.jsonl line 1"):
        run(flags, f"{tmp_path}/bad.jsonl")
    with pytest.raises(InputError, match=r"none\.jsonl"):
        run(flags, f"{tmp_path}/none.jsonl")


def test_an_answer_ends_once_the_run_is_asked_to_stop(base, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base)

    ask = partial(
        generate, model, tokenizer, [[1, 300, 301]], nullcontext, max_new_tokens=20, min_new_tokens=20
    )
    due = iter([False, False, True])
    short = ask(should_stop=lambda: next(due))[0]  # three tokens, after each of which it is asked
    assert len(tokenizer(ask()[0])["input_ids"]) > len(tokenizer(short)["input_ids"])
