"""The view of tokenized rows: cutting, subsets, mixing and holding out, with counts that add up."""

from collections import Counter

import numpy as np
import pytest

from qlora.data.segments import IGNORE_INDEX
from qlora.data.tokenize import tokenize_rows
from qlora.data.tokenized import TokenizedRows, check_vocabulary, find_held_out, hold_out, mix
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


def splitmix64(seed: int, row_hash: int) -> int:
    """The first number of SplitMix64 from state `row_hash + seed * gamma`, in Python's own integers."""
    z = (row_hash + (seed + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@pytest.mark.parametrize("seed", [3, 2**32 - 1])
@pytest.mark.parametrize("amount", [0.1, 0.5, 0.9, 1, 20, 39])
def test_held_out_rows_are_those_with_the_smallest_numbers(amount, seed):
    # The published numbers of the generator that starts from 0: the split of a seed must never change.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [splitmix64(step, 0) for step in range(3)] == published
    rows = random_rows(range(5, 45))
    numbers = [splitmix64(seed, row_hash) for row_hash in rows.column("row_hash").tolist()]
    limit = amount * 2**64 if amount < 1 else sorted(numbers)[amount]
    held_out = [row for row, number in enumerate(numbers) if number < limit]
    training, validation = hold_out(rows, amount, seed)
    assert contents(validation) == [contents(rows)[row] for row in held_out]
    assert contents(training) == [contents(rows)[row] for row in range(40) if row not in held_out]
    assert amount < 1 or len(validation) == amount
    assert training.held_out.amount == amount and validation.held_out is None
    (hashes,) = training.held_out.hashes
    assert hashes.tolist() == sorted(validation.column("row_hash").tolist())


@pytest.mark.parametrize("amount", [0.5, 3])
def test_equal_rows_stay_together(tokenizer, amount):
    """Ten different rows, each three times: also where a number of rows ends in the middle of equal ones."""
    lines = [{**USABLE, "completion": f" {number} leaves"} for number in range(10)] * 3
    for seed in range(5):
        training, validation = hold_out(tokenize_rows(located(*lines), tokenizer), amount, seed)
        assert not set(contents(training)) & set(contents(validation))
        assert len(validation) % 3 == 0 and (amount < 1 or len(validation) == 3)
    training, validation = hold_out(tokenize_rows(located(*lines), tokenizer), 4, seed=0)
    assert len(validation) == 6  # the next three that are equal


@pytest.mark.parametrize("amount", [0, 1e-9, 40, 41, 1 - 1e-9])
def test_holding_out_nothing_or_everything_is_an_error(amount):
    with pytest.raises(InputError, match=f"--validation_split {amount:g} holds out (0|40) of 40 rows"):
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


@pytest.fixture
def trained(tokenizer):
    """(the lines of two datasets, what a training on them holds out, the lines held out of each)."""
    datasets = [[{**USABLE, "completion": f" {name} {n}"} for n in range(20)] for name in ("leaf", "cloud")]
    parts = [tokenize_rows(located(*lines), tokenizer) for lines in datasets]
    training, validation = hold_out(mix(parts), 0.3, seed=1)
    held_out = [[], []]
    for row, source in enumerate(validation.source_ids):
        held_out[source].append(datasets[source][int(validation.location(row).split()[-1]) - 1])
    assert min(map(len, held_out)) >= 3
    return datasets, training.held_out.hashes, held_out


def test_held_out_rows_are_found_in_each_dataset_whatever_was_added(tokenizer, trained):
    datasets, hashes, held_out = trained
    assert [len(part) for part in hashes] == [len(part) for part in held_out]
    new = [{**USABLE, "completion": f" new {n}"} for n in range(30)]
    for lines, want in zip(datasets, held_out):
        rows = tokenize_rows(located(*new, *reversed(lines), want[0]), tokenizer)
        found = find_held_out(rows, hashes, "--dataset d")
        whole = contents(tokenize_rows(located(*reversed(want), want[0]), tokenizer))  # a row that came twice
        assert contents(found) == whole and found.rows_read == len(whole) and not found.dropped
    both = tokenize_rows(located(*datasets[0], *datasets[1]), tokenizer)
    assert len(find_held_out(both, hashes, "d")) == sum(map(len, held_out))


def test_a_held_out_row_that_is_dropped_now_is_counted_and_the_others_dropped_are_not(tokenizer, trained):
    datasets, hashes, held_out = trained
    lines = [line for line in datasets[0] if line != held_out[0][1]]
    bad = tokenize_rows(located(*lines, {"prompt": "a"}), tokenizer)
    assert bad.dropped == {"'completion' is missing": 1}
    with pytest.raises(InputError, match=f"only {len(held_out[0]) - 1} of the {len(held_out[0])} rows"):
        find_held_out(bad, hashes, "d")
    # The table has every row, but this one is not usable any more: as with another template.
    rows = tokenize_rows(located({"prompt": "a"}, *datasets[0]), tokenizer)
    place = rows.table["where"][:].index(f"rows line {datasets[0].index(held_out[0][1]) + 2}")
    reasons = rows.table["dropped"][:]
    reasons[place] = "refused"
    table = rows.table.remove_columns("dropped").add_column("dropped", reasons)
    rows = TokenizedRows(table, rows.row_format, np.setdiff1d(rows.indices, place), np.zeros(19, int))
    found = find_held_out(rows, hashes, "d")
    assert found.dropped == {"refused": 1} and found.first_dropped == {"refused": rows.table["where"][place]}
    assert found.rows_read == len(found) + 1 == len(held_out[0])


def test_rows_that_do_not_match_the_held_out_ones_are_refused_with_the_counts(tokenizer, trained):
    datasets, hashes, held_out = trained
    total, of_second = sum(map(len, held_out)), len(held_out[1])
    other = tokenize_rows(located(USABLE, {"prompt": "a", "completion": "b"}), tokenizer)
    with pytest.raises(
        InputError, match=f"^--validation_split: d has none of the {total} rows .* a different dataset"
    ):
        find_held_out(other, hashes, "d")
    changed = [line for line in datasets[1] if line not in held_out[1][:2]] + held_out[0][:1]
    rows = tokenize_rows(located(*changed), tokenizer)
    message = f"^--validation_split: d has only {of_second - 2} of the {of_second} rows .* it has changed"
    with pytest.raises(InputError, match=message):
        find_held_out(rows, hashes, "d")
