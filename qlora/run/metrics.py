"""A run's records in its --output_dir, metrics.jsonl and the flags, and a table that compares runs."""

import json
import math
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from qlora.errors import InputError
from qlora.run.screen import table

METRICS_FILE, FLAGS_FILE = "metrics.jsonl", "train_config.json"


@dataclass
class Run:
    """The records of one run."""

    name: str
    metrics: list[dict]  # the lines of metrics.jsonl
    flags: dict  # empty if the run has left none

    @property
    def datasets(self) -> list[str]:
        """What --dataset names."""
        names = self.flags.get("dataset")
        return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def read_runs(folders: list[Path]) -> list[Run]:
    """The records in each --output_dir. Raises InputError for a file that is missing or corrupt.

    Runs are named after their folders, or by their paths if two folders have the same name.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [Run(name, read_metrics(folder), read_flags(folder)) for name, folder in zip(names, folders)]


def read_run_leniently(folder: Path) -> Run:
    """The records in an --output_dir; those that are missing or corrupt are empty."""
    run = Run(folder.resolve().name, metrics=[], flags={})
    with suppress(InputError):
        run.flags = read_flags(folder)
    with suppress(InputError):
        run.metrics = read_metrics(folder)
    return run


def read_metrics(folder: Path) -> list[dict]:
    """The valid lines of metrics.jsonl; raises InputError if there are none."""
    path = folder / METRICS_FILE
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(
            f"cannot read {path} ({error.strerror}): is {folder} the --output_dir of a run?"
        ) from error
    lines = [values for _, values in valid_lines(text)]
    if not lines:
        raise InputError(f"{path} has no valid line")
    return lines


def valid_lines(text: str) -> Iterator[tuple[str, dict]]:
    """(line, its values) of each line of metrics.jsonl that is a JSON object with a step."""
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # truncated when the run was killed
            continue
        if isinstance(values, dict) and is_finite_number(values.get("step")):
            yield line, values


def read_flags(folder: Path) -> dict:
    """The run's flags, {} if it has left none; raises InputError if the file is corrupt."""
    path = folder / FLAGS_FILE
    try:
        flags = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: delete it to compare without this run's flags") from error
    if not isinstance(flags, dict):
        raise InputError(f"{path} is not a JSON object: delete it to compare without this run's flags")
    return flags


def is_finite_number(value) -> bool:
    """Whether a JSON value is a finite number; a boolean is not one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def perplexity(loss: float) -> float | None:
    """exp(loss); None where that is no finite number, which JSON cannot hold: for NaN, infinity, overflow."""
    return math.exp(loss) if loss < 700 else None  # false for NaN; exp overflows above 709


def series(metrics: list[dict], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of all lines in which the value is a finite number."""
    lines = [line for line in metrics if is_finite_number(line.get(name))]
    return [line["step"] for line in lines], [line[name] for line in lines]


def best_evaluation(metrics: list[dict]) -> dict | None:
    """The line with the lowest eval_loss; the first one, if several are equal."""
    lines = [line for line in metrics if is_finite_number(line.get("eval_loss"))]
    return min(lines, key=lambda line: line["eval_loss"], default=None)


def differing_flags(runs: list[Run], ignored: Collection[str]) -> list[str]:
    """The flags in which the runs differ, except the `ignored` ones.

    A run that has no record of a flag, because it is older than the flag, does not differ in it.
    """
    names = dict.fromkeys(name for run in runs for name in run.flags if name not in ignored)
    return [
        name for name in names if len({json.dumps(run.flags[name]) for run in runs if name in run.flags}) > 1
    ]


def compare_table(runs: list[Run], ignored: Collection[str]) -> str:
    """One row per run: name, the flags in which the runs differ, results. Missing values are empty."""
    flags = differing_flags(runs, ignored)
    rows = [
        {"run": run.name}
        | {name: _flag_text(run.flags[name]) if name in run.flags else "" for name in flags}
        | _results(run.metrics)
        for run in runs
    ]
    return table([list(rows[0]), *(list(row.values()) for row in rows)], text_columns=1 + len(flags))


def _flag_text(value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


def _results(metrics: list[dict]) -> dict[str, str]:
    """The results of a run: column heading -> text. A GB is 2^30 bytes."""
    _, losses = series(metrics, "loss")
    _, rates = series(metrics, "tokens_per_s")
    _, peaks = series(metrics, "peak_memory_gb")
    _, skipped = series(metrics, "skipped_steps")
    best = best_evaluation(metrics)
    _, perplexities = series([best] if best else [], "eval_perplexity")
    return {
        "steps": str(metrics[-1]["step"]),
        "loss": f"{losses[-1]:.4f}" if losses else "",
        "best eval_loss": f"{best['eval_loss']:.4f}" if best else "",
        "perplexity": f"{perplexities[0]:.3f}" if perplexities else "",
        "at step": str(best["step"]) if best else "",
        "tokens/s": f"{median(rates):,.0f}" if rates else "",
        "peak GB": f"{max(peaks):.2f}" if peaks else "",
        "skipped": str(skipped[-1]) if skipped else "",
    }
