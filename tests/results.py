"""What a run leaves in its folder, as tests compare it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from qlora.model.adapter import ADAPTER


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / ADAPTER)


def assert_same(left: dict, right: dict) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
