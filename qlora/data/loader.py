"""The micro-batches of each optimizer step, made in a thread while the step before is trained.

StepLoader takes them from prepared rows, StreamLoader from a stream, window by window.
"""

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from threading import Thread

import torch

from qlora import ranks
from qlora.data.batch import BatchShape, micro_batches
from qlora.data.order import StepOrder
from qlora.data.stream import RowStream, Window
from qlora.data.tokenized import TokenizedRows

POLL_SECONDS = 0.2  # how often take() asks whether to stop waiting


class WaitStopped(Exception):
    """The run has to stop, and the data of its next step is not there yet: a stream may have stalled."""


@dataclass
class StepData:
    """What one optimizer step trains on."""

    # This rank's share, as collate makes them, by their numbers in the whole step. Page-locked if there is a
    # GPU.
    micro_batches: dict[int, dict[str, torch.Tensor]]
    targets: int  # trained tokens of the whole step, of all ranks: what its loss is divided by
    tokens: int  # likewise, without padding
    epochs: float  # completed once the step is done
    place: dict | None = None  # when streaming: the fields of a Place, for the checkpoint


@dataclass(frozen=True)
class Place:
    """Where a window of a stream starts. A checkpoint keeps it, and a resumed run reads on from there."""

    turn: int = 0  # passes over the source before this one
    row: int = 0  # rows of this pass before the window
    first_step: int = 0  # the optimizer step that takes the window's first packs


class StepLoader:
    """Makes the data of one step after another, each in a background thread."""

    def __init__(
        self, rows: TokenizedRows, order: StepOrder, shape: BatchShape, pad_id: int, total_steps: int
    ):
        self.rows, self.order, self.shape, self.pad_id = rows, order, shape, pad_id
        self.total_steps = total_steps
        self._coming_step: int | None = None
        self._coming: Future | None = None  # the StepData of _coming_step

    def prepare(self, step: int) -> None:
        """Start making a step. Take the one before first: make() is not safe to run twice at a time."""
        if step < self.total_steps:
            self._coming_step, self._coming = step, in_background(self.make, step)

    def take(self, step: int, should_stop: Callable[[], bool] = lambda: False) -> StepData:
        """The data of a step; waits until all ranks have theirs, and raises what went wrong while making it.

        Raises WaitStopped if `should_stop()`, asked again and again, is true before the data is ready. All
        ranks must give the same answer to it.
        """
        if self._coming_step != step:
            self.prepare(step)
        # Not result(timeout=...): its TimeoutError could also be one of the network.
        while ranks.any_true(not wait([self._coming], POLL_SECONDS).done):
            if should_stop():
                raise WaitStopped
        return self._coming.result()

    def make(self, step: int) -> StepData:
        """The data of a step, made in the calling thread."""
        return make_step(self.rows, self.order, self.shape, self.pad_id, step)


class StreamLoader(StepLoader):
    """Makes steps from one window of a stream after another. Steps must be made in order.

    Each window is a small epoch, shuffled, packed and cut into steps by itself, so a step is a pure function
    of the seed and its Place. A second thread reads and tokenizes the next window. `order` is the pattern:
    each window is ordered in the same way, with its own rows and seed.
    """

    def __init__(
        self,
        stream: RowStream,
        order: StepOrder,
        shape: BatchShape,
        pad_id: int,
        total_steps: int,
        place: Place,
    ):
        self.stream = stream
        self._first_order = order
        self._windows = stream.windows(place.turn, place.row)
        self._next_window: Future = in_background(next, self._windows)
        self._open_window(place.first_step)
        super().__init__(self.rows, self.order, shape, pad_id, total_steps)

    def make(self, step: int) -> StepData:
        while step - self.place.first_step >= self.order.steps_in(0):
            self._open_window(self.place.first_step + self.order.steps_in(0))
        data = super().make(step - self.place.first_step)
        data.epochs, data.place = float(self.place.turn), asdict(self.place)
        return data

    def _open_window(self, first_step: int) -> None:
        """Switch to the next window, used from `first_step` on. Waits until it is tokenized."""
        window: Window = self._next_window.result()
        self._next_window = in_background(next, self._windows)
        seed = (*self._first_order.seed, window.turn, window.row)
        self.rows = window.rows
        self.order = self._first_order.for_rows(window.rows.lengths, window.rows.source_ids, seed)
        self.place = Place(window.turn, window.row, first_step)


def make_loader(
    rows: TokenizedRows,
    order: StepOrder,
    shape: BatchShape,
    pad_id: int,
    total_steps: int,
    stream: RowStream | None = None,
    place: dict | None = None,
) -> StepLoader:
    """The loader of a run of `total_steps` steps. A stream starts at a checkpoint's `place` if given one."""
    if stream is None:
        return StepLoader(rows, order, shape, pad_id, total_steps)
    return StreamLoader(stream, order, shape, pad_id, total_steps, Place(**(place or {})))


def make_step(rows: TokenizedRows, order: StepOrder, shape: BatchShape, pad_id: int, step: int) -> StepData:
    """The data of step `step` of an order over `rows`.

    Each rank makes all micro-batches, which costs little, and so knows the targets of the others. Of every
    `ranks.count()` consecutive ones it keeps one; empty packs complete the last of them.
    """
    packs = order.packs(step)
    batches = micro_batches(
        rows, packs, shape.packs, pad_id, order.pack_length, shape.starts, shape.packs * ranks.count()
    )
    targets = sum(len(batch["target_ids"]) for batch in batches)
    tokens = sum(int(order.lengths[pack].sum()) for pack in packs)
    own = {number: batches[number] for number in range(ranks.number(), len(batches), ranks.count())}
    if torch.cuda.is_available():  # page-locked memory, or the copy to the GPU makes the host wait
        for batch in own.values():
            batch.update({name: tensor.pin_memory() for name, tensor in batch.items()})
    return StepData(own, targets, tokens, order.epochs_at(step + 1))


def in_background(call: Callable, *arguments) -> Future:
    """Call in a daemon thread: one stalled in a network read must not keep the process alive."""
    future = Future()
    Thread(target=_fulfil, args=(future, call, arguments), daemon=True).start()
    return future


def _fulfil(future: Future, call: Callable, arguments: tuple) -> None:
    try:
        future.set_result(call(*arguments))
    except BaseException as error:  # whatever it is: raised again where the result is asked for
        future.set_exception(error)
