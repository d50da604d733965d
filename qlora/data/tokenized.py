"""Tokenized rows as a view of a table: chosen rows, each cut at a length limit. No tokens are copied."""

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset

from qlora.data.formatting import Formatting
from qlora.data.segments import IGNORE_INDEX
from qlora.data.similarity import SIGNATURE_SIZE
from qlora.errors import InputError


@dataclass
class TokenizedRows:
    """Usable rows of a table with the columns TOKENS (tokenize.py), cut at `max_length` tokens (None: whole).

    Methods number the rows of the view from 0. The counts say what became of the rows that were read:
    rows_read = len(self) + dropped.total().
    """

    table: Dataset
    formatting: Formatting  # with the rows' own format
    indices: np.ndarray  # where each row of the view is in the table
    source_ids: np.ndarray  # which dataset each row comes from, from 0
    max_length: int | None = None
    rows_read: int = 0
    dropped: Counter = field(default_factory=Counter)  # reason -> number of rows
    first_dropped: dict = field(default_factory=dict)  # reason -> location of the first such row
    lost_lengths: np.ndarray = field(default_factory=partial(np.zeros, 0, int))  # of the rows cut() dropped
    chat_template: str | None = None  # asks as rows of guanaco and llama2 do (formats.turn_template)
    storage: object = None  # keeps the temporary folder of an uncached table alive

    @property
    def row_format(self) -> str:
        return self.formatting.row_format

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fetch([row])[0]

    def fetch(self, rows: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(input_ids, labels) of each of these rows, (length,) int32. Labels not trained are IGNORE_INDEX."""
        columns = self._token_columns[self.indices[rows]]
        pairs = []
        for ids, is_trained in zip(columns["input_ids"], columns["trained"]):
            ids, is_trained = ids[: self.max_length], is_trained[: self.max_length]
            pairs.append((torch.from_numpy(ids), torch.from_numpy(np.where(is_trained, ids, IGNORE_INDEX))))
        return pairs

    def column(self, name: str) -> np.ndarray:
        """A numeric column of the table, for the rows of this view."""
        return self.table.data.column(name).to_numpy()[self.indices]

    def location(self, row: int) -> str:
        """Where a row was read: 'rows.jsonl line 12'."""
        return self.table[int(self.indices[row])]["where"]

    @cached_property
    def full_lengths(self) -> np.ndarray:
        """Tokens of each row before it is cut."""
        chunks = self.table.data.column("input_ids").chunks
        return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks])[self.indices]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.minimum(self.full_lengths, self.max_length or self.full_lengths.max())

    @cached_property
    def is_cut(self) -> np.ndarray:
        """Which rows are cut at max_length."""
        return self.full_lengths > self.lengths

    @property
    def answers_cut(self) -> int:
        """Number of rows that are cut: the end of their answer, with its EOS, is missing."""
        return int(self.is_cut.sum())

    @cached_property
    def targets(self) -> int:
        """Trained tokens of all rows."""
        total = int(self.column("targets")[~self.is_cut].sum())
        trained_column = self.table.with_format("numpy", columns=["trained"])
        # For a cut row the table's count is too high. About 1,000 rows at a time, to bound memory.
        for rows in np.array_split(np.flatnonzero(self.is_cut), 1 + self.answers_cut // 1000):
            masks = trained_column[self.indices[rows]]["trained"] if len(rows) else []
            total += sum(int(mask[: self.max_length].sum()) for mask in masks)
        return total

    @property
    def signatures(self) -> np.ndarray:
        """(rows, SIGNATURE_SIZE) uint32: MinHash signatures (similarity.py) of the rows' whole text."""
        chunks = self.table.data.column("signature").chunks
        flat = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
        return flat.reshape(-1, SIGNATURE_SIZE)[self.indices]

    @cached_property
    def notes(self) -> dict[str, tuple[int, str]]:
        """note -> (how often, the first location), for all notes of formats.row_segments()."""
        lists = self.table.data.column("notes").combine_chunks().take(pa.array(self.indices))
        notes = lists.flatten().dictionary_encode()
        codes, first, counts = np.unique(notes.indices.to_numpy(), return_index=True, return_counts=True)
        rows = pc.list_parent_indices(lists).to_numpy()[first]
        texts = [notes.dictionary[int(code)].as_py() for code in codes]
        by_count = sorted(zip(texts, counts.tolist(), rows), key=lambda note: -note[1])
        return {text: (count, self.location(row)) for text, count, row in by_count}

    @cached_property
    def _token_columns(self) -> Dataset:
        return self.table.with_format("numpy", columns=["input_ids", "trained"])

    def subset(self, rows: np.ndarray) -> "TokenizedRows":
        """The chosen rows. The counts of what was read and dropped stay with the original."""
        return replace(
            self, indices=self.indices[rows], source_ids=self.source_ids[rows], rows_read=0,
            dropped=Counter(), first_dropped={}, lost_lengths=np.zeros(0, int),
        )  # fmt: skip

    def cut(self, max_length: int) -> "TokenizedRows":
        """These rows cut at `max_length` tokens. Rows left without a target are dropped and counted."""
        is_kept = self.column("first_target") < max_length
        dropped, first_dropped = Counter(self.dropped), dict(self.first_dropped)
        if not is_kept.all():
            reason = "prompt fills --max_length"
            dropped[reason] = int((~is_kept).sum())
            first_dropped[reason] = self.location(np.flatnonzero(~is_kept)[0])
        return replace(
            self, indices=self.indices[is_kept], source_ids=self.source_ids[is_kept], max_length=max_length,
            dropped=dropped, first_dropped=first_dropped, lost_lengths=self.full_lengths[~is_kept],
        )  # fmt: skip

    def describe(self) -> str:
        """One line: rows read = used + dropped, by reason; tokens, targets, answers cut."""
        text = f"{self.rows_read:,} rows read = {len(self):,} used + {self.dropped.total():,} dropped"
        if self.dropped:
            text += f" ({self.describe_drops()})"
        text += f"; {self.lengths.sum():,} tokens, {self.targets:,} trained; format {self.row_format}"
        if self.answers_cut:
            text += f"; {self.answers_cut:,} answers cut at --max_length, without EOS"
        return text

    def describe_drops(self) -> str:
        return ", ".join(
            f"{count:,} {reason}, first: {self.first_dropped[reason]}"
            for reason, count in self.dropped.most_common()
        )


def mix(parts: list[TokenizedRows]) -> TokenizedRows:
    """Several datasets as one; source_ids tell them apart. The formatting is that of the first."""
    offsets = np.cumsum([0] + [len(part.table) for part in parts])
    first_dropped = {}
    for part in reversed(parts):  # so that the location in the first dataset wins
        first_dropped |= part.first_dropped
    return TokenizedRows(
        table=datasets.concatenate_datasets([part.table for part in parts]),
        formatting=parts[0].formatting,
        indices=np.concatenate([part.indices + offset for part, offset in zip(parts, offsets)]),
        source_ids=np.concatenate([np.full(len(part), number) for number, part in enumerate(parts)]),
        rows_read=sum(part.rows_read for part in parts),
        dropped=sum((part.dropped for part in parts), Counter()),
        first_dropped=first_dropped,
        chat_template=parts[0].chat_template,
        storage=[part.storage for part in parts],
    )


def hold_out(rows: TokenizedRows, amount: float, seed: int) -> tuple[TokenizedRows, TokenizedRows]:
    """Split rows at random into (training, validation), each in the original order.

    `amount` is a share of the rows below 1, else a number of rows. Dropped rows stay in the training part's
    counts.
    """
    count = round(amount * len(rows)) if amount < 1 else int(amount)
    if not 1 <= count < len(rows):
        raise InputError(
            f"--validation_split {amount:g} asks for {count} validation rows, but there are {len(rows)} rows "
            "in all and training needs at least one"
        )
    shuffled = np.random.default_rng([seed, 2**32 - 1]).permutation(len(rows))
    validation, training = np.sort(shuffled[:count]), np.sort(shuffled[count:])
    counts = {"dropped": rows.dropped, "first_dropped": rows.first_dropped, "lost_lengths": rows.lost_lengths}
    return (
        replace(rows.subset(training), rows_read=rows.rows_read - count, **counts),
        replace(rows.subset(validation), rows_read=count),
    )


def check_vocabulary(rows: TokenizedRows, vocab_size: int) -> None:
    """Raise InputError if a token id has no embedding in a model of `vocab_size` tokens."""
    largest = int(rows.column("largest_id").max(initial=0))
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer produces token id {largest}, but the model has only {vocab_size} tokens: "
            "this tokenizer does not belong to this model"
        )
