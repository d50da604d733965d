"""Streaming: rows from a source too large to prepare, read and tokenized a window at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from tqdm import tqdm

from qlora.data.formatting import Formatting
from qlora.data.sources import RowSource
from qlora.data.tokenize import tokenize_window
from qlora.data.tokenized import TokenizedRows, check_vocabulary
from qlora.errors import InputError

STREAM_WINDOW = 10_000  # rows read and tokenized at a time


@dataclass(frozen=True)
class Window:
    """Consecutive rows of a stream, and where they start."""

    rows: TokenizedRows
    turn: int  # passes over the source before this one
    row: int  # rows of this pass before the window


@dataclass(frozen=True)
class RowStream:
    """The rows of a source pass after pass, without end, each window tokenized in the same way."""

    source: RowSource
    tokenizer: object
    formatting: Formatting  # its format is not auto
    max_length: int
    vocab_size: int
    window_rows: int = STREAM_WINDOW

    def windows(self, turn: int = 0, row: int = 0) -> Iterator[Window]:
        """Windows with at least one usable row, from row `row` of pass `turn` on.

        Raises InputError for what cannot be read, or if a whole pass has no usable row.
        """
        seen_notes = set()
        while True:
            located_rows, is_any_used = islice(self.source, row, None), row > 0
            while window := list(islice(located_rows, self.window_rows)):
                rows = tokenize_window(window, self.tokenizer, self.formatting).cut(self.max_length)
                check_vocabulary(rows, self.vocab_size)
                if new_notes := [note for note in rows.notes if note not in seen_notes]:
                    seen_notes.update(new_notes)
                    tqdm.write(f"from {window[0][0]} on: {'; '.join(new_notes)}")
                if rows.dropped:
                    tqdm.write(f"from {window[0][0]} on, dropped: {rows.describe_drops()}")
                if len(rows):
                    is_any_used = True
                    yield Window(rows, turn, row)
                row += len(window)
            if not is_any_used:
                raise InputError(f"no row of {self.source} can be used")
            turn, row = turn + 1, 0
