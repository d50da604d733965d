"""Rows to batches: read, tokenize, mask, truncate, count, order, pad."""

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, dropwhile, islice
from pathlib import Path

import numpy as np
import torch

from qlora.errors import InputError
from qlora.prompts import (
    FALLBACK_CHAT_TEMPLATE,
    IGNORE_INDEX,
    DropRow,
    Segment,
    detect_format,
    encode,
    required_columns,
    row_segments,
    starts_with_bos,
)

OTHER_SPLITS = ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev")
SAMPLE_ROWS = 100  # rows that decide the format
PAD_MULTIPLE = 8  # tensor cores like dimensions that are multiples of 8
GROUP_STEPS = 50  # group_by_length sorts within this many steps, so that the order stays mostly random

LocatedRow = tuple[str, dict]  # ("rows.jsonl line 12", {column: value})


# ---------------------------------------------------------------- reading


def read_rows(dataset: str, split: str, config_name: str | None = None) -> Iterator[LocatedRow]:
    """Yield (location, row) from a file, a folder of files, or a hub data set.

    `split` is a split's name with an optional slice in rows or percent: train, train[:1000], train[90%:].
    Raises InputError, naming the file and line, for what cannot be read.
    """
    name, start, stop = parse_split(split)
    path = Path(dataset)
    if path.is_file():
        files = [path]
        if path.suffix.lower() not in READERS:
            raise InputError(f"{path} is none of {', '.join(READERS)}")
        if name != "train":
            raise InputError(
                f"{path} is a single file: it has the split 'train' (or a slice of it), not '{split}'"
            )
    elif path.is_dir():
        files = _files_of_split(path, name)
    elif path.suffix.lower() in READERS or dataset.startswith((".", "/", "~")):
        raise InputError(f"no such data file or folder: {dataset}")
    else:
        yield from _hub_rows(dataset, split, config_name)
        return

    def rows():
        return chain.from_iterable(READERS[file.suffix.lower()](file) for file in files)

    if any(isinstance(bound, str) or (bound is not None and bound < 0) for bound in (start, stop)):
        start, stop = _absolute_slice(start, stop, sum(1 for _ in rows()))
    found = False
    for row in islice(rows(), start, stop):
        found = True
        yield row
    if not found:
        raise InputError(f"{dataset} has no rows" + (f" in {split}" if split != "train" else ""))


def parse_split(split: str) -> tuple[str, int | str | None, int | str | None]:
    """'train[10%:500]' -> ('train', '10%', 500); raises InputError."""
    match = re.fullmatch(r"(\w[\w.-]*)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise InputError(
            f"cannot read the split '{split}': expected a name with an optional slice, as in train[:90%]"
        )
    name, *bounds = match.groups()
    return name, *(bound if bound is None or bound.endswith("%") else int(bound) for bound in bounds)


def _absolute_slice(start, stop, rows: int) -> tuple[int, int]:
    """Percentages and negative bounds as row numbers, rounded as `datasets` rounds them."""
    bounds = [
        round(int(bound[:-1]) * rows / 100) if isinstance(bound, str) else bound for bound in (start, stop)
    ]
    return slice(*bounds).indices(rows)[:2]


def _files_of_split(folder: Path, name: str) -> list[Path]:
    """A folder's data files that name the split; for train, if there are none, those that name no other."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in READERS and path.is_file())

    def named(split: str) -> list[Path]:
        word = re.compile(rf"(?<![a-z0-9]){re.escape(split.lower())}(?![a-z0-9])")
        return [file for file in files if word.search(str(file.relative_to(folder)).lower())]

    chosen = named(name)
    if not chosen and name == "train":
        others = {file for split in OTHER_SPLITS for file in named(split)}
        chosen = [file for file in files if file not in others]
    if not chosen:
        raise InputError(f"{folder} has no {', '.join(READERS)} file" + f" of split '{name}'" * bool(files))
    return chosen


def _hub_rows(dataset: str, split: str, config_name: str | None) -> Iterator[LocatedRow]:
    import datasets  # slow to import, and not needed for local files

    try:
        rows = datasets.load_dataset(dataset, config_name, split=split)
    except Exception as error:  # the hub client raises dozens of types; all mean the same to the user
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"cannot load the data set '{dataset}' ({split}): it is no file or folder here, and the hub "
            f"says: {reason[0][:300]} - check the name, the network and `hf auth login`, or give a local file"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{dataset} row {number}", row


def _read_jsonl(path: Path) -> Iterator[LocatedRow]:
    with _open(path) as file:
        for number, line in enumerate(_decoded_lines(file, path), start=1):
            if line.strip():
                where = f"{path} line {number}"
                yield where, _json_object(line, where)


def _read_json(path: Path) -> Iterator[LocatedRow]:
    """A list of objects, an object that holds such a list under "data", or json lines."""
    with _open(path) as file:
        text = "".join(_decoded_lines(file, path))
    if not text.strip():
        return
    try:
        content = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        first_line = text.lstrip().splitlines()[0]
        if first_line.startswith("{") and first_line.rstrip().endswith("}"):  # json lines under another name
            yield from _read_jsonl(path)
            return
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{path}{line} is not valid JSON: {getattr(error, 'msg', error)}") from error
    if isinstance(content, dict):
        content = content["data"] if isinstance(content.get("data"), list) else [content]
    if not isinstance(content, list):
        raise InputError(f"{path} is not a list of objects")
    for number, row in enumerate(content, start=1):
        where = f"{path} row {number}"
        yield where, _check_object(row, where)


def _read_csv(path: Path) -> Iterator[LocatedRow]:
    csv.field_size_limit(sys.maxsize)
    number = 0

    def lines():
        nonlocal number
        for line in _decoded_lines(file, path):
            number += 1
            yield line

    with _open(path) as file:
        try:
            for row in csv.DictReader(dropwhile(str.isspace, lines()), strict=True):
                if None in row:
                    raise InputError(f"{path} line {number} has more fields than the header has columns")
                yield f"{path} line {number}", row
        except csv.Error as error:
            raise InputError(f"{path} line {number} is not valid CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[LocatedRow]:
    import pyarrow.parquet  # comes with datasets

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _read_txt(path: Path) -> Iterator[LocatedRow]:
    with _open(path) as file:
        for number, line in enumerate(_decoded_lines(file, path), start=1):
            if line.strip():
                yield f"{path} line {number}", {"text": line.rstrip("\r\n")}


READERS = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def _open(path: Path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _decoded_lines(file, path: Path) -> Iterator[str]:
    """Lines of a binary file as text, without a byte-order mark; raises InputError for one not UTF-8."""
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} line {number} is not UTF-8 (byte {error.start + 1}): convert the file to UTF-8"
            ) from error


def _json_object(text: str, where: str) -> dict:
    try:
        row = json.loads(text, strict=False)  # strict would refuse control characters such as NUL
    except (ValueError, RecursionError) as error:  # also for endless numbers and nesting
        raise InputError(f"{where} is not valid JSON: {error}") from error
    return _check_object(row, where)


def _check_object(row, where: str) -> dict:
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object with named columns")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds a lone surrogate (half of a character, \\ud800 to \\udfff)"
        ) from error
    return row


# ---------------------------------------------------------------- tokenizing


@dataclass
class TokenizedRows:
    """Tokenized rows end to end in two flat int32 tensors; row i is [offsets[i], offsets[i + 1])."""

    input_ids: torch.Tensor
    labels: torch.Tensor  # the ids, IGNORE_INDEX where the loss does not count; not shifted
    offsets: list[int]
    row_format: str
    rows_read: int = 0
    dropped: Counter = field(default_factory=Counter)  # reason -> rows
    first_dropped: dict = field(default_factory=dict)  # reason -> location of the first such row
    is_cut: list[bool] = field(default_factory=list)  # a row: cut at max_length, its EOS lost

    def __post_init__(self):
        self.is_cut = self.is_cut or [False] * len(self)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.input_ids[span], self.labels[span]

    @property
    def lengths(self) -> list[int]:
        return np.diff(self.offsets).tolist()

    @property
    def truncated(self) -> int:
        return sum(self.is_cut)

    @property
    def targets(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())

    def subset(self, indices: list[int]) -> "TokenizedRows":
        """The chosen rows, copied; the counts of reading stay with the original."""
        rows = [self[index] for index in indices]
        offsets = np.cumsum([0] + [len(ids) for ids, _ in rows]).tolist()
        input_ids, labels = (torch.cat(column) for column in zip(*rows))
        is_cut = [self.is_cut[index] for index in indices]
        return TokenizedRows(input_ids, labels, offsets, self.row_format, is_cut=is_cut)

    def describe(self) -> str:
        """One line: rows read = used + dropped by reason; tokens, targets, truncation."""
        text = f"{self.rows_read:,} rows read = {len(self):,} used + {self.dropped.total():,} dropped"
        if self.dropped:
            text += f" ({describe_drops(self)})"
        text += f"; {len(self.input_ids):,} tokens, {self.targets:,} trained; format {self.row_format}"
        if self.truncated:
            text += f"; {self.truncated:,} answers cut at --max_length, without EOS"
        return text


def describe_drops(rows: TokenizedRows) -> str:
    return ", ".join(
        f"{count:,} {reason}, first: {rows.first_dropped[reason]}"
        for reason, count in rows.dropped.most_common()
    )


def tokenize_rows(
    located_rows: Iterable[LocatedRow],
    tokenizer,
    row_format: str = "auto",
    text_field: str = "text",
    max_length: int = 512,
    completion_only_loss: bool = True,
    name: str = "the data",
) -> TokenizedRows:
    """Tokenize every usable row and count the others by reason.

    Every row gets at most one BOS and ends in a trained EOS. A row longer than `max_length` is cut at its end
    (the EOS goes: an unfinished answer must not learn to stop); if no target is left, it is dropped. Raises
    InputError if the format is not recognised, a needed column is absent everywhere, or no row is left. A
    tokenizer without a chat template is given one if the rows are messages.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-sequence token, so no answer could learn to stop")
    located_rows = iter(located_rows)
    sample = list(islice(located_rows, SAMPLE_ROWS))
    row_format = _checked_format([row for _, row in sample], row_format, text_field, name)
    if row_format == "messages" and tokenizer.chat_template is None:
        tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE  # saved with the adapter's tokenizer
    adds_bos = starts_with_bos(row_format, tokenizer)
    input_ids, labels, offsets = _IntBuffer(), _IntBuffer(), [0]
    result = TokenizedRows(None, None, offsets, row_format)
    for where, row in chain(sample, located_rows):
        result.rows_read += 1
        try:
            segments = row_segments(row, row_format, text_field, tokenizer)
            row_ids, row_labels = tokenize_segments(segments, adds_bos, completion_only_loss, tokenizer)
            is_cut = len(row_ids) > max_length
            row_ids, row_labels = row_ids[:max_length], row_labels[:max_length]
            if all(label == IGNORE_INDEX for label in row_labels):
                raise DropRow("prompt fills --max_length")
        except DropRow as reason:
            result.dropped[str(reason)] += 1
            result.first_dropped.setdefault(str(reason), where)
            continue
        result.is_cut.append(is_cut)
        input_ids.extend(row_ids)
        labels.extend(row_labels)
        offsets.append(len(input_ids))
    if not len(result):
        raise InputError(f"no row of {name} can be used: {describe_drops(result)}")
    result.input_ids, result.labels = input_ids.tensor(), labels.tensor()
    return result


def tokenize_segments(
    segments: list[Segment], adds_bos: bool, completion_only_loss: bool, tokenizer
) -> tuple[list[int], list[int]]:
    """Segments of a whole row to (input_ids, labels) that end in a trained EOS. Raises DropRow.

    The first token has nothing before it to be predicted from, so it is never a target.
    """
    if not completion_only_loss:
        segments = [(text, True) for text, _ in segments]
    last, _ = segments[-1]
    if last.rstrip().endswith(tokenizer.eos_token):  # nothing is trained after EOS
        segments = [*segments[:-1], (last.rstrip(), True)]
    input_ids, labels = encode(segments, adds_bos, tokenizer)
    if len(segments) == 1 and len(input_ids) - input_ids.count(tokenizer.bos_token_id) <= 1:
        raise DropRow("one token")
    if input_ids[-1] != tokenizer.eos_token_id:
        input_ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    labels[0] = IGNORE_INDEX
    return input_ids, labels


class _IntBuffer:
    """Grows like a list at 4 bytes a number."""

    def __init__(self):
        self.chunks, self.length = [], 0

    def __len__(self) -> int:
        return self.length

    def extend(self, values: list[int]) -> None:
        self.chunks.append(np.asarray(values, dtype=np.int32))
        self.length += len(values)

    def tensor(self) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(self.chunks))


def _checked_format(sample: list[dict], row_format: str, text_field: str, name: str) -> str:
    columns = sorted(set().union(*sample))
    if row_format == "auto":
        detected = detect_format(sample, text_field)
        if detected is None:
            raise InputError(
                f"{name} has the columns {columns}, which is no known format: '{text_field}', "
                "'instruction' and 'output', 'prompt' and 'completion', 'messages' or 'conversations'"
            )
        return detected
    needed = required_columns(row_format, text_field)
    missing = sorted(needed - set(columns))
    if missing and (row_format != "messages" or len(missing) == len(needed)):
        raise InputError(
            f"{name} has no column {missing[0]!r}, which format {row_format} needs; it has {columns}"
        )
    return row_format


def check_vocabulary(rows: TokenizedRows, vocab_size: int) -> None:
    """Raise InputError if a token id has no embedding in a model of `vocab_size` tokens."""
    largest = int(rows.input_ids.max())
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer gives token id {largest}, but the model has only {vocab_size} tokens: "
            "they do not belong together"
        )


def hold_out(rows: TokenizedRows, amount: float, seed: int) -> tuple[TokenizedRows, TokenizedRows]:
    """Split rows at random into (training, validation); `amount`: below 1 a share, else a number of rows."""
    count = round(amount * len(rows)) if amount < 1 else int(amount)
    if not 1 <= count < len(rows):
        raise InputError(
            f"--validation_split {amount:g} asks for {count} validation rows of the {len(rows)} there are"
        )
    order = np.random.default_rng([seed, 2**32 - 1]).permutation(len(rows)).tolist()
    training, validation = rows.subset(sorted(order[count:])), rows.subset(sorted(order[:count]))
    training.rows_read, training.dropped = rows.rows_read - count, rows.dropped
    training.first_dropped = rows.first_dropped
    validation.rows_read = count
    return training, validation


# ---------------------------------------------------------------- order and batches


class StepOrder:
    """Which rows each optimizer step takes: a pure function of (seed, epoch, step), whatever the micro-batch
    size.

    Each epoch is one permutation of the rows, cut into steps of `rows_per_step`; the last step of an epoch
    takes what is left, so no row is lost and none is seen twice.
    """

    def __init__(self, lengths: list[int], rows_per_step: int, seed: int, group_by_length: bool = False):
        self.lengths = np.asarray(lengths)
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.group_by_length = group_by_length
        self.steps_per_epoch = -(-len(lengths) // rows_per_step)
        self._epoch, self._steps = None, []

    def rows(self, step: int) -> list[int]:
        """Row indices of optimizer step `step` (from 0), longest first: neighbours then pad each other less.

        The order inside a step cannot change its gradient, which is a sum over all its targets.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._cut(epoch)
        chosen = self._steps[position]
        return chosen[np.argsort(-self.lengths[chosen], kind="stable")].tolist()

    def _cut(self, epoch: int) -> list[np.ndarray]:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.lengths))
        cuts = range(self.rows_per_step, len(order), self.rows_per_step)
        if not self.group_by_length:
            return np.split(order, cuts)
        groups = np.split(
            order, range(GROUP_STEPS * self.rows_per_step, len(order), GROUP_STEPS * self.rows_per_step)
        )
        order = np.concatenate([group[np.argsort(-self.lengths[group], kind="stable")] for group in groups])
        *full, last = np.split(order, cuts)
        generator.shuffle(full)
        return [*full, last]


def micro_batches(rows: TokenizedRows, indices: list[int], batch_size: int, pad_id: int) -> list[dict]:
    """The rows of one step as padded batches of at most `batch_size` rows, in the order given."""
    return [
        collate([rows[index] for index in indices[start : start + batch_size]], pad_id)
        for start in range(0, len(indices), batch_size)
    ]


def collate(rows: list[tuple[torch.Tensor, torch.Tensor]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right into one batch.

    Returns input_ids (rows, length) and, for the n targets of the batch, target_ids (n,) and target_index
    (n,): the hidden state at flat position target_index[i] of (rows * length) predicts target_ids[i]. No
    attention mask is needed: under causal attention no token sees the padding to its right, and padding
    predicts nothing.
    """
    length = -(-max(len(ids) for ids, _ in rows) // PAD_MULTIPLE) * PAD_MULTIPLE
    input_ids = torch.full((len(rows), length), pad_id)
    labels = torch.full((len(rows), length), IGNORE_INDEX)
    for position, (row_ids, row_labels) in enumerate(rows):
        input_ids[position, : len(row_ids)] = row_ids
        labels[position, : len(row_labels)] = row_labels
    next_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    target_index = (next_labels != IGNORE_INDEX).nonzero().squeeze(1)
    return {"input_ids": input_ids, "target_index": target_index, "target_ids": next_labels[target_index]}


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy a batch to the device; from pinned memory, so that the copy waits for nothing."""
    if device.type == "cuda":
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
    return batch
