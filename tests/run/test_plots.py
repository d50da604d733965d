"""The pictures and the table of runs: what stands in metrics.jsonl is in them, but for what is damaged."""

import json
import os
import subprocess
import sys

import pytest
from matplotlib.image import imread

import qlora.run.files
from qlora.log import main
from qlora.run.files import remove_leftovers
from qlora.run.metrics import Run, compare_table, read_metrics
from qlora.run.plots import _draw_comparison, _draw_loss, save_loss
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


def leave(folder, metrics=METRICS, flags=None, end=""):
    """What a run leaves in its --output_dir."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + end)
    if flags is not None:
        (folder / "train_config.json").write_text(json.dumps(flags))
    return str(folder)


def drawn(axes):
    """The points of each line in a panel."""
    return [list(zip(*line.get_data())) for line in axes.lines]


def is_picture(path, width, height):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and imread(path).shape[:2] == (height, width)


def test_the_figure_has_the_losses_the_learning_rate_and_the_gradient_norm():
    losses, rate, norm = _draw_loss(METRICS, "a run").axes
    assert drawn(losses) == [[(1, 3.0), (2, 2.0), (3, 1.0)], [(2, 2.5), (3, 2.75)]]
    assert drawn(rate) == [[(1, 1 / 1024), (2, 2 / 1024), (3, 3 / 1024)]]
    assert drawn(norm) == [[(1, 0.5), (2, 1.0), (3, 1.5)]] and norm.get_yscale() == "log"
    texts = [text.get_text() for text in losses.get_legend().get_texts()]
    assert texts == ["training loss", "validation loss, lowest 2.5000 at step 2"]


def test_values_that_are_not_finite_are_left_out_each_by_itself():
    metrics = [
        *METRICS[:2],
        train_line(3, None, grad_norm=None),
        train_line(4, 1.5),
        {"step": 4, "eval_loss": None},
    ]
    losses, rate, norm = _draw_loss(metrics, "a run").axes
    assert drawn(losses) == [[(1, 3.0), (2, 2.0), (4, 1.5)]]
    assert [step for step, _ in drawn(rate)[0]] == [1, 2, 3, 4]
    assert [step for step, _ in drawn(norm)[0]] == [1, 2, 4]


def test_one_training_line_is_a_dot_that_can_be_seen():
    losses, *_ = _draw_loss([METRICS[0], eval_line(1, 2.5)], "a run").axes
    assert [line.get_marker() for line in losses.lines] == [".", "o"]
    many, *_ = _draw_loss(METRICS, "a run").axes
    assert many.lines[0].get_marker() == "None"


@pytest.mark.parametrize("metrics", [METRICS[:1], [eval_line(2, 2.5)], [{"step": 1}]])
def test_a_picture_of_little_is_still_a_picture(metrics, tmp_path):
    leave(tmp_path, metrics)
    save_loss(tmp_path)
    assert is_picture(tmp_path / "loss.png", 960, 960)


def test_lines_that_are_cut_or_no_metrics_are_passed_over(tmp_path):
    leave(tmp_path, METRICS, end='3\n["step"]\n{"loss": 1.0}\n{"step": null}\n{"step": 4, "lo')
    assert read_metrics(tmp_path) == METRICS


def test_a_name_is_no_formula_and_stands_in_the_legend(tmp_path):
    leave(tmp_path / "$\\frac$", METRICS)
    save_loss(tmp_path / "$\\frac$")  # would not parse
    figure = _draw_comparison([Run("_a", METRICS, {}), Run("b", METRICS, {})])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["_a", "b"]


def test_a_picture_is_whole_or_as_it_was(tmp_path, monkeypatch):
    leave(tmp_path)
    (tmp_path / "loss.png").write_bytes(b"before")

    def fail(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(qlora.run.files, "_sync", fail)
        with pytest.raises(OSError, match="No space"):
            save_loss(tmp_path)
    assert (tmp_path / "loss.png").read_bytes() == b"before"
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "metrics.jsonl"]
    (tmp_path / "loss.png.tmp").write_bytes(b"of a kill")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "metrics.jsonl"]


def test_several_runs_have_a_colour_each():
    runs = [Run("a", METRICS, {}), Run("b", METRICS[:2], {}), Run("c", METRICS[2:], {})]
    figure = _draw_comparison(runs)
    (axes,), (legend,) = figure.axes, figure.legends
    assert drawn(axes) == [
        [(1, 3.0), (2, 2.0), (3, 1.0)], [(2, 2.5), (3, 2.75)],
        [(1, 3.0), (2, 2.0)],
        [(3, 1.0)], [(2, 2.5), (3, 2.75)],
    ]  # fmt: skip
    colors = [line.get_color() for line in axes.lines]
    assert colors[0] == colors[1] and colors[3] == colors[4] and len(set(colors)) == 3
    shown = {text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines())}
    assert (shown["a"], shown["b"], shown["c"]) == (colors[0], colors[2], colors[3])
    many = _draw_comparison([Run(str(i), METRICS, {}) for i in range(12)])
    assert len({tuple(line.get_color()) for line in many.axes[0].lines}) == 12


def test_the_table_has_the_differing_flags_and_the_results():
    same = {"lora_r": 16, "dataset": ["x"]}
    runs = [
        Run("a", METRICS, same | {"seed": 42, "packing": True, "output_dir": "a", "run_name": "A"}),
        Run("b", METRICS[:1], same | {"seed": None, "packing": False, "output_dir": "b", "run_name": "B"}),
        Run("c", METRICS[2:3], {}),
    ]
    assert compare_table(runs).splitlines() == [
        "run  seed  packing  steps    loss  best eval_loss  perplexity  at step  tokens/s  peak GB  skipped",
        "a    42    on           3  1.0000          2.5000      25.000        2     1,000     3.25        4",
        "b    none  off          1  3.0000                                            100     2.50        0",
        "c                       2                  2.5000      25.000        2",
    ]


def test_a_flag_that_a_run_does_not_know_is_no_difference():
    runs = [Run("a", METRICS, {"seed": 1, "new": 5}), Run("b", METRICS, {"seed": 2})]
    assert compare_table(runs).split()[:3] == ["run", "seed", "steps"]


def test_the_command_compares_real_and_written_runs(run, tmp_path):
    _, real = run("--max_steps 3 --logging_steps 1 --validation_split 0.2 --eval_steps 2")
    save_loss(real)
    assert is_picture(real / "loss.png", 960, 960)
    losses, *_ = _draw_loss(read_metrics(real), "real").axes
    assert [len(points) for points in drawn(losses)] == [3, 2]
    (tmp_path / "other").mkdir()
    leave(tmp_path / "other" / "out", end='{"st')
    command = [
        sys.executable,
        "-m",
        "qlora.log",
        real,
        tmp_path / "other/out",
        "--output",
        tmp_path / "c.png",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    _, first, second, _ = result.stdout.splitlines()
    assert first.split()[:2] == [str(real), "3"]  # by their paths: both are called out
    assert second.split()[:3] == [str(tmp_path / "other/out"), "3", "1.0000"]
    assert is_picture(tmp_path / "c.png", 1200, 720)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "nowhere/metrics.jsonl cannot be read (No such file or directory)"),
        (["good", "empty"], "empty/metrics.jsonl has no line that can be read"),
        (["damaged"], "damaged/metrics.jsonl has no line that can be read"),
        (["bad_flags"], "bad_flags/train_config.json cannot be read"),
        (["list_flags"], "list_flags/train_config.json is no JSON object"),
        (["good", "--output", "nowhere/c.png"], "--output nowhere/c.png cannot be written: No such file"),
        (["good", "--output", "folder.png"], "--output folder.png cannot be written: Is a directory"),
        (["good", "--output", "c.jpg"], "--output c.jpg: the picture is a PNG"),
        (["good", "--output", ""], "--output .: the picture is a PNG"),
    ],
)
def test_what_is_wrong_is_one_line(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    leave(tmp_path / "good")
    leave(tmp_path / "empty", [])
    leave(tmp_path / "damaged", [], end='\x00\x00{"step": 1, "lo')
    leave(tmp_path / "list_flags", flags=[1])
    leave(tmp_path / "bad_flags")
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


def test_nothing_but_the_drawing_imports_matplotlib():
    code = "import sys, qlora.log; sys.exit('matplotlib' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
