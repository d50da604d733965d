"""Stopping early, with a checkpoint: signals, the time limit, out of memory, bad rows deep in a stream."""

import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import torch

from qlora import ranks
from qlora.data.loader import WaitStopped
from qlora.errors import InputError, first_line
from qlora.run.checkpoint import Checkpoints, list_checkpoints
from qlora.speed.memory import is_out_of_memory

SIGNALS = [signal.SIGTERM, signal.SIGINT]
if hasattr(signal, "SIGHUP"):  # the terminal is gone; not on Windows
    SIGNALS.append(signal.SIGHUP)
ECHO_SECONDS = 5  # within these, ranks take a second signal for the first one again
OUT_OF_TIME = 124  # exit code, as timeout(1) has it
NOTHING_DONE = "no step was completed, so the same command starts from the same point"
NOTHING_SAVED = "no checkpoint could be saved, so all steps of this run are LOST"


class Stop:
    """Whether the run has to stop early: a signal has arrived, or its time is up.

    Signals are caught while the context is entered; a second one exits at once.
    """

    def __init__(self, max_hours: float | None):
        self.deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self.has_progressed = False
        self.signal = None  # the first that this process has received
        self.signalled = 0.0  # when, by time.monotonic()
        self.exit_code = 0  # of all ranks, once one of them has to stop
        self.handlers_before = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored signals stay ignored
                    self.handlers_before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        if self.signal is not None:
            # A scheduler signals torchrun and its processes alike, and torchrun passes on what it gets.
            if ranks.count() == 1 or time.monotonic() - self.signalled > ECHO_SECONDS:
                os._exit(128 + number)
            return
        self.signal, self.signalled = number, time.monotonic()
        if not ranks.is_first():
            return
        # Not print(): the handler may have interrupted one.
        name = signal.Signals(number).name
        text = f"\n{name}: saving a checkpoint after this step; send it again to exit at once\n"
        with suppress(OSError):  # the terminal may be gone
            os.write(2, text.encode())

    def step_done(self) -> None:
        """Record that a step was taken. No run times out before its first one, so that a run that is resumed
        again and again makes progress."""
        self.has_progressed = True

    def is_due(self) -> bool:
        """Whether to stop at the next step boundary. All ranks have to ask, and get the same answer."""
        self.exit_code = ranks.maximum(self._own_code())
        return self.exit_code > 0

    def has_reason(self) -> bool:
        """Whether this process has a reason to stop, of which others may not know yet."""
        return self._own_code() > 0

    def _own_code(self) -> int:
        """The exit code with which this process would stop; 0 if it has no reason to."""
        is_late = self.deadline is not None and time.monotonic() >= self.deadline
        if self.signal is not None:
            return 128 + self.signal
        return OUT_OF_TIME if is_late and self.has_progressed else 0

    def exit(self, checkpoints: Checkpoints, say: Callable[[str], None]) -> NoReturn:
        """Say how to resume, and raise SystemExit with the exit code of the reason. All ranks call it."""
        ranks.any_true(False)  # the first has saved: once one has left, torchrun ends the others
        if not ranks.is_first():  # which alone knows what is saved
            sys.exit(self.exit_code)
        by_time = self.exit_code == OUT_OF_TIME
        reason = "--max_hours" if by_time else signal.Signals(self.exit_code - 128).name
        after = f"{reason} after step {checkpoints.progress.step}"
        remedy = "Resume with --resume_from_checkpoint latest"
        if checkpoints.is_saved(checkpoints.progress.step):
            say(f"stopped by {after}: checkpoint-{checkpoints.progress.step} is complete. {remedy}")
        elif not self.has_progressed:
            say(f"stopped by {reason}: {NOTHING_DONE}")
        elif list_checkpoints(checkpoints.output_dir):
            say(f"stopped by {after}: steps since the last checkpoint are LOST. {remedy}")
        else:
            say(f"stopped by {after}: {NOTHING_SAVED}. Start over with --overwrite_output_dir")
        sys.exit(self.exit_code)


class Rescue:
    """A context around the loop, which saves the last complete step before an error ends the run.

    The errors are InputError, of a row deep in a stream for example; the loss of another rank; and running
    out of memory: a step was rehearsed and fits, so something else has taken memory since. Anything else is a
    bug, and keeps its traceback. A run that `stop` ends while it waits for data exits as at a step's end.
    """

    def __init__(
        self, checkpoints: Checkpoints, model, optimizer, say: Callable[[str], None], stop: Stop | None = None
    ):
        self.checkpoints, self.model, self.optimizer, self.say = checkpoints, model, optimizer, say
        self.stop = stop
        self.first_step = checkpoints.progress.step

    def __enter__(self) -> "Rescue":
        return self

    def __exit__(self, kind, error, frames) -> None:
        if self.stop is not None and isinstance(error, WaitStopped):
            step = self.checkpoints.progress.step
            if step > self.first_step and not self.checkpoints.is_saved(step):
                self.checkpoints.save(self.say)
            self.stop.exit(self.checkpoints, self.say)
        ran_out = isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error)
        if isinstance(error, RuntimeError) and not ran_out and ranks.is_lost(error):  # in FSDP, for example
            error = ranks.RankLost(ranks.RANK_LOST)
        if not ran_out and not isinstance(error, InputError):
            return
        reason = str(error)
        if ran_out:
            reason = (
                f"out of memory after step {self.checkpoints.progress.step} ({first_line(error)}): has "
                "another process taken some? A restart plans for the memory that is free then; a smaller "
                "--per_device_train_batch_size or --max_length needs less"
            )
            traceback.clear_frames(frames)
        is_told = None if ran_out else error.is_told_elsewhere
        if is_told is None:  # asked before the save, which takes time
            is_told = not ranks.should_print(reason)
        if isinstance(error, ranks.RankLost):
            is_told = is_told and not ranks.is_first()  # who knows where the run resumes
            ranks.abandon()  # or the save might wait for a GPU that waits for the lost rank
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        rescued = InputError(f"{reason} - {self._save()}")
        rescued.is_told_elsewhere = is_told
        raise rescued from error

    def _save(self) -> str:
        """Save the last complete step unless it is saved; returns where the run can be resumed.

        The other ranks need not be there for it. Only the first one can tell what is saved.
        """
        if not ranks.is_first():
            return "--resume_from_checkpoint latest resumes from the last checkpoint"
        step = self.checkpoints.progress.step
        is_new = step > self.first_step and not self.checkpoints.is_saved(step)
        if is_new and not self.checkpoints.save(self.say):
            if not list_checkpoints(self.checkpoints.output_dir):
                return f"{NOTHING_SAVED}; --overwrite_output_dir starts over"
            return "steps since the last checkpoint are LOST; --resume_from_checkpoint latest resumes there"
        if step == self.first_step:
            return NOTHING_DONE
        return f"--resume_from_checkpoint latest resumes after step {step}"
