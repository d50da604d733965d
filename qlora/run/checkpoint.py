"""Checkpoints from which a run resumes exactly. No pickle: safetensors and JSON only."""

import json
import random
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlora.errors import InputError, first_line
from qlora.model.adapter import ADAPTER, check_complete, save_adapter
from qlora.optim.optimizer import optimizer_bytes, optimizer_tensors, restore_optimizer
from qlora.run.files import check_space, damage, publish_folder, remove_folder, staged
from qlora.run.progress import Progress

STATE_TENSORS = "training_state.safetensors"
STATE = "training_state.json"
TOKENIZER_BYTES = 2**25  # more than any tokenizer has


def save_checkpoint(
    output_dir: Path,
    model,
    tokenizer,
    settings: dict,
    optimizer,
    scaler,
    names: list[str],
    progress: Progress,
    fingerprint: dict,
    config: dict,
    keep: int,
) -> Path:
    """Write checkpoint-N for the step in `progress`; remove all but the newest `keep` (0: none) and the best.

    The folder gets its name when all of it is on the disk, and nothing is removed before the new one was read
    again: whenever this fails or is killed, the checkpoints that were there are there. `names` are the
    trained parameters' names, in the order in which the optimizer's vector holds them; `config` is stored for
    the reader. Raises OSError, or whatever the libraries that write throw.
    """
    folder = output_dir / f"checkpoint-{progress.step}"
    check_space(output_dir, checkpoint_bytes(optimizer))
    with staged(folder) as staging:
        save_adapter(staging, model, tokenizer, settings)
        tensors = {f"optimizer/{key}": value for key, value in optimizer_tensors(optimizer).items()}
        save_file({**tensors, **random_states()}, staging / STATE_TENSORS)
        version, numbers, gauss = random.getstate()
        state = {
            "progress": asdict(progress),
            "parameters": names,
            "scaler": scaler.state_dict(),
            "python_rng": [version, list(numbers), gauss],
            "fingerprint": fingerprint,
            "config": config,
        }
        (staging / STATE).write_text(json.dumps(state, indent=2) + "\n")
        publish_folder(staging, folder)
    if problem := damage(folder):
        remove_folder(folder)
        raise OSError(f"{folder} was written, but {problem}")
    best = output_dir / f"checkpoint-{progress.best_step}"
    for old in list_checkpoints(output_dir)[:-keep] if keep else []:
        if old != best:
            with suppress(OSError):  # then it stays
                remove_folder(old)
    return folder


def checkpoint_bytes(optimizer) -> int:
    """About what a checkpoint takes on the disk: the adapter, the optimizer's state, the tokenizer."""
    return optimizer_bytes(optimizer) + TOKENIZER_BYTES


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
    try:
        (output_dir / ADAPTER).unlink(missing_ok=True)
        for path in later_checkpoints(output_dir, step):
            remove_folder(path)
    except OSError as error:
        raise InputError(f"what an earlier run left in {output_dir} cannot be deleted: {error}") from error


def find_checkpoint(output_dir: Path, resume_from: str | None) -> Path | None:
    """The checkpoint to resume from; None for a fresh start.

    "latest" is the newest that is as it was written; those that are not are named and passed over. Raises
    InputError if there are some and all are damaged, or if a given path is no undamaged checkpoint.
    """
    if resume_from is None:
        return None
    if resume_from != "latest":
        if problem := damage(Path(resume_from)):
            raise InputError(f"--resume_from_checkpoint {resume_from} is no whole checkpoint: {problem}")
        return Path(resume_from)
    checkpoints = list_checkpoints(output_dir)
    for checkpoint in reversed(checkpoints):
        if not (problem := damage(checkpoint)):
            return checkpoint
        print(f"{checkpoint} is passed over: {problem}.")
    if checkpoints:
        raise InputError(
            f"--resume_from_checkpoint latest: no checkpoint in {output_dir} is whole; their adapters may "
            "still serve as --adapter, or start again by --overwrite_output_dir"
        )
    if (output_dir / ADAPTER).exists():
        raise InputError(
            f"--output_dir {output_dir} holds a finished adapter but no checkpoint to resume from: train it "
            "further by --adapter into another folder, or delete it by --overwrite_output_dir"
        )
    return None


def load_state(checkpoint: Path) -> dict:
    """What save_checkpoint wrote as JSON, among it the run's fingerprint. Raises InputError."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        return {
            name: state[name] for name in ("progress", "parameters", "scaler", "python_rng", "fingerprint")
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{checkpoint / STATE} cannot be read: {error!r}") from error


def load_checkpoint(folder: Path, model, optimizer, scaler, names: list[str]) -> Progress:
    """Restore everything save_checkpoint wrote; raises InputError if it does not fit this run."""
    state = load_state(folder)
    load_weights(folder, model)
    try:
        tensors = load_file(folder / STATE_TENSORS)
        if state["parameters"] != names:
            raise InputError(f"{folder} lists its weights in another order: it is of other library versions")
        optimizer_state = {
            key.removeprefix("optimizer/"): value
            for key, value in tensors.items()
            if key.startswith("optimizer/")
        }
        restore_optimizer(optimizer, optimizer_state)
        if state["scaler"] and scaler.is_enabled():  # only float16 has one
            scaler.load_state_dict(state["scaler"])
        version, numbers, gauss = state["python_rng"]
        random.setstate((version, tuple(numbers), gauss))
        restore_random_states(tensors)
        return Progress(**state["progress"] | {"skipped_in_a_row": 0})  # whoever resumes has seen to them
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder} does not fit this version of the code: {first_line(error)}") from error


def load_weights(folder: Path, model) -> None:
    """Put a checkpoint's LoRA weights into the model; raises InputError if they are not its own."""
    try:
        adapter = load_file(folder / ADAPTER)
        check_complete(
            set_peft_model_state_dict(model, adapter),
            f"the adapter in {folder} does not fit this run's --lora_target_modules",
        )
    except (OSError, SafetensorError) as error:
        raise InputError(f"the adapter in {folder} cannot be read: {first_line(error)}") from error
    except RuntimeError as error:  # shapes: its message has a line for each tensor
        raise InputError(
            f"the adapter in {folder} has other shapes than this run: {str(error).splitlines()[-1].strip()}"
        ) from error


def random_states() -> dict[str, torch.Tensor]:
    """NumPy's and PyTorch's random states."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    tensors = {
        "rng/torch": torch.get_rng_state(),
        "rng/numpy_keys": torch.from_numpy(keys.astype(np.int64)),
        "rng/numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_random_states(tensors: dict[str, torch.Tensor]) -> None:
    """Put back what random_states gave."""
    torch.set_rng_state(tensors["rng/torch"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    position, has_gauss, gauss = tensors["rng/numpy_rest"].tolist()
    np.random.set_state(
        ("MT19937", tensors["rng/numpy_keys"].numpy().astype(np.uint32), int(position), int(has_gauss), gauss)
    )
