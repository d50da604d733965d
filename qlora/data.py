"""Tokenized rows to batches: load and check, choose the length, order, pack, pad."""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import torch

from qlora.adapter import check_adapter
from qlora.errors import InputError
from qlora.model import load_config, load_tokenizer
from qlora.packing import most_rows_in_a_pack, pack_rows
from qlora.prompts import IGNORE_INDEX
from qlora.rows import RowSource
from qlora.tokens import TokenizedRows, hold_out, mix, tokenize_rows

PAD_MULTIPLE = 8  # tensor cores like dimensions that are multiples of 8
WINDOW_ROWS = 10_000  # rows of a stream that are read and tokenized at a time
GROUP_STEPS = 50  # group_by_length sorts within this many steps, so that the order stays mostly random


def load_data(config) -> tuple:
    """(tokenizer, the model's configuration, training rows, validation rows or None) of a TrainConfig.

    The rows are tokenized and checked against the model's limits. With --streaming the training rows are the
    first window of the stream. Raises InputError for whatever is wrong with any of them.
    """
    if config.adapter:
        check_adapter(config.adapter)
    tokenizer = load_tokenizer(config.model, config.adapter, config.trust_remote_code)
    model_config = load_config(config.model, config.trust_remote_code).get_text_config()
    settings = {"text_field": config.dataset_text_field, "completion_only_loss": config.completion_only_loss}
    tokenize = partial(tokenize_source, tokenizer, **settings)
    sources = [RowSource(dataset, config.split, config.dataset_config) for dataset in config.dataset]
    if config.streaming:
        (source,) = sources
        sample = list(islice(replace(source, streaming=True), WINDOW_ROWS))
        train_rows = tokenize_rows(sample, tokenizer, config.dataset_format, name=str(source), **settings)
    else:
        parts = [tokenize(config.dataset_format, source) for source in sources]
        train_rows = mix(parts)
        if len({part.row_format for part in parts}) > 1:
            formats = ", ".join(part.row_format for part in parts)
            print(f"The data sets have the formats {formats}: generate.py will ask in the first.")
    max_length = choose_max_length(config.max_length, train_rows.whole_lengths, model_config)
    train_rows = cut_rows(train_rows, max_length, model_config.vocab_size)
    validation_rows = None
    if config.held_out is not None:
        train_rows, validation_rows = hold_out(train_rows, config.held_out, config.seed)
    elif config.validation_split or config.validation_dataset:
        sources = [
            RowSource(dataset, config.validation_split, config.dataset_config) for dataset in config.dataset
        ]
        if config.validation_dataset:
            sources = [RowSource(config.validation_dataset, config.validation_split or "train")]
        row_format = train_rows.row_format if len(sources) == 1 else config.dataset_format
        validation_rows = mix([tokenize(row_format, source) for source in sources])
        validation_rows = cut_rows(validation_rows, max_length, model_config.vocab_size)
    for number, dataset in enumerate(config.dataset):
        if config.dataset_weights and number not in train_rows.sources:
            raise InputError(f"--dataset_weights: no row of {dataset} is left to train on")
    return tokenizer, model_config, train_rows, validation_rows


def tokenize_source(
    tokenizer, row_format: str, source: RowSource, text_field: str, completion_only_loss: bool
) -> TokenizedRows:
    """The rows of a source, tokenized and cached; raises InputError if none can be used."""
    rows = tokenize_rows(
        source, tokenizer, row_format, name=str(source), content=source.content(), text_field=text_field,
        completion_only_loss=completion_only_loss,
    )  # fmt: skip
    if not len(rows):
        raise InputError(f"no row of {source} can be used: {rows.describe_drops()}")
    return rows


def cut_rows(rows: TokenizedRows, max_length: int, vocab_size: int) -> TokenizedRows:
    """The rows as a model sees them; raises InputError if none is left or the model lacks a token."""
    rows = rows.cut(max_length)
    if not len(rows):
        raise InputError(f"no row can be used: {rows.describe_drops()}")
    check_vocabulary(rows, vocab_size)
    return rows


def choose_max_length(wanted: str, lengths: np.ndarray, model_config) -> int:
    """Tokens of the longest row from --max_length: a number, a percentile of `lengths` (p90), or `max`.

    Percentiles and `max` are rounded up to a multiple of 64, and all are capped by the model's context.
    """
    if wanted.isdigit():
        max_length = int(wanted)
    else:
        percent = 100.0 if wanted == "max" else float(wanted[1:])
        longest = np.percentile(lengths, percent, method="inverted_cdf")  # an actual length
        max_length = math.ceil(longest / 64) * 64
    context = getattr(model_config, "max_position_embeddings", None)
    if context is None:
        return max_length
    context -= context % PAD_MULTIPLE  # batches are padded to that, and positions may be learned
    if max_length > context:
        print(f"--max_length {wanted} is more than the model's context: {context} is used.")
    return min(max_length, context)


def check_vocabulary(rows: TokenizedRows, vocab_size: int) -> None:
    """Raise InputError if a token id has no embedding in a model of `vocab_size` tokens."""
    largest = int(rows.column("largest_id").max(initial=0))
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer gives token id {largest}, but the model has only {vocab_size} tokens: "
            "they do not belong together"
        )


@dataclass(frozen=True)
class BatchShape:
    """The shape of a run's micro-batches; those of padded rows may be shorter."""

    packs: int
    length: int  # tokens of a pack, or of the longest row
    is_packed: bool
    starts: int  # entries of seq_starts; 0 if no pack has several rows


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


def micro_batches(
    rows: TokenizedRows,
    packs: list[list[int]],
    batch_size: int,
    pad_id: int,
    pack_length: int | None = None,
    starts: int = 0,
    is_filled: bool = False,
) -> list[dict]:
    """The packs of one step as batches of at most `batch_size` packs, in the order given.

    With `is_filled` the last batch is filled up with empty packs, so that shapes repeat.
    """
    found = iter(rows.fetch([index for pack in packs for index in pack]))
    filled = [[next(found) for _ in pack] for pack in packs]
    if is_filled:
        filled += [[] for _ in range(-len(filled) % batch_size)]
    return [
        collate(filled[start : start + batch_size], pad_id, pack_length, starts)
        for start in range(0, len(filled), batch_size)
    ]


def collate(
    packs: list[list[tuple[torch.Tensor, torch.Tensor]]],
    pad_id: int,
    pack_length: int | None = None,
    starts: int = 0,
) -> dict[str, torch.Tensor]:
    """One batch of packs of (input_ids, labels) rows, padded on the right to a multiple of PAD_MULTIPLE.

    Returns input_ids (packs, length) and, for the n targets of the batch, target_ids (n,) and target_index
    (n,): the hidden state at flat position target_index[i] of (packs * length) predicts target_ids[i]. No
    attention mask is needed: under causal attention no token sees the padding to its right, and padding
    predicts nothing.

    With `pack_length` all packs get that length, and two more tensors keep their rows apart: position_ids
    (packs, length), which start again at 0 with every row and with the padding, and seq_starts, the flat
    positions where they do, filled up with packs * length to at least `starts` entries: shapes repeat. With
    `starts` 0, and no pack of two rows, there are no seq_starts: again, nothing has to be kept apart.
    """
    length = pack_length or max(sum(len(ids) for ids, _ in pack) for pack in packs)
    length = -(-length // PAD_MULTIPLE) * PAD_MULTIPLE
    input_ids = torch.full((len(packs), length), pad_id)
    labels = torch.full((len(packs), length), IGNORE_INDEX)
    row_starts = []
    for number, pack in enumerate(packs):
        position = 0
        for row_ids, row_labels in pack:
            row_starts.append(number * length + position)
            input_ids[number, position : position + len(row_ids)] = row_ids
            labels[number, position : position + len(row_ids)] = row_labels
            position += len(row_ids)
        if position < length:
            row_starts.append(number * length + position)
    next_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    target_index = (next_labels != IGNORE_INDEX).nonzero().squeeze(1)
    batch = {"input_ids": input_ids, "target_index": target_index, "target_ids": next_labels[target_index]}
    if pack_length is None:
        return batch
    if not starts and max(map(len, packs)) <= 1:
        batch["position_ids"] = torch.arange(length).expand(len(packs), length).contiguous()
        return batch
    total = len(packs) * length
    row_starts = torch.tensor(row_starts, dtype=torch.int32)
    lengths = torch.diff(row_starts, append=torch.tensor([total], dtype=torch.int32))
    positions = torch.arange(total) - row_starts.repeat_interleave(lengths)
    batch["position_ids"] = positions.view(len(packs), length)
    batch["seq_starts"] = torch.full((max(starts, len(row_starts) + 1),), total, dtype=torch.int32)
    batch["seq_starts"][: len(row_starts)] = row_starts
    return batch


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy a batch to the device; from page-locked memory the copy waits for nothing."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
