"""Sources to rows that a model can be trained on: tokenized, checked, cut."""

import math
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np

from qlora.data.batch import PAD_MULTIPLE
from qlora.data.sources import RowSource
from qlora.data.tokenize import TokenizedRows, hold_out, mix, tokenize_rows
from qlora.errors import InputError
from qlora.model.adapter import check_adapter
from qlora.model.base import load_config, load_tokenizer

STREAM_WINDOW = 10_000  # rows of a stream that are read and tokenized at a time


def load_data(config) -> tuple:
    """(tokenizer, the model's configuration, training rows, validation rows or None) of a TrainConfig.

    The rows are tokenized and checked against the model's limits. With --streaming the training rows are the
    first window of the stream. Raises InputError for whatever is wrong with any of them.
    """
    if config.adapter:
        check_adapter(config.adapter)
    tokenizer = load_tokenizer(config.model, config.adapter, config.trust_remote_code)
    model_config = load_config(config.model, config.trust_remote_code).get_text_config()
    settings = {"text_field": config.dataset_text_field, "completion_only_loss": config.completion_only_loss}
    tokenize = partial(tokenize_source, tokenizer, **settings)
    sources = [RowSource(dataset, config.split, config.dataset_config) for dataset in config.dataset]
    if config.streaming:
        (source,) = sources
        sample = list(islice(replace(source, streaming=True), STREAM_WINDOW))
        train_rows = tokenize_rows(sample, tokenizer, config.dataset_format, name=str(source), **settings)
    else:
        parts = [tokenize(config.dataset_format, source) for source in sources]
        train_rows = mix(parts)
        if len({part.row_format for part in parts}) > 1:
            formats = ", ".join(part.row_format for part in parts)
            print(f"The data sets have the formats {formats}: generate.py will ask in the first.")
    max_length = choose_max_length(config.max_length, train_rows.whole_lengths, model_config)
    train_rows = cut_rows(train_rows, max_length, model_config.vocab_size)
    validation_rows = None
    if config.held_out is not None:
        train_rows, validation_rows = hold_out(train_rows, config.held_out, config.seed)
    elif config.validation_split or config.validation_dataset:
        sources = [
            RowSource(dataset, config.validation_split, config.dataset_config) for dataset in config.dataset
        ]
        if config.validation_dataset:
            sources = [RowSource(config.validation_dataset, config.validation_split or "train")]
        row_format = train_rows.row_format if len(sources) == 1 else config.dataset_format
        validation_rows = mix([tokenize(row_format, source) for source in sources])
        validation_rows = cut_rows(validation_rows, max_length, model_config.vocab_size)
    for number, dataset in enumerate(config.dataset):
        if config.dataset_weights and number not in train_rows.sources:
            raise InputError(f"--dataset_weights: no row of {dataset} is left to train on")
    return tokenizer, model_config, train_rows, validation_rows


def tokenize_source(
    tokenizer, row_format: str, source: RowSource, text_field: str, completion_only_loss: bool
) -> TokenizedRows:
    """The rows of a source, tokenized and cached; raises InputError if none can be used."""
    rows = tokenize_rows(
        source, tokenizer, row_format, name=str(source), content=source.content(), text_field=text_field,
        completion_only_loss=completion_only_loss,
    )  # fmt: skip
    if not len(rows):
        raise InputError(f"no row of {source} can be used: {rows.describe_drops()}")
    return rows


def cut_rows(rows: TokenizedRows, max_length: int, vocab_size: int) -> TokenizedRows:
    """The rows as a model sees them; raises InputError if none is left or the model lacks a token."""
    rows = rows.cut(max_length)
    if not len(rows):
        raise InputError(f"no row can be used: {rows.describe_drops()}")
    check_vocabulary(rows, vocab_size)
    return rows


def choose_max_length(wanted: str, lengths: np.ndarray, model_config) -> int:
    """Tokens of the longest row from --max_length: a number, a percentile of `lengths` (p90), or `max`.

    Percentiles and `max` are rounded up to a multiple of 64, and all are capped by the model's context.
    """
    if wanted.isdigit():
        max_length = int(wanted)
    else:
        percent = 100.0 if wanted == "max" else float(wanted[1:])
        longest = np.percentile(lengths, percent, method="inverted_cdf")  # an actual length
        max_length = math.ceil(longest / 64) * 64
    context = getattr(model_config, "max_position_embeddings", None)
    if context is None:
        return max_length
    context -= context % PAD_MULTIPLE  # batches are padded to that, and positions may be learned
    if max_length > context:
        print(f"--max_length {wanted} is more than the model's context: {context} is used.")
    return min(max_length, context)


def check_vocabulary(rows: TokenizedRows, vocab_size: int) -> None:
    """Raise InputError if a token id has no embedding in a model of `vocab_size` tokens."""
    largest = int(rows.column("largest_id").max(initial=0))
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer gives token id {largest}, but the model has only {vocab_size} tokens: "
            "they do not belong together"
        )
