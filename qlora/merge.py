"""Base and adapter as one model: python -m qlora.merge --model BASE --adapter outputs --output_dir merged

The merged model is written shard by shard, read again, and compared with the adapter on its base before it
gets its name. Flags: MergeConfig in qlora/config.py.
"""

import gc
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch.nn.functional import log_softmax
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

from qlora.adapter import check_base, load_adapter, parse_for_adapter
from qlora.config import MergeConfig
from qlora.data import choose_max_length, cut_rows, tokenize_source
from qlora.errors import InputError, first_line
from qlora.files import check_space, make_durable, staged
from qlora.fingerprint import base_fingerprint
from qlora.hub import check_hub, model_card, push
from qlora.model import load_base, load_config, load_tokenizer
from qlora.rows import RowSource
from qlora.tokens import tokenize_window
from qlora.weights import INDEX, SINGLE, Weights, loaded_folder

PROGRAM = "qlora.merge"
SHARD_BYTES = 2 * 2**30  # held in host memory at a time
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


def merge(config: MergeConfig) -> None:
    """Write, compare, publish; raises InputError, and then leaves nothing behind."""
    output_dir = Path(config.output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f"--output_dir {output_dir} is there and not empty: give another folder")
    repo = config.hub_model_id or output_dir.resolve().name
    if config.push_to_hub:
        check_hub(repo)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, config.dtype)
    stored = load_config(config.model, config.trust_remote_code)
    if config.base == "original" and getattr(stored, "quantization_config", None) is not None:
        raise InputError(f"--base original: {config.model} itself is quantized, there is nothing else of it")
    tokenizer = load_tokenizer(config.model, config.adapter, config.trust_remote_code)
    rows = sample_rows(config, tokenizer)
    base = load_base(
        config.model, dtype, device, config.load_in_4bit, config.bnb_4bit_quant_type,
        config.bnb_4bit_use_double_quant, config.trust_remote_code,
    )  # fmt: skip
    if not config.allow_other_base:
        check_base(config.adapter, base_fingerprint(config.model), "--allow_other_base")
    original = Weights(loaded_folder(config.model)) if config.base == "original" else None
    model = load_adapter(base, config.adapter, is_trainable=False).eval()
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    wanted = list(predictions(model, rows, autocast))
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with staged(output_dir) as staging:
            staging.mkdir()
            check_space(staging, sum(_numel(p) for p in base.parameters()) * dtype.itemsize)
            write_shards(staging, merged_tensors(model, original), dtype)
            write_settings(staging, base, tokenizer, config)
            del model, base  # the merged one needs the room
            gc.collect()
            torch.cuda.empty_cache()
            compare(staging, wanted, dtype, device, config)
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


def merged_tensors(model, original: Weights | None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 weight or as it is) of each parameter of the base, the adapter's part added.

    4-bit weights are dequantized, which is what the adapter was trained on; with `original` they are read
    from the base's own files. Names are the base's. Raises InputError for layers that it cannot merge.
    """
    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in base.named_parameters():
        if any(name.startswith(f"{layer}.lora_") for layer in layers):
            continue
        plain = name.replace(".base_layer.", ".")
        weight = parameter.detach()
        if getattr(parameter, "quant_state", None) is not None:
            weight = dequantize_4bit(weight, parameter.quant_state)
        if original is not None:
            try:
                weight = original.tensor(plain).to(weight.device)
            except KeyError as error:
                raise InputError(f"--base original: the base's files have no {plain}") from error
        if plain.endswith(".weight") and plain.removesuffix(".weight") in layers:
            weight = add_lora(weight.float(), layers[plain.removesuffix(".weight")])
        yield plain, weight


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


def write_settings(folder: Path, base, tokenizer, config: MergeConfig) -> None:
    """What a model's folder has beside the weights: configuration, generation settings, tokenizer."""
    settings = load_config(config.model, config.trust_remote_code)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    settings.dtype = config.dtype
    settings.architectures = [type(base).__name__]
    settings.save_pretrained(folder)
    try:
        GenerationConfig.from_pretrained(config.model).save_pretrained(folder)
    except (OSError, ValueError):  # not every model has them, and not all are valid
        pass
    tokenizer.save_pretrained(folder)


def sample_rows(config: MergeConfig, tokenizer) -> list[torch.Tensor]:
    """Token ids (1, n) of the rows to compare on, MOST_TOKENS in all."""
    model_config = load_config(config.model, config.trust_remote_code).get_text_config()
    settings = {"text_field": config.dataset_text_field, "completion_only_loss": False}
    if config.dataset:
        source = RowSource(config.dataset, config.split)
        rows = tokenize_source(tokenizer, config.dataset_format, source, **settings)
    else:
        located = [(f"text {number}", {config.dataset_text_field: text}) for number, text in enumerate(TEXT)]
        rows = tokenize_window(located, tokenizer, row_format="text", **settings)
    rows = cut_rows(rows, choose_max_length("512", rows.whole_lengths, model_config), model_config.vocab_size)
    sample, tokens = [], 0
    for ids, _ in (rows[number] for number in range(len(rows))):
        sample.append(ids[: MOST_TOKENS - tokens][None])
        tokens += sample[-1].shape[1]
        if tokens >= MOST_TOKENS - 1:
            break
    return [ids for ids in sample if ids.shape[1] > 1]


@torch.no_grad()
def predictions(model, rows: list[torch.Tensor], autocast) -> Iterator[Prediction]:
    """The log-probabilities of the next token at every position but the last, row by row."""
    for ids in rows:
        with autocast():
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0, :-1]
        yield Prediction(ids[0], log_softmax(logits.float(), dim=-1).cpu())


def compare(folder: Path, wanted: list[Prediction], dtype: torch.dtype, device, config: MergeConfig) -> None:
    """Load the merged model and hold it against the adapter on its base; raises InputError above --max_kl."""
    try:
        merged = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map="auto" if device.type == "cuda" else None, use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
        ).eval()  # fmt: skip
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"the merged model cannot be loaded again: {first_line(error)}") from error
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    got = predictions(merged, [prediction.ids[None] for prediction in wanted], autocast)
    before, after, kl = differences(wanted, got)
    print(
        f"perplexity {before:.4f} with the adapter, {after:.4f} merged; KL divergence {kl:.2e} nats a token"
    )
    if not kl <= config.max_kl:
        raise InputError(
            f"the merged model is not what was trained: a KL divergence of {kl:.2e} nats a token, more than "
            f"--max_kl {config.max_kl:g}; nothing was written"
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
