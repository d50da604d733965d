"""Shared by the commands that use a trained adapter: the training's settings as defaults, and the base."""

import gc
import sys
from functools import partial
from pathlib import Path

import torch

from qlora.config import KEPT_SETTINGS, AdapterFlags
from qlora.errors import InputError
from qlora.flags import parse_args
from qlora.model.adapter import SETTINGS, check_adapter, check_base, load_settings
from qlora.model.base import load_base
from qlora.run.fingerprint import base_fingerprint

# How adapters were trained that lack these settings.
EARLIER_SETTINGS = {"train_on": "all", "split_special_tokens": False}


def parse_for_adapter(config_class, argv: list[str] | None = None, program: str | None = None):
    """Parse the command line into `config_class`; flags that are not given are as in the adapter's training.

    Without an adapter, they are as in that of a merged model, if --model is its folder. Raises InputError if
    the adapter does not exist or the settings are incomplete.
    """
    config = parse_args(config_class, argv, program=program)
    source = config.adapter
    if source:
        check_adapter(source)
    elif config.model and (Path(config.model) / SETTINGS).is_file():
        source = config.model
    else:
        return config
    settings = load_settings(source)
    if not settings:
        print(
            f"{source} has no {SETTINGS}: prompts are plain text unless flags say otherwise", file=sys.stderr
        )
        return config
    settings = EARLIER_SETTINGS | settings
    if missing := [name for name in KEPT_SETTINGS if name not in settings]:
        flag = "--adapter" if config.adapter else "--model"
        raise InputError(f"{SETTINGS} of {flag} {source} is incomplete: {', '.join(missing)}")
    defaults = {name: settings[name] for name in KEPT_SETTINGS if hasattr(config, name)}
    config = parse_args(config_class, argv, defaults=defaults, program=program)
    if getattr(config, "dataset_format", None) == "auto":  # given as a flag: the training found out
        config.dataset_format = settings["dataset_format"]
    return config


def choose_device(dtype: torch.dtype) -> tuple[torch.device, partial]:
    """(device, function that returns a new autocast context in `dtype`)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)


def check_has_original(model: str, model_config) -> None:
    """Raise InputError if the weights from before quantization, for --base original, are not there."""
    if getattr(model_config, "quantization_config", None) is not None:
        raise InputError(f"--base original: {model} is itself quantized, so there are no original weights")


def free_memory() -> None:
    """Give back what deleted models held, before the next one is loaded."""
    gc.collect()
    torch.cuda.empty_cache()


def load_base_for(config: AdapterFlags, load_in_4bit: bool):
    """The base model, still without its adapter.

    Raises InputError, also if the adapter was trained on another base and --allow_other_base is off.
    """
    dtype = getattr(torch, config.dtype)
    device, _ = choose_device(dtype)
    base = load_base(
        config.model, dtype, device, load_in_4bit, config.bnb_4bit_quant_type,
        config.bnb_4bit_use_double_quant, config.trust_remote_code,
    )  # fmt: skip
    if config.adapter and not config.allow_other_base:
        check_base(config.adapter, base_fingerprint(config.model), "--allow_other_base")
    return base
