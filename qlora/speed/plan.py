"""How the layers run: the fewest checkpointed layers with which a step fits the GPU, found by rehearsal."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from qlora import ranks
from qlora.errors import InputError, first_line
from qlora.model.base import is_sharded
from qlora.model.forward import VARLEN
from qlora.speed.memory import GB, limit_memory
from qlora.speed.rehearsal import Rehearsal


@dataclass(frozen=True)
class Plan:
    """How the layers run, and what a step then needs."""

    checkpointed: int  # layers, counted from the first
    layers: int
    offload: bool  # whether checkpointed layers keep their activations in host memory
    peak_bytes: int  # of the rehearsed step, with the model; 0 where nothing was measured
    limit_bytes: int
    hidden_states: Callable | None = None  # for the loop: see choose_hidden_states
    graph_bytes: int = 0  # the part of the peak that CUDA graphs hold, which PyTorch does not count
    is_compiled: bool = False
    seconds: float = 0.0  # spent planning, including compilation

    def describe(self) -> str:
        if not self.layers:
            return "none that could be checkpointed or compiled by itself"
        count = {0: "none", self.layers: "all"}.get(self.checkpointed, str(self.checkpointed))
        offloaded = " and offloaded to the host" if self.offload else ""
        return f"{count} of {self.layers} layers checkpointed{offloaded}"


def plan_layers(
    rehearsal: Rehearsal, checkpointing: str, offload: str, limit_gb: float | None, graphs: bool | None = None
) -> Plan:
    """Choose how the layers run, and set them up that way. Raises InputError if a step does not fit.

    `checkpointing` is all, none, a number of layers, or auto; `offload` is on, off or auto. Without a GPU
    there is nothing to measure, and `auto` is all. All ranks get the same plan: the smallest GPU decides. If
    the layers cannot be compiled, one line says so and they run uncompiled. With `graphs` the decoder's
    passes are recorded as CUDA graphs, or one line says why not; with None they are recorded where possible.
    """
    started = time.perf_counter()
    layers = len(rehearsal.layers)
    if not layers and (checkpointing not in ("auto", "none") or offload == "on"):
        raise InputError("this model's layers cannot be checkpointed: use --gradient_checkpointing none")
    if checkpointing.isdigit() and int(checkpointing) > layers:
        raise InputError(f"--gradient_checkpointing {checkpointing}: this model has {layers} layers")
    limit = limit_memory(limit_gb) if rehearsal.on_cuda else 0
    if not rehearsal.on_cuda and checkpointing == "auto":
        checkpointing = "all"
    rehearsal = replace(rehearsal, compile=rehearsal.compile and layers > 0)
    plan, failure = _try_compiled(rehearsal, checkpointing, offload, limit)
    if failure is not None:
        # Only here, outside of the handler: until then the error holds all that its step had allocated.
        rehearsal = replace(rehearsal, compile=False)
        gc.collect()
        # If the mistake is in the loss, this raises it again. If not, it was the compiler's.
        plan = choose_plan(rehearsal.peak_bytes, layers, checkpointing, offload, limit)
        print(f"The layers cannot be compiled here ({failure}): they run uncompiled, which is slower.")
    if plan is None:
        raise InputError(_advise(rehearsal, checkpointing, offload != "off", limit))
    rehearsal.set_up(plan.checkpointed, plan.offload)
    plan = replace(plan, hidden_states=rehearsal.hidden_states, is_compiled=rehearsal.compile)
    if rehearsal.on_cuda:
        if graphs is not False:
            plan = _record_graphs(rehearsal, plan, is_asked=graphs is True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return replace(plan, seconds=time.perf_counter() - started)


def _try_compiled(
    rehearsal: Rehearsal, checkpointing: str, offload: str, limit: int
) -> tuple[Plan | None, str | None]:
    """(plan, None), or (None, why it failed) if the layers were to be compiled."""
    has_to_run = rehearsal.on_cuda or rehearsal.compile
    peak_bytes = rehearsal.peak_bytes if has_to_run else lambda checkpointed, offload: 0
    try:
        return choose_plan(peak_bytes, len(rehearsal.layers), checkpointing, offload, limit), None
    except Exception as error:  # compilers fail in many ways
        if not rehearsal.compile:
            raise
        return None, first_line(error)


def choose_plan(
    peak_bytes: Callable[[int, bool], int | None], layers: int, checkpointing: str, offload: str, limit: int
) -> Plan | None:
    """The plan with the fewest layers checkpointed that needs at most `limit` bytes; None if there is none.

    `peak_bytes` measures a choice of (checkpointed layers, offload). With offload "auto", activations are
    only offloaded where not even all layers checkpointed would fit otherwise.
    """

    def plan_if_it_fits(checkpointed: int, offload: bool) -> Plan | None:
        peak = peak_bytes(checkpointed, offload)
        fits = peak is not None and peak <= limit
        return Plan(checkpointed, layers, offload, peak, limit) if fits else None

    def plan_for(checkpointed: int) -> Plan | None:
        """Offloaded only if it has to be."""
        plan = plan_if_it_fits(checkpointed, False) if offload != "on" else None
        return plan or (plan_if_it_fits(checkpointed, True) if offload != "off" and checkpointed else None)

    if checkpointing != "auto":
        count = {"all": layers, "none": 0}.get(checkpointing)
        return plan_for(int(checkpointing) if count is None else count)
    if plan := plan_if_it_fits(0, False):
        return plan
    best = plan_for(layers)
    if best is None or (best.offload and offload != "on"):
        return best
    too_few = 0
    while best.checkpointed - too_few > 1:  # bisection: more layers checkpointed never need more memory
        middle = (best.checkpointed + too_few) // 2
        if plan := plan_if_it_fits(middle, best.offload):
            best = plan
        else:
            too_few = middle
    return best


def largest_step(rehearsal: Rehearsal, offload: bool, limit: int) -> tuple[int, int] | None:
    """(examples, length) of the largest micro-batch that fits with all layers checkpointed, or None.

    The most examples of the rehearsal's length. If not even one fits: one, as long as fits, in steps of 64.
    An example is what --per_device_train_batch_size counts: a pack or, in examples/dpo.py, a pair of rows.
    """

    def fits(examples: int, length: int) -> bool:
        shape = replace(rehearsal.shape, packs=examples * rehearsal.rows_per_example, length=length)
        # Without the evaluation, whose batches would shrink too.
        smaller = replace(rehearsal, shape=shape, has_any_shape=True, evaluate=None)
        peak = smaller.peak_bytes(len(rehearsal.layers), offload)
        return peak is not None and peak <= limit

    length = rehearsal.shape.length
    bound = rehearsal.shape.packs // rehearsal.rows_per_example
    examples = _largest_below(bound, lambda examples: fits(examples, length))
    if examples:
        return examples, length
    units = _largest_below(-(-length // 64), lambda units: fits(1, 64 * units))
    return (1, 64 * units) if units else None


def _largest_below(bound: int, fits: Callable[[int], bool]) -> int:
    """The largest number under `bound` that fits, by bisection; 0 if none does."""
    low = 0
    while bound - low > 1:
        middle = (low + bound) // 2
        low, bound = (middle, bound) if fits(middle) else (low, middle)
    return low


def _record_graphs(rehearsal: Rehearsal, plan: Plan, is_asked: bool) -> Plan:
    """The plan with the decoder's passes recorded as CUDA graphs, or as it is where that is impossible."""
    reason = _why_no_graphs(rehearsal, plan)
    if reason is not None and not is_asked:
        return plan
    graphed, graph_bytes = None, 0
    if reason is None:
        try:
            graphed, graph_bytes = rehearsal.record()
        except RuntimeError as error:  # the host waits somewhere, or an operation cannot be recorded
            reason = first_line(error)
    reason = next(filter(None, ranks.gather(reason)), None)
    if reason is None:
        graph_bytes = max(ranks.gather(graph_bytes))
        peak = rehearsal.peak_bytes(plan.checkpointed, plan.offload, graphed)
        if peak is not None and peak + graph_bytes <= plan.limit_bytes:
            peak += graph_bytes
            return replace(plan, hidden_states=graphed, peak_bytes=peak, graph_bytes=graph_bytes)
        reason = "they need more memory than there is"
    print(f"No CUDA graphs: {reason}.")
    gc.collect()
    return plan


def _why_no_graphs(rehearsal: Rehearsal, plan: Plan) -> str | None:
    """What rules out CUDA graphs; None if nothing is known to."""
    if is_sharded(rehearsal.model):
        return "the layers' weights are gathered from all GPUs"
    if not rehearsal.shape.is_packed:
        return "padded batches have many shapes"
    if rehearsal.hidden_states is None:
        return "this model's head does more than a matrix product"
    if rehearsal.model.config._attn_implementation != VARLEN:
        return "building the mask for packed rows makes the host wait for the GPU"
    if plan.offload:
        return "activations are offloaded to host memory"
    if plan.checkpointed and not rehearsal.compile and rehearsal.is_random:
        # The compiler keeps the random seeds. checkpoint() would restore the host's random state.
        return "checkpointed layers with dropout or router noise must draw the same numbers twice"
    return None


def _advise(rehearsal: Rehearsal, checkpointing: str, offload: bool, limit: int) -> str:
    """The error message for a step that does not fit."""
    size = f"{rehearsal.shape.packs} x {rehearsal.shape.length}"
    step = f"a micro-batch of {size} tokens needs more than {limit / GB:.1f} GB"
    if rehearsal.layers and checkpointing not in ("auto", "all"):
        return f"{step} with --gradient_checkpointing {checkpointing}: auto finds what fits"
    largest = largest_step(rehearsal, offload, limit)
    if largest is None:
        return f"{step}, and so does one of 1 x 64: this model is too large for this memory"
    examples, length = largest
    all_checkpointed = " even with all layers checkpointed" if rehearsal.layers else ""
    return (
        f"{step}{all_checkpointed}: --per_device_train_batch_size {examples} --max_length {length} is the "
        "largest that fits (more --gradient_accumulation_steps make up for it)"
    )
