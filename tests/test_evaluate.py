"""python -m qlora.evaluate: base against base + adapter, their answers, and what quantization does."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file

from qlora import evaluate
from qlora.evaluation import quantization, scores
from qlora.evaluation.scores import code_of, codebleu, parses, score
from qlora.model.base import load_tokenizer
from tests.conftest import ROWS
from tests.test_train import metrics


@pytest.fixture
def tell(tmp_path, capsys):
    """Run the command; returns (its JSON, what it printed)."""

    def tell(*flags: str) -> tuple[dict, str]:
        output_file = tmp_path / "evaluation.json"
        evaluate.main([*map(str, flags), "--output_file", str(output_file)])
        return json.loads(output_file.read_text()), capsys.readouterr().out

    return tell


def test_the_tuned_loss_on_held_out_rows_is_the_one_that_was_logged(run, base, rows_file, tell):
    flags = "--max_steps 4 --validation_split 0.2 --seed 7 --max_length 24 --no_completion_only_loss"
    _, folder = run(flags)
    logged = [line["eval_loss"] for line in metrics(folder) if "eval_loss" in line][-1]
    held_out = "--validation_split", "0.2"  # the adapter knows the seed
    report, shown = tell("--model", base, "--adapter", folder, "--dataset", rows_file, *held_out)
    assert report["tuned"]["loss"] == pytest.approx(logged, rel=1e-6)
    assert report["tuned"]["perplexity"] == pytest.approx(math.exp(logged), rel=1e-6)
    assert report["base"]["loss"] > report["tuned"]["loss"] + 0.01
    assert f"{report['base']['loss']:.4f}" in shown and f"{logged:.4f}" in shown


def test_the_base_is_the_model_without_its_adapter(base, adapter, rows_file, tell):
    flags = "--dataset", rows_file, "--max_length", "64", "--dtype", "float32"
    alone, shown = tell(
        "--model", base, *flags, "--prompts_file", rows_file, "--max_new_tokens", 1, "--samples", 1
    )
    assert " base: " in shown and "tuned" not in shown
    both, _ = tell("--model", base, "--adapter", adapter[1], *flags)
    assert "tuned" not in alone
    assert both["base"]["loss"] == pytest.approx(alone["base"]["loss"], rel=1e-6)


def test_what_is_forgotten_is_the_loss_on_a_general_text(base, adapter, tmp_path, tell):
    model, folder = adapter
    (tmp_path / "general.txt").write_text("brown boat red house")
    report, _ = tell("--model", base, "--adapter", folder, "--general_dataset", tmp_path / "general.txt")
    tokenizer = load_tokenizer(base)
    ids = torch.tensor([tokenizer("brown boat red house")["input_ids"] + [tokenizer.eos_token_id]])
    assert set(report["base"]) == {"general_loss", "general_perplexity"}
    for name, context in (("base", model.disable_adapter()), ("tuned", nullcontext())):
        with context, torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
        want = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        assert report[name]["general_loss"] == pytest.approx(want.item(), rel=1e-5)


def test_answers_are_scored_against_their_references_for_both(base, adapter, rows_file, tell):
    flags = "--prompts_file", rows_file, "--samples", 2, "--max_new_tokens", 30
    report, shown = tell("--model", base, "--adapter", adapter[1], *flags)
    answers = report["answers"]
    assert [answer["reference"] for answer in answers] == [row["completion"] for row in ROWS]
    for name in ("base", "tuned"):
        right = sum(answer[name] == answer["reference"] for answer in answers)
        assert report[name]["exact_match"] == pytest.approx(right / len(ROWS))
    assert report["tuned"]["exact_match"] > 0.5 > report["base"]["exact_match"]
    assert shown.count(" base: ") == shown.count("tuned: ") == 2
    assert f"tuned: {answers[1]['tuned']}" in shown


def test_a_reference_ends_before_its_end_of_sequence(base, tmp_path, tell):
    (tmp_path / "chats.jsonl").write_text(
        json.dumps({"text": "<s>[INST] What? [/INST] A cloud. </s>"}) + "\n"
    )
    report, _ = tell("--model", base, "--prompts_file", tmp_path / "chats.jsonl", "--max_new_tokens", 2)
    assert report["answers"][0]["reference"] == "A cloud."


def test_code_is_scored_by_codebleus_four_parts_and_whether_it_parses(base, tmp_path, tell):
    rows = [{"prompt": "Add.", "completion": "def add(a, b):\n    return a + b"}]
    (tmp_path / "code.jsonl").write_text(json.dumps(rows[0]) + "\n")
    flags = "--prompts_file", tmp_path / "code.jsonl", "--code", "--max_new_tokens", "4"
    report, shown = tell("--model", base, *flags)
    parts = {f"codebleu_{part}" for part in ("ngram", "weighted_ngram", "syntax", "dataflow")}
    assert set(report["base"]) == parts | {"codebleu", "exact_match", "parses"}
    assert "codebleu_dataflow" in shown


def test_codebleu_is_one_for_the_reference_and_nothing_for_nothing():
    code = "def f(x):\n    y = x + 1\n    return y"
    assert set(codebleu([code], [code]).values()) == {1.0}
    assert set(codebleu([""], [code]).values()) == {0.0}
    renamed = codebleu([code.replace("y", "total")], [code])
    assert renamed["codebleu_syntax"] == 1 and renamed["codebleu_ngram"] < 1
    assert renamed["codebleu"] == pytest.approx(sum(list(renamed.values())[1:]) / 4)


def test_code_without_a_dataflow_is_scored_by_the_other_three():
    scores = codebleu(["assert 1 < 2 < 3 and not 4 > 5"], ["assert 1 < 2 < 3 and not 4 > 5"])
    assert scores["codebleu_dataflow"] is None and scores["codebleu"] == 1


def test_only_code_parses_and_a_fence_is_no_part_of_it():
    assert code_of("Here:\n```python\nx = 1\n```\nDone.") == "x = 1\n"
    assert [parses(text) for text in ("x = 1", "x = ", "", "# nothing", "\0")] == [True] + [False] * 4
    assert score(["```\nx = 1\n```"], ["x = 1"], is_code=True)["parses"] == 1


def test_without_codebleu_one_line_says_what_to_install(base, rows_file, monkeypatch):
    monkeypatch.setitem(scores.calc_codebleu.__globals__["__builtins__"], "__import__", _no_codebleu)
    with pytest.raises(SystemExit, match=r"--code needs CodeBLEU: pip install -r requirements-codebleu\.txt"):
        evaluate.main(["--model", base, "--prompts_file", rows_file, "--code", "--max_new_tokens", "4"])


def _no_codebleu(name, *arguments, _import=__import__):
    if name == "codebleu":
        raise ImportError(name)
    return _import(name, *arguments)


def test_the_quantization_report_measures_what_bitsandbytes_loses(base, tell):
    report, shown = tell("--quantization", base)
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
    assert layer["name"] in shown and "4.500" in shown


def test_double_quantization_takes_an_eighth_of_a_bit():
    layer = quantization.measure("layer", torch.randn(1024, 1024))
    constants = {name: values["bits"] - 4 for name, values in layer["schemes"].items()}
    assert constants["nf4"] == 0.5
    assert constants["nf4 double"] == pytest.approx(8 / 64 + 32 / (64 * 256), abs=1e-4)  # 0.127


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "nothing to do"),
        ("--model m", "nothing to do"),
        ("--quantization m --dataset d", "--dataset means nothing with --quantization"),
        ("--model m --dataset d --code", "--code needs --prompts_file"),
        ("--model m --dataset d --validation_split test", "--validation_split must be a share or a number"),
        ("--model m --dataset d --validation_seed 3", "--validation_seed needs --validation_split"),
        ("--model m --prompts_file f --general_split test", "--general_split needs --general_dataset"),
        ("--model m --dataset d --max_length 0", "--max_length must be a number from 1 on"),
    ],
)
def test_flags_that_do_not_belong_together_are_refused(flags, message, capsys):
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
        (f"--prompts_file {tmp_path}/text.txt", "rows of plain text have no reference answer"),
        (f"--dataset {tmp_path}/missing.jsonl", "missing.jsonl"),
        (f"--dataset {tmp_path}/rows.jsonl --output_file {tmp_path}", "--output_file"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluate.main(["--model", base, *flags.split()])
    with pytest.raises(SystemExit, match="cannot load"):
        evaluate.main(["--quantization", str(tmp_path / "nowhere")])
