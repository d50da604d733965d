"""Evaluate an adapter: python -m qlora.evaluate --model BASE --adapter outputs --dataset rows.jsonl

Compares the base with and without the adapter, loading it once: loss and perplexity, forgetting, answers and
their scores. With --base original also the adapter on the base before quantization. With --quantization MODEL
instead: the error of 4-bit quantization in each layer. Flags: EvaluateConfig in qlora/config.py.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from qlora.commands import check_has_original, choose_device, free_memory, load_base_for, parse_for_adapter
from qlora.config import EvaluateConfig
from qlora.data.formats import ends_in_answer, row_segments, starts_with_bos
from qlora.data.formatting import Formatting
from qlora.data.prepare import choose_max_length, cut_rows, tokenize_source
from qlora.data.segments import IGNORE_INDEX, DropRow, encode
from qlora.data.sources import RowSource, read_rows
from qlora.data.tokenize import SAMPLE_ROWS, checked_format
from qlora.data.tokenized import TokenizedRows, describe_drops, find_held_out, hold_out
from qlora.errors import InputError, first_line
from qlora.evaluation.quantization import describe_quantization, quantization_report
from qlora.evaluation.scores import canonical_json, extract_code, import_codebleu, score
from qlora.evaluation.validation import Validation
from qlora.model.adapter import load_adapter, load_held_out
from qlora.model.base import load_config, load_tokenizer
from qlora.model.forward import choose_hidden_states
from qlora.model.generation import PromptWriter, generate_batches, room_for_prompt
from qlora.run.files import check_output_file, make_folder, replace_file
from qlora.run.metrics import perplexity
from qlora.run.screen import side_by_side, table
from qlora.run.terminal import command
from qlora.speed.memory import is_out_of_memory

PROGRAM = "qlora.evaluate"
# Report keys and their column titles.
COLUMNS = {"base": "base", "tuned": "tuned", "tuned_original_base": "tuned, original base"}


@dataclass(frozen=True)
class Task:
    """A row of --prompts_file."""

    prompt: str
    ids: list[int]
    reference: str


def main(argv: list[str] | None = None) -> None:
    with command(PROGRAM):
        config = parse_for_adapter(EvaluateConfig, argv, PROGRAM)
        output_file = choose_output_file(config)
        if config.quantization:
            device, _ = choose_device(torch.float32)
            report = quantization_report(config.quantization, device, config.trust_remote_code)
            text = describe_quantization(report)
            save(report, output_file)
        else:
            report = evaluate(config, output_file)
            text = describe(report)
            if config.samples:
                text += "\n" + side_by_side(report["answers"][: config.samples], columns_of(report))
        print(f"{text}\nfull results in {output_file}")


def choose_output_file(config: EvaluateConfig) -> Path:
    """The output file; raises InputError if it cannot be written."""
    name = "quantization.json" if config.quantization else "evaluation.json"
    is_local = config.adapter and Path(config.adapter).is_dir()
    output_file = Path(config.output_file or Path(config.adapter if is_local else "") / name)
    check_output_file(output_file)
    make_folder(output_file.parent, f"--output_file {output_file}")  # a temporary file is written there, too
    return output_file


def save(report: dict, output_file: Path) -> None:
    try:
        replace_file(output_file, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"--output_file {output_file} cannot be written: {error.strerror}") from error


def evaluate(config: EvaluateConfig, output_file: Path) -> dict:
    """All results, which are written to `output_file` after each column. Raises InputError.

    {"base": {name: value}, "tuned": ..., "tuned_original_base": ..., "answers": [...],
    "rows": {flag: what became of its rows}}
    """
    # Rows and prompts before the model: an invalid row should not cost the minutes that loading takes.
    tokenizer = load_tokenizer(config.model, config.adapter, config.trust_remote_code, config.chat_template)
    model_config = load_config(config.model, config.trust_remote_code)
    if config.base == "original":
        check_has_original(config.model, model_config)
    model_config = model_config.get_text_config()
    rows, counts, tasks = {}, {}, []
    if config.dataset:
        rows["loss"], counts["dataset"] = dataset_rows(config, tokenizer, model_config)
    if config.general_dataset:
        rows["general_loss"], counts["general_dataset"] = general_rows(config, tokenizer, model_config)
    if config.prompts_file:
        tasks, counts["prompts_file"] = read_tasks(config, tokenizer, model_config)
    if config.code:
        import_codebleu()  # fails here if it is not installed

    answers = [{"prompt": task.prompt, "reference": task.reference} for task in tasks]
    report = {"model": config.model, "adapter": config.adapter, "rows": counts, "answers": answers}

    def add_column(column: str, model) -> None:
        report[column], texts = measure(config, tokenizer, rows, tasks, model, COLUMNS[column])
        for answer, text in zip(answers, texts):
            answer[column] = text
        save(report, output_file)

    try:
        model = load_base_for(config, config.load_in_4bit)
        add_column("base", model)
        if config.adapter:
            model = load_adapter(model, config.adapter, is_trainable=False)
            add_column("tuned", model)
        if config.base == "original":
            del model  # makes room for the next one
            free_memory()
            model = load_adapter(
                load_base_for(config, load_in_4bit=False), config.adapter, is_trainable=False
            )
            add_column("tuned_original_base", model)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = (
            f"out of memory ({first_line(error)}): a smaller --batch_size or --per_device_eval_batch_size "
            "needs less"
        )
        if titles := columns_of(report).values():
            message += f"; {output_file} has what was measured before: {', '.join(titles)}"
        raise InputError(message) from error
    return report


def columns_of(report: dict) -> dict[str, str]:
    """The title of each column that was measured, by its key."""
    return {key: title for key, title in COLUMNS.items() if key in report}


def measure(
    config: EvaluateConfig, tokenizer, rows: dict, tasks: list[Task], model, title: str
) -> tuple[dict[str, float | None], list[str]]:
    """(the losses on `rows` and the scores of the model's answers, its answer to each task)."""
    _, autocast = choose_device(getattr(torch, config.dtype))
    values, texts = {}, []
    for loss_name, some_rows in rows.items():
        pad_id, batch_size = tokenizer.eos_token_id, config.per_device_eval_batch_size
        loss = mean_loss(model, some_rows, batch_size, pad_id, autocast, f"{title}: loss")
        values |= loss_values(loss_name, loss)
    if tasks:
        texts = answer_tasks(
            model, tokenizer, tasks, autocast, config.batch_size, config.max_new_tokens,
            description=f"{title}: answers",
        )  # fmt: skip
        values |= score(texts, [task.reference for task in tasks], config.code, config.json)
    return values, texts


def dataset_rows(config: EvaluateConfig, tokenizer, model_config) -> tuple[TokenizedRows, dict]:
    """The rows of --dataset, or only those that the training held out, and what became of all of them."""
    held_out = trained_without(config) if config.validation_split and config.adapter else None
    source = RowSource(config.dataset, config.split, config.dataset_config)
    rows = tokenize_source(tokenizer, config.formatting(), source)
    read = rows.rows_read
    max_length = choose_max_length(config.max_length, rows.full_lengths, model_config)
    if config.validation_split:
        if held_out is None:  # no adapter to ask: the rule by which train.py would hold rows out
            training, _ = hold_out(rows, config.held_out, config.validation_seed)
            held_out = training.held_out.hashes
        rows = find_held_out(rows, held_out, f"--dataset {config.dataset}")
    rows = cut_rows(rows, max_length, model_config.vocab_size)
    return rows, counts_of(rows, read)


def trained_without(config: EvaluateConfig) -> list[np.ndarray]:
    """The hashes of the rows that the adapter's training held out, of each of its datasets."""
    amount, hashes = load_held_out(config.adapter)
    if config.held_out is not None and not math.isclose(config.held_out, amount):
        raise InputError(
            f"--validation_split {config.validation_split}: the training of {config.adapter} held out "
            f"{amount:g}: give that, or no value"
        )
    return [np.array(part, dtype=np.int64) for part in hashes]


def general_rows(config: EvaluateConfig, tokenizer, model_config) -> tuple[TokenizedRows, dict]:
    """The rows of --general_dataset, as plain text, and what became of them."""
    source = RowSource(config.general_dataset, config.general_split, config.general_dataset_config)
    formatting = Formatting("text", config.general_text_field, completion_only_loss=False)
    rows = tokenize_source(tokenizer, formatting, source)
    max_length = choose_max_length(config.max_length, rows.full_lengths, model_config)
    rows = cut_rows(rows, max_length, model_config.vocab_size)
    return rows, counts_of(rows, rows.rows_read)


def counts_of(rows: TokenizedRows, read: int) -> dict:
    """What became of the `read` rows of a dataset."""
    not_held_out = read - rows.rows_read
    return row_counts(len(rows), rows.dropped, rows.first_dropped, not_held_out, cut=rows.answers_cut)


def row_counts(used: int, dropped: Counter, first_dropped: dict, not_held_out: int = 0, cut: int = 0) -> dict:
    """What became of rows, for JSON: read = used + dropped + not_held_out."""
    return {
        "read": used + dropped.total() + not_held_out,
        "used": used,
        "dropped": dict(dropped),
        "first_dropped": first_dropped,
        "not_held_out": not_held_out,
        "cut": cut,
    }


def read_tasks(config: EvaluateConfig, tokenizer, model_config) -> tuple[list[Task], dict]:
    """The rows of --prompts_file, and what became of them. Raises InputError if no row has an answer.

    With --json, also if a reference is not a JSON object or list.
    """
    formatting = config.formatting()
    if formatting.row_format == "auto":
        sample = [row for _, row in islice(read_rows(config.prompts_file, config.prompts_split), SAMPLE_ROWS)]
        formatting = checked_format(sample, formatting, config.prompts_file)
    if formatting.row_format == "text":
        raise InputError(
            f"--prompts_file {config.prompts_file}: rows of plain text have no reference answers"
        )
    room = room_for_prompt(model_config, config.max_new_tokens, "max_new_tokens")
    writer = PromptWriter(tokenizer, formatting, room, model_config.vocab_size)
    tasks, dropped, first_dropped = [], Counter(), {}
    for where, row in read_rows(config.prompts_file, config.prompts_split):
        try:
            reference = reference_answer(row, formatting, tokenizer)
        except DropRow as reason:
            dropped[str(reason)] += 1
            first_dropped.setdefault(str(reason), where)
            continue
        if config.json and canonical_json(extract_code(reference)) is None:
            raise InputError(
                f"{where}: --json needs a JSON object or list as the reference answer, not "
                f"{reference[:60]!r}: correct the row, or leave --json out"
            )
        ids = writer.row(row, where)
        tasks.append(Task(tokenizer.decode(ids, skip_special_tokens=True), ids, reference))
    if not tasks:
        raise InputError(
            f"--prompts_file {config.prompts_file} has no row with a reference answer: "
            f"{describe_drops(dropped, first_dropped)}"
        )
    return tasks, row_counts(len(tasks), dropped, first_dropped)  # a prompt that is too long is an error


def reference_answer(row: dict, formatting: Formatting, tokenizer) -> str:
    """The answer that a row ends in, decoded from its tokens as the model's answers are. Raises DropRow."""
    if not ends_in_answer(row, formatting, tokenizer):
        raise DropRow("no answer to its last question")
    formatting = replace(formatting, train_on="last", completion_only_loss=True)
    segments, _ = row_segments(row, formatting, tokenizer)
    ids, labels = encode(segments, starts_with_bos(formatting.row_format, tokenizer), tokenizer)
    trained = np.flatnonzero(np.array(labels) != IGNORE_INDEX)
    *_, answer = np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1)  # runs of consecutive tokens
    return tokenizer.decode(ids[answer[0] : answer[-1] + 1], skip_special_tokens=True).strip()


def mean_loss(
    model, rows: TokenizedRows, batch_size: int, pad_id: int, autocast: Callable, description: str
) -> float:
    """Mean cross-entropy over all targets of the rows, in nats."""
    max_tokens = batch_size * int(rows.lengths.max())
    validation = Validation(rows, batch_size, max_tokens, pad_id, choose_hidden_states(model), autocast)
    return validation.loss(model, batches=tqdm(validation.batches, desc=description, unit="batch"))


def loss_values(name: str, loss: float) -> dict[str, float | None]:
    """A loss and its perplexity under their names; None for what is not finite, which JSON cannot hold."""
    finite_loss = loss if math.isfinite(loss) else None
    return {name: finite_loss, name.replace("loss", "perplexity"): perplexity(loss)}


def answer_tasks(
    model, tokenizer, tasks: list[Task], autocast: Callable, batch_size: int, max_new_tokens: int,
    description: str,
) -> list[str]:  # fmt: skip
    """The greedy answer to each task."""
    batches = generate_batches(
        model, tokenizer, [task.ids for task in tasks], batch_size, autocast, description=description,
        max_new_tokens=max_new_tokens, do_sample=False,
    )  # fmt: skip
    return [text.strip() for texts in batches for text in texts]


def describe(report: dict) -> str:
    """What became of the rows, and a table of the values, a column for each model."""
    lines = [f"--{flag}: {describe_counts(counts)}" for flag, counts in report.get("rows", {}).items()]
    columns = columns_of(report)
    rows = [["", *columns.values()]]
    for value_name in report["base"]:
        style = ".4f" if "loss" in value_name or "perplexity" in value_name else ".1%"
        values = [report[column][value_name] for column in columns]
        rows.append([value_name, *("none" if value is None else f"{value:{style}}" for value in values)])
    return "\n".join([*lines, table(rows)])


def describe_counts(counts: dict) -> str:
    """What became of some rows, in one line."""
    dropped = sum(counts["dropped"].values())
    text = f"{counts['read']:,} rows read = {counts['used']:,} used + {dropped:,} dropped"
    if dropped:
        text += f" ({describe_drops(counts['dropped'], counts['first_dropped'])})"
    if counts["not_held_out"]:
        text += f" + {counts['not_held_out']:,} not held out"
    return text + (f"; {counts['cut']:,} cut at --max_length" if counts["cut"] else "")


if __name__ == "__main__":
    main()
