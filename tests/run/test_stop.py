"""Signals, the time limit, and errors that end a run with a checkpoint."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from qlora.data.loader import StepLoader, WaitStopped
from qlora.errors import InputError
from qlora.run.checkpoint import Checkpoints, list_checkpoints
from qlora.run.progress import Progress
from qlora.run.stop import Rescue, Stop
from tests.conftest import ROOT
from tests.data.test_stream import use_windows
from tests.test_train import adapter, assert_same


@pytest.fixture(autouse=True)
def default_hangup():
    """Whoever runs the tests may ignore SIGHUP, as nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_is_noted_and_names_itself_in_message_and_exit_code(number, code, capfd, tmp_path):
    before, messages = signal.getsignal(number), []
    with Stop(None) as stop:
        assert not stop.is_due()
        os.kill(os.getpid(), number)
        assert stop.is_due()
    assert signal.getsignal(number) is before
    name = signal.Signals(number).name
    assert f"{name}: saving a checkpoint after this step" in capfd.readouterr().err
    with pytest.raises(SystemExit) as exit:
        stop.exit(stopped_run(tmp_path, 3, saved=[2, 3]), messages.append)
    assert exit.value.code == code
    remedy = "Resume with --resume_from_checkpoint latest"
    assert messages == [f"stopped by {name} after step 3: checkpoint-3 is complete. {remedy}"]


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stop(None) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_due()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_second_signal_exits_at_once():
    script = """
import os, signal
from qlora.run.stop import Stop
with Stop(None):
    os.kill(os.getpid(), signal.SIGINT)
    print("still running", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("not any more", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (143, "still running\n"), done.stderr


def test_a_thread_can_train_without_signal_handlers():
    before, stops = signal.getsignal(signal.SIGTERM), []

    def use_stop():
        with Stop(None) as stop:
            stops.append(stop.is_due())

    thread = threading.Thread(target=use_stop)
    thread.start()
    thread.join()
    assert stops == [False] and signal.getsignal(signal.SIGTERM) is before


def test_the_time_limit_counts_only_after_a_step(tmp_path):
    stop, messages = Stop(max_hours=1e-12), []
    assert not stop.is_due()
    stop.step_done()
    assert stop.is_due()
    with pytest.raises(SystemExit) as exit:
        stop.exit(stopped_run(tmp_path, 3, saved=[2]), messages.append)
    assert exit.value.code == 124
    remedy = "Resume with --resume_from_checkpoint latest"
    assert messages == [
        f"stopped by --max_hours after step 3: steps since the last checkpoint are LOST. {remedy}"
    ]


def test_a_stopped_run_without_any_checkpoint_promises_none(tmp_path):
    stop, messages = Stop(max_hours=1e-12), []
    stop.step_done()
    assert stop.is_due()
    with pytest.raises(SystemExit):
        stop.exit(stopped_run(tmp_path, 3, saved=[]), messages.append)
    lost = "no checkpoint could be saved, so all steps of this run are LOST"
    remedy = "Start over with --overwrite_output_dir"
    assert messages == [f"stopped by --max_hours after step 3: {lost}. {remedy}"]


def stopped_run(output_dir, step, saved):
    """What Stop.exit() needs to know of a run's Checkpoints."""
    for number in saved:
        (output_dir / f"checkpoint-{number}").mkdir()
    return SimpleNamespace(
        output_dir=output_dir, progress=Progress(step=step), is_saved=lambda number: number in saved
    )


def test_without_a_limit_or_before_it_a_run_continues():
    for max_hours in (None, 1):
        stop = Stop(max_hours)
        stop.step_done()
        assert not stop.is_due()


# ---------------------------------------------------------------- while waiting for data

STALLED = """
import sys, threading
from functools import partial
import train
from qlora.data.prepare import load_rows
from qlora.data.stream import RowStream
windows, stall_after = RowStream.windows, int(sys.argv.pop(1))
def stalling(stream, *place):
    for number, window in enumerate(windows(stream, *place)):
        if number == stall_after:
            threading.Event().wait()  # as a read from a network that does not answer
        yield window
RowStream.windows = stalling
train.load_rows = partial(load_rows, window_rows=8)
train.main()
"""
STREAMING = "--streaming --max_length 64 --max_steps 7 --logging_steps 1 --save_steps 99"
STREAMING += " --per_device_train_batch_size 4 --gradient_accumulation_steps 1"  # two steps a window


@pytest.fixture
def stalled_run(base, rows_file, tmp_path):
    """Start a run whose stream stalls behind so many windows, and wait until it has taken their steps."""
    runs = []

    def start(windows: int):
        argv = ["--model", base, "--dataset", rows_file, "--output_dir", str(tmp_path / "out")]
        argv += "--dtype float32 --lora_dropout 0 --learning_rate 3e-3 --no_packing --no_compile".split()
        run = subprocess.Popen(
            [sys.executable, "-c", STALLED, str(windows), *argv, *STREAMING.split()], cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        runs.append(run)
        log = tmp_path / "out" / "metrics.jsonl"
        while run.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2 * windows):
            time.sleep(0.05)
        return run

    yield start
    for run in runs:
        run.kill()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_whose_stream_has_stalled(run, stalled_run, monkeypatch, number, code):
    stalled = stalled_run(2)
    time.sleep(0.5)  # it waits for its fifth step
    stalled.send_signal(number)
    output, _ = stalled.communicate(timeout=20)
    assert stalled.returncode == code, output
    assert f"stopped by {number.name} after step 4: checkpoint-4 is complete" in output
    use_windows(monkeypatch, 8)
    _, resumed = run(STREAMING, "--resume_from_checkpoint latest")
    assert_same(adapter(resumed), adapter(run(STREAMING, out="uninterrupted")[1]))


def test_a_loader_waits_until_it_has_to_stop():
    loader, answers, release = StepLoader(None, None, None, 0, 9), [False, False, True], threading.Event()
    loader.make = lambda step: release.wait() and step
    with pytest.raises(WaitStopped):
        loader.take(3, lambda: answers.pop(0))
    assert not answers
    release.set()
    assert loader.take(3, lambda: pytest.fail("the data is there")) == 3  # the same data, not made again


def test_a_timeout_while_data_is_read_is_an_error_of_its_own():
    def make(step):
        raise TimeoutError("the network")

    loader = StepLoader(None, None, None, 0, 9)
    loader.make = make
    with pytest.raises(TimeoutError, match="the network"):
        loader.take(0)


def test_a_run_that_is_stopped_before_its_first_step_promises_nothing(new_checkpoints):
    checkpoints, messages = new_checkpoints(), []
    with pytest.raises(SystemExit) as exit, Stop(None) as stop:
        with Rescue(checkpoints, checkpoints.model, checkpoints.optimizer, messages.append, stop):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_due()
            raise WaitStopped
    assert exit.value.code == 143 and not list_checkpoints(checkpoints.output_dir)
    assert messages == [
        "stopped by SIGTERM: no step was completed, so the same command starts from the same point"
    ]


# ---------------------------------------------------------------- errors in the loop


def rescue(checkpoints: Checkpoints, say=pytest.fail) -> Rescue:
    return Rescue(checkpoints, checkpoints.model, checkpoints.optimizer, say)


def test_an_input_error_saves_the_last_complete_step(new_checkpoints):
    checkpoints = new_checkpoints()
    with pytest.raises(InputError) as error, rescue(checkpoints):
        checkpoints.progress.step = 3
        checkpoints.mark_boundary()
        raise InputError("line 99 is not valid JSON")
    assert (
        str(error.value) == "line 99 is not valid JSON - --resume_from_checkpoint latest resumes after step 3"
    )
    assert list_checkpoints(checkpoints.output_dir) == [checkpoints.folder(3)] and checkpoints.is_saved(3)


def test_running_out_of_memory_saves_the_last_complete_step_and_frees_the_gradients(new_checkpoints):
    checkpoints = new_checkpoints()
    weight = next(weight for weight in checkpoints.model.parameters() if weight.requires_grad)
    with pytest.raises(InputError) as error, rescue(checkpoints):
        checkpoints.progress.step = 3
        weight.grad = torch.ones_like(weight)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "out of memory after step 3 (CUDA out of memory. Tried to allocate 2.00 GiB)" in str(error.value)
    assert "smaller --per_device_train_batch_size or --max_length" in str(error.value)
    assert weight.grad is None and checkpoints.is_saved(3)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), TypeError("a bug"), KeyboardInterrupt()]
)
def test_other_errors_pass_unchanged_and_save_nothing(new_checkpoints, error):
    checkpoints = new_checkpoints()
    with pytest.raises(type(error)) as raised, rescue(checkpoints):
        checkpoints.progress.step = 3
        raise error
    assert raised.value is error and not list_checkpoints(checkpoints.output_dir)


def test_before_the_first_step_there_is_nothing_to_save(new_checkpoints):
    checkpoints = new_checkpoints()
    with pytest.raises(InputError, match="bad row - no step was completed, so the same"), rescue(checkpoints):
        raise InputError("bad row")
    assert not list_checkpoints(checkpoints.output_dir)


def test_an_error_in_the_first_step_of_a_resumed_run_does_not_promise_a_checkpoint(new_checkpoints):
    """It may have been resumed from a checkpoint elsewhere, or beside a newer one."""
    checkpoints = new_checkpoints(first_step=4)
    with pytest.raises(InputError, match="no step was completed, so the same"), rescue(checkpoints):
        raise InputError("bad row")


@pytest.mark.parametrize("saved", [[], [2]])
def test_an_error_after_which_nothing_can_be_saved_says_so(new_checkpoints, monkeypatch, saved):
    checkpoints, messages = new_checkpoints(), []
    for step in saved:
        checkpoints.progress.step = step
        assert checkpoints.save(pytest.fail)
    monkeypatch.setattr(checkpoints, "_write", lambda folder: (_ for _ in ()).throw(OSError(28, "disk full")))
    checkpoints.progress.step = 0
    with pytest.raises(InputError) as error, rescue(checkpoints, messages.append):
        checkpoints.progress.step = 3
        raise InputError("bad row")
    assert len(messages) == 1 and "step 3: no checkpoint could be saved" in messages[0]
    lost = (
        "no checkpoint could be saved, so all steps of this run are LOST; --overwrite_output_dir starts over"
    )
    if saved:
        lost = "steps since the last checkpoint are LOST; --resume_from_checkpoint latest resumes there"
    assert str(error.value) == f"bad row - {lost}"
