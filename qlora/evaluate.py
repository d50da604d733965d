"""What an adapter has changed: python -m qlora.evaluate --model BASE --adapter outputs --dataset rows.jsonl

Loss and perplexity of base and base + adapter, in one load; what was forgotten; answers and their scores. Or,
with --quantization MODEL, what 4 bits do to each layer. Flags: EvaluateConfig in qlora/config.py.
"""

import math
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from qlora.adapter import check_base, load_adapter, parse_for_adapter
from qlora.config import EvaluateConfig
from qlora.data import choose_max_length, cut_rows, tokenize_source
from qlora.errors import InputError
from qlora.fingerprint import base_fingerprint
from qlora.generation import PromptWriter, generate, read_prompts
from qlora.log import side_by_side
from qlora.loss import has_plain_head
from qlora.model import load_base, load_config, load_tokenizer
from qlora.prompts import DropRow, row_segments
from qlora.quantization import describe_quantization, quantization_report, save_json, table
from qlora.rows import RowSource, read_rows
from qlora.samples import without
from qlora.scores import calc_codebleu, score
from qlora.tokens import SAMPLE_ROWS, TokenizedRows, checked_format, hold_out
from qlora.validation import eval_batches, evaluate_loss

PROGRAM = "qlora.evaluate"


def main(argv: list[str] | None = None) -> None:
    try:
        config = parse_for_adapter(EvaluateConfig, argv, PROGRAM)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder = Path(config.adapter) if config.adapter and Path(config.adapter).is_dir() else Path()
        output_file = Path(config.output_file or folder / "evaluation.json")
        if output_file.is_dir() or not output_file.parent.is_dir():
            raise InputError(f"--output_file {output_file} must be a file in a folder that is there")
        if config.quantization:
            report = quantization_report(config.quantization, device, config.trust_remote_code)
            print(describe_quantization(report))
        else:
            report = evaluate(config, device)
            print(describe(report))
            if config.samples:
                print(side_by_side(report["answers"][: config.samples]))
        save_json(report, output_file)
        print(f"all of it in {output_file}")
    except InputError as error:
        sys.exit(f"{PROGRAM}: error: {error}")


def evaluate(config: EvaluateConfig, device: torch.device) -> dict:
    """Everything that was asked for, as values that JSON knows: {"base": {name: value}, "tuned": ...,
    "answers": [...]}. Raises InputError."""
    # Rows and prompts before the model: a bad row should not cost the minutes that loading takes.
    tokenizer = load_tokenizer(config.model, config.adapter, config.trust_remote_code)
    model_config = load_config(config.model, config.trust_remote_code).get_text_config()
    rows = {}
    if config.dataset:
        rows["loss"] = dataset_rows(config, tokenizer, model_config)
    if config.general_dataset:
        rows["general_loss"] = general_rows(config, tokenizer, model_config)
    prompts = read_tasks(config, tokenizer, model_config) if config.prompts_file else []
    if config.code:
        calc_codebleu()  # is it there?

    dtype = getattr(torch, config.dtype)
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    model = load_base(
        config.model, dtype, device, config.load_in_4bit, config.bnb_4bit_quant_type,
        config.bnb_4bit_use_double_quant, config.trust_remote_code,
    )  # fmt: skip
    if config.adapter:
        if not config.allow_other_base:
            check_base(config.adapter, base_fingerprint(config.model), "--allow_other_base")
        model = load_adapter(model, config.adapter, is_trainable=False)

    def measure(name: str) -> tuple[dict, list[str]]:
        losses = {}
        for what, some_rows in rows.items():
            loss = mean_loss(model, some_rows, tokenizer, config.per_device_eval_batch_size, autocast, name)
            losses[what] = loss
            losses[what.replace("loss", "perplexity")] = math.exp(min(loss, 700))
        return losses, answers_of(model, tokenizer, prompts, config, autocast, name)

    with without(model):
        base, base_answers = measure("base")
    measured = {"base": (base, base_answers)}
    if config.adapter:
        measured["tuned"] = measure("tuned")
    report = {"model": config.model, "adapter": config.adapter}
    for name, (values, answers) in measured.items():
        scores = score(answers, [reference for _, _, reference in prompts], config.code) if prompts else {}
        report[name] = values | scores
    report["answers"] = [
        {"prompt": prompt, "reference": reference}
        | {name: answers[number] for name, (_, answers) in measured.items()}
        for number, (prompt, _, reference) in enumerate(prompts)
    ]
    return report


def dataset_rows(config: EvaluateConfig, tokenizer, model_config) -> TokenizedRows:
    """The rows of --dataset, or those of them that the training held out."""
    source = RowSource(config.dataset, config.split, config.dataset_config)
    rows = tokenize_source(
        tokenizer, config.dataset_format, source, text_field=config.dataset_text_field,
        completion_only_loss=config.completion_only_loss,
    )  # fmt: skip
    max_length = choose_max_length(config.max_length, rows.whole_lengths, model_config)
    rows = cut_rows(rows, max_length, model_config.vocab_size)
    return hold_out(rows, config.held_out, config.seed)[1] if config.held_out else rows


def general_rows(config: EvaluateConfig, tokenizer, model_config) -> TokenizedRows:
    """The rows of --general_dataset, as plain text."""
    source = RowSource(config.general_dataset, config.general_split, config.general_dataset_config)
    rows = tokenize_source(
        tokenizer, "text", source, text_field=config.dataset_text_field, completion_only_loss=False
    )
    length = choose_max_length(config.max_length, rows.whole_lengths, model_config)
    return cut_rows(rows, length, model_config.vocab_size)


def read_tasks(config: EvaluateConfig, tokenizer, model_config) -> list[tuple[str, list[int], str]]:
    """(prompt, its ids, reference answer) of each row of --prompts_file."""
    context = getattr(model_config, "max_position_embeddings", math.inf)
    row_format, text_field = config.dataset_format, config.dataset_text_field
    if row_format == "auto":
        sample = [row for _, row in islice(read_rows(config.prompts_file, config.prompts_split), SAMPLE_ROWS)]
        row_format = checked_format(sample, row_format, text_field, config.prompts_file)
    writer = PromptWriter(tokenizer, row_format, text_field, max_tokens=context - config.max_new_tokens)
    tasks = []
    for where, row, ids in read_prompts(config.prompts_file, writer, config.prompts_split):
        try:
            reference, _ = row_segments(row, row_format, text_field, tokenizer)[-1]
        except DropRow as reason:
            raise InputError(f"{where} has no reference answer: {reason}") from reason
        reference = reference.replace(tokenizer.eos_token, "").strip()
        tasks.append((tokenizer.decode(ids, skip_special_tokens=True), ids, reference))
    if not tasks:
        raise InputError(f"--prompts_file {config.prompts_file} has no rows")
    return tasks


def mean_loss(model, rows: TokenizedRows, tokenizer, batch_size: int, autocast, name: str) -> float:
    """Mean cross-entropy over all targets of the rows."""
    most_tokens = batch_size * int(rows.lengths.max())
    batches = eval_batches(rows.lengths, batch_size, most_tokens)
    bar = tqdm(batches, desc=f"{name}: loss", unit="batch")
    return evaluate_loss(model, rows, bar, tokenizer.eos_token_id, autocast, has_plain_head(model))


def answers_of(model, tokenizer, tasks: list, config: EvaluateConfig, autocast, name: str) -> list[str]:
    """The likeliest answer to each task."""
    answers = []
    with tqdm(total=len(tasks), desc=f"{name}: answers", unit="prompt", disable=not tasks) as bar:
        for start in range(0, len(tasks), config.batch_size):
            batch = [ids for _, ids, _ in tasks[start : start + config.batch_size]]
            options = {"max_new_tokens": config.max_new_tokens, "do_sample": False}
            answers += [text.strip() for text in generate(model, tokenizer, batch, autocast, **options)]
            bar.update(len(batch))
    return answers


def describe(report: dict) -> str:
    """The values of base and tuned model as a table."""
    columns = [name for name in ("base", "tuned") if name in report]
    rows = [["", *columns]]
    for what in report["base"]:
        is_share = "loss" not in what and "perplexity" not in what
        rows.append([what, *(f"{report[name][what]:{'.1%' if is_share else '.4f'}}" for name in columns)])
    return table(rows)


if __name__ == "__main__":
    main()
