"""Several processes under torchrun: the same step and numbers, failures, stops, hosts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import HashStore

from qlora import evaluate, merge, ranks
from qlora.data.loader import make_step
from qlora.data.order import StepOrder
from qlora.errors import InputError
from qlora.model.adapter import ADAPTER
from qlora.run.checkpoint import STATE_TENSORS, list_checkpoints
from qlora.run.files import damage
from tests.conftest import ROOT, ROWS
from tests.data.random_rows import random_rows
from tests.ranks import children, free_port, train_rank
from tests.results import adapter, assert_same, metrics

# Four steps an epoch, the last one smaller than the others.
STEPS = "--optim adamw_torch --logging_steps 1 --save_steps 2 --save_total_limit 0 --max_steps 5"
ENDLESS = (
    "--max_steps 100000 --save_steps 100000 --logging_steps 1 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 1"
)
VARYING = {"tokens_per_s", "data_wait", "exchange_ms", "peak_memory_gb"}  # in a line of metrics.jsonl


def split(rows: int, accumulation: int) -> str:
    return f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulation}"


def wait_for_lines(folder: Path, count: int, timeout_seconds: float = 60) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < count:
        assert time.monotonic() < deadline, "the run has not started"
        time.sleep(0.02)


def relative_difference(folder: Path, other: Path, step: int) -> float:
    """Of the optimizer's first moments: after step 1 they are the gradient times 0.1."""
    name = "optimizer/0.0/exp_avg"
    one, two = (load_file(path / f"checkpoint-{step}" / STATE_TENSORS)[name] for path in (folder, other))
    return ((one - two).norm() / two.norm()).item()


def assert_same_losses(folder: Path, other: Path) -> None:
    for line, other_line in zip(metrics(folder), metrics(other), strict=True):
        for name in {"loss", "grad_norm", "eval_loss", "tokens_seen"} & line.keys():
            assert line[name] == pytest.approx(other_line[name], rel=1e-5), (name, line, other_line)


def assert_bit_identical(folder: Path, other: Path, step: int) -> None:
    """Two runs of `step` steps: what they saved, and all that they logged but times."""
    assert_same(adapter(folder), adapter(other))
    assert_same(*(load_file(path / f"checkpoint-{step}" / STATE_TENSORS) for path in (folder, other)))
    lines, other_lines = metrics(folder), metrics(other)
    for line in [*lines, *other_lines]:
        for name in VARYING & line.keys():
            del line[name]
    assert lines == other_lines


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("batch_size, length", [(2, None), (3, 32)])
def test_the_ranks_of_a_step_share_its_micro_batches_and_know_all_of_its_targets(
    monkeypatch, batch_size, length
):
    rows = random_rows(list(range(5, 28)))
    order = StepOrder(rows.lengths, 12, seed=1, pack_length=length)
    shape = order.batch_shape(batch_size)
    for step in range(order.steps_in(0)):  # the last one has fewer packs than the others
        whole = make_step(rows, order, shape, 2, step)
        for count in (2, 3, 5):
            monkeypatch.setattr("qlora.ranks.count", lambda count=count: count)
            shares = []
            for number in range(count):
                monkeypatch.setattr("qlora.ranks.number", lambda number=number: number)
                shares.append(make_step(rows, order, shape, 2, step))
            assert len({len(share.micro_batches) for share in shares}) == 1
            together = {}
            for share in shares:
                assert (share.targets, share.tokens) == (whole.targets, whole.tokens)
                together |= share.micro_batches
            assert sorted(together) == list(range(len(shares[0].micro_batches) * count))
            for number, batch in together.items():
                if number < len(whole.micro_batches):
                    expected = whole.micro_batches[number]["target_ids"]
                    assert torch.equal(batch["target_ids"], expected)
                else:  # only there so that all ranks take the same number
                    assert not len(batch["target_ids"])
        monkeypatch.undo()


def test_the_number_of_processes_changes_neither_gradients_nor_losses_nor_evaluations(
    start_run, tmp_path, rows_file
):
    """With dropout, too, if the micro-batches are the same; without it, for any micro-batches."""
    flags = STEPS, f"--validation_dataset {rows_file} --per_device_eval_batch_size 5 --eval_steps 2"
    for dropout, kinds in (
        ("0.1", [(1, 2, 6), (2, 2, 3), (3, 2, 2)]),
        ("0", [(1, 12, 1), (4, 3, 1), (2, 1, 6)]),
    ):
        folders = []
        for count, rows, accumulation in kinds:
            out = f"{count}-{rows}"
            run = start_run(count, *flags, split(rows, accumulation), f"--lora_dropout {dropout}", out=out)
            assert run.wait() == [0] * count, run.output()
            folders.append(tmp_path / out)
        for folder in folders[1:]:
            assert relative_difference(folder, folders[0], step=2) < 1e-5
            assert_same_losses(folder, folders[0])
            assert run.output().count("validation loss") == 3  # one rank talks


@pytest.mark.parametrize("counts", [(2, 1), (1, 2)])
def test_a_run_resumes_on_another_number_of_processes_where_it_would_have_gone(start_run, tmp_path, counts):
    """The folder is that of the first process alone."""
    first, second = counts
    out = "{rank}"
    flags = STEPS, "--packing --max_length 48 --lora_dropout 0.1 --optim paged_adamw_8bit"
    run = start_run(first, *flags, split(2, 4 // first), out=out)
    assert run.wait() == [0] * first, run.output()
    whole = metrics(tmp_path / "0")
    resume = f"--resume_from_checkpoint {tmp_path / '0' / 'checkpoint-2'}"
    run = start_run(second, *flags, split(2, 4 // second), resume, out=out)
    assert run.wait() == [0] * second, run.output()
    for line, expected in zip(metrics(tmp_path / "0"), whole, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert not (tmp_path / "1").exists()


def test_a_global_batch_that_has_changed_is_refused_with_the_split_that_keeps_it(start_run):
    assert start_run(2, STEPS, split(2, 2)).wait() == [0, 0]
    refusals = {
        (1, 4, 4): "Keep them with --per_device_train_batch_size 4 --gradient_accumulation_steps 2",
        (2, 3, 1): "Keep them with --per_device_train_batch_size 2 --gradient_accumulation_steps 2",
        (3, 2, 2): "They cannot be split over 3 processes: start 1, 2, 4, 8",
    }
    for (count, rows, accumulation), remedy in refusals.items():
        run = start_run(count, STEPS, split(rows, accumulation), "--resume_from_checkpoint latest")
        assert run.wait() == [1] * count
        assert run.output().count(remedy) == 1
        assert f"make {count * rows * accumulation}" in run.output()
        run.log.unlink()


def observed_rank(argv: list[str]) -> None:
    """train.py; each process writes down when it tokenizes rows and what it sends to wandb."""
    import qlora.data.cache
    import qlora.run.log

    notes = Path(argv[argv.index("--output_dir") + 1]).parent / "notes.txt"

    def note(text: str) -> None:
        with open(notes, "a") as file:
            file.write(f"{os.environ['RANK']} {text}\n")

    new_entry = qlora.data.cache.new_entry
    qlora.data.cache.new_entry = lambda *arguments: note("tokenizes") or new_entry(*arguments)
    qlora.run.log.Wandb = lambda *arguments: SimpleNamespace(
        log=lambda values: note("logs"), finish=lambda: note("finishes")
    )
    train_rank(argv)


def test_the_first_process_alone_prepares_data_writes_and_tracks(start_run, tmp_path):
    rows = tmp_path / "rows.jsonl"  # not in the cache yet
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[::-1]))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What does a red leaf look like?\n")
    flags = f"--dataset {rows} --validation_split 0.2 --eval_steps 2 --load_best_model_at_end"
    flags += f" --sample_prompts {prompts} --sample_max_new_tokens 4 --report_to wandb"
    run = start_run(2, STEPS, flags, split(2, 2), out="{rank}", function="tests.test_ranks:observed_rank")
    assert run.wait() == [0, 0], run.output()
    notes = (tmp_path / "notes.txt").read_text().splitlines()
    assert notes == ["0 tokenizes"] + ["0 logs"] * (5 + 3) + ["0 finishes"]
    assert (tmp_path / "0" / ADAPTER).exists() and not (tmp_path / "1").exists()


# ---------------------------------------------------------------- a sharded base


@pytest.fixture
def in_4_bit(rows_file, tmp_path) -> tuple[str, ...]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What does a red leaf look like?\nWhat does a blue house look like?\n")
    return (
        STEPS, "--lora_dropout 0.1 --lora_target_modules all-linear",
        f"--validation_dataset {rows_file} --per_device_eval_batch_size 5 --eval_steps 2",
        f"--sample_prompts {prompts} --sample_max_new_tokens 4",
    )  # fmt: skip


def test_a_sharded_base_trains_evaluates_and_saves_the_same_bits(
    start_run, in_4_bit, tmp_path, base, rows_file, capsys
):
    for out, flags in (("whole", ""), ("sharded", "--shard")):
        run = start_run(2, *in_4_bit, split(2, 2), flags, out=out)
        assert run.wait() == [0, 0], run.output()
    assert " GB on each," in run.output()
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    assert_bit_identical(sharded, whole, step=5)
    assert sum("samples" in line for line in metrics(sharded)) == 3
    results = []
    for folder in (whole, sharded):  # the other commands, on what it has saved
        checkpoint = str(folder / "checkpoint-4")
        adapted = ["--model", base, "--adapter", checkpoint]
        evaluate.main([*adapted, "--dataset", rows_file, "--output_file", f"{folder}/evaluation.json"])
        merge.main([*adapted, "--output_dir", f"{folder}/merged"])
        report = json.loads((folder / "evaluation.json").read_text())
        results.append((report["tuned"]["loss"], (folder / "merged" / "model.safetensors").read_bytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize("counts", [(2, 1), (1, 2)])
def test_a_run_resumes_with_and_without_sharding(start_run, in_4_bit, tmp_path, counts):
    for count in counts:
        flags = ["--shard"] * (count == 2)
        if count == counts[1]:
            whole = metrics(tmp_path / "out")
            flags.append(f"--resume_from_checkpoint {tmp_path / 'out' / 'checkpoint-2'}")
        run = start_run(count, *in_4_bit, split(2, 4 // count), *flags)
        assert run.wait() == [0] * count, run.output()
    for line, expected in zip(metrics(tmp_path / "out"), whole, strict=True):
        for name in {"loss", "grad_norm", "eval_loss"} & line.keys():
            assert line[name] == pytest.approx(expected[name], rel=1e-5)


# ---------------------------------------------------------------- failures and stops


def test_a_killed_process_takes_the_others_down_and_the_run_resumes_bit_for_bit(start_run, tmp_path):
    flags = "--max_steps 40 --save_steps 40 --logging_steps 1 --lora_dropout 0.1", split(2, 1)
    run = start_run(2, *flags, out="whole")
    assert run.wait() == [0, 0], run.output()
    run = start_run(2, *flags)
    wait_for_lines(tmp_path / "out", 3)
    os.kill(run.pids[1], signal.SIGKILL)
    assert run.wait() == [1, -9]
    (checkpoint,) = list_checkpoints(tmp_path / "out")
    assert damage(checkpoint) is None
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 3 <= step < 40
    assert run.output().count("another process has died or hangs") == 1
    assert f"--resume_from_checkpoint latest resumes after step {step}" in run.output()
    run = start_run(2, *flags, "--resume_from_checkpoint latest")
    assert run.wait() == [0, 0], run.output()
    assert_bit_identical(tmp_path / "out", tmp_path / "whole", step=40)


def dies_with_the_data(argv: list[str]) -> None:
    """train.py, with a first process that is killed while the others wait for the rows that it prepares."""
    import train

    train.load_data = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    train_rank(argv)


def test_a_process_killed_while_it_prepares_data_takes_the_others_down(start_run):
    run = start_run(3, STEPS, function="tests.test_ranks:dies_with_the_data")
    assert run.wait() == [-9, 1, 1]
    assert run.output().count("another process has died or hangs") == 1


@pytest.mark.parametrize("number", [0, 1])
def test_a_hanging_process_is_given_up_after_the_timeout(start_run, tmp_path, number):
    run = start_run(2, ENDLESS, "--distributed_timeout 2")
    wait_for_lines(tmp_path / "out", 2)
    os.kill(run.pids[number], signal.SIGSTOP)
    started = time.monotonic()
    while "another process has died or hangs" not in run.output():
        assert time.monotonic() < started + 10
        time.sleep(0.02)
    os.kill(run.pids[number], signal.SIGKILL)
    codes = run.wait()
    assert codes[number] == -9 and codes[1 - number] == 1
    assert run.output().count("another process has died or hangs") == 1
    assert len(list_checkpoints(tmp_path / "out")) == number  # the first process saves


def test_after_a_signal_to_one_process_all_save_the_same_step_and_exit_with_its_code(start_run, tmp_path):
    for number, name in enumerate(("SIGINT", "SIGTERM")):
        run = start_run(2, ENDLESS, out=name)
        wait_for_lines(tmp_path / name, 2)
        os.kill(run.pids[number], getattr(signal, name))
        assert run.wait() == [128 + getattr(signal, name)] * 2
        (checkpoint,) = list_checkpoints(tmp_path / name)
        step = checkpoint.name.removeprefix("checkpoint-")
        message = f"stopped by {name} after step {step}: {checkpoint.name} is complete"
        assert run.output().count(message) == 1


def slow_to_save(argv: list[str]) -> None:
    """train.py, on a slow disk."""
    from qlora.run.checkpoint import Checkpoints

    write = Checkpoints._write
    Checkpoints._write = lambda *arguments: time.sleep(1) or write(*arguments)
    train_rank(argv)


def test_no_process_leaves_before_the_checkpoint_is_saved_and_an_echo_of_the_signal_is_ignored(
    start_run, tmp_path
):
    """A scheduler signals all processes, torchrun among them, which passes it on."""
    run = start_run(2, ENDLESS, function="tests.test_ranks:slow_to_save")
    wait_for_lines(tmp_path / "out", 2)
    for _ in range(2):
        for pid in run.pids:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
    while not list((tmp_path / "out").glob("checkpoint-*")):
        assert all(Path(f"/proc/{pid}/exe").exists() for pid in run.pids), run.output()  # not a zombie
    assert run.wait() == [143, 143]
    (checkpoint,) = list_checkpoints(tmp_path / "out")
    assert damage(checkpoint) is None


def out_of_memory_on_the_second(argv: list[str]) -> None:
    """train.py, with a process that runs out of memory in its third step."""
    import train

    original, calls = train.forward_backward, []

    def forward_backward(*arguments, **options):
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments, **options)

    train.forward_backward = forward_backward
    train.main(argv)


def test_a_process_out_of_memory_says_so_and_the_steps_before_are_saved(start_run, tmp_path):
    run = start_run(2, ENDLESS, function="tests.test_ranks:out_of_memory_on_the_second")
    assert run.wait() == [1, 1]
    assert run.output().count("out of memory after step 2") == 1
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-2"]


def test_an_error_of_all_processes_is_printed_once(start_run):
    for flags in ("--dataset nowhere.jsonl", "--lora_target_modules nothing", "--lora_r none"):
        run = start_run(3, STEPS, flags)
        assert set(run.wait()) <= {1, 2}
        assert len(re.findall("error:", run.output())) == 1, run.output()
        run.log.unlink()


# ---------------------------------------------------------------- torchrun itself


def test_ranks_started_again_with_the_same_store_agree_on_a_new_name():
    """What ranks of an earlier start have left there does not mislead them, even if these came half way."""
    store, names = HashStore(), []
    store.set("question of 1", "nobody waits for this")
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(ranks._name_of_this_start, store, rank, 3, 10) for rank in (2, 1, 0)]
        assert len({future.result() for future in asked}) == 1
        names.append(asked[0].result())
    assert len(set(names)) == 3
    with pytest.raises(InputError, match="2 of 3 processes have not started"):
        ranks._name_of_this_start(store, 0, 3, 0.1)


@pytest.fixture
def torchrun(base, rows_file, tmp_path):
    """Start torchrun with train.py in the background, a shell's job with its own output file."""
    processes = []

    def torchrun(options: str, *flags: str) -> subprocess.Popen:
        argv = [sys.executable, "-m", "torch.distributed.run", *options.split(), str(ROOT / "train.py")]
        argv += ["--model", base, "--dataset", rows_file, "--output_dir", str(tmp_path / "out")]
        argv += ["--dtype", "float32", "--no_packing", *(word for flag in flags for word in flag.split())]
        log = open(tmp_path / f"torchrun-{len(processes)}.log", "w")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(argv, cwd=ROOT, stdout=log, stderr=log, env=environment))
        return processes[-1]

    yield torchrun
    for process in processes:
        process.kill()


def test_torchrun_restarts_a_run_whose_process_was_killed(torchrun, tmp_path):
    flags = "--max_steps 40 --save_steps 5 --logging_steps 1 --resume_from_checkpoint latest", split(2, 1)
    agent = torchrun("--standalone --nproc-per-node 2 --max-restarts 1", *flags)
    wait_for_lines(tmp_path / "out", 7)
    os.kill(children(agent.pid)[-1], signal.SIGKILL)
    output = tmp_path / "torchrun-0.log"
    assert agent.wait(120) == 0, output.read_text()
    assert "resuming from checkpoint-" in output.read_text()
    assert [line["step"] for line in metrics(tmp_path / "out")] == list(range(1, 41))


def test_two_hosts_train_together_and_sigterm_to_one_of_them_saves(torchrun, tmp_path):
    options = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()}"
    agents = [torchrun(options, ENDLESS) for _ in range(2)]
    wait_for_lines(tmp_path / "out", 2)
    agents[1].send_signal(signal.SIGTERM)
    for agent in agents:
        agent.wait(60)
    (checkpoint,) = list_checkpoints(tmp_path / "out")
    assert damage(checkpoint) is None
    outputs = "".join((tmp_path / f"torchrun-{number}.log").read_text() for number in range(2))
    assert f"stopped by SIGTERM after step {checkpoint.name.removeprefix('checkpoint-')}" in outputs
