"""What a run says: the start screen, the progress bar, metrics.jsonl, and wandb, which can never stop it.

Several runs side by side, as a table and a picture: python -m qlora.run.log outputs/a outputs/b
"""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from qlora.errors import first_line
from qlora.run.files import replace_file
from qlora.run.metrics import FLAGS, whole_lines
from qlora.run.plots import save_lengths, save_loss
from qlora.run.screen import side_by_side


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

    def describe(self, flags: dict, report: dict) -> None:
        """Keep beside metrics.jsonl what was trained: the flags, and a picture of the rows' lengths."""
        self._try(lambda: replace_file(self.path.with_name(FLAGS), json.dumps(flags, indent=2) + "\n"))
        self._try(lambda: save_lengths(report, self.path.with_name("lengths.png")))

    def _try(self, write: Callable[[], None]) -> None:
        """Write what a training can do without."""
        try:
            write()
        except Exception as error:  # pictures can fail in many ways
            self.say(f"{self.path.parent} lacks a picture or its flags ({first_line(error)})")

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

    def evaluation(self, eval_loss: float, samples: list[dict] | None = None, **position: float) -> None:
        """Log a validation line with the perplexity, print it above the bar, and draw the losses so far."""
        perplexity = math.exp(eval_loss) if eval_loss < 700 else math.inf
        self.say(f"step {position['step']}: validation loss {eval_loss:.4f}, perplexity {perplexity:.3f}")
        values = position | {"eval_loss": eval_loss, "eval_perplexity": perplexity}
        if samples:
            self.say(side_by_side(samples))
            values["samples"] = samples
        self._write(values)
        self._try(lambda: save_loss(self.path.parent))

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
            self._try(lambda: save_loss(self.path.parent))
        if self.tracker is not None:
            self.tracker.finish()


def _keep_until(path: Path, step: int, evaluates_again: bool) -> None:
    """Drop the lines that a run that is resumed after `step` writes again."""
    if not path.exists():
        return
    kept = []
    for line, values in whole_lines(path.read_text(errors="replace")):
        is_again = evaluates_again and values["step"] == step and "eval_loss" in values
        if values["step"] <= step and not is_again:
            kept.append(line + "\n")
    replace_file(path, "".join(kept))
