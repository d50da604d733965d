"""python -m qlora.evaluate: the base with and without its adapter, their answers, quantization errors."""

import hashlib
import io
import json
import math
import re
import shutil
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file

from qlora import evaluate
from qlora.commands import load_base_for
from qlora.data.formatting import Formatting
from qlora.data.segments import DropRow
from qlora.model.base import load_base, load_tokenizer
from tests.conftest import ROWS
from tests.data.chat_templates import use_template
from tests.test_train import metrics


@pytest.fixture
def run_evaluate(tmp_path, capsys):
    """Run the command; returns (its JSON, its output)."""

    def run_evaluate(*flags: str) -> tuple[dict, str]:
        output_file = tmp_path / "evaluation.json"
        evaluate.main([*map(str, flags), "--output_file", str(output_file)])
        return json.loads(output_file.read_text()), capsys.readouterr().out

    return run_evaluate


@pytest.fixture
def write_rows(tmp_path):
    """Write rows to a jsonl file; returns its path."""

    def write_rows(rows: list[dict], name: str = "rows.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write_rows


@pytest.mark.parametrize("value", [["0.2"], []])
def test_the_loss_on_held_out_rows_is_the_one_logged_in_training(run, base, rows_file, run_evaluate, value):
    flags = "--max_steps 4 --validation_split 0.2 --seed 7 --max_length 24 --no_completion_only_loss"
    _, folder = run(flags)
    logged = [line["eval_loss"] for line in metrics(folder) if "eval_loss" in line][-1]
    held_out = "--validation_split", *value  # the rows' hashes are saved with the adapter
    report, output = run_evaluate("--model", base, "--adapter", folder, "--dataset", rows_file, *held_out)
    assert report["tuned"]["loss"] == pytest.approx(logged, rel=1e-6)
    assert report["tuned"]["perplexity"] == pytest.approx(math.exp(logged), rel=1e-6)
    assert report["base"]["loss"] > report["tuned"]["loss"] + 0.01
    assert f"{report['base']['loss']:.4f}" in output and f"{logged:.4f}" in output


def hash_of(row: dict) -> int:
    text = json.dumps(row, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def held_out_rows(folder: Path) -> list[list[dict]]:
    """The rows whose hashes are kept beside an adapter, of each dataset, if they are among ROWS."""
    record = json.loads((folder / "held_out_rows.json").read_text())
    return [[row for row in ROWS if hash_of(row) in hashes] for hashes in record["row_hashes"]]


def test_the_hashes_of_the_held_out_rows_are_kept_with_the_adapter(run):
    _, folder = run("--max_steps 2 --save_steps 1 --validation_split 9 --overwrite_output_dir")
    kept = (folder / "held_out_rows.json").read_bytes()
    assert json.loads(kept)["validation_split"] == 9
    assert [len(rows) for rows in held_out_rows(folder)] == [9]
    for step in (1, 2):
        assert (folder / f"checkpoint-{step}" / "held_out_rows.json").read_bytes() == kept
    assert "held_out" not in (folder / "generate_defaults.json").read_text()
    _, folder = run("--max_steps 1 --overwrite_output_dir")
    assert not list(folder.rglob("held_out_rows.json"))  # that of the earlier run does not stay


def test_held_out_rows_are_found_whatever_was_added_and_whatever_the_length(
    run, base, run_evaluate, write_rows
):
    _, folder = run("--max_steps 4 --validation_split 0.2 --max_length 64")
    logged = [line["eval_loss"] for line in metrics(folder) if "eval_loss" in line][-1]
    (held_out,) = held_out_rows(folder)
    new = [{"prompt": f"New {number}?", "completion": "Yes."} for number in range(40)]
    flags = "--model", base, "--adapter", folder, "--validation_split", "--dataset"
    report, output = run_evaluate(*flags, write_rows([*new, *reversed(ROWS)]), "--max_length", "max")
    assert report["tuned"]["loss"] == pytest.approx(logged, rel=1e-6)
    counts = report["rows"]["dataset"]
    assert counts == {
        "read": 82, "used": len(held_out), "dropped": {}, "first_dropped": {}, "cut": 0,
        "not_held_out": 82 - len(held_out),
    }  # fmt: skip
    line = f"82 rows read = {len(held_out)} used + 0 dropped + {82 - len(held_out)} not held out"
    assert f"--dataset: {line}" in output


def test_a_held_out_row_that_other_flags_drop_is_counted(run, base, rows_file, run_evaluate):
    _, folder = run("--max_steps 1 --validation_split 0.3 --max_length 64")
    (held_out,) = held_out_rows(folder)
    tokenizer = load_tokenizer(base)
    lost = [row for row in held_out if len(tokenizer(row["prompt"])["input_ids"]) >= 10]
    assert 0 < len(lost) < len(held_out)
    flags = "--model", base, "--adapter", folder, "--dataset", rows_file, "--validation_split"
    report, output = run_evaluate(*flags, "--max_length", "10")
    counts = report["rows"]["dataset"]
    assert counts["dropped"] == {"prompt fills --max_length": len(lost)}
    assert counts["first_dropped"]["prompt fills --max_length"].startswith(rows_file)
    assert counts["used"] == counts["cut"] == len(held_out) - len(lost)
    assert f"{len(lost)} dropped ({len(lost)} prompt fills --max_length, first: {rows_file} line" in output


def test_the_held_out_rows_of_each_of_several_datasets_are_found(run, base, run_evaluate, write_rows):
    files = [write_rows(ROWS[:25], "a.jsonl"), write_rows(ROWS[25:], "b.jsonl")]
    _, folder = run("--max_steps 1 --validation_split 0.3 --dataset", *files)
    used = []
    for file in files:
        flags = "--model", base, "--adapter", folder, "--dataset", file, "--validation_split"
        report, _ = run_evaluate(*flags)
        used.append(report["rows"]["dataset"]["used"])
    assert used == [len(rows) for rows in held_out_rows(folder)] and min(used) > 0


def test_held_out_rows_that_do_not_match_the_adapter_are_refused(
    run, base, rows_file, run_evaluate, write_rows
):
    _, folder = run("--max_steps 1 --validation_split 0.3")
    _, without = run("--max_steps 1", out="without")
    (held_out,) = held_out_rows(folder)
    total = len(held_out)
    changed = write_rows([row if row not in held_out[:2] else {**row, "prompt": "Hm?"} for row in ROWS])
    other = write_rows([{"prompt": "What?", "completion": "A leaf."}], "other.jsonl")
    for adapter, flags, message in (
        (folder, ["--dataset", changed], f"{changed} has only {total - 2} of the {total} rows"),
        (folder, ["--dataset", rows_file, "--split", "train[:50%]"], f"of the {total} rows .* or --split"),
        (folder, ["--dataset", other], f"{other} has none of the {total} rows"),
        (folder, ["--dataset", rows_file, "--validation_split", "0.2"], "held out 0.3: give that, or no"),
        (without, ["--dataset", rows_file], "has no held_out_rows.json: its training held no rows out"),
    ):
        with pytest.raises(SystemExit, match=f"--validation_split.*{message}"):
            run_evaluate("--model", base, "--adapter", adapter, "--validation_split", *flags)


def test_without_an_adapter_rows_are_held_out_by_the_rule_of_the_training(run, base, rows_file, run_evaluate):
    _, folder = run("--max_steps 1 --validation_split 0.2 --seed 7")
    alone = "--model", base, "--dataset", rows_file, "--dtype", "float32", "--max_length", "512"
    report, _ = run_evaluate(*alone, "--validation_split", "0.2", "--validation_seed", "7")
    with_adapter, _ = run_evaluate(*alone, "--adapter", folder, "--validation_split")
    assert report["base"] == with_adapter["base"] and report["rows"] == with_adapter["rows"]


def test_the_base_is_the_model_without_its_adapter(base, adapter, rows_file, run_evaluate):
    flags = "--dataset", rows_file, "--max_length", "64", "--dtype", "float32"
    alone, output = run_evaluate(
        "--model", base, *flags, "--prompts_file", rows_file, "--max_new_tokens", 1, "--samples", 1
    )
    assert " base: " in output and "tuned" not in output
    both, _ = run_evaluate("--model", base, "--adapter", adapter[1], *flags)
    assert "tuned" not in alone
    assert both["base"]["loss"] == pytest.approx(alone["base"]["loss"], rel=1e-6)


def test_the_adapter_is_measured_on_the_original_base_in_a_third_column(
    base, run, rows_file, tmp_path, run_evaluate, monkeypatch
):
    _, folder = run("--max_steps 8 --learning_rate 1e-2 --lora_target_modules all-linear")
    (tmp_path / "general.txt").write_text("brown boat red house")
    argv = "--model", base, "--adapter", folder, "--general_dataset", tmp_path / "general.txt"
    argv = *argv, "--prompts_file", rows_file, "--max_new_tokens", 5, "--dataset", rows_file
    loaded = []
    monkeypatch.setattr(
        evaluate, "load_base_for", lambda *given, **options: load_once(loaded, *given, **options)
    )
    report, output = run_evaluate(*argv, "--base", "original", "--samples", 2)
    assert len(loaded) == 2
    alone, _ = run_evaluate(*argv, "--no_load_in_4bit")
    as_trained, _ = run_evaluate(*argv)
    assert report["tuned_original_base"] == alone["tuned"]
    assert report["tuned"] == as_trained["tuned"] and report["base"] == as_trained["base"]
    assert set(report["tuned"]) == set(report["tuned_original_base"])
    assert report["tuned"]["loss"] != report["tuned_original_base"]["loss"]
    want = [answer["tuned"] for answer in alone["answers"]]
    assert [answer["tuned_original_base"] for answer in report["answers"]] == want
    lines = output.splitlines()
    assert [line for line in lines if re.fullmatch(r" +base +tuned +tuned, original base", line)]
    (row,) = [line for line in lines if line.startswith("loss ")]
    columns = (report[name]["loss"] for name in ("base", "tuned", "tuned_original_base"))
    assert row.split()[1:] == [f"{loss:.4f}" for loss in columns]
    for answer in report["answers"][:2]:
        assert f"tuned, original base: {answer['tuned_original_base']}" in output
    assert not [name for name in as_trained if "original" in name]


def load_once(loaded: list, *given, **options):
    """The base; fails if one that was loaded before is still in memory."""
    assert not [model for model in loaded if model() is not None]
    model = load_base_for(*given, **options)
    loaded.append(weakref.ref(model))
    return model


def load_until_memory_runs_out(monkeypatch, models: int) -> None:
    """Have evaluate load this many models and then run out of memory."""
    room = iter(range(models))

    def load_or_fail(*given, **options):
        if next(room, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load_base_for(*given, **options)

    monkeypatch.setattr(evaluate, "load_base_for", load_or_fail)


def test_what_was_measured_before_memory_ran_out_is_in_the_file(
    base, adapter, rows_file, tmp_path, run_evaluate, monkeypatch
):
    argv = "--model", base, "--adapter", adapter[1], "--prompts_file", rows_file, "--max_new_tokens", 2
    complete, _ = run_evaluate(*argv)
    output_file = tmp_path / "evaluation.json"
    output_file.unlink()
    load_until_memory_runs_out(monkeypatch, models=1)
    with pytest.raises(SystemExit) as stop:
        run_evaluate(*argv, "--base", "original")
    assert stop.value.code == (
        "qlora.evaluate: error: out of memory (CUDA out of memory): a smaller --batch_size or "
        f"--per_device_eval_batch_size needs less; {output_file} has what was measured before: base, tuned"
    )
    assert json.loads(output_file.read_text()) == complete


def test_without_memory_for_the_base_an_earlier_report_is_kept(
    base, rows_file, tmp_path, run_evaluate, monkeypatch
):
    (tmp_path / "evaluation.json").write_text("earlier")
    load_until_memory_runs_out(monkeypatch, models=0)
    with pytest.raises(SystemExit, match=r"error: out of memory \(CUDA out of memory\): .* needs less$"):
        run_evaluate("--model", base, "--dataset", rows_file)
    assert (tmp_path / "evaluation.json").read_text() == "earlier"


def test_an_original_base_that_is_not_there_is_refused_before_anything_is_loaded(
    run, base, rows_file, tmp_path, monkeypatch, capsys
):
    load_base(base, torch.float32, torch.device("cpu")).save_pretrained(tmp_path / "stored")
    load_tokenizer(base).save_pretrained(tmp_path / "stored")
    _, folder = run("--max_steps 1")
    _, in_16_bits = run("--max_steps 1 --no_load_in_4bit", out="other")
    monkeypatch.setattr("qlora.commands.load_base", lambda *_: pytest.fail("loaded"))
    argv = ["--dataset", rows_file, "--base", "original", "--model"]
    with pytest.raises(SystemExit, match=r"--base original: .*stored is itself quantized"):
        evaluate.main([*argv, str(tmp_path / "stored"), "--adapter", str(folder)])
    for flags, message in (
        ([], "--base needs --adapter"),
        (["--adapter", str(in_16_bits)], "--base original: the base is not quantized"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*argv, base, *flags])
        assert stop.value.code == 2 and message in capsys.readouterr().err


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


GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "<start_of_turn>{{ role }}\n{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.fixture
def gemma(base, tmp_path) -> str:
    """The base with Gemma's chat template and the special tokens in it."""
    folder = shutil.copytree(base, tmp_path / "gemma")
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.chat_template = GEMMA
    tokenizer.save_pretrained(folder)
    return str(folder)


def chat(*contents: str) -> dict:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]}


def test_a_reference_has_no_token_that_is_left_out_of_answers(gemma, run_evaluate, write_rows):
    """Neither the end of a turn, which is not EOS here, nor what stands before the last answer."""
    rows = [chat("What?", "A leaf."), chat("What?", "A leaf.", "Sure?", "Yes,\n  a leaf.")]
    flags = "--prompts_file", write_rows(rows), "--max_new_tokens", 2
    report, _ = run_evaluate("--model", gemma, *flags)
    assert [answer["reference"] for answer in report["answers"]] == ["A leaf.", "Yes,\n  a leaf."]


def test_an_answer_learned_by_heart_is_an_exact_match_in_a_chat(gemma, run, run_evaluate, write_rows):
    data = write_rows([chat("What is it?", "A leaf.")] * 4)
    flags = "--max_steps 30 --learning_rate 1e-2 --lora_target_modules all-linear"
    _, folder = run(flags, model=gemma, dataset=data)
    flags = "--adapter", folder, "--prompts_file", data, "--max_new_tokens", 12
    report, _ = run_evaluate("--model", gemma, *flags)
    assert (report["base"]["exact_match"], report["tuned"]["exact_match"]) == (0, 1)


def test_rows_without_a_reference_are_dropped_and_counted(gemma, run_evaluate, write_rows):
    rows = [
        chat("What?", "A leaf."), chat("What?", "A leaf.", "Sure?"), chat("What?", "Yes.", "Really?"),
        chat("What?", " "), {"messages": "What?"},
    ]  # fmt: skip
    file = write_rows(rows)
    report, output = run_evaluate("--model", gemma, "--prompts_file", file, "--max_new_tokens", 2)
    assert [answer["reference"] for answer in report["answers"]] == ["A leaf."]
    counts = report["rows"]["prompts_file"]
    dropped = {
        "no answer to its last question": 2, "empty response": 1, "'messages' is not a list of messages": 1,
    }  # fmt: skip
    assert (counts["read"], counts["used"], counts["dropped"]) == (5, 1, dropped)
    assert counts["first_dropped"]["no answer to its last question"] == f"{file} line 2"
    line = "5 rows read = 1 used + 4 dropped (2 no answer to its last question, first: "
    assert f"--prompts_file: {line}{file} line 2, 1 empty response, first: {file} line 4, 1 " in output
    with pytest.raises(SystemExit, match="no row with a reference answer: 2 no answer to its last question"):
        run_evaluate("--model", gemma, "--prompts_file", write_rows(rows[1:3]), "--max_new_tokens", 2)


def test_an_answer_that_is_not_trained_is_no_reference_nor_is_the_one_before_it(base, tmp_path):
    tokenizer = load_tokenizer(base)
    use_template(tokenizer, "ChatML")  # which does not write the call
    row = chat("What?", "A leaf.", "Rome?", "Let me look.")
    row["messages"][-1]["tool_calls"] = [{"name": "weather", "arguments": {}}]
    with pytest.raises(DropRow, match="leaves out its tool calls"):
        evaluate.reference_answer(row, Formatting("messages"), tokenizer)
    with_prompts = Formatting("messages", completion_only_loss=False)
    assert evaluate.reference_answer(chat("What?", "A leaf."), with_prompts, tokenizer) == "A leaf."


def test_what_became_of_the_rows_of_each_file_is_printed_and_written(base, run_evaluate, write_rows):
    usable, empty = {"prompt": "What?", "completion": "A leaf."}, {"prompt": "What?", "completion": ""}
    data = write_rows([usable, empty, {"prompt": "What?", "completion": "leaf " * 60}])
    texts = ["A leaf.", "leaf " * 60, "leaf " * 70, ""]
    general = write_rows([{"text": text} for text in texts], "general.jsonl")
    flags = "--dataset", data, "--general_dataset", general, "--prompts_file", data, "--max_new_tokens", 2
    report, output = run_evaluate("--model", base, *flags, "--max_length", "24")
    rows = report["rows"]
    numbers = {flag: [counts[name] for name in ("read", "used", "cut")] for flag, counts in rows.items()}
    assert numbers == {"dataset": [3, 2, 1], "general_dataset": [4, 3, 2], "prompts_file": [3, 2, 0]}
    dropped = {flag: counts["dropped"] for flag, counts in rows.items()}
    assert dropped == {
        "dataset": {"empty response": 1}, "general_dataset": {"empty text": 1},
        "prompts_file": {"empty response": 1},
    }  # fmt: skip
    assert output.splitlines()[:3] == [
        f"--dataset: 3 rows read = 2 used + 1 dropped (1 empty response, first: {data} line 2); "
        "1 cut at --max_length",
        f"--general_dataset: 4 rows read = 3 used + 1 dropped (1 empty text, first: {general} line 4); "
        "2 cut at --max_length",
        f"--prompts_file: 3 rows read = 2 used + 1 dropped (1 empty response, first: {data} line 2)",
    ]


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


def test_a_reference_that_is_not_json_is_refused_before_the_model_is_loaded(
    base, tmp_path, run_evaluate, monkeypatch, write_rows
):
    monkeypatch.setattr("qlora.commands.load_base", lambda *_: pytest.fail("loaded"))
    for answer in ("A leaf.", "7", '{"a": NaN}'):
        file = write_rows([{"prompt": "One?", "completion": text} for text in ('{"a": 1}', answer)])
        message = rf"{file} line 2: .*--json .*{re.escape(repr(answer))}"
        with pytest.raises(SystemExit, match=message):
            run_evaluate("--model", base, "--prompts_file", file, "--json", "--max_new_tokens", 2)


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
        ("--model m --dataset d --validation_split", "--validation_split without --adapter needs a value"),
        ("--model m --dataset d --validation_seed 3", "--validation_seed needs --validation_split"),
        (
            "--model m --adapter a --dataset d --validation_split --validation_seed 3",
            "--validation_seed cannot be used with --adapter, whose held-out rows are known",
        ),
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
