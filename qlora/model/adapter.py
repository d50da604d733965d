"""The LoRA adapter: put on the base, loaded, saved, and what is kept beside it for generate.py."""

import json
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors import SafetensorError
from transformers.pytorch_utils import Conv1D

from qlora.errors import InputError, first_line
from qlora.run.files import make_durable, staged

ADAPTER = "adapter_model.safetensors"
SETTINGS = "generate_defaults.json"
BASE = "base_fingerprint"  # its name among the settings

# Flags that must be as they were in training, or answers get worse and losses others.
KEPT_FLAGS = (
    "dtype", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "dataset_format",
    "dataset_text_field",
)  # fmt: skip
KEPT_FOR_EVALUATION = "completion_only_loss", "max_length", "validation_seed"


def add_adapter(
    base, r: int, alpha: int, dropout: float, target_modules: list[str], use_rslora: bool, use_dora: bool
):
    """Freeze the base and add a fresh float32 LoRA adapter; seed first, its A matrices are random."""
    targets = "all-linear" if target_modules == ["all-linear"] else target_modules
    linear = [name for name, module in base.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    for target in target_modules if targets != "all-linear" else []:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise InputError(
                f"--lora_target_modules: this model has no linear layer named {target!r}; it has {known}"
            )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise InputError(f"PEFT cannot put LoRA on these layers: {first_line(error)}") from error


def lora_settings(model) -> dict:
    """The flags of the LoRA adapter that the model has, wherever it came from."""
    config = model.peft_config["default"]
    targets = config.target_modules  # names, or of some adapters a regular expression
    return {
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_target_modules": targets if isinstance(targets, str) else sorted(targets),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }


def check_adapter(adapter: str) -> None:
    """Raise InputError, before anything is loaded, if `adapter` is no LoRA adapter folder or hub id."""
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (ValueError, OSError, TypeError, KeyError) as error:  # also of a kind that this PEFT does not know
        raise InputError(
            f"--adapter {adapter} is no adapter folder with an adapter_config.json, nor one on the hub: "
            f"{first_line(error)}"
        ) from error
    if config.peft_type != "LORA":
        raise InputError(f"--adapter {adapter} is of type {config.peft_type}, not LoRA")
    if adapter_file(adapter, ADAPTER) is None:
        raise InputError(f"--adapter {adapter} has no {ADAPTER}")


def load_adapter(base, adapter: str, is_trainable: bool):
    """Put a saved LoRA adapter on the base, float32; raises InputError if it does not belong to it."""
    try:
        # Where check_adapter has fetched it to: the hub is not asked again.
        folder = str(adapter_file(adapter, ADAPTER).parent)
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = not is_trainable
        config.base_model_name_or_path = None  # PEFT would warn of another spelling of the base's name
        model = get_peft_model(base, config)
        loaded = model.load_adapter(folder, "default", is_trainable=is_trainable)
    except SafetensorError as error:
        raise InputError(f"cannot load an adapter from {adapter}: {first_line(error)}") from error
    # Layers that the base has not, tensors of other shapes, ways to start LoRA that 4-bit layers do not know.
    except (ValueError, RuntimeError, TypeError, KeyError, ImportError) as error:
        raise InputError(f"the adapter {adapter} does not fit this model: {first_line(error)}") from error
    check_complete(loaded, f"the adapter {adapter} does not fit this model")
    return model


def check_complete(loaded, problem: str) -> None:
    """Raise InputError, beginning with `problem`, if loading adapter weights left some over or some out.

    `loaded` is what set_peft_model_state_dict returns. PEFT itself goes on with a part of an adapter.
    """
    missing = [key for key in loaded.missing_keys if "lora_" in key]
    if missing:
        raise InputError(f"{problem}: it lacks {missing[0]}")
    if loaded.unexpected_keys:
        raise InputError(f"{problem}: it has {loaded.unexpected_keys[0]}, the model has no such layer")


def save_adapter(folder: Path, model, tokenizer, settings: dict) -> None:
    """Write a folder that PEFT and generate.py load: adapter, tokenizer, and kept_settings' `settings`."""
    # save_embedding_layers: "auto" would ask the hub for the base's vocabulary; nothing here resizes it.
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's model card is an empty form
    tokenizer.save_pretrained(folder)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def save_final_adapter(output_dir: Path, model, tokenizer, settings: dict, card: str) -> None:
    """Save the adapter and its model card straight into `output_dir`, each file replaced as a whole, the
    weights last."""
    with staged(output_dir / "adapter") as staging:
        save_adapter(staging, model, tokenizer, settings)
        (staging / "README.md").write_text(card, encoding="utf-8")
        make_durable(staging)
    (output_dir / "chat_template.jinja").unlink(missing_ok=True)  # an earlier run's would outlive it
    shutil.rmtree(output_dir / "additional_chat_templates", ignore_errors=True)
    for file in sorted(staging.iterdir(), key=lambda file: file.name == ADAPTER):
        os.replace(file, output_dir / file.name)
    staging.rmdir()


def kept_settings(config, row_format: str, max_length: int, base: str) -> dict:
    """The settings of a training that later commands take over, with the row format that was recognised, the
    length that was chosen, and the fingerprint of the base."""
    kept = {name: getattr(config, name) for name in KEPT_FLAGS}
    kept |= {"completion_only_loss": config.completion_only_loss, "validation_seed": config.seed}
    return kept | {"dataset_format": row_format, "max_length": max_length, BASE: base}


def load_settings(adapter: str) -> dict:
    """The flags that kept_settings gave when the adapter was saved; {} if other code trained it. Raises
    InputError."""
    settings = _settings(adapter)
    return {name: settings[name] for name in KEPT_FLAGS + KEPT_FOR_EVALUATION if name in settings}


def check_base(adapter: str, base: str, flag: str) -> None:
    """Raise InputError, naming the `flag` that allows it, if an adapter was trained on another base.

    `base` is the fingerprint of the one that it is put on. Not every adapter knows its own.
    """
    if _settings(adapter).get(BASE, base) != base:
        raise InputError(
            f"--adapter {adapter} was trained on another base than --model: on this one its answers would be "
            f"worse; give the right one, or accept this one by {flag}"
        )


def _settings(adapter: str) -> dict:
    path = adapter_file(adapter, SETTINGS)
    if path is None:
        return {}
    try:
        settings = json.loads(path.read_text())
        if missing := set(KEPT_FLAGS) - set(settings):
            raise KeyError(*missing)
        return settings
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error!r}") from error


def adapter_file(adapter: str, name: str) -> Path | None:
    """A file of an adapter folder or hub repository that check_adapter has found; None if it is not there."""
    if Path(adapter).is_dir():
        path = Path(adapter) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(adapter, name))
    except EntryNotFoundError:  # also where the hub cannot be reached and the cache lacks it
        return None
