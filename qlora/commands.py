"""What the commands for a trained adapter share: their flags as it was trained, and the base it is put on."""

import sys
from functools import partial

import torch

from qlora.config import AdaptedModel, parse_args
from qlora.model.adapter import SETTINGS, check_adapter, check_base, load_settings
from qlora.model.base import load_base
from qlora.run.fingerprint import base_fingerprint


def parse_for_adapter(config_class, argv: list[str] | None = None, program: str | None = None):
    """The command line of a `config_class` with --adapter; what it leaves open is as the adapter was trained.

    Raises InputError if there is no such adapter.
    """
    config = parse_args(config_class, argv, program=program)
    if not config.adapter:
        return config
    check_adapter(config.adapter)
    settings = load_settings(config.adapter)
    if not settings:
        unknown = f"{config.adapter} has no {SETTINGS}: prompts are plain text, or as flags say"
        print(unknown, file=sys.stderr)
        return config
    settings = {name: value for name, value in settings.items() if hasattr(config, name)}
    config = parse_args(config_class, argv, defaults=settings, program=program)
    if getattr(config, "dataset_format", None) == "auto":
        config.dataset_format = settings["dataset_format"]
    return config


def compute_of(config: AdaptedModel) -> tuple:
    """(device, what makes a fresh autocast context) of a command."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, config.dtype)
    return device, partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)


def load_base_of(config: AdaptedModel, in_4bit: bool | None = None):
    """The base of a command, without its adapter; in_4bit: other than --load_in_4bit says. Raises InputError,
    also if the adapter was trained on another base and that is not allowed."""
    device, _ = compute_of(config)
    in_4bit = config.load_in_4bit if in_4bit is None else in_4bit
    base = load_base(
        config.model, getattr(torch, config.dtype), device, in_4bit, config.bnb_4bit_quant_type,
        config.bnb_4bit_use_double_quant, config.trust_remote_code,
    )  # fmt: skip
    if config.adapter and not config.allow_other_base:
        check_base(config.adapter, base_fingerprint(config.model), "--allow_other_base")
    return base
