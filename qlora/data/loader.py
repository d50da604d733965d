"""What gives each optimizer step its batches: from prepared rows, or from a stream, window by window."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from threading import Thread

import torch
from tqdm import tqdm

from qlora.data.batch import BatchShape, micro_batches
from qlora.data.order import StepOrder
from qlora.data.prepare import STREAM_WINDOW, check_vocabulary
from qlora.data.sources import LocatedRow, RowSource
from qlora.data.tokenize import TokenizedRows, tokenize_window
from qlora.errors import InputError


@dataclass
class Step:
    """What one optimizer step trains on."""

    batches: list[dict]  # collate()'s, in page-locked memory where there is a card
    tokens: int  # without padding
    epochs: float  # done when the step is
    place: dict | None = None  # with --streaming: a Place


class StepLoader:
    """Makes the batches of a step, ahead of it in a thread."""

    def __init__(self, rows: TokenizedRows, order: StepOrder, shape: BatchShape, pad_id: int, last_step: int):
        self.rows, self.order, self.shape, self.pad_id = rows, order, shape, pad_id
        self.last_step = last_step
        self.next = (None, None)  # the number of the step that is being made, and the Step to come

    def prepare(self, step: int) -> None:
        """Begin to make a step; the one before must have been taken, as make() runs once at a time."""
        if step < self.last_step:
            self.next = step, in_background(self.make, step)

    def take(self, step: int) -> Step:
        """A step, which is waited for if it is not ready."""
        if self.next[0] != step:
            self.prepare(step)
        return self.next[1].result()

    def make(self, step: int) -> Step:
        """The batches of a step."""
        order, packs = self.order, self.order.packs(step)
        batches = micro_batches(
            self.rows, packs, self.shape.packs, self.pad_id, order.pack_length, self.shape.starts,
            is_filled=True,
        )  # fmt: skip
        if torch.cuda.is_available():
            batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
        tokens = sum(int(order.lengths[pack].sum()) for pack in packs)
        return Step(batches, tokens, order.epochs_at(step + 1))


@dataclass(frozen=True)
class Place:
    """Where a window starts; a checkpoint keeps it, and a resume reads on from there."""

    turn: int = 0  # passes over the data before
    row: int = 0  # rows of this pass before
    first_step: int = 0  # the optimizer step that takes its first packs


class StreamLoader(StepLoader):
    """Steps from one window of rows after the other, pass after pass over `source`.

    Each window is a small epoch: shuffled, packed and cut into steps by itself, so that a step is a function
    of seed and Place. The next window is read and tokenized by a second thread. `tokenize` makes rows ready
    for training, `order` makes the StepOrder of (rows, seed=...).
    """

    def __init__(
        self,
        source: RowSource,
        tokenize: Callable[[list[LocatedRow]], TokenizedRows],
        order: Callable[..., StepOrder],
        seed: int,
        shape: BatchShape,
        pad_id: int,
        last_step: int,
        place: Place,
    ):
        super().__init__(None, None, shape, pad_id, last_step)
        self.source, self.tokenize, self.make_order, self.seed = source, tokenize, order, seed
        self.windows = self._windows(place.turn, place.row)
        self.coming = in_background(next, self.windows)
        self._open_next(place.first_step)

    def make(self, step: int) -> Step:
        """The batches of a step; the steps must come in order."""
        while step - self.place.first_step >= self.order.steps_in(0):
            self._open_next(self.place.first_step + self.order.steps_in(0))
        made = super().make(step - self.place.first_step)
        made.epochs, made.place = float(self.place.turn), asdict(self.place)
        return made

    def _open_next(self, first_step: int) -> None:
        self.rows, turn, row = self.coming.result()
        self.coming = in_background(next, self.windows)
        self.place = Place(turn, row, first_step)
        self.order = self.make_order(self.rows, seed=(self.seed, turn, row))

    def _windows(self, turn: int, row: int) -> Iterator[tuple[TokenizedRows, int, int]]:
        """(rows, turn, row) of each window that has a usable row, from there on without end."""
        while True:
            reading, was_used = islice(iter(self.source), row, None), row > 0
            while window := list(islice(reading, STREAM_WINDOW)):
                rows = self.tokenize(window)
                if rows.dropped:
                    tqdm.write(f"from {window[0][0]} on, dropped: {rows.describe_drops()}")
                if len(rows):
                    was_used = True
                    yield rows, turn, row
                row += len(window)
            if not was_used:
                raise InputError(f"no row of {self.source} can be used")
            turn, row = turn + 1, 0


def in_background(call: Callable, *arguments) -> Future:
    """The result to come of a call in a thread that does not keep the process alive."""
    future = Future()

    def run():
        try:
            future.set_result(call(*arguments))
        except BaseException as error:  # raised again by whoever asks for the result
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def make_order(
    config,
    pack_length: int | None,
    rows: TokenizedRows,
    most_rows: int | None = None,
    seed: int | tuple[int, ...] | None = None,
) -> StepOrder:
    """The order in which a TrainConfig takes rows; `seed` in place of its own."""
    return StepOrder(
        rows.lengths,
        config.per_device_train_batch_size * config.gradient_accumulation_steps,
        config.seed if seed is None else seed,
        config.group_by_length,
        pack_length,
        rows.sources,
        config.dataset_weights,
        most_rows,
    )


def make_loader(
    config,
    tokenizer,
    model_config,
    rows: TokenizedRows,
    order: StepOrder,
    shape: BatchShape,
    place: dict | None,
) -> tuple[StepLoader, int]:
    """The loader for a TrainConfig, and the number of steps; `place` is the one of the checkpoint, if any."""
    pad_id = tokenizer.eos_token_id
    if not config.streaming:
        total_steps = config.max_steps if config.max_steps > 0 else order.steps_until(config.num_train_epochs)
        return StepLoader(rows, order, shape, pad_id, total_steps), total_steps

    def tokenize(window: list[LocatedRow]) -> TokenizedRows:
        found = tokenize_window(
            window, tokenizer, row_format=rows.row_format, text_field=config.dataset_text_field,
            completion_only_loss=config.completion_only_loss,
        ).cut(rows.max_length)  # fmt: skip
        check_vocabulary(found, model_config.vocab_size)
        return found

    source = RowSource(config.dataset[0], config.split, config.dataset_config, streaming=True)
    place = Place(**(place or {}))
    make = partial(make_order, config, order.pack_length, most_rows=order.most_rows)
    loader = StreamLoader(source, tokenize, make, config.seed, shape, pad_id, config.max_steps, place)
    return loader, config.max_steps
