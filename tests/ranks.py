"""Several processes as torchrun starts them, without the seconds that the imports of each would take.

`python -m tests.ranks` imports everything once. Then it reads jobs from standard input, a line of JSON each,
and forks the ranks of each job. (A process that has computed gradients, such as that of a test, cannot be
forked: autograd refuses to run in the copy.)
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 120
STORE = []  # of the last job; the one before has ended


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def fork_ranks(count: int, function, arguments: list, log: Path) -> list[int]:
    """Call a function in `count` processes, connected as torchrun does it; returns their pids."""
    port = 0
    if count > 1:  # as in torchrun's process, the store outlives the ranks
        STORE[:] = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
        port = STORE[0].port
    return [os.fork() or _call(function, arguments, log, rank, count, port) for rank in range(count)]


def _call(function, arguments: list, log: Path, rank: int, count: int, port: int) -> None:
    """In a forked process: be that rank, call the function, and leave without the parent's clean-up."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if count > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
    code = 1
    try:
        function(*arguments)
        code = 0
    except SystemExit as exit:
        print(exit.code if isinstance(exit.code, str) else "", file=sys.stderr)
        code = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_codes(pids: list[int]) -> list[int]:
    """Wait for children; returns their exit codes, negative for a signal. Kills those that hang."""
    codes, deadline = {}, time.monotonic() + TIMEOUT_SECONDS
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


@dataclass
class Ranks:
    """A running job."""

    launcher: subprocess.Popen
    pids: list[int]
    log: Path

    def wait(self) -> list[int]:
        """The exit codes of the ranks, negative for a signal."""
        _ask(self.launcher, {"wait": self.pids})
        return json.loads(self.launcher.stdout.readline())

    def output(self) -> str:
        """What the ranks have printed."""
        return self.log.read_text()


def start_launcher() -> subprocess.Popen:
    """The process that forks the ranks of all jobs."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.ranks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def start(launcher: subprocess.Popen, count: int, function: str, *arguments, log: Path) -> Ranks:
    """Call "module:function" in `count` ranks."""
    _ask(launcher, {"count": count, "function": function, "arguments": arguments, "log": str(log)})
    return Ranks(launcher, json.loads(launcher.stdout.readline()), log)


def train_rank(argv: list[str]) -> None:
    """train.py in one of the processes."""
    import train

    train.main([word.replace("{rank}", os.environ.get("RANK", "0")) for word in argv])


def children(pid: int) -> list[int]:
    """The pids of a process's children, in their order: of the ranks that torchrun has started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return sorted(map(int, listed.stdout.split()))


def _ask(launcher: subprocess.Popen, request: dict) -> None:
    launcher.stdin.write(json.dumps(request) + "\n")
    launcher.stdin.flush()


def draw_nothing_and_keep_garbage() -> None:
    """As in conftest's run(): either would take a quarter of the time of a short run."""
    import gc

    import matplotlib.figure

    matplotlib.figure.Figure.savefig = lambda figure, file, **options: None
    gc.collect = lambda generation=2: 0


def main() -> None:
    import tests.conftest  # noqa: F401  (threads, offline)
    import train  # noqa: F401

    draw_nothing_and_keep_garbage()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(json.dumps(exit_codes(request["wait"])), flush=True)
            continue
        module, name = request["function"].split(":")
        function = getattr(importlib.import_module(module), name)
        pids = fork_ranks(request["count"], function, request["arguments"], Path(request["log"]))
        print(json.dumps(pids), flush=True)


if __name__ == "__main__":
    main()
