"""metrics.jsonl, and a tracker that is missing, unreachable or silent: none of it may stop or delay a run."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

import qlora.run.log
from qlora.run.log import RunLog
from qlora.run.tracker import Wandb
from tests.conftest import ROOT
from tests.test_train import metrics


def line(step, **values):
    return {"step": step, "loss": 1.0, "learning_rate": 1e-4, "tokens_per_s": 10.0} | values


def test_metrics_lines_survive_a_resume_and_stay_valid_json(tmp_path):
    log = RunLog(tmp_path, total_steps=4, first_step=0)
    log.begin()
    for step in (1, 2, 3):
        log.train(**line(step, grad_norm=math.inf))
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # cut short by a kill
    log = RunLog(tmp_path, total_steps=4, first_step=2)  # resumed from a checkpoint of step 2
    log.begin()
    log.train(**line(3, loss=0.5))
    log.close()
    lines = [json.loads(text, parse_constant=pytest.fail) for text in open(tmp_path / "metrics.jsonl")]
    assert [(entry["step"], entry["loss"]) for entry in lines] == [(1, 1.0), (2, 1.0), (3, 0.5)]
    assert lines[0]["grad_norm"] is None


def test_metrics_that_are_no_text_or_could_not_be_opened_cost_their_own_lines(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe{"step": 2}\n{"step": 3}\n')
    log = RunLog(tmp_path, total_steps=6, first_step=3)
    with monkeypatch.context() as patch:
        patch.setattr(qlora.run.log, "replace_file", lambda *_: fail())
        log.begin()
        log.train(**line(4))
    log.train(**line(5))
    log.close()
    lines = [json.loads(text) for text in open(tmp_path / "metrics.jsonl")]
    assert [entry["step"] for entry in lines] == [1, 3, 5]


def fail():
    raise OSError(30, "Read-only file system")


WANDB_RUN = """
import sys
from pathlib import Path
from qlora.run.tracker import Wandb
tracker = Wandb(Path(sys.argv[1]), "name", {"a": 1}, is_resumed=False, seconds=2)
tracker.log({"step": 1, "loss": 0.5})
tracker.finish()
print("training went on", flush=True)
"""


@pytest.fixture
def silent_server():
    """Accepts connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    held = []

    def accept():
        try:
            while True:
                held.append(server.accept())
        except OSError:
            return

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()


@pytest.mark.parametrize("trouble", ["no key", "unreachable", "silent"])
def test_a_tracker_in_trouble_costs_one_warning(trouble, silent_server, tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    if trouble != "no key":
        address = silent_server if trouble == "silent" else "http://127.0.0.1:9"  # port 9: nobody listens
        environment |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address}
    started = time.time()
    result = subprocess.run(
        [sys.executable, "-c", WANDB_RUN, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert "training went on" in result.stdout
    assert (result.stdout + result.stderr).count("training goes on without it") == 1
    assert time.time() - started < 40


def test_a_tracker_that_fails_later_is_dropped(tmp_path, capsys):
    tracker = Wandb(tmp_path, "name", {}, is_resumed=False)  # WANDB_MODE=disabled: starts offline
    assert tracker.run is not None
    tracker.run.log = lambda *_: 1 / 0
    tracker.log({"step": 1, "loss": 1.0})
    tracker.log({"step": 2, "loss": 1.0})
    assert tracker.run is None
    assert capsys.readouterr().out.count("wandb could not log") == 1


def test_a_resumed_run_continues_its_own_track(tmp_path):
    first = Wandb(tmp_path, "name", {}, is_resumed=False)
    assert (tmp_path / "wandb_run_id").read_text() == first.run.id
    (tmp_path / "wandb_run_id").write_text("kept-id")
    assert Wandb(tmp_path, "name", {}, is_resumed=True).run.id == "kept-id"
    assert Wandb(tmp_path, "name", {}, is_resumed=False).run.id != "kept-id"


def test_the_losses_are_drawn_at_every_evaluation_and_at_the_end(run, rows_file, monkeypatch):
    drawn = []
    monkeypatch.setattr("qlora.run.log.save_loss", lambda folder: drawn.append(len(metrics(folder))))
    run(f"--max_steps 3 --logging_steps 1 --eval_steps 2 --validation_dataset {rows_file}")
    assert drawn == [3, 5, 5]  # lines: two losses and an evaluation, a loss and an evaluation, the end


def test_flags_and_lengths_are_kept_beside_the_metrics(run):
    _, folder = run("--max_steps 1 --lora_r 5")
    assert json.loads((folder / "train_config.json").read_text())["lora_r"] == 5
    assert {path.name for path in folder.glob("*.png")} == {"loss.png", "lengths.png"}


def test_a_picture_that_fails_costs_a_line(run, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr("qlora.run.log.save_lengths", fail)
    monkeypatch.setattr("qlora.run.log.save_loss", fail)
    _, folder = run("--max_steps 1")
    assert (folder / "adapter_model.safetensors").exists()
    assert "lacks a picture or its flags (no font)" in capsys.readouterr().out


def test_a_line_of_somebody_else_does_not_end_a_resume(run):
    _, folder = run("--max_steps 2 --save_steps 1 --save_total_limit 0")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('7\n{"step": null}\n[]\n')
    run("--max_steps 2 --resume_from_checkpoint", str(folder / "checkpoint-1"))
    assert [line["step"] for line in metrics(folder)] == [2]
