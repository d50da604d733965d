"""Plots of one run and of several, written atomically.

matplotlib is slow to import, so only the functions that draw import it.
"""

import io
from pathlib import Path

from qlora.run.files import replace_bytes
from qlora.run.metrics import Run, best_evaluation, read_metrics, series

DOTS_PER_INCH = 120


def save_loss(folder: Path) -> None:
    """Plot metrics.jsonl of an --output_dir as its loss.png.

    Raises InputError if metrics.jsonl has no valid line, OSError if the plot cannot be written.
    """
    _save(draw_loss(read_metrics(folder), folder.resolve().name), folder / "loss.png")


def save_lengths(report: dict, path: Path) -> None:
    """Plot the histogram of row lengths in a data report, with --max_length as a line; raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in ("train", "validation"):
        if name in report:
            histogram = report[name]["histogram"]
            axes.stairs(histogram["rows"], histogram["edges"], label=name, fill=name == "train", alpha=0.8)
    axes.axvline(
        report["max_length"], color="black", linestyle="--", label=f"--max_length {report['max_length']}"
    )
    axes.set(xlabel="tokens per row", ylabel="rows", title="Row lengths")
    axes.legend()
    _save(figure, path)


def save_comparison(runs: list[Run], path: Path) -> None:
    """Plot the losses of several runs; raises OSError if the plot cannot be written."""
    _save(draw_comparison(runs), path)


def draw_loss(metrics: list[dict], title: str):
    """A figure with three panels over the steps: losses, learning rate, gradient norm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    losses, rate, norm = figure.subplots(3, sharex=True, height_ratios=[3, 1, 1])
    _plot(losses, metrics, "loss", color="C0", linewidth=1, label="training loss")
    if best := best_evaluation(metrics):
        label = f"validation loss, lowest {best['eval_loss']:.4f} at step {best['step']}"
        _plot(losses, metrics, "eval_loss", marker="o", color="C1", markersize=4, label=label)
    losses.set(ylabel="loss (nats per token)", title=_escape(title))
    if losses.lines:
        losses.legend()
    _plot(rate, metrics, "learning_rate", color="C2")
    rate.set(ylabel="learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _plot(norm, metrics, "grad_norm", color="C3", linewidth=1)
    norm.set(ylabel="gradient norm", yscale="log", xlabel="optimizer steps")
    figure.align_ylabels()
    _finish(losses, rate, norm)
    return figure


def draw_comparison(runs: list[Run]):
    """A figure with one panel and a color per run: thin lines for training losses, markers for validation."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(10, max(6, len(runs) / 4)), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["tab10"].colors
    if len(runs) > len(colors):
        colors = colormaps["turbo"].resampled(len(runs))(range(len(runs)))
    handles = []
    for run, color in zip(runs, colors):
        _plot(axes, run.metrics, "loss", color=color, linewidth=0.8, alpha=0.7)
        _plot(axes, run.metrics, "eval_loss", marker="o", color=color, markersize=5, linewidth=1.8)
        handles.append(Line2D([], [], color=color, linewidth=3, label=_escape(run.name)))
    handles += [
        Line2D([], [], color="grey", linewidth=0.8, label="training loss"),
        Line2D([], [], color="grey", linewidth=1.8, marker="o", markersize=5, label="validation loss"),
    ]
    axes.set(xlabel="optimizer steps", ylabel="loss (nats per token)")
    figure.legend(handles=handles, loc="outside right upper")
    _finish(axes)
    return figure


def _plot(axes, metrics: list[dict], name: str, marker: str | None = None, **style) -> None:
    """Plot a value over the steps. A single point gets a marker: as a line it would be invisible."""
    steps, values = series(metrics, name)
    if len(values) == 1:
        marker = marker or "."
    if values:
        axes.plot(steps, values, marker=marker, **style)


def _finish(*panels) -> None:
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _escape(name: str) -> str:
    """Keep matplotlib from reading the text between two $ as a formula."""
    return name.replace("$", r"\$")


def _save(figure, path: Path) -> None:
    from matplotlib import rc_context

    png = io.BytesIO()
    with rc_context({"axes.formatter.min_exponent": 3}):  # 0.2 on a logarithmic axis, not 2 x 10^-1
        figure.savefig(png, format="png", dpi=DOTS_PER_INCH)
    replace_bytes(path, png.getvalue())
