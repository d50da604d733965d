"""Streaming: every row once a pass, resumed exactly from the middle of a window, nothing read far ahead."""

import json
import shutil

import pytest
from safetensors.torch import load_file

import qlora.data.loader
import train
from qlora.data.loader import StepLoader
from qlora.model.adapter import ADAPTER
from qlora.run.checkpoint import STATE, STATE_TENSORS
from tests.conftest import ROWS
from tests.test_train import assert_same, metrics

FLAGS = "--streaming --lora_dropout 0.1 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    for module in ("prepare", "loader"):
        monkeypatch.setattr(f"qlora.data.{module}.STREAM_WINDOW", 18)  # 42 rows: 18, 18, 6


@pytest.fixture
def seen(monkeypatch):
    """Rows by their index in the window, step by step."""
    steps = []
    make = StepLoader.make

    def record(self, step):
        steps.append([row for pack in self.order.packs(step) for row in pack])
        return make(self, step)

    monkeypatch.setattr(StepLoader, "make", record)
    return steps


def test_every_row_of_a_window_comes_once_and_windows_pass_after_pass(run, seen):
    _, folder = run(FLAGS, "--max_steps 14 --logging_steps 1")
    assert [len(rows) for rows in seen] == [4, 4, 4, 4, 2] * 2 + [4, 2] + [4, 4]
    for steps, rows in ((seen[:5], 18), (seen[5:10], 18), (seen[10:12], 6)):
        assert sorted(row for step in steps for row in step) == list(range(rows))
    sets = [[frozenset(rows) for rows in steps] for steps in (seen[:4], seen[5:9])]
    assert sets[0] != sets[1]  # a window has its own order
    assert [line["epoch"] for line in metrics(folder)] == [0] * 12 + [1] * 2


@pytest.mark.parametrize("flags", ["", "--packing --max_length 64"])
@pytest.mark.parametrize("killed_after", [3, 9])
def test_a_resume_equals_an_uninterrupted_run_bit_by_bit(run, flags, killed_after):
    flags = f"{FLAGS} {flags} --max_steps 15 --save_steps 1 --save_total_limit 0"
    _, folder = run(flags)
    want, want_state = load_file(folder / ADAPTER), load_file(folder / "checkpoint-15" / STATE_TENSORS)
    for step in range(killed_after + 1, 16):
        shutil.rmtree(folder / f"checkpoint-{step}")
    run(flags, "--resume_from_checkpoint latest")
    assert_same(load_file(folder / ADAPTER), want)
    assert_same(load_file(folder / "checkpoint-15" / STATE_TENSORS), want_state)


def test_a_resume_does_not_tokenize_what_was_seen(run, monkeypatch):
    flags = f"{FLAGS} --max_steps 12 --save_steps 11 --save_total_limit 0"
    _, folder = run(flags)
    place = json.loads((folder / "checkpoint-11" / STATE).read_text())["progress"]["place"]
    assert place == {"turn": 0, "row": 36, "first_step": 10}
    windows, tokenize = [], qlora.data.loader.tokenize_window

    def record(rows, *arguments, **options):
        windows.append(rows[0][0])
        return tokenize(rows, *arguments, **options)

    monkeypatch.setattr(qlora.data.loader, "tokenize_window", record)
    run(flags, "--resume_from_checkpoint", str(folder / "checkpoint-11"))
    assert windows[0].endswith("line 37")


def test_later_rows_are_not_read_before_they_are_needed(run, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 2) + "not json\n")
    run(FLAGS, "--max_steps 5", dataset=str(path), out="short")
    with pytest.raises(train.InputError, match="line 85 is not valid JSON"):
        run(FLAGS, "--max_steps 99", dataset=str(path), out="long")


def test_a_window_without_a_usable_row_is_passed_over(run, tmp_path, seen):
    path = tmp_path / "rows.jsonl"
    rows = ROWS[:18] + [{"prompt": "a", "completion": ""}] * 18 + ROWS[:4]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(FLAGS, "--max_steps 7", dataset=str(path))
    assert [len(rows) for rows in seen] == [4, 4, 4, 4, 2, 4, 4]


def test_rows_that_cannot_be_used_are_counted_as_they_come(run, tmp_path, capsys):
    """Also where a whole window lacks a column."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:18], {"prompt": "a"}]))
    run(FLAGS, "--max_steps 6", dataset=str(path))
    printed = capsys.readouterr()
    assert f"from {path} line 19 on, dropped: 1 'completion' is missing" in printed.out + printed.err


def test_validation_rows_are_evaluated(run, rows_file):
    _, folder = run(FLAGS, "--max_steps 2 --validation_dataset", rows_file)
    assert any("eval_loss" in line for line in metrics(folder))
