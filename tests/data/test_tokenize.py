"""Rows to tokens: every row is used, or dropped for a reason that is counted and located."""

import datetime
import decimal
import hashlib
from collections import Counter
from functools import partial

import numpy as np
import pyarrow.parquet
import pytest

from qlora.data.cache import load_table
from qlora.data.formats import turn_template
from qlora.data.formatting import Formatting
from qlora.data.sources import read_rows
from qlora.data.tokenize import row_hash, tokenize_batch, tokenize_rows, tokenize_window, write_tokens
from qlora.errors import InputError
from tests.conftest import ROWS

USABLE = {"prompt": "What?", "completion": " A leaf."}
FORMATTING = Formatting("prompt_completion")


def located(*rows):
    return [(f"rows line {number}", row) for number, row in enumerate(rows, start=1)]


def contents(rows) -> list[tuple]:
    return [(ids.tolist(), labels.tolist()) for ids, labels in rows.fetch(list(range(len(rows))))]


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"completion": None}, "'completion' is null, not text"),
        ({"completion": 3}, "'completion' is a number, not text"),
        ({"completion": 2.5}, "'completion' is a number, not text"),
        ({"completion": float("nan")}, "'completion' is a number, not text"),
        ({"completion": True}, "'completion' is a boolean, not text"),
        ({"completion": ["a"]}, "'completion' is a list, not text"),
        ({"completion": {"a": 1}}, "'completion' is an object, not text"),
        ({"prompt": None}, "'prompt' is null, not text"),
        ({"completion": ""}, "empty response"),
        ({"completion": " \n"}, "empty response"),
        ({"completion": ...}, "'completion' is missing"),
        ({"prompt": ...}, "'prompt' is missing"),
    ],
)
def test_a_bad_row_is_dropped_counted_and_located(tokenizer, changed, reason):
    bad = {key: value for key, value in {**USABLE, **changed}.items() if value is not ...}
    rows = tokenize_rows(located(USABLE, bad, USABLE, bad), tokenizer)
    assert (rows.rows_read, len(rows), rows.dropped) == (4, 2, Counter({reason: 2}))
    assert rows.first_dropped == {reason: "rows line 2"}
    assert f"4 rows read = 2 used + 2 dropped (2 {reason}, first: rows line 2)" in rows.describe()


@pytest.mark.parametrize("text, reason", [("?", "one token"), ("", "empty text"), (" ", "empty text")])
def test_a_text_row_that_teaches_nothing_is_dropped(tokenizer, text, reason):
    tokenizer.backend_tokenizer.normalizer = None  # it would put a space in front: two tokens
    rows = tokenize_rows(located({"text": text}, {"text": "is it"}), tokenizer)
    assert (rows.rows_read, len(rows), rows.dropped) == (2, 1, Counter({reason: 1}))


@pytest.mark.parametrize("rows", [[{"text": None}], [{"text": ""}] * 3, [{"prompt": "a", "completion": ""}]])
def test_the_reasons_are_kept_if_no_row_is_usable(tokenizer, rows):
    result = tokenize_rows(located(*rows), tokenizer)
    assert len(result) == 0 and result.dropped.total() == len(rows)
    assert result.describe_drops().endswith("first: rows line 1")


def test_a_column_that_no_row_has_is_an_error_that_lists_the_columns(tokenizer):
    with pytest.raises(InputError, match=r"\['answer', 'question'\].*'text'"):
        tokenize_rows(located({"question": "a"}, {"answer": "b"}), tokenizer)
    with pytest.raises(InputError, match=r"no column 'body'.*\['text'\]"):
        tokenize_rows(located({"text": "a"}), tokenizer, Formatting("text", text_field="body"))


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        tokenize_rows(located({"text": "What is it?"}), tokenizer)


def test_rows_read_are_rows_used_plus_rows_dropped(tokenizer):
    """400 rows of random kinds, more than the sample that decides the format; each reason is counted."""
    kinds = {
        None: USABLE,
        "empty response": {**USABLE, "completion": ""},
        "'completion' is missing": {"prompt": "a"},
        "prompt fills --max_length": {"prompt": "What? " * 40, "completion": "a"},
    }
    chosen = [None, *np.random.default_rng(0).choice(list(kinds), size=400)]
    rows = tokenize_rows(located(*(kinds[kind] for kind in chosen)), tokenizer).cut(32)
    expected = Counter(chosen)
    assert len(rows) == expected.pop(None)
    assert rows.dropped == expected
    assert rows.rows_read == len(chosen) == len(rows) + rows.dropped.total()


def test_values_that_are_not_text_are_never_trained_as_text(tmp_path, tokenizer):
    """Bytes, dates and decimals in a parquet file: JSON, which rows pass through, has none of them."""
    path = tmp_path / "rows.parquet"
    for value in [b"A leaf.", datetime.date(2020, 1, 1), decimal.Decimal("1.5")]:
        rows = [{"prompt": "What?", "completion": value}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        result = tokenize_rows(read_rows(str(path), "train"), tokenizer)
        assert result.dropped == {"'completion' is an object, not text": 1}


def test_a_window_is_tokenized_as_the_whole_data_is(tokenizer):
    rows = located(*ROWS, {**USABLE, "completion": ""})
    whole = tokenize_rows(rows, tokenizer)
    window = tokenize_window(rows[10:], tokenizer, FORMATTING)
    assert contents(window) == contents(whole)[10:] and window.dropped == whole.dropped


def test_a_row_has_the_hash_of_its_content_wherever_it_is_and_even_if_it_is_dropped(tokenizer):
    """blake2b of its JSON with sorted keys, written out here: adapters are saved with these hashes."""
    want = []
    for text in (b'{"completion": " A leaf.", "prompt": "What?"}', b'{"completion": "", "prompt": "What?"}'):
        want.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True))
    assert row_hash(USABLE) == row_hash(dict(reversed(USABLE.items()))) == want[0]
    rows = tokenize_rows(located({**USABLE, "completion": ""}, USABLE, USABLE), tokenizer)
    assert rows.table["row_hash"][:] == [want[1], want[0], want[0]]
    assert len(rows) == 2 and rows.column("row_hash").tolist() == [want[0]] * 2


def test_several_processes_make_the_tokens_that_one_makes(tokenizer, tmp_path):
    """43 rows in slices of 35 rows in three processes and 8 in one."""
    rows = located(*ROWS, {**USABLE, "completion": ""})
    for name, options in {
        "one": {},
        "several": {"slice_rows": 35, "rows_per_process": 10, "cores": 3},
    }.items():
        (tmp_path / name).mkdir()
        tokenize = partial(tokenize_batch, tokenizer=tokenizer, formatting=FORMATTING)
        write_tokens(rows, tokenize, tmp_path / name, tmp_path / f"{name}-scratch", **options)
    assert len(list((tmp_path / "one").glob("*.arrow"))) == 1
    assert len(list((tmp_path / "several").glob("*.arrow"))) == 3 + 1
    assert load_table(tmp_path / "several").to_list() == load_table(tmp_path / "one").to_list()


def test_chats_do_not_go_through_the_template_of_an_adapters_text_rows(tokenizer):
    tokenizer.chat_template = turn_template([], "guanaco", tokenizer)
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A leaf."}]
    with pytest.raises(InputError, match=r"of the text rows .* give another with --chat_template"):
        tokenize_rows(located({"messages": chat}), tokenizer)
