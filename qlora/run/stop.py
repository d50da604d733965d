"""How a run ends before its end, with a checkpoint: by a signal, a limit of time, an error."""

import gc
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from qlora.errors import InputError, first_line
from qlora.run.checkpoint import random_states, restore_random_states
from qlora.run.files import damage
from qlora.run.progress import Progress
from qlora.speed.plan import is_out_of_memory

SIGNALS = [signal.SIGTERM, signal.SIGINT]
if hasattr(signal, "SIGHUP"):  # the terminal is gone; not on Windows
    SIGNALS.append(signal.SIGHUP)
OUT_OF_TIME = 124  # the exit code, as timeout(1) has it


class Stop:
    """Whether a run should stop, which it asks where it can; true once a signal has come or time is up.

    As a context it catches the signals; a second one leaves at once. `until` is a time.monotonic() or None.
    """

    def __init__(self, until: float | None):
        self.until = until
        self.signal = None
        self.before = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as whoever started this wants it
                    self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        # Not print(): the handler may have interrupted one.
        text = f"\n{signal.Signals(number).name}: this step ends, a checkpoint follows; again: out at once\n"
        with suppress(OSError):  # the terminal may be gone
            os.write(2, text.encode())

    def __bool__(self) -> bool:
        return self.signal is not None or (self.until is not None and time.monotonic() >= self.until)

    @property
    def reason(self) -> str:
        return "--max_hours" if self.signal is None else signal.Signals(self.signal).name

    @property
    def exit_code(self) -> int:
        return OUT_OF_TIME if self.signal is None else 128 + self.signal


class Rescue:
    """As a context: what ends the loop by one line first ends in a checkpoint of the last whole step.

    That is an InputError, as of a row deep in a stream, or an out-of-memory error: the rehearsal has shown
    that a step fits, so something else has taken the memory since.
    """

    def __init__(self, output_dir: Path, model, optimizer, progress: Progress, save: Callable[[], bool]):
        self.output_dir, self.model, self.optimizer = output_dir, model, optimizer
        self.progress, self.save = progress, save
        self.first_step = progress.step
        self.drawn = None  # the random states before the step that is being taken

    def step_begins(self) -> None:
        self.drawn = random_states()

    def step_ends(self) -> None:
        self.drawn = None

    def __enter__(self) -> "Rescue":
        return self

    def __exit__(self, kind, error, frames) -> None:
        is_memory = isinstance(error, RuntimeError) and is_out_of_memory(error)
        if not is_memory and not isinstance(error, InputError):
            return
        reason = str(error)
        if is_memory:
            reason = (
                f"out of memory after step {self.progress.step} ({first_line(error)}): has another process "
                "taken some? A new start plans for what is then free; a smaller "
                "--per_device_train_batch_size or --max_length needs less"
            )
            traceback.clear_frames(frames)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        raise InputError(f"{reason} - {self._save()}") from error

    def _save(self) -> str:
        """Save the last whole step, unless that is done; returns what there is to go on from."""
        if self.drawn is not None:
            restore_random_states(self.drawn)
        step = self.progress.step
        if step > self.first_step and damage(self.output_dir / f"checkpoint-{step}") and not self.save():
            return "the last steps could NOT be saved, --resume_from_checkpoint latest has those before"
        if step == 0:
            return "no step was taken yet"
        return f"--resume_from_checkpoint latest goes on after step {step}"
