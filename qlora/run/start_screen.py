"""What a run prints at its start, as it becomes known, and at its end."""

import shlex
from pathlib import Path

import torch

from qlora import ranks
from qlora.data.order import StepOrder
from qlora.data.report import short_report
from qlora.data.stream import RowStream
from qlora.data.tokenized import TokenizedRows
from qlora.model.base import base_memory_bytes, count_frozen, is_sharded, quantized_share
from qlora.run.checkpoint import Checkpoints
from qlora.run.screen import aligned
from qlora.speed.memory import GB
from qlora.speed.plan import Plan


def describe_data(
    datasets: list[str],
    train_rows: TokenizedRows,
    validation_rows: TokenizedRows | None,
    report: dict,
    is_streaming: bool,
) -> str:
    """The rows, and the data report in short."""
    return aligned(
        data=f"{' + '.join(datasets)}: {'first ' * is_streaming}{train_rows.describe()}",
        validation=validation_rows.describe() if validation_rows else "none",
        **(short_report(report) if report else {}),  # ranks that do not print have none
    )


def describe_model(peft_model, name: str, dtype: str) -> str:
    """Base, adapter and device."""
    trained = sum(weight.numel() for weight in peft_model.parameters() if weight.requires_grad)
    total = trained + sum(count_frozen(peft_model))
    quantization = peft_model.get_base_model().config.to_dict().get("quantization_config")
    weights = dtype
    if quantization:  # linear layers only: the experts of some models are not linear layers, and stay 16-bit
        kind = quantization["bnb_4bit_quant_type"]
        weights = f"{quantized_share(peft_model):.1%} of them {kind}, the others {dtype}"
    device = torch.cuda.get_device_name() if peft_model.device.type == "cuda" else "the CPU"
    if ranks.count() > 1:
        device = f"{ranks.count()} x {device}"
    if device == "the CPU" and dtype == "float16":
        device += " (float16 is slow there: --dtype float32 or bfloat16)"
    memory = f"{base_memory_bytes(peft_model) / GB:.3g} GB{' on each' * is_sharded(peft_model)}"
    return aligned(
        model=f"{name}: {total - trained:,} parameters, {memory}, {weights}",
        adapter=f"{trained:,} trainable parameters ({trained / total:.3%}), float32",
        compute=f"{dtype} on {device}",
    )


def describe_layers(plan: Plan, kernels: str) -> str:
    """How the layers run, and the memory that a step takes. `kernels` is what fuse_linears() returned."""
    compiled = "compiled" if plan.is_compiled else "not compiled"
    graphs = ", replayed as CUDA graphs" if plan.graph_bytes else ""
    facts = {"layers": f"{plan.describe()}; {compiled}{graphs}{kernels and f'; 4-bit weights by {kernels}'}"}
    if plan.peak_bytes:
        facts["memory"] = (
            f"{plan.peak_bytes / GB:.2f} GB at the peak of a step, {plan.limit_bytes / GB:.2f} GB available "
            f"(rehearsed in {plan.seconds:.1f} s)"
        )
    return aligned(**facts)


def describe_steps(
    order: StepOrder,
    total_steps: int,
    batch_size: int,
    is_packing_wanted: bool,
    why_not_packed: str | None,
    stream: RowStream | None,
) -> str:
    """How many steps, of how many packs of rows."""
    packs = f"packs of {order.pack_length} tokens" if order.pack_length else "rows"
    split = [ranks.count()] * (ranks.count() > 1) + [order.packs_per_step // batch_size // ranks.count()]
    batch = f"{' x '.join(map(str, split))} x {batch_size} {packs}"
    parts = f"{order.epochs_at(total_steps):.2f} epochs of {order.steps_in(0):,} steps"
    if stream is not None:
        parts = f"windows of {stream.window_rows:,} rows"
    details = f"{parts}, the last step of each may be smaller"
    if is_packing_wanted and why_not_packed is not None:
        details += f"; not packed: {why_not_packed}"
    return aligned(steps=f"{total_steps:,} of {batch} ({details})")


def describe_output(checkpoints: Checkpoints, checkpoint: Path | None, resume_from: str | None) -> str:
    """Where the run writes, and where it starts."""
    start = ""
    if checkpoint is not None:
        start = f", resuming from {checkpoint.name}"
    elif resume_from is not None:
        start = ", no checkpoint there yet: starting from scratch"
    if checkpoints.replaced:
        start += f", replacing {', '.join(path.name for path in checkpoints.replaced)}"
    return aligned(output=f"{checkpoints.output_dir}{start}")


def describe_result(plan: Plan, model: str, output_dir: str, trust_remote_code: bool) -> str:
    """What a finished run says: its peak memory, and the command that asks the adapter."""
    lines = []
    if plan.peak_bytes:
        peak = torch.cuda.max_memory_allocated() + plan.graph_bytes
        lines.append(f"peak memory: {peak / GB:.2f} GB ({plan.peak_bytes / GB:.2f} GB in the rehearsal)")
    ask = ["generate.py", "--model", model, "--adapter", output_dir]
    ask += ["--trust_remote_code"] * trust_remote_code
    lines.append(f'adapter saved in {output_dir}; ask it: python {shlex.join(ask)} --prompt "..."')
    return "\n".join(lines)
