"""Rows from files, folders and the hub, each with the place it stands at; what cannot be read is named."""

import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, dropwhile, islice
from pathlib import Path

from qlora.errors import InputError, first_line

OTHER_SPLITS = ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev")

LocatedRow = tuple[str, dict]  # ("rows.jsonl line 12", {column: value})


@dataclass(frozen=True)
class RowSource:
    """A data set and split as they were given; can be iterated again and again, as read_rows."""

    dataset: str
    split: str = "train"
    config_name: str | None = None
    streaming: bool = False  # a hub data set is not downloaded first

    def __iter__(self) -> Iterator[LocatedRow]:
        return read_rows(self.dataset, self.split, self.config_name, self.streaming)

    def __str__(self) -> str:
        return self.dataset if self.split == "train" else f"{self.dataset} ({self.split})"

    def content(self) -> str:
        """A hash of what is read: the files' bytes, or what `datasets` has as fingerprint of hub data."""
        name, _, _ = parse_split(self.split)
        files = _local_files(self.dataset, name)
        if files is None:
            return _load_from_hub(self.dataset, self.split, self.config_name)._fingerprint
        digest = hashlib.sha256(self.split.encode())
        for file in files:
            digest.update(str(file).encode())
            with _open(file) as opened:
                while block := opened.read(2**20):
                    digest.update(block)
        return digest.hexdigest()


def read_rows(
    dataset: str, split: str, config_name: str | None = None, streaming: bool = False
) -> Iterator[LocatedRow]:
    """Yield (location, row) from a file, a folder of files, or a hub data set.

    `split` is a split's name with an optional slice in rows or percent: train, train[:1000], train[90%:].
    Raises InputError, naming the file and line, for what cannot be read.
    """
    name, start, stop = parse_split(split)
    files = _local_files(dataset, name)
    if files is None:
        number = 0
        try:
            for number, row in enumerate(_load_from_hub(dataset, split, config_name, streaming), start=1):
                yield f"{dataset} row {number}", row
        except InputError:
            raise
        except Exception as error:  # in a stream any row may meet any trouble of the network
            raise InputError(f"{dataset} cannot be read after row {number}: {first_line(error)}") from error
        return

    def rows():
        return chain.from_iterable(READERS[file.suffix.lower()](file) for file in files)

    if any(isinstance(bound, str) or (bound is not None and bound < 0) for bound in (start, stop)):
        start, stop = _absolute_slice(start, stop, sum(1 for _ in rows()))
    found = False
    for row in islice(rows(), start, stop):
        found = True
        yield row
    if not found:
        raise InputError(f"{dataset} has no rows" + (f" in {split}" if split != "train" else ""))


def parse_split(split: str) -> tuple[str, int | str | None, int | str | None]:
    """'train[10%:500]' -> ('train', '10%', 500); raises InputError."""
    match = re.fullmatch(r"(\w[\w.-]*)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise InputError(
            f"cannot read the split '{split}': expected a name with an optional slice, as in train[:90%]"
        )
    name, *bounds = match.groups()
    return name, *(bound if bound is None or bound.endswith("%") else int(bound) for bound in bounds)


def _absolute_slice(start, stop, rows: int) -> tuple[int, int]:
    """Percentages and negative bounds as row numbers, rounded as `datasets` rounds them."""
    bounds = [
        round(int(bound[:-1]) * rows / 100) if isinstance(bound, str) else bound for bound in (start, stop)
    ]
    return slice(*bounds).indices(rows)[:2]


def _local_files(dataset: str, split_name: str) -> list[Path] | None:
    """The files of a split of a local data set; None if it must be one on the hub."""
    path = Path(dataset)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise InputError(f"{path} is none of {', '.join(READERS)}")
        if split_name != "train":
            raise InputError(
                f"{path} is a single file: it has the split 'train' (or a slice of it), not '{split_name}'"
            )
        return [path]
    if path.is_dir():
        return _files_of_split(path, split_name)
    if path.suffix.lower() in READERS or dataset.startswith((".", "/", "~")):
        raise InputError(f"no such data file or folder: {dataset}")
    return None


def _files_of_split(folder: Path, name: str) -> list[Path]:
    """A folder's data files that name the split; for train, if there are none, those that name no other."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in READERS and path.is_file())

    def named(split: str) -> list[Path]:
        word = re.compile(rf"(?<![a-z0-9]){re.escape(split.lower())}(?![a-z0-9])")
        return [file for file in files if word.search(str(file.relative_to(folder)).lower())]

    chosen = named(name)
    if not chosen and name == "train":
        others = {file for split in OTHER_SPLITS for file in named(split)}
        chosen = [file for file in files if file not in others]
    if not chosen:
        raise InputError(f"{folder} has no {', '.join(READERS)} file" + f" of split '{name}'" * bool(files))
    return chosen


def _load_from_hub(dataset: str, split: str, config_name: str | None, streaming: bool = False):
    import datasets  # slow to import, and generate.py does not need it for local files

    try:
        return datasets.load_dataset(dataset, config_name, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises dozens of types; all mean the same to the user
        raise InputError(
            f"cannot load the data set '{dataset}' ({split}): it is no file or folder here, and the hub "
            f"says: {first_line(error)} - check the name, the network and `hf auth login`, or give a file"
        ) from error


def _read_jsonl(path: Path) -> Iterator[LocatedRow]:
    with _open(path) as file:
        for number, line in enumerate(_decoded_lines(file, path), start=1):
            if line.strip():
                where = f"{path} line {number}"
                yield where, _json_object(line, where)


def _read_json(path: Path) -> Iterator[LocatedRow]:
    """A list of objects, an object that holds such a list under "data", or json lines."""
    with _open(path) as file:
        text = "".join(_decoded_lines(file, path))
    if not text.strip():
        return
    try:
        content = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        start = text.lstrip().splitlines()[0]
        if start.startswith("{") and start.rstrip().endswith("}"):  # json lines under another name
            yield from _read_jsonl(path)
            return
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{path}{line} is not valid JSON: {getattr(error, 'msg', error)}") from error
    if isinstance(content, dict):
        content = content["data"] if isinstance(content.get("data"), list) else [content]
    if not isinstance(content, list):
        raise InputError(f"{path} is not a list of objects")
    for number, row in enumerate(content, start=1):
        where = f"{path} row {number}"
        yield where, _check_object(row, where)


def _read_csv(path: Path) -> Iterator[LocatedRow]:
    csv.field_size_limit(sys.maxsize)
    number = 0

    def lines():
        nonlocal number
        for line in _decoded_lines(file, path):
            number += 1
            yield line

    with _open(path) as file:
        try:
            for row in csv.DictReader(dropwhile(str.isspace, lines()), strict=True):
                if None in row:
                    raise InputError(f"{path} line {number} has more fields than the header has columns")
                yield f"{path} line {number}", row
        except csv.Error as error:
            raise InputError(f"{path} line {number} is not valid CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[LocatedRow]:
    import pyarrow.parquet  # comes with datasets

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as parquet: {first_line(error)}") from error


def _read_txt(path: Path) -> Iterator[LocatedRow]:
    with _open(path) as file:
        for number, line in enumerate(_decoded_lines(file, path), start=1):
            if line.strip():
                yield f"{path} line {number}", {"text": line.rstrip("\r\n")}


READERS = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def _open(path: Path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _decoded_lines(file, path: Path) -> Iterator[str]:
    """Lines of a binary file as text, without a byte-order mark; raises InputError for one not UTF-8."""
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} line {number} is not UTF-8 (byte {error.start + 1}): convert the file to UTF-8"
            ) from error


def _json_object(text: str, where: str) -> dict:
    try:
        row = json.loads(text, strict=False)  # strict would refuse control characters such as NUL
    except (ValueError, RecursionError) as error:  # also for endless numbers and nesting
        raise InputError(f"{where} is not valid JSON: {error}") from error
    return _check_object(row, where)


def _check_object(row, where: str) -> dict:
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object with named columns")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds a lone surrogate (half of a character, \\ud800 to \\udfff)"
        ) from error
    return row
