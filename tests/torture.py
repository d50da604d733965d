"""Kill and stop trainings at random moments, resume them, and compare the end with an uninterrupted run.

python tests/torture.py [--kills 100] [--terms 20] [--forked] [--processes 2]
                        [--cuda --model M --dataset D ...]

SIGKILL is sent during set-up, between steps, and in half of the cases while a checkpoint is being written;
SIGTERM at any time. After each signal, every listed checkpoint must be intact. In the end adapter, optimizer
state and logged losses must be bit-identical to those of the uninterrupted run. Every training is a process:
python train.py, or with --forked a copy of this one, which has imported everything, draws no pictures and is
ten times as fast.
With --cuda the trainings run on the GPU, with --full_determinism. With --processes N a training has that many
processes, started by torchrun or with --forked. SIGKILL is then sent to one of them or to all, and SIGTERM to
one; the others must end by themselves.

The trainings have what is hard to resume: dropout, packing, float16 with its loss scale, 8-bit optimizer
states, evaluations, and a best checkpoint.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

if "--cuda" not in sys.argv:  # on the CPU runs are identical if their number of threads is
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CACHE = tempfile.TemporaryDirectory()
os.environ["HF_DATASETS_CACHE"] = CACHE.name
ROOT = Path(__file__).parent.parent
ROWS = ROOT / "tests" / "rows.jsonl"
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

import train  # noqa: E402
from qlora.model.adapter import ADAPTER  # noqa: E402
from qlora.run.checkpoint import STATE, STATE_TENSORS, list_checkpoints  # noqa: E402
from qlora.run.files import damage  # noqa: E402
from tests.ranks import children, draw_nothing_and_keep_garbage, fork_ranks  # noqa: E402
from tests.tiny_llama import make_base  # noqa: E402

# Forked processes share tqdm's own lock: one that is killed while holding it would block all others.
tqdm.set_lock(threading.RLock())

FLAGS = (
    "--save_steps 1 --logging_steps 1 --eval_steps 5 --load_best_model_at_end --save_total_limit 3 "
    "--dtype float16 --lora_r 64 --lora_dropout 0.1 --max_length 48 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 2 --learning_rate 3e-3"
).split()
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256,
}  # fmt: skip
TIMEOUT_SECONDS = 300  # for one training
VARYING = "tokens_per_s", "data_wait", "exchange_ms", "peak_memory_gb"  # in a line of metrics.jsonl


def training_flags(options: argparse.Namespace, out: Path, steps: int) -> list[str]:
    paths = ["--model", options.model, "--dataset", options.dataset, "--output_dir", str(out)]
    validation = ["--validation_split", "0.2", "--resume_from_checkpoint", "latest"]
    return [*paths, *validation, "--max_steps", str(steps), *FLAGS, *options.flags]


class Training:
    """A training in one or several processes of its own, with its output appended to `log`."""

    def __init__(self, flags: list[str], log: Path, is_forked: bool, count: int):
        self.is_under_torchrun = count > 1 and not is_forked
        if is_forked:
            self.pids = fork_ranks(count, train.main, [flags], log)
        else:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            argv = [sys.executable, *torchrun * (count > 1), str(ROOT / "train.py"), *flags]
            with open(log, "a") as file:
                self.pids = [subprocess.Popen(argv, stdout=file, stderr=file, cwd=ROOT).pid]
        self.exit_codes = {}  # pid: exit code, negative for a signal

    def has_ended(self) -> bool:
        """Whether all processes have."""
        for pid in set(self.pids) - self.exit_codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.exit_codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.exit_codes) == len(self.pids)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds or all processes have ended."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not self.has_ended() and not condition():
            if time.monotonic() > deadline:
                for pid in set(self.pids) - self.exit_codes.keys():
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError("a training hangs")
            time.sleep(0.001)

    def wait(self) -> list[int]:
        """Wait until all processes have ended; returns their exit codes."""
        self.wait_until(lambda: False)
        return list(self.exit_codes.values())

    def send(self, number: int, draw: random.Random) -> list[int]:
        """Send a signal to one process, SIGKILL perhaps to all, and wait; returns the exit codes."""
        pids = sorted(set(self.ranks()) - self.exit_codes.keys())
        if number != signal.SIGKILL or draw.random() < 0.5:
            pids = pids and [draw.choice(pids)]
        for pid in pids:
            with suppress(ProcessLookupError):  # torchrun's, already gone
                os.kill(pid, number)
        return self.wait()

    def ranks(self) -> list[int]:
        """The pids of the processes that train."""
        return children(self.pids[0]) if self.is_under_torchrun else self.pids


def logged_lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_saving(out: Path) -> bool:
    return any(out.glob("checkpoint-*.tmp"))


def send_at_a_random_moment(training: Training, out: Path, number: int, draw: random.Random) -> list[int]:
    """Send a signal to a training that writes to `out`; returns the exit codes."""
    lines_before, steps = logged_lines(out), draw.randint(1, 3)
    moment = draw.random()
    if moment < 0.1:
        time.sleep(draw.uniform(0, 0.5))  # during set-up, or later
    elif moment < 0.5:
        training.wait_until(lambda: logged_lines(out) >= lines_before + steps)
        time.sleep(draw.uniform(0, 0.1))
    else:  # while a checkpoint is being written
        for _ in range(steps):
            training.wait_until(lambda: not is_saving(out))
            training.wait_until(lambda: is_saving(out))
        time.sleep(draw.uniform(0, 0.03))
    return training.send(number, draw)


def final_state(out: Path, steps: int) -> dict:
    """What must be equal at the end of two runs: files and numbers, without times."""
    last = out / f"checkpoint-{steps}"
    state = json.loads((last / STATE).read_text())
    for name in ("window_seconds", "window_waited", "window_exchanged"):
        del state["progress"][name]
    del state["config"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "adapter": (out / ADAPTER).read_bytes(),
        "optimizer state": (last / STATE_TENSORS).read_bytes(),
        "training state": state,
        "log": [{name: line[name] for name in line if name not in VARYING} for line in lines],
    }


def check_identical(got: dict, want: dict) -> None:
    for got_line, want_line in zip(got["log"], want["log"], strict=True):
        assert got_line == want_line, f"logged {got_line}, by the uninterrupted run {want_line}"
    for name in got:
        assert got[name] == want[name], f"the {name} differs from that of the uninterrupted run"


def torture(options: argparse.Namespace, folder: Path) -> dict:
    """Send all signals, one per start; returns their counts. Raises AssertionError if anything was lost."""
    draw, steps = random.Random(options.seed), 2 * (options.kills + options.terms) + 5

    def start(name: str) -> Training:
        flags = training_flags(options, folder / name, steps)
        return Training(flags, folder / f"{name}.log", options.forked, options.processes)

    def log_of(name: str) -> str:
        return (folder / f"{name}.log").read_text()[-2000:]

    assert not any(start("uninterrupted").wait()), log_of("uninterrupted")
    want, out = final_state(folder / "uninterrupted", steps), folder / "interrupted"
    count = {"SIGKILL": 0, "in a save": 0, "SIGTERM": 0, "at a step's end": 0, "finished": 0}
    signals = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.terms
    draw.shuffle(signals)
    while signals:
        training = start("interrupted")
        codes = send_at_a_random_moment(training, out, signals[-1], draw)
        if not any(codes):  # it had ended before the signal: start over
            count["finished"] += 1
            check_identical(final_state(out, steps), want)
            shutil.rmtree(out)
            continue
        number = signals.pop()
        if number == signal.SIGKILL:
            # The first process is 0 if all is saved that it had to train.
            others = () if options.processes == 1 else (0, 1) if options.forked else (1,)
            assert set(codes) <= {-number, *others}, f"{codes}: {log_of('interrupted')}"
            count["SIGKILL"] += 1
            count["in a save"] += any(out.glob("*.tmp"))
        else:  # during set-up there is nothing to save: the signal ends the process
            allowed = {-number, 128 + number} | ({0, 1} if options.processes > 1 else set())
            assert set(codes) <= allowed, f"{codes}: {log_of('interrupted')}"
            count["SIGTERM"] += 1
            count["at a step's end"] += 128 + number in codes
        for checkpoint in list_checkpoints(out):
            assert damage(checkpoint) is None, checkpoint
    assert not any(start("interrupted").wait()), log_of("interrupted")
    count["finished"] += 1
    assert not list(out.glob("*.tmp"))
    check_identical(final_state(out, steps), want)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs to send")
    parser.add_argument("--terms", type=int, default=20, help="SIGTERMs to send")
    parser.add_argument(
        "--forked", action="store_true", help="fork this process instead of starting train.py"
    )
    parser.add_argument("--processes", type=int, default=1, help="processes of each training")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--cuda", action="store_true", help="train on the GPU; other flags go to train.py")
    parser.add_argument("--model")
    parser.add_argument("--dataset", default=str(ROWS))
    options, flags = parser.parse_known_args()
    if options.cuda and options.forked:
        parser.error("--forked needs the CPU: bitsandbytes has initialized CUDA, which cannot be forked")
    if options.forked:
        draw_nothing_and_keep_garbage()
    options.flags = flags + ["--full_determinism"] * options.cuda
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            options.model = f"{folder}/base"
            make_base(options.model, ROWS.read_text().splitlines(), **SIZES)
        count = torture(options, Path(folder))
    print(json.dumps(count))
    print("all bit-identical")


if __name__ == "__main__":
    main()
