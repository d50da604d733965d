"""wandb, which can never stop a run."""

import os
import threading
from pathlib import Path

from tqdm import tqdm

from qlora.errors import first_line


class Wandb:
    """A wandb run; whatever goes wrong with it costs one warning and the tracking, never the training."""

    def __init__(self, output_dir: Path, name: str, config: dict, is_resumed: bool, seconds: float = 30):
        self.seconds = seconds  # longest wait for an answer; at the start and at the end it may come to that
        self.run = self._guard(
            "start", _start_wandb, output_dir / "wandb_run_id", name, config, is_resumed, seconds
        )

    def log(self, values: dict) -> None:
        if self.run is not None:
            self._guard("log", _log_wandb, self.run, values)

    def finish(self) -> None:
        if self.run is not None:
            self._guard("finish", self.run.finish)

    def _guard(self, what: str, call, *arguments):
        """Return what the call returns; if it fails or takes too long, warn and stop tracking."""
        results, failures = [], []

        def guarded():
            try:
                results.append(call(*arguments))
            except BaseException as error:  # wandb's client also raises SystemExit and KeyboardInterrupt
                failures.append(first_line(error))

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        thread.join(self.seconds + 5)
        if results:
            return results[0]
        reason = failures[0] if failures else "no answer"
        tqdm.write(
            f"wandb could not {what} ({reason}): training goes on without it, metrics.jsonl has all numbers"
        )
        self.run = None


def _start_wandb(id_file: Path, name: str, config: dict, is_resumed: bool, seconds: float):
    """Start a run in the project $WANDB_PROJECT (default: qlora), or continue the one of `id_file`."""
    import wandb

    if os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        wandb.login(prompt=False)  # raises without a key, instead of asking a terminal that nobody watches
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "qlora"),
        name=name,
        config=config,
        resume="allow",
        id=id_file.read_text() if is_resumed and id_file.exists() else None,
        settings=wandb.Settings(init_timeout=seconds),
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
