"""What a run says: the start screen, the progress bar, metrics.jsonl, and wandb, which can never stop it.

Several runs side by side, as a table and a picture: python -m qlora.log outputs/a outputs/b
"""

import argparse
import json
import math
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from qlora.errors import InputError, first_line
from qlora.files import replace_file
from qlora.pictures import compare, save_lengths, save_loss
from qlora.runs import FLAGS, compare_table, read_runs, whole_lines


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


def side_by_side(samples: list[dict]) -> str:
    """Each prompt, and below it the answers of base and tuned model, as far as there are any."""
    lines = []
    for sample in samples:
        lines.append(f"--- {sample['prompt']}")
        lines += [f"{name:>5}: {sample[name].strip()}" for name in ("base", "tuned") if name in sample]
    return "\n".join(lines)


def start_screen(**facts: str) -> str:
    """The facts of a run, one a line."""
    return "\n".join(f"{name:<10}  {value}" for name, value in facts.items())


def compare_runs(folders: list[Path], output: Path) -> None:
    """Print a table over the runs and draw their losses; raises InputError for bad folders and names."""
    if output.suffix != ".png":
        raise InputError(f"--output {output}: the picture is a PNG, its name has to end in .png")
    runs = read_runs(folders)
    print(compare_table(runs))
    try:
        compare(runs, output)
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error.strerror}") from error
    print(f"the losses over the steps: {output}")


def comparison_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m qlora.log", description="Compare runs.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="The --output_dir of a run.")
    parser.add_argument(
        "--output", type=Path, default="compare.png", help="The picture. (default: %(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line; exit code 1 for what the message says, 2 for wrong usage."""
    arguments = comparison_parser().parse_args(argv)
    try:
        compare_runs(arguments.runs, arguments.output)
    except InputError as error:
        sys.exit(f"qlora.log: error: {error}")


if __name__ == "__main__":
    main()
