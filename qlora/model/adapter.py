"""The LoRA adapter: added to the base, loaded, saved. The only module that knows PEFT's file format."""

import json
import warnings
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from qlora.errors import InputError, first_line
from qlora.model.tokenizer import save_tokenizer

ADAPTER = "adapter_model.safetensors"
SETTINGS = "generate_defaults.json"
BASE = "base_fingerprint"  # its name among the settings
HELD_OUT = "held_out_rows"  # likewise; it is long, so it goes to a file of its own
HELD_OUT_FILE = f"{HELD_OUT}.json"


def add_adapter(
    base, r: int, alpha: int, dropout: float, target_modules: list[str], use_rslora: bool, use_dora: bool
):
    """Freeze the base and add a new float32 LoRA adapter. Seed first: its A matrices are random."""
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
        return _get_peft_model(base, config)
    except ValueError as error:
        raise InputError(f"PEFT cannot put LoRA on these layers: {first_line(error)}") from error


def lora_settings(model) -> dict:
    """The model's LoRA settings by the names of our flags, wherever its adapter came from."""
    config = model.peft_config["default"]
    targets = config.target_modules  # names or, in some adapters, a regular expression
    return {
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_target_modules": targets if isinstance(targets, str) else sorted(targets),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }


def check_adapter(adapter: str) -> None:
    """Raise InputError, before anything is loaded, if `adapter` is not a LoRA adapter (folder or hub id)."""
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (ValueError, OSError, TypeError, KeyError) as error:  # also for types that this PEFT does not know
        raise InputError(
            f"--adapter {adapter} is no adapter folder with an adapter_config.json, nor one on the hub: "
            f"{first_line(error)}"
        ) from error
    if config.peft_type != "LORA":
        raise InputError(f"--adapter {adapter} is of type {config.peft_type}, not LoRA")
    if adapter_file(adapter, ADAPTER) is None:
        raise InputError(f"--adapter {adapter} has no {ADAPTER}")


def load_adapter(base, adapter: str, is_trainable: bool):
    """Put a saved LoRA adapter on the base, in float32; raises InputError if it does not belong to it."""
    try:
        # The folder to which check_adapter() downloaded it: the hub is not asked again.
        folder = str(adapter_file(adapter, ADAPTER).parent)
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = not is_trainable
        config.base_model_name_or_path = None  # PEFT would warn of a different spelling of the base's name
        model = _get_peft_model(base, config)
        loaded = model.load_adapter(folder, "default", is_trainable=is_trainable)
    except SafetensorError as error:
        raise InputError(f"cannot load an adapter from {adapter}: {first_line(error)}") from error
    # Layers missing from the base, tensors of other shapes, LoRA initializations that 4-bit layers lack.
    except (ValueError, RuntimeError, TypeError, KeyError, ImportError) as error:
        raise InputError(f"the adapter {adapter} does not fit this model: {first_line(error)}") from error
    _check_complete(loaded, f"the adapter {adapter} does not fit this model")
    return model


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's LoRA weights, for set_weights(). Raises InputError."""
    try:
        return load_file(folder / ADAPTER)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the adapter in {folder} cannot be read: {first_line(error)}") from error


def set_weights(model, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Give the model the LoRA weights read from `folder`; raises InputError if they do not fit."""
    try:
        loaded = set_peft_model_state_dict(model, weights)
    except RuntimeError as error:  # shapes: its message has a line for each tensor
        raise InputError(
            f"the adapter in {folder} has other shapes than this run: {str(error).splitlines()[-1].strip()}"
        ) from error
    _check_complete(loaded, f"the adapter in {folder} does not fit this run's --lora_target_modules")


def save_adapter(folder: Path, model, tokenizer, settings: dict) -> None:
    """Write a folder that PEFT and generate.py can load: adapter, tokenizer, settings, held-out rows if any.

    The tokenizer asks in the row format that the settings name. Raises OSError or SafetensorError if the
    folder cannot be written.
    """
    # save_embedding_layers: "auto" would ask the hub for the base's vocabulary; nothing here resizes it.
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's model card is an empty form
    save_tokenizer(folder, tokenizer, settings.get("dataset_format"))
    others = {name: value for name, value in settings.items() if name != HELD_OUT}
    (folder / SETTINGS).write_text(json.dumps(others, indent=2) + "\n")
    if HELD_OUT in settings:
        (folder / HELD_OUT_FILE).write_text(json.dumps(settings[HELD_OUT]) + "\n")


def load_settings(adapter: str) -> dict:
    """The settings saved with an adapter; {} if other code trained it. Raises InputError."""
    return _load_json(adapter, SETTINGS)


def load_held_out(adapter: str) -> tuple[float, list[list[int]]]:
    """(--validation_split, hashes of the held-out rows of each dataset) of an adapter's training.

    Raises InputError if they are not known.
    """
    record = _load_json(adapter, HELD_OUT_FILE)
    if not record:
        raise InputError(
            f"--validation_split: {adapter} has no {HELD_OUT_FILE}: its training held no rows out of "
            "--dataset, or the file is still in the training's --output_dir (it is not uploaded)"
        )
    try:
        return record["validation_split"], record["row_hashes"]
    except KeyError as error:
        raise InputError(f"{HELD_OUT_FILE} of {adapter} is corrupt: it has no {error}") from error


def _load_json(adapter: str, name: str) -> dict:
    """A JSON file that save_adapter() has written; {} if the adapter has none. Raises InputError."""
    path = adapter_file(adapter, name)
    if path is None:
        return {}
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is corrupt: {error!r}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} is corrupt: it is not a JSON object")
    return settings


def check_base(adapter: str, base: str, flag: str) -> None:
    """Raise InputError, naming the `flag` that allows it, if an adapter was trained on another base.

    `base` is the fingerprint of the base that it is put on. Not every adapter knows its own.
    """
    if load_settings(adapter).get(BASE, base) != base:
        raise InputError(
            f"--adapter {adapter} was trained on another base than --model, on which its answers would be "
            f"worse: give the right one, or accept this one with {flag}"
        )


def adapter_file(adapter: str, name: str) -> Path | None:
    """A file of an adapter folder or hub repository that check_adapter() has found; None if it is missing."""
    if Path(adapter).is_dir():
        path = Path(adapter) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(adapter, name))
    except EntryNotFoundError:  # also if the hub cannot be reached and the cache lacks the file
        return None


def saved_chat_template(source: str) -> str | dict[str, str] | None:
    """The chat template saved with an adapter or a model, several by name, or None. Raises InputError."""
    template = adapter_file(source, "chat_template.jinja")
    named = {}
    if Path(source).is_dir():
        for path in sorted((Path(source) / "additional_chat_templates").glob("*.jinja")):
            named[path.stem] = path.read_text(encoding="utf-8")
    if template is not None:
        text = template.read_text(encoding="utf-8")
        return {"default": text, **named} if named else text
    path = adapter_file(source, "tokenizer_config.json")  # where earlier versions of transformers put it
    try:
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path else None
    except ValueError as error:
        raise InputError(f"{path} is corrupt: {error!r}") from error
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    return named or template


def _get_peft_model(base, config):
    with warnings.catch_warnings():  # PEFT still uses a name that transformers is about to drop
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(base, config)


def _check_complete(loaded, problem: str) -> None:
    """Raise InputError, beginning with `problem`, if adapter weights were missing or left over.

    `loaded` is what set_peft_model_state_dict() returns. PEFT itself accepts a part of an adapter.
    """
    missing = [key for key in loaded.missing_keys if "lora_" in key]
    if missing:
        raise InputError(f"{problem}: it lacks {missing[0]}")
    if loaded.unexpected_keys:
        raise InputError(f"{problem}: it has {loaded.unexpected_keys[0]}, the model has no such layer")
