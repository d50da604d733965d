"""What runs leave in their --output_dir: metrics.jsonl and the flags; and the table that compares them."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from qlora.errors import InputError
from qlora.run.screen import table

FLAGS = "train_config.json"
# These flags say where a run writes and from where it goes on, not what it does.
PLACES = {
    "output_dir", "overwrite_output_dir", "run_name", "report_to", "resume_from_checkpoint", "allow_changes"
}  # fmt: skip


@dataclass
class Run:
    name: str
    metrics: list[dict]  # the lines of metrics.jsonl
    flags: dict  # empty for a run that has left none


def read_runs(folders: list[Path]) -> list[Run]:
    """Read what stands in each --output_dir. Named by its folder, or by its path if a name came twice."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [Run(name, read_metrics(path), read_flags(path)) for name, path in zip(names, folders)]


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl that are whole and have a step; raises InputError if there is none."""
    path = folder / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): is {folder} a run's --output_dir?"
        ) from error
    lines = [values for _, values in whole_lines(text)]
    if not lines:
        raise InputError(f"{path} has no line that can be read")
    return lines


def whole_lines(text: str) -> Iterator[tuple[str, dict]]:
    """(line, its values) of each line of metrics.jsonl that is whole and has a step."""
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        if isinstance(values, dict) and is_number(values.get("step")):
            yield line, values


def read_flags(folder: Path) -> dict:
    path = folder / FLAGS
    try:
        flags = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: remove it to compare without the run's flags") from error
    if not isinstance(flags, dict):
        raise InputError(f"{path} is no JSON object: remove it to compare without the run's flags")
    return flags


def is_number(value) -> bool:
    """Whether a value of a JSON line is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def series(metrics: list[dict], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of all lines in which the value is a finite number."""
    lines = [line for line in metrics if is_number(line.get(name))]
    return [line["step"] for line in lines], [line[name] for line in lines]


def best_evaluation(metrics: list[dict]) -> dict | None:
    """The line with the lowest eval_loss, the first of equal ones."""
    lines = [line for line in metrics if is_number(line.get("eval_loss"))]
    return min(lines, key=lambda line: line["eval_loss"], default=None)


def differing_flags(runs: list[Run]) -> list[str]:
    """The flags that not all runs have the same of; a run that does not know a flag differs in none."""
    known = dict.fromkeys(name for run in runs for name in run.flags if name not in PLACES)
    return [
        name for name in known if len({json.dumps(run.flags[name]) for run in runs if name in run.flags}) > 1
    ]


def compare_table(runs: list[Run]) -> str:
    """A row a run: its name, the flags in which the runs differ, and how it went; empty is what it lacks."""
    flags = differing_flags(runs)
    rows = [
        {"run": run.name}
        | {name: _show_flag(run.flags[name]) if name in run.flags else "" for name in flags}
        | _results(run.metrics)
        for run in runs
    ]
    return table([list(rows[0]), *(list(row.values()) for row in rows)], text_columns=1 + len(flags))


def _show_flag(value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


def _results(metrics: list[dict]) -> dict[str, str]:
    """How a run went: heading -> text. A GB is 2^30 bytes."""
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
