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


@dataclass(frozen=True)
class HeldOut:
    """The rows that a training held out for validation: for each of its datasets, their `row_hash`."""

    amount: float  # --validation_split: below 1 a share, else a number of rows
    hashes: list[np.ndarray]  # each (rows,) int64, sorted, without repetitions


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
    held_out: "HeldOut | None" = None  # the rows that hold_out() has taken away
    files: list[str] = field(default_factory=list)  # which files of each folder were read, in words
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
            dropped=Counter(), first_dropped={}, lost_lengths=np.zeros(0, int), files=[],
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
        return describe_drops(self.dropped, self.first_dropped)


def describe_drops(dropped: dict[str, int], first_dropped: dict[str, str]) -> str:
    """How many rows were dropped for each reason, the most frequent first, and where the first of them is."""
    return ", ".join(
        f"{count:,} {reason}, first: {first_dropped[reason]}"
        for reason, count in Counter(dropped).most_common()
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
        files=[line for part in parts for line in part.files],
        storage=[part.storage for part in parts],
    )


def count_dropped(table: Dataset, is_counted: np.ndarray) -> tuple[Counter, dict]:
    """(reason -> number of rows, reason -> location of the first) of the chosen rows of a table of TOKENS."""
    dropped, first_dropped = Counter(), {}
    for row in table.select(np.flatnonzero(is_counted)).select_columns(["where", "dropped"]):
        dropped[row["dropped"]] += 1
        first_dropped.setdefault(row["dropped"], row["where"])
    return dropped, first_dropped


# ---------------------------------------------------------------- held-out rows


def hold_out(rows: TokenizedRows, amount: float, seed: int) -> tuple[TokenizedRows, TokenizedRows]:
    """Split rows into (training, validation), each in the original order.

    Each row has a random number in [0, 2^64) that depends on the seed and its content alone. A share (an
    `amount` below 1) holds out the rows whose number is below that share of 2^64: no other row can move a row
    to the other side. A number of rows holds out those with the smallest numbers. Equal rows stay together,
    so it may be exceeded. Rows that were dropped before stay in the training part's counts. Raises
    InputError if one part would be empty.
    """
    numbers = _random_numbers(rows.column("row_hash"), seed)
    if amount < 1:
        is_held_out = numbers < np.uint64(int(amount * 2**64))
    else:
        smallest = np.sort(numbers)[: int(amount)]
        is_held_out = numbers <= smallest[-1]
    count = int(is_held_out.sum())
    if not 1 <= count < len(rows):
        remedy = "give a number of rows" if amount < 1 else "give fewer"
        raise InputError(
            f"--validation_split {amount:g} holds out {count} of {len(rows)} rows, but training and "
            f"validation need at least one each: {remedy}"
        )
    held_out = HeldOut(amount, [
        np.unique(rows.column("row_hash")[is_held_out & (rows.source_ids == source)])
        for source in range(rows.source_ids.max() + 1)
    ])  # fmt: skip
    counts = {name: getattr(rows, name) for name in ("dropped", "first_dropped", "lost_lengths", "files")}
    return (
        replace(
            rows.subset(np.flatnonzero(~is_held_out)), rows_read=rows.rows_read - count, held_out=held_out,
            **counts,
        ),
        replace(rows.subset(np.flatnonzero(is_held_out)), rows_read=count),
    )  # fmt: skip


def _random_numbers(hashes: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64 (Steele et al., OOPSLA 2014) of each hash, (rows,) int64 -> (rows,) uint64.

    Without an adapter's record, the split of an earlier training is repeated with it: it must never change.
    """
    numbers = hashes.view(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def find_held_out(rows: TokenizedRows, hashes: list[np.ndarray], name: str) -> TokenizedRows:
    """The rows that a training held out, among all `rows` of a dataset: found by content, whatever is new.

    `hashes` are HeldOut.hashes. Only dropped rows that were held out stay in the counts. Raises InputError
    unless all rows that were held out of one of the training's datasets are there, usable or not; `name` is
    the dataset's in the message.
    """
    table_hashes = rows.table.data.column("row_hash").to_numpy()
    found = [int(np.isin(part, table_hashes).sum()) for part in hashes]
    if not any(found):
        raise InputError(
            f"--validation_split: {name} has none of the {sum(map(len, hashes)):,} rows that the training "
            "held out: this is a different dataset"
        )
    complete = [part for part, count in zip(hashes, found) if count == len(part)]
    if not any(map(len, complete)):
        best = max(range(len(hashes)), key=lambda part: found[part] / max(1, len(hashes[part])))
        raise InputError(
            f"--validation_split: {name} has only {found[best]:,} of the {len(hashes[best]):,} rows that the "
            "training held out: it has changed since, or --split leaves some of them out"
        )
    is_held_out = np.isin(table_hashes, np.concatenate(complete))
    is_usable = rows.table.data.column("dropped").is_null().to_numpy()
    dropped, first_dropped = count_dropped(rows.table, is_held_out & ~is_usable)
    chosen = rows.subset(np.flatnonzero(is_held_out[rows.indices]))
    read = len(chosen) + dropped.total()
    return replace(chosen, rows_read=read, dropped=dropped, first_dropped=first_dropped)


def check_vocabulary(rows: TokenizedRows, vocab_size: int) -> None:
    """Raise InputError if a token id has no embedding in a model of `vocab_size` tokens."""
    check_token_id(int(rows.column("largest_id").max(initial=0)), vocab_size)


def check_token_id(largest: int, vocab_size: float) -> None:
    """check_vocabulary() for the largest of some token ids."""
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer produces token id {largest}, but the model has only {vocab_size} tokens: "
            "this tokenizer does not belong to this model"
        )
