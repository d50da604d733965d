"""What a run reports as it goes: the progress bar, lines above it, metrics.jsonl, plots, the tracker."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from qlora import ranks
from qlora.errors import InputError, first_line
from qlora.run.files import replace_file
from qlora.run.metrics import FLAGS_FILE, METRICS_FILE, perplexity, read_run_leniently, valid_lines
from qlora.run.plots import save_lengths, save_loss
from qlora.run.screen import side_by_side
from qlora.run.tracker import Wandb
from qlora.speed.memory import GB


class RunLog:
    """A progress bar, and metrics.jsonl in `output_dir`; a tracker gets the same numbers.

    No file that cannot be written ends a run; terminal.command() handles the output streams. Until begin(),
    an earlier run's metrics.jsonl is untouched: a run that fails before that loses nothing.
    """

    def __init__(self, output_dir: Path, total_steps: int, first_step: int, graph_bytes: int = 0):
        self.path = output_dir / METRICS_FILE
        self.first_step = first_step
        self.file = None
        self.has_lines = False  # written by this run
        self.has_lost_lines = False
        self.is_silent = not ranks.is_first()  # one rank writes for all
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=self.is_silent
        )
        self.tracker = None
        self.graph_bytes = graph_bytes  # held by CUDA graphs, which PyTorch does not count

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def track(self, report_to: str, name: str | None, config: dict, is_resumed: bool) -> None:
        """Send the same numbers to wandb, unless `report_to` is none; a resumed run continues its track."""
        if report_to == "wandb" and not self.is_silent:
            folder = self.path.parent
            self.tracker = Wandb(folder, name or folder.name, config, is_resumed)

    def begin(self, repeats_evaluation: bool = False) -> None:
        """Open metrics.jsonl, without the lines of steps that are about to be repeated.

        With `repeats_evaluation`, also without that of the evaluation after `first_step`.
        """
        if self.file is None and not self.is_silent:
            try:
                _keep_until(self.path, self.first_step, repeats_evaluation)
                self.file = open(self.path, "a", buffering=1)  # line-buffered: a kill loses no line
            except OSError as error:
                self._lost_line(error)

    def describe(self, flags: dict, report: dict | None = None) -> None:
        """Open metrics.jsonl, and save next to it what is trained: the flags, and a plot of the data report's
        lengths."""
        self.begin()
        self._try(lambda: replace_file(self.path.with_name(FLAGS_FILE), json.dumps(flags, indent=2) + "\n"))
        if report is not None:
            self._try(lambda: save_lengths(report, self.path.with_name("lengths.png")))

    def _try(self, write: Callable[[], None]) -> None:
        """Write an optional file; a failure is only reported."""
        if self.is_silent:
            return
        try:
            write()
        # Of the disk, or of matplotlib, which may be missing or find no fonts.
        except (OSError, InputError, ImportError, ValueError, RuntimeError, MemoryError) as error:
            self.say(f"a plot or the flags could not be written to {self.path.parent} ({first_line(error)})")

    def step_done(self) -> None:
        self.bar.update()

    def train(self, **values: float) -> None:
        """Log a line of numbers (not tensors), among them loss, learning_rate and tokens_per_s.

        Where there is a GPU, its peak memory is added.
        """
        if torch.cuda.is_available():
            values["peak_memory_gb"] = (torch.cuda.max_memory_allocated() + self.graph_bytes) / GB
        self.bar.set_postfix_str(
            f"loss {values['loss']:.4f}, lr {values['learning_rate']:.2e}, "
            f"{values['tokens_per_s']:,.0f} tokens/s",
            refresh=False,
        )
        self._write_line(values)

    def evaluation(self, eval_loss: float, samples: list[dict] | None = None, **position: float) -> None:
        """Log a validation loss with its perplexity, print both, and draw the losses so far."""
        eval_perplexity = perplexity(eval_loss)
        shown = "none" if eval_perplexity is None else f"{eval_perplexity:.3f}"
        self.say(f"step {position['step']}: validation loss {eval_loss:.4f}, perplexity {shown}")
        values = position | {"eval_loss": eval_loss, "eval_perplexity": eval_perplexity}
        if samples:
            self.say(side_by_side(samples, {"base": "base", "tuned": "tuned"}))
            values["samples"] = samples
        self._write_line(values)
        self._try(lambda: save_loss(self.path.parent))

    def _write_line(self, values: dict) -> None:
        """Append a line to metrics.jsonl; inf and NaN, which JSON lacks, become null."""
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self.begin()  # if that failed before
        try:
            if self.file is not None:
                self.file.write(json.dumps(line) + "\n")
                self.has_lines = True
        except OSError as error:  # the next line is tried again
            self._lost_line(error)
        if self.tracker is not None:
            self.tracker.log(values)

    def _lost_line(self, error: OSError) -> None:
        if not self.has_lost_lines:
            self.say(
                f"{self.path} cannot be written ({first_line(error)}): training continues without its lines"
            )
        self.has_lost_lines = True

    def say(self, text: str) -> None:
        """Print lines above the bar."""
        if self.is_silent:
            return
        self.bar.clear()
        print(text, flush=True)
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()
        if self.file is not None:
            try:
                self.file.close()
            except OSError as error:  # a line was still waiting for space
                self._lost_line(error)
        if self.has_lines:
            self._try(lambda: save_loss(self.path.parent))
        if self.tracker is not None:
            self.tracker.finish()

    def lines(self) -> list[dict]:
        """The lines of metrics.jsonl, as far as it can be read."""
        return read_run_leniently(self.path.parent).metrics


def _keep_until(path: Path, step: int, repeats_evaluation: bool) -> None:
    """Drop the lines that a run resumed after `step` will write again."""
    if not path.exists():
        return
    kept = []
    for line, values in valid_lines(path.read_text(errors="replace")):
        is_repeated = repeats_evaluation and values["step"] == step and "eval_loss" in values
        if values["step"] <= step and not is_repeated:
            kept.append(line + "\n")
    replace_file(path, "".join(kept))
