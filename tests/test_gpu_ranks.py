"""Two GPUs under torchrun: the same losses as on one, sharded too, and the same failures. `make test-gpu`."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora.run.checkpoint import list_checkpoints
from qlora.run.files import damage
from tests.conftest import ROOT
from tests.ranks import children
from tests.results import metrics
from tests.test_gpu import long_rows, wide_base  # noqa: F401  (fixtures)
from tests.test_ranks import assert_bit_identical, wait_for_lines

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
FLAGS = (
    "--dtype bfloat16 --max_length 512 --lora_target_modules all-linear --lora_dropout 0 "
    "--learning_rate 1e-3 --logging_steps 1 --save_total_limit 0 --per_device_train_batch_size 2"
)
START_SECONDS = 240  # until the first step: imports, kernels, compiled layers


@pytest.fixture
def start_run(wide_base, long_rows, tmp_path):  # noqa: F811
    """Start train.py on some GPUs, in the background; returns (process, output folder)."""
    processes = []

    def start_run(count: int, *flags: str, out: str = "out") -> tuple[subprocess.Popen, Path]:
        torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {count}".split()
        argv = [sys.executable, *torchrun * (count > 1), str(ROOT / "train.py"), "--model", wide_base]
        argv += ["--dataset", long_rows, "--output_dir", str(tmp_path / out), *FLAGS.split()]
        argv += [word for flag in flags for word in flag.split()]
        with open(tmp_path / f"{out}.log", "a") as log:
            processes.append(subprocess.Popen(argv, cwd=ROOT, stdout=log, stderr=log))
        return processes[-1], tmp_path / out

    yield start_run
    for process in processes:
        if process.poll() is None:
            process.terminate()  # torchrun ends its processes
            process.wait(60)


@pytest.fixture
def run(start_run):
    """Run train.py on some GPUs to its end; returns the output folder."""

    def run(*arguments, **options) -> Path:
        process, folder = start_run(*arguments, **options)
        assert process.wait(START_SECONDS) == 0, output(folder)
        return folder

    return run


def output(folder: Path) -> str:
    """The end of what a run has printed."""
    return folder.with_name(f"{folder.name}.log").read_text()[-5000:]


def assert_close(folder: Path, other: Path) -> None:
    """As close as sums in bfloat16 in another order are."""
    lines, other_lines = metrics(folder), metrics(other)
    assert [line["step"] for line in lines] == [line["step"] for line in other_lines]
    for line, expected in zip(lines, other_lines):
        assert line.get("tokens_seen") == expected.get("tokens_seen")
        for name in {"loss", "eval_loss"} & line.keys():
            assert line[name] == pytest.approx(expected[name], rel=1e-2), (name, line, expected)
        if "grad_norm" in line:
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-2), (line, expected)


@pytest.mark.parametrize("flags", ["", "--no_packing --no_compile"])
def test_two_gpus_have_the_losses_of_one_whole_or_sharded(run, long_rows, flags):  # noqa: F811
    flags += f" --max_steps 4 --save_steps 4 --validation_dataset {long_rows} --eval_steps 4"
    one = run(1, flags, "--gradient_accumulation_steps 2", out="one")
    two = run(2, flags, "--gradient_accumulation_steps 1", out="two")
    sharded = run(2, flags, "--gradient_accumulation_steps 1 --shard", out="sharded")
    assert_close(two, one)
    assert_close(sharded, two)
    assert len(metrics(one)) == 5 and " GB on each," in sharded.with_name("sharded.log").read_text()
    assert all("exchange_ms" in line for line in metrics(two) if "loss" in line)


def test_a_sharded_run_resumes_on_one_gpu(run):
    flags = "--max_steps 4 --save_steps 2"
    whole = run(2, flags, "--gradient_accumulation_steps 1 --shard")
    expected = metrics(whole)
    resume = f"--resume_from_checkpoint {whole / 'checkpoint-2'}"
    run(1, flags, "--gradient_accumulation_steps 2", resume)
    for line, other in zip(metrics(whole), expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-2)


@pytest.mark.parametrize("flags", ["", "--shard"])
def test_a_killed_process_ends_the_other_within_seconds_and_leaves_a_checkpoint(start_run, flags):
    agent, folder = start_run(2, "--max_steps 100000 --gradient_accumulation_steps 1", flags)
    wait_for_lines(folder, 3, START_SECONDS)
    os.kill(children(agent.pid)[-1], signal.SIGKILL)
    assert agent.wait(20) == 1  # after 30 seconds torchrun would kill it
    (checkpoint,) = list_checkpoints(folder)
    assert damage(checkpoint) is None
    step = checkpoint.name.removeprefix("checkpoint-")
    assert f"--resume_from_checkpoint latest resumes after step {step}" in output(folder)


def test_with_full_determinism_a_resumed_run_on_two_gpus_ends_bit_identical(run):
    flags = (
        "--full_determinism --max_steps 4 --save_steps 2 --gradient_accumulation_steps 2 --lora_dropout 0.1"
    )
    one, two = run(2, flags, out="one"), run(2, flags, out="two")
    assert_bit_identical(two, one, step=4)
    run(2, flags, f"--resume_from_checkpoint {two / 'checkpoint-2'}", out="two")
    assert_bit_identical(two, one, step=4)
