"""The order of training: which rows each optimizer step takes, shuffled, mixed, grouped or packed."""

import math
from bisect import bisect_right

import numpy as np

from qlora.data.batch import BatchShape
from qlora.data.packing import most_rows_in_a_pack, pack_rows

GROUP_STEPS = 50  # group_by_length sorts within this many steps, so that the order stays mostly random


class StepOrder:
    """Which packs of rows each optimizer step takes: a pure function of (seed, epoch, step).

    It does not depend on the micro-batch size. An epoch is one permutation of the rows, cut into steps of
    `packs_per_step` packs; the last step of an epoch takes what is left, so no row is lost or repeated. A
    pack is one row, or with `pack_length` as many as fit in that many tokens; epochs may then differ in their
    number of steps.

    With `weights`, an epoch has as many rows as there are, and the share weights[k] of them comes from source
    k: the rows with source_ids k. A row comes again only once all rows of its source have been seen, which
    may take more or less than an epoch.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        packs_per_step: int,
        seed: int | tuple[int, ...],
        group_by_length: bool = False,
        pack_length: int | None = None,
        source_ids: np.ndarray | None = None,
        weights: list[float] | None = None,
        most_rows: int | None = None,
    ):
        self.lengths = np.asarray(lengths)
        self.packs_per_step = packs_per_step
        self.seed = (seed,) if isinstance(seed, int) else tuple(seed)
        self.group_by_length = group_by_length
        self.pack_length = pack_length
        self.source_ids, self.weights = source_ids, weights
        if pack_length is not None and most_rows is None:
            most_rows = most_rows_in_a_pack(self.lengths, pack_length)
        self.most_rows = most_rows  # in a pack
        self._first_steps = [0]  # the first step of each epoch known so far
        self._cached_epoch, self._cached_packs = None, []

    def for_rows(
        self, lengths: np.ndarray, source_ids: np.ndarray | None, seed: int | tuple[int, ...]
    ) -> "StepOrder":
        """The same order over other rows with another seed, as for the next window of a stream."""
        return StepOrder(
            lengths, self.packs_per_step, seed, self.group_by_length, self.pack_length, source_ids,
            self.weights, self.most_rows,
        )  # fmt: skip

    def packs(self, step: int) -> list[list[int]]:
        """Row indices of each pack of optimizer step `step` (from 0).

        Packs of one row come longest first, so that micro-batches of similar rows need less padding. The
        order within a step cannot change its gradient, which is a sum over all its targets.
        """
        epoch = self.epoch_of(step)
        start = (step - self._first_steps[epoch]) * self.packs_per_step
        packs = self._packs_of(epoch)[start : start + self.packs_per_step]
        if self.pack_length is None:
            packs = sorted(packs, key=lambda pack: -self.lengths[pack[0]])
        return packs

    def batch_shape(self, packs: int, stream_length: int | None = None) -> BatchShape:
        """The largest shape of micro-batches of `packs` packs.

        With `stream_length` the rows known here are not all: others, of up to so many tokens, will follow.
        """
        if self.pack_length is None:
            longest = int(self.lengths.max()) if stream_length is None else stream_length
            return BatchShape(packs, longest, is_packed=False, starts=0)
        if stream_length is None and 2 * self.lengths.min() > self.pack_length:  # no pack can have two rows
            return BatchShape(packs, self.pack_length, is_packed=True, starts=0)
        # In each pack a start for every row and one for the padding; one more entry marks the end.
        starts = packs * (self.most_rows + 1) + 1
        return BatchShape(packs, self.pack_length, is_packed=True, starts=starts)

    def settings(self) -> dict:
        """What decides a step's rows, besides the rows themselves and the flags, under checkpointed names."""
        return {
            "packs_per_step": self.packs_per_step,
            "pack_length": self.pack_length,
            "most_rows": self.most_rows,
        }

    def epoch_of(self, step: int) -> int:
        while self._first_steps[-1] <= step:
            last_epoch = len(self._first_steps) - 1
            self._first_steps.append(self._first_steps[-1] + self.steps_in(last_epoch))
        return bisect_right(self._first_steps, step) - 1

    def epochs_at(self, step: int) -> float:
        """Epochs completed after `step` steps."""
        if step == 0:
            return 0.0
        epoch = self.epoch_of(step - 1)
        first, next_first = self._first_steps[epoch : epoch + 2]
        return epoch + (step - first) / (next_first - first)

    def steps_until(self, epochs: float) -> int:
        """Steps in that many epochs; a fraction of an epoch is rounded up to whole steps."""
        whole = int(epochs)
        steps = sum(map(self.steps_in, range(whole)))
        if epochs == whole:
            return steps
        return steps + math.ceil((epochs - whole) * self.steps_in(whole) - 1e-9)

    def steps_in(self, epoch: int) -> int:
        """Steps in an epoch, by its number from 0."""
        packs = len(self.lengths) if self.pack_length is None else len(self._packs_of(epoch))
        return -(-packs // self.packs_per_step)

    def _packs_of(self, epoch: int) -> list[list[int]]:
        if epoch != self._cached_epoch:
            generator = np.random.default_rng([*self.seed, epoch])
            rows = self._rows_of(epoch, generator)
            self._cached_epoch, self._cached_packs = epoch, self._into_packs(rows, generator)
        return self._cached_packs

    def _rows_of(self, epoch: int, generator: np.random.Generator) -> np.ndarray:
        """The rows of an epoch in random order: all of them, or each source's quota."""
        if self.weights is None:
            return generator.permutation(len(self.lengths))
        exact = np.array(self.weights) / sum(self.weights) * len(self.lengths)
        quotas = exact.astype(int)
        missing = len(self.lengths) - quotas.sum()
        quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1  # to the largest remainders
        chosen = []
        for source, quota in enumerate(quotas.tolist()):
            if not quota:
                continue
            # A source's rows are read pass after pass, each in an order of its own. This epoch takes the rows
            # from `first` up to `last` of that endless sequence.
            rows = np.flatnonzero(self.source_ids == source)
            first, last = epoch * quota, (epoch + 1) * quota
            passes = range(first // len(rows), -(-last // len(rows)))
            shuffled = [
                np.random.default_rng([*self.seed, source, number, 1]).permutation(rows) for number in passes
            ]
            start = first - passes.start * len(rows)
            chosen.append(np.concatenate(shuffled)[start : start + quota])
        return generator.permutation(np.concatenate(chosen))

    def _into_packs(self, rows: np.ndarray, generator: np.random.Generator) -> list[list[int]]:
        if self.pack_length is not None:
            return pack_rows(rows, self.lengths, self.pack_length, self.most_rows, generator)
        if self.group_by_length:
            size = GROUP_STEPS * self.packs_per_step
            groups = np.split(rows, range(size, len(rows), size))
            rows = np.concatenate(
                [group[np.argsort(-self.lengths[group], kind="stable")] for group in groups]
            )
            *full, last = np.split(rows, range(self.packs_per_step, len(rows), self.packs_per_step))
            generator.shuffle(full)  # steps, not rows: a step's rows stay of similar length
            rows = np.concatenate([*full, last])
        return rows[:, None].tolist()
