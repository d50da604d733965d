"""metrics.jsonl, progress bar and plots: whatever fails there costs its own output, not the run."""

import json
import math
import signal
from pathlib import Path

import pytest

from qlora.errors import InputError
from qlora.run.log import RunLog
from tests.results import metrics
from tests.run.faults import out_of_memory, signal_after_step


def line(step: int, **values) -> dict:
    return {"step": step, "loss": 1.0, "learning_rate": 1e-4, "tokens_per_s": 10.0} | values


def strict_lines(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl; NaN and Infinity, which are not JSON, fail the test."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(text, parse_constant=pytest.fail) for text in lines]


def test_a_resume_drops_the_lines_of_steps_that_it_repeats(tmp_path):
    with RunLog(tmp_path, total_steps=4, first_step=0) as log:
        log.begin()
        for step in (1, 2, 3):
            log.train(**line(step, grad_norm=math.inf))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # truncated by a kill
    with RunLog(tmp_path, total_steps=4, first_step=2) as log:  # resumed from checkpoint-2
        log.begin()
        log.train(**line(3, loss=0.5))
    lines = strict_lines(tmp_path)
    assert [(entry["step"], entry["loss"]) for entry in lines] == [(1, 1.0), (2, 1.0), (3, 0.5)]
    assert lines[0]["grad_norm"] is None


@pytest.mark.parametrize("is_repeated, kept", [(False, ["loss", "eval_loss"]), (True, ["loss"])])
def test_an_evaluation_that_is_repeated_replaces_its_line(tmp_path, is_repeated, kept):
    with RunLog(tmp_path, total_steps=4, first_step=0) as log:
        log.train(**line(2))
        log.evaluation(1.0, step=2)
    with RunLog(tmp_path, total_steps=4, first_step=2) as log:
        log.begin(is_repeated)
    assert [name for entry in metrics(tmp_path) for name in entry if "loss" in name] == kept


def test_unreadable_lines_and_a_file_that_cannot_be_opened_cost_only_their_lines(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe{"step": 2}\n{"step": 3}\n')
    (tmp_path / "metrics.jsonl.tmp").mkdir()  # where the lines to keep are written
    with RunLog(tmp_path, total_steps=6, first_step=3) as log:
        log.begin()
        log.train(**line(4))
        (tmp_path / "metrics.jsonl.tmp").rmdir()
        log.train(**line(5))
    assert [entry["step"] for entry in metrics(tmp_path)] == [1, 3, 5]
    assert capsys.readouterr().out.count("training continues without its lines") == 1


def test_lines_of_other_programs_do_not_end_a_resume(run):
    _, folder = run("--max_steps 2 --save_steps 1 --save_total_limit 0")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('7\n{"step": null}\n[]\n')
    run("--max_steps 2 --resume_from_checkpoint", str(folder / "checkpoint-1"))
    assert [line["step"] for line in metrics(folder)] == [2]


def test_a_validation_loss_that_is_nan_is_logged_as_null_and_printed_without_inf(tmp_path, capsys):
    with RunLog(tmp_path, total_steps=4, first_step=0) as log:
        log.evaluation(math.nan, step=2, epoch=0.5)
        log.evaluation(1000.0, step=4, epoch=1.0)  # its perplexity would overflow
    assert strict_lines(tmp_path) == [
        {"step": 2, "epoch": 0.5, "eval_loss": None, "eval_perplexity": None},
        {"step": 4, "epoch": 1.0, "eval_loss": 1000.0, "eval_perplexity": None},
    ]
    printed = capsys.readouterr().out
    assert "step 2: validation loss nan, perplexity none\n" in printed
    assert "step 4: validation loss 1000.0000, perplexity none\n" in printed
    assert "inf" not in printed


# ---------------------------------------------------------------- plots and flags


def test_the_losses_are_plotted_at_every_evaluation_and_at_the_end(run, rows_file, monkeypatch):
    plotted = []
    monkeypatch.setattr("qlora.run.log.save_loss", lambda folder: plotted.append(len(metrics(folder))))
    run(f"--max_steps 3 --logging_steps 1 --eval_steps 2 --validation_dataset {rows_file}")
    assert plotted == [3, 5, 5]  # lines: two losses and an evaluation, a loss and an evaluation, the end


def test_flags_and_row_lengths_are_saved_beside_the_metrics(run):
    _, folder = run("--max_steps 1 --lora_r 5")
    assert json.loads((folder / "train_config.json").read_text())["lora_r"] == 5
    assert {path.name for path in folder.glob("*.png")} == {"loss.png", "lengths.png"}


def test_a_plot_that_fails_costs_one_printed_line(run, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr("qlora.run.log.save_lengths", fail)
    monkeypatch.setattr("qlora.run.log.save_loss", fail)
    _, folder = run("--max_steps 1")
    assert (folder / "adapter_model.safetensors").exists()
    assert "a plot or the flags could not be written to " in capsys.readouterr().out


def test_a_run_that_ends_before_its_first_line_plots_nothing_and_prints_nothing_of_it(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt), RunLog(tmp_path, total_steps=4, first_step=0) as log:
        log.begin()
        raise KeyboardInterrupt
    captured = capsys.readouterr()
    assert captured.out == "" and "plot" not in captured.err and not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("logging_steps, is_plotted", [(10, False), (1, True)])
def test_a_run_interrupted_before_its_first_line_prints_nothing_of_plots(
    run, capsys, tmp_path, logging_steps, is_plotted
):
    with signal_after_step(1, signal.SIGINT), pytest.raises(SystemExit, match="130"):
        run(f"--max_steps 20 --logging_steps {logging_steps}")
    captured = capsys.readouterr()
    assert "stopped by SIGINT after step 1" in captured.out
    assert "could not be written" not in captured.out + captured.err
    assert (tmp_path / "out" / "loss.png").exists() == is_plotted


def test_a_run_that_fails_in_its_first_step_prints_nothing_of_plots(run, capsys, monkeypatch):
    monkeypatch.setattr("train.target_logprobs", out_of_memory)
    with pytest.raises(InputError, match="out of memory after step 0"):
        run("--max_steps 20")
    captured = capsys.readouterr()
    assert "could not be written" not in captured.out + captured.err
