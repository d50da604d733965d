"""Validation loss: mean cross-entropy over all targets of the validation rows."""

from collections.abc import Callable, Iterable
from itertools import islice

import numpy as np
import torch

from qlora import ranks
from qlora.data.batch import micro_batches, padded_length, to_device
from qlora.data.tokenized import TokenizedRows
from qlora.model.forward import evaluation_mode
from qlora.model.loss import target_logprobs


class Validation:
    """Validation rows in batches, the longest first: if memory runs out, it does so at once."""

    def __init__(
        self,
        rows: TokenizedRows,
        batch_size: int,
        max_tokens: int,
        pad_id: int,
        hidden_states: Callable | None,
        autocast: Callable,
    ):
        self.rows, self.pad_id = rows, pad_id
        self.hidden_states, self.autocast = hidden_states, autocast  # the first from choose_hidden_states()
        self.batches = eval_batches(rows.lengths, batch_size, max_tokens)

    def loss(
        self,
        model,
        should_stop: Callable[[], bool] = lambda: False,
        batches: Iterable[list[int]] | None = None,
    ) -> float | None:
        """Mean cross-entropy in nats per target, whose exponential is the perplexity; None if stopped.

        Each rank computes its share of the batches, and all get the result. Leaves the model in its mode, so
        training goes on as if nothing had happened. `should_stop` is asked before every batch. `batches`
        replace the object's own, in a progress bar for example.
        """
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        waiting = iter(self.batches if batches is None else batches)
        with evaluation_mode(model):
            while turn := list(islice(waiting, ranks.count())):  # a batch for each rank
                if should_stop():
                    return None
                # In the last turn, ranks without a batch of their own compute another's, but do not count it:
                # a sharded base needs all ranks.
                loss = self._batch_loss(model, turn[ranks.number() % len(turn)])
                total += loss if ranks.number() < len(turn) else 0.0
        ranks.sum_(total)
        return total.item() / self.rows.targets

    @torch.no_grad()
    def _batch_loss(self, model, row_indices: list[int]) -> torch.Tensor:
        """Summed cross-entropy over a batch's targets."""
        packs = [[index] for index in row_indices]
        (batch,) = micro_batches(self.rows, packs, len(packs), self.pad_id)
        with self.autocast():
            return -target_logprobs(model, to_device(batch, model.device), self.hidden_states).sum()

    def run_largest_batch(self, model) -> None:
        """Run the batch with the most tokens, padding included, for a rehearsal."""
        tokens = [len(batch) * padded_length(int(self.rows.lengths[batch[0]])) for batch in self.batches]
        with evaluation_mode(model):
            self._batch_loss(model, self.batches[int(np.argmax(tokens))])


def eval_batches(lengths: np.ndarray, batch_size: int, max_tokens: int) -> list[list[int]]:
    """The rows of each batch, the longest first.

    A batch has at most `batch_size` rows and at most `max_tokens` tokens (as many as a micro-batch of the
    training), each row counted as long as the batch's longest; but at least one row.
    """
    longest_first = (-lengths).argsort(kind="stable").tolist()
    batches, start = [], 0
    while start < len(longest_first):
        fitting = max_tokens // int(lengths[longest_first[start]])
        rows = longest_first[start : start + max(min(batch_size, fitting), 1)]
        batches.append(rows)
        start += len(rows)
    return batches
