"""How far two models are apart: the KL divergence between their next-token predictions."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import log_softmax


@dataclass(frozen=True)
class Prediction:
    """A model's next-token predictions for one row of n + 1 tokens."""

    ids: torch.Tensor  # (n + 1,)
    log_probabilities: torch.Tensor  # (n, vocabulary) float32, in host memory


@dataclass(frozen=True)
class Difference:
    """How far one model is from another, averaged over all predictions."""

    perplexity: float
    other_perplexity: float
    kl: float  # KL(model || other), in nats per token


@torch.no_grad()
def predict(model, rows: Iterable[torch.Tensor], autocast: Callable) -> Iterator[Prediction]:
    """The model's predictions for each row of token ids (1, n + 1), one row at a time."""
    for ids in rows:
        with autocast():
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0, :-1]
        yield Prediction(ids[0], log_softmax(logits.float(), dim=-1).cpu())


def measure_difference(predictions: Iterable[Prediction], others: Iterable[Prediction]) -> Difference:
    """Compare two models' predictions for the same rows."""
    loss = other_loss = kl = 0.0
    tokens = 0
    for one, other in zip(predictions, others, strict=True):
        targets = one.ids[1:, None]
        loss -= one.log_probabilities.gather(1, targets).sum().item()
        other_loss -= other.log_probabilities.gather(1, targets).sum().item()
        log_ratio = one.log_probabilities - other.log_probabilities
        kl += (one.log_probabilities.exp() * log_ratio).sum(dtype=torch.float64).item()
        tokens += len(targets)
    kl = max(kl / tokens, 0.0)  # rounding can make it negative
    return Difference(math.exp(loss / tokens), math.exp(other_loss / tokens), kl)
