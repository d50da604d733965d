"""Initial LoRA weights. Whatever the method, the base keeps its weights.

So the result is an ordinary adapter of an ordinary base: resume, evaluate and merge work without knowing the
method. Methods that move a part of the base into the adapter (PiSSA, OLoRA) need another base, on which the
adapter depends from then on; docs/quality.md shows how to train on one, and what it brought.
"""

from functools import partial

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import Linear4bit
from peft.tuners.lora.layer import LoraLayer
from torch.nn.utils.rnn import pad_sequence

from qlora.data.tokenized import TokenizedRows
from qlora.errors import InputError
from qlora.model.forward import decoder, evaluation_mode
from qlora.model.weights import Weights, loaded_folder

ROWS, BATCH = 256, 8  # training rows that qera looks at, at most, and how many of them at a time
MOMENTS_BYTES = 2**31  # of second moments that qera holds at a time; each time it reads the rows again
DAMPING = 1e-4  # added to their diagonal, relative to its mean: some directions may not occur in the rows


def check_initialization(method: str, base_model: str, model_config) -> None:
    """Raise InputError if the method needs original weights and the base has none."""
    if method in ("loftq", "qera") and getattr(model_config, "quantization_config", None):
        raise InputError(
            f"--init_lora_weights {method} needs the original weights, and {base_model} is already "
            "quantized: give the unquantized model, or --init_lora_weights default"
        )


def initialize_adapter(model, method: str, base_model: str, rows: TokenizedRows) -> None:
    """Replace the weights of a new adapter, in which B is 0 and A uniform, by those of the method.

    `base_model` is where the base was loaded from, `rows` are training rows. Seed first: gaussian and qera
    draw random numbers. Raises InputError if the method does not work with this base.
    """
    match method:
        case "default":
            pass
        case "gaussian":
            for layer in _lora_layers(model).values():
                layer.reset_lora_parameters("default", "gaussian")
        case "loftq":
            correct_quantization(model, base_model)
        case "qera":
            drawn = rows.fetch(torch.randperm(len(rows))[:ROWS].tolist())
            for names in _groups(model):
                correct_quantization(model, base_model, second_moments(model, names, drawn))
        case _:
            raise ValueError(method)


@torch.no_grad()
def correct_quantization(model, base_model: str, moments: dict[str, torch.Tensor] | None = None) -> None:
    """Initialize the adapter to the best rank-r approximation of the quantization error of each weight W.

    Without `moments` that is one step of LoftQ (arXiv 2310.08659, algorithm 1), with the quantized weight Q
    as it is: scale B A is the truncated SVD of W - Q. With the second moments of a layer's inputs x it is
    QERA (arXiv 2410.06040, theorem 1): of all matrices of that rank, scale B A minimizes the mean square of
    (W - Q - scale B A) x. Only the layers named there are set. The original weights are read one at a time.
    """
    files = Weights(loaded_folder(base_model))
    for name, layer in _lora_layers(model).items():
        if not isinstance(layer, Linear4bit) or (moments is not None and name not in moments):
            continue  # not quantized: no error to correct
        quantized = layer.get_base_layer().weight
        try:
            original = files.tensor(f"{name}.weight").to(quantized.device)
        except KeyError as error:
            raise InputError(f"--init_lora_weights: {base_model} has no weight named {error}") from error
        quantization_error = original.float() - dequantize_4bit(quantized, quantized.quant_state).float()
        quantization_error /= layer.scaling["default"]
        if moments is None:
            b, a = best_approximation(quantization_error, layer.r["default"])
        else:
            factor = _cholesky(moments[name])  # |M factor| is the root mean square of M x
            b, a = best_approximation(quantization_error @ factor, layer.r["default"])
            a = torch.linalg.solve_triangular(factor, a, upper=False, left=False)
        # At a rank above those of W, the other rows of A stay random and B's columns 0.
        layer.lora_A["default"].weight[: len(a)] = a
        layer.lora_B["default"].weight[:, : len(a)] = b


@torch.no_grad()
def second_moments(model, names: set[str], rows: list[tuple]) -> dict[str, torch.Tensor]:
    """E[x x^T], (in, in), of the inputs x of these layers in the base, over the tokens of rows.

    Layers with the same input, such as q, k and v, share one tensor. `rows` are (input_ids, labels).
    """
    moments = {}
    tokens = sum(len(ids) for ids, _ in rows)
    latest = None, None  # an input, and a layer that took it

    def add(name: str, layer: LoraLayer, inputs: tuple[torch.Tensor]) -> None:
        nonlocal latest
        if inputs[0] is latest[0]:
            moments[name] = moments[latest[1]]
            return
        latest = inputs[0], name
        x = inputs[0].flatten(0, -2)[mask.flatten()].float()  # (tokens, in), without padding
        if name not in moments:
            moments[name] = x.new_zeros(x.shape[1], x.shape[1])
        moments[name].addmm_(x.T, x, alpha=1 / tokens)

    layers = {name: layer for name, layer in _lora_layers(model).items() if name in names}
    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    by_length = sorted((ids for ids, _ in rows), key=len)
    with evaluation_mode(model), model.disable_adapter():  # it may already correct other layers
        for start in range(0, len(by_length), BATCH):
            batch = by_length[start : start + BATCH]
            input_ids = pad_sequence(batch, batch_first=True).to(model.device)
            lengths = torch.tensor([len(ids) for ids in batch], device=model.device)
            mask = torch.arange(input_ids.shape[1], device=model.device) < lengths[:, None]
            decoder(model.get_base_model())(input_ids=input_ids, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return moments


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
