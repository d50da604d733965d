"""Bit-identical results: deterministic operations on CUDA, and random states that side work leaves alone."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def use_deterministic_operations(is_wanted: bool) -> None:
    """Have PyTorch use only operations that give the same bits every time, for the rest of the process."""
    if not is_wanted:
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what was not written


def seed_random_numbers(*numbers: int) -> None:
    """Seed all generators of Python, NumPy and PyTorch with a hash of non-negative numbers.

    Zeros at their end do not count: (1, 2) is the same seed as (1, 2, 0).
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # of every device


@contextmanager
def unchanged_random_states(device: torch.device) -> Iterator[None]:
    """Restore at the end the random states of PyTorch (of the CPU and of `device`), NumPy and Python."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
