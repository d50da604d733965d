"""The processes of a run under torchrun, called ranks: which one this is, and what they tell each other.

A run without torchrun has one rank, and every function here returns at once. What is on a GPU travels with
NCCL, everything else with Gloo, so that the host need not wait for its GPU. All ranks must call the same
functions in the same order: a rank that waits for one that never comes raises RankLost.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from qlora.errors import InputError, first_line

POLL_SECONDS = 0.1  # how often a rank that waits for others asks them
STORE_SECONDS = 5  # how long a rank that fails waits for the store below
RANK_LOST = "another process has died or hangs"
# In PyTorch's errors then: any of Gloo's connections, and NCCL's for a process that is gone.
LOST_PATTERN = "gloo/transport|closed by peer|reset by peer|ncclRemoteError|remote process exited"
REASON_PRINTED = "a reason was printed"  # a key of the store
_store = None  # a small key-value store of all ranks; with torchrun it outlives each of them


class RankLost(InputError):
    """Another rank has died, hangs, or cannot be reached."""


def count() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """The number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the rank that saves, logs and prints; known even before they are connected."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def connected(timeout_seconds: float) -> Iterator[torch.device]:
    """Connect the processes that torchrun has started; yields the device of this one.

    A rank that does not answer for `timeout_seconds` is lost. Raises InputError if there are fewer GPUs on
    this host than processes, or if the others cannot be reached.
    """
    global _store
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    timeout = timedelta(seconds=timeout_seconds)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        _store = dist.PrefixStore(_name_of_this_start(store, rank, size, timeout_seconds), store)
        if device.type == "cuda":
            device = _own_gpu()
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", _store), rank=rank, world_size=size, timeout=timeout,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the other processes cannot be reached: {first_line(error)}") from error
    are_all_here = False
    try:
        yield device
        are_all_here = True
    except SystemExit:  # all stop after the same step
        are_all_here = True
        raise
    finally:
        if are_all_here:  # after an error it might wait for a rank that is gone
            dist.destroy_process_group()


def _own_gpu() -> torch.device:
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        raise InputError(
            f"this host has {gpus} GPUs, and torchrun has started {os.environ.get('LOCAL_WORLD_SIZE')} "
            f"processes on it: give --nproc-per-node {gpus}"
        )
    return torch.device("cuda", local_rank)


def sum_(*tensors: torch.Tensor) -> Callable[[], float]:
    """Replace each tensor by its sum over all ranks, the same bits on each.

    Returns a function that returns the seconds this took, once the device has been waited for. On a GPU they
    include waiting for the slowest rank.
    """
    if count() == 1:
        return lambda: 0.0
    # First on the host, while the GPU still computes. If a rank has died, this raises RankLost. NCCL would
    # make the GPU wait for it, and the host could not even save a checkpoint.
    any_true(False)
    clock = _Clock(tensors[0].device)
    for tensor in tensors:
        with _all_expected():
            dist.all_reduce(tensor)
    return clock.stop()


def copy_from_first_(tensor: torch.Tensor) -> None:
    """Give a tensor the first rank's values."""
    if count() > 1:
        any_true(False)  # see sum_()
        with _all_expected():
            dist.broadcast(tensor, src=0)


def any_true(flag: bool) -> bool:
    """Whether the flag is true on any rank."""
    return maximum(int(flag)) > 0


def maximum(value: int) -> int:
    """The largest value of all ranks."""
    if count() == 1:
        return value
    tensor = torch.tensor(value)
    with _all_expected():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def gather(value: Any) -> list:
    """The values of all ranks, in their order. They are pickled: small ones only."""
    values = [value] * count()
    if count() > 1:
        with _all_expected():
            dist.all_gather_object(values, value)
    return values


def disagreement(values: dict[str, Any]) -> tuple[int, list[str]] | None:
    """(number of a rank, names of the values that it has other than the first rank); None if all agree."""
    of_first, *of_others = gather(values)
    for other, of_other in enumerate(of_others, 1):
        if differing := [name for name in values if of_other[name] != of_first[name]]:
            return other, differing
    return None


def from_first(value: Any) -> Any:
    """The first rank's value, on every rank; the others' do not matter. It is pickled: small ones only."""
    values = [value]
    if count() > 1:
        with _all_expected():
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def tensors_from_first(tensors: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """The first rank's tensors, which are in host memory, on every rank; the others may give None."""
    if count() == 1:
        return tensors
    kinds = {name: (part.shape, part.dtype) for name, part in tensors.items()} if is_first() else None
    kinds = from_first(kinds)
    if not is_first():
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in kinds.items()}
    with _all_expected():
        for tensor in tensors.values():
            dist.broadcast(tensor, src=0)
    return tensors


@contextmanager
def first_on_host() -> Iterator[None]:
    """Run the block in one process of each host, then in the others: they find its downloads and caches.

    However long it takes, a rank that is alive is not lost: threads tell each other how far all have got.
    The ranks leave it together. Nothing in the block may call a function of this module.
    """
    if count() == 1:
        yield
        return
    first = number() - int(os.environ.get("LOCAL_RANK", "0"))
    is_done, are_done, errors = Event(), [False] * count(), []

    def exchange() -> None:
        try:
            while not all(are_done):
                are_done[:] = gather(is_done.is_set())
                time.sleep(POLL_SECONDS)
        except RankLost as error:
            errors.append(error)

    thread = Thread(target=exchange, daemon=True)
    thread.start()
    while number() != first and not are_done[first] and thread.is_alive():
        time.sleep(POLL_SECONDS)
    if not errors:
        yield
        is_done.set()
    thread.join()
    if errors:
        raise errors[0]


def should_print(reason: str) -> bool:
    """Whether this rank is the one to print an error for this reason, of which others may be aware too.

    Preferably the first one prints it, because it knows what is saved.
    """
    if _store is None:
        return is_first()
    if not is_first():
        time.sleep(1)
    answers, own = [], os.environ["RANK"]

    def ask() -> None:
        with suppress(RuntimeError):  # the store is gone
            if reason == RANK_LOST and _store.check([REASON_PRINTED]):
                answers.append(False)
            else:
                answers.append(_store.compare_set(reason, "", own).decode() == own)
                if reason != RANK_LOST:
                    _store.set(REASON_PRINTED, "")

    thread = Thread(target=ask, daemon=True)  # it never returns if the store's host cannot be reached
    thread.start()
    thread.join(STORE_SECONDS)
    return not answers or answers[0]


def is_lost(error: BaseException) -> bool:
    """Whether a collective operation of PyTorch failed because another rank is gone or does not answer."""
    return count() > 1 and bool(re.search(LOST_PATTERN, str(error)))


def abandon() -> None:
    """Give up on the other ranks, so that GPU operations that wait for them end. No exchange is possible
    afterwards."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.distributed_c10d._abort_process_group()


def _name_of_this_start(store, rank: int, size: int, timeout_seconds: float) -> str:
    """A new name that all ranks agree on, for what they keep in the store.

    torchrun gives the ranks that it restarts the store of those before, full of addresses and flags that no
    longer hold. Its own count of restarts is no such name: after a failure on one host, or when a host joins
    again, it differs between hosts. So the first rank gives out a name, to each rank that asks for it with a
    number which no earlier rank has used.
    """
    name = uuid4().hex
    if rank > 0:
        store.set(f"question of {rank}", name)
        name = store.get(f"answer to {name}").decode()
        store.set(f"{name} known to {rank}", "")
        return name
    deadline, unaware = time.monotonic() + timeout_seconds, set(range(1, size))
    while unaware:
        for other in list(unaware):
            if store.check([f"{name} known to {other}"]):
                unaware.remove(other)
            elif store.check([f"question of {other}"]):  # perhaps of an earlier rank: then nobody reads this
                store.set(f"answer to {store.get(f'question of {other}').decode()}", name)
        if time.monotonic() > deadline:
            raise InputError(f"{len(unaware)} of {size} processes have not started")
        time.sleep(POLL_SECONDS / 5)
    return name


@contextmanager
def _all_expected() -> Iterator[None]:
    """Exchange something with all other ranks. Raises RankLost if that fails."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):  # a GPU that two ranks share, for example
            raise
        lost = RankLost(RANK_LOST)
        lost.is_told_elsewhere = not should_print(RANK_LOST)
        raise lost from error


class _Clock:
    """Measures the time between its construction and stop(), on the device's own clock if it is a GPU."""

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.start = self._now()

    def _now(self):
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> Callable[[], float]:
        """Returns a function that returns the seconds, once the device has got so far."""
        end = self._now()
        if self.on_cuda:
            return lambda: self.start.elapsed_time(end) / 1000
        return lambda: end - self.start
