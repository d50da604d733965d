"""What 4-bit quantization costs a model: the error in each layer, and the bits that a weight really takes."""

import math

import bitsandbytes.functional as bnb
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from qlora.errors import InputError, first_line
from qlora.model.base import load_config
from qlora.model.weights import fetch_weights
from qlora.run.screen import table
from qlora.speed.memory import GB

SCHEMES = {  # name: (4-bit type, whether the block constants are quantized too)
    "nf4": ("nf4", False), "nf4 double": ("nf4", True), "fp4": ("fp4", False), "fp4 double": ("fp4", True),
}  # fmt: skip


def quantization_report(model: str, device: torch.device, trust_remote_code: bool = False) -> dict:
    """Error and bits per weight of each layer that training would quantize, in each scheme, and the memory.

    The error is |W - Q(W)| / |W|, in Frobenius norms. One layer at a time is loaded. Raises InputError.
    """
    config = load_config(model, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"--quantization {model} is already quantized: give the original model")
    names = linear_layers(config, trust_remote_code)
    if not names:
        raise InputError(f"--quantization {model} has no linear layers")
    weights = fetch_weights(model)
    layers = []
    for name in tqdm(names, unit="layer"):
        try:
            weight = weights.tensor(f"{name}.weight").to(device)
        except KeyError as error:
            raise InputError(f"--quantization {model}: {name}.weight is missing from its files") from error
        layers.append(measure(name, weight))
    count = weights.count_parameters()
    others = count - sum(layer["weights"] for layer in layers)
    return {
        "model": model,
        "layers": layers,
        "total": {scheme: _total(layers, scheme) for scheme in SCHEMES},
        "others_in_16_bits": others,
        "memory_gb": _memory_gb(layers, count, others),
    }


def linear_layers(config, trust_remote_code: bool) -> list[str]:
    """Names of the layers that are quantized: all linear ones but the output head. Raises InputError."""
    try:
        with torch.device("meta"):  # shapes only
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise InputError(
            f"--quantization: this is not a causal language model: {first_line(error)}"
        ) from error
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


def measure(name: str, weight: torch.Tensor) -> dict:
    """Error and bits per weight of one (out_features, in_features) weight in each scheme.

    The report's totals are computed from the sums that are included: "lost" and "whole", the squared norms of
    W - Q(W) and W, and "bytes".
    """
    layer = {"name": name, "shape": list(weight.shape), "weights": weight.numel(), "schemes": {}}
    for scheme, (quant_type, is_double) in SCHEMES.items():
        packed, state = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=is_double)
        lost = (bnb.dequantize_4bit(packed, state).float() - weight.float()).square().sum(dtype=torch.float64)
        whole = weight.float().square().sum(dtype=torch.float64)
        size = packed.nbytes + sum(constants.nbytes for constants in _constants(state))
        layer["schemes"][scheme] = {
            "error": math.sqrt(lost.item() / whole.item()) if whole else 0.0,
            "bits": size * 8 / weight.numel(),
            "lost": lost.item(),
            "whole": whole.item(),
            "bytes": size,
        }
    return layer


def _constants(state) -> list[torch.Tensor]:
    """The constants of the blocks, without the tables that all layers share."""
    if not state.nested:
        return [state.absmax]
    return [state.absmax, state.state2.absmax, state.offset]


def _total(layers: list[dict], scheme: str) -> dict[str, float]:
    """Error and bits per weight over all layers."""
    return {
        "error": math.sqrt(_sum(layers, scheme, "lost") / _sum(layers, scheme, "whole")),
        "bits": _sum(layers, scheme, "bytes") * 8 / sum(layer["weights"] for layer in layers),
    }


def _memory_gb(layers: list[dict], count: int, others: int) -> dict[str, float]:
    """Memory of all `count` weights, of which `others` are never quantized and take 16 bits each."""
    memory = {f"{bits} bits": count * bits / 8 / GB for bits in (32, 16)}
    return memory | {scheme: (_sum(layers, scheme, "bytes") + 2 * others) / GB for scheme in SCHEMES}


def _sum(layers: list[dict], scheme: str, name: str) -> float:
    return sum(layer["schemes"][scheme][name] for layer in layers)


def describe_quantization(report: dict) -> str:
    """The report as a table, followed by the memory."""
    rows = [["layer", *SCHEMES]]
    for layer in report["layers"]:
        rows.append([layer["name"], *(f"{layer['schemes'][scheme]['error']:.4f}" for scheme in SCHEMES)])
    rows.append(["all", *(f"{report['total'][scheme]['error']:.4f}" for scheme in SCHEMES)])
    rows.append(["bits per weight", *(f"{report['total'][scheme]['bits']:.3f}" for scheme in SCHEMES)])
    memory = ", ".join(f"{name} {gb:.3g} GB" for name, gb in report["memory_gb"].items())
    return f"error |W - Q(W)| / |W|\n{table(rows)}\nmemory of all weights: {memory}"
