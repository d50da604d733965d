"""Validation loss over tokens."""

import numpy as np
import torch

from qlora.data.batch import micro_batches, to_device
from qlora.data.tokenize import TokenizedRows
from qlora.model.loss import next_token_loss


@torch.no_grad()
def evaluate_loss(
    model, rows: TokenizedRows, batches: list[list[int]], pad_id: int, autocast, plain_head: bool, stop=False
) -> float | None:
    """Mean cross-entropy over all targets of `rows`; its exponential is the perplexity.

    `batches` are eval_batches'. `autocast` is called for a fresh autocast context of every batch. Draws no
    random number and leaves the model in the mode it was in, so that training goes on as if nothing had
    happened. The logits are never held. Once `stop` is true, returns None.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    done = 0
    try:
        for indices in batches:
            if stop:
                break
            (batch,) = micro_batches(rows, [[index] for index in indices], len(indices), pad_id)
            with autocast():
                total += next_token_loss(model, to_device(batch, model.device), plain_head)
            done += len(indices)
    finally:
        model.train(was_training)
    return total.item() / rows.targets if done == len(rows) else None


def eval_batches(lengths: np.ndarray, batch_size: int, most_tokens: int) -> list[list[int]]:
    """The rows of each batch of an evaluation, the longest first: at most `batch_size` of them, and no more
    with their padding than `most_tokens`, which is what a training step takes at once."""
    longest_first = (-lengths).argsort(kind="stable").tolist()
    batches, start = [], 0
    while start < len(longest_first):
        fitting = most_tokens // int(lengths[longest_first[start]])
        rows = longest_first[start : start + max(min(batch_size, fitting), 1)]
        batches.append(rows)
        start += len(rows)
    return batches
