"""The benchmark's cases, and the peers that each is compared with."""

from dataclasses import dataclass

TARGETS = {
    "qv": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
REAL = "sahil2801/CodeAlpaca-20k"
WARM_UP = 5  # steps that are not measured, until compilation, memory and clocks have settled


@dataclass(frozen=True)
class Case:
    """One kind of step: `batch` sequences of `length` tokens, LoRA of rank 16 without dropout."""

    name: str
    batch: int
    length: int
    flags: str  # for train.py
    peers: tuple[str, ...]  # unsloth or trl; with "-nockpt", gradient checkpointing is off
    targets: str = "qv"
    is_real: bool = False  # the rows of --real, packed; otherwise synthetic rows of full length
    steps: int = 15


NONE, OFFLOADED = "--gradient_checkpointing none", "--gradient_checkpointing all --offload_activations on"
CASES = [
    Case("8 x 512, nothing checkpointed", 8, 512, NONE, ("unsloth-nockpt",)),
    Case("8 x 512, all checkpointed and offloaded", 8, 512, OFFLOADED, ("unsloth", "trl")),
    Case("8 x 512, all linear layers, nothing checkpointed", 8, 512, NONE, ("unsloth-nockpt",), "all"),
    Case("4 x 2048, as planned", 4, 2048, "", ("unsloth",)),
    Case("1 x 16384, all checkpointed and offloaded", 1, 16384, OFFLOADED, ("unsloth",), steps=10),
    Case("1 x 512, as planned", 1, 512, "", ("unsloth", "unsloth-nockpt"), steps=30),
    Case("real rows packed to 8 x 512, nothing checkpointed", 8, 512, NONE, ("unsloth-nockpt", "unsloth"),
         is_real=True, steps=25),
    Case("the same in float16", 8, 512, f"{NONE} --dtype float16", (), is_real=True, steps=25),
    Case("8 x 512, plain: bitsandbytes and PEFT, uncompiled, all checkpointed", 8, 512,
         "--gradient_checkpointing all --no_compile --no_fused_4bit --no_cuda_graphs", ()),
]  # fmt: skip
