"""Packing: every row in exactly one pack, packs nearly full, no pack with too many tokens or rows."""

import numpy as np
import pytest

from qlora.data.packing import most_rows_in_a_pack, pack_rows


def real_lengths(number: int) -> np.ndarray:
    """Lengths like those of instruction data: mean 170, a tail up to 512."""
    return np.random.default_rng(0).lognormal(4.9, 0.7, number).clip(12, 512).astype(int)


@pytest.mark.parametrize("number", [1, 7, 5000, 25_000])
def test_packs_hold_every_row_once_and_none_is_too_full(number):
    lengths = real_lengths(number)
    order = np.random.default_rng(1).permutation(number)
    most_rows = most_rows_in_a_pack(lengths, 512)
    packs = pack_rows(order, lengths, 512, most_rows, np.random.default_rng(2))
    assert sorted(row for pack in packs for row in pack) == list(range(number))
    assert max(int(lengths[pack].sum()) for pack in packs) <= 512
    assert max(map(len, packs)) <= most_rows < 20
    if number >= 5000:
        assert lengths.sum() / (len(packs) * 512) > 0.98


def test_packs_that_fit_exactly_are_found():
    lengths = np.array([6, 4, 7, 3, 5, 5, 1])
    packs = pack_rows(np.arange(7), lengths, 10, 9, np.random.default_rng(0))
    assert sorted(sorted(lengths[pack].tolist()) for pack in packs) == [[1], [3, 7], [4, 6], [5, 5]]


def test_a_pack_of_many_short_rows_is_full():
    packs = pack_rows(np.arange(20), np.full(20, 3), 100, 6, np.random.default_rng(0))
    assert sorted(map(len, packs)) == [2, 6, 6, 6]
    assert (
        most_rows_in_a_pack(np.full(20, 30), 100) == 10 and most_rows_in_a_pack(np.array([900]), 1024) == 16
    )


def test_a_row_longer_than_a_pack_is_an_error():
    with pytest.raises(ValueError, match="a row of 11 tokens does not fit a pack of 10"):
        pack_rows(np.arange(2), np.array([3, 11]), 10, 9, np.random.default_rng(0))
