"""A second loop on the same parts: direct preference optimization (Rafailov et al., arXiv 2305.18290).

python -m examples.dpo --model meta-llama/Llama-2-7b-hf --dataset preferences.jsonl --output_dir outputs/dpo

On several GPUs: torchrun --nproc-per-node 2 -m examples.dpo --model ...
The reference model is the base with its adapter disabled, so it takes no memory. Killed? The same command
with --resume_from_checkpoint latest resumes exactly.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn.functional import logsigmoid

from qlora import ranks
from qlora.config import ComputeType, TrainConfig
from qlora.data.batch import BatchShape, micro_batches, to_device
from qlora.data.formatting import Formatting
from qlora.data.order import StepOrder
from qlora.data.sources import read_rows
from qlora.data.tokenize import tokenize_window
from qlora.data.tokenized import check_vocabulary
from qlora.errors import InputError
from qlora.flags import AT_LEAST_1, POSITIVE, SEED, Flags, flag, parse_args
from qlora.model.adapter import add_adapter
from qlora.model.base import load_base, load_config, load_tokenizer, trainable_weights
from qlora.model.forward import choose_hidden_states
from qlora.model.loss import target_logprobs
from qlora.optim.flat import FlatParameters
from qlora.optim.optimizer import build_optimizer
from qlora.optim.schedule import Schedule
from qlora.run import hub
from qlora.run.checkpoint import Checkpoints
from qlora.run.fingerprint import Fingerprint
from qlora.run.folder import claim_folder
from qlora.run.log import RunLog
from qlora.run.stop import Rescue, Stop
from qlora.run.terminal import command
from qlora.speed import determinism
from qlora.speed.nf4 import fuse_linears
from qlora.speed.plan import plan_layers
from qlora.speed.rehearsal import Rehearsal

# Flags that a resumed run may change (base and rows are compared by contents), and the model card leaves out.
FREE = {"resume": "free", "on_card": False}
SPLIT = {"resume": "free", "compares": ("packs_per_step",)}  # only the pairs of a whole step must stay


@dataclass
class DpoConfig(Flags):
    model: str = flag(..., "Base model, which is also the reference: a hub id or a local folder.", **FREE)
    dataset: str = flag(..., "Rows of prompt, chosen and rejected: a hub id, file or folder.", **FREE)
    output_dir: str = flag("outputs/dpo", "Folder for adapter and checkpoints.", **FREE)
    overwrite_output_dir: bool = flag(False, "Replace an earlier run in --output_dir.", **FREE)
    beta: float = flag(0.1, "How closely the policy stays with the reference (equation 7).", limit=POSITIVE)
    dtype: ComputeType = flag("float16", "Compute type of autocast.")
    lora_r: int = flag(16, "Rank of the adapter; alpha is the same.", limit=AT_LEAST_1)
    lora_target_modules: list[str] = flag(["q_proj", "v_proj"], "Linear layers to adapt, or 'all-linear'.")
    learning_rate: float = flag(5e-5, "Peak rate; warmup over a tenth, then linear decay.", limit=POSITIVE)
    max_length: int = flag(512, "Longest prompt with its answer, in tokens.", limit=AT_LEAST_1)
    max_steps: int = flag(100, "Optimizer steps.", limit=AT_LEAST_1)
    per_device_train_batch_size: int = flag(2, "Pairs in one forward pass.", limit=AT_LEAST_1, **SPLIT)
    gradient_accumulation_steps: int = flag(8, "Forward passes in one step.", limit=AT_LEAST_1, **SPLIT)
    save_steps: int = flag(50, "Save a checkpoint every N steps.", limit=AT_LEAST_1, **FREE)
    seed: int = flag(42, "Seed of the LoRA initialization and of the order of pairs.", limit=SEED)
    resume_from_checkpoint: str | None = flag(None, "'latest', or a checkpoint-N folder.", **FREE)
    allow_changes: list[str] = flag([], "Settings that may change, as a refusal names them.", **FREE)


def answer_logprobs(logprobs: torch.Tensor, batch: dict) -> torch.Tensor:
    """Log-probability of each row's answer, (rows,), from those of its targets."""
    rows, length = batch["input_ids"].shape
    row_of_target = batch["target_index"] // length  # target_index is flat
    return logprobs.new_zeros(rows).index_add(0, row_of_target, logprobs)


def dpo_loss(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (equation 7) and reward margins of pairs, both (pairs,).

    `policy` and `reference` are log-probabilities of the answers: chosen, rejected, chosen, rejected, ...
    """
    chosen, rejected = (beta * (policy - reference)).view(-1, 2).unbind(dim=1)
    return -logsigmoid(chosen - rejected), (chosen - rejected).detach()


def forward_backward(model, batch, step_pairs, hidden_states, autocast, scaler, beta):
    """One micro-batch, forward and backward; returns its shares of mean loss, margin and accuracy, (3,)."""
    with autocast():
        with torch.no_grad(), model.disable_adapter():  # the base alone is the reference
            reference = answer_logprobs(target_logprobs(model, batch, hidden_states), batch)
        policy = answer_logprobs(target_logprobs(model, batch, hidden_states), batch)
        losses, margins = dpo_loss(policy, reference, beta)
        loss = losses.sum() / step_pairs
    scaler.scale(loss).backward()
    return torch.stack([loss.detach(), margins.sum() / step_pairs, (margins > 0).sum() / step_pairs])


def load_pairs(config: DpoConfig, tokenizer):
    """(tokenized answers, (pairs, 2) row numbers of the chosen and the rejected ones)."""
    located_rows = [
        (where, {"prompt": row.get("prompt"), "completion": row.get(answer)})
        for where, row in read_rows(config.dataset, "train")
        for answer in ("chosen", "rejected")
    ]
    rows = tokenize_window(located_rows, tokenizer, Formatting("prompt_completion")).cut(config.max_length)
    # Row 2n of the table is the chosen answer of pair n. A pair is dropped with either of its answers.
    row_of = {index: row for row, index in enumerate(rows.indices.tolist())}
    numbers = range(len(located_rows) // 2)
    pairs = [(row_of[2 * n], row_of[2 * n + 1]) for n in numbers if {2 * n, 2 * n + 1} <= row_of.keys()]
    print(f"{len(numbers):,} pairs read, {len(pairs):,} used; answers dropped: {rows.describe_drops() or 0}")
    if not pairs:
        raise InputError(f"no pair of {config.dataset} can be used: {rows.describe_drops()}")
    return rows, np.array(pairs)


def train(config: DpoConfig):
    """Train; returns the model. Raises InputError, or SystemExit after a checkpoint if stopped."""
    stop, folder, resume_from = Stop(None), Path(config.output_dir), config.resume_from_checkpoint
    with ranks.connected(timeout_seconds=600) as device:  # the other processes of torchrun, if any
        with claim_folder(folder, resume_from, config.overwrite_output_dir, adapter=None) as checkpoint:
            return run(config, device, stop, checkpoint)


def run(config: DpoConfig, device: torch.device, stop: Stop, checkpoint: Path | None):
    """Set up, then take optimizer steps."""
    dtype = getattr(torch, config.dtype)
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    batch_size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    pairs_per_step = batch_size * accumulation * ranks.count()
    shape_flags = ["lora_r", "lora_target_modules"]
    fingerprint = Fingerprint(checkpoint, config.compared_values(), config.allow_changes, shape_flags)
    fingerprint.add_global_batch(pairs_per_step, batch_size)

    with ranks.first_on_host():
        tokenizer = load_tokenizer(config.model)
        rows, pairs = load_pairs(config, tokenizer)
    check_vocabulary(rows, load_config(config.model).get_text_config().vocab_size)
    fingerprint.add_data(tokenizer, rows)
    base = load_base(config.model, dtype, device)
    fingerprint.add_base(config.model)
    transformers.set_seed(config.seed)
    model = add_adapter(base, config.lora_r, config.lora_r, 0.0, config.lora_target_modules, False, False)
    fuse_linears(model.train())
    hidden_states = choose_hidden_states(model)
    trainable = trainable_weights(model)
    flat = FlatParameters([{"params": trainable, "lr_multiple": 1.0}])
    optimizer = build_optimizer("paged_adamw_8bit", flat.groups, betas=(0.9, 0.999), epsilon=1e-8)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    # This orders pairs, each as long as the longer of its answers. They are not packed.
    order = StepOrder(rows.lengths[pairs].max(axis=1), pairs_per_step, config.seed)
    train_batch = partial(forward_backward, model, autocast=autocast, scaler=scaler, beta=config.beta)
    rehearsal = Rehearsal(
        model, flat, optimizer, train_batch, hidden_states, autocast,
        BatchShape(2 * batch_size, int(rows.lengths.max()), is_packed=False, starts=0),
        has_many_micro_batches=accumulation > 1, compile=device.type == "cuda", rows_per_example=2,
    )  # fmt: skip
    plan = plan_layers(rehearsal, checkpointing="auto", offload="auto", limit_gb=None)
    print(plan.describe())
    # The defaults of generate.py and the other commands for this adapter.
    settings = TrainConfig(config.model, dtype=config.dtype, seed=config.seed).kept_settings()
    checkpoints = Checkpoints(
        Path(config.output_dir), 2, model, tokenizer, optimizer, scaler, flat.names,
        settings | fingerprint.settings(rows), fingerprint.values, vars(config),
    )  # fmt: skip
    progress = checkpoints.start(checkpoint, config.max_steps, validation=None)
    schedule = Schedule("linear", config.learning_rate, config.max_steps, warmup_steps=config.max_steps // 10)
    first_step = progress.step
    log = RunLog(checkpoints.output_dir, config.max_steps, first_step, plan.graph_bytes)
    with log, stop, Rescue(checkpoints, model, optimizer, log.say):
        for step in range(first_step, config.max_steps):
            started = time.perf_counter()
            learning_rate = schedule.lr_at(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_multiple"]

            step_pairs = pairs[[pair for (pair,) in order.packs(step)]]  # (pairs of this step, 2)
            answers = [[row] for row in step_pairs.flatten().tolist()]  # chosen, rejected, chosen, ...
            batches = list(enumerate(micro_batches(rows, answers, 2 * batch_size, tokenizer.eos_token_id)))
            own = batches[ranks.number() :: ranks.count()]  # an epoch's last step may have none for this rank
            sums = torch.zeros(3, device=device)
            for number, batch in own:
                determinism.seed_random_numbers(config.seed, step, number)  # for dropout, should you add it
                sums += train_batch(to_device(batch, device), len(step_pairs), plan.hidden_states)
            if step == first_step:
                flat.check_gradients(trainable)
            flat.gather_gradients()
            ranks.sum_(flat.gradient, sums)
            scaler.unscale_(optimizer)
            norm = flat.clip_grad_norm_(1.0)
            loss, margin, accuracy, grad_norm = torch.stack([*sums, norm]).tolist()
            is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
            if is_finite:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            if step == first_step:
                checkpoints.replace_earlier_run()
                log.describe(vars(config))
            tokens, epochs = int(rows.lengths[step_pairs].sum()), order.epochs_at(step + 1)
            seconds = time.perf_counter() - started
            progress.record(loss if is_finite else None, tokens=tokens, epochs=epochs, seconds=seconds)
            checkpoints.mark_boundary()
            progress.check_skips(10, loss, grad_norm, scaler)
            log.step_done()
            stop.step_done()
            values = {"reward_margin": margin, "reward_accuracy": accuracy, "learning_rate": learning_rate}
            log.train(**progress.position(), **values, grad_norm=grad_norm, **progress.close_window())
            is_last, is_stopping = progress.step == config.max_steps, stop.is_due()
            if progress.step % config.save_steps == 0 or is_last or is_stopping:
                checkpoints.save(log.say)
            if is_stopping and not is_last:
                stop.exit(checkpoints, log.say)
    if not ranks.is_first():
        return model
    details = [config.dataset], settings | config.card_flags(), log.lines()
    card = hub.model_card(checkpoints.output_dir.resolve().name, config.model, *details, is_merged=False)
    checkpoints.save_final_adapter(card)
    return model


if __name__ == "__main__":
    with command("dpo.py"):
        train(parse_args(DpoConfig))
