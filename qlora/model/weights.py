"""A model's files of weights: where they lie, and one tensor of them at a time."""

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from qlora.errors import InputError, first_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def loaded_folder(model: str) -> Path:
    """Where the files of a model lie that has been loaded: a folder itself, or the hub's cache."""
    return Path(model) if Path(model).is_dir() else Path(cached_file(model, "config.json")).parent


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder that are there; raises InputError for a damaged index."""
    names = {SINGLE}
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        try:
            names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / INDEX} is damaged: {error!r}") from error
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


class Weights:
    """The tensors of a model's files by name; each is read when it is asked for."""

    def __init__(self, folder: Path):
        self.files = {}
        for path in weight_files(folder):
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path} cannot be read: {first_line(error)}") from error
            self.files |= dict.fromkeys(file.keys(), file)
        if not self.files:
            raise InputError(f"{folder} has no {SINGLE}, nor the files of a {INDEX}")

    def tensor(self, name: str) -> torch.Tensor:
        """Raises KeyError if there is no tensor of that name."""
        return self.files[name].get_tensor(name)

    def parameters(self) -> int:
        """Number of weights in all."""
        shapes = (torch.Size(file.get_slice(name).get_shape()) for name, file in self.files.items())
        return sum(shape.numel() for shape in shapes)


def fetch_weights(model: str) -> Weights:
    """The weights of a folder or a hub id, downloaded if need be. Raises InputError."""
    if Path(model).is_dir():
        return Weights(Path(model))
    try:
        patterns = ["config.json", SINGLE, INDEX, "model-*.safetensors"]
        return Weights(Path(snapshot_download(model, allow_patterns=patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(f"cannot fetch the weights of '{model}': {first_line(error)}") from error
