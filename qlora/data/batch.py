"""Packs of rows to tensors: packed or padded micro-batches, on the CPU."""

from dataclasses import dataclass

import torch

from qlora.data.segments import IGNORE_INDEX
from qlora.data.tokenized import TokenizedRows

PAD_MULTIPLE = 8  # tensor cores like dimensions that are multiples of 8


@dataclass(frozen=True)
class BatchShape:
    """The shape of a run's micro-batches. Padded ones may be shorter."""

    packs: int
    length: int  # tokens in a pack, or in the longest row
    is_packed: bool
    starts: int  # entries of seq_starts; 0 if no pack has several rows

    @property
    def tokens(self) -> int:
        return self.packs * self.length


def micro_batches(
    rows: TokenizedRows,
    packs: list[list[int]],
    batch_size: int,
    pad_id: int,
    pack_length: int | None = None,
    starts: int = 0,
    multiple: int = 1,
) -> list[dict[str, torch.Tensor]]:
    """The packs of one step as batches of at most `batch_size` packs, in the order given.

    Empty packs bring the number of packs to a multiple of `multiple`: of `batch_size`, for example, so that
    every batch has the same shape.
    """
    pairs = iter(rows.fetch([row for pack in packs for row in pack]))  # one read for the whole step
    filled = [[next(pairs) for _ in pack] for pack in packs]
    filled += [[] for _ in range(-len(filled) % multiple)]
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

    With `pack_length` all packs have that length, and two more tensors keep their rows apart. position_ids
    (packs, length) restart at 0 with every row and with the padding. seq_starts are the flat positions where
    they restart, filled up with packs * length to at least `starts` entries so that the shape repeats. If
    `starts` is 0 and no pack has two rows there is nothing to keep apart, and no seq_starts.
    """
    longest = max(sum(len(ids) for ids, _ in pack) for pack in packs)
    length = padded_length(pack_length or max(longest, 1))  # all packs may be empty
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


def padded_length(length: int) -> int:
    """`length` rounded up to a multiple of PAD_MULTIPLE."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


def worst_batch(shape: BatchShape, vocab_size: int) -> dict[str, torch.Tensor]:
    """A batch of the given shape that needs the most memory: full packs, every token but the first a target.

    Where packs may have several rows, each has two.
    """
    ids = torch.arange(shape.length) % vocab_size
    rows = ids.tensor_split(2) if shape.starts else [ids]
    packs = [[(row, row) for row in rows]] * shape.packs
    return collate(packs, 0, shape.length if shape.is_packed else None, shape.starts)


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy a batch to the device. From page-locked memory the host does not wait for the copy."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
