"""Base and adapter as one model: python -m qlora.merge --model BASE --adapter outputs --output_dir merged

The merged model is written shard by shard, read again, and compared with the adapter on its base before it
gets its name. Flags: MergeConfig in qlora/config.py.
"""

import gc
import json
import math
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch.nn.functional import log_softmax
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

from qlora.commands import compute_of, load_base_of, parse_for_adapter
from qlora.config import MergeConfig
from qlora.data.prepare import cut_rows, tokenize_source
from qlora.data.sources import RowSource
from qlora.data.tokenize import tokenize_window
from qlora.errors import InputError, first_line
from qlora.model.adapter import load_adapter
from qlora.model.base import load_config, load_tokenizer
from qlora.model.weights import INDEX, SINGLE, Weights, loaded_folder
from qlora.run.files import check_space, make_durable, staged
from qlora.run.hub import check_hub, model_card, push

PROGRAM = "qlora.merge"
SHARD_BYTES = 2 * 2**30  # held in host memory at a time
LEAST_KL = 1e-3  # what rounding to 16 bits may make of a weak adapter
MOST_TOKENS = 2048  # of the comparison: their log-probabilities are kept, 128 KB each for 32,000 tokens

# What both models read if no rows are given.
TEXT = [
    "A river begins where water gathers, and it ends where the land does. Between the two it carries stones, "
    "sand and the names that people have given to its bends.",
    "To sort a list of numbers, compare neighbours and swap them if they stand in the wrong order; after as "
    "many passes as there are numbers nothing is left to swap. Faster ways divide the list first.",
    "Bread needs flour, water, salt and time. The dough is kneaded until it is smooth, rests until it has "
    "doubled, and is baked until its crust sounds hollow.",
    "def area(width, height):\n    \"\"\"The area of a rectangle.\"\"\"\n    return width * height\n",
]  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """What a model says to one row."""

    ids: torch.Tensor  # (n + 1,)
    log_probabilities: torch.Tensor  # (n, vocabulary) float32, in host memory


def main(argv: list[str] | None = None) -> None:
    try:
        merge(parse_for_adapter(MergeConfig, argv, PROGRAM))
    except InputError as error:
        sys.exit(f"{PROGRAM}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def merge(config: MergeConfig) -> None:
    """Write, compare, publish; raises InputError, and then leaves nothing behind."""
    output_dir = Path(config.output_dir).resolve()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f"--output_dir {output_dir} is there and not empty: give another folder")
    repo = config.hub_model_id or output_dir.name
    if config.push_to_hub:
        repo = check_hub(repo)
    is_original = config.base == "original" and config.load_in_4bit
    stored = load_config(config.model, config.trust_remote_code)
    if is_original and getattr(stored, "quantization_config", None) is not None:
        raise InputError(f"--base original: {config.model} itself is quantized, there is nothing else of it")
    tokenizer = load_tokenizer(config.model, config.adapter, config.trust_remote_code)
    rows = sample_rows(config, tokenizer, stored.get_text_config())

    trained = None
    if is_original:  # how far from what was trained will it be?
        trained = list(predictions(load(config, in_4bit=True), rows, config))
        free_memory()
    model = load(config, in_4bit=config.load_in_4bit and not is_original)
    refuse_what_is_not_merged(model)
    refuse_other_names(model, Weights(loaded_folder(config.model)))
    wanted = list(predictions(model, rows, config))
    with model.disable_adapter():
        _, _, effect = differences(wanted, predictions(model, rows, config))
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with staged(output_dir) as staging:
            staging.mkdir()
            dtype = getattr(torch, config.dtype)
            check_space(staging, sum(map(_numel, model.get_base_model().parameters())) * dtype.itemsize)
            write_shards(staging, merged_tensors(model), dtype)
            write_settings(staging, type(model.get_base_model()).__name__, tokenizer, config)
            del model  # the merged one needs the room
            free_memory()
            compare(staging, wanted, trained, effect, config)
            card = model_card(repo, config.model, Path(config.adapter), is_merged=True)
            (staging / "README.md").write_text(card, encoding="utf-8")
            make_durable(staging)
            if output_dir.exists():
                output_dir.rmdir()  # an empty one
            os.rename(staging, output_dir)
    except OSError as error:
        raise InputError(f"--output_dir {output_dir} cannot be written: {first_line(error)}") from error
    print(f"merged model in {output_dir}")
    if config.push_to_hub:
        print(f"uploaded to {push(output_dir, repo, config.hub_private_repo)}")


def load(config: MergeConfig, in_4bit: bool):
    """The adapter on its base; raises InputError."""
    return load_adapter(load_base_of(config, in_4bit), config.adapter, is_trainable=False).eval()


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def refuse_what_is_not_merged(model) -> None:
    """Raise InputError if the adapter has more than LoRA or DoRA on linear layers of their own."""
    base = model.get_base_model()
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is not None and embeddings.weight.data_ptr() == head.weight.data_ptr()
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise InputError(f"the adapter trains {name} beside LoRA, which is not merged here")
        if not isinstance(module, LoraLayer):
            continue
        linear = module.get_base_layer()
        if not isinstance(linear, torch.nn.Linear):
            raise InputError(f"{name} is a {type(linear).__name__}: only linear layers are merged here")
        if module.lora_bias.get("default"):
            raise InputError(f"the adapter has a bias of its own at {name}, which is not merged here")
        if tied and linear.weight.data_ptr() == embeddings.weight.data_ptr():
            raise InputError(f"the adapter is on {name}, whose weight the embeddings share: not merged here")


def refuse_other_names(model, files: Weights) -> None:
    """Raise InputError if transformers has other names for the weights than their files have: what loads the
    merged model elsewhere would not find them."""
    for name, _ in merged_names(model):
        if name not in files.files:
            raise InputError(
                f"the files of this model have no {name}: models of its kind are not merged here"
            )


def merged_names(model) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name without PEFT's additions, parameter) of the base's own parameters."""
    for name, parameter in model.get_base_model().named_parameters():
        if not re.search(r"\.lora_\w+\.", name):
            yield name.replace(".base_layer.", "."), parameter


def merged_tensors(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) of each parameter of the base, the adapter's part added in float32.

    4-bit weights are dequantized: on those the adapter was trained.
    """
    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in merged_names(model):
        weight = parameter.detach()
        if getattr(parameter, "quant_state", None) is not None:
            weight = dequantize_4bit(weight, parameter.quant_state)
        if name.endswith(".weight") and name.removesuffix(".weight") in layers:
            weight = add_lora(weight.float(), layers[name.removesuffix(".weight")])
        yield name, weight


@torch.no_grad()
def add_lora(weight: torch.Tensor, layer: LoraLayer) -> torch.Tensor:
    """W + B A scale, (out_features, in_features); with DoRA its rows brought to their trained lengths
    (arXiv 2402.09353, equation 5)."""
    merged = weight + layer.get_delta_weight("default").float()
    if not layer.use_dora.get("default"):
        return merged
    lengths = layer.lora_magnitude_vector["default"].weight
    return merged * (lengths / merged.norm(dim=1))[:, None]


def write_shards(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
    """Write safetensors files of at most SHARD_BYTES, and their index; one is in host memory at a time."""
    shards, shard, size, total = [], {}, 0, 0

    def write() -> None:
        path = folder / f"shard-{len(shards)}"
        save_file(shard, path, metadata={"format": "pt"})
        shards.append((path, list(shard)))

    for name, tensor in tqdm(tensors, desc="merge", unit="tensor"):
        tensor = tensor.to(device="cpu", dtype=dtype).contiguous()
        if shard and size + tensor.nbytes > SHARD_BYTES:
            write()
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        shards[0][0].rename(folder / SINGLE)
        return
    places = {}
    for number, (path, names) in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        path.rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_settings(folder: Path, architecture: str, tokenizer, config: MergeConfig) -> None:
    """What a model's folder has beside the weights: configuration, generation settings, tokenizer."""
    settings = load_config(config.model, config.trust_remote_code)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    settings.dtype = config.dtype
    settings.architectures = [architecture]
    settings.save_pretrained(folder)
    try:
        GenerationConfig.from_pretrained(config.model).save_pretrained(folder)
    except (OSError, ValueError):  # not every model has them, and not all are valid
        pass
    tokenizer.save_pretrained(folder)


def sample_rows(config: MergeConfig, tokenizer, model_config) -> list[torch.Tensor]:
    """Token ids (1, n) of the rows to compare on, MOST_TOKENS in all."""
    settings = {"text_field": config.dataset_text_field, "completion_only_loss": False}
    if config.dataset:
        source = RowSource(config.dataset, config.split)
        rows = tokenize_source(tokenizer, config.dataset_format, source, **settings)
    else:
        located = [(f"text {number}", {config.dataset_text_field: text}) for number, text in enumerate(TEXT)]
        rows = tokenize_window(located, tokenizer, row_format="text", **settings)
    context = getattr(model_config, "max_position_embeddings", None) or 512
    rows = cut_rows(rows, min(512, context), model_config.vocab_size)
    sample, tokens = [], 0
    for ids, _ in (rows[number] for number in range(len(rows))):
        sample.append(ids[: MOST_TOKENS - tokens][None])
        tokens += sample[-1].shape[1]
        if tokens >= MOST_TOKENS - 1:
            break
    return [ids for ids in sample if ids.shape[1] > 1]


@torch.no_grad()
def predictions(model, rows: list[torch.Tensor], config: MergeConfig) -> Iterator[Prediction]:
    """The log-probabilities of the next token at every position but the last, row by row."""
    _, autocast = compute_of(config)
    for ids in rows:
        with autocast():
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0, :-1]
        yield Prediction(ids[0], log_softmax(logits.float(), dim=-1).cpu())


def compare(
    folder: Path,
    wanted: list[Prediction],
    trained: list[Prediction] | None,
    effect: float,
    config: MergeConfig,
) -> None:
    """Load the merged model and hold it against the adapter on its base; raises InputError if it differs.

    Too far is --max_kl, or a tenth of the adapter's own `effect` on the base, its KL divergence. `trained`
    are the predictions of the adapter on the 4-bit base, where it is merged into another.
    """
    try:
        with tempfile.TemporaryDirectory() as overflow:
            merged = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, config.dtype), use_safetensors=True, offload_folder=overflow,
                device_map="auto" if torch.cuda.is_available() else None,
                trust_remote_code=config.trust_remote_code,
            ).eval()  # fmt: skip
            rows = [prediction.ids[None] for prediction in wanted]
            before, after, kl = differences(wanted, predictions(merged, rows, config))
            from_trained = trained and differences(trained, predictions(merged, rows, config))
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"the merged model cannot be loaded again: {first_line(error)}") from error
    print(
        f"perplexity {before:.4f} with the adapter, {after:.4f} merged; KL divergence {kl:.2e} nats a token "
        f"(the adapter itself makes {effect:.2e})"
    )
    if from_trained:
        print(
            f"the adapter on the 4-bit base, where it was trained: perplexity {from_trained[0]:.4f}, KL "
            f"divergence {from_trained[2]:.2e}"
        )
    limit = min(config.max_kl, max(effect / 10, LEAST_KL))
    if not kl <= limit:
        raise InputError(
            f"the merged model is not the adapter on its base: a KL divergence of {kl:.2e} nats a token, "
            f"more than {limit:.2e} (--max_kl, or a tenth of the adapter's own); nothing was written"
        )


def differences(wanted: list[Prediction], got: Iterable[Prediction]) -> tuple[float, float, float]:
    """(perplexity of `wanted`, that of `got`, mean KL divergence of `got` from `wanted` in nats a token)."""
    losses, kl, tokens = [0.0, 0.0], 0.0, 0
    for one, other in zip(wanted, got, strict=True):
        targets = one.ids[1:, None]
        for number, prediction in enumerate((one, other)):
            losses[number] -= prediction.log_probabilities.gather(1, targets).sum().item()
        difference = one.log_probabilities - other.log_probabilities
        kl += (one.log_probabilities.exp() * difference).sum(dtype=torch.float64).item()
        tokens += len(targets)
    return *(math.exp(loss / tokens) for loss in losses), max(kl / tokens, 0.0)  # rounding is below 0 too


def _numel(parameter: torch.nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


if __name__ == "__main__":
    main()
