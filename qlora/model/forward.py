"""A batch through the decoder."""

import torch

VARLEN = "qlora_varlen"


def attention_inputs(causal_lm, batch: dict[str, torch.Tensor]) -> dict:
    """What of a batch goes into the model's forward: transformers' names for packed rows."""
    inputs = {"input_ids": batch["input_ids"]}
    if causal_lm.config._attn_implementation == VARLEN:
        # An empty mask: transformers hands one of 4 dimensions on as it is. Without it, it would look for
        # packed rows in the positions, for which the host must wait for the device, and build a mask of them.
        inputs["attention_mask"] = batch["input_ids"].new_empty((1, 1, 1, 0), dtype=torch.bool)
    if "position_ids" in batch:
        length = batch["input_ids"].shape[1]
        inputs |= {"position_ids": batch["position_ids"], "max_length_q": length, "max_length_k": length}
    if "seq_starts" in batch:
        inputs |= {"cu_seq_lens_q": batch["seq_starts"], "cu_seq_lens_k": batch["seq_starts"]}
    return inputs


def decode(causal_lm, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The last hidden states (packs, length, d) of a batch of collate()'s."""
    return causal_lm.get_decoder()(**attention_inputs(causal_lm, batch), use_cache=False).last_hidden_state
