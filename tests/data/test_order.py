"""Counting, cutting, holding out, ordering, padding; batches against brute force."""

from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset

from qlora.data.batch import BatchShape, collate, micro_batches
from qlora.data.formats import IGNORE_INDEX
from qlora.data.order import StepOrder
from qlora.data.prepare import check_vocabulary
from qlora.data.tokenize import TOKENS, TokenizedRows, hold_out, token_columns, tokenize_rows
from qlora.errors import InputError

ROWS = [
    {"prompt": "What?", "completion": " A leaf."},
    {"prompt": "Sure?", "completion": " Yes.\nAll over. \u00e9"},
]


def located(*rows):
    return [(f"rows line {number}", row) for number, row in enumerate(rows, start=1)]


# ---------------------------------------------------------------- rows: used, dropped, cut


USABLE = {"prompt": "What?", "completion": " A leaf."}


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
    tokenizer.backend_tokenizer.normalizer = None  # else a lone character is two tokens: a space in front
    rows = tokenize_rows(located({"text": text}, {"text": "is it"}), tokenizer)
    assert (rows.rows_read, len(rows), rows.dropped) == (2, 1, Counter({reason: 1}))


@pytest.mark.parametrize("rows", [[{"text": None}], [{"text": ""}] * 3, [{"prompt": "a", "completion": ""}]])
def test_without_a_usable_row_the_reasons_are_kept(tokenizer, rows):
    found = tokenize_rows(located(*rows), tokenizer)
    assert len(found) == 0 and found.dropped.total() == len(rows)
    assert found.describe_drops().endswith("first: rows line 1")


def test_a_column_that_is_absent_everywhere_is_an_error_that_lists_the_columns(tokenizer):
    with pytest.raises(InputError, match=r"\['answer', 'question'\].*'text'"):
        tokenize_rows(located({"question": "a"}, {"answer": "b"}), tokenizer)
    with pytest.raises(InputError, match=r"no column 'body'.*\['text'\]"):
        tokenize_rows(located({"text": "a"}), tokenizer, "text", text_field="body")


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        tokenize_rows(located({"text": "What is it?"}), tokenizer)


def test_rows_read_are_rows_used_plus_rows_dropped(tokenizer):
    """Rows beyond those that decide the format too, each reason counted; drawn at random."""
    kinds = {
        None: USABLE,
        "empty response": {**USABLE, "completion": ""},
        "'completion' is missing": {"prompt": "a"},
        "prompt fills --max_length": {"prompt": "What? " * 40, "completion": "a"},
    }
    drawn = [None, *np.random.default_rng(0).choice(list(kinds), size=400)]
    rows = tokenize_rows(located(*(kinds[kind] for kind in drawn)), tokenizer).cut(32)
    expected = Counter(drawn)
    assert len(rows) == expected.pop(None)
    assert rows.dropped == expected
    assert rows.rows_read == len(drawn) == len(rows) + rows.dropped.total()


def test_an_answer_that_is_too_long_is_cut_counted_and_has_no_eos(tokenizer):
    whole = tokenize_rows(located(USABLE), tokenizer)
    ids, labels = whole[0]
    for max_length in range(1, len(ids) + 2):
        if not any(label != IGNORE_INDEX for label in labels[:max_length]):
            cut = whole.cut(max_length)
            assert len(cut) == 0 and cut.dropped == {"prompt fills --max_length": 1}
            assert cut.first_dropped == {"prompt fills --max_length": "rows line 1"}
            continue
        rows = whole.cut(max_length)
        is_cut = max_length < len(ids)
        assert rows[0][0].tolist() == ids[:max_length].tolist()
        assert rows[0][1].tolist() == labels[:max_length].tolist()
        assert (tokenizer.eos_token_id in rows[0][1]) is not is_cut
        assert rows.truncated == is_cut and ("1 answers cut" in rows.describe()) is is_cut


def test_flat_rows_come_back_one_by_one(tokenizer):
    texts = ["What is it?", "A leaf.", "Yes is it? A leaf."]
    rows = tokenize_rows(located(*({"text": text} for text in texts)), tokenizer)
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    assert [rows[i][0].tolist() for i in range(len(rows))] == expected
    assert rows.lengths.tolist() == [len(ids) for ids in expected]
    assert rows.targets == sum(len(ids) - 1 for ids in expected)
    chosen = rows.subset(np.array([2, 0]))
    assert [chosen[i][0].tolist() for i in range(len(chosen))] == [expected[2], expected[0]]


def test_a_token_beyond_the_vocabulary_is_an_error(tokenizer):
    rows = tokenize_rows(located({"text": "What is it?"}, {"text": "A leaf."}), tokenizer)
    largest = max(tokenizer("What is it? A leaf.")["input_ids"])
    check_vocabulary(rows, largest + 1)
    with pytest.raises(InputError, match=f"token id {largest}.* {largest} tokens"):
        check_vocabulary(rows, largest)


# ---------------------------------------------------------------- held-out rows


def make_rows(lengths, seed=0):
    """Rows of random ids, about half of them targets, the last always and the first never."""
    generator = np.random.default_rng(seed)
    ids = [generator.integers(3, 400, size=length) for length in lengths]
    labels = [np.where(generator.random(len(row)) < 0.5, row, IGNORE_INDEX) for row in ids]
    for row_ids, row_labels in zip(ids, labels):
        row_labels[0], row_labels[-1] = IGNORE_INDEX, row_ids[-1]
    columns = [token_columns("", *pair, {}, bos_id=1, eos_id=2) for pair in zip(ids, labels)]
    table = Dataset.from_list(columns, features=TOKENS)
    return TokenizedRows(table, "text", np.arange(len(ids)), np.zeros(len(ids), int), rows_read=len(ids))


def contents(rows):
    return [tuple(rows[i][0].tolist()) for i in range(len(rows))]


@pytest.mark.parametrize("amount, held", [(0.05, 2), (0.1, 4), (0.5, 20), (1, 1), (39, 39)])
def test_held_out_rows_are_disjoint_complete_and_always_the_same(amount, held):
    rows = make_rows(range(5, 45))
    training, validation = hold_out(rows, amount, seed=3)
    assert (len(training), len(validation)) == (40 - held, held)
    assert sorted(contents(training) + contents(validation)) == sorted(contents(rows))
    assert contents(hold_out(rows, amount, seed=3)[1]) == contents(validation)
    if held == 20:
        assert contents(hold_out(rows, amount, seed=4)[1]) != contents(validation)


@pytest.mark.parametrize("amount", [0, 0.01, 40, 41, 0.999])
def test_holding_out_nothing_or_everything_is_an_error(amount):
    with pytest.raises(InputError, match=f"--validation_split {amount} "):
        hold_out(make_rows(range(5, 45)), amount, seed=0)


def test_both_halves_keep_the_books(tokenizer):
    """Rows read = used + dropped in each, and a cut row is counted where it went: cut rows have no EOS."""
    lines = [{**USABLE, "completion": " leaf" * number} for number in range(13)]
    rows = tokenize_rows(located(*lines), tokenizer).cut(12)
    assert rows.dropped == {"empty response": 1} and 2 < rows.truncated < len(rows) - 2
    for half in (halves := hold_out(rows, 0.5, seed=0)):
        assert half.rows_read == len(half) + half.dropped.total()
        assert half.truncated == sum(ids[-1] != tokenizer.eos_token_id for ids in contents(half))
    assert sum(half.rows_read for half in halves) == 13


# ---------------------------------------------------------------- order


LENGTHS = np.random.default_rng(1).integers(3, 200, size=1003)
KINDS = {"shuffled": {}, "grouped": {"group_by_length": True}, "packed": {"pack_length": 256}}
ORDERS = pytest.mark.parametrize("kind", KINDS)


def epoch_steps(order, epoch):
    first = sum(order.steps_in(before) for before in range(epoch))
    return [order.packs(first + step) for step in range(order.steps_in(epoch))]


def rows_of(packs):
    return [row for pack in packs for row in pack]


@ORDERS
@pytest.mark.parametrize("number, packs_per_step", [(1003, 16), (64, 16), (17, 16), (5, 1), (1, 4), (3, 16)])
def test_an_epoch_takes_every_row_once_and_its_last_step_the_rest(kind, number, packs_per_step):
    order = StepOrder(LENGTHS[:number], packs_per_step, seed=0, **KINDS[kind])
    for epoch in range(3):
        steps = epoch_steps(order, epoch)
        assert sorted(row for packs in steps for row in rows_of(packs)) == list(range(number))
        assert [len(packs) for packs in steps[:-1]] == [packs_per_step] * (len(steps) - 1)
        assert 1 <= len(steps[-1]) <= packs_per_step


@ORDERS
def test_order_is_a_pure_function_of_seed_epoch_and_step(kind):
    wanted = list(range(0, 190, 7))
    forwards = StepOrder(LENGTHS, 16, seed=5, **KINDS[kind])
    expected = {step: forwards.packs(step) for step in wanted}
    backwards = StepOrder(LENGTHS, 16, seed=5, **KINDS[kind])
    assert {step: backwards.packs(step) for step in reversed(wanted)} == expected
    for step in wanted:
        assert StepOrder(LENGTHS, 16, seed=5, **KINDS[kind]).packs(step) == expected[step]


@ORDERS
def test_order_neither_depends_on_nor_draws_from_global_random_states(kind):
    torch.manual_seed(0)
    np.random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    packs = StepOrder(LENGTHS, 16, seed=5, **KINDS[kind]).packs(3)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    np.random.seed(1)
    assert StepOrder(LENGTHS, 16, seed=5, **KINDS[kind]).packs(3) == packs


@ORDERS
def test_epochs_and_seeds_differ(kind):
    order, other = (StepOrder(LENGTHS, 16, seed, **KINDS[kind]) for seed in (0, 1))
    firsts = order.packs(0), order.packs(order.steps_in(0)), other.packs(0)
    assert len({frozenset(rows_of(packs)) for packs in firsts}) == 3


@ORDERS
def test_steps_and_epochs_count_each_other(kind):
    order = StepOrder(LENGTHS, 16, seed=0, **KINDS[kind])
    steps = [order.steps_in(epoch) for epoch in range(3)]
    assert [order.steps_until(epochs) for epochs in (1, 2, 3)] == np.cumsum(steps).tolist()
    assert order.steps_until(2.5) == sum(steps[:2]) + -(-steps[2] // 2)
    assert order.epochs_at(0) == 0 and order.epochs_at(sum(steps)) == 3
    assert order.epochs_at(steps[0] + 1) == pytest.approx(1 + 1 / steps[1])


@pytest.mark.parametrize("kind", ["shuffled", "grouped"])
def test_a_step_is_sorted_from_long_to_short(kind):
    order = StepOrder(LENGTHS, 16, seed=0, **KINDS[kind])
    for packs in epoch_steps(order, 0):
        lengths = [int(LENGTHS[row]) for row in rows_of(packs)]
        assert lengths == sorted(lengths, reverse=True)


def test_grouping_by_length_pads_less_and_does_not_run_from_long_to_short():
    def padded(steps):
        return sum(max(LENGTHS[rows_of(packs)]) * len(packs) for packs in steps)

    plain, grouped = (epoch_steps(StepOrder(LENGTHS, 16, 0, group), 0) for group in (False, True))
    assert padded(grouped) < 1.1 * sum(LENGTHS) < padded(plain)
    longest = [max(LENGTHS[rows_of(packs)]) for packs in grouped[:50]]
    assert abs(np.corrcoef(longest, np.arange(50))[0, 1]) < 0.5


@pytest.mark.parametrize("pack_length", [None, 256])
def test_a_mixture_has_its_weights_in_every_epoch_and_repeats_no_row_early(pack_length):
    """Sources of 900, 90 and 13 rows at 20%, 70% and 10%: the second comes about eight times an epoch."""
    sources = np.repeat([0, 1, 2], [900, 90, 13])
    order = StepOrder(LENGTHS, 16, 0, pack_length=pack_length, sources=sources, weights=[0.2, 0.7, 0.1])
    counts, epochs = np.zeros(1003, int), 4
    for epoch in range(epochs):
        rows = [row for packs in epoch_steps(order, epoch) for row in rows_of(packs)]
        assert len(rows) == 1003
        assert np.bincount(sources[rows]).tolist() == [201, 702, 100]
        np.add.at(counts, rows, 1)
    for source in range(3):  # all of a source's rows have been seen equally often, but for the pass under way
        assert np.ptp(counts[sources == source]) <= 1
    again = StepOrder(LENGTHS, 16, 0, pack_length=pack_length, sources=sources, weights=[0.2, 0.7, 0.1])
    assert again.packs(100) == order.packs(100)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_the_rows_of_a_step_do_not_depend_on_the_micro_batch_size(batch_size):
    rows = make_rows(LENGTHS[:40])
    packs = StepOrder(rows.lengths, 16, seed=0).packs(1)
    assert len(micro_batches(rows, packs[:1], batch_size, pad_id=2)[0]["input_ids"]) == 1
    batches = micro_batches(rows, packs, batch_size, pad_id=2, is_filled=True)
    assert {len(batch["input_ids"]) for batch in batches} == {batch_size}
    padded = [row for batch in batches for row in batch["input_ids"].tolist()]
    assert all(set(row) == {2} for row in padded[16:])  # the last batch is filled up
    padded = padded[:16]
    for index, row in zip(rows_of(packs), padded, strict=True):
        assert row[: rows.lengths[index]] == rows[index][0].tolist()
    assert sum(len(batch["target_ids"]) for batch in batches) == sum(
        int((rows[index][1] != IGNORE_INDEX).sum()) for index in rows_of(packs)
    )


@pytest.mark.parametrize("packs", [1, 3, 8])
@pytest.mark.parametrize("lengths", [LENGTHS, np.array([250] * 40 + [3] * 200)])
def test_the_batches_of_all_epochs_have_the_shape_of_the_run(packs, lengths):
    order = StepOrder(lengths, 4 * packs, 0, pack_length=256)
    shape = order.batch_shape(packs, max_length=250)
    assert (shape.packs, shape.length, shape.is_packed) == (packs, 256, True)
    for epoch in range(5):
        for step in epoch_steps(order, epoch):
            for start in range(0, len(step), packs):
                batch = step[start : start + packs]
                assert sum(len(pack) + 1 for pack in batch) + 1 <= shape.starts


def test_the_shape_of_padded_rows_of_single_ones_and_of_a_stream():
    order = StepOrder(LENGTHS, 8, seed=0)
    assert order.batch_shape(4, 100) == BatchShape(4, 100, is_packed=False, starts=0)
    order = StepOrder(np.full(20, 100), 8, seed=0, pack_length=128)
    assert order.batch_shape(4, 100) == BatchShape(4, 128, is_packed=True, starts=0)
    assert order.batch_shape(4, 100, is_stream=True).starts == 4 * (order.most_rows + 1) + 1


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("lengths", [[5], [8], [9, 2], [2, 2], [17, 3, 16, 8, 1, 30]])
@pytest.mark.parametrize("pad_id", [0, 2, 399])
def test_every_target_is_paired_with_the_position_before_it(lengths, pad_id):
    rows = make_rows(lengths, seed=len(lengths))
    batch = collate([[rows[i]] for i in range(len(rows))], pad_id)
    width = 8 * -(-max(lengths) // 8)
    assert batch["input_ids"].shape == (len(lengths), width)
    pairs = []
    for row, (ids, labels) in enumerate(rows[i] for i in range(len(rows))):
        ids, labels = ids.tolist(), labels.tolist()
        assert batch["input_ids"][row].tolist() == ids + [pad_id] * (width - len(ids))
        pairs += [
            (row * width + position, labels[position + 1])
            for position in range(len(ids) - 1)
            if labels[position + 1] != IGNORE_INDEX
        ]
    assert list(zip(batch["target_index"].tolist(), batch["target_ids"].tolist(), strict=True)) == pairs
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_the_targets_of_real_rows_read_as_their_answers(tokenizer):
    rows = tokenize_rows(located(*ROWS), tokenizer)
    batch = collate([[rows[0]], [rows[1]]], tokenizer.eos_token_id)
    assert torch.equal(batch["input_ids"].flatten()[batch["target_index"] + 1], batch["target_ids"])
    answers = "".join(row["completion"] + tokenizer.eos_token for row in ROWS)
    assert " " + tokenizer.decode(batch["target_ids"]) == answers
