"""Merge an adapter into its base: python -m qlora.merge --model BASE --adapter outputs --output_dir merged

The merged model is written shard by shard, loaded again and compared with the adapter on its base. The
folder gets its name only if they agree. Flags: MergeConfig in qlora/config.py.
"""

import copy
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

from qlora.commands import check_has_original, choose_device, free_memory, load_base_for, parse_for_adapter
from qlora.config import CARD_FLAGS, MergeConfig
from qlora.data.prepare import cut_rows, tokenize_source
from qlora.data.sources import RowSource
from qlora.data.tokenize import tokenize_window
from qlora.errors import InputError, first_line
from qlora.evaluation.divergence import Difference, Prediction, measure_difference, predict
from qlora.model.adapter import BASE, SETTINGS, load_adapter, load_settings
from qlora.model.base import load_config, load_tokenizer
from qlora.model.merging import base_parameters, check_mergeable, check_names, merged_tensors, parameter_count
from qlora.model.tokenizer import save_tokenizer
from qlora.model.weights import Weights, loaded_folder, write_weights
from qlora.run.files import check_space, flush_folder, staged
from qlora.run.hub import check_hub, model_card, push
from qlora.run.metrics import read_run_leniently
from qlora.run.terminal import command

PROGRAM = "qlora.merge"
ROUNDING_KL = 1e-3  # nats per token that rounding to 16 bits may cost, however weak the adapter
MAX_TOKENS = 2048  # compared; their log-probabilities are kept: 128 KB per token with a vocabulary of 32,000

# Compared if no rows are given.
SAMPLE_TEXTS = [
    "A river begins where water gathers, and it ends where the land does. Between the two it carries stones, "
    "sand and the names that people have given to its bends.",
    "To sort a list of numbers, compare neighbours and swap them if they stand in the wrong order; after as "
    "many passes as there are numbers nothing is left to swap. Faster ways divide the list first.",
    "Bread needs flour, water, salt and time. The dough is kneaded until it is smooth, rests until it has "
    "doubled, and is baked until its crust sounds hollow.",
    "def area(width, height):\n    \"\"\"The area of a rectangle.\"\"\"\n    return width * height\n",
]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    with command(PROGRAM):
        merge(parse_for_adapter(MergeConfig, argv, PROGRAM))


def merge(config: MergeConfig) -> None:
    """Merge, compare, publish. Raises InputError and then leaves no files behind."""
    output_dir = Path(config.output_dir).resolve()
    check_is_free(output_dir)
    repo = config.hub_model_id or output_dir.name
    if config.push_to_hub:
        repo = check_hub(repo, config.hub_private_repo)
    model_config = load_config(config.model, config.trust_remote_code)
    # With --no_load_in_4bit the adapter was trained on the original weights anyway.
    is_other_base = config.base == "original" and config.load_in_4bit
    if is_other_base:
        check_has_original(config.model, model_config)
    tokenizer = load_tokenizer(config.model, config.adapter, config.trust_remote_code)
    rows = sample_rows(config, tokenizer, model_config.get_text_config())
    dtype = getattr(torch, config.dtype)
    _, autocast = choose_device(dtype)

    as_trained = []
    if is_other_base:  # the training was on the 4-bit base
        as_trained = [list(predict(load_with_adapter(config, load_in_4bit=True), rows, autocast))]
        free_memory()
    model = load_with_adapter(config, load_in_4bit=config.load_in_4bit and not is_other_base)
    check_mergeable(model)
    check_names(model, Weights(loaded_folder(config.model)))
    expected = list(predict(model, rows, autocast))
    with model.disable_adapter():
        effect = measure_difference(expected, predict(model, rows, autocast)).kl

    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with staged(output_dir) as staging:
            staging.mkdir()
            write_model(staging, model, dtype)
            architecture = type(model.get_base_model()).__name__
            write_settings(staging, config.model, model_config, architecture, dtype)
            settings = load_settings(config.adapter)
            save_tokenizer(staging, tokenizer, settings.get("dataset_format"))
            write_defaults(staging, settings, config.dtype)
            del model  # makes room for the merged one
            free_memory()
            differences = compare_merged(
                staging, [expected, *as_trained], dtype, autocast, config.trust_remote_code
            )
            print(describe_differences(differences, effect))
            check_kl(differences[0].kl, effect, config.max_kl)
            card = merged_card(repo, config.model, Path(config.adapter), config.base)
            (staging / "README.md").write_text(card, encoding="utf-8")
            publish(staging, output_dir)
    except OSError as error:
        raise InputError(f"--output_dir {output_dir} cannot be written: {first_line(error)}") from error
    print(f"merged model in {output_dir}")
    if config.push_to_hub:
        print(f"uploaded to {push(output_dir, repo, config.hub_private_repo)}")


def check_is_free(folder: Path) -> None:
    """Raise InputError unless the folder is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output_dir {folder} already exists and is not empty: choose another folder")


def load_with_adapter(config: MergeConfig, load_in_4bit: bool):
    """The adapter on its base; raises InputError."""
    return load_adapter(load_base_for(config, load_in_4bit), config.adapter, is_trainable=False).eval()


def sample_rows(config: MergeConfig, tokenizer, model_config) -> list[torch.Tensor]:
    """Token ids (1, n) of the rows to compare on, MAX_TOKENS in all."""
    formatting = config.formatting()
    if config.dataset:
        rows = tokenize_source(tokenizer, formatting, RowSource(config.dataset, config.split))
    else:
        located_rows = [
            (f"text {number}", {config.dataset_text_field: text}) for number, text in enumerate(SAMPLE_TEXTS)
        ]
        rows = tokenize_window(located_rows, tokenizer, replace(formatting, row_format="text"))
    context = getattr(model_config, "max_position_embeddings", None) or 512
    rows = cut_rows(rows, min(512, context), model_config.vocab_size)
    sample, room = [], MAX_TOKENS
    for number in range(len(rows)):
        if room < 2:  # a row of one token predicts nothing
            break
        ids, _ = rows[number]
        sample.append(ids[None, :room])
        room -= sample[-1].shape[1]
    return [ids for ids in sample if ids.shape[1] > 1]


def write_model(folder: Path, model, dtype: torch.dtype) -> None:
    """Write the merged weights; raises OSError, before writing any, if the disk has no room for them."""
    sizes = {name: parameter_count(weight) * dtype.itemsize for name, weight in base_parameters(model)}
    check_space(folder, sum(sizes.values()))
    tensors = tqdm(merged_tensors(model), total=len(sizes), desc="merge", unit="tensor")
    write_weights(folder, tensors, sizes, dtype)


def write_settings(
    folder: Path, base_model: str, model_config, architecture: str, dtype: torch.dtype
) -> None:
    """Write the configuration and generation settings of a model's folder."""
    merged_config = copy.deepcopy(model_config)
    if hasattr(merged_config, "quantization_config"):
        del merged_config.quantization_config
    merged_config.dtype = dtype
    merged_config.architectures = [architecture]
    merged_config.save_pretrained(folder)
    add_earlier_rope_names(folder / "config.json")
    with suppress(OSError, ValueError):  # not every model has generation settings, and not all are valid
        GenerationConfig.from_pretrained(base_model).save_pretrained(folder)


def add_earlier_rope_names(path: Path) -> None:
    """Add the settings of rotary embeddings to a config.json under the names that transformers 4 reads.

    Version 4 would silently use default RoPE settings and generate garbage; version 5 reads both.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope:  # none, or several for different layers
        return
    config.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", {key: rope[key] for key in rope if key != "rope_theta"})
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_defaults(folder: Path, settings: dict, dtype: str) -> None:
    """Write what generate.py and evaluate take as defaults: the training's settings, as far as they apply.

    The weights have `dtype`, and are not to be quantized again: that would round away much of the update,
    which the training learned on top of the rounded weights. Without the base there is none to compare. Of an
    adapter that other code trained, nothing is known.
    """
    if settings:
        kept = {name: value for name, value in settings.items() if name != BASE}
        kept |= {"dtype": dtype, "load_in_4bit": False}
        (folder / SETTINGS).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def compare_merged(
    folder: Path,
    references: list[list[Prediction]],
    dtype: torch.dtype,
    autocast: Callable,
    trust_remote_code: bool,
) -> list[Difference]:
    """Load the merged model and measure how far it is from each of the references; raises InputError."""
    rows = [prediction.ids[None] for prediction in references[0]]
    try:
        with tempfile.TemporaryDirectory() as offload_folder:
            merged = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, offload_folder=offload_folder,
                device_map="auto" if torch.cuda.is_available() else None,
                trust_remote_code=trust_remote_code,
            ).eval()  # fmt: skip
            return [
                measure_difference(reference, predict(merged, rows, autocast)) for reference in references
            ]
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # also if there is too little memory
        raise InputError(f"the merged model cannot be loaded and run: {first_line(error)}") from error


def describe_differences(differences: list[Difference], effect: float) -> str:
    """How far the merged model is from the adapter on its base and, if that is another, from the training."""
    merged, *trained = differences
    text = (
        f"perplexity {merged.perplexity:.4f} with the adapter, {merged.other_perplexity:.4f} merged; KL "
        f"divergence {merged.kl:.2e} nats per token (effect of the adapter itself: {effect:.2e})"
    )
    for difference in trained:
        text += (
            f"\nagainst the adapter on the 4-bit base, where it was trained: perplexity "
            f"{difference.perplexity:.4f}, KL divergence {difference.kl:.2e}"
        )
    return text


def check_kl(kl: float, effect: float, max_kl: float) -> None:
    """Raise InputError if the KL divergence exceeds `max_kl`, or a tenth of the adapter's own `effect`."""
    limit = min(max_kl, max(effect / 10, ROUNDING_KL))
    if not kl <= limit:  # also if it is NaN
        raise InputError(
            f"the merged model differs from the adapter on its base: KL divergence {kl:.2e} nats per token, "
            f"limit {limit:.2e} (the smaller of --max_kl {max_kl:g} and a tenth of the adapter's own effect, "
            f"the latter at least {ROUNDING_KL:g}); nothing was saved"
        )


def merged_card(repo: str, base_model: str, adapter: Path, base: str) -> str:
    """The model card, with what the adapter's folder tells about its training; `base` is that of --base."""
    run = read_run_leniently(adapter)
    flags = {name: run.flags[name] for name in CARD_FLAGS if name in run.flags}
    return model_card(repo, base_model, run.datasets, flags, run.metrics, is_merged=True, base=base)


def publish(staging: Path, folder: Path) -> None:
    """Give the finished folder its name."""
    flush_folder(staging)
    if folder.exists():
        folder.rmdir()  # it is empty
    os.rename(staging, folder)


if __name__ == "__main__":
    main()
