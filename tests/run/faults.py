"""Faults that tests inject into a run: flipped bits, signals, out of memory, non-finite losses."""

import os
import random
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import train
from qlora.run.log import RunLog


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file: number `bit` of the byte at `position`."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@contextmanager
def after_step(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Call act() at the end of an optimizer step, before it is logged, evaluated or saved."""
    step_done = RunLog.step_done

    def step_done_then_act(log):
        step_done(log)
        if log.bar.n == step:
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "step_done", step_done_then_act)
        yield


@contextmanager
def signal_after_step(step: int, number: int = signal.SIGTERM) -> Iterator[None]:
    """Have this process get a signal at the end of an optimizer step."""
    with after_step(step, lambda: os.kill(os.getpid(), number)):
        yield


@contextmanager
def scaled_losses(factor: float, micro_batches: Collection[int]) -> Iterator[None]:
    """Multiply the losses of these micro-batches, numbered from 1 over the whole run."""
    target_logprobs, calls = train.target_logprobs, []

    def scaled_logprobs(*arguments):
        calls.append(1)
        return target_logprobs(*arguments) * (factor if len(calls) in micro_batches else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "target_logprobs", scaled_logprobs)
        yield


@contextmanager
def random_losses(out_of_memory_at: int | None = None) -> Iterator[None]:
    """Have every micro-batch draw random numbers, and one of them (from 1) run out of memory after that."""
    target_logprobs, calls = train.target_logprobs, []

    def random_logprobs(*arguments):
        calls.append(1)
        noise = 1 + 0.1 * torch.rand(1) + 0.1 * random.random()
        if len(calls) == out_of_memory_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return target_logprobs(*arguments) * noise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "target_logprobs", random_logprobs)
        yield


def interrupt(*_, **__) -> None:
    raise KeyboardInterrupt


def out_of_memory(*_, **__) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")
