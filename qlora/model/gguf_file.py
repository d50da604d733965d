"""A model of the Llama family as a GGUF file, which llama.cpp and Ollama run. Needs the package gguf."""

import math
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora.errors import InputError
from qlora.model.gguf_tokenizer import CONVERTER, Vocabulary, add_vocabulary
from qlora.model.weights import Weights

# model_type -> architecture. For llama, rotary embeddings rotate neighboring rows of the q and k projections;
# in transformers, and in the other architectures here, row i and row i + head_dim / 2.
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3,
}  # fmt: skip
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}  # fmt: skip


def check_architecture(config) -> None:
    """Raise InputError unless the model is one whose every part a GGUF file can hold."""
    model_type = config.model_type
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"models of the type {model_type} cannot be exported, only {known}: {CONVERTER}")
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            "the model is quantized: export the merged model (python -m qlora.merge) or the original"
        )
    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise InputError(
            f"the rotary embeddings of this model ({rope['rope_type']}) cannot be exported: {CONVERTER}"
        )
    if config.hidden_act != "silu":
        raise InputError(f"llama.cpp computes silu in these models, not {config.hidden_act}")


@dataclass(frozen=True)
class GgufTensor:
    """A weight of the model, and how the file holds it."""

    name: str
    gguf_name: str
    shape: tuple[int, ...]
    kept_as: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.kept_as]
        return math.prod(self.shape) // block * block_bytes


def gguf_tensors(weights: Weights, config, kind: str) -> list[GgufTensor]:
    """How a file of the `kind` f32, f16 or q8_0 holds each weight.

    Raises InputError if one has no name in GGUF, or is missing.
    """
    names = _tensor_names(weights, config)
    return [
        GgufTensor(name, gguf_name, shape := weights.shape(name), _kept_as(gguf_name, shape, kind))
        for name, gguf_name in names.items()
    ]


def write_gguf(
    path: Path,
    name: str,
    config,
    weights: Weights,
    tensors: list[GgufTensor],
    kind: str,
    vocabulary: Vocabulary,
) -> None:
    """Write the file, one tensor in memory at a time. Raises InputError if a value does not fit, OSError."""
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    _add_model(writer, name, config, kind)
    add_vocabulary(writer, vocabulary)
    rope_factors = _rope_factors(config)
    if rope_factors is not None:
        writer.add_tensor_info(
            "rope_freqs.weight", rope_factors.shape, rope_factors.dtype, rope_factors.nbytes
        )
    for tensor in tensors:
        # Its dtype would decide nothing but whether the shape is counted in weights, as here, or in bytes.
        writer.add_tensor_info(
            tensor.gguf_name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.kept_as
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if rope_factors is not None:
            writer.write_tensor_data(rope_factors)
        for tensor in tqdm(tensors, desc="export", unit="tensor"):
            writer.write_tensor_data(_converted(weights.tensor(tensor.name), tensor, config))
    finally:
        writer.close()


def context_length(config) -> int:
    """Tokens in the longest text. llama.cpp ignores a sliding window here, so that a text must fit in it."""
    window = getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _add_model(writer: GGUFWriter, name: str, config, kind: str) -> None:
    """What the model's configuration says."""
    head_dim = _head_dim(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(context_length(config))
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope_factors(config) -> np.ndarray | None:
    """What llama.cpp divides each rotary frequency by, (head_dim / 2,) float32; None if nothing."""
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = _head_dim(config)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return (config.rope_parameters["rope_theta"] ** -exponents / scaled).numpy()


def _tensor_names(weights: Weights, config) -> dict[str, str]:
    """Name in GGUF of each tensor of the model's files.

    Raises InputError for one that has none, and if the model has a weight that is not in its files:
    transformers would put random values in its place.
    """
    known = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    names = {}
    for name in weights.files:
        if name.endswith("rotary_emb.inv_freq"):  # in older files; computed from the configuration
            continue
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        gguf_name = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise InputError(f"llama.cpp has no name for the weight {name}")
        names[name] = gguf_name
    with torch.device("meta"):  # the names without the memory
        model = AutoModelForCausalLM.from_config(config)
    found = set(names.values())
    missing = [
        name
        for name, _ in model.named_parameters()
        if known.get_name(name, try_suffixes=(".weight", ".bias")) not in found
    ]
    if missing:
        more = f" ({len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(
            f"the files of --model are incomplete: {missing[0]} is missing{more}: copy or download them again"
        )
    return names


def _kept_as(gguf_name: str, shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    """Norms and biases stay float32, as llama.cpp expects. Q8_0 has blocks of 32 weights of one row."""
    if kind == "f32" or len(shape) == 1 or gguf_name.endswith("_norm.weight"):
        return GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % 32 == 0:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16


def _converted(weight: torch.Tensor, tensor: GgufTensor, config) -> np.ndarray:
    """A weight as the file holds it; raises InputError if its values are too large for that."""
    if ARCHITECTURES[config.model_type] == gguf.MODEL_ARCH.LLAMA:
        if ".q_proj." in tensor.name:
            weight = interleave_halves(weight, config.num_attention_heads)
        elif ".k_proj." in tensor.name:
            weight = interleave_halves(weight, config.num_key_value_heads)
    values = weight.float().contiguous().numpy()
    if tensor.kept_as != GGMLQuantizationType.F32 and not np.abs(values).max() <= np.finfo(np.float16).max:
        raise InputError(f"{tensor.name} has values that float16 cannot hold: choose --gguf f32")
    return quantize(values, tensor.kept_as)


def interleave_halves(projection: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows (heads * head_dim, ...): in each head, row i + head_dim / 2 comes after row i."""
    halves = projection.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(projection.shape)
