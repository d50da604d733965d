"""The safetensors files of a model: found, read one tensor at a time, written one shard at a time."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

from qlora.errors import InputError, first_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 2 * 2**30  # one shard is held in host memory while it is written


def loaded_folder(model: str) -> Path:
    """The folder of a model that has been loaded: the given folder, or the one in the hub's cache."""
    return Path(model) if Path(model).is_dir() else Path(cached_file(model, "config.json")).parent


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that exist in a model's folder; raises InputError if its index is corrupt."""
    names = {SINGLE}
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        try:
            names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / INDEX} is corrupt: {error!r}") from error
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


class Weights:
    """The tensors in a model's files by name. Each is read when it is asked for."""

    def __init__(self, folder: Path):
        self.files = {}  # tensor name -> open file
        for path in weight_files(folder):
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise InputError(f"cannot read {path}: {first_line(error)}") from error
            self.files |= dict.fromkeys(file.keys(), file)
        if not self.files:
            raise InputError(f"{folder} has neither a {SINGLE} nor the files listed in a {INDEX}")

    def tensor(self, name: str) -> torch.Tensor:
        """Raises KeyError if no tensor has that name."""
        return self.files[name].get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self.files[name].get_slice(name).get_shape())

    def count_parameters(self) -> int:
        """The number of weights in all tensors."""
        shapes = (torch.Size(file.get_slice(name).get_shape()) for name, file in self.files.items())
        return sum(shape.numel() for shape in shapes)


def fetch_weights(model: str) -> Weights:
    """The weights in a folder or of a hub id, downloaded if necessary. Raises InputError."""
    if Path(model).is_dir():
        return Weights(Path(model))
    try:
        patterns = ["config.json", SINGLE, INDEX, "model-*.safetensors"]
        return Weights(Path(snapshot_download(model, allow_patterns=patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(f"cannot download the weights of '{model}': {first_line(error)}") from error


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    sizes: dict[str, int],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write (name, tensor) pairs in `dtype` as safetensors files of at most `shard_bytes`, and their index.

    `sizes` are the bytes of each tensor in `dtype`, in the same order. Only one shard at a time is in host
    memory. A tensor larger than `shard_bytes` gets a file of its own.
    """
    shards, tensors = _split(sizes, shard_bytes), iter(tensors)
    if len(shards) == 1:
        _write_shard(folder / SINGLE, tensors, dtype)
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, islice(tensors, len(names)), dtype)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    """The names in each shard."""
    shards, room = [], 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _write_shard(path: Path, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
    shard = {name: tensor.to(device="cpu", dtype=dtype).contiguous() for name, tensor in tensors}
    save_file(shard, path, metadata={"format": "pt"})
