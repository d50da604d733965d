"""Fine-tune a causal language model with QLoRA: python train.py --model meta-llama/Llama-2-7b-hf

The whole run in the order it happens: train() sets up, then loops. Flags: qlora/config.py.
"""

import dataclasses
import gc
import math
import os
import shlex
import signal
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
import transformers
from torch.nn.utils import clip_grad_norm_

from qlora.config import TrainConfig, parse_args
from qlora.data.batch import to_device
from qlora.data.loader import make_loader, make_order
from qlora.data.prepare import STREAM_WINDOW, load_data
from qlora.data.report import data_report, report_data, short_report
from qlora.errors import InputError, first_line
from qlora.evaluation.samples import read_samples
from qlora.evaluation.validation import eval_batches, evaluate_loss
from qlora.model.adapter import (
    ADAPTER,
    add_adapter,
    check_base,
    kept_settings,
    load_adapter,
    lora_settings,
    save_final_adapter,
)
from qlora.model.base import base_memory_bytes, check_gradients, load_base, quantized_share, trainable_weights
from qlora.model.generation import PromptWriter, room_for_prompt
from qlora.model.loss import has_plain_head, next_token_loss
from qlora.optim.optimizer import FlatParameters, build_optimizer, lr_at
from qlora.run.checkpoint import (
    checkpoint_bytes,
    find_checkpoint,
    later_checkpoints,
    list_checkpoints,
    load_checkpoint,
    load_state,
    load_weights,
    replace_later,
    save_checkpoint,
)
from qlora.run.files import check_space, damage, lock_folder, make_folder, remove_leftovers
from qlora.run.fingerprint import base_fingerprint, refuse_changes, rows_fingerprint, tokenizer_fingerprint
from qlora.run.hub import check_hub, model_card, push
from qlora.run.log import RunLog
from qlora.run.progress import Progress
from qlora.run.screen import start_screen
from qlora.run.stop import Rescue, Stop
from qlora.run.tracker import Wandb
from qlora.speed.attention import choose_attention
from qlora.speed.layers import decoder_layers
from qlora.speed.nf4 import fuse_linears
from qlora.speed.plan import GB, Plan, Rehearsal, plan_layers


def train(config: TrainConfig):
    """Run a training; returns the model.

    Raises InputError for what the user can put right, SystemExit after a checkpoint if it is asked to stop.
    """
    stop = Stop(config.max_hours and time.monotonic() + 3600 * config.max_hours)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device_flags(config, device)
    if config.push_to_hub:
        config = dataclasses.replace(config, hub_model_id=check_hub(hub_name(config)))
    if config.plan_only:
        return run(config, device, stop, None)
    output_dir = Path(config.output_dir)
    make_folder(output_dir, f"--output_dir {output_dir}")
    with lock_folder(output_dir):
        remove_leftovers(output_dir)
        checkpoint = find_checkpoint(output_dir, config.resume_from_checkpoint)
        refuse_to_overwrite(output_dir, config, checkpoint)
        return run(config, device, stop, checkpoint)


def run(config: TrainConfig, device: torch.device, stop: Stop, checkpoint: Path | None):
    """Set up, then loop. With --plan_only, what comes before the loop."""
    output_dir = Path(config.output_dir)
    if config.full_determinism:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what was not written
    dtype = getattr(torch, config.dtype)
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)

    # A resume must find all that the training depends on as it was; each part is compared once it is known.
    fingerprint = config.guarded_flags()
    then = load_state(checkpoint)["fingerprint"] if checkpoint else None
    same = partial(refuse_changes, then, fingerprint, config.allow_changes, checkpoint)
    same()

    # Data before the model: a bad row should not cost the minutes that loading takes.
    tokenizer, model_config, train_rows, validation_rows = load_data(config)
    fingerprint |= {"tokenizer": tokenizer_fingerprint(tokenizer), "data": rows_fingerprint(train_rows)}
    same()
    samples = None
    if config.sample_prompts:
        room = room_for_prompt(model_config, config.sample_max_new_tokens, "sample_max_new_tokens")
        writer = PromptWriter(tokenizer, train_rows.row_format, config.dataset_text_field, room)
        samples = read_samples(config.sample_prompts, writer, config.sample_max_new_tokens)
    pad_id = tokenizer.eos_token_id  # padding is told apart by position, never by its id, so any id serves
    batch = config.per_device_train_batch_size, config.gradient_accumulation_steps
    report = data_report(train_rows, validation_rows, *batch, config.seed)
    print(
        start_screen(
            data=f"{' + '.join(config.dataset)}: {'first ' * config.streaming}{train_rows.describe()}",
            validation=validation_rows.describe() if validation_rows else "none",
            **short_report(report),
        )
    )

    base = load_base(
        config.model, dtype, device, config.load_in_4bit, config.bnb_4bit_quant_type,
        config.bnb_4bit_use_double_quant, config.trust_remote_code,
    )  # fmt: skip
    fingerprint["base"] = base_fingerprint(config.model)
    same()
    transformers.set_seed(config.seed)  # before the adapter: its A matrices start at random
    if config.adapter:
        if "base" not in config.allow_changes:
            check_base(config.adapter, fingerprint["base"], "--allow_changes base")
        model = load_adapter(base, config.adapter, is_trainable=True)
    else:
        model = add_adapter(
            base, config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_target_modules,
            config.use_rslora, config.use_dora,
        )  # fmt: skip
    fingerprint |= lora_settings(model)
    same()
    model.train()
    trainable = trainable_weights(model)
    names = [name for name, _ in trainable]
    kernels = fuse_linears(model, config.fused_4bit)
    pack_length = train_rows.max_length if choose_attention(model, autocast) and config.packing else None
    plain_head = has_plain_head(model)
    flat = FlatParameters([parameter for _, parameter in trainable])
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = build_optimizer(config.optim, flat.vector, config.weight_decay, betas, config.adam_epsilon)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    order = make_order(config, pack_length, train_rows)
    fingerprint |= order.settings()
    same()
    longest = train_rows.max_length if config.streaming else int(train_rows.lengths.max())
    shape = order.batch_shape(config.per_device_train_batch_size, longest, config.streaming)
    if validation_rows:
        lengths, most_tokens = validation_rows.lengths, shape.packs * shape.length
        validation_batches = eval_batches(lengths, config.per_device_eval_batch_size, most_tokens)

    # The worst step first, before any that counts: it compiles, and it finds what the card has room for.
    started = time.perf_counter()
    rehearsal = Rehearsal(
        model, decoder_layers(base), flat, optimizer, autocast, plain_head,
        compile=device.type == "cuda" if config.compile is None else config.compile,
        shape=shape,
        accumulates=config.gradient_accumulation_steps > 1,
        evaluates=(len(validation_batches[0]), int(lengths.max())) if validation_rows else None,
    )  # fmt: skip
    plan = plan_layers(
        rehearsal, config.gradient_checkpointing, config.offload_activations, config.memory_limit_gb,
        config.cuda_graphs,
    )  # fmt: skip
    print(describe_step(rehearsal, plan, kernels, time.perf_counter() - started))
    if config.plan_only:
        return model

    progress = load_checkpoint(checkpoint, model, optimizer, scaler, names) if checkpoint else Progress()
    loader, total_steps = make_loader(
        config, tokenizer, model_config, train_rows, order, shape, progress.place
    )
    warmup_steps = config.warmup_steps or min(math.ceil(config.warmup_ratio * total_steps), total_steps - 1)
    first_step = progress.step
    replaced = later_checkpoints(output_dir, first_step)
    if first_step > total_steps or (first_step == total_steps and replaced):
        raise InputError(f"{checkpoint} is at step {first_step}, and this run has only {total_steps} steps")
    if first_step < total_steps:
        check_room(output_dir, optimizer)
    progress.owes_evaluation = progress.owes_evaluation and validation_rows is not None
    validation = rows_fingerprint(validation_rows) if validation_rows else None
    if progress.validation != validation or not (output_dir / f"checkpoint-{progress.best_step}").exists():
        progress.best_loss = progress.best_step = None  # of other rows, or of a run in another folder
    progress.validation, kept_best = validation, (progress.best_loss, progress.best_step)

    settings = kept_settings(config, train_rows.row_format, train_rows.max_length, fingerprint["base"])
    print(describe_run(config, model, loader, total_steps, checkpoint, replaced))
    tracker = None
    if config.report_to == "wandb":
        run_name = config.run_name or output_dir.name
        tracker = Wandb(output_dir, run_name, dataclasses.asdict(config), is_resumed=checkpoint is not None)
    log = RunLog(output_dir, total_steps, first_step, tracker, plan.graph_bytes)

    def position() -> dict:
        return {"step": progress.step, "epoch": round(progress.epochs, 4)}

    def ask_samples() -> list[dict] | None:
        """What base and adapter answer; None if that fails, which does not end the run."""
        try:
            return samples.ask(model, autocast, stop)
        except Exception as error:  # most likely there is no memory left for it
            log.say(f"step {progress.step}: no samples ({first_line(error)})")
            return None

    def evaluate() -> bool:
        """Log the validation loss; returns whether it is to be kept as the best so far. Ends early if the run
        has to."""
        progress.owes_evaluation = True
        arguments = validation_rows, validation_batches, pad_id, autocast, plain_head, stop
        eval_loss = evaluate_loss(model, *arguments)
        if eval_loss is None:
            return False
        progress.owes_evaluation = False
        log.evaluation(eval_loss, ask_samples() if samples else None, **position())
        return config.load_best_model_at_end and progress.is_best(eval_loss)

    def save() -> bool:
        """Save a checkpoint; returns whether that went well. What stands in its way does not end the run."""
        nonlocal kept_best
        try:
            save_checkpoint(
                output_dir, model, tokenizer, settings, optimizer, scaler, names, progress, fingerprint,
                config=dataclasses.asdict(config), keep=config.save_total_limit,
            )  # fmt: skip
            kept_best = progress.best_loss, progress.best_step
            return True
        except Exception as error:  # each of the libraries that write has its own
            progress.best_loss, progress.best_step = kept_best  # the one that is on the disk
            log.say(f"step {progress.step}: no checkpoint could be saved ({first_line(error)})")
            return False

    gc.collect()
    gc.freeze()  # all there is now lives as long as the run: the collector need not stop a step to look at it
    is_saved, steps = True, range(first_step, total_steps)
    rescue = Rescue(output_dir, model, optimizer, progress, save)
    with closing(log), stop, rescue:
        if progress.owes_evaluation:
            log.begin(evaluates_again=True)
            if evaluate() and damage(output_dir / f"checkpoint-{first_step}"):
                save()
            if progress.owes_evaluation:  # left early again: nothing else comes before it
                steps = range(0)
        for step in steps:
            rescue.step_begins()
            started = time.perf_counter()
            learning_rate = lr_at(
                step, total_steps, warmup_steps, config.learning_rate, config.lr_scheduler_type
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            # All micro-batches first: the loss is a mean over every target of the step, so their number must
            # be known before the first backward. A mean of micro-batch means would weigh short answers too
            # heavily.
            data = loader.take(step)
            waited = time.perf_counter() - started
            targets = sum(len(batch["target_ids"]) for batch in data.batches)
            step_loss = torch.zeros((), device=device)
            for batch in data.batches:
                with autocast():
                    batch = to_device(batch, device)
                    loss = next_token_loss(model, batch, plain_head, rehearsal.decode) / targets
                scaler.scale(loss).backward()  # scaled: small float16 gradients would underflow to 0
                step_loss += loss.detach()  # stays on the device: .item() here would wait for it
            loader.prepare(step + 1)  # in a thread, now that the device has enough to do

            if step == first_step:
                check_gradients(trainable)
            flat.gather_gradients()
            scaler.unscale_(optimizer)  # before clipping, which must see the true gradients
            grad_norm = clip_grad_norm_(flat.vector, config.max_grad_norm or math.inf)
            step_loss, grad_norm = torch.stack([step_loss, grad_norm]).tolist()  # waits for the device
            if step == first_step:
                replace_later(output_dir, first_step)  # only now: nothing given can be wrong any more
                log.begin()
                log.describe(dataclasses.asdict(config), report)
            # One bad row or an overflow must not reach the weights, nor the optimizer's averages.
            is_finite = math.isfinite(step_loss) and math.isfinite(grad_norm)
            if is_finite:
                scaler.step(optimizer)
            scaler.update()  # after an overflow the weights are as they were, the next scale smaller
            optimizer.zero_grad(set_to_none=True)

            progress.place, progress.epochs = data.place, data.epochs
            seconds = time.perf_counter() - started
            usual = progress.usual_loss
            if progress.record(step_loss if is_finite else None, data.tokens, seconds, waited):
                log.say(f"step {progress.step}: a loss of {step_loss:.4f} stands out, {usual:.4f} is usual")
            rescue.step_ends()
            if progress.skipped_in_a_row >= config.max_skipped_steps:
                raise InputError(why_all_is_skipped(progress, step_loss, grad_norm, scaler))
            is_last = progress.step == total_steps
            log.step_done()
            if progress.step % config.logging_steps == 0 or is_last:
                rates = {"learning_rate": learning_rate, "grad_norm": grad_norm}
                log.train(**position(), **rates, **progress.close_window())
            is_best = False
            if validation_rows and (progress.step % config.eval_steps == 0 or is_last):
                is_best = evaluate()
            is_stopping = bool(stop)
            if progress.step % config.save_steps == 0 or is_last or is_best or is_stopping:
                is_saved = save()
            if is_stopping:
                break
    gc.unfreeze()
    if progress.step < total_steps or progress.owes_evaluation:
        saved = (
            f"checkpoint-{progress.step} has all of it" if is_saved else "NOT saved since its last checkpoint"
        )
        log.say(
            f"stopped by {stop.reason} after step {progress.step}, {saved}; --resume_from_checkpoint latest"
        )
        sys.exit(stop.exit_code)
    if config.load_best_model_at_end and progress.best_step not in (None, progress.step):
        take_best(output_dir, model, progress)
    try:
        card = model_card(hub_name(config), config.model, output_dir, is_merged=False)
        save_final_adapter(output_dir, model, tokenizer, settings, card)
    except Exception as error:
        raise InputError(
            f"the adapter could not be saved in {output_dir} ({first_line(error)}): put that right, and "
            "--resume_from_checkpoint latest saves it from the last checkpoint"
        ) from error
    if plan.peak_bytes:
        peak = torch.cuda.max_memory_allocated() + plan.graph_bytes
        log.say(f"peak memory {peak / GB:.2f} GB, rehearsed {plan.peak_bytes / GB:.2f} GB")
    ask = ["generate.py", "--model", config.model, "--adapter", config.output_dir]
    ask += ["--trust_remote_code"] * config.trust_remote_code
    log.say(f'adapter saved in {output_dir}; ask it: python {shlex.join(ask)} --prompt "..."')
    if config.push_to_hub:
        log.say(f"uploaded to {push(output_dir, hub_name(config), config.hub_private_repo)}")
    return model


def check_device_flags(config: TrainConfig, device: torch.device) -> None:
    """Refuse, without a card, what only means something on one."""
    if device.type == "cpu":
        given = {"plan_only": config.plan_only, "memory_limit_gb": config.memory_limit_gb is not None}
        given["offload_activations on"] = config.offload_activations == "on"
        given["cuda_graphs"] = config.cuda_graphs
        for name in (name for name, is_given in given.items() if is_given):
            raise InputError(f"--{name} needs a CUDA device, and there is none here")


def hub_name(config: TrainConfig) -> str:
    """The repository that the adapter goes to, if it goes anywhere."""
    return config.hub_model_id or Path(config.output_dir).resolve().name


def refuse_to_overwrite(output_dir: Path, config: TrainConfig, checkpoint: Path | None) -> None:
    """Refuse a folder that holds a run this one would overwrite unasked."""
    earlier = [*list_checkpoints(output_dir), *output_dir.glob(ADAPTER), *output_dir.glob("metrics.jsonl")]
    home, resume_from = output_dir.resolve(), config.resume_from_checkpoint
    goes_on = resume_from == "latest" or (checkpoint and checkpoint.resolve().parent == home)
    if earlier and not config.overwrite_output_dir and not goes_on:
        raise InputError(
            f"--output_dir {output_dir} holds an earlier run ({earlier[0].name}): go on with it by "
            "--resume_from_checkpoint latest, replace it by --overwrite_output_dir, or give another folder"
        )
    if config.overwrite_output_dir and config.adapter and Path(config.adapter).resolve().is_relative_to(home):
        raise InputError(f"--overwrite_output_dir would delete what --adapter {config.adapter} starts from")


def check_room(output_dir: Path, optimizer) -> None:
    """Refuse a disk that has no room for one checkpoint."""
    try:
        check_space(output_dir, checkpoint_bytes(optimizer))
    except OSError as error:
        raise InputError(
            f"--output_dir {output_dir} has no room for a checkpoint: {error.strerror}"
        ) from error


def why_all_is_skipped(progress: Progress, loss: float, grad_norm: float, scaler) -> str:
    """What to say when step after step is not finite."""
    count, step = progress.skipped_in_a_row, progress.step
    scale = f", loss scale {scaler.get_scale():g}" if scaler.is_enabled() else ""
    advice = "--dtype bfloat16 --allow_changes dtype, " if scaler.is_enabled() else ""
    return (
        f"{count} steps in a row were not finite (step {step}: loss {loss}, gradient {grad_norm}{scale}); "
        f"the last that was taken is step {step - count}, no weight has changed since. Try {advice}a lower "
        "--learning_rate with --allow_changes learning_rate, or look at the rows by --data_report"
    )


def take_best(output_dir: Path, model, progress: Progress) -> None:
    """Put the weights of the best evaluation's checkpoint into the model."""
    best = output_dir / f"checkpoint-{progress.best_step}"
    if problem := damage(best):
        print(f"{best} was the best, but {problem}: the adapter stays that of the last step")
        return
    load_weights(best, model)
    print(f"the adapter is that of step {progress.best_step}, the best: eval_loss {progress.best_loss:.4f}")


def describe_step(rehearsal: Rehearsal, plan: Plan, kernels: str, seconds: float) -> str:
    """The start screen's lines on speed and memory."""
    compiled = "compiled" if rehearsal.compile else "not compiled"
    graphed = ", replayed as CUDA graphs" if plan.graph_bytes else ""
    facts = {"layers": f"{plan.describe()}; {compiled}{graphed}{kernels and f'; 4-bit weights by {kernels}'}"}
    if plan.peak_bytes:
        facts["memory"] = (
            f"{plan.peak_bytes / GB:.2f} GB at the peak of a step, {plan.limit_bytes / GB:.2f} GB are there "
            f"(rehearsed in {seconds:.1f} s)"
        )
    return start_screen(**facts)


def describe_run(config, model, loader, total_steps, checkpoint, replaced) -> str:
    """The start screen."""
    trained, total = model.get_nb_trainable_parameters()
    quantization = model.get_base_model().config.to_dict().get("quantization_config")
    weights = config.dtype
    if quantization:  # only linear layers are: the experts of some models are not, and stay 16-bit
        kind = quantization["bnb_4bit_quant_type"]
        weights = f"{quantized_share(model):.1%} of them {kind}, the others {weights}"
    base_gb = base_memory_bytes(model) / GB
    on_cuda = model.device.type == "cuda"
    slow = " (float16 is slow there: --dtype float32 or bfloat16)" if config.dtype == "float16" else ""
    order = loader.order
    batch = f"{config.gradient_accumulation_steps} x {config.per_device_train_batch_size} "
    batch += f"packs of {order.pack_length} tokens" if order.pack_length else "rows"
    if config.packing and not order.pack_length:
        batch += " (not packed: this model's attention cannot keep rows apart)"
    epochs = f"{order.epochs_at(total_steps):.2f} epochs of {order.steps_in(0):,} steps"
    if config.streaming:
        epochs = f"streamed in windows of {STREAM_WINDOW:,} rows"
    start = f", going on from {checkpoint.name}" if checkpoint else ""
    if config.resume_from_checkpoint and not checkpoint:
        start = ", no checkpoint there yet: from the start"
    if replaced:
        start += f", in place of {', '.join(path.name for path in replaced)}"
    return start_screen(
        model=f"{config.model}: {total - trained:,} parameters, {base_gb:.3g} GB, {weights}",
        adapter=f"{trained:,} trainable parameters ({trained / total:.3%}), float32",
        compute=config.dtype + " on " + (torch.cuda.get_device_name() if on_cuda else f"the CPU{slow}"),
        steps=f"{total_steps:,} of {batch}, {epochs}, the last step of each with what is left",
        output=config.output_dir + start,
    )


def main(argv: list[str] | None = None) -> None:
    """The command line; exit codes: 1 for what the message says, 143, 130 or 124 if asked to stop."""
    try:
        config = parse_args(TrainConfig, argv)
        if config.data_report:
            sys.exit(report_data(config))
        train(config)
    except InputError as error:
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt:  # before there is anything to save
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
