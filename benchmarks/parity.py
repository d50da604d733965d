"""Compare the losses of train.py with those of TRL's SFTTrainer, step by step.

python benchmarks/parity.py --model MODEL --dataset ROWS [--steps 12] [--keep_bf16_lora] [train.py's flags]

Three cases, each a run of train.py and one of SFTTrainer: padded rows, packed rows, and steps split into two
micro-batches. Both start from the same base (NF4 with double quantization, unless flags say otherwise) and
the same LoRA weights, and take the same tokens in the same order, with the same optimizer, schedule and
clipping. Prints a table per case and a summary. Compute is float32 by default, so rounding hides nothing.

TRL rounds the LoRA weights of a 4-bit base to bfloat16; train.py never does. It is undone here, except with
--keep_bf16_lora. Needs TRL, which is not one of the project's requirements (tried with 1.16.0; 1.15 does not
run on a CPU).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PrinterCallback

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from qlora.config import TrainConfig  # noqa: E402
from qlora.data.order import StepOrder  # noqa: E402
from qlora.errors import InputError  # noqa: E402
from qlora.flags import parse_args  # noqa: E402
from qlora.model.initialization import initialize_adapter  # noqa: E402
from qlora.run.fingerprint import Fingerprint  # noqa: E402
from qlora.run.terminal import command  # noqa: E402

CASES = {  # --packing or not, packs per micro-batch, micro-batches per step
    name: [packing, "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", micro_batches]
    for name, packing, batch, micro_batches in [
        ("padded", "--no_packing", "4", "1"),
        ("packed", "--packing", "2", "1"),
        ("accumulated", "--no_packing", "2", "2"),
    ]
}
# Those of a short run that learns something. Flags on the command line come later, so they win.
DEFAULTS = ["--dtype", "float32", "--max_length", "256", "--learning_rate", "1e-3"]
# What the comparison needs: nothing random, settings that TRL knows by the same name, every step logged.
FIXED = ["--lora_dropout", "0", "--optim", "adamw_torch", "--warmup_steps", "2", "--logging_steps", "1"]


@dataclass
class Run:
    """What a training reports of each optimizer step, and the tokens that it saw."""

    losses: list[float]
    grad_norms: list[float]  # before clipping
    tokens: int


def run_ours(flags: list[str], folder: Path) -> Run:
    """Train with train.py in a process of its own; raises InputError with its last line if it fails."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags, "--output_dir", str(folder)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise InputError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    losses, norms = ([line[name] for line in lines] for name in ("loss", "grad_norm"))
    return Run(losses, norms, lines[-1]["tokens_seen"])


def ordered_packs(config: TrainConfig, rows) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The (input_ids, labels) rows of each pack that train.py takes, in its order; a pack may be one row."""
    packs_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    pack_length = rows.max_length if config.packing else None
    order = StepOrder(
        rows.lengths, packs_per_step, config.seed, config.group_by_length, pack_length, rows.source_ids,
        config.dataset_weights,
    )  # fmt: skip
    if order.steps_in(0) <= config.max_steps:  # the last step of an epoch may be a small one
        raise InputError(
            f"--dataset has rows for {order.steps_in(0)} steps, and --steps {config.max_steps} needs rows "
            f"for {config.max_steps + 1}: give more rows"
        )
    return [rows.fetch(pack) for step in range(config.max_steps) for pack in order.packs(step)]


def run_trl(config: TrainConfig, folder: Path, keep_bf16_lora: bool) -> Run:
    """Train with TRL's SFTTrainer on what train.py takes with this configuration."""
    from trl import SFTConfig, SFTTrainer  # here, because it may not be installed, and takes seconds

    tokenizer, _, rows, _, _ = train.load_data(config)
    packs = ordered_packs(config, rows)
    columns = {
        "input_ids": [torch.cat([ids for ids, _ in pack]).tolist() for pack in packs],
        "labels": [torch.cat([labels for _, labels in pack]).tolist() for pack in packs],
    }
    if config.packing:
        columns["seq_lengths"] = [[len(ids) for ids, _ in pack] for pack in packs]

    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, config.dtype)
    # The adapter that train.py starts from; its random A matrices follow --seed.
    ours = train.load_model(config, dtype, device, Fingerprint(None, {}, [], []))
    initialize_adapter(ours, config.init_lora_weights, config.model, rows)
    lora_config = ours.peft_config["default"]
    lora = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(ours).items()}
    del ours
    # The base as TRL's documentation loads it, not with our code.
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant, bnb_4bit_compute_dtype=dtype,
    ) if config.load_in_4bit else None  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        config.model, dtype=dtype, device_map={"": device}, quantization_config=quantization
    )
    args = SFTConfig(
        output_dir=str(folder), max_steps=config.max_steps, seed=config.seed,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate, lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps, optim="adamw_torch", weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1, adam_beta2=config.adam_beta2, adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm or math.inf,
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=device.type == "cpu",
        # The rows are tokenized and packed already, and come in the order of training.
        dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential",
        padding_free=config.packing, max_length=None,
        gradient_checkpointing=False, dataloader_pin_memory=device.type == "cuda",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=base, args=args, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer,
        peft_config=lora_config,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if not keep_bf16_lora:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    set_peft_model_state_dict(trainer.model, lora)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    losses, norms = ([line[name] for line in lines] for name in ("loss", "grad_norm"))
    return Run(losses, norms, sum(map(len, columns["input_ids"])))


def describe_case(name: str, ours: Run, theirs: Run) -> str:
    """A Markdown table with a row per step."""
    lines = [f"### {name}", "", "| step | loss, train.py | TRL | difference | grad norm, train.py | TRL |"]
    lines.append("|---|---|---|---|---|---|")
    steps = zip(ours.losses, theirs.losses, ours.grad_norms, theirs.grad_norms, strict=True)
    for step, (loss, other, norm, other_norm) in enumerate(steps, start=1):
        lines.append(
            f"| {step} | {loss:.6f} | {other:.6f} | {loss - other:+.1e} | {norm:.5f} | {other_norm:.5f} |"
        )
    return "\n".join(lines)


def describe_summary(runs: dict[str, tuple[Run, Run]]) -> str:
    """A Markdown table with a row per case: how far the two are apart."""
    lines = ["| case | tokens | mean absolute difference | largest | largest of grad norm, relative |"]
    lines.append("|---|---|---|---|---|")
    for name, (ours, theirs) in runs.items():
        gaps = [abs(loss - other) for loss, other in zip(ours.losses, theirs.losses)]
        norm_gap = max(abs(norm / other - 1) for norm, other in zip(ours.grad_norms, theirs.grad_norms))
        lines.append(
            f"| {name} | {ours.tokens:,} | {sum(gaps) / len(gaps):.1e} | {max(gaps):.1e} | {norm_gap:.1e} |"
        )
    return "\n".join(lines)


def compare(arguments: argparse.Namespace, flags: list[str]) -> None:
    """Run every case twice and print the tables; raises InputError."""
    shared = ["--model", arguments.model, "--dataset", arguments.dataset, "--max_steps", str(arguments.steps)]
    runs = {}
    for name in arguments.cases:
        case = [*shared, *DEFAULTS, *CASES[name], *flags, *FIXED]
        config = parse_args(TrainConfig, case)
        with tempfile.TemporaryDirectory() as folder:
            theirs = run_trl(config, Path(folder) / "trl", arguments.keep_bf16_lora)
            ours = run_ours(case, Path(folder) / "ours")
        if ours.tokens != theirs.tokens:  # the comparison would be void
            raise InputError(f"{name}: train.py saw {ours.tokens} tokens, TRL {theirs.tokens}")
        runs[name] = ours, theirs
        print(f"\n{describe_case(name, ours, theirs)}", flush=True)
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}"
        for package in ("trl", "torch", "transformers", "peft", "bitsandbytes")
    )
    cast = "as TRL rounds them" if arguments.keep_bf16_lora else "TRL's rounding to bfloat16 undone"
    print(f"\n### Summary\n\n{config.dtype} compute, LoRA weights: {cast}; {versions}\n")
    print(describe_summary(runs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--keep_bf16_lora", action="store_true")
    with command("parity.py"):
        arguments, flags = parser.parse_known_args()
        if importlib.util.find_spec("trl") is None:
            raise InputError("TRL is not installed: python -m pip install trl==1.16.0")
        compare(arguments, flags)


if __name__ == "__main__":
    main()
