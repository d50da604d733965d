"""The frame of a command: errors in one line, exit codes, and output streams that cannot end a run."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.errors import InputError
from qlora.run.terminal import SafeStream, command
from tests.conftest import ROOT
from tests.results import metrics


def test_an_input_error_is_one_line_and_exit_code_1():
    with pytest.raises(SystemExit) as exit, command("train.py"):
        raise InputError("--seed is too large")
    assert exit.value.code == "train.py: error: --seed is too large"  # printed by Python, with exit code 1


def test_ctrl_c_has_exit_code_130():
    with pytest.raises(SystemExit) as exit, command("train.py"):
        raise KeyboardInterrupt
    assert exit.value.code == 130


def test_other_errors_keep_their_traceback():
    with pytest.raises(TypeError, match="a bug"), command("train.py"):
        raise TypeError("a bug")


def test_after_a_command_the_streams_are_the_ones_before(capsys):
    streams = sys.stdout, sys.stderr
    with command("train.py"):
        print("a line")
        assert isinstance(sys.stdout, SafeStream)
    assert (sys.stdout, sys.stderr) == streams and capsys.readouterr().out == "a line\n"


# ---------------------------------------------------------------- streams


def test_characters_that_the_encoding_lacks_are_printed_as_question_marks():
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    print("caf\xe9 \u65e5\u672c", file=SafeStream(stdout), flush=True)
    assert stdout.buffer.getvalue() == b"caf\xe9 ??\n"


def test_a_stream_without_an_encoding_takes_any_character():
    stdout = io.StringIO()  # as in notebooks
    print("\u65e5", file=SafeStream(stdout))
    assert stdout.getvalue() == "\u65e5\n"


def test_without_a_stream_lines_are_dropped():
    print("a line", file=SafeStream(None), flush=True)  # as after `>&-`


def test_a_stream_whose_reader_is_gone_leads_nowhere():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        stream = SafeStream(file)
        print("a line", file=stream, flush=True)
        assert stream.error is None
        print("another line", file=file, flush=True)  # raises nothing any more


class FullDisk(io.StringIO):
    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_ends_no_command_but_is_an_error_at_its_end(monkeypatch):
    stdout = FullDisk()
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as exit, command("train.py"):
        for line in ("one", "two"):
            print(line, flush=True)
    assert stdout.getvalue() == "one\ntwo\n"  # every line is tried
    assert (
        exit.value.code
        == "train.py: error: standard output could not always be written: No space left on device"
    )


def test_an_error_of_the_command_itself_comes_first(monkeypatch):
    monkeypatch.setattr(sys, "stdout", FullDisk())
    with pytest.raises(SystemExit) as exit, command("train.py"):
        print("a line", flush=True)
        raise InputError("--seed is too large")
    assert exit.value.code == "train.py: error: --seed is too large"


def test_samples_outside_latin_1_do_not_end_a_run_on_a_latin_1_terminal(base, tmp_path):
    """The answers too: after enough steps the tiny model repeats what it was trained on."""
    question, answer = "\u65e5\u672c leaf?", "\u8449" * 4
    rows, prompts = tmp_path / "rows.jsonl", tmp_path / "prompts.jsonl"
    rows.write_text((json.dumps({"prompt": question, "completion": answer}) + "\n") * 8)
    prompts.write_text(json.dumps({"prompt": question}) + "\n")
    flags = "--dtype float32 --no_packing --max_steps 30 --learning_rate 3e-2 --lora_r 32 --eval_steps 15"
    flags += " --lora_target_modules all-linear --lora_dropout 0 --sample_max_new_tokens 12"
    argv = [sys.executable, "train.py", "--model", base, "--dataset", str(rows), *flags.split()]
    argv += ["--validation_dataset", str(rows), "--sample_prompts", str(prompts)]
    done = subprocess.run(
        [*argv, "--output_dir", str(tmp_path / "out")], cwd=ROOT, capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "latin-1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    samples = [line["samples"][0] for line in metrics(tmp_path / "out") if "samples" in line]
    assert len(samples) == 2 and samples[-1]["prompt"] == question and samples[-1]["tuned"] == answer
    printed = done.stdout.decode("latin-1")
    assert "--- ?? leaf?\n" in printed and "tuned: ????\n" in printed


# ---------------------------------------------------------------- streams that cannot be written

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
LOG_STEPS = """
import os, sys
from pathlib import Path
from qlora.errors import InputError
from qlora.run.log import RunLog
from qlora.run.terminal import command
folder, stream, fault = sys.argv[1:]
with command("train.py"):
    with RunLog(Path(folder), total_steps=3000, first_step=0) as log:
        os.dup2(int(fault), int(stream))
        for step in range(3000):
            log.step_done()
            log.say(f"step {step}")
    raise InputError("the disk is gone")
"""


def log_steps(folder: Path, stream: int, fault: int) -> subprocess.CompletedProcess:
    """Report 3,000 steps, more than a stream's buffer can hold, then end with an error.

    Meanwhile the descriptor `fault` takes the place of stdout (1) or stderr (2).
    """
    argv = [sys.executable, "-c", LOG_STEPS, str(folder), str(stream), str(fault)]
    return subprocess.run(argv, cwd=ROOT, env=BUFFERED, text=True, capture_output=True, pass_fds=[fault])


@pytest.fixture
def broken_pipe():
    """A descriptor that nobody reads: writing to it fails with EPIPE, as after `| tee` has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.fixture
def lost_terminal():
    """A terminal that has hung up: writing to it fails with EIO."""
    terminal, descriptor = os.openpty()
    os.close(terminal)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def full_disk():
    with open("/dev/full", "w") as file:
        yield file.fileno()


@pytest.mark.parametrize("fault", ["broken_pipe", "lost_terminal", "full_disk"])
def test_a_stdout_that_cannot_be_written_leaves_stderr_as_it_is(fault, request, tmp_path):
    done = log_steps(tmp_path, 1, request.getfixturevalue(fault))
    assert "3000/3000" in done.stderr and "train.py: error: the disk is gone\n" in done.stderr, done.stderr
    assert done.returncode == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("fault", ["broken_pipe", "lost_terminal", "full_disk"])
def test_a_stderr_that_cannot_be_written_leaves_stdout_as_it_is(fault, request, tmp_path):
    done = log_steps(tmp_path, 2, request.getfixturevalue(fault))
    assert done.stdout.splitlines() == [f"step {step}" for step in range(3000)]
    assert done.returncode == 1


FULL_FOR_A_WHILE = """
import resource, sys
from pathlib import Path
from qlora.run.log import RunLog
from qlora.run.terminal import command
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
with command("train.py"), RunLog(Path(sys.argv[1]), total_steps=1, first_step=0) as log:
    log.say("before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, most))
    log.say("while the disk is full")
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    log.say("once there is space again")
"""


def test_a_stdout_that_was_full_is_written_again_once_there_is_space(tmp_path):
    """Only a reader that is gone makes a stream lead nowhere for good."""
    argv = [sys.executable, "-c", FULL_FOR_A_WHILE, str(tmp_path)]
    with open(tmp_path / "stdout", "w") as file:
        done = subprocess.run(argv, cwd=ROOT, env=BUFFERED, text=True, stdout=file, stderr=subprocess.PIPE)
    lines = (tmp_path / "stdout").read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "once there is space again"
    assert done.returncode == 1 and "standard output could not always be written" in done.stderr


FLAGS = (
    "--dtype float32 --no_packing --max_steps 3 --save_steps 1 --logging_steps 1 --validation_split 0.2 "
    "--eval_steps 1"  # every evaluation prints its loss
).split()


def run_with_full_stdout(flags: list[str], **environment) -> subprocess.CompletedProcess:
    argv = [sys.executable, "train.py", *FLAGS, *flags]
    environment = BUFFERED | {"OMP_NUM_THREADS": "1"} | environment
    with open("/dev/full", "w") as full:
        return subprocess.run(argv, cwd=ROOT, env=environment, text=True, stdout=full, stderr=subprocess.PIPE)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_run_whose_stdout_is_full_trains_to_its_end(base, rows_file, tmp_path, unbuffered):
    flags = ["--model", base, "--dataset", rows_file, "--output_dir", str(tmp_path)]
    done = run_with_full_stdout(flags, PYTHONUNBUFFERED=unbuffered)
    assert (tmp_path / "adapter_model.safetensors").exists(), done.stderr
    assert [entry["step"] for entry in metrics(tmp_path) if "eval_loss" in entry] == [1, 2, 3]
    assert "3/3" in done.stderr and "Traceback" not in done.stderr
    assert (
        "train.py: error: standard output could not always be written: No space left on device" in done.stderr
    )
    assert done.returncode == 1


def test_a_run_whose_stdout_is_full_shows_the_error_at_its_end(base, rows_file, tmp_path):
    (tmp_path / "README.md").mkdir()  # so that the adapter cannot be saved
    done = run_with_full_stdout(["--model", base, "--dataset", rows_file, "--output_dir", str(tmp_path)])
    assert (tmp_path / "checkpoint-3").exists(), done.stderr
    assert "3/3" in done.stderr and "train.py: error: the adapter could not be saved in" in done.stderr
    assert "Traceback" not in done.stderr and done.returncode == 1


def test_a_reader_that_leaves_during_the_set_up_does_not_end_the_run(base, rows_file, tmp_path):
    """As `train.py ... 2>&1 | head -1` does."""
    argv = [sys.executable, "train.py", *FLAGS, "--model", base, "--dataset", rows_file]
    run = subprocess.Popen(
        [*argv, "--output_dir", str(tmp_path)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=BUFFERED | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.stdout.readline()
    assert not (tmp_path / "checkpoint-1").exists()  # so it is still in its set-up
    run.stdout.close()
    assert run.wait() == 0
    assert (tmp_path / "adapter_model.safetensors").exists()
