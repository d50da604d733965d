"""Plots of one run and of several, and the command that compares runs."""

import json
import os
import subprocess
import sys

import pytest
from matplotlib.image import imread

import qlora.run.files
from qlora.log import main
from qlora.run.files import remove_leftovers
from qlora.run.metrics import Run, read_metrics
from qlora.run.plots import draw_comparison, draw_loss, save_loss
from tests.conftest import ROOT


def train_line(step, loss, **values):
    return {"step": step, "loss": loss, "learning_rate": step / 1024, "grad_norm": 0.5 * step} | values


def eval_line(step, loss):
    return {"step": step, "eval_loss": loss, "eval_perplexity": 10 * loss}


METRICS = [
    train_line(1, 3.0, tokens_per_s=100.0, peak_memory_gb=2.5, skipped_steps=0),
    train_line(2, 2.0, tokens_per_s=1000.0, peak_memory_gb=3.25, skipped_steps=1),
    eval_line(2, 2.5),
    train_line(3, 1.0, tokens_per_s=2000.0, peak_memory_gb=3.0, skipped_steps=4),
    eval_line(3, 2.75),
]


def write_records(folder, metrics=METRICS, flags=None, end=""):
    """Write the records of a run, as in its --output_dir; returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + end)
    if flags is not None:
        (folder / "train_config.json").write_text(json.dumps(flags))
    return str(folder)


def points(axes):
    """The points of each line in a panel."""
    return [list(zip(*line.get_data())) for line in axes.lines]


def is_png(path, width, height):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and imread(path).shape[:2] == (height, width)


def test_the_plot_shows_losses_learning_rate_and_gradient_norm():
    losses, rate, norm = draw_loss(METRICS, "a run").axes
    assert points(losses) == [[(1, 3.0), (2, 2.0), (3, 1.0)], [(2, 2.5), (3, 2.75)]]
    assert points(rate) == [[(1, 1 / 1024), (2, 2 / 1024), (3, 3 / 1024)]]
    assert points(norm) == [[(1, 0.5), (2, 1.0), (3, 1.5)]] and norm.get_yscale() == "log"
    texts = [text.get_text() for text in losses.get_legend().get_texts()]
    assert texts == ["training loss", "validation loss, lowest 2.5000 at step 2"]


def test_only_non_finite_values_are_left_out():
    metrics = [
        *METRICS[:2],
        train_line(3, None, grad_norm=None),
        train_line(4, 1.5),
        {"step": 4, "eval_loss": None},
    ]
    losses, rate, norm = draw_loss(metrics, "a run").axes
    assert points(losses) == [[(1, 3.0), (2, 2.0), (4, 1.5)]]
    assert [step for step, _ in points(rate)[0]] == [1, 2, 3, 4]
    assert [step for step, _ in points(norm)[0]] == [1, 2, 4]


def test_a_single_training_line_is_a_visible_dot():
    losses, *_ = draw_loss([METRICS[0], eval_line(1, 2.5)], "a run").axes
    assert [line.get_marker() for line in losses.lines] == [".", "o"]
    many, *_ = draw_loss(METRICS, "a run").axes
    assert many.lines[0].get_marker() == "None"


@pytest.mark.parametrize("metrics", [METRICS[:1], [eval_line(2, 2.5)], [{"step": 1}]])
def test_a_run_with_a_single_line_can_be_plotted(metrics, tmp_path):
    write_records(tmp_path, metrics)
    save_loss(tmp_path)
    assert is_png(tmp_path / "loss.png", 960, 960)


def test_a_name_with_dollar_signs_or_an_underscore_is_shown_as_it_is(tmp_path):
    write_records(tmp_path / "$\\frac$", METRICS)
    save_loss(tmp_path / "$\\frac$")  # as a formula it would not parse
    figure = draw_comparison([Run("_a", METRICS, {}), Run("b", METRICS, {})])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["_a", "b"]


def test_a_failed_write_leaves_the_old_plot(tmp_path, monkeypatch):
    write_records(tmp_path)
    (tmp_path / "loss.png").write_bytes(b"before")

    def fail(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(qlora.run.files, "_sync", fail)
        with pytest.raises(OSError, match="No space"):
            save_loss(tmp_path)
    assert (tmp_path / "loss.png").read_bytes() == b"before"
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "metrics.jsonl"]
    (tmp_path / "loss.png.tmp").write_bytes(b"left by a kill")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "metrics.jsonl"]


def test_each_run_has_its_own_color():
    runs = [Run("a", METRICS, {}), Run("b", METRICS[:2], {}), Run("c", METRICS[2:], {})]
    figure = draw_comparison(runs)
    (axes,), (legend,) = figure.axes, figure.legends
    assert points(axes) == [
        [(1, 3.0), (2, 2.0), (3, 1.0)], [(2, 2.5), (3, 2.75)],
        [(1, 3.0), (2, 2.0)],
        [(3, 1.0)], [(2, 2.5), (3, 2.75)],
    ]  # fmt: skip
    colors = [line.get_color() for line in axes.lines]
    assert colors[0] == colors[1] and colors[3] == colors[4] and len(set(colors)) == 3
    shown = {text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines())}
    assert (shown["a"], shown["b"], shown["c"]) == (colors[0], colors[2], colors[3])
    many = draw_comparison([Run(str(i), METRICS, {}) for i in range(12)])
    assert len({tuple(line.get_color()) for line in many.axes[0].lines}) == 12


def test_the_command_ignores_flags_that_say_where_a_run_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        flags = {"seed": seed, "output_dir": name, "run_name": name, "report_to": name}
        flags |= {"resume_from_checkpoint": name, "overwrite_output_dir": name, "allow_changes": name}
        write_records(tmp_path / name, flags=flags)
    main(["a", "b"])
    assert capsys.readouterr().out.split()[:3] == ["run", "seed", "steps"]


def test_the_command_compares_runs(run, tmp_path, monkeypatch):
    _, real = run("--max_steps 3 --logging_steps 1 --validation_split 0.2 --eval_steps 2")
    monkeypatch.undo()  # run draws no pictures
    save_loss(real)
    assert is_png(real / "loss.png", 960, 960)
    losses, *_ = draw_loss(read_metrics(real), "real").axes
    assert [len(points) for points in points(losses)] == [3, 2]
    (tmp_path / "other").mkdir()
    write_records(tmp_path / "other" / "out", end='{"st')
    command = [sys.executable, "-m", "qlora.log", real, tmp_path / "other/out"]
    command += ["--output", tmp_path / "c.png"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    _, first, second, _ = result.stdout.splitlines()
    assert first.split()[:2] == [str(real), "3"]  # both folders are named out, so their paths are shown
    assert second.split()[:3] == [str(tmp_path / "other/out"), "3", "1.0000"]
    assert is_png(tmp_path / "c.png", 1200, 720)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "cannot read nowhere/metrics.jsonl (No such file or directory)"),
        (["good", "empty"], "empty/metrics.jsonl has no valid line"),
        (["corrupt"], "corrupt/metrics.jsonl has no valid line"),
        (["bad_flags"], "cannot read bad_flags/train_config.json"),
        (["list_flags"], "list_flags/train_config.json is not a JSON object"),
        (["good", "--output", "nowhere/c.png"], "--output nowhere/c.png cannot be written: No such file"),
        (["good", "--output", "folder.png"], "--output folder.png cannot be written: Is a directory"),
        (["good", "--output", "c.jpg"], "--output c.jpg: the plot is a PNG file"),
        (["good", "--output", ""], "--output .: the plot is a PNG file"),
    ],
)
def test_mistakes_are_reported_in_one_line(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "good")
    write_records(tmp_path / "empty", [])
    write_records(tmp_path / "corrupt", [], end='\x00\x00{"step": 1, "lo')
    write_records(tmp_path / "list_flags", flags=[1])
    write_records(tmp_path / "bad_flags")
    (tmp_path / "bad_flags" / "train_config.json").write_text('{"seed"')
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code.startswith(f"qlora.log: error: {message}") and "\n" not in stop.value.code
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("flags", [[], ["--out", "c.png", "good"], ["good", "--unknown"]])
def test_wrong_usage_has_exit_code_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2 and "usage: python -m qlora.log" in capsys.readouterr().err


def test_importing_the_command_imports_neither_matplotlib_nor_transformers():
    code = "import sys, qlora.log; sys.exit('matplotlib' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
