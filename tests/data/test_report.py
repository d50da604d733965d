"""The data report: every count against a case made for it, and the command that prints it."""

import json
import subprocess
import sys

import pytest
import torch

from qlora.config import TrainConfig, parse_args
from qlora.data.formats import IGNORE_INDEX
from qlora.data.prepare import load_data
from qlora.data.report import data_report, full_report, report_data, short_report, show_rows
from qlora.data.tokenize import TOKENS, TokenizedRows, tokenize_rows
from qlora.errors import InputError
from qlora.model.base import load_tokenizer
from tests.conftest import ROOT, ROWS
from tests.data.test_order import make_rows

TALE = "Once upon a time a red leaf fell from a very old tree and came to rest on a stone in the river"


OTHER = "A stone in the green river is not a cloud, and nobody ever said that it was one, at least not here"


def rows_of(tokenizer, *texts: str):
    located = [(f"line {number}", {"text": text}) for number, text in enumerate(texts, start=1)]
    return tokenize_rows(located, tokenizer).cut(256)


def test_the_books_of_a_cut_data_set_balance(tokenizer):
    texts = [f"{TALE} {'leaf ' * number}" for number in range(30)]
    whole = rows_of(tokenizer, *texts)
    rows = whole.cut(80)
    split = data_report(rows, None, 4, 1, 0)["train"]
    assert split["rows_read"] == 30 == split["rows_used"] and split["answers_lost"] == 0
    assert split["answers_cut"] == int((whole.lengths > 80).sum()) > 3
    assert split["tokens"] + split["tokens_lost"] == int(whole.lengths.sum())
    assert sum(split["histogram"]["rows"]) == 30
    assert split["lengths"]["min"] == whole.lengths.min() and split["lengths"]["max"] == whole.lengths.max()
    assert split["ends_in_trained_eos"] == pytest.approx(1 - split["answers_cut"] / 30)
    assert split["starts_with_bos"] == 1


def test_answers_that_are_lost_whole_are_counted_with_their_tokens(tokenizer):
    located = [("line 1", {"prompt": "What? " * 40, "completion": "A leaf."}), ("line 2", ROWS[0])]
    whole = tokenize_rows(located, tokenizer)
    split = data_report(whole.cut(64), None, 4, 1, 0)["train"]
    assert (split["answers_lost"], split["answers_cut"]) == (1, 0)
    assert split["rows_dropped"] == {"prompt fills --max_length": 1}
    assert split["tokens_lost"] == int(whole.lengths[0])
    assert split["lengths"]["max"] == int(whole.lengths[0])


def test_padding_and_packing_are_counted_as_batches_are_made():
    rows = make_rows([8] * 10 + [64] * 2).cut(64)
    split = data_report(rows, None, batch_size=12, accumulation=1, seed=0)["train"]
    assert split["padded_full"] == pytest.approx((80 + 128) / (12 * 64))
    assert split["packs"] == 4 and split["packed_full"] == pytest.approx((80 + 128) / (4 * 64))


def test_duplicates_and_near_duplicates_are_told_apart(tokenizer):
    near = TALE.replace("very old", "very, very old").upper() + "!"
    rows = rows_of(tokenizer, TALE, OTHER, TALE, near, f"{OTHER} {TALE}")
    split = data_report(rows, None, 4, 1, 0)["train"]
    assert (split["duplicates"], split["near_duplicates"]) == (1, 1)


def test_validation_rows_that_are_trained_on_are_counted(tokenizer):
    training = rows_of(tokenizer, OTHER, TALE)
    validation = rows_of(
        tokenizer, TALE, TALE + " again", "Something quite different: what does a cloud look like?"
    )
    report = data_report(training, validation, 4, 1, 0)
    assert report["in_both"] == {"exact": 1, "near": 1}
    assert short_report(report)["leaks"] == "1 validation rows are trained on, 1 nearly"
    assert "1 are trained on too, 1 nearly" in full_report(report)


def test_what_would_ruin_a_training_is_a_problem(tokenizer):
    assert data_report(rows_of(tokenizer, TALE), None, 4, 1, 0)["problems"] == []
    (problem,) = data_report(rows_of(tokenizer, TALE).cut(8), None, 4, 1, 0)["problems"]
    assert "never learn to stop" in problem
    rows = make_rows([9, 9]).cut(16)
    table = rows.table.map(lambda row: {**row, "leading_bos": 2, "ends_in_eos": True}, features=TOKENS)
    (problem,) = data_report(TokenizedRows(table, "text", rows.rows, rows.sources).cut(16), None, 4, 1, 0)[
        "problems"
    ]
    assert problem == "2 rows start with two BOS tokens"


def test_sample_rows_show_what_is_trained_and_the_special_tokens(tokenizer):
    rows = tokenize_rows([("line 1", {"prompt": "What?", "completion": " A leaf."})], tokenizer).cut(64)
    shown = show_rows(rows, tokenizer, 3, in_colour=False)
    assert shown.splitlines()[1].replace(" ", "") == "<s>What?⟦Aleaf.</s>⟧"
    in_colour = show_rows(rows, tokenizer, 3, in_colour=True)
    assert "\033[32m" in in_colour and "⟦" not in in_colour
    assert all(torch.equal(labels != IGNORE_INDEX, labels > 0) for _, labels in rows.fetch([0]))


def command(base, rows_file, tmp_path, *flags):
    argv = ["--model", base, "--dataset", rows_file, "--output_dir", str(tmp_path / "out"), *flags]
    return subprocess.run([sys.executable, "train.py", *argv], cwd=ROOT, capture_output=True, text=True)


def test_the_command_prints_the_report_and_trains_nothing(base, rows_file, tmp_path):
    result = command(base, rows_file, tmp_path, "--data_report", "--validation_split", "0.1")
    assert result.returncode == 0, result.stderr
    assert "train: 38 rows read = 38 used + 0 dropped" in result.stdout and "⟦" in result.stdout
    assert not (tmp_path / "out").exists()


def test_the_report_as_json_with_its_picture(base, rows_file, tmp_path):
    result = command(base, rows_file, tmp_path, "--data_report", "json", "--max_length", "24")
    report = json.loads(result.stdout)  # nothing else is printed there
    assert result.returncode == 0 and report["train"]["rows_read"] == 42 and report["max_length"] == 24
    assert json.loads((tmp_path / "out" / "data_report.json").read_text()) == report
    assert (tmp_path / "out" / "data_report.png").read_bytes().startswith(b"\x89PNG")


def test_data_that_would_ruin_a_training_ends_with_exit_code_1(base, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": TALE}))
    flags = ["--model", base, "--dataset", str(path), "--max_length", "8", "--data_report"]
    assert report_data(parse_args(TrainConfig, flags)) == 1
    assert "PROBLEM no row trains the end-of-sequence token" in capsys.readouterr().out


def test_an_adapter_that_is_none_is_an_error_of_the_report_too(base, rows_file):
    config = parse_args(
        TrainConfig, ["--model", base, "--dataset", rows_file, "--adapter", "nowhere", "--data_report"]
    )
    with pytest.raises(InputError, match="--adapter nowhere is no adapter folder"):
        report_data(config)


@pytest.mark.parametrize("wanted, length", [("20", 20), ("p50", 64), ("max", 64), ("p1", 64), ("300", 256)])
def test_the_length_is_a_number_or_a_percentile_capped_by_the_context(base, rows_file, wanted, length):
    config = parse_args(TrainConfig, ["--model", base, "--dataset", rows_file, "--max_length", wanted])
    _, _, rows, _ = load_data(config)
    assert rows.max_length == length


def test_a_percentile_is_rounded_up_to_a_multiple_of_64(base, tmp_path):
    """Ten rows of 20 to 200 tokens and more: p80 is an actual length, rounded up."""
    tokenizer = load_tokenizer(base)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "leaf " * 10 * number}) + "\n" for number in range(1, 11)))
    lengths = tokenize_rows(
        [("", json.loads(line)) for line in path.read_text().splitlines()], tokenizer
    ).lengths
    config = parse_args(TrainConfig, ["--model", base, "--dataset", str(path), "--max_length", "p80"])
    _, _, rows, _ = load_data(config)
    assert rows.max_length == -(-sorted(lengths)[7] // 64) * 64 < 256
    assert rows.truncated == sum(length > rows.max_length for length in lengths)
