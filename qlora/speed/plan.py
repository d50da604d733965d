"""Which layers to checkpoint: the fewest with which a step fits the card, measured by rehearsing it."""

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from qlora.data.batch import BatchShape, collate, to_device
from qlora.errors import InputError, first_line
from qlora.model.forward import VARLEN, decode
from qlora.model.loss import next_token_loss
from qlora.optim.optimizer import FlatParameters, reset_optimizer
from qlora.speed.graphs import GraphedDecoder
from qlora.speed.layers import drops_out, set_up_layers

GB = 2**30
MARGIN = 0.05  # of the memory there is: what the allocator cannot use between its blocks


@dataclass(frozen=True)
class Plan:
    """How the layers run, and what a step then needs."""

    checkpointed: int  # layers, from the first on
    layers: int
    offload: bool  # whether what checkpointed layers keep waits in host memory
    peak_bytes: int  # of the rehearsed step, the model included; 0 where nothing was measured
    limit_bytes: int
    graph_bytes: int = 0  # of the peak: what CUDA graphs hold, which PyTorch does not count

    def describe(self) -> str:
        if not self.layers:
            return "none that could be checkpointed or compiled by itself"
        count = {0: "none", self.layers: "all"}.get(self.checkpointed, str(self.checkpointed))
        offloaded = " and offloaded to the host" if self.offload else ""
        return f"{count} of {self.layers} layers checkpointed{offloaded}"


@dataclass
class Rehearsal:
    """Whole steps on the worst batch that the data can make, to see what they need; they leave no trace."""

    model: torch.nn.Module
    layers: list[torch.nn.Module]
    flat: FlatParameters
    optimizer: torch.optim.Optimizer
    autocast: Callable
    plain_head: bool
    compile: bool
    shape: BatchShape
    accumulates: bool  # whether a step has several micro-batches
    evaluates: tuple[int, int] | None = None  # rows and tokens of a row of the largest batch, if any
    decode: Callable = decode  # or a GraphedDecoder
    any_shape: bool = False  # compile once for batches of every shape, as is done for padded ones

    def set_up(self, checkpointed: int, offload: bool) -> None:
        is_dynamic = self.any_shape or not self.shape.is_packed
        is_random = drops_out(self.model)
        set_up_layers(self.layers, checkpointed, offload, self.compile, is_dynamic, is_random)

    def peak(self, checkpointed: int, offload: bool) -> int | None:
        """Bytes allocated at the peak of a step: forward, backward, optimizer; and of an evaluation's batch.
        None if there are not enough.

        The optimizer's step is taken at learning rate 0 over gradients of 0: it changes no weight.
        """
        self.set_up(checkpointed, offload)
        on_cuda = self.model.device.type == "cuda"
        if on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        peak = None
        try:
            with torch.random.fork_rng(devices=[self.model.device] if on_cuda else []):
                self._step()
            peak = torch.cuda.max_memory_allocated() if on_cuda else 0
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.model.zero_grad(set_to_none=True)
        gc.collect()  # what an error has left
        reset_optimizer(self.optimizer)
        return peak

    def record(self) -> int:
        """Record the decoder's passes as CUDA graphs; returns the bytes they hold that PyTorch counts as
        free."""
        with torch.random.fork_rng(devices=[self.model.device]):
            torch.cuda.reset_peak_memory_stats()
            causal_lm, parameters = self.model.get_base_model(), self.flat.parameters
            self.decode = GraphedDecoder(causal_lm, self._batch(), parameters, self.autocast)
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()

    def _batch(self) -> dict[str, torch.Tensor]:
        shape = self.shape
        ids = torch.arange(shape.length) % self.model.config.get_text_config().vocab_size
        rows = ids.tensor_split(2) if shape.starts else [ids]
        packs = [[(row, row) for row in rows]] * shape.packs
        batch = collate(packs, 0, shape.length if shape.is_packed else None, shape.starts)
        return to_device(batch, self.model.device)

    def _step(self) -> None:
        for parameter in self.flat.parameters if self.accumulates else []:
            parameter.grad = torch.zeros_like(parameter)  # as from an earlier micro-batch
        with self.autocast():
            loss = next_token_loss(self.model, self._batch(), self.plain_head, self.decode)
        loss.backward()
        self.flat.gather_gradients()
        self.flat.vector.grad.zero_()
        self.optimizer.step()
        if self.evaluates:
            self.optimizer.zero_grad(set_to_none=True)
            self._evaluate(*self.evaluates)

    @torch.no_grad()
    def _evaluate(self, rows: int, length: int) -> None:
        ids = torch.arange(length) % self.model.config.get_text_config().vocab_size
        batch = to_device(collate([[(ids, ids)]] * rows, 0), self.model.device)
        self.model.eval()
        with self.autocast():
            next_token_loss(self.model, batch, self.plain_head)
        self.model.train()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is one of memory: PyTorch's own, cuBLAS', Triton's, or wrapped by the compiler."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or re.search("out of memory|ALLOC_FAILED", str(error)):
            return True
        error = error.__cause__ or getattr(error, "inner_exception", None)
    return False


def limit_memory(limit_gb: float | None) -> int:
    """Bytes that the tensors of this process may take; with `limit_gb`, as on a card of so many GB.

    What CUDA itself and other processes have taken is subtracted, and MARGIN. With `limit_gb` PyTorch is kept
    from allocating more. Raises InputError if the model alone takes as much.
    """
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    if limit_gb is None:
        return int((total - others) * (1 - MARGIN))
    if limit_gb * GB > total:
        print(f"--memory_limit_gb {limit_gb:g} is more than this card's {total / GB:.1f} GB, which are used.")
    ours = min(limit_gb * GB, total) - others
    if ours <= torch.cuda.memory_allocated():
        raise InputError(
            f"--memory_limit_gb {limit_gb:g}: {torch.cuda.memory_allocated() / GB:.2f} GB are taken by the "
            f"model, and {others / GB:.2f} GB by CUDA and other processes"
        )
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(ours / total)
    return int(ours * (1 - MARGIN))


def choose_plan(
    peak: Callable[[int, bool], int | None], layers: int, checkpointing: str, offload: str, limit: int
) -> Plan | None:
    """The plan with the fewest layers checkpointed that needs at most `limit` bytes; None if there is none.

    `peak` measures (checkpointed layers, offload). `checkpointing` is all, none, a number, or auto: any.
    `offload` is on, off, or auto: only where not even all layers checkpointed would do without.
    """

    def fitting(checkpointed: int, offload: bool) -> Plan | None:
        needed = peak(checkpointed, offload)
        fits = needed is not None and needed <= limit
        return Plan(checkpointed, layers, offload, needed, limit) if fits else None

    def offloaded_if_it_must(checkpointed: int) -> Plan | None:
        plan = fitting(checkpointed, False) if offload != "on" else None
        return plan or (fitting(checkpointed, True) if offload != "off" and checkpointed else None)

    if checkpointing != "auto":
        count = {"all": layers, "none": 0}.get(checkpointing)
        return offloaded_if_it_must(int(checkpointing) if count is None else count)
    if plan := fitting(0, False):
        return plan
    best = offloaded_if_it_must(layers)
    if best is None or (best.offload and offload != "on"):
        return best
    too_few = 0
    while best.checkpointed - too_few > 1:
        middle = (best.checkpointed + too_few) // 2
        if plan := fitting(middle, best.offload):
            best = plan
        else:
            too_few = middle
    return best


def largest_step(rehearsal: Rehearsal, offload: bool, limit: int) -> tuple[int, int] | None:
    """(packs, length) of the largest micro-batch that fits with all layers checkpointed.

    The most packs of the rehearsal's length; if not even one fits, the longest one, to 64 tokens. None if
    nothing does.
    """

    def fits(packs: int, length: int) -> bool:
        shape = replace(rehearsal.shape, packs=packs, length=length)
        smaller = replace(rehearsal, shape=shape, any_shape=True, evaluates=None)  # its batches shrink too
        needed = smaller.peak(len(rehearsal.layers), offload)
        return needed is not None and needed <= limit

    def most(below: int, fits: Callable[[int], bool]) -> int:
        """The largest number under `below` that fits; 0 if none does."""
        low = 0
        while below - low > 1:
            middle = (low + below) // 2
            low, below = (middle, below) if fits(middle) else (low, middle)
        return low

    shape = rehearsal.shape
    packs = most(shape.packs, lambda packs: fits(packs, shape.length))
    if packs:
        return packs, shape.length
    units = most(-(-shape.length // 64), lambda units: fits(1, 64 * units))
    return (1, 64 * units) if units else None


def plan_layers(
    rehearsal: Rehearsal, checkpointing: str, offload: str, limit_gb: float | None, graphs: bool | None = None
) -> Plan:
    """Choose how the layers run, and have them run so. Raises InputError if a step does not fit.

    Without a card, where there is nothing to measure, `auto` is all. A compiler that fails costs one line.
    With `graphs` the decoder's passes are replayed as CUDA graphs, or one line says why not; with None it is
    done where it can be.
    """
    layers = len(rehearsal.layers)
    if not layers and (checkpointing not in ("auto", "none") or offload == "on"):
        raise InputError("this model's layers cannot be checkpointed: use --gradient_checkpointing none")
    rehearsal.compile = rehearsal.compile and layers > 0
    if checkpointing.isdigit() and int(checkpointing) > layers:
        raise InputError(f"--gradient_checkpointing {checkpointing}: this model has {layers} layers")
    on_cuda = rehearsal.model.device.type == "cuda"
    limit = limit_memory(limit_gb) if on_cuda else 0
    if not on_cuda and checkpointing == "auto":
        checkpointing = "all"

    def choose() -> Plan | None:
        peak = rehearsal.peak if on_cuda or rehearsal.compile else lambda checkpointed, offload: 0
        return choose_plan(peak, layers, checkpointing, offload, limit)

    failure = None
    try:
        plan = choose()
    except Exception as error:  # compilers have many ways to fail
        if not rehearsal.compile:
            raise
        failure = first_line(error)
    if failure is not None:  # only here: the error holds what its step had allocated
        print(f"The layers cannot be compiled here ({failure}): they run as they are, and slower.")
        rehearsal.compile = False
        gc.collect()
        plan = choose()
    if plan is None:
        raise InputError(_what_fits(rehearsal, checkpointing, offload != "off", limit))
    rehearsal.set_up(plan.checkpointed, plan.offload)
    if on_cuda:
        if graphs is not False:
            plan = _with_graphs(rehearsal, plan, is_asked=graphs is True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return plan


def _why_no_graphs(rehearsal: Rehearsal, plan: Plan) -> str | None:
    """What keeps the decoder's passes from being recorded; None if nothing is known to."""
    if not rehearsal.shape.is_packed:
        return "padded batches have many shapes"
    if not rehearsal.plain_head:
        return "this model's head does more than a matrix product"
    if rehearsal.model.config._attn_implementation != VARLEN:
        return "for the mask that keeps packed rows apart the host looks at their positions"
    if plan.offload:
        return "what layers keep waits in host memory"
    if plan.checkpointed and not rehearsal.compile and drops_out(rehearsal.model):
        # The compiler keeps what they were drawn from; checkpoint() would set the host's random state back.
        return "checkpointed layers with dropout must draw the same numbers twice"
    return None


def _with_graphs(rehearsal: Rehearsal, plan: Plan, is_asked: bool) -> Plan:
    """The plan with the decoder's passes replayed as CUDA graphs, or as it is where that cannot be."""
    reason = _why_no_graphs(rehearsal, plan)
    if reason is not None and not is_asked:
        return plan
    if reason is None:
        try:
            held = rehearsal.record()
            needed = rehearsal.peak(plan.checkpointed, plan.offload)
            if needed is not None and needed + held <= plan.limit_bytes:
                return replace(plan, peak_bytes=needed + held, graph_bytes=held)
            reason = "they need more memory than there is"
        except Exception as error:  # whatever cannot be recorded; PyTorch's errors on it are of many types
            reason = first_line(error)
    print(f"No CUDA graphs: {reason}.")
    rehearsal.decode = decode
    gc.collect()
    return plan


def _what_fits(rehearsal: Rehearsal, checkpointing: str, offload: bool, limit: int) -> str:
    """What to say of a step that does not fit."""
    size = f"{rehearsal.shape.packs} x {rehearsal.shape.length}"
    step = f"a micro-batch of {size} tokens needs more than {limit / GB:.1f} GB"
    if checkpointing not in ("auto", "all") or not rehearsal.layers:
        return f"{step} with --gradient_checkpointing {checkpointing}: auto finds what fits"
    largest = largest_step(rehearsal, offload, limit)
    if largest is None:
        return f"{step}, and so does one of 1 x 64: this model is too large for this memory"
    packs, length = largest
    return (
        f"{step} even with all layers checkpointed: --per_device_train_batch_size {packs} --max_length "
        f"{length} is the largest that fits (more --gradient_accumulation_steps make up for it)"
    )
