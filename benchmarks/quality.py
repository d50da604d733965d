"""What each choice costs or gains in quality, on a small real model: the tables of docs/quality.md.

python demo/make_rows.py outputs/demo-rows
python benchmarks/quality.py --model MODEL --real DATA --task outputs/demo-rows [--output quality.jsonl]

MODEL is a folder or hub id of unquantized weights (SmolLM2-135M-Instruct: demo/make_base.py); DATA are rows
of instructions: the first 1,200 are trained, once, and the next 300 are the validation rows. A variant with
learning rates of its own is trained at each, then at the best one with two more seeds. The others take the
default's best rate. Those of the first table are trained on the demo's task too. Results are added to
--output as they come; what is there already is not run again. --tables prints what is there.
"""

import argparse
import gc
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

TRAIN_SPLIT, VALIDATION_SPLIT = "train[:1200]", "train[1200:1500]"
SEEDS = (42, 43, 44)
FULL_RATES, R16_RATES, R64_RATES = (3e-5, 1e-4, 3e-4), (2e-3, 4e-3, 8e-3), (1e-3, 2e-3, 4e-3)
START_RATES = (2.5e-4, 5e-4, 1e-3)  # of adapters whose B does not start at 0
BASE_RATES = (6e-5, 1.2e-4, 2.5e-4)  # of adapters that hold a part of the base
PLUS_RATES = (5e-4, 1e-3, 2e-3)  # of A; that of B is a multiple
DEFAULT = "NF4, double quantization"
COMMON = (
    "--dtype bfloat16 --lora_dropout 0 --max_length 512 --per_device_train_batch_size 8 "
    "--gradient_accumulation_steps 1 --max_grad_norm 1 --gradient_checkpointing none --no_compile "
    "--logging_steps 1 --eval_steps 100000 --save_steps 100000 --optim adamw_torch"
)
ALL = "--lora_target_modules all-linear"
R16, R64 = f"{ALL} --lora_r 16 --lora_alpha 16", f"{ALL} --lora_r 64 --lora_alpha 64"
BF16, FP4 = "--no_load_in_4bit", "--bnb_4bit_quant_type fp4 --no_bnb_4bit_use_double_quant"


@dataclass(frozen=True)
class Variant:
    """One row of a table: train.py's flags, or full fine-tuning."""

    table: str
    name: str
    flags: str = ""
    base: str = ""  # the PEFT initialization that moves a part of the base into the adapter, if any
    rates: tuple[float, ...] = ()


VARIANTS = [
    Variant("The base", "full fine-tuning", rates=FULL_RATES),
    Variant("The base", "LoRA, bfloat16", f"{R16} {BF16}", rates=R16_RATES),
    Variant("The base", "NF4", f"{R16} --no_bnb_4bit_use_double_quant", rates=R16_RATES),
    Variant("The base", DEFAULT, R16, rates=R16_RATES),
    Variant("The base", "FP4", f"{R16} {FP4}", rates=R16_RATES),
    *(Variant("The rank", f"r={r}", f"{ALL} --lora_r {r} --lora_alpha {r}") for r in (4, 8, 32)),
    Variant("The rank", "r=64", R64, rates=R64_RATES),
    Variant("The targets", "q, v", "--lora_r 16 --lora_alpha 16"),
    Variant("The targets", "gate, up, down", "--lora_target_modules gate_proj up_proj down_proj --lora_r 16"),
    Variant("Variants of LoRA", "rsLoRA, r=64, alpha 16", f"{ALL} --lora_r 64 --lora_alpha 16 --use_rslora"),
    Variant("Variants of LoRA", "DoRA, r=16", f"{R16} --use_dora"),
    Variant("Recovering the loss, r=64", "bfloat16", f"{R64} {BF16}", rates=R64_RATES),
    Variant("Recovering the loss, r=64", "gaussian", f"{R64} --init_lora_weights gaussian", rates=(2e-3,)),
    Variant("Recovering the loss, r=64", "loftq", f"{R64} --init_lora_weights loftq", rates=START_RATES),
    Variant("Recovering the loss, r=64", "qera", f"{R64} --init_lora_weights qera", rates=START_RATES),
    Variant("Recovering the loss, r=64", "LoRA+, ratio 4", f"{R64} --loraplus_lr_ratio 4", rates=PLUS_RATES),
    Variant("Recovering the loss, r=64", "PiSSA, on its own base", base="pissa_niter_16", rates=BASE_RATES),
    Variant("Recovering the loss, r=64", "OLoRA, on its own base", base="olora", rates=BASE_RATES),
]


@dataclass(frozen=True)
class Job:
    """One training."""

    variant: Variant
    rate: float
    seed: int
    data: str  # real or task

    @property
    def key(self) -> list:
        return [self.variant.name, self.rate, self.seed, self.data]


def flags_of(job: Job, options: argparse.Namespace, folder: str) -> list[str]:
    """train.py's flags for a job, without those of LoRA for full fine-tuning."""
    flags = f"{COMMON} {job.variant.flags} --learning_rate {job.rate} --seed {job.seed}".split()
    if job.data == "real":
        flags += ["--dataset", options.real, "--split", TRAIN_SPLIT]
        flags += ["--validation_dataset", options.real, "--validation_split", VALIDATION_SPLIT]
    else:
        flags += ["--dataset", f"{options.task}/train.jsonl", "--num_train_epochs", "2"]
        flags += ["--validation_dataset", f"{options.task}/held_out.jsonl"]
        flags += ["--per_device_train_batch_size", "2"]
    model = options.model
    if job.variant.base:
        model = f"{options.bases}/{job.variant.base}/base"
        flags += ["--adapter", f"{options.bases}/{job.variant.base}/adapter"]
        at = flags.index("--lora_dropout")
        del flags[at : at + 2]  # the adapter has its own, which is 0 too
    return ["--model", model, "--output_dir", folder, *flags]


def run_job(job: Job, options: argparse.Namespace) -> dict:
    """Train, and return the validation loss and, for the demo's task, the share of exact answers."""
    import torch

    import train
    from qlora.config import TrainConfig
    from qlora.flags import parse_args

    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = parse_args(TrainConfig, flags_of(job, options, folder))
        if job.variant.name == "full fine-tuning":
            model, loss = train_fully(config)
        else:
            model = train.train(config)
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
            loss = json.loads(lines[-1])["eval_loss"]
        seconds = time.perf_counter() - started
        exact = exact_match(model, config) if job.data == "task" else None
    gb = torch.cuda.max_memory_allocated() / 2**30 if has_gpu else None
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return {"key": job.key, "loss": loss, "exact_match": exact, "seconds": round(seconds, 1), "gb": gb}


def train_fully(config) -> tuple:
    """(model, validation loss) after full fine-tuning: all weights in float32, in train.py's steps."""
    import torch
    import transformers

    import train
    from qlora.commands import choose_device
    from qlora.data.batch import micro_batches, to_device
    from qlora.data.order import StepOrder
    from qlora.evaluation.validation import Validation
    from qlora.model.base import load_base
    from qlora.model.forward import choose_hidden_states
    from qlora.optim.schedule import Schedule
    from qlora.speed.attention import choose_attention

    device, autocast = choose_device(torch.bfloat16)
    tokenizer, _, rows, validation_rows, _ = train.load_data(config)
    model = load_base(config.model, torch.float32, device, load_in_4bit=False).train()
    transformers.set_seed(config.seed)
    choose_attention(model, autocast)
    hidden_states, scaler = choose_hidden_states(model), torch.amp.GradScaler(device.type, enabled=False)
    batch_size = config.per_device_train_batch_size
    order = StepOrder(rows.lengths, batch_size, config.seed, pack_length=rows.max_length)
    total = order.steps_until(config.num_train_epochs)
    schedule = Schedule("cosine", config.learning_rate, total, math.ceil(config.warmup_ratio * total))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for step in range(total):
        optimizer.param_groups[0]["lr"] = schedule.lr_at(step)
        (batch,) = micro_batches(rows, order.packs(step), batch_size, tokenizer.eos_token_id, rows.max_length)
        targets = len(batch["target_ids"])
        train.forward_backward(model, to_device(batch, device), targets, hidden_states, autocast, scaler)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    validation = Validation(validation_rows, 8, 4096, tokenizer.eos_token_id, hidden_states, autocast)
    return model, validation.loss(model)


def exact_match(model, config) -> float:
    """The share of the validation rows that the model answers exactly."""
    import torch

    from qlora.commands import choose_device
    from qlora.config import EvaluateConfig
    from qlora.evaluate import answer_tasks, read_tasks
    from qlora.flags import parse_args
    from qlora.model.base import load_config, load_tokenizer

    flags = ["--model", config.model, "--prompts_file", config.validation_dataset, "--max_new_tokens", "48"]
    evaluation = parse_args(EvaluateConfig, flags)
    tokenizer = load_tokenizer(config.model)
    tasks, _ = read_tasks(evaluation, tokenizer, load_config(config.model))
    _, autocast = choose_device(torch.bfloat16)
    model.eval()
    answers = answer_tasks(model, tokenizer, tasks, autocast, 60, evaluation.max_new_tokens, "answers")
    return statistics.mean(answer == task.reference for answer, task in zip(answers, tasks))


def make_bases(options: argparse.Namespace) -> None:
    """Write, for PiSSA and OLoRA, the base without the part that the adapter starts with, and the adapter.

    Quantized while train.py loads it, that base is the one that the adapter then belongs to.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    for method in sorted({variant.base for variant in VARIANTS} - {""}):
        folder = Path(options.bases) / method
        if folder.exists():
            continue
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        config = LoraConfig(
            r=64, lora_alpha=64, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM",
            init_lora_weights=method,
        )  # fmt: skip
        model = get_peft_model(base, config)
        config.init_lora_weights = True  # or loading the adapter would take it out of the base once more
        model.save_pretrained(folder / "adapter")
        model.unload().to(torch.bfloat16).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")


def run_all(jobs: list[Job], options: argparse.Namespace) -> None:
    """Run the jobs whose results are not there yet, several at a time, each in a process that is reused.

    A result counts for its variant's name: remove the lines of a variant whose flags you change.
    """
    done = {json.dumps(result["key"]) for result in results(options)}
    todo = [job for job in jobs if json.dumps(job.key) not in done]
    workers = min(options.workers, len(todo)) or 1
    with multiprocessing.get_context("spawn").Pool(workers) as pool, open(options.output, "a") as file:
        for result in pool.imap_unordered(partial(run_job, options=options), todo):
            print(json.dumps(result), file=sys.stderr, flush=True)
            file.write(json.dumps(result) + "\n")
            file.flush()


def results(options: argparse.Namespace) -> list[dict]:
    path = Path(options.output)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def best_rate(variant: Variant, done: list[dict]) -> float | None:
    """The learning rate with the lowest validation loss at the first seed, or the default's best rate."""
    name = variant.name if variant.rates else DEFAULT
    losses = {
        result["key"][1]: result["loss"]
        for result in done
        if result["key"][0] == name and result["key"][2:] == [SEEDS[0], "real"]
    }
    return min(losses, key=losses.get, default=None)


def print_tables(options: argparse.Namespace) -> None:
    """Markdown: for each variant its rate, the mean and range of its losses over seeds, exact answers."""
    done = results(options)
    for table in dict.fromkeys(variant.table for variant in VARIANTS):
        print(f"\n### {table}\n\n| | learning rate | validation loss | exact match on the demo's task |")
        print("|---|---|---|---|")
        for variant in VARIANTS:
            rate = best_rate(variant, done)
            of_rate = [result for result in done if result["key"][:2] == [variant.name, rate]]
            losses = [result["loss"] for result in of_rate if result["key"][3] == "real"]
            exact = [result["exact_match"] for result in of_rate if result["key"][3] == "task"]
            if variant.table == table and losses:
                answers = mean_and_range(exact, ".0%") if exact else "-"
                print(f"| {variant.name} | {rate:g} | {mean_and_range(losses, '.4f')} | {answers} |")


def mean_and_range(values: list[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--real", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--output", default="quality.jsonl")
    parser.add_argument("--bases", default="outputs/quality-bases")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args()
    if not options.tables:
        make_bases(options)
        run_all([Job(v, rate, SEEDS[0], "real") for v in VARIANTS for rate in v.rates], options)
        best = {variant: best_rate(variant, results(options)) for variant in VARIANTS}
        run_all([Job(v, best[v], seed, "real") for v in VARIANTS for seed in SEEDS], options)
        with_task = [v for v in VARIANTS if v.table == VARIANTS[0].table]
        run_all([Job(v, best[v], seed, "task") for v in with_task for seed in SEEDS], options)
    print_tables(options)


if __name__ == "__main__":
    main()
