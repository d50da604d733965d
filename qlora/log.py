"""What a run says: the start screen, the progress bar, metrics.jsonl, and wandb, which can never stop it."""

import json
import math
import os
import sys
import threading
from pathlib import Path

import torch
from tqdm import tqdm

from qlora.errors import first_line
from qlora.files import replace_file


class RunLog:
    """A progress bar and metrics.jsonl in `output_dir`; with a tracker, its copy of the same numbers.

    Until begin() an earlier run's metrics.jsonl is left alone: a run that fails before loses nothing.
    """

    def __init__(
        self, output_dir: Path, total_steps: int, first_step: int, tracker=None, graph_bytes: int = 0
    ):
        self.path = output_dir / "metrics.jsonl"
        self.first_step = first_step
        self.file = None
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)
        self.tracker = tracker
        self.graph_bytes = graph_bytes  # held by CUDA graphs, which PyTorch does not count
        self.has_lost = False  # a line that could not be written

    def begin(self, evaluates_again: bool = False) -> None:
        """Open metrics.jsonl, without the lines of steps that are taken again, or with `evaluates_again` of
        the evaluation before them."""
        if self.file is None:
            try:
                _keep_until(self.path, self.first_step, evaluates_again)
                self.file = open(self.path, "a", buffering=1)  # a line at a time: a kill loses none
            except OSError as error:
                self._lost(error)

    def step_done(self) -> None:
        self._show(self.bar.update)

    def train(self, **values: float) -> None:
        """Log a training line; adds the peak memory where there is a card."""
        if torch.cuda.is_available():
            values["peak_memory_gb"] = (torch.cuda.max_memory_allocated() + self.graph_bytes) / 2**30
        self.bar.set_postfix_str(
            f"loss {values['loss']:.4f}, lr {values['learning_rate']:.2e}, "
            f"{values['tokens_per_s']:,.0f} tokens/s",
            refresh=False,
        )
        self._write(values)

    def evaluation(self, eval_loss: float, **position: float) -> None:
        """Log a validation line with the perplexity, and print it above the bar."""
        perplexity = math.exp(eval_loss) if eval_loss < 700 else math.inf
        self.say(f"step {position['step']}: validation loss {eval_loss:.4f}, perplexity {perplexity:.3f}")
        self._write(position | {"eval_loss": eval_loss, "eval_perplexity": perplexity})

    def _write(self, values: dict[str, float]) -> None:
        """Append a line; numbers that JSON does not know (inf, nan) become null."""
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self.begin()  # if that has failed before
        try:
            if self.file is not None:
                self.file.write(json.dumps(line) + "\n")
        except OSError as error:  # the next line is tried again
            self._lost(error)
        if self.tracker is not None:
            self.tracker.log(values)

    def _lost(self, error: Exception) -> None:
        if not self.has_lost:
            self.say(f"{self.path} cannot be written ({first_line(error)}): training goes on, lines are lost")
        self.has_lost = True

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._show(self.bar.write, text)

    def _show(self, call, *arguments) -> None:
        """Do what writes to the terminal, which may go away: a run does not end with it."""
        try:
            call(*arguments)
            sys.stdout.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)

    def close(self) -> None:
        self._show(self.bar.close)
        if self.file is not None:
            try:
                self.file.close()
            except OSError as error:  # a line was still waiting for room
                self._lost(error)
        if self.tracker is not None:
            self.tracker.finish()


class Wandb:
    """A wandb run; whatever goes wrong with it costs one warning and the tracking, never the training."""

    def __init__(self, output_dir: Path, name: str, config: dict, is_resumed: bool, seconds: float = 30):
        self.seconds = seconds  # longest wait for an answer; at the start and at the end it may come to that
        self.run = self._guard(
            "start", _start_wandb, output_dir / "wandb_run_id", name, config, is_resumed, seconds
        )

    def log(self, values: dict) -> None:
        if self.run is not None:
            self._guard("log", self.run.log, values, values["step"])

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


def _keep_until(path: Path, step: int, evaluates_again: bool) -> None:
    """Drop the lines that a run that is resumed after `step` writes again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
            is_again = evaluates_again and values["step"] == step and "eval_loss" in values
        except (ValueError, KeyError):  # a line cut short by a kill
            continue
        if values["step"] <= step and not is_again:
            kept.append(line + "\n")
    replace_file(path, "".join(kept))


def start_screen(**facts: str) -> str:
    """The facts of a run, one a line."""
    return "\n".join(f"{name:<10}  {value}" for name, value in facts.items())
