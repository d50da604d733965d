"""What an adapter has changed: python -m qlora.evaluate --model BASE --adapter outputs --dataset rows.jsonl

Loss and perplexity of base and base + adapter, in one load; what was forgotten; answers and their scores. Or,
with --quantization MODEL, what 4 bits do to each layer. Flags: EvaluateConfig in qlora/config.py.
"""

import json
import math
import signal
import sys
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from qlora.commands import compute_of, load_base_of, parse_for_adapter
from qlora.config import EvaluateConfig
from qlora.data.formats import DropRow, row_segments
from qlora.data.prepare import choose_max_length, cut_rows, tokenize_source
from qlora.data.sources import RowSource, read_rows
from qlora.data.tokenize import SAMPLE_ROWS, TokenizedRows, checked_format, hold_out
from qlora.errors import InputError
from qlora.evaluation.quantization import describe_quantization, quantization_report
from qlora.evaluation.scores import calc_codebleu, score
from qlora.evaluation.validation import eval_batches, evaluate_loss
from qlora.model.adapter import load_adapter
from qlora.model.base import load_config, load_tokenizer
from qlora.model.generation import PromptWriter, generate, read_prompts, room_for_prompt
from qlora.model.loss import has_plain_head
from qlora.run.files import check_output_file, make_folder, replace_file
from qlora.run.screen import side_by_side, table

PROGRAM = "qlora.evaluate"


def main(argv: list[str] | None = None) -> None:
    try:
        config = parse_for_adapter(EvaluateConfig, argv, PROGRAM)
        output_file = where_to_write(config)
        if config.quantization:
            device, _ = compute_of(config)
            report = quantization_report(config.quantization, device, config.trust_remote_code)
            shown = describe_quantization(report)
        else:
            report = evaluate(config)
            shown = describe(report)
            if config.samples:
                shown += "\n" + side_by_side(report["answers"][: config.samples])
        save(report, output_file)
        print(f"{shown}\nall of it in {output_file}")
    except InputError as error:
        sys.exit(f"{PROGRAM}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def where_to_write(config: EvaluateConfig) -> Path:
    """The output file; raises InputError if it cannot be written."""
    name = "quantization.json" if config.quantization else "evaluation.json"
    is_local = config.adapter and Path(config.adapter).is_dir()
    output_file = Path(config.output_file or Path(config.adapter if is_local else "") / name)
    check_output_file(output_file)
    make_folder(output_file.parent, f"--output_file {output_file}")  # where it will be replaced as a whole
    return output_file


def save(report: dict, output_file: Path) -> None:
    try:
        replace_file(output_file, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"--output_file {output_file} cannot be written: {error.strerror}") from error


def evaluate(config: EvaluateConfig) -> dict:
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
    tasks = read_tasks(config, tokenizer, model_config) if config.prompts_file else []
    if config.code:
        calc_codebleu()  # is it there?

    _, autocast = compute_of(config)
    model = load_base_of(config)
    report = {"model": config.model, "adapter": config.adapter}
    answers = [{"prompt": prompt, "reference": reference} for prompt, _, reference in tasks]
    for name in ("base", "tuned") if config.adapter else ("base",):
        if name == "tuned":
            model = load_adapter(model, config.adapter, is_trainable=False)
        report[name] = {}
        for what, some_rows in rows.items():
            loss = mean_loss(model, some_rows, tokenizer, config.per_device_eval_batch_size, autocast, name)
            finite = loss if math.isfinite(loss) else None  # JSON knows no others
            perplexity = math.exp(loss) if loss < 700 else None
            report[name] |= {what: finite, what.replace("loss", "perplexity"): perplexity}
        if tasks:
            texts = answers_of(model, tokenizer, tasks, config, autocast, name)
            report[name] |= score(texts, [reference for _, _, reference in tasks], config.code)
            for answer, text in zip(answers, texts):
                answer[name] = text
    return report | {"answers": answers}


def dataset_rows(config: EvaluateConfig, tokenizer, model_config) -> TokenizedRows:
    """The rows of --dataset, or those of them that the training held out."""
    source = RowSource(config.dataset, config.split, config.dataset_config)
    rows = tokenize_source(
        tokenizer, config.dataset_format, source, text_field=config.dataset_text_field,
        completion_only_loss=config.completion_only_loss,
    )  # fmt: skip
    rows = _cut(rows, config, model_config)
    return hold_out(rows, config.held_out, config.validation_seed)[1] if config.held_out else rows


def general_rows(config: EvaluateConfig, tokenizer, model_config) -> TokenizedRows:
    """The rows of --general_dataset, as plain text."""
    source = RowSource(config.general_dataset, config.general_split, config.general_dataset_config)
    field = config.general_text_field
    rows = tokenize_source(tokenizer, "text", source, text_field=field, completion_only_loss=False)
    return _cut(rows, config, model_config)


def _cut(rows: TokenizedRows, config: EvaluateConfig, model_config) -> TokenizedRows:
    max_length = choose_max_length(config.max_length, rows.whole_lengths, model_config)
    return cut_rows(rows, max_length, model_config.vocab_size)


def read_tasks(config: EvaluateConfig, tokenizer, model_config) -> list[tuple[str, list[int], str]]:
    """(prompt, its ids, reference answer) of each row of --prompts_file."""
    row_format, text_field = config.dataset_format, config.dataset_text_field
    if row_format == "auto":
        sample = [row for _, row in islice(read_rows(config.prompts_file, config.prompts_split), SAMPLE_ROWS)]
        row_format = checked_format(sample, row_format, text_field, config.prompts_file)
    if row_format == "text":
        raise InputError(f"--prompts_file {config.prompts_file}: rows of plain text have no reference answer")
    room = room_for_prompt(model_config, config.max_new_tokens, "max_new_tokens")
    writer = PromptWriter(tokenizer, row_format, text_field, max_tokens=room)
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
    with tqdm(total=len(tasks), desc=f"{name}: answers", unit="prompt") as bar:
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
        form = ".4f" if "loss" in what or "perplexity" in what else ".1%"
        values = [report[name][what] for name in columns]
        rows.append([what, *("none" if value is None else f"{value:{form}}" for value in values)])
    return table(rows)


if __name__ == "__main__":
    main()
