"""Log-probabilities of a batch's targets, from which losses are made.

Where the head is one matrix product, the logits of a batch are never held as a whole.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint

from qlora.model.forward import forward_inputs, without_adapter

LOGITS_PER_CHUNK = 2**24  # 67 MB in float32, plus two 16-bit copies of 34 MB
MIN_CHUNK = 256  # fewer targets would make the head's matrix products too thin


def target_logprobs(model, batch: dict[str, torch.Tensor], hidden_states: Callable | None) -> torch.Tensor:
    """Log-probability of each of the batch's n targets given the tokens before it: (n,) float32.

    `batch` comes from collate(). Minus the sum of the result is the cross-entropy, summed over the targets.
    `hidden_states` computes those of (causal_lm, batch), as choose_hidden_states() returns it; the head then
    runs only on those that predict a target, a chunk at a time. It is None for models whose head is more than
    a matrix product: their own forward pass computes all logits.
    """
    causal_lm = without_adapter(model)
    if hidden_states is None:
        logits = causal_lm(**forward_inputs(causal_lm, batch), use_cache=False).logits
        logits = logits.flatten(0, 1).index_select(0, batch["target_index"])
        return -cross_entropy(logits.float(), batch["target_ids"], reduction="none")
    hidden = hidden_states(causal_lm, batch)
    hidden = hidden.flatten(0, 1).index_select(0, batch["target_index"])
    head = causal_lm.get_output_embeddings()
    if type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad:
        return FrozenHead.apply(hidden, head.weight, batch["target_ids"])
    chunks = [
        checkpoint(_head_logprobs, head, hidden[rows], batch["target_ids"][rows], use_reentrant=False)
        for rows in _chunks(len(hidden), head.weight.shape[0])
    ]
    return torch.cat([hidden[:0, 0].float(), *chunks])  # there may be no target at all


def _head_logprobs(head, hidden: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    return -cross_entropy(head(hidden).float(), target_ids, reduction="none")


class FrozenHead(torch.autograd.Function):
    """log_softmax(hidden @ weight.T) at the targets, for hidden (n, d), weight (vocabulary, d), ids (n,).

    As the weight is frozen, all that the backward pass needs is, for each target, the gradient with respect
    to its hidden state. It is (one-hot - softmax) @ weight, and is computed here, chunk by chunk along with
    the value, so that no logits are kept or computed twice. The backward pass overwrites it: one is possible.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        negative_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(hidden), len(weight)):
            ids = target_ids[rows, None]
            chunk = log_softmax(hidden[rows] @ weight.T, dim=1, dtype=torch.float32)
            chosen = chunk.gather(1, ids)
            logprobs[rows] = chosen[:, 0]
            if negative_gradient is not None:
                difference = chunk.exp_().scatter_add_(1, ids, torch.full_like(chosen, -1.0))
                negative_gradient[rows] = difference.to(hidden.dtype) @ weight
        ctx.save_for_backward(negative_gradient)
        return logprobs

    @staticmethod
    @once_differentiable  # the gradient was computed without a graph
    def backward(ctx, grad_logprobs: torch.Tensor):
        (negative_gradient,) = ctx.saved_tensors
        # In place, a part at a time, and in float32: 16 bits would round the loss scale itself.
        for rows, scale in zip(negative_gradient.split(MIN_CHUNK), grad_logprobs.split(MIN_CHUNK)):
            rows.copy_(rows.float() * -scale[:, None])
        return negative_gradient, None, None


def _chunks(targets: int, vocabulary: int) -> list[slice]:
    """Slices of the targets, small enough for their logits to fit LOGITS_PER_CHUNK."""
    size = max(LOGITS_PER_CHUNK // vocabulary, MIN_CHUNK)
    return [slice(start, start + size) for start in range(0, targets, size)]
