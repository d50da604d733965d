"""Whole runs that are killed, stopped, corrupted, or short of disk, memory or finite numbers, and resumed.

"Bit-identical" is: with the adapter and the optimizer state of a run that nothing happened to.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationMixin

import qlora.evaluation.validation
import qlora.run.checkpoint
import train
from qlora.errors import InputError
from qlora.evaluation.validation import Validation
from qlora.model.adapter import ADAPTER
from qlora.optim.schedule import Schedule
from qlora.run.checkpoint import STATE, STATE_TENSORS, Checkpoints, list_checkpoints
from qlora.run.files import MANIFEST, damage
from qlora.run.log import RunLog
from tests.conftest import ROOT, ROWS
from tests.results import adapter, assert_same, metrics
from tests.run.faults import (
    after_step,
    flip_bit,
    interrupt,
    out_of_memory,
    random_losses,
    scaled_losses,
    signal_after_step,
)

FLAGS = "--max_steps 6 --save_steps 2 --logging_steps 1 --lora_dropout 0.1 --save_total_limit 0"
RESUME = "--resume_from_checkpoint latest"
VARYING = ("tokens_per_s", "data_wait")  # in a line of metrics.jsonl
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # double quantization on the CPU depends on their number


@pytest.fixture
def uninterrupted(run):
    """(adapter, optimizer state) of a run that nothing happens to."""
    return final_state(run(FLAGS, out="uninterrupted")[1])


def final_state(folder: Path) -> tuple[dict, dict]:
    return adapter(folder), load_file(folder / "checkpoint-6" / STATE_TENSORS)


def assert_bit_identical(folder: Path, uninterrupted: tuple[dict, dict]) -> None:
    for got, want in zip(final_state(folder), uninterrupted):
        assert_same(got, want)


def comparable_metrics(folder: Path) -> list[dict]:
    return [{name: line[name] for name in line if name not in VARYING} for line in metrics(folder)]


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def all_files(folder: Path) -> list[tuple[Path, bytes]]:
    return sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())


def torture(flags: str) -> dict:
    """Counts of signals. `make torture` sends more of them: tests/torture.py."""
    command = [sys.executable, str(ROOT / "tests/torture.py"), "--forked", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "all bit-identical" in done.stdout, done.stdout + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-2])


def test_runs_of_two_processes_killed_twice_and_terminated_once_end_bit_identical():
    count = torture("--kills 2 --terms 1 --processes 2")
    assert count["SIGKILL"] == 2 and count["SIGTERM"] == 1


def test_runs_killed_20_times_and_terminated_5_times_end_bit_identical():
    count = torture("--kills 20 --terms 5")
    assert count["SIGKILL"] == 20 and count["SIGTERM"] == 5 and count["in a save"] > 0


# ---------------------------------------------------------------- corrupt checkpoints


@pytest.mark.parametrize("name", [ADAPTER, STATE, STATE_TENSORS, MANIFEST, "tokenizer.json"])
def test_a_corrupt_checkpoint_is_skipped_for_the_one_before(run, uninterrupted, name, capsys):
    _, folder = run(FLAGS)
    flip_bit(folder / "checkpoint-6" / name, 30)
    capsys.readouterr()
    run(FLAGS, RESUME)
    out = capsys.readouterr().out
    assert "checkpoint-6 is skipped: " in out and "resuming from checkpoint-4" in out
    assert_bit_identical(folder, uninterrupted)


def test_if_all_checkpoints_are_corrupt_nothing_starts_and_nothing_is_deleted(run):
    _, folder = run(FLAGS)
    for checkpoint in list_checkpoints(folder):
        flip_bit(checkpoint / ADAPTER, 500)
    before = all_files(folder)
    with pytest.raises(InputError, match=r"all checkpoints in .* are incomplete or corrupt"):
        run(FLAGS, RESUME)
    with pytest.raises(InputError, match=f"checkpoint-4 is incomplete or corrupt: {ADAPTER} does not"):
        run(FLAGS, "--resume_from_checkpoint", str(folder / "checkpoint-4"))
    assert all_files(folder) == before


def test_a_checkpoint_that_cannot_be_read_back_is_discarded(run, monkeypatch, capsys):
    check = qlora.run.checkpoint.damage
    monkeypatch.setattr(
        qlora.run.checkpoint,
        "damage",
        lambda folder: "a bit has flipped" if folder.name == "checkpoint-4" else check(folder),
    )
    _, folder = run("--max_steps 6 --save_steps 2 --save_total_limit 2")
    assert names(list_checkpoints(folder)) == ["checkpoint-2", "checkpoint-6"]
    assert "step 4: no checkpoint could be saved" in capsys.readouterr().out


def test_a_pickle_in_a_checkpoint_is_never_loaded(run, uninterrupted, tmp_path):
    _, folder = run(FLAGS)
    shutil.rmtree(folder / "checkpoint-6")
    bomb = b"cposix\nsystem\n(S'touch " + str(tmp_path / "executed").encode() + b"'\ntR."
    for place in (folder, folder / "checkpoint-4"):
        for name in ("training_state.bin", "adapter_model.bin", "optimizer.pt", "rng_state.pth"):
            (place / name).write_bytes(bomb)
    run(FLAGS, RESUME)
    assert_bit_identical(folder, uninterrupted)
    assert not (tmp_path / "executed").exists()


def test_a_base_in_pickle_format_is_refused(run, base, tmp_path):
    model = shutil.copytree(base, tmp_path / "pickled")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model.safetensors"):
        run("--max_steps 1", model=str(model))


# ---------------------------------------------------------------- what a run leaves on disk


def test_the_saved_adapter_loads_in_peft_with_the_trained_weights(run, base):
    model, folder = run("--max_steps 2")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base and config["peft_type"] == "LORA"
    assert config["r"] == 16 and sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in folder.iterdir()}
    for place in (folder, folder / "checkpoint-2"):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place)
        saved = {name: weight for name, weight in loaded.named_parameters() if "lora_" in name}
        assert len(saved) == 8
        assert_same(saved, {name: weight for name, weight in model.named_parameters() if name in saved})


def test_no_secret_is_written_to_disk(run, monkeypatch):
    secrets = {"HF_TOKEN": "hf_secretsecretsecret", "WANDB_API_KEY": "wandbsecretwandbsecret"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    _, folder = run("--max_steps 1")
    for path, content in all_files(folder):
        assert not any(value.encode() in content for value in secrets.values()), path


# ---------------------------------------------------------------- disks that fail


class FailingDisk:
    """Counts the calls that write, once the model is loaded; with `fails`, that one of them raises ENOSPC."""

    def __init__(self, monkeypatch, fails: int | None = None):
        self.fails, self.calls, self.is_armed = fails, 0, False
        plan_layers = train.plan_layers

        def plan_layers_then_arm(*arguments):
            self.is_armed = True
            return plan_layers(*arguments)

        monkeypatch.setattr(train, "plan_layers", plan_layers_then_arm)
        for place, name in (
            (os, "fsync"), (os, "rename"), (os, "replace"), (Path, "write_text"), (Path, "write_bytes"),
            (Path, "chmod"), (Path, "touch"),
            (qlora.run.checkpoint, "save_file"), (qlora.run.checkpoint, "save_adapter"),
            (qlora.run.checkpoint, "check_space"), (shutil, "rmtree"),
        ):  # fmt: skip
            monkeypatch.setattr(place, name, self.wrap(getattr(place, name)))

    def wrap(self, call):
        def wrapped(*arguments, **options):
            if self.is_armed and not options.get("ignore_errors"):
                self.calls += 1
                if self.calls == self.fails:
                    raise OSError(28, "No space left on device")
            return call(*arguments, **options)

        return wrapped


def test_whichever_write_fails_no_checkpoint_is_lost_and_the_result_is_the_same(run, monkeypatch, capsys):
    flags = "--max_steps 2 --save_steps 1 --logging_steps 1 --lora_dropout 0.1 --save_total_limit 1"
    flags += " --gradient_accumulation_steps 1"
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch)
        _, folder = run(flags, out="uninterrupted")
    want, out = adapter(folder), folder.parent / "out"
    assert disk.calls > 40
    for fails in range(1, disk.calls + 1):
        shutil.rmtree(out, ignore_errors=True)
        capsys.readouterr()
        has_ended = is_refused = False
        with monkeypatch.context() as patch:
            FailingDisk(patch, fails)
            try:
                run(flags)
                assert_same(adapter(out), want)
            except InputError as error:  # only from the first check of the space, or for the adapter itself
                assert re.search("could not be saved|has no room", str(error))
                has_ended, is_refused = True, "has no room" in str(error)
        is_reported = "no checkpoint could be saved" in capsys.readouterr().out
        intact = [path.name for path in list_checkpoints(out) if damage(path) is None]
        assert is_refused or "checkpoint-2" in intact or (is_reported and "checkpoint-1" in intact), intact
        if has_ended:
            run(flags, RESUME)
            assert_same(adapter(out), want)
            assert not list(out.glob("*.tmp"))


LIMITED_FILES_AFTER_STEP_2 = """
import resource, sys
import train
from qlora.run.log import RunLog
limit, *flags = sys.argv[1:]
step_done = RunLog.step_done
def fill_disk(log):
    step_done(log)
    if log.bar.n == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
RunLog.step_done = fill_disk
train.main(flags)
"""


def test_a_full_disk_fails_saves_and_log_lines_but_not_the_training(base, rows_file, tmp_path):
    """The size of files is limited: as on a full disk, write() itself fails."""
    out = tmp_path / "out"
    flags = "--dtype float32 --no_packing --max_steps 4 --save_steps 1 --logging_steps 1".split()
    flags += ["--model", base, "--dataset", rows_file, "--output_dir", str(out)]
    for limit in (300, 9000):
        shutil.rmtree(out, ignore_errors=True)
        argv = [sys.executable, "-c", LIMITED_FILES_AFTER_STEP_2, str(limit), *flags]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=ONE_THREAD)
        assert done.returncode == 1 and "the adapter could not be saved" in done.stderr, done.stderr
        assert (done.stdout + done.stderr).count("no checkpoint could be saved") == 3
        assert names(list_checkpoints(out)) == ["checkpoint-1"]
        assert damage(out / "checkpoint-1") is None
        assert not list(out.glob("*.tmp"))  # a failed write does not keep its space
        assert "Traceback" not in done.stderr
    argv = [sys.executable, "train.py", *flags, *RESUME.split()]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=ONE_THREAD)
    assert done.returncode == 0 and [line["step"] for line in metrics(out)] == [1, 2, 3, 4]


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(run, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"no room for a checkpoint: .* MB needed and 0 MB free"):
        run("--max_steps 1")


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_loads(run, monkeypatch):
    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(train, "load_base", pytest.fail)
    with pytest.raises(InputError, match=r"--output_dir .* cannot be written: Read-only file system"):
        run("--max_steps 1")


# ---------------------------------------------------------------- signals


@pytest.fixture
def hangup():
    """Set the handler of SIGHUP before a run: whoever runs the tests may ignore it, as nohup does."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_run_with_a_checkpoint_of_its_last_step(
    run, uninterrupted, hangup, number, code, capsys, tmp_path
):
    hangup(signal.SIG_DFL)
    before = signal.getsignal(number)
    with signal_after_step(3, number), pytest.raises(SystemExit) as stop:
        run(FLAGS)
    assert stop.value.code == code and signal.getsignal(number) is before
    name = signal.Signals(number).name
    assert f"stopped by {name} after step 3: checkpoint-3 is complete" in capsys.readouterr().out
    assert names(list_checkpoints(tmp_path / "out")) == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "out" / ADAPTER).exists()
    _, folder = run(FLAGS, RESUME)
    assert_bit_identical(folder, uninterrupted)


def test_a_hangup_ignored_under_nohup_does_not_stop_a_run(run, uninterrupted, hangup):
    hangup(signal.SIG_IGN)
    with signal_after_step(3, signal.SIGHUP):
        _, folder = run(FLAGS)
    assert_bit_identical(folder, uninterrupted)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_second_signal_exits_at_once_and_keeps_the_checkpoints(
    base, rows_file, run, uninterrupted, tmp_path
):
    script = """
import os, signal, train
from qlora.run.checkpoint import Checkpoints
from qlora.run.log import RunLog
save, step_done = Checkpoints.save, RunLog.step_done
def signal_after_step_3(log):
    step_done(log)
    if log.bar.n == 3:
        Checkpoints.save = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # the second one, while saving
        os.kill(os.getpid(), signal.SIGTERM)
RunLog.step_done = signal_after_step_3
train.main()
"""
    flags = f"{FLAGS} --dtype float32 --learning_rate 3e-3 --no_packing --no_compile".split()
    flags += ["--model", base, "--dataset", rows_file, "--output_dir", str(tmp_path / "out")]
    argv = [sys.executable, "-c", script, *flags]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=ONE_THREAD)
    assert done.returncode == 143 and "Traceback" not in done.stderr
    assert names(list_checkpoints(tmp_path / "out")) == ["checkpoint-2"]
    _, folder = run(FLAGS, RESUME)
    assert_bit_identical(folder, uninterrupted)


def test_a_signal_during_set_up_ends_a_run_without_a_traceback(base, rows_file, tmp_path):
    script = "import os, train; train.load_base = lambda *_: os.kill(os.getpid(), 2); train.main()"
    argv = [sys.executable, "-c", script, "--model", base, "--dataset", rows_file]
    done = subprocess.run([*argv, "--output_dir", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_a_run_whose_terminal_is_gone_still_saves_its_checkpoint(base, rows_file, tmp_path):
    """As with `train.py 2>&1 | tee log` at Ctrl-C, which ends tee first."""
    flags = "--dtype float32 --no_packing --max_steps 400 --save_steps 1000 --logging_steps 1".split()
    flags += ["--model", base, "--dataset", rows_file, "--output_dir", str(tmp_path)]
    argv = [sys.executable, "train.py", *flags]
    process = subprocess.Popen(
        argv, cwd=ROOT, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    (checkpoint,) = list_checkpoints(tmp_path)
    assert damage(checkpoint) is None


# ---------------------------------------------------------------- evaluations that are interrupted


def stop_in_evaluation(run, step: int, flags: str) -> int:
    """Send SIGTERM in the third batch of the evaluation after a step; returns how many batches were run."""
    target_logprobs, batches = qlora.evaluation.validation.target_logprobs, []

    def count_and_signal(*arguments):
        batches.append(1)
        if len(batches) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return target_logprobs(*arguments)

    def count_from_here():
        patch.setattr(qlora.evaluation.validation, "target_logprobs", count_and_signal)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
        with after_step(step, count_from_here):
            run(flags)
    return len(batches)


@pytest.mark.parametrize("step", [3, 6])
def test_an_interrupted_evaluation_is_repeated_on_resume(run, rows_file, monkeypatch, tmp_path, step):
    flags = f"{FLAGS} --eval_steps 3 --per_device_eval_batch_size 4 --load_best_model_at_end"
    flags += f" --validation_dataset {rows_file}"
    _, folder = run(flags, out="uninterrupted")
    assert stop_in_evaluation(run, step, flags) == 3  # of 11
    evaluated = [line["step"] for line in metrics(tmp_path / "out") if "eval_loss" in line]
    assert evaluated == [3] * (step == 6)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # killed after that evaluation
        patch.setattr(Schedule, "lr_at", interrupt)
        patch.setattr(Checkpoints, "save_final_adapter", interrupt)
        run(flags, RESUME)
    _, resumed = run(flags, RESUME)
    assert comparable_metrics(resumed) == comparable_metrics(folder)
    assert_same(adapter(resumed), adapter(folder))


def test_an_evaluation_stays_owed_until_it_is_complete(run, rows_file, monkeypatch, tmp_path):
    flags = f"{FLAGS} --eval_steps 3 --per_device_eval_batch_size 4 --validation_dataset {rows_file}"
    stop_in_evaluation(run, 3, flags)
    begin = RunLog.begin

    def begin_and_get_a_signal(log, **options):
        begin(log, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(RunLog, "begin", begin_and_get_a_signal)
        run(flags, RESUME)
    assert max(line["step"] for line in metrics(tmp_path / "out")) == 3
    _, folder = run(flags, RESUME)
    assert [line["step"] for line in metrics(folder) if "eval_loss" in line] == [3, 6]


# ---------------------------------------------------------------- the time limit


def test_max_hours_ends_a_run_with_a_checkpoint_and_exit_code_124(run, uninterrupted, monkeypatch, capsys):
    clock, step_done = [0.0], RunLog.step_done

    def take_a_minute(log):
        clock[0] += 60.0
        step_done(log)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="124"):
        patch.setattr(RunLog, "step_done", take_a_minute)
        patch.setattr(time, "monotonic", lambda: clock[0])
        run(FLAGS, "--max_hours 0.05")  # three minutes
    assert "stopped by --max_hours after step 3: checkpoint-3" in capsys.readouterr().out
    _, folder = run(FLAGS, RESUME)
    assert_bit_identical(folder, uninterrupted)


def test_with_max_hours_shorter_than_set_up_every_start_takes_a_step(run, rows_file, tmp_path):
    """Also where it first has to complete an evaluation for which the start before had no time."""
    flags = f"{FLAGS} --eval_steps 2 --load_best_model_at_end --validation_dataset {rows_file}"
    _, folder = run(flags, out="uninterrupted")
    for step in range(1, 7):
        with pytest.raises(SystemExit, match="124"):
            run(flags, RESUME, "--max_hours 1e-9")
        assert list_checkpoints(tmp_path / "out")[-1].name == f"checkpoint-{step}"
    state = json.loads((tmp_path / "out" / "checkpoint-6" / STATE).read_text())
    assert state["progress"]["owes_evaluation"]
    run(flags, RESUME, "--max_hours 1e-9")  # completes it, and that is the end
    assert_bit_identical(tmp_path / "out", final_state(folder))
    assert comparable_metrics(tmp_path / "out") == comparable_metrics(folder)


# ---------------------------------------------------------------- non-finite and unusual losses


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_whose_losses_stay_non_finite_ends_with_the_reason(run, tmp_path, dtype):
    flags = "--gradient_accumulation_steps 1 --save_steps 1 --logging_steps 1 --max_steps 20"
    flags += f" --max_skipped_steps 4 --save_total_limit 0 --dtype {dtype}"
    with scaled_losses(torch.nan, range(3, 10**6)), pytest.raises(InputError) as error:
        run(flags)
    message = str(error.value)
    assert message.startswith("4 non-finite steps in a row (step 6: loss nan, gradient nan")
    assert "last successful update: step 2" in message and "--learning_rate" in message
    assert ("loss scale 4096" in message) == ("bfloat16" in message) == (dtype == "float16")
    assert message.endswith("--resume_from_checkpoint latest resumes after step 6")
    saved = [adapter(tmp_path / "out" / f"checkpoint-{step}") for step in (4, 6)]
    assert_same(*saved)
    assert all(weight.isfinite().all() for weight in saved[0].values())
    assert metrics(tmp_path / "out")[-1]["skipped_steps"] == 3
    advice = f"--learning_rate 1e-4 --allow_changes learning_rate {'dtype' if dtype == 'float16' else ''}"
    run(flags, RESUME, advice, "--dtype bfloat16" if dtype == "float16" else "")
    assert metrics(tmp_path / "out")[-1]["skipped_steps"] == 4


def test_a_few_skipped_steps_do_not_end_a_run(run):
    with scaled_losses(torch.inf, {3, 4, 5, 7, 8, 9}):
        _, folder = run("--gradient_accumulation_steps 1 --max_skipped_steps 4 --max_steps 12")
    assert metrics(folder)[-1]["skipped_steps"] == 6


def test_a_loss_spike_is_printed_and_counted(run, capsys):
    flags = "--gradient_accumulation_steps 1 --max_steps 40 --logging_steps 10 --learning_rate 1e-5"
    with scaled_losses(3, {30}):
        _, folder = run(flags)
    assert [line["loss_spikes"] for line in metrics(folder)] == [0, 0, 1, 1]
    assert capsys.readouterr().out.count("step 30: loss spike, ") == 1


# ---------------------------------------------------------------- errors in the loop


def test_running_out_of_memory_in_a_step_loses_only_that_step(run, tmp_path):
    with random_losses():
        want = final_state(run(FLAGS, out="uninterrupted")[1])
    # 42 rows are steps of 4, 4 and 3 micro-batches: the 14th is the second of step 4.
    with random_losses(out_of_memory_at=14), pytest.raises(InputError) as error:
        run(FLAGS)
    message = str(error.value)
    assert "out of memory after step 3 (CUDA out of memory" in message
    assert "resumes after step 3" in message
    assert names(list_checkpoints(tmp_path / "out")) == ["checkpoint-2", "checkpoint-3"]
    with random_losses():
        run(FLAGS, RESUME)
    assert_bit_identical(tmp_path / "out", want)


def test_an_error_in_the_middle_of_an_update_loses_its_step_but_saves_no_torn_state(run, tmp_path):
    """Some weights are updated then, and others not."""
    want = final_state(run(FLAGS, out="uninterrupted")[1])
    build_optimizer = train.build_optimizer

    def build_failing_optimizer(*arguments):
        optimizer = build_optimizer(*arguments)
        step, calls = optimizer.step, []

        def step_or_fail(*given, **options):
            step(*given, **options)
            calls.append(1)
            if len(calls) == 4:
                raise MemoryError

        optimizer.step = step_or_fail
        return optimizer

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError) as error:
        patch.setattr(train, "build_optimizer", build_failing_optimizer)
        run(FLAGS)
    assert "out of memory after step 3 (MemoryError)" in str(error.value)
    assert str(error.value).endswith("are LOST; --resume_from_checkpoint latest resumes there")
    assert names(list_checkpoints(tmp_path / "out")) == ["checkpoint-2"]
    run(FLAGS, RESUME)
    assert_bit_identical(tmp_path / "out", want)


def test_an_evaluation_that_draws_random_numbers_does_not_break_an_exact_resume(run, rows_file, monkeypatch):
    loss = Validation.loss

    def loss_with_noise(*arguments, **options):
        torch.rand(3)
        return loss(*arguments, **options)

    monkeypatch.setattr(Validation, "loss", loss_with_noise)
    flags = f"{FLAGS} --eval_steps 1 --validation_dataset {rows_file}"
    want = final_state(run(flags, out="uninterrupted")[1])
    with signal_after_step(3), pytest.raises(SystemExit, match="143"):
        run(flags)
    _, folder = run(flags, RESUME)
    assert_bit_identical(folder, want)
    for step in (5, 6):  # and from a checkpoint whose evaluation was complete
        shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
    run(flags, "--resume_from_checkpoint", str(folder / "checkpoint-4"))
    assert_bit_identical(folder, want)


def test_a_run_stopped_twice_in_its_evaluation_has_a_checkpoint_where_it_says(run, rows_file, tmp_path):
    """Also if the checkpoint that it resumed from is in another folder."""
    flags = f"{FLAGS} --eval_steps 2 --validation_dataset {rows_file}"
    want = final_state(run(flags, out="uninterrupted")[1])
    with signal_after_step(4), pytest.raises(SystemExit, match="143"):
        run(flags, out="first")
    loss = Validation.loss

    def loss_with_a_signal(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(Validation, "loss", loss_with_a_signal)
        run(flags, "--resume_from_checkpoint", str(tmp_path / "first" / "checkpoint-4"), out="second")
    assert names(list_checkpoints(tmp_path / "second")) == ["checkpoint-4"]
    _, folder = run(flags, RESUME, out="second")
    assert_bit_identical(folder, want)


def test_running_out_of_memory_in_an_evaluation_loses_nothing(run, rows_file, monkeypatch, tmp_path):
    flags = f"{FLAGS} --eval_steps 6 --validation_dataset {rows_file}"
    _, folder = run(flags, out="uninterrupted")
    with monkeypatch.context() as patch, pytest.raises(InputError, match="resumes after step 6"):
        patch.setattr(qlora.evaluation.validation, "target_logprobs", out_of_memory)
        run(flags)
    run(flags, RESUME)
    assert metrics(tmp_path / "out")[-1] == metrics(folder)[-1]
    assert "eval_loss" in metrics(folder)[-1]


def test_a_bad_row_deep_in_a_stream_loses_no_step(run, monkeypatch, tmp_path):
    steps, make_loader = [], train.make_loader

    def make_loader_with_a_bad_row(*arguments):
        loader = make_loader(*arguments)
        make = loader.make

        def make_or_fail(step):
            if step == 3:
                raise InputError("rows.jsonl: line 99 is not valid JSON")
            steps.append(step)
            return make(step)

        loader.make = make_or_fail
        return loader

    monkeypatch.setattr(train, "make_loader", make_loader_with_a_bad_row)
    message = "line 99 is not valid JSON - --resume_from_checkpoint latest resumes after step 3"
    with pytest.raises(InputError, match=message):
        run(FLAGS)
    assert (tmp_path / "out" / "checkpoint-3").exists() and steps == [0, 1, 2]


def test_a_runtime_error_is_not_mistaken_for_out_of_memory(run, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train, "target_logprobs", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run("--max_steps 1")


@pytest.mark.parametrize(
    "place, name", [(qlora.run.checkpoint, "save_adapter"), (GenerationMixin, "generate")]
)
def test_a_bug_in_saving_or_in_samples_is_raised(run, rows_file, tmp_path, monkeypatch, capsys, place, name):
    """Whoever changes this code must see their mistake, not a line that the run went on without it."""

    def fail(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr(place, name, fail)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": ROWS[0]["prompt"]}) + "\n")
    flags = f"--max_steps 2 --save_steps 1 --validation_dataset {rows_file} --eval_steps 2"
    with pytest.raises(TypeError, match="a bug"):
        run(flags, "--sample_prompts", str(tmp_path / "prompts.jsonl"))
    assert "a bug" not in capsys.readouterr().out


# ---------------------------------------------------------------- settings that a resume compares


def test_settings_that_may_change_on_resume(run, uninterrupted, base, rows_file, tmp_path):
    _, folder = run(FLAGS)
    shutil.rmtree(folder / "checkpoint-6")
    shutil.copytree(base, tmp_path / "moved")
    shutil.copy(rows_file, tmp_path / "renamed.jsonl")
    flags = "--logging_steps 3 --save_steps 6 --gradient_checkpointing 1 --max_hours 9 --report_to wandb"
    run(FLAGS, RESUME, flags, model=str(tmp_path / "moved"), dataset=str(tmp_path / "renamed.jsonl"))
    assert_bit_identical(folder, uninterrupted)
    shutil.rmtree(folder / "checkpoint-6")
    # Another split into micro-batches changes the gradient by rounding only.
    run(FLAGS, RESUME, "--per_device_train_batch_size 2 --gradient_accumulation_steps 8")


def test_another_base_tokenizer_or_other_rows_are_refused_by_name(run, base, rows_file, tmp_path):
    _, folder = run("--max_steps 2 --save_steps 1")
    shutil.rmtree(folder / "checkpoint-2")
    resume = "--max_steps 2", RESUME
    other = shutil.copytree(base, tmp_path / "base")
    flip_bit(other / "model.safetensors", -1000)
    with pytest.raises(InputError, match=r"base is not the same - .* --allow_changes base$"):
        run(*resume, model=str(other))
    rows = Path(rows_file).read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace("red leaf", "red loaf"))
    with pytest.raises(InputError, match=r"data is not the same - .* --allow_changes data$"):
        run(*resume, dataset=str(tmp_path / "rows.jsonl"))
    other = shutil.copytree(base, tmp_path / "tokenizer")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["<0x00>"], vocabulary["<0x01>"] = vocabulary["<0x01>"], vocabulary["<0x00>"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="tokenizer is not the same"):
        run(*resume, model=str(other))
    allowed = "--allow_changes data learning_rate --learning_rate 1e-4"
    run(*resume, allowed, dataset=str(tmp_path / "rows.jsonl"))


def test_an_adapter_of_another_base_is_refused_unless_allowed(run, base, tmp_path):
    _, folder = run("--max_steps 1", out="first")
    other = shutil.copytree(base, tmp_path / "base")
    flip_bit(other / "model.safetensors", -1000)
    with pytest.raises(InputError, match="was trained on another base than --model"):
        run("--max_steps 1 --adapter", str(folder), model=str(other))
    run("--max_steps 1 --allow_changes base --adapter", str(folder), model=str(other))


def test_resuming_without_the_adapter_that_was_trained_further_is_refused(run):
    _, first = run("--max_steps 1 --lora_alpha 64", out="first")
    flags = f"--max_steps 4 --save_steps 2 --adapter {first}"
    _, folder = run(flags)
    shutil.rmtree(folder / "checkpoint-4")
    with pytest.raises(InputError, match="lora_alpha was 64, now it is 16"):
        run("--max_steps 4 --save_steps 2", RESUME)
    run(flags, RESUME)


# ---------------------------------------------------------------- the best checkpoint

BEST_FLAGS = "--max_steps 6 --eval_steps 1 --save_steps 2 --save_total_limit 1 --load_best_model_at_end"


def test_the_best_checkpoint_is_kept_and_its_adapter_is_the_result(run, rows_file, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.0, 2.2, 4.0])
    monkeypatch.setattr(Validation, "loss", lambda *_: next(losses))
    _, folder = run(BEST_FLAGS, "--validation_dataset", rows_file)
    assert names(list_checkpoints(folder)) == ["checkpoint-2", "checkpoint-6"]
    assert_same(adapter(folder), adapter(folder / "checkpoint-2"))
    progress = json.loads((folder / "checkpoint-6" / STATE).read_text())["progress"]
    assert (progress["best_step"], progress["best_loss"]) == (2, 2.0)


def test_the_best_checkpoint_stays_if_a_better_one_cannot_be_saved(run, rows_file, monkeypatch, capsys):
    losses, save_adapter = iter([2.0, 3.0, 1.0, 3.0, 3.0, 3.0]), qlora.run.checkpoint.save_adapter

    def fail_at_step_3(folder, *arguments):
        if folder.name == "checkpoint-3.tmp":
            raise OSError(28, "No space left on device")
        save_adapter(folder, *arguments)

    monkeypatch.setattr(Validation, "loss", lambda *_: next(losses))
    monkeypatch.setattr(qlora.run.checkpoint, "save_adapter", fail_at_step_3)
    _, folder = run(BEST_FLAGS, "--validation_dataset", rows_file)
    assert "step 3: no checkpoint could be saved" in capsys.readouterr().out
    assert names(list_checkpoints(folder)) == ["checkpoint-1", "checkpoint-6"]
    assert_same(adapter(folder), adapter(folder / "checkpoint-1"))


def test_the_best_of_other_rows_or_of_another_folder_is_forgotten(run, rows_file, tmp_path):
    flags = "--max_steps 4 --eval_steps 2 --save_steps 2 --save_total_limit 0 --load_best_model_at_end"
    _, folder = run(flags, "--validation_dataset", rows_file)
    resume = "--resume_from_checkpoint", str(folder / "checkpoint-2")
    (tmp_path / "few.jsonl").write_text("".join(Path(rows_file).read_text().splitlines(True)[:5]))
    for out, rows in (("elsewhere", rows_file), ("out", str(tmp_path / "few.jsonl"))):
        _, resumed = run(flags, *resume, "--validation_dataset", rows, out=out)
        progress = json.loads((resumed / "checkpoint-4" / STATE).read_text())["progress"]
        assert progress["best_step"] == 4
