"""Fine-tune a causal language model with QLoRA: python train.py --model meta-llama/Llama-2-7b-hf

forward_backward() trains on one micro-batch: the loss is there. run() sets up, from top to bottom, then takes
the optimizer steps. Flags: qlora/config.py. Worked changes: docs/changing-the-loop.md.
"""

import math
import time
from functools import partial
from pathlib import Path

import torch

from qlora import ranks
from qlora.config import TrainConfig
from qlora.data.batch import to_device
from qlora.data.loader import make_loader
from qlora.data.order import StepOrder
from qlora.data.prepare import load_rows
from qlora.data.report import data_report
from qlora.evaluation.samples import read_samples
from qlora.evaluation.validation import Validation
from qlora.flags import parse_args
from qlora.model import initialization
from qlora.model.adapter import add_adapter, load_adapter
from qlora.model.base import load_base, load_config, load_tokenizer, trainable_weights
from qlora.model.forward import choose_hidden_states
from qlora.model.loss import target_logprobs
from qlora.optim.flat import FlatParameters
from qlora.optim.optimizer import build_optimizer, lora_groups
from qlora.optim.schedule import Schedule
from qlora.run import hub, start_screen
from qlora.run.checkpoint import Checkpoints
from qlora.run.data_report import print_data_report
from qlora.run.fingerprint import Fingerprint
from qlora.run.folder import claim_folder
from qlora.run.log import RunLog
from qlora.run.stop import Rescue, Stop
from qlora.run.terminal import command
from qlora.speed import determinism
from qlora.speed.attention import choose_attention
from qlora.speed.memory import frozen_heap
from qlora.speed.nf4 import fuse_linears
from qlora.speed.plan import plan_layers
from qlora.speed.rehearsal import Rehearsal
from qlora.speed.sharding import load_sharded_base


def forward_backward(model, batch, step_targets, hidden_states, autocast, scaler):
    """Forward and backward pass of one micro-batch; returns its share of the step's loss, on the device.

    `batch` is what collate() in qlora/data/batch.py returns. `step_targets` is the number of targets in the
    whole optimizer step, so that the shares of its micro-batches add up to the mean loss per target: how a
    step is split does not change its gradient. The memory plan rehearses this very function.
    """
    with autocast():
        logprobs = target_logprobs(model, batch, hidden_states)  # (targets of this micro-batch,) float32
        loss = -logprobs.sum() / step_targets
    scaler.scale(loss).backward()  # scaled, or small float16 gradients would underflow to 0
    return loss.detach()  # not .item(), which would make the host wait


def evaluate(model, validation, samples, log, progress, keep_best, stop):
    """Log the validation loss and sample answers; returns whether to keep this as the best model so far."""
    progress.owes_evaluation = True  # if stopped before there is a loss, a resumed run evaluates first
    loss = validation.loss(model, stop.is_due)
    if loss is None:  # stopped
        return False
    progress.owes_evaluation = False
    answers = samples.ask(model, validation.autocast, stop.has_reason, log.say) if samples else None
    log.evaluation(loss, answers, **progress.position())
    return keep_best and progress.record_best(loss)


def load_data(config: TrainConfig, today=None):
    """(tokenizer, the model's configuration, training rows, validation rows or None, stream or None)."""
    tokenizer = load_tokenizer(
        config.model, config.adapter, config.trust_remote_code, config.chat_template, today
    )
    model_config = load_config(config.model, config.trust_remote_code)
    initialization.check_initialization(config.init_lora_weights, config.model, model_config)
    return tokenizer, model_config.get_text_config(), *load_rows(
        tokenizer, model_config.get_text_config(), config.train_sources(), config.validation_sources(),
        formatting=config.formatting(), max_length=config.max_length, held_out=config.held_out,
        seed=config.seed, weights=config.dataset_weights,
    )  # fmt: skip


def load_model(config: TrainConfig, dtype: torch.dtype, device: torch.device, fingerprint: Fingerprint):
    """The 4-bit base with a LoRA adapter, a new one or that of --adapter, in training mode."""
    how = config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant, config.trust_remote_code
    if config.shard:  # each rank keeps a part of it
        base = load_sharded_base(config.model, dtype, device, *how, config.shard_cpu_offload)
    else:
        base = load_base(config.model, dtype, device, config.load_in_4bit, *how)
    fingerprint.add_base(config.model, config.adapter)
    torch.manual_seed(config.seed)  # before the adapter, whose first weights are random
    if config.adapter:
        model = load_adapter(base, config.adapter, is_trainable=True)
    else:
        model = add_adapter(
            base, config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_target_modules,
            config.use_rslora, config.use_dora,
        )  # fmt: skip
    fingerprint.add_adapter(model)
    return model.train()


def train(config: TrainConfig):
    """Train; returns the model. Raises InputError, or SystemExit after a checkpoint if stopped."""
    stop = Stop(config.max_hours)
    folder = None if config.plan_only else Path(config.output_dir)
    with ranks.connected(config.distributed_timeout) as device:  # the other processes of torchrun, if any
        config.check_device(device.type)
        if config.push_to_hub and ranks.is_first():  # checked now, not hours later
            config.hub_model_id = hub.check_hub(config.repository, config.hub_private_repo)
        with claim_folder(
            folder, config.resume_from_checkpoint, config.overwrite_output_dir, config.adapter
        ) as checkpoint:
            return run(config, device, stop, checkpoint)


def run(config: TrainConfig, device: torch.device, stop: Stop, checkpoint: Path | None):
    """Set up, then take the optimizer steps. With --plan_only, set up only as far as the memory plan."""
    determinism.use_deterministic_operations(config.full_determinism)
    dtype = getattr(torch, config.dtype)  # of matrix products; LoRA weights and their gradients are float32
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # else it does nothing
    batch_size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    micro_batches = accumulation * ranks.count()  # in a step, over all GPUs
    # A resume compares what the training depends on with the checkpoint, each part as soon as it is known.
    fingerprint = Fingerprint(checkpoint, config.compared_values(), config.allow_changes, config.shape_flags)
    fingerprint.add_global_batch(batch_size * micro_batches, batch_size)

    # Data before the model: a bad row should not cost the minutes that loading a model takes.
    with ranks.first_on_host():  # the others then find its cache
        tokenizer, model_config, train_rows, validation_rows, stream = load_data(config, fingerprint.today)
        report = data_report(train_rows, validation_rows, batch_size, micro_batches, config.seed)
    fingerprint.add_data(tokenizer, train_rows)
    samples = read_samples(  # prompts to answer at every evaluation; None without --sample_prompts
        config.sample_prompts, tokenizer, train_rows.formatting, model_config, config.sample_max_new_tokens
    )  # fmt: skip
    print(start_screen.describe_data(config.dataset, train_rows, validation_rows, report, stream is not None))

    model = load_model(config, dtype, device, fingerprint)
    if checkpoint is None and not config.plan_only:  # a resumed adapter has its weights
        initialization.initialize_adapter(model, config.init_lora_weights, config.model, train_rows)
    kernels = fuse_linears(model, config.fused_4bit)  # the name of what runs the 4-bit layers
    why_not_packed = choose_attention(model, autocast)  # None if attention can keep packed rows apart
    hidden_states = choose_hidden_states(model)  # computes them for a batch; None: use the model's own logits
    train_batch = partial(forward_backward, model, autocast=autocast, scaler=scaler)
    print(start_screen.describe_model(model, config.model, config.dtype))

    # Optimizer groups, each with its own multiple of the schedule's learning rate: one, or with LoRA+ two.
    trainable = trainable_weights(model)  # (name, float32 parameter) pairs
    groups = lora_groups(trainable, config.weight_decay, config.loraplus_lr_ratio)
    flat = FlatParameters(groups)  # weights become views of one vector per group
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = build_optimizer(config.optim, flat.groups, betas, config.adam_epsilon)

    # Which packs of rows a step takes is a pure function of seed and step. Without packing, a pack is a row.
    pack_length = train_rows.max_length if config.packing and why_not_packed is None else None
    order = StepOrder(
        train_rows.lengths, batch_size * micro_batches, config.seed, config.group_by_length, pack_length,
        train_rows.source_ids, config.dataset_weights,
    )  # fmt: skip
    fingerprint.add(**order.settings())
    shape = order.batch_shape(batch_size, train_rows.max_length if stream else None)  # of micro-batches
    total_steps = config.max_steps if config.max_steps > 0 else order.steps_until(config.num_train_epochs)
    schedule = Schedule(
        config.lr_scheduler_type, config.learning_rate, total_steps, config.warmup_steps, config.warmup_ratio
    )  # fmt: skip
    pad_id = tokenizer.eos_token_id  # padding is masked by position, so any id works
    validation = Validation(
        validation_rows, config.per_device_eval_batch_size, shape.tokens, pad_id, hidden_states, autocast,
    ) if validation_rows else None  # fmt: skip

    # Rehearse the largest step before the first: it compiles the layers and measures the memory they need.
    rehearsal = Rehearsal(
        model, flat, optimizer, train_batch, hidden_states, autocast, shape,
        has_many_micro_batches=accumulation > 1,
        compile=device.type == "cuda" if config.compile is None else config.compile,
        evaluate=validation and partial(validation.run_largest_batch, model),
    )  # fmt: skip
    plan = plan_layers(
        rehearsal, config.gradient_checkpointing, config.offload_activations, config.memory_limit_gb,
        config.cuda_graphs,
    )  # fmt: skip
    print(start_screen.describe_layers(plan, kernels))
    if config.plan_only:
        return model

    # Saves and restores everything that an exact resume needs, always between two steps.
    checkpoints = Checkpoints(
        Path(config.output_dir), config.save_total_limit, model, tokenizer, optimizer, scaler, flat.names,
        config.kept_settings() | fingerprint.settings(train_rows), fingerprint.values, vars(config),
    )  # fmt: skip
    progress = checkpoints.start(checkpoint, total_steps, fingerprint.of_rows(validation_rows))
    loader = make_loader(train_rows, order, shape, pad_id, total_steps, stream, progress.place)
    print(start_screen.describe_steps(order, total_steps, batch_size, config.packing, why_not_packed, stream))
    print(start_screen.describe_output(checkpoints, checkpoint, config.resume_from_checkpoint))
    log = RunLog(checkpoints.output_dir, total_steps, progress.step, plan.graph_bytes)
    log.track(config.report_to, config.run_name, vars(config), is_resumed=checkpoint is not None)
    keep_best, first_step = config.load_best_model_at_end, progress.step
    evaluate_now = partial(evaluate, model, validation, samples, log, progress, keep_best, stop)
    with frozen_heap(), log, stop, Rescue(checkpoints, model, optimizer, log.say, stop):
        if progress.owes_evaluation:  # the run was stopped in the evaluation after this step
            log.begin(repeats_evaluation=True)
            if (evaluate_now() or progress.owes_evaluation) and not checkpoints.is_saved(first_step):
                checkpoints.save(log.say)
            if progress.owes_evaluation:  # stopped in it again
                stop.exit(checkpoints, log.say)
        for step in range(first_step, total_steps):
            started = time.perf_counter()
            learning_rate = schedule.lr_at(step)  # a pure function: a resume has nothing to restore
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_multiple"]

            # The loss is a mean over all targets of the step, so their number must be known before the first
            # backward pass. A mean of the micro-batches' means would overweight the targets of short rows.
            step_data = loader.take(step, stop.is_due)  # all micro-batches, their targets and tokens counted
            seconds_waited = time.perf_counter() - started
            loss = torch.zeros((), device=device)  # summed there, so that the host need not wait
            for number, batch in step_data.micro_batches.items():  # numbered over all ranks
                determinism.seed_random_numbers(config.seed, step, number)  # dropout: a resume draws the same
                loss += train_batch(to_device(batch, device), step_data.targets, plan.hidden_states)
            loader.prepare(step + 1)  # in a thread, while the device works

            if step == first_step:
                flat.check_gradients(trainable)  # a weight without a gradient would silently never change
            flat.gather_gradients()
            exchange_seconds = ranks.sum_(flat.gradient, loss)  # over all GPUs, in one message each
            scaler.unscale_(optimizer)  # before clipping, which must see the true gradients
            norm = flat.clip_grad_norm_(config.max_grad_norm or math.inf)
            step_loss, grad_norm = torch.stack([loss, norm]).tolist()  # waits for the device
            # Neither a bad row nor an overflow may reach the weights or the optimizer's averages.
            is_finite = math.isfinite(step_loss) and math.isfinite(grad_norm)
            if is_finite:
                scaler.step(optimizer)
            scaler.update()  # after an overflow, to a smaller scale
            optimizer.zero_grad(set_to_none=True)

            seconds = time.perf_counter() - started
            if step == first_step:  # this run works, so an earlier one may be deleted
                checkpoints.replace_earlier_run()
                log.describe(vars(config), report)
            if spike := progress.record(
                step_loss if is_finite else None, tokens=step_data.tokens, epochs=step_data.epochs,
                place=step_data.place, seconds=seconds, seconds_waited=seconds_waited,
                seconds_exchanged=exchange_seconds(),
            ):  # fmt: skip
                log.say(spike)
            checkpoints.mark_boundary()  # should the next step fail, all up to here can still be saved
            progress.check_skips(config.max_skipped_steps, step_loss, grad_norm, scaler)
            # Between two steps: log, evaluate, save, stop.
            log.step_done()
            stop.step_done()
            is_last = progress.step == total_steps
            if progress.step % config.logging_steps == 0 or is_last:
                rates = {"learning_rate": learning_rate, "grad_norm": grad_norm}
                log.train(**progress.position(), **rates, **progress.close_window())
            is_due = validation is not None and (progress.step % config.eval_steps == 0 or is_last)
            is_best = is_due and evaluate_now()
            is_stopping = stop.is_due()
            if progress.step % config.save_steps == 0 or is_last or is_best or is_stopping:
                checkpoints.save(log.say)
            if is_stopping and (not is_last or progress.owes_evaluation):
                stop.exit(checkpoints, log.say)
    if ranks.is_first():
        finish(config, checkpoints, plan, log)
    return model


def finish(config: TrainConfig, checkpoints: Checkpoints, plan, log: RunLog) -> None:
    """Save the adapter, the best one if asked for, with its model card; say how to use it; upload it."""
    if config.load_best_model_at_end:
        checkpoints.load_best(log.say)
    card = hub.model_card(
        config.repository, config.model, config.dataset, config.card_flags(), log.lines(), is_merged=False
    )
    checkpoints.save_final_adapter(card)
    log.say(start_screen.describe_result(plan, config.model, config.output_dir, config.trust_remote_code))
    if config.push_to_hub:
        log.say(f"uploaded to {hub.push(checkpoints.output_dir, config.repository, config.hub_private_repo)}")


def main(argv: list[str] | None = None) -> None:
    """The command line. Exit codes: 1 on error, 2 for wrong flags, 143, 130, 129 or 124 if stopped."""
    with command("train.py"):
        config = parse_args(TrainConfig, argv)
        if config.data_report:
            raise SystemExit(print_data_report(
                config.data_report, Path(config.output_dir), partial(load_data, config),
                config.per_device_train_batch_size, config.gradient_accumulation_steps, config.seed,
            ))  # fmt: skip
        train(config)


if __name__ == "__main__":
    main()
