"""Rows to tokens: through `datasets` on all cores, into a table that is cached on disk or kept in memory."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from tqdm import tqdm

from qlora.data import cache
from qlora.data.chat_template import FALLBACK_CHAT_TEMPLATE
from qlora.data.formats import (
    MARKERS,
    asks_otherwise,
    detect_format,
    required_columns,
    row_segments,
    starts_with_bos,
    turn_template,
)
from qlora.data.formatting import Formatting
from qlora.data.segments import IGNORE_INDEX, DropRow, Segment, encode
from qlora.data.similarity import SIGNATURE_SIZE, signature
from qlora.data.sources import LocatedRow
from qlora.data.tokenized import TokenizedRows, count_dropped
from qlora.errors import InputError, first_line

SAMPLE_ROWS = 100  # rows that decide the format
ROWS_PER_PROCESS = 5_000  # starting a process takes about as long as tokenizing these
SLICE_ROWS = 200_000  # a process lives for one slice: the pages it has read of a file stay in its memory
QUIET_ROWS = 20_000  # with fewer there is no progress bar

# A row before tokenization, as JSON: `datasets` wants one type a column. large_string: 2 GB or more in all.
RAW = Features({"where": Value("string"), "row": Value("large_string")})
TOKENS = Features(
    {
        "where": Value("string"),  # "rows.jsonl line 12"
        "dropped": Value("string"),  # why the row cannot be trained on; null if it can
        "input_ids": List(Value("int32")),  # of the whole row, whatever --max_length is
        "trained": List(Value("bool")),  # which tokens are targets; the first never is
        "first_target": Value("int32"),  # position of the first target
        "targets": Value("int32"),
        "largest_id": Value("int32"),
        "leading_bos": Value("int32"),  # BOS tokens at the start
        "ends_in_eos": Value("bool"),  # in a trained EOS
        "digest": Value("int64"),  # equal for rows with equal tokens
        "notes": List(Value("string")),  # what is not trained as one might expect (formats.row_segments)
        "row_hash": Value("int64"),  # of the row before tokenization, dropped or not
        "signature": List(Value("uint32"), length=SIGNATURE_SIZE),  # similar for rows with similar text
    }
)


def tokenize_rows(
    located_rows: Iterable[LocatedRow],
    tokenizer,
    formatting: Formatting = Formatting(),
    name: str = "the data",
    content: Callable[[], str] | None = None,
    cache_folder: Path | None = None,
) -> TokenizedRows:
    """Tokenize every usable row in full, and count the others by reason.

    Each row gets at most one BOS and ends in a trained EOS. With `content`, which returns a hash of what the
    rows contain, the tokens are cached in `cache_folder` (default: in that of `datasets`) and found there the
    next time; `located_rows` must then be iterable more than once. Without it they stay in memory. If the
    rows are messages and the tokenizer has no chat template, it is given FALLBACK_CHAT_TEMPLATE. Raises
    InputError if the format is not recognized, no row has a column it needs, or the content changes
    meanwhile; `name` is the data's name in such messages.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-sequence token, so no answer could learn to stop")
    content_hash = content() if content else None  # before anything is read
    remaining = iter(located_rows)
    sample = list(islice(remaining, SAMPLE_ROWS))
    formatting = checked_format([row for _, row in sample], formatting, name)
    row_format = formatting.row_format
    if row_format == "messages" and asks_otherwise(tokenizer):
        raise InputError(
            f"{name} has chats, but the chat template of --adapter or --model is that of the text rows it "
            "was trained on: give another with --chat_template"
        )
    if row_format == "messages" and tokenizer.chat_template is None:
        print("The tokenizer has no chat template: turns are written as ### Human: and ### Assistant:.")
        tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE  # saved with the adapter's tokenizer
    if content is None:
        rows = tokenize_window([*sample, *remaining], tokenizer, formatting)
    else:
        code = sorted(Path(__file__).parent.glob("*.py"))  # a change to any of it makes cached tokens stale
        depends_on = {**vars(formatting), "name": name, "content": content_hash}
        key = cache.cache_key(tokenizer, depends_on, code)
        check = partial(_check_unchanged, content, content_hash, name)
        tokenize = partial(tokenize_batch, tokenizer=tokenizer, formatting=formatting)
        cache_folder = cache_folder or Path(datasets.config.HF_DATASETS_CACHE, "qlora")
        storage = None
        try:
            table = _cached_table(cache_folder, key, located_rows, tokenize, check)
        except OSError as error:
            print(f"Tokens are not cached: {first_line(error)}")
            storage = tempfile.TemporaryDirectory(prefix="qlora-tokens-", ignore_cleanup_errors=True)
            table = _cached_table(Path(storage.name), key, located_rows, tokenize, check)
        rows = _usable_rows(table, formatting, storage)
    if row_format in MARKERS:
        texts = [text for _, row in sample if isinstance(text := row.get(formatting.text_field), str)]
        rows.chat_template = turn_template(texts, row_format, tokenizer)
    return rows


def tokenize_window(located_rows: list[LocatedRow], tokenizer, formatting: Formatting) -> TokenizedRows:
    """As tokenize_rows, in memory, for rows whose format is known."""
    tokenize = partial(tokenize_batch, tokenizer=tokenizer, formatting=formatting)
    raw = Dataset.from_list([_raw_row(*located_row) for located_row in located_rows], features=RAW)
    return _usable_rows(_tokenized_table(raw, tokenize), formatting, None)


def checked_format(sample: list[dict], formatting: Formatting, name: str) -> Formatting:
    """The formatting with the sample rows' format, detected if it is `auto`.

    Raises InputError if the rows do not have that format.
    """
    row_format, text_field = formatting.row_format, formatting.text_field
    columns = sorted(set().union(*sample))
    if row_format == "auto":
        detected = detect_format(sample, text_field)
        if detected is None:
            raise InputError(
                f"{name} has the columns {columns}, which are not those of a known format: '{text_field}', "
                "'instruction' and 'output', 'prompt' and 'completion', 'messages' or 'conversations'"
            )
        return replace(formatting, row_format=detected)
    needed = required_columns(row_format, text_field)
    missing = sorted(needed - set(columns))
    if missing and (row_format != "messages" or len(missing) == len(needed)):
        raise InputError(
            f"{name} has no column {missing[0]!r}, which format {row_format} needs; it has {columns}"
        )
    return formatting


# ---------------------------------------------------------------- one row


def tokenize_segments(segments: list[Segment], adds_bos: bool, tokenizer) -> tuple[list[int], list[int]]:
    """Segments of a whole row to (input_ids, labels), ending in a trained EOS. Raises DropRow.

    The first token is never a target: there is nothing before it to predict it from.
    """
    last, _ = segments[-1]
    if last.rstrip().endswith(tokenizer.eos_token):  # nothing after EOS is trained
        segments = [*segments[:-1], (last.rstrip(), True)]
    input_ids, labels = encode(segments, adds_bos, tokenizer)
    if len(segments) == 1 and len(input_ids) - input_ids.count(tokenizer.bos_token_id) <= 1:
        raise DropRow("one token")
    if input_ids[-1] != tokenizer.eos_token_id:
        input_ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    labels[0] = IGNORE_INDEX
    return input_ids, labels


def token_columns(
    where: str, input_ids: list[int], labels: list[int], row: dict, notes: list[str], bos_id: int | None,
    eos_id: int,
) -> dict:  # fmt: skip
    """The TOKENS columns of a usable row; `row` is the row before tokenization."""
    ids = np.asarray(input_ids, dtype=np.int32)
    is_trained = np.asarray(labels) != IGNORE_INDEX
    return {
        "where": where,
        "dropped": None,
        "input_ids": ids,
        "trained": is_trained,
        "first_target": int(is_trained.argmax()),
        "targets": int(is_trained.sum()),
        "largest_id": int(ids.max()),
        "leading_bos": int((ids == bos_id).cumprod().sum()),
        "ends_in_eos": bool(ids[-1] == eos_id and is_trained[-1]),
        "digest": _hash(ids.tobytes()),
        "row_hash": row_hash(row),
        "notes": notes,
        "signature": signature(row),
    }


def row_hash(row: dict) -> int:
    """A hash of a row before tokenization, by which rows are held out: equal for rows of equal content.

    Neither the place of the row nor the order of its columns counts. Adapters are saved with such hashes, so
    it must never change.
    """
    return _hash(json.dumps(row, sort_keys=True).encode())


def _hash(content: bytes) -> int:
    """64 bits of a hash, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


def _dropped_columns(where: str, reason: str, row: dict) -> dict:
    """The TOKENS columns of a row that cannot be trained on."""
    empty = dict.fromkeys(TOKENS, 0)
    no_tokens = np.zeros(0, dtype=np.int32)
    return empty | {
        "where": where, "dropped": reason, "input_ids": no_tokens, "trained": no_tokens > 0,
        "row_hash": row_hash(row), "notes": [], "signature": np.zeros(SIGNATURE_SIZE, dtype=np.uint32),
    }  # fmt: skip


def _raw_row(where: str, row: dict) -> dict:
    return {"where": where, "row": json.dumps(row, ensure_ascii=False, default=_placeholder)}


def _placeholder(value) -> dict:
    """Stands for a value JSON lacks (bytes, date, decimal). It is not text, so it is never trained."""
    return {"type": type(value).__name__}


# ---------------------------------------------------------------- many rows


def tokenize_batch(batch: dict, tokenizer, formatting: Formatting) -> dict:
    """RAW columns to TOKENS columns; runs in worker processes."""
    adds_bos = starts_with_bos(formatting.row_format, tokenizer)
    columns = {name: [] for name in TOKENS}
    for where, row in zip(batch["where"], batch["row"]):
        row = json.loads(row)
        try:
            segments, notes = row_segments(row, formatting, tokenizer)
            ids, labels = tokenize_segments(segments, adds_bos, tokenizer)
            values = token_columns(
                where, ids, labels, row, notes, tokenizer.bos_token_id, tokenizer.eos_token_id
            )
        except DropRow as reason:
            values = _dropped_columns(where, str(reason), row)
        for name, column in columns.items():
            column.append(values[name])
    return columns


def _usable_rows(table: Dataset, formatting: Formatting, storage) -> TokenizedRows:
    """The usable rows of a table of TOKENS; the others are counted."""
    is_usable = table.data.column("dropped").is_null().to_numpy()
    indices = np.flatnonzero(is_usable)
    dropped, first_dropped = count_dropped(table, ~is_usable)
    return TokenizedRows(
        table, formatting, indices, np.zeros_like(indices), rows_read=len(table), storage=storage,
        dropped=dropped, first_dropped=first_dropped,
    )  # fmt: skip


def _cached_table(
    cache_folder: Path, key: str, located_rows: Iterable[LocatedRow], tokenize: Callable[[dict], dict],
    check: Callable[[], None],
) -> Dataset:  # fmt: skip
    """The tokens in the cache, written now if they are not there and `check` lets them be published.

    Raises OSError if they cannot be written.
    """
    entry = cache.find_entry(cache_folder, key)
    if entry is None:
        with cache.new_entry(cache_folder, key) as (folder, scratch):
            write_tokens(located_rows, tokenize, folder, scratch)
            check()
        entry = cache.find_entry(cache_folder, key)
    if entry is None:
        raise FileNotFoundError(f"{cache_folder} was emptied meanwhile")
    return cache.load_table(entry)


def _check_unchanged(content: Callable[[], str], content_hash: str, name: str) -> None:
    """Raise InputError if the data are not as they were: half of their rows might be old, half new."""
    if content() != content_hash:
        raise InputError(f"{name} changed while it was read: start again when nothing writes to it")


def write_tokens(
    located_rows: Iterable[LocatedRow],
    tokenize: Callable[[dict], dict],
    folder: Path,
    scratch: Path,
    slice_rows: int = SLICE_ROWS,
    rows_per_process: int = ROWS_PER_PROCESS,
    cores: int | None = None,
) -> None:
    """Tokenize rows into .arrow files in `folder`, in processes on `cores` cores (default: all it may use).

    All rows are read into `scratch` first, so that the processes can share them.
    """
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    reading = tqdm(located_rows, desc="reading", unit=" rows", delay=2)
    try:
        with _progress_bars(is_shown=False):  # tqdm's own is shown instead
            raw = Dataset.from_generator(
                lambda: (_raw_row(*located_row) for located_row in reading),
                RAW, cache_dir=str(scratch), fingerprint="raw",
            )  # fmt: skip
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None  # what the reader raised
    for start in range(0, len(raw), slice_rows):
        some = raw.select(range(start, min(start + slice_rows, len(raw))))
        processes = min(cores, len(some) // rows_per_process)
        _tokenized_table(some, tokenize, folder / f"rows-{start:012}.arrow", processes)


def _tokenized_table(
    raw: Dataset, tokenize: Callable[[dict], dict], path: Path | None = None, processes: int = 1
) -> Dataset:
    """RAW rows to TOKENS rows, in a file, or in memory without `path`."""
    with _progress_bars(is_shown=len(raw) >= QUIET_ROWS):
        return raw.map(
            tokenize, batched=True, features=TOKENS, remove_columns=["row"], desc="tokenizing",
            num_proc=processes if processes > 1 else None, cache_file_name=path and str(path),
            keep_in_memory=path is None, new_fingerprint="tokens",
        )  # fmt: skip


@contextmanager
def _progress_bars(is_shown: bool) -> Iterator[None]:
    """Show or hide the progress bars of `datasets`, whose setting is global."""
    were_hidden = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if is_shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if were_hidden else datasets.enable_progress_bars)()
