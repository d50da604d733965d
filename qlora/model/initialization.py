"""Initial LoRA weights. Whatever the method, the base keeps its weights.

So the result is an ordinary adapter of an ordinary base: resuming, evaluating and merging need not know how
it began. Methods that move a part of the base into the adapter (PiSSA, OLoRA) need another base, on which
the adapter depends from then on; docs/quality.md shows how to train on one, and what it brought.
"""

from functools import partial

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import EvaConfig, initialize_lora_eva_weights
from peft.tuners.lora import Linear4bit
from peft.tuners.lora.layer import LoraLayer
from torch.nn.functional import pad

from qlora.data.tokenized import TokenizedRows
from qlora.errors import InputError
from qlora.model.weights import Weights, loaded_folder

ROWS = 256  # training rows that qera and eva look at, at most
BATCH = 8  # how many of them eva takes at a time


def initialize_adapter(model, method: str, base_model: str, rows: TokenizedRows) -> None:
    """Replace the weights of a new adapter, in which B is 0 and A uniform, by those of the method.

    `base_model` is where the base was loaded from, `rows` are training rows. Seed first: all methods but
    loftq draw random numbers. Raises InputError if the method does not work with this base.
    """
    if method == "gaussian":
        for layer in _lora_layers(model).values():
            layer.reset_lora_parameters("default", "gaussian")
    elif method == "loftq":
        approximate_lost_weights(model, base_model, {})
    elif method == "qera":
        approximate_lost_weights(model, base_model, input_scales(model, rows))
    elif method == "eva":
        initialize_eva(model, rows)


@torch.no_grad()
def approximate_lost_weights(model, base_model: str, scales: dict[str, torch.Tensor]) -> None:
    """Let the adapter give back as much of what quantization took from each weight W as its rank allows.

    Without `scales` that is one step of LoftQ (arXiv 2310.08659, algorithm 1), with the quantized weight Q as
    it is: scale B A is the truncated SVD of W - Q. With the root mean squares of each layer's inputs, (in,),
    it is QERA-approx (arXiv 2410.06040, theorem 2): an error counts as much as it changes the outputs. The
    original weights are read one at a time.
    """
    files = Weights(loaded_folder(base_model))
    for name, layer in _lora_layers(model).items():
        if not isinstance(layer, Linear4bit):
            continue  # not quantized: nothing was lost
        quantized = layer.get_base_layer().weight
        try:
            original = files.tensor(f"{name}.weight")
        except KeyError as error:
            raise InputError(f"--init_lora_weights: {base_model} has no weight named {error}") from error
        if original.shape != quantized.quant_state.shape:
            raise InputError(f"--init_lora_weights needs original weights: {base_model} is already 4-bit")
        lost = (
            original.to(quantized.device).float() - dequantize_4bit(quantized, quantized.quant_state).float()
        )
        lost /= layer.scaling["default"]
        scale = scales.get(name, lost.new_ones(()))
        left, right = _best_approximation(lost * scale, layer.r["default"])
        # At a rank above those of W, the other rows of A stay random and B's columns 0.
        layer.lora_A["default"].weight[: len(right)] = right / scale
        layer.lora_B["default"].weight[:, : len(right)] = left


@torch.no_grad()
def input_scales(model, rows: TokenizedRows) -> dict[str, torch.Tensor]:
    """The root mean square of every input (in,) of each adapted layer, over the tokens of training rows."""
    squares, tokens = {}, {}

    def add(name: str, layer: LoraLayer, inputs: tuple[torch.Tensor]) -> None:
        values = inputs[0].flatten(0, -2).float()
        squares[name] = squares.get(name, 0) + values.square().sum(0)
        tokens[name] = tokens.get(name, 0) + len(values)

    hooks = [
        layer.register_forward_pre_hook(partial(add, name)) for name, layer in _lora_layers(model).items()
    ]
    was_training = model.training
    model.eval()
    for ids, _ in _draw(rows):
        model(input_ids=ids[None].to(model.device), use_cache=False)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    # An input that is always 0 would make A infinite.
    return {name: (total / tokens[name]).sqrt().clamp(min=1e-6) for name, total in squares.items()}


def initialize_eva(model, rows: TokenizedRows) -> None:
    """Let A span the directions in which each layer's inputs vary most (EVA, arXiv 2410.07170); B is 0.

    The ranks stay as they are: EVA's redistribution is off.
    """
    config = model.peft_config["default"]
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
    drawn = _draw(rows)
    batches = [_padded(drawn[start : start + BATCH], model.device) for start in range(0, len(drawn), BATCH)]
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


def _draw(rows: TokenizedRows) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """ROWS rows of (input_ids, labels), drawn at random."""
    return rows.fetch(torch.randperm(len(rows))[:ROWS].tolist())


def _padded(rows: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> dict[str, torch.Tensor]:
    """(input_ids, labels) rows, padded on the right, as transformers' models take them."""
    length = max(len(ids) for ids, _ in rows)
    columns = {
        "input_ids": [pad(ids, (0, length - len(ids))) for ids, _ in rows],
        "labels": [pad(labels, (0, length - len(ids)), value=-100) for ids, labels in rows],
        "attention_mask": [pad(torch.ones_like(ids), (0, length - len(ids))) for ids, _ in rows],
    }
    return {name: torch.stack(values).to(device) for name, values in columns.items()}
