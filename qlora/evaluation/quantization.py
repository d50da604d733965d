"""What quantization to 4 bits does to a model: the error of each layer, the bits a weight really takes."""

import math

import bitsandbytes.functional as bnb
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from qlora.errors import InputError, first_line
from qlora.model.base import load_config
from qlora.model.weights import fetch_weights
from qlora.run.screen import table

GB = 2**30
SCHEMES = {  # name: (4-bit type, whether the block constants are quantized too)
    "nf4": ("nf4", False), "nf4 double": ("nf4", True), "fp4": ("fp4", False), "fp4 double": ("fp4", True),
}  # fmt: skip


def quantization_report(model: str, device: torch.device, trust_remote_code: bool = False) -> dict:
    """Error and bits a weight of each layer that training quantizes, under each of SCHEMES, and the memory.

    The error is the root mean square of what is lost, as a share of the weights' own: |W - Q(W)| / |W|.
    Layers are read one at a time. Raises InputError.
    """
    config = load_config(model, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"--quantization {model} is quantized already: give the original model")
    names = linear_layers(config, trust_remote_code)
    if not names:
        raise InputError(f"--quantization {model} has no linear layers")
    weights = fetch_weights(model)
    layers = []
    for name in tqdm(names, unit="layer"):
        try:
            weight = weights.tensor(f"{name}.weight").to(device)
        except KeyError as error:
            raise InputError(f"--quantization {model}: its files have no {name}.weight") from error
        layers.append(measure(name, weight))
    total = {
        scheme: {
            "error": math.sqrt(_sum(layers, scheme, "lost") / _sum(layers, scheme, "whole")),
            "bits": _sum(layers, scheme, "bytes") * 8 / sum(layer["weights"] for layer in layers),
        }
        for scheme in SCHEMES
    }
    others = weights.parameters() - sum(layer["weights"] for layer in layers)
    memory = {f"{bits} bits": weights.parameters() * bits / 8 / GB for bits in (32, 16)}
    memory |= {scheme: (_sum(layers, scheme, "bytes") + 2 * others) / GB for scheme in SCHEMES}
    return {
        "model": model, "layers": layers, "total": total, "others_in_16_bits": others, "memory_gb": memory
    }  # fmt: skip


def linear_layers(config, trust_remote_code: bool) -> list[str]:
    """Names of the layers that are held in 4 bits: all linear ones but the output head. Raises InputError."""
    try:
        with torch.device("meta"):  # shapes only
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise InputError(f"--quantization: this is no causal language model: {first_line(error)}") from error
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


def measure(name: str, weight: torch.Tensor) -> dict:
    """The errors of one (out_features, in_features) weight; squares and bytes are kept, for the sum."""
    layer = {"name": name, "shape": list(weight.shape), "weights": weight.numel(), "schemes": {}}
    for scheme, (quant_type, is_double) in SCHEMES.items():
        packed, state = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=is_double)
        lost = (bnb.dequantize_4bit(packed, state).float() - weight.float()).square().sum(dtype=torch.float64)
        whole = weight.float().square().sum(dtype=torch.float64)
        taken = packed.nbytes + sum(constants.nbytes for constants in _constants(state))
        layer["schemes"][scheme] = {
            "error": math.sqrt(lost.item() / whole.item()) if whole else 0.0,
            "bits": taken * 8 / weight.numel(),
            "lost": lost.item(), "whole": whole.item(), "bytes": taken,
        }  # fmt: skip
    return layer


def _constants(state) -> list[torch.Tensor]:
    """What has to be kept for every block; the tables that all layers share are left out."""
    if not state.nested:
        return [state.absmax]
    return [state.absmax, state.state2.absmax, state.offset]


def _sum(layers: list[dict], scheme: str, name: str) -> float:
    return sum(layer["schemes"][scheme][name] for layer in layers)


def describe_quantization(report: dict) -> str:
    """The report as a table, and the memory below it."""
    rows = [["layer", *SCHEMES]]
    for layer in report["layers"]:
        rows.append([layer["name"], *(f"{layer['schemes'][name]['error']:.4f}" for name in SCHEMES)])
    rows.append(["all", *(f"{report['total'][name]['error']:.4f}" for name in SCHEMES)])
    rows.append(["bits a weight", *(f"{report['total'][name]['bits']:.3f}" for name in SCHEMES)])
    memory = ", ".join(f"{name} {gb:.3g} GB" for name, gb in report["memory_gb"].items())
    return f"error |W - Q(W)| / |W|\n{table(rows)}\nmemory of all weights: {memory}"
