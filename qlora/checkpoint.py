"""Checkpoints from which a run resumes exactly. No pickle: safetensors and JSON only."""

import json
import os
import random
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from qlora.adapter import ADAPTER, check_complete, save_adapter
from qlora.errors import InputError, first_line
from qlora.optim import optimizer_tensors, restore_optimizer

STATE_TENSORS = "training_state.safetensors"
STATE = "training_state.json"


@dataclass
class Progress:
    """How far a run is, and the sums that its next log line averages. Stored whole in a checkpoint."""

    step: int = 0  # optimizer steps done; with the seed, this alone says which rows come next ...
    order: dict = field(default_factory=dict)  # the settings under which that holds
    place: dict | None = None  # ... but with --streaming, where the Place of the last step is needed too
    tokens_seen: int = 0  # without padding
    skipped_steps: int = 0  # steps that were not taken because their loss or gradient was not finite
    window_steps: int = 0
    window_loss: float = 0.0
    window_tokens: int = 0
    window_seconds: float = 0.0
    window_waited: float = 0.0  # seconds of them in which a step waited for its data

    def record(self, loss: float | None, tokens: int, seconds: float, waited: float) -> None:
        """Count one finished step; `loss` is None if it was skipped."""
        self.window_waited += waited
        self.step += 1
        self.tokens_seen += tokens
        self.window_tokens += tokens
        self.window_seconds += seconds
        if loss is None:
            self.skipped_steps += 1
        else:
            self.window_steps += 1
            self.window_loss += loss

    def close_window(self) -> dict[str, float]:
        """The mean loss and speed since the last call, and the totals so far."""
        values = {
            "loss": self.window_loss / self.window_steps if self.window_steps else float("nan"),
            "tokens_per_s": self.window_tokens / self.window_seconds,
            "data_wait": self.window_waited / self.window_seconds,
            "tokens_seen": self.tokens_seen,
            "skipped_steps": self.skipped_steps,
        }
        self.window_steps, self.window_loss, self.window_tokens = 0, 0.0, 0
        self.window_seconds = self.window_waited = 0.0
        return values


def save_checkpoint(
    output_dir: Path,
    model,
    tokenizer,
    settings: dict,
    optimizer,
    scaler,
    names: list[str],
    progress: Progress,
    config: dict,
    keep: int,
) -> Path:
    """Write checkpoint-N for the step in `progress`, then remove all but the newest `keep` (0: keep all).

    The folder gets its name only when it is complete, so a listed checkpoint is a whole one. `names` are the
    trained parameters' names, in the order in which the optimizer's vector holds them; `config` is stored for
    the reader.
    """
    folder = output_dir / f"checkpoint-{progress.step}"
    staging = output_dir / f"checkpoint-{progress.step}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    save_adapter(staging, model, tokenizer, settings)
    tensors = {f"optimizer/{key}": value for key, value in optimizer_tensors(optimizer).items()}
    save_file({**tensors, **_rng_tensors()}, staging / STATE_TENSORS)
    version, numbers, gauss = random.getstate()
    state = {
        "progress": asdict(progress),
        "parameters": names,
        "scaler": scaler.state_dict(),
        "python_rng": [version, list(numbers), gauss],
        "config": config,
    }
    (staging / STATE).write_text(json.dumps(state, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(staging, folder)
    for old in list_checkpoints(output_dir)[:-keep] if keep else []:
        shutil.rmtree(old)
    return folder


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint-N folders of a run, oldest first."""
    found = [
        path for path in output_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()
    ]  # fmt: skip
    return sorted(found, key=_step_of)


def later_checkpoints(output_dir: Path, step: int) -> list[Path]:
    """The checkpoints after `step`: a run that goes on from there leaves them behind."""
    return [path for path in list_checkpoints(output_dir) if _step_of(path) > step]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def replace_later(output_dir: Path, step: int) -> None:
    """Delete what an earlier run saved after `step`: its later checkpoints, and the adapter at its end."""
    for path in later_checkpoints(output_dir, step):
        shutil.rmtree(path)
    (output_dir / ADAPTER).unlink(missing_ok=True)


def find_checkpoint(output_dir: Path, resume_from: str | None) -> Path | None:
    """The checkpoint to resume from; None for a fresh start. Raises InputError if a given path is none."""
    if resume_from is None:
        return None
    if resume_from == "latest":
        newest = next(reversed(list_checkpoints(output_dir)), None)
        if newest is None and (output_dir / ADAPTER).exists():
            raise InputError(
                f"--output_dir {output_dir} holds a finished adapter but no checkpoint to resume from: train "
                "it further by --adapter into another folder, or delete it by --overwrite_output_dir"
            )
        return newest
    if not (Path(resume_from) / STATE).is_file():
        raise InputError(
            f"--resume_from_checkpoint: {resume_from} is no checkpoint folder (it has no {STATE})"
        )
    return Path(resume_from)


def load_checkpoint(folder: Path, model, optimizer, scaler, names: list[str]) -> Progress:
    """Restore everything save_checkpoint wrote; raises InputError if it does not fit this run."""
    try:
        adapter = load_file(folder / ADAPTER)
        tensors = load_file(folder / STATE_TENSORS)
        state = json.loads((folder / STATE).read_text())
    except Exception as error:  # safetensors has its own exception type, json and the file system have theirs
        raise InputError(f"the checkpoint {folder} cannot be read: {error}") from error
    if "config" in state and "parameters" not in state:
        raise InputError(
            f"{folder} was written by an earlier version of this code: go on with that, or train its adapter "
            "further by --adapter into another folder"
        )
    try:
        check_complete(
            set_peft_model_state_dict(model, adapter),
            f"the adapter in {folder} does not fit this run's --lora_target_modules",
        )
    except RuntimeError as error:  # shapes: its message has a line for each tensor
        raise InputError(
            f"the adapter in {folder} has other shapes than this run: {str(error).splitlines()[-1].strip()}"
        ) from error
    try:
        if state["parameters"] != names:
            raise InputError(f"{folder} lists its weights in another order: it is of other library versions")
        restore_optimizer(
            optimizer,
            {
                key.removeprefix("optimizer/"): value
                for key, value in tensors.items()
                if key.startswith("optimizer/")
            },
        )
        if bool(state["scaler"]) != scaler.is_enabled():
            raise InputError(f"{folder} was written with another --dtype: only float16 scales its loss")
        scaler.load_state_dict(state["scaler"])
        _restore_rng(tensors, state["python_rng"])
        return Progress(**state["progress"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder / STATE} or {STATE_TENSORS} is damaged: {first_line(error)}") from error


def _rng_tensors() -> dict[str, torch.Tensor]:
    _, keys, position, has_gauss, gauss = np.random.get_state()
    tensors = {
        "rng/torch": torch.get_rng_state(),
        "rng/numpy_keys": torch.from_numpy(keys.astype(np.int64)),
        "rng/numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


def _restore_rng(tensors: dict[str, torch.Tensor], python_state: list) -> None:
    torch.set_rng_state(tensors["rng/torch"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    position, has_gauss, gauss = tensors["rng/numpy_rest"].tolist()
    np.random.set_state(
        ("MT19937", tensors["rng/numpy_keys"].numpy().astype(np.uint32), int(position), int(has_gauss), gauss)
    )
    version, numbers, python_gauss = python_state
    random.setstate((version, tuple(numbers), python_gauss))
