"""Which rows share a sequence: rows are packed whole, and attention keeps them apart (speed/attention.py)."""

import math

import numpy as np

ROWS_PACKED_TOGETHER = 10_000  # enough to fill packs well, few enough for any data


def most_rows_in_a_pack(lengths: np.ndarray, capacity: int) -> int:
    """A bound on the rows of a pack, so that batches can have one shape: twice the mean of rows of these
    lengths, and no less than a row for every 64 tokens."""
    return max(2 * math.ceil(capacity / lengths.mean()) + 2, capacity // 64)


def pack_rows(
    order: np.ndarray, lengths: np.ndarray, capacity: int, most_rows: int, generator: np.random.Generator
) -> list[list[int]]:
    """Group the rows of `order` into packs of at most `capacity` tokens and `most_rows` rows: each row in one
    pack, none cut.

    Windows of the order are packed by themselves, best-fit decreasing (Johnson et al. 1974): the longest row
    first, each into the fullest pack that still has room. A window's packs then come in random order. Raises
    ValueError if a row is longer than `capacity`.
    """
    if len(order) and lengths[order].max() > capacity:
        raise ValueError(f"a row of {lengths[order].max()} tokens does not fit a pack of {capacity}")
    packs = []
    for start in range(0, len(order), ROWS_PACKED_TOGETHER):
        window = order[start : start + ROWS_PACKED_TOGETHER]
        window = window[np.argsort(-lengths[window], kind="stable")]
        filled = _best_fit(window.tolist(), lengths[window].tolist(), capacity, most_rows)
        packs += [filled[index] for index in generator.permutation(len(filled))]
    return packs


def _best_fit(rows: list[int], lengths: list[int], capacity: int, most_rows: int) -> list[list[int]]:
    packs, with_room = [], [[] for _ in range(capacity + 1)]  # with_room[n]: packs that have n tokens left
    rooms = 0  # bit n: with_room[n] is not empty. The tightest fit is the lowest bit from `length` on
    for row, length in zip(rows, lengths):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = capacity, []
            packs.append(pack)
        pack.append(row)
        if len(pack) < most_rows:
            with_room[room - length].append(pack)
            rooms |= 1 << (room - length)
    return packs
