"""What becomes of a run that is killed, stopped, starved of disk or memory, or fed what is not a number."""

import json
import math
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qlora.evaluation.validation
import qlora.model.adapter
import qlora.run.checkpoint
import qlora.run.files
import qlora.run.stop
import train
from qlora.data.tokenize import tokenize_rows
from qlora.errors import InputError
from qlora.evaluation.validation import eval_batches
from qlora.model.adapter import ADAPTER
from qlora.run.checkpoint import STATE, STATE_TENSORS, find_checkpoint, list_checkpoints
from qlora.run.files import MANIFEST, damage
from qlora.run.fingerprint import base_fingerprint, rows_fingerprint
from qlora.run.progress import Progress
from tests.conftest import ROOT
from tests.test_train import adapter, assert_same, interrupt, metrics

FLAGS = "--max_steps 6 --save_steps 2 --logging_steps 1 --lora_dropout 0.1 --save_total_limit 0"
ON = "--resume_from_checkpoint latest"


@pytest.fixture
def whole(run):
    """(adapter, optimizer's state) of a run that nothing happens to."""
    _, folder = run(FLAGS, out="whole")
    return adapter(folder), load_file(folder / "checkpoint-6" / STATE_TENSORS)


def assert_is(folder: Path, whole) -> None:
    assert_same(adapter(folder), whole[0])
    assert_same(load_file(folder / "checkpoint-6" / STATE_TENSORS), whole[1])


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_twenty_kills_and_five_sigterms_lose_nothing(tmp_path):
    """tests/torture.py has the numbers of `make torture`."""
    command = [sys.executable, str(ROOT / "tests/torture.py"), *"--kills 20 --terms 5 --forked".split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "all bit-identical" in done.stdout, done.stdout + done.stderr[-3000:]
    count = json.loads(done.stdout.splitlines()[-2])
    assert count["SIGKILL"] == 20 and count["SIGTERM"] == 5 and count["in a save"] > 0


# ---------------------------------------------------------------- damaged checkpoints


def test_every_flipped_byte_and_every_cut_is_found(run):
    _, folder = run("--max_steps 1")
    checkpoint, draw = folder / "checkpoint-1", random.Random(0)
    assert damage(checkpoint) is None
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert {ADAPTER, STATE, STATE_TENSORS, MANIFEST, "tokenizer.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        every = range(len(content)) if path.name == MANIFEST else draw.sample(range(len(content)), 40)
        for position in every:
            flip(path, position, draw.randrange(8))
            assert damage(checkpoint) if path.name == MANIFEST else path.name in damage(checkpoint)
            path.write_bytes(content)
        for length in [0, len(content) - 1, *draw.sample(range(len(content)), 5)]:
            path.write_bytes(content[:length])
            assert path.name in damage(checkpoint)
        path.unlink()
        assert path.name in damage(checkpoint)
        path.write_bytes(content)
    assert damage(checkpoint) is None


@pytest.mark.parametrize("name", [ADAPTER, STATE, STATE_TENSORS, MANIFEST, "tokenizer.json"])
def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_it_serves(run, whole, name, capsys):
    _, folder = run(FLAGS)
    flip(folder / "checkpoint-6" / name, 30)
    capsys.readouterr()
    run(FLAGS, ON)
    out = capsys.readouterr().out
    assert "checkpoint-6 is passed over: " in out and "going on from checkpoint-4" in out
    assert_is(folder, whole)


def test_if_all_checkpoints_are_damaged_nothing_starts_and_nothing_is_lost(run):
    _, folder = run(FLAGS)
    for checkpoint in list_checkpoints(folder):
        flip(checkpoint / ADAPTER, 500)
    before = sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole"):
        run(FLAGS, ON)
    with pytest.raises(InputError, match=f"checkpoint-4 is no whole checkpoint: {ADAPTER} does not"):
        run(FLAGS, "--resume_from_checkpoint", str(folder / "checkpoint-4"))
    assert sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file()) == before


def test_a_pickle_in_the_folder_is_never_opened(run, whole, tmp_path):
    _, folder = run(FLAGS)
    shutil.rmtree(folder / "checkpoint-6")
    bomb = b"cposix\nsystem\n(S'touch " + str(tmp_path / "executed").encode() + b"'\ntR."
    for place in (folder, folder / "checkpoint-4"):
        for name in ("training_state.bin", "adapter_model.bin", "optimizer.pt", "rng_state.pth"):
            (place / name).write_bytes(bomb)
    run(FLAGS, ON)
    assert_is(folder, whole)
    assert not (tmp_path / "executed").exists()


def test_a_base_of_pickles_is_refused(run, base, tmp_path):
    model = shutil.copytree(base, tmp_path / "pickled")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model.safetensors"):
        run("--max_steps 1", model=str(model))


# ---------------------------------------------------------------- files on the disk


def test_checkpoints_and_the_adapter_can_be_read_by_whom_the_umask_says(run):
    code = "import os; os.umask(0o027); import qlora.run.files; print(oct(0o666 & ~qlora.run.files._UMASK))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert seen.stdout.strip() == "0o640"
    _, folder = run("--max_steps 1")
    for path in (*folder.glob("*.*"), *(folder / "checkpoint-1").rglob("*")):
        if path.is_file() and path.name != "metrics.jsonl":
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~qlora.run.files._UMASK, path


def test_leftovers_of_a_kill_are_swept_and_nothing_else(run):
    _, folder = run("--max_steps 1")
    for name in ("checkpoint-7.tmp", "checkpoint-1.old.tmp", "adapter.tmp", "my-notes.tmp", "checkpoint-x"):
        (folder / name).mkdir()
        (folder / name / "a").write_text("")
    (folder / "metrics.jsonl.tmp").write_text("")
    run("--max_steps 1", ON)
    left = {path.name for path in folder.iterdir() if path.is_dir() or path.suffix == ".tmp"}
    assert left == {"checkpoint-1", "my-notes.tmp", "checkpoint-x"}


def test_the_saved_folder_is_an_adapter_for_peft_and_others_by_itself(run, base):
    model, folder = run("--max_steps 2")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base and config["peft_type"] == "LORA"
    assert config["r"] == 16 and sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in folder.iterdir()}
    for place in (folder, folder / "checkpoint-2"):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place)
        kept = {name: weight for name, weight in loaded.named_parameters() if "lora_" in name}
        assert len(kept) == 8
        for name, weight in model.named_parameters():
            if name in kept:
                assert torch.equal(weight, kept[name])


def test_a_second_run_on_one_folder_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    hold = f"""
import sys, time
from pathlib import Path
from qlora.run.files import lock_folder
with lock_folder(Path({str(tmp_path / "out")!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match="is being written by another run"):
        run("--max_steps 1")
    holder.kill()
    holder.wait()
    run("--max_steps 1")  # a dead process holds nothing


# ---------------------------------------------------------------- a disk that fails


class Fault:
    """Fails the chosen one of all calls that write once the data is loaded, or none, and counts them."""

    def __init__(self, monkeypatch, fails: int | None = None):
        self.fails, self.calls, self.is_armed = fails, 0, False
        plan_layers = train.plan_layers

        def planned(*arguments):
            self.is_armed = True
            return plan_layers(*arguments)

        monkeypatch.setattr(train, "plan_layers", planned)
        for module, name in (
            (os, "fsync"), (os, "rename"), (os, "replace"), (Path, "write_text"), (Path, "write_bytes"),
            (Path, "chmod"),
            (qlora.run.checkpoint, "save_file"), (qlora.run.checkpoint, "save_adapter"),
            (qlora.model.adapter, "save_adapter"), (qlora.run.checkpoint, "check_space"), (shutil, "rmtree"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, call):
        def wrapped(*arguments, **kwargs):
            if self.is_armed and not kwargs.get("ignore_errors"):
                self.calls += 1
                if self.calls == self.fails:
                    raise OSError(28, "No space left on device")
            return call(*arguments, **kwargs)

        return wrapped


def test_whichever_write_fails_no_good_checkpoint_is_lost_and_the_end_is_the_same(run, monkeypatch, capsys):
    flags = "--max_steps 2 --save_steps 1 --logging_steps 1 --lora_dropout 0.1 --save_total_limit 1"
    with monkeypatch.context() as patch:
        fault = Fault(patch)
        _, folder = run(flags, out="whole")
    want, out = adapter(folder), folder.parent / "out"
    assert fault.calls > 40
    for fails in range(1, fault.calls + 1):
        shutil.rmtree(out, ignore_errors=True)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            Fault(patch, fails)
            try:
                run(flags)
                assert_same(adapter(out), want)
            except InputError as error:  # the last thing, the adapter itself, or the first, the room for all
                assert re.search("could not be saved|has no room", str(error))
                is_ended, is_refused = True, "has no room" in str(error)
            else:
                is_ended = is_refused = False
        is_said = "no checkpoint could be saved" in capsys.readouterr().out
        found = [path.name for path in list_checkpoints(out) if damage(path) is None]
        assert is_refused or "checkpoint-2" in found or (is_said and "checkpoint-1" in found), found
        if is_ended:
            run(flags, ON)
            assert_same(adapter(out), want)
            assert not list(out.glob("*.tmp"))


def test_a_full_disk_fails_saves_and_lines_but_not_the_training(base, rows_file, tmp_path):
    """Files can be of so many bytes and no larger: as on a full disk, write() itself fails."""
    flags = "--dtype float32 --no_packing --max_steps 4 --save_steps 1 --logging_steps 1".split()
    flags += ["--model", base, "--dataset", rows_file, "--output_dir", str(tmp_path / "o")]
    script = """
import resource, sys
import train
limit, *flags = sys.argv[1:]
done = train.RunLog.step_done
def step_done(log):
    done(log)
    if log.bar.n == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
train.RunLog.step_done = step_done
train.main(flags)
"""
    for limit in (300, 9000):
        shutil.rmtree(tmp_path / "o", ignore_errors=True)
        argv = [sys.executable, "-c", script, str(limit), *flags]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 1 and "the adapter could not be saved" in done.stderr, done.stderr
        assert (
            done.stdout.count("no checkpoint could be saved") + done.stderr.count("no checkpoint could") == 3
        )
        assert [path.name for path in list_checkpoints(tmp_path / "o")] == ["checkpoint-1"]
        assert damage(tmp_path / "o" / "checkpoint-1") is None
        assert not list((tmp_path / "o").glob("*.tmp"))  # what failed does not keep its room
        assert "Traceback" not in done.stderr
    argv = [sys.executable, "train.py", *flags, *ON.split()]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and [line["step"] for line in metrics(tmp_path / "o")] == [1, 2, 3, 4]


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


# ---------------------------------------------------------------- signals and time


def at_step(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """Have this process get a signal at the end of a step."""
    done = train.RunLog.step_done

    def step_done(log):
        done(log)
        if log.bar.n == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train.RunLog, "step_done", step_done)


@pytest.fixture
def hangup():
    """Sets what SIGHUP does before the run: whoever runs the tests may ignore it, as nohup does."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_in_a_checkpoint_of_the_step(
    run, whole, monkeypatch, hangup, number, code, capsys, tmp_path
):
    hangup(signal.SIG_DFL)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        at_step(patch, 3, number)
        run(FLAGS)
    assert stop.value.code == code and signal.getsignal(number) is before
    captured = capsys.readouterr()
    name = signal.Signals(number).name
    assert f"stopped by {name} after step 3, checkpoint-3 has all of it" in captured.out
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "out" / ADAPTER).exists()
    _, folder = run(FLAGS, ON)
    assert_is(folder, whole)


def test_a_hangup_that_nohup_ignores_is_ignored(run, whole, monkeypatch, hangup):
    hangup(signal.SIG_IGN)
    with monkeypatch.context() as patch:
        at_step(patch, 3, signal.SIGHUP)
        _, folder = run(FLAGS)
    assert_is(folder, whole)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def stopped_in_evaluation(run, monkeypatch, step: int, *flags: str) -> int:
    """Send SIGTERM in the third batch of the evaluation after a step; returns how many batches it took."""
    taken, loss, done = [], qlora.evaluation.validation.next_token_loss, train.RunLog.step_done

    def batch(*arguments):
        taken.append(1)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):

        def step_done(log):
            done(log)
            if log.bar.n == step:
                patch.setattr(qlora.evaluation.validation, "next_token_loss", batch)

        patch.setattr(train.RunLog, "step_done", step_done)
        run(*flags)
    return len(taken)


@pytest.mark.parametrize("step", [3, 6])
def test_a_signal_ends_an_evaluation_which_is_made_up_for(run, rows_file, monkeypatch, tmp_path, step):
    flags = f"{FLAGS} --eval_steps 3 --per_device_eval_batch_size 4 --load_best_model_at_end"
    flags += f" --validation_dataset {rows_file}"
    _, folder = run(flags, out="whole")
    assert stopped_in_evaluation(run, monkeypatch, step, flags) == 3  # of 11
    made = [line["step"] for line in metrics(tmp_path / "out") if "eval_loss" in line]
    assert made == [3] * (step == 6)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # killed behind that evaluation
        patch.setattr(train, "lr_at", interrupt)
        patch.setattr(train, "save_final_adapter", interrupt)
        run(flags, ON)
    _, resumed = run(flags, ON)
    got, want = metrics(resumed), metrics(folder)
    for line in (*got, *want):
        line.pop("tokens_per_s", None), line.pop("data_wait", None)
    assert got == want
    assert_same(adapter(resumed), adapter(folder))


def test_an_evaluation_that_is_owed_stays_owed_until_it_is_made(run, rows_file, monkeypatch, tmp_path):
    flags = f"{FLAGS} --eval_steps 3 --per_device_eval_batch_size 4 --validation_dataset {rows_file}"
    stopped_in_evaluation(run, monkeypatch, 3, flags)
    begin = train.RunLog.begin

    def begin_and_be_stopped(log, **owed):
        begin(log, **owed)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(train.RunLog, "begin", begin_and_be_stopped)
        run(flags, ON)
    assert max(line["step"] for line in metrics(tmp_path / "out")) == 3
    _, folder = run(flags, ON)
    assert [line["step"] for line in metrics(folder) if "eval_loss" in line] == [3, 6]


def test_a_terminal_that_is_gone_does_not_end_a_run(base, rows_file, tmp_path):
    """As `train.py 2>&1 | tee log` at Ctrl-C, which ends tee first."""
    flags = "--dtype float32 --no_packing --max_steps 400 --save_steps 1000 --logging_steps 1".split()
    flags += ["--model", base, "--dataset", rows_file, "--output_dir", str(tmp_path)]
    argv = [sys.executable, "train.py", *flags]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    (checkpoint,) = list_checkpoints(tmp_path)
    assert damage(checkpoint) is None


def test_a_second_signal_leaves_at_once(run, whole, monkeypatch):
    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    with monkeypatch.context() as patch, pytest.raises(Left, match="143"):
        patch.setattr(qlora.run.stop.os, "_exit", leave)
        at_step(patch, 3)
        patch.setattr(train, "save_checkpoint", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        run(FLAGS)
    _, folder = run(FLAGS, ON)
    assert_is(folder, whole)


def test_max_hours_ends_with_a_checkpoint_and_a_code_of_its_own(run, whole, monkeypatch, capsys):
    clock, done = [0.0], train.RunLog.step_done

    def step_done(log):
        clock[0] += 60.0
        done(log)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="124"):
        patch.setattr(train.RunLog, "step_done", step_done)
        patch.setattr(time, "monotonic", lambda: clock[0])
        run(FLAGS, "--max_hours 0.05")  # three minutes
    assert "stopped by --max_hours after step 3, checkpoint-3" in capsys.readouterr().out
    _, folder = run(FLAGS, ON)
    assert_is(folder, whole)


def test_a_signal_before_the_first_step_ends_without_a_traceback(base, rows_file, tmp_path):
    script = "import os, train; train.load_base = lambda *_: os.kill(os.getpid(), 2); train.main()"
    argv = [sys.executable, "-c", script, "--model", base, "--dataset", rows_file]
    done = subprocess.run([*argv, "--output_dir", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 130 and "Traceback" not in done.stderr


# ---------------------------------------------------------------- numbers


def losses_become(monkeypatch, value, which: set[int] | range) -> None:
    """Multiply the losses of these micro-batches (from 1) by a value."""
    calls, loss = [], train.next_token_loss

    def changed(*arguments):
        calls.append(1)
        return loss(*arguments) * (value if len(calls) in which else 1)

    monkeypatch.setattr(train, "next_token_loss", changed)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_steps_that_are_never_finite_end_the_run_with_the_reason(run, monkeypatch, tmp_path, dtype):
    flags = "--gradient_accumulation_steps 1 --save_steps 1 --logging_steps 1 --max_steps 20"
    flags += f" --max_skipped_steps 4 --save_total_limit 0 --dtype {dtype}"
    with monkeypatch.context() as patch, pytest.raises(InputError) as error:
        losses_become(patch, torch.nan, range(3, 10**6))
        run(flags)
    message = str(error.value)
    assert message.startswith("4 steps in a row were not finite (step 6: loss nan, gradient nan")
    assert "the last that was taken is step 2" in message and "--learning_rate" in message
    assert ("loss scale 4096" in message) == ("bfloat16" in message) == (dtype == "float16")
    assert message.endswith("--resume_from_checkpoint latest goes on after step 6")
    kept = [adapter(tmp_path / "out" / f"checkpoint-{step}") for step in (4, 6)]
    assert_same(*kept)
    assert all(weight.isfinite().all() for weight in kept[0].values())
    assert metrics(tmp_path / "out")[-1]["skipped_steps"] == 3
    advice = f"--learning_rate 1e-4 --allow_changes learning_rate {'dtype' if dtype == 'float16' else ''}"
    run(flags, ON, advice, "--dtype bfloat16" if dtype == "float16" else "")
    assert metrics(tmp_path / "out")[-1]["skipped_steps"] == 4


def test_a_few_skipped_steps_do_not_end_a_run(run, monkeypatch):
    losses_become(monkeypatch, torch.inf, {3, 4, 5, 7, 8, 9})
    _, folder = run("--gradient_accumulation_steps 1 --max_skipped_steps 4 --max_steps 12")
    assert metrics(folder)[-1]["skipped_steps"] == 6


def test_a_loss_that_stands_out_is_said_and_counted(run, monkeypatch, capsys):
    losses_become(monkeypatch, 3, {30})
    _, folder = run("--gradient_accumulation_steps 1 --max_steps 40 --logging_steps 10 --learning_rate 1e-5")
    assert [line["loss_spikes"] for line in metrics(folder)] == [0, 0, 1, 1]
    assert capsys.readouterr().out.count("step 30: a loss of ") == 1


def test_falling_and_noisy_losses_are_no_spikes():
    draw, progress = random.Random(0), Progress()
    assert not any(progress.record(8 * 0.97**step + draw.gauss(1, 0.1), 1, 1, 0) for step in range(300))
    assert progress.record(3.0, 1, 1, 0)


# ---------------------------------------------------------------- memory


def runs_out(monkeypatch, call: int) -> None:
    calls, loss = [], train.next_token_loss

    def running_out(*arguments):
        calls.append(1)
        torch.rand(5)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss(*arguments)

    monkeypatch.setattr(train, "next_token_loss", running_out)


def test_memory_that_runs_out_in_a_step_costs_that_step(run, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        runs_out(patch, 10**6)
        _, folder = run(FLAGS, out="whole")
    want = adapter(folder), load_file(folder / "checkpoint-6" / STATE_TENSORS)
    with monkeypatch.context() as patch, pytest.raises(InputError) as error:
        runs_out(patch, 14)  # the second micro-batch of step 4: 4, 4 and 3 a step
        run(FLAGS)
    message = str(error.value)
    assert "out of memory after step 3 (CUDA out of memory" in message and "goes on after step 3" in message
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-3"]
    with monkeypatch.context() as patch:
        runs_out(patch, 10**6)
        run(FLAGS, ON)
    assert_is(tmp_path / "out", want)


def test_memory_that_runs_out_in_an_evaluation_costs_nothing(run, rows_file, monkeypatch, tmp_path):
    flags = f"{FLAGS} --eval_steps 6 --validation_dataset {rows_file}"
    _, folder = run(flags, out="whole")

    def running_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="goes on after step 6"):
        patch.setattr(qlora.evaluation.validation, "next_token_loss", running_out)
        run(flags)
    run(flags, ON)
    assert metrics(tmp_path / "out")[-1] == metrics(folder)[-1]
    assert "eval_loss" in metrics(folder)[-1]


def test_a_bad_row_deep_in_a_stream_costs_no_step(run, monkeypatch, tmp_path):
    made, make = [], train.make_loader

    def failing(*arguments):
        loader, steps = make(*arguments)
        make_step = loader.make

        def broken(step):
            if step == 3:
                raise InputError("rows.jsonl: line 99 is no JSON")
            made.append(step)
            return make_step(step)

        loader.make = broken
        return loader, steps

    monkeypatch.setattr(train, "make_loader", failing)
    with pytest.raises(
        InputError, match="line 99 is no JSON - --resume_from_checkpoint latest goes on after step 3"
    ):
        run(FLAGS)
    assert (tmp_path / "out" / "checkpoint-3").exists() and made == [0, 1, 2]


def test_another_error_is_not_taken_for_one_of_memory(run, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train, "next_token_loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run("--max_steps 1")


def test_batches_of_an_evaluation_take_no_more_tokens_than_a_step():
    lengths = torch.tensor([5, 100, 40, 41, 7, 90, 300]).numpy()
    batches = eval_batches(lengths, 4, 200)
    assert batches == [[6], [1, 5], [3, 2, 4, 0]]
    assert eval_batches(lengths, 2, 10**6) == [[6, 1], [5, 3], [2, 4], [0]]


# ---------------------------------------------------------------- what a resume must find


def test_what_may_change_may_change(run, whole, base, rows_file, tmp_path):
    _, folder = run(FLAGS)
    shutil.rmtree(folder / "checkpoint-6")
    shutil.copytree(base, tmp_path / "moved")
    shutil.copy(rows_file, tmp_path / "renamed.jsonl")
    free = "--logging_steps 3 --save_steps 6 --gradient_checkpointing 1 --max_hours 9 --report_to wandb"
    run(FLAGS, ON, free, model=str(tmp_path / "moved"), dataset=str(tmp_path / "renamed.jsonl"))
    assert_is(folder, whole)
    shutil.rmtree(folder / "checkpoint-6")
    run(FLAGS, ON, "--per_device_train_batch_size 2 --gradient_accumulation_steps 8")  # up to rounding


def test_another_base_tokenizer_or_other_rows_are_refused_by_name(run, base, rows_file, tmp_path):
    _, folder = run("--max_steps 2 --save_steps 1")
    shutil.rmtree(folder / "checkpoint-2")
    again = "--max_steps 2", ON
    other = shutil.copytree(base, tmp_path / "base")
    flip(other / "model.safetensors", (other / "model.safetensors").stat().st_size - 1000)
    with pytest.raises(InputError, match=r"base is another - .* --allow_changes base$"):
        run(*again, model=str(other))
    rows = Path(rows_file).read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace("red leaf", "red loaf"))
    with pytest.raises(InputError, match=r"data is another - .* --allow_changes data$"):
        run(*again, dataset=str(tmp_path / "rows.jsonl"))
    other = shutil.copytree(base, tmp_path / "tokenizer")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["<0x00>"], vocabulary["<0x01>"] = vocabulary["<0x01>"], vocabulary["<0x00>"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="tokenizer is another"):
        run(*again, model=str(other))
    run(
        *again,
        "--allow_changes data learning_rate",
        "--learning_rate 1e-4",
        dataset=str(tmp_path / "rows.jsonl"),
    )


def test_rows_of_the_same_lengths_are_told_apart(tokenizer):
    rows = [
        tokenize_rows([("row 1", {"prompt": prompt, "completion": "yes"})], tokenizer)
        for prompt in ("red leaf", "leaf red", "red leaf")
    ]
    assert rows[0].lengths == rows[1].lengths
    first, second, third = map(rows_fingerprint, rows)
    assert first == third != second


def test_a_base_in_several_files_is_told_by_each_of_them(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    seen = {base_fingerprint(base), base_fingerprint(str(tmp_path))}
    for shard in shards:
        flip(shard, -100)
        seen.add(base_fingerprint(str(tmp_path)))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_version": "0"}))
    assert base_fingerprint(str(tmp_path)) in seen and len(seen) == 2 + len(shards)
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1.0}))
    assert base_fingerprint(str(tmp_path)) not in seen


def test_an_adapter_on_another_base_is_refused_unless_asked(run, base, tmp_path):
    _, folder = run("--max_steps 1", out="first")
    other = shutil.copytree(base, tmp_path / "base")
    flip(other / "model.safetensors", (other / "model.safetensors").stat().st_size - 1000)
    with pytest.raises(InputError, match="was trained on another base than --model"):
        run("--max_steps 1 --adapter", str(folder), model=str(other))
    run("--max_steps 1 --allow_changes base --adapter", str(folder), model=str(other))


def test_the_best_checkpoint_is_kept_and_its_adapter_is_the_end(run, rows_file, monkeypatch):
    found = iter([3.0, 2.0, 2.5, 2.0, 2.2, 4.0])
    monkeypatch.setattr(train, "evaluate_loss", lambda *_: next(found))
    flags = "--max_steps 6 --eval_steps 1 --save_steps 2 --save_total_limit 1 --load_best_model_at_end"
    _, folder = run(flags, "--validation_dataset", rows_file)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-6"]
    assert_same(adapter(folder), adapter(folder / "checkpoint-2"))
    best = json.loads((folder / "checkpoint-6" / STATE).read_text())["progress"]
    assert (best["best_step"], best["best_loss"]) == (2, 2.0)


def test_the_best_stays_when_a_better_one_cannot_be_saved(run, rows_file, monkeypatch, capsys):
    found = iter([2.0, 3.0, 1.0, 3.0, 3.0, 3.0])
    monkeypatch.setattr(train, "evaluate_loss", lambda *_: next(found))
    save = train.save_checkpoint

    def full_once(*arguments, **options):
        if arguments[7].step == 3:
            raise OSError(28, "No space left on device")
        return save(*arguments, **options)

    monkeypatch.setattr(train, "save_checkpoint", full_once)
    flags = "--max_steps 6 --eval_steps 1 --save_steps 2 --save_total_limit 1 --load_best_model_at_end"
    _, folder = run(flags, "--validation_dataset", rows_file)
    assert "step 3: no checkpoint could be saved" in capsys.readouterr().out
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-1", "checkpoint-6"]
    assert_same(adapter(folder), adapter(folder / "checkpoint-1"))


def test_an_evaluation_that_is_not_finite_is_never_the_best():
    progress = Progress()
    assert not progress.is_best(math.nan) and not progress.is_best(math.inf)
    assert progress.is_best(2.0) and not progress.is_best(2.0) and not progress.is_best(math.nan)


def test_the_best_of_other_rows_or_of_another_folder_is_forgotten(run, rows_file, tmp_path):
    flags = "--max_steps 4 --eval_steps 2 --save_steps 2 --save_total_limit 0 --load_best_model_at_end"
    _, folder = run(flags, "--validation_dataset", rows_file)

    def best_of_resumed(out: str, rows: str) -> dict:
        run(
            flags,
            "--resume_from_checkpoint",
            str(folder / "checkpoint-2"),
            "--validation_dataset",
            rows,
            out=out,
        )
        return json.loads((tmp_path / out / "checkpoint-4" / STATE).read_text())["progress"]

    assert best_of_resumed("elsewhere", rows_file)["best_step"] == 4
    (tmp_path / "few.jsonl").write_text("".join(Path(rows_file).read_text().splitlines(True)[:5]))
    progress = best_of_resumed("out", str(tmp_path / "few.jsonl"))
    assert progress["best_step"] == 4


def test_a_resume_without_the_adapter_that_was_trained_further_is_refused(run):
    _, first = run("--max_steps 1 --lora_alpha 64", out="first")
    flags = f"--max_steps 4 --save_steps 2 --adapter {first}"
    _, folder = run(flags)
    shutil.rmtree(folder / "checkpoint-4")
    with pytest.raises(InputError, match="lora_alpha was 64, now it is 16"):
        run("--max_steps 4 --save_steps 2", ON)
    run(flags, ON)


def test_a_checkpoint_that_does_not_read_as_written_is_none(run, monkeypatch, capsys):
    check = qlora.run.checkpoint.damage
    monkeypatch.setattr(
        qlora.run.checkpoint,
        "damage",
        lambda folder: "rotten" if folder.name == "checkpoint-4" else check(folder),
    )
    _, folder = run("--max_steps 6 --save_steps 2 --save_total_limit 2")
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-6"]
    assert "step 4: no checkpoint could be saved" in capsys.readouterr().out


def test_nothing_secret_is_written(run, monkeypatch):
    secrets = {"HF_TOKEN": "hf_secretsecretsecret", "WANDB_API_KEY": "wandbsecretwandbsecret"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    _, folder = run("--max_steps 1")
    for path in folder.rglob("*"):
        if path.is_file():
            assert not any(value.encode() in path.read_bytes() for value in secrets.values()), path


def test_latest_of_an_empty_folder_is_a_fresh_start(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
