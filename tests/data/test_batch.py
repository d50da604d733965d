"""Batches against brute force: every target paired with the position before it, rows kept apart."""

import numpy as np
import pytest
import torch

from qlora.data.batch import BatchShape, collate, micro_batches, worst_batch
from qlora.data.order import StepOrder
from qlora.data.segments import IGNORE_INDEX
from qlora.data.tokenize import tokenize_rows
from tests.data.random_rows import random_rows

LENGTHS = np.random.default_rng(1).integers(3, 200, size=40)
ROWS = [
    {"prompt": "What?", "completion": " A leaf."},
    {"prompt": "Sure?", "completion": " Yes.\nAll over. \u00e9"},
]


# ---------------------------------------------------------------- padded


@pytest.mark.parametrize("lengths", [[5], [8], [9, 2], [2, 2], [17, 3, 16, 8, 1, 30]])
@pytest.mark.parametrize("pad_id", [0, 2, 399])
def test_every_target_is_paired_with_the_position_before_it(lengths, pad_id):
    rows = random_rows(lengths, seed=len(lengths))
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
    rows = tokenize_rows([(f"line {number}", row) for number, row in enumerate(ROWS)], tokenizer)
    batch = collate([[rows[0]], [rows[1]]], tokenizer.eos_token_id)
    assert torch.equal(batch["input_ids"].flatten()[batch["target_index"] + 1], batch["target_ids"])
    answers = "".join(row["completion"] + tokenizer.eos_token for row in ROWS)
    assert " " + tokenizer.decode(batch["target_ids"]) == answers


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_the_rows_of_a_step_do_not_depend_on_the_micro_batch_size(batch_size):
    rows = random_rows(LENGTHS)
    packs = StepOrder(rows.lengths, 16, seed=0).packs(1)
    assert len(micro_batches(rows, packs[:1], batch_size, pad_id=2)[0]["input_ids"]) == 1
    batches = micro_batches(rows, packs, batch_size, pad_id=2, multiple=batch_size)
    assert {len(batch["input_ids"]) for batch in batches} == {batch_size}
    padded = [row for batch in batches for row in batch["input_ids"].tolist()]
    assert all(set(row) == {2} for row in padded[16:])  # empty packs complete the last batch
    padded = padded[:16]
    indices = [row for pack in packs for row in pack]
    for index, row in zip(indices, padded, strict=True):
        assert row[: rows.lengths[index]] == rows[index][0].tolist()
    targets = sum(int((rows[index][1] != IGNORE_INDEX).sum()) for index in indices)
    assert sum(len(batch["target_ids"]) for batch in batches) == targets


# ---------------------------------------------------------------- packed


def test_positions_restart_with_every_row_and_with_the_padding():
    rows = [(torch.arange(3, 3 + length), torch.arange(3, 3 + length)) for length in (3, 2, 6)]
    batch = collate([[rows[0], rows[1]], [rows[2]]], pad_id=0, pack_length=7)  # padded to 8
    assert batch["input_ids"].tolist() == [[3, 4, 5, 3, 4, 0, 0, 0], [3, 4, 5, 6, 7, 8, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1]]
    assert batch["seq_starts"].tolist() == [0, 3, 5, 8, 14, 16]
    filled = collate([[rows[0], rows[1]], [rows[2]]], pad_id=0, pack_length=7, starts=8)
    assert filled["seq_starts"].tolist() == [0, 3, 5, 8, 14, 16, 16, 16]


def test_packs_of_one_row_need_nothing_to_keep_rows_apart():
    row = (torch.ones(8), torch.ones(8))
    single = collate([[row], []], pad_id=0, pack_length=8)
    assert "seq_starts" not in single
    assert single["position_ids"].tolist() == [list(range(8))] * 2
    assert collate([[row]], pad_id=0, pack_length=8, starts=4)["seq_starts"].tolist() == [0, 8, 8, 8]


# ---------------------------------------------------------------- the batch a step is planned with


@pytest.mark.parametrize(
    "shape",
    [BatchShape(3, 60, False, 0), BatchShape(2, 128, True, 0), BatchShape(2, 128, True, 20)],
    ids=["padded", "packs of one row", "packs of rows"],
)
def test_the_worst_batch_has_the_full_shape_and_only_targets(shape):
    batch = worst_batch(shape, vocab_size=50)
    length = 8 * -(-shape.length // 8)
    assert batch["input_ids"].shape == (shape.packs, length) and batch["input_ids"].max() < 50
    assert len(batch["target_ids"]) == shape.packs * (shape.length - 1)  # all but the first of each pack
    pack = [(torch.ones(4), torch.ones(4))]
    other = collate([pack] * shape.packs, 0, shape.length if shape.is_packed else None, shape.starts)
    assert batch.keys() == other.keys()
    if shape.starts:
        assert batch["seq_starts"].shape == other["seq_starts"].shape == (shape.starts,)
        assert batch["seq_starts"].unique().tolist() == [0, 64, 128, 192, 256]  # two rows in each pack
