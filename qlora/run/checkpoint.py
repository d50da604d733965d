"""Checkpoints from which a run resumes exactly. No pickle: safetensors and JSON only."""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlora import ranks
from qlora.errors import InputError, first_line
from qlora.model.adapter import ADAPTER, HELD_OUT_FILE, read_weights, save_adapter, set_weights
from qlora.optim.optimizer import optimizer_bytes, optimizer_tensors, restore_optimizer
from qlora.run.files import check_space, damage, flush_folder, publish_folder, remove_folder, staged
from qlora.run.progress import Progress

STATE_TENSORS = "training_state.safetensors"
STATE = "training_state.json"
TOKENIZER_BYTES = 2**25  # more than any tokenizer takes
# What the writing libraries throw when a disk or memory is full.
WRITE_ERRORS = (OSError, SafetensorError, MemoryError, torch.OutOfMemoryError)


@dataclass
class Checkpoints:
    """What a run saves in its `output_dir`: checkpoint-N folders for an exact resume, the adapter at the end.

    No random state is among it: the loop seeds every micro-batch anew, by its number. Only the first rank
    reads and writes: what it has read it sends to the others, which may not see its disk.

    A checkpoint gets its name once all of it is on disk, and nothing older is deleted before the new one has
    been read back. Whenever a save fails or is killed, existing checkpoints are untouched.

    Construct it after the rehearsal: from then on an optimizer step makes the state torn until the loop calls
    mark_boundary().
    """

    output_dir: Path
    keep: int  # how many of the newest to keep, besides the best; 0 keeps all
    model: torch.nn.Module
    tokenizer: object
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    parameter_names: list[str]  # in the order in which the optimizer's vectors hold them
    settings: dict  # saved with the adapter, for the commands that use it
    fingerprint: dict  # what the training depends on
    config: dict  # for whoever reads a checkpoint
    progress: Progress = field(init=False, default_factory=Progress)
    best_on_disk: tuple[float | None, int | None] = field(init=False, default=(None, None))  # loss, step
    replaced: list[Path] = field(init=False, default_factory=list)  # an earlier run's: this one replaces them
    is_torn: bool = field(init=False)  # the optimizer has begun an update that is not counted yet

    def __post_init__(self):
        self.mark_boundary()
        self.optimizer.register_step_pre_hook(self._mark_torn)

    def start(self, checkpoint: Path | None, total_steps: int, validation: str | None) -> Progress:
        """Restore the run of `checkpoint`, or begin a new one; returns its progress.

        `validation` is the fingerprint of the validation rows. Raises InputError if the checkpoint does not
        fit this run, or if the disk has no room for another one.
        """
        self.progress = self._restore(checkpoint) if checkpoint else Progress()
        self.mark_boundary()
        if ranks.is_first():
            self._check_folder(checkpoint, total_steps, validation)
        self.progress = ranks.from_first(self.progress)
        return self.progress

    def _check_folder(self, checkpoint: Path | None, total_steps: int, validation: str | None) -> None:
        """start() for what depends on the output folder: what is replaced, its room, the best so far."""
        step = self.progress.step
        self.replaced = [path for path in list_checkpoints(self.output_dir) if _step_of(path) > step]
        if step > total_steps or (step == total_steps and self.replaced):
            raise InputError(f"{checkpoint} is at step {step}, and this run has only {total_steps} steps")
        if step < total_steps:
            try:
                check_space(self.output_dir, self._expected_bytes())
            except OSError as error:
                raise InputError(
                    f"--output_dir {self.output_dir} has no room for a checkpoint: {error.strerror}"
                ) from error
        has_best = self.folder(self.progress.best_step).exists()
        self.progress.use_validation(validation, has_best)
        self.best_on_disk = self.progress.best_loss, self.progress.best_step

    def _restore(self, folder: Path) -> Progress:
        """Restore weights, optimizer and scaler; returns the progress."""
        state = ranks.from_first(load_state(folder) if ranks.is_first() else None)
        weights = ranks.tensors_from_first(read_weights(folder) if ranks.is_first() else None)
        set_weights(self.model, weights, folder)
        try:
            tensors = load_file(folder / STATE_TENSORS) if ranks.is_first() else None
            tensors = ranks.tensors_from_first(tensors)
            if state["parameters"] != self.parameter_names:
                raise InputError(
                    f"{folder} lists its weights in another order: it was saved with other library versions "
                    "or optimizer groups"
                )
            optimizer_state = {
                name.removeprefix("optimizer/"): tensor
                for name, tensor in tensors.items()
                if name.startswith("optimizer/")
            }
            restore_optimizer(self.optimizer, optimizer_state)
            if state["scaler"] and self.scaler.is_enabled():  # only float16 has one
                self.scaler.load_state_dict(state["scaler"])
            # Whoever resumes has dealt with the skipped steps.
            return Progress(**state["progress"] | {"skipped_in_a_row": 0})
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{folder} does not fit this version of the code: {first_line(error)}"
            ) from error

    def replace_earlier_run(self) -> None:
        """Delete what an earlier run left: checkpoints after the first step of this one, the final
        adapter."""
        if not ranks.is_first():
            return
        try:
            (self.output_dir / ADAPTER).unlink(missing_ok=True)
            for path in self.replaced:
                remove_folder(path)
        except OSError as error:
            raise InputError(f"the earlier run in {self.output_dir} cannot be deleted: {error}") from error

    def mark_boundary(self) -> None:
        """Mark a boundary between two steps: call it after every update, when it has been counted.

        If the next step fails, the last complete one can still be saved.
        """
        self.is_torn = False

    def _mark_torn(self, *arguments) -> None:
        self.is_torn = True

    def folder(self, step: int | None) -> Path:
        return self.output_dir / f"checkpoint-{step}"

    def is_saved(self, step: int | None) -> bool:
        return damage(self.folder(step)) is None

    def save(self, say: Callable[[str], None]) -> bool:
        """Save the last complete step; returns whether it is on disk. A failure does not end the run.

        Impossible in the middle of an update, when some weights are new: never between two steps, but an
        error may have ended one.
        """
        if not ranks.is_first():
            return True
        if self.is_torn:
            say(f"step {self.progress.step + 1} failed in the middle of its update: it cannot be saved")
            return False
        try:
            check_space(self.output_dir, self._expected_bytes())
            self._write(self.folder(self.progress.step))
        except WRITE_ERRORS as error:
            if not self.is_saved(self.progress.best_step):
                self.progress.best_loss, self.progress.best_step = self.best_on_disk
            say(f"step {self.progress.step}: no checkpoint could be saved ({first_line(error)})")
            return False
        self.best_on_disk = self.progress.best_loss, self.progress.best_step
        best = self.folder(self.progress.best_step)
        for old in list_checkpoints(self.output_dir)[: -self.keep] if self.keep else []:
            if old != best:
                with suppress(OSError):  # then it stays
                    remove_folder(old)
        return True

    def _write(self, folder: Path) -> None:
        with staged(folder) as staging:
            save_adapter(staging, self.model, self.tokenizer, self.settings)
            tensors = {
                f"optimizer/{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()
            }
            save_file(tensors, staging / STATE_TENSORS)
            state = {
                "progress": asdict(self.progress),
                "parameters": self.parameter_names,
                "scaler": self.scaler.state_dict(),
                "fingerprint": self.fingerprint,
                "config": self.config,
            }
            (staging / STATE).write_text(json.dumps(state, indent=2) + "\n")
            publish_folder(staging, folder)
        if problem := damage(folder):
            remove_folder(folder)
            raise OSError(f"{folder} was written, but {problem}")

    def _expected_bytes(self) -> int:
        """About what a checkpoint takes on disk: adapter, optimizer state, tokenizer."""
        return optimizer_bytes(self.optimizer) + TOKENIZER_BYTES

    def load_best(self, say: Callable[[str], None]) -> None:
        """Load the weights of the best checkpoint into the model, unless they are the last step's."""
        step = self.progress.best_step
        if step is None:
            say("there is no best checkpoint: the adapter is that of the last step")
        if step is None or step == self.progress.step:
            return
        if problem := damage(self.folder(step)):
            say(f"{self.folder(step)} was the best, but {problem}: the adapter is that of the last step")
            return
        set_weights(self.model, read_weights(self.folder(step)), self.folder(step))
        say(f"the adapter is that of step {step}, the best: eval_loss {self.progress.best_loss:.4f}")

    def save_final_adapter(self, card: str) -> None:
        """Save the adapter and its model card in `output_dir` itself: each file atomically, the weights last.

        Raises InputError if it cannot be written; the last checkpoint, if there is one, has the adapter then.
        """
        try:
            with staged(self.output_dir / "adapter") as staging:
                save_adapter(staging, self.model, self.tokenizer, self.settings)
                (staging / "README.md").write_text(card, encoding="utf-8")
                flush_folder(staging)
            for name in ("chat_template.jinja", HELD_OUT_FILE):  # an earlier run's would stay
                (self.output_dir / name).unlink(missing_ok=True)
            shutil.rmtree(self.output_dir / "additional_chat_templates", ignore_errors=True)
            for file in sorted(staging.iterdir(), key=lambda file: file.name == ADAPTER):
                os.replace(file, self.output_dir / file.name)
            staging.rmdir()
        except WRITE_ERRORS as error:
            remedy = "there is no checkpoint to save it from. Start over with --overwrite_output_dir"
            if saved := list_checkpoints(self.output_dir):
                remedy = (
                    f"fix that; --resume_from_checkpoint latest resumes from {saved[-1].name} and saves it"
                )
            raise InputError(
                f"the adapter could not be saved in {self.output_dir} ({first_line(error)}): {remedy}"
            ) from error


def load_state(checkpoint: Path) -> dict:
    """The JSON part of a checkpoint, with the fingerprint of its run. Raises InputError."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        return {name: state[name] for name in ("progress", "parameters", "scaler", "fingerprint")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{checkpoint / STATE} cannot be read: {error!r}") from error


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint-N folders of a run, oldest first."""
    folders = [
        path for path in output_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()
    ]  # fmt: skip
    return sorted(folders, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoint(output_dir: Path, resume_from: str | None) -> Path | None:
    """The checkpoint to resume from; None for a fresh start.

    "latest" is the newest whose checksums hold; corrupt ones are named and skipped. Raises InputError if all
    are corrupt, or if a given path is not an intact checkpoint.
    """
    if resume_from is None:
        return None
    if resume_from != "latest":
        if problem := damage(Path(resume_from)):
            raise InputError(f"--resume_from_checkpoint {resume_from} is incomplete or corrupt: {problem}")
        return Path(resume_from)
    checkpoints = list_checkpoints(output_dir)
    for checkpoint in reversed(checkpoints):
        if not (problem := damage(checkpoint)):
            return checkpoint
        print(f"{checkpoint} is skipped: {problem}.")
    if checkpoints:
        raise InputError(
            f"--resume_from_checkpoint latest: all checkpoints in {output_dir} are incomplete or corrupt. "
            "Their adapters may still work with --adapter; --overwrite_output_dir starts over"
        )
    if (output_dir / ADAPTER).exists():
        raise InputError(
            f"--output_dir {output_dir} holds a finished adapter but no checkpoint to resume from: train it "
            "further with --adapter, into another folder, or delete it with --overwrite_output_dir"
        )
    return None
