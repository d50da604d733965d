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
MOMENTS_BYTES = 2**31  # of second moments that qera holds at a time; each time it reads the rows again
DAMPING = 1e-4  # added to their diagonal, relative to its mean: some directions may not occur in the rows


def initialize_adapter(model, method: str, base_model: str, rows: TokenizedRows) -> None:
    """Replace the weights of a new adapter, in which B is 0 and A uniform, by those of the method.

    `base_model` is where the base was loaded from, `rows` are training rows. Seed first: all methods but
    loftq draw random numbers. Raises InputError if the method does not work with this base.
    """
    if method == "gaussian":
        for layer in _lora_layers(model).values():
            layer.reset_lora_parameters("default", "gaussian")
    elif method == "loftq":
        restore_lost_weights(model, base_model)
    elif method == "qera":
        drawn = _draw(rows)
        for names in _groups(model):
            restore_lost_weights(model, base_model, second_moments(model, names, drawn))
    elif method == "eva":
        initialize_eva(model, rows)


@torch.no_grad()
def restore_lost_weights(model, base_model: str, moments: dict[str, torch.Tensor] | None = None) -> None:
    """Let the adapter give back as much of what quantization took from each weight W as its rank allows.

    Without `moments` that is one step of LoftQ (arXiv 2310.08659, algorithm 1), with the quantized weight Q
    as it is: scale B A is the truncated SVD of W - Q. With the second moments of a layer's inputs x it is
    QERA (arXiv 2410.06040, theorem 1): of all matrices of that rank, scale B A minimizes the mean square of
    (W - Q - scale B A) x. Only the layers named there are set. The original weights are read one at a time.
    """
    files = Weights(loaded_folder(base_model))
    for name, layer in _lora_layers(model).items():
        if not isinstance(layer, Linear4bit) or (moments is not None and name not in moments):
            continue  # what is not quantized has lost nothing
        quantized = layer.get_base_layer().weight
        try:
            original = files.tensor(f"{name}.weight").to(quantized.device)
        except KeyError as error:
            raise InputError(f"--init_lora_weights: {base_model} has no weight named {error}") from error
        if original.shape != quantized.quant_state.shape:
            raise InputError(f"--init_lora_weights needs original weights: {base_model} is already 4-bit")
        lost = original.float() - dequantize_4bit(quantized, quantized.quant_state).float()
        lost /= layer.scaling["default"]
        if moments is None:
            b, a = best_approximation(lost, layer.r["default"])
        else:
            factor = _cholesky(moments[name])  # |M factor| is the root mean square of M x
            b, a = best_approximation(lost @ factor, layer.r["default"])
            a = torch.linalg.solve_triangular(factor, a, upper=False, left=False)
        # At a rank above those of W, the other rows of A stay random and B's columns 0.
        layer.lora_A["default"].weight[: len(a)] = a
        layer.lora_B["default"].weight[:, : len(a)] = b


@torch.no_grad()
def second_moments(model, names: set[str], rows: list[tuple]) -> dict[str, torch.Tensor]:
    """E[x x^T], (in, in), of the inputs x of these layers in the base, over the tokens of rows."""
    sums, tokens = {}, {}

    def add(name: str, layer: LoraLayer, inputs: tuple[torch.Tensor]) -> None:
        x = inputs[0].flatten(0, -2).float()
        sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x
        tokens[name] = tokens.get(name, 0) + len(x)

    layers = {name: layer for name, layer in _lora_layers(model).items() if name in names}
    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    was_training = model.training
    model.eval()
    with model.disable_adapter():  # it may already give back a part of other layers
        for ids, _ in rows:
            model(input_ids=ids[None].to(model.device), use_cache=False)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return {name: total / tokens[name] for name, total in sums.items()}


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


def _groups(model) -> list[set[str]]:
    """The adapted layers, as many at a time as the second moments of their inputs fit in MOMENTS_BYTES."""
    groups, room = [], 0
    for name, layer in _lora_layers(model).items():
        size = 4 * layer.in_features**2
        if size > room or not groups:
            groups.append(set())
            room = MOMENTS_BYTES
        groups[-1].add(name)
        room -= size
    return groups


def best_approximation(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (out, rank) and (rank, in) of the nearest matrix of that rank, of equal norms.

    The singular vectors are eigenvectors of the smaller Gram matrix: on a GPU, many times as fast as an SVD.
    """
    if len(matrix) > matrix.shape[1]:
        right, left = best_approximation(matrix.T, rank)
        return left.T, right.T
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]  # those of the largest values
    right = vectors.T @ matrix
    roots = right.norm(dim=1).sqrt().clamp(min=1e-12)  # of the singular values
    return vectors * roots, right / roots[:, None]


def _cholesky(moments: torch.Tensor) -> torch.Tensor:
    damping = DAMPING * moments.diagonal().mean()
    return torch.linalg.cholesky(moments + damping * torch.eye(len(moments), device=moments.device))


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
