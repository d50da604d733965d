"""Tracking with wandb. Whatever goes wrong with it, the training continues."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from tqdm import tqdm

from qlora.errors import first_line


class Wandb:
    """A wandb run. The first call that fails or does not return prints a warning and ends the tracking."""

    def __init__(
        self, output_dir: Path, name: str, config: dict, is_resumed: bool, timeout_seconds: float = 30
    ):
        self.timeout_seconds = timeout_seconds  # for wandb itself; we wait a little longer for its answer
        id_file = output_dir / "wandb_run_id"
        self.run = self._call("start", _start_wandb, id_file, name, config, is_resumed, timeout_seconds)

    def log(self, values: dict) -> None:
        """Log `values` at their "step"; "samples" among them become a table."""
        if self.run is not None:
            self._call("log", _log_wandb, self.run, values)

    def finish(self) -> None:
        """Upload what is left."""
        if self.run is not None:
            self._call("finish", self.run.finish)

    def _call(self, action: str, function: Callable, *arguments):
        """Call the function in a thread and return its result; on failure or timeout, warn and stop tracking.

        The thread is a daemon, because a call that hangs must not keep the process alive.
        """
        outcome = Future()
        threading.Thread(target=_run_into, args=(outcome, function, arguments), daemon=True).start()
        try:
            error = outcome.exception(self.timeout_seconds + 5)  # does not raise it, unlike result()
        except TimeoutError:
            reason = "no answer"
        else:
            if error is None:
                return outcome.result()
            reason = first_line(error)
        tqdm.write(
            f"wandb could not {action} ({reason}): training continues without it, metrics.jsonl has "
            "all numbers"
        )
        self.run = None


def _run_into(outcome: Future, function: Callable, arguments: tuple) -> None:
    try:
        outcome.set_result(function(*arguments))
    except BaseException as error:  # wandb's client also raises SystemExit and KeyboardInterrupt
        outcome.set_exception(error)


def _start_wandb(id_file: Path, name: str, config: dict, is_resumed: bool, timeout_seconds: float):
    """Start a run in the project $WANDB_PROJECT (default: qlora), or continue the one named in `id_file`."""
    import wandb

    if os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        wandb.login(prompt=False)  # without a key it raises, instead of waiting for input
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "qlora"),
        name=name,
        config=config,
        resume="allow",
        id=id_file.read_text() if is_resumed and id_file.exists() else None,
        settings=wandb.Settings(init_timeout=timeout_seconds),
    )
    id_file.write_text(run.id)
    return run


def _log_wandb(run, values: dict) -> None:
    import wandb

    if "samples" in values:
        columns = ["prompt", "base", "tuned"]
        rows = [[sample[name] for name in columns] for sample in values["samples"]]
        values = values | {"samples": wandb.Table(columns=columns, data=rows)}
    run.log(values, values["step"])
