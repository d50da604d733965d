"""Rows to batches: tokenize, mask, truncate, count, order, pad."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice

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
from qlora.rows import LocatedRow, read_rows

SAMPLE_ROWS = 100  # rows that decide the format
PAD_MULTIPLE = 8  # tensor cores like dimensions that are multiples of 8
GROUP_STEPS = 50  # group_by_length sorts within this many steps, so that the order stays mostly random


def load_data(config, tokenizer, model_config) -> tuple["TokenizedRows", "TokenizedRows | None"]:
    """Training and validation rows of a TrainConfig, tokenized and checked against the model's limits.

    Raises InputError for whatever is wrong with them.
    """
    max_length = config.max_length
    context = getattr(model_config, "max_position_embeddings", None)
    if context is not None:
        context -= context % PAD_MULTIPLE  # batches are padded to that, and positions may be learned
        if max_length > context:
            print(f"--max_length {max_length} is more than the model's context: {context} is used.")
            max_length = context
    tokenize = partial(
        tokenize_rows, tokenizer=tokenizer, text_field=config.dataset_text_field, max_length=max_length,
        completion_only_loss=config.completion_only_loss,
    )  # fmt: skip
    rows = read_rows(config.dataset, config.split, config.dataset_config)
    train_rows = tokenize(rows, row_format=config.dataset_format, name=config.dataset)
    validation_rows = None
    if config.held_out is not None:
        train_rows, validation_rows = hold_out(train_rows, config.held_out, config.seed)
    elif config.validation_split or config.validation_dataset:
        dataset, split = config.validation_dataset or config.dataset, config.validation_split or "train"
        rows = read_rows(dataset, split, None if config.validation_dataset else config.dataset_config)
        validation_rows = tokenize(rows, row_format=train_rows.row_format, name=f"{dataset} ({split})")
    for rows in filter(None, (train_rows, validation_rows)):
        check_vocabulary(rows, model_config.vocab_size)
    return train_rows, validation_rows


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
        print("The tokenizer has no chat template: turns are written as ### Human: and ### Assistant:.")
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
