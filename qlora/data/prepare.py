"""Sources to rows that a model can be trained on: tokenized, cut, checked, and split for validation."""

import math
from itertools import islice

import numpy as np

from qlora.data.batch import PAD_MULTIPLE
from qlora.data.formatting import Formatting
from qlora.data.sources import RowSource
from qlora.data.stream import STREAM_WINDOW, RowStream
from qlora.data.tokenize import tokenize_rows
from qlora.data.tokenized import TokenizedRows, check_vocabulary, hold_out, mix
from qlora.errors import InputError


def load_rows(
    tokenizer,
    model_config,
    train_sources: list[RowSource],
    validation_sources: list[RowSource],
    *,
    formatting: Formatting,
    max_length: str,
    held_out: float | None,
    seed: int,
    weights: list[float] | None = None,
    window_rows: int = STREAM_WINDOW,
) -> tuple[TokenizedRows, TokenizedRows | None, RowStream | None]:
    """(training rows, validation rows or None, stream or None), for a model with that `model_config`.

    Validation rows come from `validation_sources`, or are held out of the training rows: `held_out` is a
    share below 1, else a number of rows. A single streaming source is not read to its end: its training rows
    are the first window of `window_rows` rows, and the stream gives all of them. `max_length` is --max_length
    (choose_max_length). Raises InputError for anything that cannot be used, among it a source with a weight
    that has no usable row.
    """
    if any(source.streaming for source in train_sources):
        (source,) = train_sources
        sample = list(islice(source, window_rows))
        train_rows = tokenize_rows(sample, tokenizer, formatting, name=str(source))
        train_rows.files = source.describe_files()
    else:
        parts = [tokenize_source(tokenizer, formatting, source) for source in train_sources]
        train_rows = mix(parts)
        if len({part.row_format for part in parts}) > 1:
            formats = ", ".join(part.row_format for part in parts)
            print(f"The datasets have the formats {formats}: generate.py will use the first.")
    max_tokens = choose_max_length(max_length, train_rows.full_lengths, model_config)
    validation_rows = None
    if held_out is not None:  # before rows are cut: --max_length does not decide which
        train_rows, validation_rows = hold_out(train_rows, held_out, seed)
    elif validation_sources:
        if len(validation_sources) == 1:
            formatting = train_rows.formatting
        parts = [tokenize_source(tokenizer, formatting, source) for source in validation_sources]
        validation_rows = mix(parts)
    train_rows = cut_rows(train_rows, max_tokens, model_config.vocab_size)
    if validation_rows is not None:
        validation_rows = cut_rows(validation_rows, max_tokens, model_config.vocab_size)

    if weights is not None:  # a source cannot have its share of an epoch without a row
        for number, source in enumerate(train_sources):
            if number not in train_rows.source_ids:
                raise InputError(f"--dataset_weights: no row of {source.dataset} is left to train on")
    stream = None
    if train_sources[0].streaming:
        stream = RowStream(
            train_sources[0],
            tokenizer,
            train_rows.formatting,
            max_tokens,
            model_config.vocab_size,
            window_rows,
        )
    if train_rows.chat_template:  # from now on, as all rows are tokenized
        tokenizer.chat_template = train_rows.chat_template
    return train_rows, validation_rows, stream


def tokenize_source(tokenizer, formatting: Formatting, source: RowSource) -> TokenizedRows:
    """The rows of a source, tokenized and cached. Raises InputError if none can be used."""
    rows = tokenize_rows(source, tokenizer, formatting, name=str(source), content=source.content)
    if not len(rows):
        raise InputError(f"no row of {source} can be used: {rows.describe_drops()}")
    rows.files = source.describe_files()
    return rows


def cut_rows(rows: TokenizedRows, max_length: int, vocab_size: int) -> TokenizedRows:
    """The rows cut at `max_length` tokens. Raises InputError if none is left or the model lacks a token."""
    rows = rows.cut(max_length)
    if not len(rows):
        raise InputError(f"no row can be used: {rows.describe_drops()}")
    check_vocabulary(rows, vocab_size)
    return rows


def choose_max_length(max_length: str, lengths: np.ndarray, model_config) -> int:
    """Tokens of the longest row, from --max_length: a number, a percentile of `lengths` (p90), or `max`.

    Percentiles and `max` are rounded up to a multiple of 64. The model's context caps them all.
    """
    if max_length.isdigit():
        max_tokens = int(max_length)
    else:
        percent = 100.0 if max_length == "max" else float(max_length[1:])
        longest = np.percentile(lengths, percent, method="inverted_cdf")  # the length of an actual row
        max_tokens = math.ceil(longest / 64) * 64
    context = getattr(model_config, "max_position_embeddings", None)
    if context is None:
        return max_tokens
    context -= context % PAD_MULTIPLE  # batches are padded to a multiple, and must fit learned positions too
    if max_tokens > context:
        print(f"--max_length {max_length} exceeds the model's context: using {context}.")
    return min(max_tokens, context)
