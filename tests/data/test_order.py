"""The order of training: every row once an epoch, reproducible, grouped, mixed and packed; batch shapes."""

import numpy as np
import pytest
import torch

from qlora.data.batch import BatchShape
from qlora.data.order import StepOrder

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
    untouched = StepOrder(LENGTHS, 16, seed=0, **KINDS[kind])
    untouched.steps_until(1)
    assert untouched._cached_epoch in (None, 0)  # epoch 1 was not packed in vain
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
    """Sources of 900, 90 and 13 rows at 20%, 70% and 10%: the second is seen about eight times an epoch."""
    sources = np.repeat([0, 1, 2], [900, 90, 13])
    order = StepOrder(LENGTHS, 16, 0, pack_length=pack_length, source_ids=sources, weights=[0.2, 0.7, 0.1])
    counts, epochs = np.zeros(1003, int), 4
    for epoch in range(epochs):
        rows = [row for packs in epoch_steps(order, epoch) for row in rows_of(packs)]
        assert len(rows) == 1003
        assert np.bincount(sources[rows]).tolist() == [201, 702, 100]
        np.add.at(counts, rows, 1)
    for source in range(3):  # a source's rows have been seen equally often, up to the unfinished pass
        assert np.ptp(counts[sources == source]) <= 1
    again = StepOrder(LENGTHS, 16, 0, pack_length=pack_length, source_ids=sources, weights=[0.2, 0.7, 0.1])
    assert again.packs(100) == order.packs(100)


@ORDERS
def test_an_order_for_other_rows_is_one_made_for_them_with_the_same_settings(kind):
    """But for the limit on the rows in a pack, which decides the shape of batches and must not change."""
    sources, weights = np.arange(40) % 2, [0.3, 0.7] if kind != "grouped" else None
    order = StepOrder(LENGTHS, 4, 5, source_ids=np.arange(1003) % 2, weights=weights, **KINDS[kind])
    others = LENGTHS[100:140]
    made = StepOrder(
        others, 4, (5, 1, 20), source_ids=sources, weights=weights, most_rows=order.most_rows, **KINDS[kind]
    )
    derived = order.for_rows(others, sources, (*order.seed, 1, 20))
    assert [derived.packs(step) for step in range(20)] == [made.packs(step) for step in range(20)]
    assert derived.settings() == order.settings()


# ---------------------------------------------------------------- the shape of batches


@pytest.mark.parametrize("packs", [1, 3, 8])
@pytest.mark.parametrize("lengths", [LENGTHS, np.array([250] * 40 + [3] * 200)])
def test_the_batches_of_all_epochs_have_the_shape_of_the_run(packs, lengths):
    order = StepOrder(lengths, 4 * packs, 0, pack_length=256)
    shape = order.batch_shape(packs)
    assert (shape.packs, shape.length, shape.is_packed) == (packs, 256, True)
    for epoch in range(5):
        for step in epoch_steps(order, epoch):
            for start in range(0, len(step), packs):
                batch = step[start : start + packs]
                assert sum(len(pack) + 1 for pack in batch) + 1 <= shape.starts


def test_the_shape_of_padded_rows_of_single_ones_and_of_a_stream():
    order = StepOrder(LENGTHS, 8, seed=0)
    assert order.batch_shape(4) == BatchShape(4, LENGTHS.max(), is_packed=False, starts=0)
    assert order.batch_shape(4, stream_length=300) == BatchShape(4, 300, is_packed=False, starts=0)
    order = StepOrder(np.full(20, 100), 8, seed=0, pack_length=128)
    assert order.batch_shape(4) == BatchShape(4, 128, is_packed=True, starts=0)
    assert order.batch_shape(4, stream_length=128).starts == 4 * (order.most_rows + 1) + 1
