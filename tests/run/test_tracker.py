"""A tracker that is missing, unreachable or silent neither stops nor delays a run."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from qlora.run.log import RunLog
from qlora.run.tracker import Wandb
from tests.conftest import ROOT

WANDB_RUN = """
import sys
from pathlib import Path
from qlora.run.tracker import Wandb
tracker = Wandb(Path(sys.argv[1]), "name", {"a": 1}, is_resumed=False, timeout_seconds=2)
tracker.log({"step": 1, "loss": 0.5})
tracker.finish()
print("training continued", flush=True)
"""


@pytest.fixture
def silent_server():
    """URL of a server that accepts connections and never answers."""
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


@pytest.mark.parametrize("problem", ["no key", "unreachable", "silent"])
def test_a_tracker_that_cannot_be_reached_costs_one_warning(problem, silent_server, tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    if problem != "no key":
        address = silent_server if problem == "silent" else "http://127.0.0.1:9"  # nobody listens on port 9
        environment |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address}
    started = time.time()
    result = subprocess.run(
        [sys.executable, "-c", WANDB_RUN, str(tmp_path)], cwd=ROOT, env=environment, text=True,
        capture_output=True, stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "training continued" in result.stdout
    assert (result.stdout + result.stderr).count("training continues without it") == 1
    assert time.time() - started < 40


def test_a_tracker_that_fails_during_the_run_is_dropped_with_one_warning(tmp_path, capsys):
    tracker = Wandb(tmp_path, "name", {}, is_resumed=False)  # WANDB_MODE=disabled: starts offline
    assert tracker.run is not None
    tracker.run.log = lambda *_: 1 / 0
    tracker.log({"step": 1, "loss": 1.0})
    tracker.log({"step": 2, "loss": 1.0})
    assert tracker.run is None
    assert capsys.readouterr().out.count("wandb could not log") == 1


def test_a_resumed_run_continues_its_run_in_wandb(tmp_path):
    first = Wandb(tmp_path, "name", {}, is_resumed=False)
    assert (tmp_path / "wandb_run_id").read_text() == first.run.id
    (tmp_path / "wandb_run_id").write_text("earlier-id")
    assert Wandb(tmp_path, "name", {}, is_resumed=True).run.id == "earlier-id"
    assert Wandb(tmp_path, "name", {}, is_resumed=False).run.id != "earlier-id"


def test_the_tracker_gets_the_lines_of_metrics_jsonl_and_is_finished(tmp_path):
    class Tracker:
        def __init__(self):
            self.logged, self.is_finished = [], False

        def log(self, values: dict) -> None:
            self.logged.append(values)

        def finish(self) -> None:
            self.is_finished = True

    with RunLog(tmp_path, total_steps=2, first_step=0) as log:
        log.tracker = tracker = Tracker()
        log.train(step=1, loss=0.5, learning_rate=1e-4, tokens_per_s=10.0)
        log.evaluation(0.25, step=1)
        assert not tracker.is_finished
    assert [(values["step"], values.get("loss"), values.get("eval_loss")) for values in tracker.logged] == [
        (1, 0.5, None), (1, None, 0.25)
    ]  # fmt: skip
    assert tracker.is_finished
