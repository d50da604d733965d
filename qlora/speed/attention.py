"""Attention that keeps packed rows apart: variable-length kernels on CUDA, else SDPA with a block mask."""

from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora.data.batch import collate, to_device
from qlora.errors import first_line
from qlora.model.forward import VARLEN, evaluation_mode, hidden_states, without_adapter

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

# For batches of one shape. cuDNN's is the fastest on Hopper, but each new shape takes it long to prepare.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip
# Relative to the norm of the hidden states. On a 4-bit model of Llama-2-7B's shape, bfloat16 alone makes 0.03
# to 0.04, wrong positions make 1.3.
TOLERANCE = 0.1


def choose_attention(model, autocast) -> str | None:
    """Give the model the fastest attention that keeps packed rows apart; returns None, or why there is none.

    Tried on the model rather than looked up: packed rows must have the hidden states that they have alone
    with the model's own attention, and must not change by one bit when a neighbor changes. `autocast` makes
    the context to run in.
    """
    causal_lm = without_adapter(model)
    own = causal_lm.config._attn_implementation
    candidates = [own]
    if varlen_attn is not None and model.device.type == "cuda" and not _drops_attention(causal_lm.config):
        register_varlen()
        candidates = [VARLEN, own]
    reasons = []
    for name in candidates:
        try:
            with evaluation_mode(causal_lm):
                if are_rows_apart(causal_lm, name, own, autocast):
                    return None
            reasons.append(f"rows see each other with {name}")
        except (ValueError, RuntimeError, TypeError) as error:  # a GPU or a model that does not take it
            reasons.append(f"{name}: {first_line(error)}")
    causal_lm.set_attn_implementation(own)
    return "; ".join(reasons)


def register_varlen() -> None:
    """Make varlen_attention known to transformers, under the name VARLEN."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, varlen_mask)


def _drops_attention(config) -> bool:
    """Whether attention probabilities are dropped out, which varlen_attn cannot do."""
    return any(value for name, value in config.to_dict().items() if "att" in name and "drop" in name)


@torch.no_grad()
def are_rows_apart(causal_lm, attention: str, own: str, autocast) -> bool:
    """Whether packed rows keep apart: each has, with `attention`, the hidden states that it has alone with
    the model's `own` attention, and a change of one changes no bit of another."""
    first, other, second = torch.arange(18).split([5, 5, 8])
    hidden = partial(_row_states, causal_lm, autocast)
    causal_lm.set_attn_implementation(own)
    alone = torch.cat([hidden([row], pack_length=None) for row in (first, second)]).float()
    causal_lm.set_attn_implementation(attention)
    packed, changed = hidden([first, second], pack_length=16), hidden([other, second], pack_length=16)
    single = hidden([second], pack_length=16)  # a pack of one row takes another path through the attention
    difference = torch.cat([packed - alone, single - alone[len(first) :]]).norm()
    return bool(difference < TOLERANCE * alone.norm()) and torch.equal(
        packed[len(first) :], changed[len(first) :]
    )


def _row_states(causal_lm, autocast, rows: list[torch.Tensor], pack_length: int | None) -> torch.Tensor:
    """(tokens, d) of rows that share a pack, without its padding."""
    batch = to_device(collate([[(row, row) for row in rows]], 0, pack_length), causal_lm.device)
    with autocast():
        return hidden_states(causal_lm, batch)[0, : sum(map(len, rows))]


def varlen_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **kwargs
):
    """An attention function for transformers: (batch, heads, length, head_dim) through torch's varlen_attn.

    `cu_seq_lens_q` are the flat positions at which rows start. Without them (one row per sequence,
    generation) it is SDPA, merely causal if the mask is the empty one of forward_inputs(). Raises ValueError
    for what varlen_attn does not support, which makes choose_attention() fall back.
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
    """No mask where none is given: row starts keep rows apart, and causality is built in."""
    return None if attention_mask is None else sdpa_mask(*arguments, attention_mask=attention_mask, **kwargs)
