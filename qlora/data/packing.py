"""Packing: which rows share a sequence. Rows are never split, and attention does not cross them."""

import math

import numpy as np

WINDOW_ROWS = 10_000  # packed at a time: enough to fill packs well, and bounded for data of any size


def most_rows_in_a_pack(lengths: np.ndarray, capacity: int) -> int:
    """A limit on the rows in a pack, so that every batch can have one shape.

    Twice as many rows of the mean length as fit, and at least one for every 64 tokens.
    """
    return max(2 * math.ceil(capacity / lengths.mean()) + 2, capacity // 64)


def pack_rows(
    order: np.ndarray, lengths: np.ndarray, capacity: int, most_rows: int, generator: np.random.Generator
) -> list[list[int]]:
    """Group the rows in `order` into packs of at most `capacity` tokens and `most_rows` rows.

    Each row is in exactly one pack. Best-fit decreasing (Johnson et al. 1974) within windows of the order:
    the longest row first, each into the fullest pack with room for it. The packs of a window are then
    shuffled. Raises ValueError if a row is longer than `capacity`.
    """
    if len(order) and lengths[order].max() > capacity:
        raise ValueError(f"a row of {lengths[order].max()} tokens does not fit a pack of {capacity}")
    packs = []
    for start in range(0, len(order), WINDOW_ROWS):
        window = order[start : start + WINDOW_ROWS]
        window = window[np.argsort(-lengths[window], kind="stable")]
        window_packs = _best_fit(window.tolist(), lengths[window].tolist(), capacity, most_rows)
        packs += [window_packs[index] for index in generator.permutation(len(window_packs))]
    return packs


def _best_fit(rows: list[int], lengths: list[int], capacity: int, most_rows: int) -> list[list[int]]:
    """Best fit of rows in the order given. Finding the fullest pack with room takes one bit operation."""
    packs = []
    open_packs = [[] for _ in range(capacity + 1)]  # open_packs[n]: packs with room for n more tokens
    has_room = 0  # bit n is set while open_packs[n] is not empty
    for row, length in zip(rows, lengths):
        fitting = has_room >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest set bit: the tightest fit
            pack = open_packs[room].pop()
            if not open_packs[room]:
                has_room ^= 1 << room
        else:
            room, pack = capacity, []
            packs.append(pack)
        pack.append(row)
        if len(pack) < most_rows:
            open_packs[room - length].append(pack)
            has_room |= 1 << (room - length)
    return packs
