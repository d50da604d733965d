"""The view of tokenized rows: cutting, subsets, mixing and holding out, with counts that add up."""

from collections import Counter

import numpy as np
import pytest

from qlora.data.segments import IGNORE_INDEX
from qlora.data.tokenize import tokenize_rows
from qlora.data.tokenized import TokenizedRows, check_vocabulary, hold_out, mix
from qlora.errors import InputError
from tests.data.random_rows import random_rows

USABLE = {"prompt": "What?", "completion": " A leaf."}


def located(*rows, name="rows"):
    return [(f"{name} line {number}", row) for number, row in enumerate(rows, start=1)]


def contents(rows: TokenizedRows) -> list[tuple]:
    return [tuple(rows[i][0].tolist()) for i in range(len(rows))]


def test_rows_come_back_one_by_one_and_in_subsets(tokenizer):
    texts = ["What is it?", "A leaf.", "Yes is it? A leaf."]
    rows = tokenize_rows(located(*({"text": text} for text in texts)), tokenizer)
    expected = [(*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in texts]
    assert contents(rows) == expected
    assert rows.lengths.tolist() == [len(ids) for ids in expected]
    assert rows.targets == sum(len(ids) - 1 for ids in expected)
    chosen = rows.subset(np.array([2, 0]))
    assert contents(chosen) == [expected[2], expected[0]]
    assert [chosen.location(i) for i in range(2)] == ["rows line 3", "rows line 1"]


def test_an_answer_that_is_too_long_is_cut_and_counted_and_has_no_eos(tokenizer):
    whole = tokenize_rows(located(USABLE), tokenizer)
    ids, labels = whole[0]
    for max_length in range(1, len(ids) + 2):
        if not any(label != IGNORE_INDEX for label in labels[:max_length]):
            cut = whole.cut(max_length)
            assert len(cut) == 0 and cut.dropped == {"prompt fills --max_length": 1}
            assert cut.first_dropped == {"prompt fills --max_length": "rows line 1"}
            assert cut.lost_lengths.tolist() == [len(ids)]
            continue
        rows = whole.cut(max_length)
        is_cut = max_length < len(ids)
        assert rows[0][0].tolist() == ids[:max_length].tolist()
        assert rows[0][1].tolist() == labels[:max_length].tolist()
        assert rows.targets == sum(label != IGNORE_INDEX for label in labels[:max_length].tolist())
        assert (tokenizer.eos_token_id in rows[0][1]) is not is_cut
        assert rows.answers_cut == is_cut and ("1 answers cut" in rows.describe()) is is_cut


def test_mixed_data_sets_keep_their_rows_sources_and_counts(tokenizer):
    empty, missing = {**USABLE, "completion": ""}, {"prompt": "a"}
    other = {"prompt": "Sure?", "completion": " Yes."}
    parts = [
        tokenize_rows(located(empty, USABLE, name="a"), tokenizer),
        tokenize_rows(located(other, missing, empty, USABLE, name="b"), tokenizer),
    ]
    rows = mix(parts)
    assert contents(rows) == [*contents(parts[0]), *contents(parts[1])]
    assert rows.source_ids.tolist() == [0, 1, 1]
    assert [rows.location(i) for i in range(3)] == ["a line 2", "b line 1", "b line 4"]
    assert rows.rows_read == 6 and rows.dropped == {"empty response": 2, "'completion' is missing": 1}
    assert rows.first_dropped == {"empty response": "a line 1", "'completion' is missing": "b line 2"}
    assert mix(parts[:1]).source_ids.tolist() == [0]


def test_a_token_beyond_the_vocabulary_is_an_error(tokenizer):
    rows = tokenize_rows(located({"text": "What is it?"}, {"text": "A leaf."}), tokenizer)
    largest = max(tokenizer("What is it? A leaf.")["input_ids"])
    check_vocabulary(rows, largest + 1)
    with pytest.raises(InputError, match=f"token id {largest}.* {largest} tokens"):
        check_vocabulary(rows, largest)


# ---------------------------------------------------------------- held-out rows


@pytest.mark.parametrize("amount, held", [(0.05, 2), (0.1, 4), (0.5, 20), (1, 1), (39, 39)])
def test_held_out_rows_are_disjoint_complete_and_reproducible(amount, held):
    rows = random_rows(range(5, 45))
    training, validation = hold_out(rows, amount, seed=3)
    assert (len(training), len(validation)) == (40 - held, held)
    assert sorted(contents(training) + contents(validation)) == sorted(contents(rows))
    assert contents(hold_out(rows, amount, seed=3)[1]) == contents(validation)
    if held == 20:
        assert contents(hold_out(rows, amount, seed=4)[1]) != contents(validation)


@pytest.mark.parametrize("amount", [0, 0.01, 40, 41, 0.999])
def test_holding_out_nothing_or_everything_is_an_error(amount):
    with pytest.raises(InputError, match=f"--validation_split {amount} "):
        hold_out(random_rows(range(5, 45)), amount, seed=0)


def test_the_counts_of_both_parts_of_a_split_add_up(tokenizer):
    """In each, rows read = used + dropped, and a cut row is counted where it went: cut rows have no EOS."""
    lines = [{**USABLE, "completion": " leaf" * number} for number in range(13)]
    rows = tokenize_rows(located(*lines), tokenizer).cut(12)
    assert rows.dropped == {"empty response": 1} and 2 < rows.answers_cut < len(rows) - 2
    for half in (halves := hold_out(rows, 0.5, seed=0)):
        assert half.rows_read == len(half) + half.dropped.total()
        assert half.answers_cut == sum(ids[-1] != tokenizer.eos_token_id for ids in contents(half))
    assert sum(half.rows_read for half in halves) == 13
    assert sum((half.dropped for half in halves), Counter()) == rows.dropped
