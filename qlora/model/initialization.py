"""Initial LoRA weights. Whatever the method, the base keeps its weights.

So the result is an ordinary adapter of an ordinary base: resuming, evaluating and merging need not know how
it began. Methods that move a part of the base into the adapter (PiSSA, OLoRA) need another base, on which
the adapter depends from then on; docs/quality.md shows how to train on one, and what it brought.
"""

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import EvaConfig, initialize_lora_eva_weights
from peft.tuners.lora import Linear4bit
from peft.tuners.lora.layer import LoraLayer
from torch.nn.functional import pad

from qlora.data.tokenized import TokenizedRows
from qlora.errors import InputError
from qlora.model.weights import Weights, loaded_folder

EVA_ROWS, EVA_BATCH = 256, 8  # EVA takes batches of these rows until its directions no longer change


def initialize_adapter(model, method: str, base_model: str, rows: TokenizedRows) -> None:
    """Replace the weights of a new adapter, in which B is 0 and A uniform, by those of the method.

    `base_model` is where the base was loaded from, `rows` are training rows. Seed first: gaussian and eva
    draw random numbers. Raises InputError if the method does not work with this base.
    """
    if method == "gaussian":
        for layer in _lora_layers(model).values():
            layer.reset_lora_parameters("default", "gaussian")
    elif method == "loftq":
        initialize_loftq(model, base_model)
    elif method == "eva":
        initialize_eva(model, rows)


@torch.no_grad()
def initialize_loftq(model, base_model: str) -> None:
    """Start from the best approximation, of the adapter's rank, of what quantization took from each weight.

    One step of LoftQ (arXiv 2310.08659, algorithm 1), with the quantized weight Q as it is: scale B A is the
    truncated SVD of W - Q. It needs the original weights, one at a time.
    """
    files = Weights(loaded_folder(base_model))
    for name, layer in _lora_layers(model).items():
        if not isinstance(layer, Linear4bit):
            continue  # not quantized: nothing was lost
        quantized = layer.get_base_layer().weight
        try:
            original = files.tensor(f"{name}.weight")
        except KeyError as error:
            raise InputError(
                f"--init_lora_weights loftq: {base_model} has no weight named {error}"
            ) from error
        if original.shape != quantized.quant_state.shape:
            raise InputError(
                f"--init_lora_weights loftq needs original weights: {base_model} is already 4-bit"
            )
        lost = (
            original.to(quantized.device).float() - dequantize_4bit(quantized, quantized.quant_state).float()
        )
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        left, right = _best_approximation(lost / layer.scaling["default"], len(a))
        a[: len(right)].copy_(
            right
        )  # at a rank above those of W, the other rows stay random and B's columns 0
        b[:, : len(right)].copy_(left)


def initialize_eva(model, rows: TokenizedRows) -> None:
    """Let A span the directions in which each layer's inputs vary most (EVA, arXiv 2410.07170); B is 0.

    The ranks stay as they are: EVA's redistribution is off.
    """
    chosen = torch.randperm(len(rows))[:EVA_ROWS].tolist()
    batches = [
        _padded(rows.fetch(chosen[i : i + EVA_BATCH]), model.device) for i in range(0, len(chosen), EVA_BATCH)
    ]
    config = model.peft_config["default"]
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    config.init_lora_weights, config.eva_config = True, None  # who loads the adapter has no rows to repeat it


def _lora_layers(model) -> dict[str, LoraLayer]:
    """The adapted layers by their names in the base."""
    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLayer)}


def _best_approximation(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (out, rank) and (rank, in) of the nearest matrix of that rank, of equal norms."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def _padded(rows: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> dict[str, torch.Tensor]:
    """(input_ids, labels) rows, padded on the right, as transformers' models take them."""
    length = max(len(ids) for ids, _ in rows)
    columns = {
        "input_ids": [pad(ids, (0, length - len(ids))) for ids, _ in rows],
        "labels": [pad(labels, (0, length - len(ids)), value=-100) for ids, labels in rows],
        "attention_mask": [pad(torch.ones_like(ids), (0, length - len(ids))) for ids, _ in rows],
    }
    return {name: torch.stack(values).to(device) for name, values in columns.items()}
