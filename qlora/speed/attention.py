"""Attention that keeps packed rows apart: variable-length on CUDA, else SDPA's mask from the positions."""

from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora.data.batch import collate, to_device
from qlora.model.forward import VARLEN, decode

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

# For batches of one shape. cuDNN's is the fastest on Hopper, but takes long to prepare for each new shape.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip
# Of the hidden states' norm. On a 4-bit model of Llama-2-7B's shape bfloat16 alone makes 0.03 to 0.04,
# wrong positions make 1.3.
TOLERANCE = 0.1


def choose_attention(model, autocast) -> str | None:
    """Set the fastest attention that keeps packed rows apart; returns its name, or None if there is none.

    Tried on the model rather than looked up: packed rows must have the hidden states that they have alone
    with the model's own attention, and must not change by one bit when a neighbour changes. `autocast` makes
    the context to run in.
    """
    causal_lm = model.get_base_model()
    usual = causal_lm.config._attn_implementation
    choices = [usual]
    if (
        varlen_attn is not None
        and model.device.type == "cuda"
        and not _has_attention_dropout(causal_lm.config)
    ):
        choices = [VARLEN, usual]
    was_training = causal_lm.training
    causal_lm.eval()
    try:
        for choice in choices:
            try:
                if rows_are_apart(causal_lm, choice, usual, autocast):
                    return choice
            except (ValueError, RuntimeError, TypeError):  # a card or an architecture that does not take it
                pass
        causal_lm.set_attn_implementation(usual)
        return None
    finally:
        causal_lm.train(was_training)


def _has_attention_dropout(config) -> bool:
    """varlen_attn drops nothing out."""
    return any(value for name, value in config.to_dict().items() if "att" in name and "drop" in name)


@torch.no_grad()
def rows_are_apart(causal_lm, choice: str, usual: str, autocast) -> bool:
    """Whether packed rows are with attention `choice` what each is alone with the `usual` one, and ignore
    each other's tokens to the last bit."""
    first, other, second = torch.arange(18).split([5, 5, 8])

    def hidden(*rows: torch.Tensor, pack_length: int | None) -> torch.Tensor:
        batch = to_device(collate([[(row, row) for row in rows]], 0, pack_length), causal_lm.device)
        with autocast():
            return decode(causal_lm, batch)[0, : sum(map(len, rows))]

    causal_lm.set_attn_implementation(usual)
    alone = torch.cat([hidden(row, pack_length=None) for row in (first, second)]).float()
    causal_lm.set_attn_implementation(choice)
    packed, changed = hidden(first, second, pack_length=16), hidden(other, second, pack_length=16)
    single = hidden(second, pack_length=16)  # a row to a pack takes another way through the attention
    difference = torch.cat([packed - alone, single - alone[len(first) :]]).norm()
    return bool(difference < TOLERANCE * alone.norm()) and torch.equal(
        packed[len(first) :], changed[len(first) :]
    )


def varlen_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **kwargs
):
    """transformers' attention function over (batch, heads, length, head_dim) by torch's varlen_attn.

    `cu_seq_lens_q` are the flat positions at which rows start. Without them (a row to a sequence, generation)
    it is SDPA, causal alone if the mask is attention_inputs' empty one. Raises ValueError for what
    varlen_attn does not know, before which choose_attention draws back.
    """
    if any(kwargs.get(name) is not None for name in ("sliding_window", "softcap", "s_aux", "position_bias")):
        raise ValueError("attention with more than a causal mask")
    if cu_seq_lens_q is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            attention_mask = None
        dense = partial(sdpa_attention_forward, module, query, key, value, attention_mask, scaling=scaling)
        if max_length_q is None:
            return dense(**kwargs)
        with sdpa_kernel(BACKENDS, set_priority=True):
            return dense(**kwargs)
    batch, _, length, _ = query.shape
    groups = query.shape[1] // key.shape[1]
    query, key, value = (
        states.transpose(1, 2).flatten(0, 1)
        for states in (query, repeat_kv(key, groups), repeat_kv(value, groups))
    )
    mixed = varlen_attn(
        query, key, value, cu_seq_lens_q, cu_seq_lens_q, length, length, scale=scaling, window_size=(-1, 0)
    )
    return mixed.unflatten(0, (batch, length)), None


def varlen_mask(*arguments, attention_mask=None, **kwargs):
    """No mask where none is given: rows are kept apart by their starts, and causality is built in."""
    return None if attention_mask is None else sdpa_mask(*arguments, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, varlen_mask)
