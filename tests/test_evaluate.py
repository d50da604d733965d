"""python -m qlora.evaluate: the base with and without its adapter, their answers, quantization errors."""

import io
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file

from qlora import evaluate
from qlora.model.base import load_tokenizer
from tests.conftest import ROWS
from tests.test_train import metrics


@pytest.fixture
def run_evaluate(tmp_path, capsys):
    """Run the command; returns (its JSON, its output)."""

    def run_evaluate(*flags: str) -> tuple[dict, str]:
        output_file = tmp_path / "evaluation.json"
        evaluate.main([*map(str, flags), "--output_file", str(output_file)])
        return json.loads(output_file.read_text()), capsys.readouterr().out

    return run_evaluate


def test_the_loss_on_held_out_rows_is_the_one_logged_in_training(run, base, rows_file, run_evaluate):
    flags = "--max_steps 4 --validation_split 0.2 --seed 7 --max_length 24 --no_completion_only_loss"
    _, folder = run(flags)
    logged = [line["eval_loss"] for line in metrics(folder) if "eval_loss" in line][-1]
    held_out = "--validation_split", "0.2"  # the seed is saved with the adapter
    report, output = run_evaluate("--model", base, "--adapter", folder, "--dataset", rows_file, *held_out)
    assert report["tuned"]["loss"] == pytest.approx(logged, rel=1e-6)
    assert report["tuned"]["perplexity"] == pytest.approx(math.exp(logged), rel=1e-6)
    assert report["base"]["loss"] > report["tuned"]["loss"] + 0.01
    assert f"{report['base']['loss']:.4f}" in output and f"{logged:.4f}" in output


def test_the_base_is_the_model_without_its_adapter(base, adapter, rows_file, run_evaluate):
    flags = "--dataset", rows_file, "--max_length", "64", "--dtype", "float32"
    alone, output = run_evaluate(
        "--model", base, *flags, "--prompts_file", rows_file, "--max_new_tokens", 1, "--samples", 1
    )
    assert " base: " in output and "tuned" not in output
    both, _ = run_evaluate("--model", base, "--adapter", adapter[1], *flags)
    assert "tuned" not in alone
    assert both["base"]["loss"] == pytest.approx(alone["base"]["loss"], rel=1e-6)


def test_forgetting_is_measured_as_the_loss_on_a_general_text(base, adapter, tmp_path, run_evaluate):
    model, folder = adapter
    (tmp_path / "general.txt").write_text("brown boat red house")
    report, _ = run_evaluate(
        "--model", base, "--adapter", folder, "--general_dataset", tmp_path / "general.txt"
    )
    tokenizer = load_tokenizer(base)
    ids = torch.tensor([tokenizer("brown boat red house")["input_ids"] + [tokenizer.eos_token_id]])
    assert set(report["base"]) == {"general_loss", "general_perplexity"}
    for name, context in (("base", model.disable_adapter()), ("tuned", nullcontext())):
        with context, torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
        want = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        assert report[name]["general_loss"] == pytest.approx(want.item(), rel=1e-5)


def test_answers_of_base_and_tuned_model_are_scored_against_their_references(
    base, adapter, rows_file, run_evaluate
):
    flags = "--prompts_file", rows_file, "--samples", 2, "--max_new_tokens", 30
    report, output = run_evaluate("--model", base, "--adapter", adapter[1], *flags)
    answers = report["answers"]
    assert [answer["reference"] for answer in answers] == [row["completion"] for row in ROWS]
    for name in ("base", "tuned"):
        right = sum(answer[name] == answer["reference"] for answer in answers)
        assert report[name]["exact_match"] == pytest.approx(right / len(ROWS))
    assert report["tuned"]["exact_match"] > 0.5 > report["base"]["exact_match"]
    assert output.count(" base: ") == output.count("tuned: ") == 2
    assert f"tuned: {answers[1]['tuned']}" in output


def test_references_have_no_end_of_sequence_token(base, tmp_path, run_evaluate):
    (tmp_path / "chats.jsonl").write_text(
        json.dumps({"text": "<s>[INST] What? [/INST] A cloud. </s>"}) + "\n"
    )
    report, _ = run_evaluate(
        "--model", base, "--prompts_file", tmp_path / "chats.jsonl", "--max_new_tokens", 2
    )
    assert report["answers"][0]["reference"] == "A cloud."


def test_code_is_scored_by_codebleu_and_whether_it_parses(base, tmp_path, run_evaluate):
    rows = [{"prompt": "Add.", "completion": "def add(a, b):\n    return a + b"}]
    (tmp_path / "code.jsonl").write_text(json.dumps(rows[0]) + "\n")
    flags = "--prompts_file", tmp_path / "code.jsonl", "--code", "--max_new_tokens", "4"
    report, output = run_evaluate("--model", base, *flags)
    parts = {f"codebleu_{part}" for part in ("ngram", "weighted_ngram", "syntax", "dataflow")}
    assert set(report["base"]) == parts | {"codebleu", "exact_match", "parses"}
    assert "codebleu_dataflow" in output


def test_without_codebleu_the_command_ends_before_the_model_is_loaded(base, rows_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "codebleu", None)
    monkeypatch.setattr("qlora.commands.load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=r"--code needs CodeBLEU: pip install -r requirements-codebleu\.txt"):
        evaluate.main(["--model", base, "--prompts_file", rows_file, "--code", "--max_new_tokens", "4"])


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_has_no_perplexity(loss):
    report = {"base": evaluate.loss_values("general_loss", loss)}
    assert report["base"] == {"general_loss": None, "general_perplexity": None}
    assert [line.split() for line in evaluate.describe(report).splitlines()[1:]] == [
        ["general_loss", "none"], ["general_perplexity", "none"],
    ]  # fmt: skip


def test_a_perplexity_that_no_float_can_hold_is_left_out():
    assert evaluate.loss_values("loss", 1000.0) == {"loss": 1000.0, "perplexity": None}
    assert evaluate.loss_values("loss", math.log(8)) == {"loss": math.log(8), "perplexity": pytest.approx(8)}


def test_characters_that_the_terminal_lacks_are_printed_as_question_marks(base, tmp_path, monkeypatch):
    row = {"prompt": "What is \u96ea?", "completion": "Snow."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stdout)
    output_file = tmp_path / "evaluation.json"
    flags = ["--prompts_file", tmp_path / "rows.jsonl", "--samples", 1, "--max_new_tokens", 2]
    evaluate.main(["--model", base, *map(str, flags), "--output_file", str(output_file)])
    stdout.flush()
    assert "--- What is ?" in stdout.buffer.getvalue().decode("latin-1")
    assert json.loads(output_file.read_text(encoding="utf-8"))["answers"][0]["prompt"] == row["prompt"]


def test_the_quantization_report_has_the_error_of_bitsandbytes(base, run_evaluate):
    report, output = run_evaluate("--quantization", base)
    weights = load_file(Path(base) / "model.safetensors")
    linear = [name for name in weights if "_proj." in name]
    assert sorted(f"{layer['name']}.weight" for layer in report["layers"]) == sorted(linear)
    layer = report["layers"][0]
    weight = weights[f"{layer['name']}.weight"]
    packed, state = bnb.quantize_4bit(weight, quant_type="fp4")
    lost = (bnb.dequantize_4bit(packed, state) - weight).norm() / weight.norm()
    assert layer["schemes"]["fp4"]["error"] == pytest.approx(lost.item(), rel=1e-4)
    total = report["total"]
    assert total["nf4"]["error"] < total["nf4 double"]["error"] < total["fp4"]["error"]
    assert total["nf4"]["bits"] == 4.5
    assert report["memory_gb"]["32 bits"] * 2**30 == 4 * sum(tensor.numel() for tensor in weights.values())
    assert layer["name"] in output and "4.500" in output


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "nothing to do"),
        ("--model m", "nothing to do"),
        ("--quantization m --dataset d", "--dataset cannot be used with --quantization"),
        ("--model m --dataset d --code", "--code needs --prompts_file"),
        ("--model m --dataset d --validation_split test", "--validation_split must be a share or a number"),
        ("--model m --dataset d --validation_seed 3", "--validation_seed needs --validation_split"),
        ("--model m --prompts_file f --general_split test", "--general_split needs --general_dataset"),
        ("--model m --dataset d --max_length 0", "--max_length must be a number of at least 1"),
    ],
)
def test_flags_that_exclude_or_need_each_other_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(flags.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_files_are_named_before_anything_is_loaded(base, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora.commands.load_base", lambda *_: pytest.fail("loaded"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What?"}\n')
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "text.txt").write_text("The capital of France is Paris.\n")
    for flags, message in (
        (f"--prompts_file {tmp_path}/rows.jsonl", "rows.jsonl"),
        (f"--prompts_file {tmp_path}/none.jsonl", "none.jsonl"),
        (f"--prompts_file {tmp_path}/text.txt", "rows of plain text have no reference answers"),
        (f"--dataset {tmp_path}/missing.jsonl", "missing.jsonl"),
        (f"--dataset {tmp_path}/rows.jsonl --output_file {tmp_path}", "--output_file"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluate.main(["--model", base, *flags.split()])
    with pytest.raises(SystemExit, match="cannot load"):
        evaluate.main(["--quantization", str(tmp_path / "nowhere")])
