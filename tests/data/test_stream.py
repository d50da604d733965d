"""A stream's windows: every row once a pass, pass after pass, from any place on, and nothing read ahead."""

import json
from functools import partial

import pytest

import train
from qlora.data.formatting import Formatting
from qlora.data.prepare import load_rows
from qlora.data.sources import RowSource
from qlora.data.stream import STREAM_WINDOW, RowStream
from qlora.data.tokenize import tokenize_rows
from qlora.errors import InputError
from tests.conftest import ROWS


def use_windows(monkeypatch, window_rows: int) -> None:
    """Have train.py read streams in windows of so many rows."""
    monkeypatch.setattr(train, "load_rows", partial(load_rows, window_rows=window_rows))


def write(path, *rows) -> RowSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RowSource(str(path), streaming=True)


def open_stream(
    source, tokenizer, window_rows=18, max_length=64, formatting=Formatting("prompt_completion")
) -> RowStream:
    return RowStream(
        source, tokenizer, formatting, max_length=max_length, vocab_size=448, window_rows=window_rows
    )


def contents(rows):
    return [(ids.tolist(), labels.tolist()) for ids, labels in rows.fetch(list(range(len(rows))))]


def test_windows_come_pass_after_pass_tokenized_as_the_whole_data_is(rows_file, tokenizer):
    """42 rows: windows of 18, 18, 6, and again."""
    source = RowSource(rows_file, streaming=True)
    whole = contents(tokenize_rows(source, tokenizer).cut(64))
    windows = open_stream(source, tokenizer).windows()
    for turn in range(2):
        for row, length in ((0, 18), (18, 18), (36, 6)):
            window = next(windows)
            assert (window.turn, window.row) == (turn, row)
            assert contents(window.rows) == whole[row : row + length]


def test_windows_from_a_place_on_are_those_of_a_stream_that_came_there(rows_file, tokenizer):
    stream = open_stream(RowSource(rows_file, streaming=True), tokenizer)
    windows = stream.windows()
    expected = [next(windows) for _ in range(5)]
    for start in range(1, 5):
        resumed = stream.windows(expected[start].turn, expected[start].row)
        for want, window in zip(expected[start:], resumed):
            assert (window.turn, window.row) == (want.turn, want.row)
            assert contents(window.rows) == contents(want.rows)
    assert next(stream.windows(0, 36)).rows.location(0).endswith("line 37")


def test_every_setting_reaches_the_tokens(rows_file, tokenizer):
    source = RowSource(rows_file, streaming=True)
    formatting = Formatting("text", "prompt", False)
    stream = open_stream(source, tokenizer, max_length=12, formatting=formatting)
    want = tokenize_rows(source, tokenizer, formatting).cut(12)
    window = next(stream.windows())
    assert contents(window.rows) == contents(want)[:18] and window.rows.max_length == 12


def test_later_rows_are_not_read_before_they_are_needed(tmp_path, tokenizer):
    source = write(tmp_path / "rows.jsonl", *ROWS)
    with open(source.dataset, "a") as file:
        file.write("not json\n")
    windows = open_stream(source, tokenizer).windows()
    assert [len(next(windows).rows) for _ in range(2)] == [18, 18]
    with pytest.raises(InputError, match="line 43 is not valid JSON"):
        next(windows)


def test_a_window_without_a_usable_row_is_skipped(tmp_path, tokenizer):
    bad = {"prompt": "a", "completion": ""}
    windows = open_stream(
        write(tmp_path / "rows.jsonl", *ROWS[:18], *[bad] * 18, *ROWS[:4]), tokenizer
    ).windows()
    assert [(window.row, len(window.rows)) for window, _ in zip(windows, range(3))] == [
        (0, 18),
        (36, 4),
        (0, 18),
    ]


def test_dropped_rows_are_counted_as_they_come(tmp_path, tokenizer, capsys):
    """Also if a whole window lacks a column."""
    source = write(tmp_path / "rows.jsonl", *ROWS[:18], {"prompt": "a"})
    windows = open_stream(source, tokenizer).windows()
    assert next(windows).turn == 0 and next(windows).turn == 1
    printed = capsys.readouterr()
    assert (
        f"from {source.dataset} line 19 on, dropped: 1 'completion' is missing" in printed.out + printed.err
    )


def test_a_pass_without_a_usable_row_is_an_error(tmp_path, tokenizer):
    source = write(tmp_path / "rows.jsonl", *[{"prompt": "a", "completion": ""}] * 40)
    with pytest.raises(InputError, match=r"no row of .*rows\.jsonl can be used"):
        next(open_stream(source, tokenizer).windows())


def test_a_token_beyond_the_vocabulary_is_an_error(rows_file, tokenizer):
    source = RowSource(rows_file, streaming=True)
    stream = RowStream(source, tokenizer, Formatting("prompt_completion"), max_length=64, vocab_size=300)
    assert stream.window_rows == STREAM_WINDOW
    with pytest.raises(InputError, match="the model has only 300 tokens"):
        next(stream.windows())


def test_what_later_windows_do_not_train_is_said_once(tmp_path, tokenizer, capsys):
    rows = [*ROWS[:4], *(row | {"id": "a"} for row in ROWS[4:12])]
    windows = open_stream(write(tmp_path / "rows.jsonl", *rows), tokenizer, window_rows=4).windows()
    for _ in range(3):
        next(windows)
    assert capsys.readouterr().out.count("column 'id' is not read") == 1
