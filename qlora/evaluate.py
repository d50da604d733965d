"""Validation loss over tokens."""

import torch

from qlora.data import micro_batches, to_device
from qlora.loss import next_token_loss
from qlora.tokens import TokenizedRows


@torch.no_grad()
def evaluate_loss(
    model, rows: TokenizedRows, batch_size: int, pad_id: int, autocast, plain_head: bool
) -> float:
    """Mean cross-entropy over all targets of `rows`; its exponential is the perplexity.

    `autocast` is called for a fresh autocast context of every batch. Draws no random number and leaves the
    model in the mode it was in, so that training goes on as if nothing had happened. The logits are never
    held.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    longest_first = (-rows.lengths).argsort(kind="stable").tolist()
    for start in range(0, len(rows), batch_size):
        packs = [[index] for index in longest_first[start : start + batch_size]]
        (batch,) = micro_batches(rows, packs, batch_size, pad_id)
        with autocast():
            total += next_token_loss(model, to_device(batch, model.device), plain_head)
    model.train(was_training)
    return total.item() / rows.targets
