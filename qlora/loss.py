"""Next-token cross-entropy, summed over the targets, without ever holding the logits of a whole batch."""

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from qlora.attention import attention_inputs

CHUNK = 1024  # targets per piece: 1024 x 32,000 float32 logits are 131 MB


def next_token_loss(model, batch: dict[str, torch.Tensor], plain_head: bool) -> torch.Tensor:
    """Sum of the cross-entropy over the batch's targets (a float32 scalar), to be divided by a count of
    targets.

    `batch` is collate()'s. With `plain_head` (see has_plain_head) the head runs only on the hidden states
    that predict a target, a chunk at a time, and each chunk's logits are computed again in the backward pass.
    Other models take the general path through their own forward, which holds the logits.
    """
    causal_lm = model.get_base_model()
    if not plain_head:
        logits = causal_lm(**attention_inputs(batch), use_cache=False).logits
        logits = logits.flatten(0, 1).index_select(0, batch["target_index"])
        return cross_entropy(logits.float(), batch["target_ids"], reduction="sum")
    hidden = causal_lm.get_decoder()(**attention_inputs(batch), use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1).index_select(0, batch["target_index"])
    head = causal_lm.get_output_embeddings()
    total = hidden.new_zeros((), dtype=torch.float32)
    for hidden_chunk, target_chunk in zip(hidden.split(CHUNK), batch["target_ids"].split(CHUNK)):
        total = total + checkpoint(_head_loss, head, hidden_chunk, target_chunk, use_reentrant=False)
    return total


def _head_loss(head, hidden: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    return cross_entropy(head(hidden).float(), target_ids, reduction="sum")


@torch.no_grad()
def has_plain_head(model) -> bool:
    """Whether the model's logits are exactly head(hidden states): no soft-capping, no scaling.

    Measured rather than looked up, so that it holds for any architecture.
    """
    causal_lm = model.get_base_model()
    was_training = causal_lm.training
    causal_lm.eval()
    input_ids = torch.arange(8, device=model.device).unsqueeze(0)
    logits = causal_lm(input_ids=input_ids, use_cache=False).logits
    hidden = causal_lm.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    head_logits = causal_lm.get_output_embeddings()(hidden)
    causal_lm.train(was_training)
    return torch.equal(head_logits, logits)
