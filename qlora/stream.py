"""Rows that are read and tokenized while training, a window at a time: no preparation, nothing is stored."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice

from qlora.data import WINDOW_ROWS, Step, StepLoader, StepOrder
from qlora.errors import InputError
from qlora.rows import LocatedRow, RowSource
from qlora.tokens import TokenizedRows


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
    for training, `order` makes the StepOrder of (lengths, seed=...).
    """

    def __init__(
        self,
        source: RowSource,
        tokenize: Callable[[list[LocatedRow]], TokenizedRows],
        order: Callable[..., StepOrder],
        seed: int,
        batch_size: int,
        pad_id: int,
        last_step: int,
        place: Place,
    ):
        super().__init__(None, None, batch_size, pad_id, last_step)
        self.source, self.tokenize, self.make_order, self.seed = source, tokenize, order, seed
        self.windows = self._windows(place.turn, place.row)
        self.reader = ThreadPoolExecutor(1)
        self.coming = self.reader.submit(next, self.windows)
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
        self.coming = self.reader.submit(next, self.windows)
        self.place = Place(turn, row, first_step)
        self.order = self.make_order(self.rows.lengths, seed=(self.seed, turn, row))

    def _windows(self, turn: int, row: int) -> Iterator[tuple[TokenizedRows, int, int]]:
        """(rows, turn, row) of each window that has a usable row, from there on without end."""
        while True:
            reading, was_used = islice(iter(self.source), row, None), row > 0
            while window := list(islice(reading, WINDOW_ROWS)):
                rows = self.tokenize(window)
                if len(rows):
                    was_used = True
                    yield rows, turn, row
                row += len(window)
            if not was_used:
                raise InputError(f"no row of {self.source} can be used")
            turn, row = turn + 1, 0
