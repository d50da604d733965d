"""A batch through the decoder: from token ids to the last hidden states."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel

from qlora.errors import InputError

DECODER_INPUTS = ("input_ids", "position_ids", "seq_starts")  # what the decoder takes of a batch

# The name under which speed/attention.py registers variable-length attention with transformers.
VARLEN = "qlora_varlen"


def without_adapter(model):
    """The causal LM inside a PEFT model, or the model itself. LoRA layers stay where they are, inside it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder(causal_lm):
    """The part of a causal LM that computes the last hidden states: all but its head. Raises InputError."""
    found = causal_lm.get_decoder()
    if found is causal_lm:  # Llama 4: transformers looks for it where it is beside a vision model
        found = getattr(causal_lm, "model", None)
    if found is None:
        raise InputError(
            f"{type(causal_lm).__name__} is not supported: its decoder cannot be told from its head"
        )
    return found


@contextmanager
def evaluation_mode(model) -> Iterator[None]:
    """Without dropout; afterwards the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def hidden_states(causal_lm, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The last hidden states, (packs, length, d), of a batch from data/batch.py's collate()."""
    return decoder(causal_lm)(**forward_inputs(causal_lm, batch), use_cache=False).last_hidden_state


def forward_inputs(causal_lm, batch: dict[str, torch.Tensor]) -> dict:
    """The model's keyword arguments for a batch: transformers' names for packed rows."""
    inputs = {"input_ids": batch["input_ids"]}
    if causal_lm.config._attn_implementation == VARLEN:
        # An empty mask, as transformers passes 4-dimensional masks through. Without one it would look for
        # packed rows in position_ids, which makes the host wait for the device, and build a mask of them.
        inputs["attention_mask"] = batch["input_ids"].new_empty((1, 1, 1, 0), dtype=torch.bool)
    if "position_ids" in batch:
        length = batch["input_ids"].shape[1]
        inputs |= {"position_ids": batch["position_ids"], "max_length_q": length, "max_length_k": length}
    if "seq_starts" in batch:
        inputs |= {"cu_seq_lens_q": batch["seq_starts"], "cu_seq_lens_k": batch["seq_starts"]}
    return inputs


def choose_hidden_states(model) -> Callable | None:
    """hidden_states(), or None for a model whose head does more than a matrix product (scales, caps)."""
    return hidden_states if has_plain_head(model) else None


@torch.no_grad()
def has_plain_head(model) -> bool:
    """Whether the model's logits are exactly head(hidden states): tested by running it."""
    causal_lm = without_adapter(model)
    input_ids = torch.arange(8, device=model.device).unsqueeze(0)
    with evaluation_mode(causal_lm):
        logits = causal_lm(input_ids=input_ids, use_cache=False).logits
        hidden = decoder(causal_lm)(input_ids=input_ids, use_cache=False).last_hidden_state
        head_logits = causal_lm.get_output_embeddings()(hidden)
    return torch.equal(head_logits, logits)
