"""Tokenized rows to batches: load and check, choose the length, order, pack, pad."""

import math
from bisect import bisect_right

import numpy as np

from qlora.data.batch import BatchShape
from qlora.data.packing import most_rows_in_a_pack, pack_rows

GROUP_STEPS = 50  # group_by_length sorts within this many steps, so that the order stays mostly random


class StepOrder:
    """Which packs of rows each optimizer step takes: a pure function of (seed, epoch, step), whatever the
    micro-batch size.

    Each epoch is one permutation of the rows, cut into steps of `packs_per_step` packs; the last step of an
    epoch takes what is left, so no row is lost and none is seen twice. A pack is one row or, with
    `pack_length`, as many as fit that many tokens; epochs may then differ in their number of steps.

    With `weights`, an epoch has as many rows as there are, but from source k its share weights[k] of them:
    rows of a source come again only when all of it has been seen, in less or more than an epoch.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        packs_per_step: int,
        seed: int | tuple[int, ...],
        group_by_length: bool = False,
        pack_length: int | None = None,
        sources: np.ndarray | None = None,
        weights: list[float] | None = None,
        most_rows: int | None = None,
    ):
        self.lengths = np.asarray(lengths)
        if pack_length is not None and most_rows is None:
            most_rows = most_rows_in_a_pack(self.lengths, pack_length)
        self.most_rows = most_rows  # of a pack
        self.sources, self.weights = sources, weights
        self.packs_per_step = packs_per_step
        self.seed = [seed] if isinstance(seed, int) else list(seed)
        self.group_by_length = group_by_length
        self.pack_length = pack_length
        self._starts = [0]  # the first step of each epoch known so far
        self._epoch, self._packs = None, []

    def packs(self, step: int) -> list[list[int]]:
        """Row indices of each pack of optimizer step `step` (from 0).

        Packs of one row come longest first: neighbours then pad each other less. The order inside a step
        cannot change its gradient, which is a sum over all its targets.
        """
        epoch = self.epoch_of(step)
        start = (step - self._starts[epoch]) * self.packs_per_step
        packs = self._packs_of(epoch)[start : start + self.packs_per_step]
        if self.pack_length is None:
            packs = sorted(packs, key=lambda pack: -self.lengths[pack[0]])
        return packs

    def batch_shape(self, packs: int, max_length: int, is_stream: bool = False) -> BatchShape:
        """The shape of micro-batches of so many packs; rows may come to have `max_length` tokens.

        With `is_stream` others may follow the rows known here.
        """
        if self.pack_length is None:
            return BatchShape(packs, max_length, False, 0)
        if not is_stream and 2 * self.lengths.min() > self.pack_length:
            return BatchShape(packs, self.pack_length, True, 0)  # no pack will ever have two rows
        # A start for each row of a pack and for its padding, and the end.
        return BatchShape(packs, self.pack_length, True, packs * (self.most_rows + 1) + 1)

    def settings(self) -> dict:
        """What decides which rows a step takes, besides the rows themselves and the flags of that name."""
        names = "packs_per_step", "pack_length", "most_rows"
        return {name: getattr(self, name) for name in names}

    def epoch_of(self, step: int) -> int:
        while self._starts[-1] <= step:
            self._starts.append(self._starts[-1] + self.steps_in(len(self._starts) - 1))
        return bisect_right(self._starts, step) - 1

    def epochs_at(self, step: int) -> float:
        """Epochs done after `step` steps."""
        if step == 0:
            return 0.0
        epoch = self.epoch_of(step - 1)
        return epoch + (step - self._starts[epoch]) / (self._starts[epoch + 1] - self._starts[epoch])

    def steps_until(self, epochs: float) -> int:
        """Steps of that many epochs; a part of an epoch is rounded up to whole steps."""
        whole = int(epochs)
        return sum(map(self.steps_in, range(whole))) + math.ceil(
            (epochs - whole) * self.steps_in(whole) - 1e-9
        )

    def steps_in(self, epoch: int) -> int:
        """Steps of the epoch of this number (from 0)."""
        packs = len(self.lengths) if self.pack_length is None else len(self._packs_of(epoch))
        return -(-packs // self.packs_per_step)

    def _packs_of(self, epoch: int) -> list[list[int]]:
        if epoch != self._epoch:
            generator = np.random.default_rng([*self.seed, epoch])
            self._epoch, self._packs = epoch, self._cut(self._draw(epoch, generator), generator)
        return self._packs

    def _draw(self, epoch: int, generator: np.random.Generator) -> np.ndarray:
        if self.weights is None:
            return generator.permutation(len(self.lengths))
        exact = np.array(self.weights) / sum(self.weights) * len(self.lengths)
        quotas = exact.astype(int)
        quotas[np.argsort(quotas - exact, kind="stable")[: len(self.lengths) - quotas.sum()]] += 1
        drawn = []
        for number, quota in enumerate(quotas.tolist()):
            rows = np.flatnonzero(self.sources == number)
            first, last = epoch * quota, (epoch + 1) * quota  # of the source's rows in pass after pass
            passes = range(first // len(rows), -(-last // len(rows)))
            repeated = [
                np.random.default_rng([*self.seed, number, turn, 1]).permutation(rows) for turn in passes
            ]
            start = first - passes.start * len(rows)
            drawn += [np.concatenate(repeated)[start : start + quota]] if quota else []
        return generator.permutation(np.concatenate(drawn))

    def _cut(self, order: np.ndarray, generator: np.random.Generator) -> list[list[int]]:
        if self.pack_length is not None:
            return pack_rows(order, self.lengths, self.pack_length, self.most_rows, generator)
        if self.group_by_length:
            size = GROUP_STEPS * self.packs_per_step
            groups = np.split(order, range(size, len(order), size))
            order = np.concatenate(
                [group[np.argsort(-self.lengths[group], kind="stable")] for group in groups]
            )
            *full, last = np.split(order, range(self.packs_per_step, len(order), self.packs_per_step))
            generator.shuffle(full)
            order = np.concatenate([*full, last])
        return order[:, None].tolist()
