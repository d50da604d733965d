"""Kill trainings at random moments, resume them, and compare the end with a run that was left alone.

python tests/torture.py [--kills 100] [--terms 20] [--forked] [--cuda --model M --dataset D ...]

SIGKILL: some in set-up, most while a step is taken, half while a checkpoint is being written. SIGTERM: any
time. After each one every listed checkpoint must be whole; in the end the adapter, the optimizer's
state and the logged losses must be those of the other run, bit for bit. Every run is a process of its own:
python train.py, or with --forked a copy of this one, which has imported everything: ten times as fast. With
--cuda the trainings run on the card, with --full_determinism.

The trainings have what is hard to resume: dropout, packing, float16 with its loss scale, 8-bit optimizer
states, evaluations, and the best of them kept.
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
from pathlib import Path

if "--cuda" not in sys.argv:  # identity is promised for the CPU, with a fixed number of threads
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CACHE = tempfile.TemporaryDirectory()
os.environ["HF_DATASETS_CACHE"] = CACHE.name
ROOT = Path(__file__).parent.parent
ROWS = ROOT / "demo" / "rows.jsonl"
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

import train  # noqa: E402
from demo.make_base import make_base  # noqa: E402
from qlora.model.adapter import ADAPTER  # noqa: E402
from qlora.run.checkpoint import STATE, STATE_TENSORS, list_checkpoints  # noqa: E402
from qlora.run.files import damage  # noqa: E402

# tqdm's own lock is shared with forked processes: one that is killed while it holds it would stop all others.
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
PATIENCE = 300  # seconds for one training
VARYING = "tokens_per_s", "data_wait", "peak_memory_gb"  # of a line in metrics.jsonl


def command(given: argparse.Namespace, out: Path, steps: int) -> list[str]:
    paths = ["--model", given.model, "--dataset", given.dataset, "--output_dir", str(out)]
    validation = ["--validation_split", "0.2", "--resume_from_checkpoint", "latest"]
    return [*paths, *validation, "--max_steps", str(steps), *FLAGS, *given.flags]


class Training:
    """A process that trains."""

    def __init__(self, arguments: list[str], log: Path, is_forked: bool):
        with open(log, "a") as file:
            if is_forked:
                self.pid = os.fork() or _train_here(arguments, file)
            else:
                argv = [sys.executable, str(ROOT / "train.py"), *arguments]
                self.pid = subprocess.Popen(argv, stdout=file, stderr=file, cwd=ROOT).pid
        self.status = None

    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait_for(self, happened) -> None:
        """Wait until something is so, or the process has ended."""
        until = time.monotonic() + PATIENCE
        while self.code() is None and not happened():
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError("a training hangs")
            time.sleep(0.001)

    def end(self) -> int:
        """Wait for the end; returns the exit code."""
        self.wait_for(lambda: False)
        return self.code()

    def send(self, number: int) -> int:
        """Send a signal and wait for the end."""
        if self.code() is None:
            os.kill(self.pid, number)
        return self.end()


def _train_here(arguments: list[str], log) -> None:
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    code = 1
    try:
        train.main(arguments)
        code = 0
    except SystemExit as stop:
        print(stop.code if isinstance(stop.code, str) else "", file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def strike(training: Training, out: Path, number: int, draw: random.Random) -> int:
    """Send a signal at a random moment; returns the exit code."""
    before, steps = lines(out), draw.randint(1, 3)
    kind = draw.random()
    if kind < 0.1:
        time.sleep(draw.uniform(0, 0.5))  # in set-up, or later
    elif kind < 0.5:
        training.wait_for(lambda: lines(out) >= before + steps)
        time.sleep(draw.uniform(0, 0.1))
    else:  # while a checkpoint is written
        for _ in range(steps):
            training.wait_for(lambda: not any(out.glob("checkpoint-*.tmp")))
            training.wait_for(lambda: any(out.glob("checkpoint-*.tmp")))
        time.sleep(draw.uniform(0, 0.03))
    return training.send(number)


def end_of(out: Path, steps: int) -> dict:
    """What must be the same: files and numbers at the end of a run, without the times."""
    last = out / f"checkpoint-{steps}"
    state = json.loads((last / STATE).read_text())
    for name in ("window_seconds", "window_waited"):
        del state["progress"][name]
    del state["config"]
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "adapter": (out / ADAPTER).read_bytes(),
        "optimizer": (last / STATE_TENSORS).read_bytes(),
        "state": state,
        "metrics": [{name: line[name] for name in line if name not in VARYING} for line in logged],
    }


def torture(given: argparse.Namespace, folder: Path) -> dict:
    """Returns the counts; raises AssertionError if anything was lost."""
    draw, steps = random.Random(given.seed), 2 * (given.kills + given.terms) + 5
    alone = Training(command(given, folder / "alone", steps), folder / "alone.log", given.forked)
    assert alone.end() == 0, (folder / "alone.log").read_text()[-2000:]
    out, log = folder / "struck", folder / "struck.log"
    count = {"SIGKILL": 0, "in a save": 0, "SIGTERM": 0, "at a step's end": 0, "finished": 0}
    signals = [signal.SIGKILL] * given.kills + [signal.SIGTERM] * given.terms
    draw.shuffle(signals)
    while signals:
        training = Training(command(given, out, steps), log, given.forked)
        code = strike(training, out, signals[-1], draw)
        if code == 0:  # it was done before: another one, from the start
            count["finished"] += 1
            assert end_of(out, steps) == end_of(folder / "alone", steps)
            shutil.rmtree(out)
            continue
        number = signals.pop()
        if number == signal.SIGKILL:
            assert code == -number, f"{code}: {log.read_text()[-2000:]}"
            count["SIGKILL"] += 1
            count["in a save"] += any(out.glob("*.tmp"))
        else:  # in set-up there is nothing to save, and the signal does what it does
            assert code in (-number, 128 + number), f"{code}: {log.read_text()[-2000:]}"
            count["SIGTERM"] += 1
            count["at a step's end"] += code == 128 + number
        for checkpoint in list_checkpoints(out):
            assert damage(checkpoint) is None, checkpoint
    training = Training(command(given, out, steps), log, given.forked)
    assert training.end() == 0, log.read_text()[-2000:]
    count["finished"] += 1
    assert not list(out.glob("*.tmp"))
    left, right = end_of(out, steps), end_of(folder / "alone", steps)
    for ours, theirs in zip(left["metrics"], right["metrics"], strict=True):
        assert ours == theirs, f"logged: {ours}, by the run that was left alone: {theirs}"
    for name in left:
        assert left[name] == right[name], f"the {name} is not that of the run that was left alone"
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--forked", action="store_true")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--dataset", default=str(ROWS))
    given, flags = parser.parse_known_args()
    if given.cuda and given.forked:
        parser.error("--forked needs the CPU: bitsandbytes has CUDA started, which cannot be forked")
    given.flags = flags + ["--full_determinism"] * given.cuda
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if given.model is None:
            given.model = f"{folder}/base"
            make_base(given.model, ROWS.read_text().splitlines(), **SIZES)
        count = torture(given, Path(folder))
    print(json.dumps(count))
    print("all bit-identical")


if __name__ == "__main__":
    main()
