"""Weights of a base with its adapter's update added: what can be merged, and the merged tensors."""

import re
from collections.abc import Iterator

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from qlora.errors import InputError
from qlora.model.weights import Weights


def check_mergeable(model) -> None:
    """Raise InputError unless the adapter is just LoRA or DoRA on linear layers, none tied to others."""
    base = model.get_base_model()
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    is_tied = head is not None and embeddings.weight.data_ptr() == head.weight.data_ptr()
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise InputError(f"cannot merge this adapter: besides LoRA it trains {name}")
        if not isinstance(module, LoraLayer):
            continue
        linear = module.get_base_layer()
        if not isinstance(linear, torch.nn.Linear):
            raise InputError(
                f"cannot merge this adapter: only linear layers can be merged, and {name} is of type "
                f"{type(linear).__name__}"
            )
        if module.lora_bias.get("default"):
            raise InputError(f"cannot merge this adapter: it has a bias of its own on {name}")
        if is_tied and linear.weight.data_ptr() == embeddings.weight.data_ptr():
            raise InputError(f"cannot merge this adapter: {name} shares its weight with the embeddings")


def check_names(model, files: Weights) -> None:
    """Raise InputError if transformers renames weights while it loads them.

    The merged files would have the new names, under which other programs do not find the weights.
    """
    for name, _ in base_parameters(model):
        if name not in files.files:
            raise InputError(
                f"cannot merge models of this type: transformers names a weight {name}, their files do not"
            )


def base_parameters(model) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of the base's own parameters, under their names without PEFT."""
    for name, parameter in model.get_base_model().named_parameters():
        if not re.search(r"\.lora_\w+\.", name):
            yield name.replace(".base_layer.", "."), parameter


def parameter_count(parameter: torch.nn.Parameter) -> int:
    """The number of weights in a parameter, which may be packed in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def merged_tensors(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) of each parameter of the base, with the adapter's update added in float32.

    4-bit weights are dequantized: those are the values that the adapter was trained on.
    """
    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in base_parameters(model):
        weight = parameter.detach()
        if getattr(parameter, "quant_state", None) is not None:
            weight = dequantize_4bit(weight, parameter.quant_state)
        if name.endswith(".weight") and name.removesuffix(".weight") in layers:
            weight = add_lora(weight.float(), layers[name.removesuffix(".weight")])
        yield name, weight


@torch.no_grad()
def add_lora(weight: torch.Tensor, layer: LoraLayer) -> torch.Tensor:
    """W + scale B A, of shape (out_features, in_features).

    With DoRA each row is then scaled to its trained length (arXiv 2402.09353, equation 5).
    """
    merged = weight + layer.get_delta_weight("default").float()
    if not layer.use_dora.get("default"):
        return merged
    lengths = layer.lora_magnitude_vector["default"].weight
    return merged * (lengths / merged.norm(dim=1))[:, None]
