"""Next-token cross-entropy, summed over the targets, without ever holding the logits of a whole batch."""

from collections.abc import Callable

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint

from qlora.model.forward import attention_inputs, decode

LOGITS = 2**24  # of a chunk of targets: 67 MB in float32, and half of that twice in 16 bits
MIN_CHUNK = 256  # fewer targets would leave the head's matrix products too thin


def next_token_loss(
    model, batch: dict[str, torch.Tensor], plain_head: bool, decode: Callable = decode
) -> torch.Tensor:
    """Sum of the cross-entropy over the batch's targets (a float32 scalar), to be divided by a count of
    targets.

    `batch` is collate()'s. With `plain_head` (see has_plain_head) the head runs only on the hidden states
    that predict a target, and a chunk at a time. Other models take the general path through their own
    forward, which holds the logits. `decode` gives the hidden states of (model, batch).
    """
    causal_lm = without_adapter(model)
    if not plain_head:
        logits = causal_lm(**attention_inputs(causal_lm, batch), use_cache=False).logits
        logits = logits.flatten(0, 1).index_select(0, batch["target_index"])
        return cross_entropy(logits.float(), batch["target_ids"], reduction="sum")
    hidden = decode(causal_lm, batch)
    hidden = hidden.flatten(0, 1).index_select(0, batch["target_index"])
    head = causal_lm.get_output_embeddings()
    if type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad:
        return FrozenHeadLoss.apply(hidden, head.weight, batch["target_ids"])
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows in _chunks(len(hidden), head.weight.shape[0]):
        total += checkpoint(_head_loss, head, hidden[rows], batch["target_ids"][rows], use_reentrant=False)
    return total


def without_adapter(model):
    """The model that PEFT has put an adapter into, or the model itself; the adapter's layers stay in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _head_loss(head, hidden: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    return cross_entropy(head(hidden).float(), target_ids, reduction="sum")


class FrozenHeadLoss(torch.autograd.Function):
    """Summed cross-entropy of hidden @ weight.T, for (n, d) hidden states, (vocabulary, d) weight, (n,) ids.

    As the weight is frozen, the gradient of the hidden states is all that the backward pass has to hand on:
    it is formed here, chunk by chunk beside the loss (softmax - one-hot, times the weight), and no logits
    are kept or computed twice.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(hidden), len(weight)):
            ids = target_ids[rows, None]
            log_probabilities = log_softmax(hidden[rows] @ weight.T, dim=1, dtype=torch.float32)
            chosen = log_probabilities.gather(1, ids)
            total -= chosen.sum()
            if gradient is not None:
                difference = log_probabilities.exp_().scatter_add_(1, ids, torch.full_like(chosen, -1.0))
                gradient[rows] = difference.to(hidden.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, grad_total: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        # In place, a part at a time, and in float32: 16 bits would round the scale itself.
        for rows in gradient.split(MIN_CHUNK):
            rows.copy_(rows.float() * grad_total)
        return gradient, None, None


def _chunks(targets: int, vocabulary: int) -> list[slice]:
    """The targets in slices that keep their logits small."""
    size = max(LOGITS // vocabulary, MIN_CHUNK)
    return [slice(start, start + size) for start in range(0, targets, size)]


@torch.no_grad()
def has_plain_head(model) -> bool:
    """Whether the model's logits are exactly head(hidden states): no soft-capping, no scaling.

    Measured rather than looked up, so that it holds for any architecture.
    """
    causal_lm = without_adapter(model)
    was_training = causal_lm.training
    causal_lm.eval()
    input_ids = torch.arange(8, device=model.device).unsqueeze(0)
    logits = causal_lm(input_ids=input_ids, use_cache=False).logits
    hidden = causal_lm.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    head_logits = causal_lm.get_output_embeddings()(hidden)
    causal_lm.train(was_training)
    return torch.equal(head_logits, logits)
