"""Rows to tokens: tokenized through `datasets` on all cores, cached on disk, seen through a length limit."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import tokenizers
import torch
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from tqdm import tqdm

from qlora.data import formats, sources
from qlora.data.formats import (
    FALLBACK_CHAT_TEMPLATE,
    IGNORE_INDEX,
    DropRow,
    Segment,
    detect_format,
    encode,
    required_columns,
    row_segments,
    starts_with_bos,
)
from qlora.data.sources import LocatedRow
from qlora.errors import InputError, first_line

SAMPLE_ROWS = 100  # rows that decide the format
ROWS_PER_PROCESS = 5_000  # starting a process takes about as long as tokenizing these
QUIET_ROWS = 20_000  # fewer show no progress bar
SLICE_ROWS = 200_000  # processes live for so many rows: what they have read of a file stays in their memory

MINIMA = 32  # hashes of a row's signature
WORDS = 3  # words of a shingle, the unit in which texts are compared

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")  # a word, or a character of Chinese
MIXERS = np.random.default_rng(0).integers(2**63, size=(2, MINIMA), dtype=np.uint64) * 2 + 1

RAW = Features({"where": Value("string"), "row": Value("large_string")})  # large: more than 2 GB at a time
TOKENS = Features(
    {
        "where": Value("string"),  # "rows.jsonl line 12"
        "dropped": Value("string"),  # why the row cannot be trained on; null if it can
        "input_ids": List(Value("int32")),  # all of the row, however long
        "trained": List(Value("bool")),  # which tokens are targets; the first never is
        "first_target": Value("int32"),
        "targets": Value("int32"),
        "largest_id": Value("int32"),
        "leading_bos": Value("int32"),  # BOS tokens at the start
        "ends_in_eos": Value("bool"),  # in a trained EOS
        "digest": Value("int64"),  # equal for rows of equal tokens
        "signature": List(Value("uint32"), length=MINIMA),  # similar for rows of similar text
    }
)


@dataclass
class TokenizedRows:
    """Usable rows of a table of TOKENS, in the order of `rows`, each cut at `max_length` (None: whole)."""

    table: Dataset
    row_format: str
    rows: np.ndarray  # their indices in the table
    sources: np.ndarray  # the number of the data set that each is from
    max_length: int | None = None
    rows_read: int = 0
    dropped: Counter = field(default_factory=Counter)  # reason -> rows
    first_dropped: dict = field(default_factory=dict)  # reason -> location of the first such row
    lost_lengths: np.ndarray = field(default_factory=partial(np.zeros, 0, int))  # of rows that cut() dropped
    storage: object = None  # keeps a temporary folder of the table alive

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fetch([index])[0]

    def fetch(self, indices: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(input_ids, labels) of each of these rows; labels are IGNORE_INDEX where no target is."""
        found = self._tokens[self.rows[indices]]
        pairs = []
        for ids, trained in zip(found["input_ids"], found["trained"]):
            ids, trained = ids[: self.max_length], trained[: self.max_length]
            pairs.append((torch.from_numpy(ids), torch.from_numpy(np.where(trained, ids, IGNORE_INDEX))))
        return pairs

    def column(self, name: str) -> np.ndarray:
        """A column of numbers of the table, for the rows of this view."""
        return self.table.data.column(name).to_numpy()[self.rows]

    @cached_property
    def whole_lengths(self) -> np.ndarray:
        """Tokens of each row before it is cut."""
        lengths = [np.diff(part.offsets.to_numpy()) for part in self.table.data.column("input_ids").chunks]
        return np.concatenate(lengths)[self.rows]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.minimum(self.whole_lengths, self.max_length or self.whole_lengths.max())

    @cached_property
    def is_cut(self) -> np.ndarray:
        """Which rows are longer than they are seen here."""
        return self.whole_lengths > self.lengths

    @cached_property
    def targets(self) -> int:
        """Trained tokens of all rows."""
        total = int(self.column("targets")[~self.is_cut].sum())
        trained = self.table.with_format("numpy", columns=["trained"])
        for few in np.array_split(np.flatnonzero(self.is_cut), 1 + self.truncated // 1000):  # not all at once
            found = trained[self.rows[few]]["trained"] if len(few) else []
            total += sum(int(row[: self.max_length].sum()) for row in found)
        return total

    @property
    def signatures(self) -> np.ndarray:
        """(rows, MINIMA) uint32: the share of equal entries of two rows tells how similar their texts are."""
        parts = [part.flatten().to_numpy() for part in self.table.data.column("signature").chunks]
        return np.concatenate(parts).reshape(-1, MINIMA)[self.rows]

    @property
    def truncated(self) -> int:
        return int(self.is_cut.sum())

    @cached_property
    def _tokens(self) -> Dataset:
        return self.table.with_format("numpy", columns=["input_ids", "trained"])

    def subset(self, indices: np.ndarray) -> "TokenizedRows":
        """The chosen rows; the counts of reading stay with the original."""
        nothing = {
            "rows_read": 0,
            "dropped": Counter(),
            "first_dropped": {},
            "lost_lengths": np.zeros(0, int),
        }
        return replace(self, rows=self.rows[indices], sources=self.sources[indices], **nothing)

    def cut(self, max_length: int) -> "TokenizedRows":
        """These rows cut at `max_length` tokens; those that keep no target are dropped."""
        is_kept = self.column("first_target") < max_length
        view = replace(
            self, rows=self.rows[is_kept], sources=self.sources[is_kept], max_length=max_length,
            dropped=Counter(self.dropped),
        )  # fmt: skip
        view.first_dropped, view.lost_lengths = dict(self.first_dropped), self.whole_lengths[~is_kept]
        if not is_kept.all():
            reason = "prompt fills --max_length"
            view.dropped[reason] = int((~is_kept).sum())
            view.first_dropped[reason] = self.table[int(self.rows[~is_kept][0])]["where"]
        return view

    def describe(self) -> str:
        """One line: rows read = used + dropped by reason; tokens, targets, truncation."""
        text = f"{self.rows_read:,} rows read = {len(self):,} used + {self.dropped.total():,} dropped"
        if self.dropped:
            text += f" ({self.describe_drops()})"
        text += f"; {self.lengths.sum():,} tokens, {self.targets:,} trained; format {self.row_format}"
        if self.truncated:
            text += f"; {self.truncated:,} answers cut at --max_length, without EOS"
        return text

    def describe_drops(self) -> str:
        return ", ".join(
            f"{count:,} {reason}, first: {self.first_dropped[reason]}"
            for reason, count in self.dropped.most_common()
        )


def tokenize_rows(
    located_rows: Iterable[LocatedRow],
    tokenizer,
    row_format: str = "auto",
    text_field: str = "text",
    completion_only_loss: bool = True,
    name: str = "the data",
    content: str | None = None,
) -> TokenizedRows:
    """Tokenize every usable row whole, and count the others by reason.

    Every row gets at most one BOS and ends in a trained EOS. `content` stands for the rows' content: with it,
    their tokens are cached under it and all else that they depend on, and found there the next time; without
    it they stay in memory. Raises InputError if the format is not recognised or a needed column is absent
    everywhere. A tokenizer without a chat template is given one if the rows are messages.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-sequence token, so no answer could learn to stop")
    reading = iter(located_rows)
    sample = list(islice(reading, SAMPLE_ROWS))
    row_format = checked_format([row for _, row in sample], row_format, text_field, name)
    if row_format == "messages" and tokenizer.chat_template is None:
        print("The tokenizer has no chat template: turns are written as ### Human: and ### Assistant:.")
        tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE  # saved with the adapter's tokenizer
    settings = {
        "row_format": row_format,
        "text_field": text_field,
        "completion_only_loss": completion_only_loss,
    }
    if content is None:
        return tokenize_window([*sample, *reading], tokenizer, **settings)
    depends_on = {**settings, "name": name, "content": content}
    if "strftime_now" in str(tokenizer.chat_template):  # a template that writes today's date
        depends_on["date"] = time.strftime("%Y-%m-%d")
    key, storage = _cache_key(tokenizer, depends_on), None
    tokenize = partial(_tokenize_batch, tokenizer=tokenizer, **settings)
    try:
        table = _cached(located_rows, tokenize, Path(datasets.config.HF_DATASETS_CACHE) / "qlora", key)
    except OSError as error:
        print(f"Tokens are not cached: {first_line(error)}")
        storage = tempfile.TemporaryDirectory(prefix="qlora-tokens-", ignore_cleanup_errors=True)
        table = _cached(located_rows, tokenize, Path(storage.name), key)
    return _usable(table, row_format, storage)


def tokenize_window(located_rows: list[LocatedRow], tokenizer, **settings) -> TokenizedRows:
    """As tokenize_rows, in memory, for rows of a known format: `settings` are those of _tokenize_batch."""
    raw = Dataset.from_list([_raw(*row) for row in located_rows], features=RAW)
    table = _map(raw, partial(_tokenize_batch, tokenizer=tokenizer, **settings), cache_file_name=None)
    return _usable(table, settings["row_format"], None)


def _usable(table: Dataset, row_format: str, storage) -> TokenizedRows:
    """The rows of a table that can be used, the others counted."""
    is_used = table.data.column("dropped").is_null().to_numpy()
    used = np.flatnonzero(is_used)
    result = TokenizedRows(table, row_format, used, 0 * used, rows_read=len(table), storage=storage)
    for row in table.select(np.flatnonzero(~is_used)).select_columns(["where", "dropped"]):
        result.dropped[row["dropped"]] += 1
        result.first_dropped.setdefault(row["dropped"], row["where"])
    return result


def mix(parts: list[TokenizedRows]) -> TokenizedRows:
    """Several data sets as one, each row with the number of its source; the format is the first one's."""
    offsets = np.cumsum([0] + [len(part.table) for part in parts])
    first_dropped = {}
    for part in reversed(parts):
        first_dropped |= part.first_dropped
    return TokenizedRows(
        table=datasets.concatenate_datasets([part.table for part in parts]),
        row_format=parts[0].row_format,
        rows=np.concatenate([part.rows + offset for part, offset in zip(parts, offsets)]),
        sources=np.concatenate([np.full(len(part), number) for number, part in enumerate(parts)]),
        rows_read=sum(part.rows_read for part in parts),
        dropped=sum((part.dropped for part in parts), Counter()),
        first_dropped=first_dropped,
        storage=[part.storage for part in parts],
    )


def tokenize_segments(
    segments: list[Segment], adds_bos: bool, completion_only_loss: bool, tokenizer
) -> tuple[list[int], list[int]]:
    """Segments of a whole row to (input_ids, labels) that end in a trained EOS. Raises DropRow.

    The first token has nothing before it to be predicted from, so it is never a target.
    """
    if not completion_only_loss:
        segments = [(text, True) for text, _ in segments]
    last, _ = segments[-1]
    if last.rstrip().endswith(tokenizer.eos_token):  # nothing is trained after EOS
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
    where: str, ids: list[int], labels: list[int], text: dict, bos_id: int | None, eos_id: int
) -> dict:
    """A row of TOKENS; `text` is the row of data that it is from."""
    ids = np.asarray(ids, dtype=np.int32)
    trained = np.asarray(labels) != IGNORE_INDEX
    return {
        "where": where,
        "dropped": None,
        "input_ids": ids,
        "trained": trained,
        "first_target": int(trained.argmax()),
        "targets": int(trained.sum()),
        "largest_id": int(ids.max()),
        "leading_bos": int((ids == bos_id).cumprod().sum()),
        "ends_in_eos": bool(ids[-1] == eos_id and trained[-1]),
        "digest": int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "big", signed=True),
        "signature": signature(text),
    }


def signature(row: dict) -> np.ndarray:
    """MinHash of the row's text in shingles of WORDS words, without case and punctuation (Broder 1997)."""
    words = [zlib.crc32(word.encode()) for word in WORD.findall(" ".join(_texts(row)).lower())]
    words = np.array(words or [0], dtype=np.uint64)
    shingles = np.zeros(max(1, len(words) - WORDS + 1), dtype=np.uint64)
    for start in range(min(WORDS, len(words))):
        shingles = shingles * MIXERS[0, 0] + words[start : start + len(shingles)]
    minima = np.full(MINIMA, 2**64 - 1, dtype=np.uint64)
    for start in range(0, len(shingles), 10_000):  # a long row would need 256 bytes a word at once
        mixed = shingles[start : start + 10_000, None] * MIXERS[0] + MIXERS[1]  # modulo 2^64
        minima = np.minimum(minima, mixed.min(axis=0))
    return (minima >> np.uint64(32)).astype(np.uint32)


def _texts(value) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _tokenize_batch(
    batch: dict, tokenizer, row_format: str, text_field: str, completion_only_loss: bool
) -> dict:
    """RAW columns to TOKENS columns; runs in several processes."""
    adds_bos = starts_with_bos(row_format, tokenizer)
    columns = {name: [] for name in TOKENS}
    nothing = np.zeros(0, dtype=np.int32)
    for where, row in zip(batch["where"], batch["row"]):
        row = json.loads(row)
        try:
            segments = row_segments(row, row_format, text_field, tokenizer)
            ids, labels = tokenize_segments(segments, adds_bos, completion_only_loss, tokenizer)
            values = token_columns(where, ids, labels, row, tokenizer.bos_token_id, tokenizer.eos_token_id)
        except DropRow as reason:
            values = {"where": where, "dropped": str(reason), "input_ids": nothing, "trained": nothing > 0}
            values["signature"] = np.zeros(MINIMA, dtype=np.uint32)
        for name, column in columns.items():
            column.append(values.get(name, 0))
    return columns


def _raw(where: str, row: dict) -> dict:
    return {"where": where, "row": json.dumps(row, ensure_ascii=False, default=_no_text)}


def _no_text(value) -> dict:
    """Bytes, dates and decimals are no text: a row that needs them as text is dropped."""
    return {"type": type(value).__name__}


def _map(raw: Dataset, tokenize, cache_file_name: str | None) -> Dataset:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = min(cores, len(raw) // ROWS_PER_PROCESS)
    with _progress_bars(len(raw) >= QUIET_ROWS):
        return raw.map(
            tokenize, batched=True, features=TOKENS, remove_columns=["row"], desc="tokenizing",
            num_proc=processes if processes > 1 and cache_file_name else None,
            cache_file_name=cache_file_name, keep_in_memory=cache_file_name is None, new_fingerprint="tokens",
        )  # fmt: skip


@contextmanager
def _progress_bars(are_shown: bool):
    """Those of `datasets`."""
    were_hidden = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if are_shown else datasets.disable_progress_bars)()
    yield
    (datasets.disable_progress_bars if were_hidden else datasets.enable_progress_bars)()


def _cached(located_rows: Iterable[LocatedRow], tokenize, cache: Path, key: str) -> Dataset:
    """The tokens under `key`, tokenized now if they are not there whole. Raises OSError if it cannot write.

    A folder gets its name when it is complete, so a kill leaves no half of one, and a part that was lost or
    cut short later is seen by its size.
    """
    folder = cache / key
    if not _is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        for old in cache.glob("unfinished-*"):  # left by kills
            if time.time() - old.stat().st_mtime > 86_400:
                shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            prefix="unfinished-", dir=cache, ignore_cleanup_errors=True
        ) as staging:
            reading = tqdm(located_rows, desc="reading", unit=" rows", delay=2)
            try:
                with _progress_bars(False):
                    raw = Dataset.from_generator(
                        lambda: (_raw(*row) for row in reading), RAW, cache_dir=staging, fingerprint="raw"
                    )
            except DatasetGenerationError as error:
                raise (error.__cause__ or error) from None
            tokens = Path(staging) / "tokens"
            tokens.mkdir()
            for start in range(0, len(raw), SLICE_ROWS):
                rows_of_slice = raw.select(range(start, min(start + SLICE_ROWS, len(raw))))
                _map(rows_of_slice, tokenize, cache_file_name=str(tokens / f"rows-{start:012}.arrow"))
            sizes = {path.name: path.stat().st_size for path in tokens.iterdir()}
            (tokens / "sizes.json").write_text(json.dumps(sizes))
            try:
                os.rename(tokens, folder)
            except OSError:
                if not _is_whole(folder):  # else another run of the same data was faster
                    raise
    parts = sorted(str(path) for path in folder.glob("*.arrow"))
    return datasets.concatenate_datasets([Dataset.from_file(part) for part in parts])


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / "sizes.json").read_text())
        return sizes == {path.name: path.stat().st_size for path in folder.glob("*.arrow")}
    except (OSError, ValueError):
        return False


def _cache_key(tokenizer, settings: dict) -> str:
    """A hash of all that the tokens depend on: tokenizer files, settings, and the code that makes them."""
    digest = hashlib.sha256(json.dumps([settings, tokenizers.__version__], sort_keys=True).encode())
    for module in (formats, sources):
        digest.update(Path(module.__file__).read_bytes())
    digest.update(Path(__file__).read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def checked_format(sample: list[dict], row_format: str, text_field: str, name: str) -> str:
    """The format of the sample rows, with auto recognised; raises InputError if they do not have it."""
    columns = sorted(set().union(*sample))
    if row_format == "auto":
        detected = detect_format(sample, text_field)
        if detected is None:
            raise InputError(
                f"{name} has the columns {columns}, which is no known format: '{text_field}', "
                "'instruction' and 'output', 'prompt' and 'completion', 'messages' or 'conversations'"
            )
        return detected
    needed = required_columns(row_format, text_field)
    missing = sorted(needed - set(columns))
    if missing and (row_format != "messages" or len(missing) == len(needed)):
        raise InputError(
            f"{name} has no column {missing[0]!r}, which format {row_format} needs; it has {columns}"
        )
    return row_format


def hold_out(rows: TokenizedRows, amount: float, seed: int) -> tuple[TokenizedRows, TokenizedRows]:
    """Split rows at random into (training, validation); `amount`: below 1 a share, else a number of rows."""
    count = round(amount * len(rows)) if amount < 1 else int(amount)
    if not 1 <= count < len(rows):
        raise InputError(
            f"--validation_split {amount:g} asks for {count} validation rows of the {len(rows)} there are"
        )
    order = np.random.default_rng([seed, 2**32 - 1]).permutation(len(rows))
    training, validation = rows.subset(np.sort(order[count:])), rows.subset(np.sort(order[:count]))
    training.rows_read, training.dropped = rows.rows_read - count, rows.dropped
    training.first_dropped, training.lost_lengths = rows.first_dropped, rows.lost_lengths
    validation.rows_read = count
    return training, validation
