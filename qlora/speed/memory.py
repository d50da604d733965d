"""GPU memory: how much a run may take, and which errors mean that there was too little."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlora import ranks
from qlora.errors import InputError

GB = 2**30
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
MARGIN = 0.05  # of the memory, kept free: gaps between blocks that the allocator cannot use


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out: an error of Python, PyTorch, cuBLAS or Triton, perhaps wrapped by Dynamo."""
    while error is not None:
        if isinstance(error, OUT_OF_MEMORY) or re.search("out of memory|ALLOC_FAILED", str(error)):
            return True
        error = error.__cause__ or getattr(error, "inner_exception", None)
    return False


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Keep all objects that exist by now, the model and its code, out of garbage-collection scans."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def limit_memory(limit_gb: float | None) -> int:
    """Bytes that the tensors of this process may take; with `limit_gb`, as on a GPU of that many GB.

    Subtracts what CUDA and other processes use, and MARGIN. Of several ranks, the one with the least memory
    counts. With `limit_gb`, or with several ranks, PyTorch will not allocate more, so that all ranks run out
    of memory at the same point: one that went on would wait for the others forever. Raises InputError if the
    model alone takes as much.
    """
    free, total = torch.cuda.mem_get_info()
    used_by_others = total - free - torch.cuda.memory_reserved()
    if limit_gb is not None and limit_gb * GB > total:
        print(f"--memory_limit_gb {limit_gb:g}: this GPU's {total / GB:.1f} GB are the limit.")
    limit = min(total if limit_gb is None else limit_gb * GB, total) - used_by_others
    if limit_gb is not None and limit <= torch.cuda.memory_allocated():
        raise InputError(
            f"--memory_limit_gb {limit_gb:g}: the model takes {torch.cuda.memory_allocated() / GB:.2f} GB, "
            f"CUDA and other processes {used_by_others / GB:.2f} GB"
        )
    limit = min(ranks.gather(limit))
    if limit_gb is not None or ranks.count() > 1:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit / total)
    return int(limit * (1 - MARGIN))
