"""Reading rows from files, folders and the Hugging Face hub, each with its location for error messages."""

import csv
import hashlib
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from qlora.errors import InputError, first_line

# A folder's files that are named after one of these are not training data.
OTHER_SPLITS = ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev")
# What may stand around a split's name: alpaca_train, test_data, train-00000-of-00001-a09b74b3ef9c3b56.
BEFORE_SPLIT = r"(?:.*[-_. ])?"
DATA_WORD = r"(?:[-_. ]?(?:data|dataset|set|split|rows|examples|samples))?"
SHARD = r"(?:(?<=[a-z])\d+)?(?:[-_. ](?:\d+|of|[0-9a-f]{16}))*"
SHOWN_FILES = 3  # of a folder, per reason why they are left out

LocatedRow = tuple[str, dict]  # ("rows.jsonl line 12", {column: value})


@dataclass(frozen=True)
class RowSource:
    """A dataset and split as given by the user. Iterating it reads the rows, again each time."""

    dataset: str  # file, folder or hub id
    split: str = "train"
    config_name: str | None = None
    streaming: bool = False  # a hub dataset is not downloaded first

    def __iter__(self) -> Iterator[LocatedRow]:
        return read_rows(self.dataset, self.split, self.config_name, self.streaming)

    def __str__(self) -> str:
        return self.dataset if self.split == "train" else f"{self.dataset} ({self.split})"

    def describe_files(self) -> list[str]:
        """For a folder, one line: which files are read, and which are left out and why. Else no line."""
        split_name, _, _ = parse_split(self.split)
        if not Path(self.dataset).is_dir():
            return []
        taken, left_out = _choose_files(Path(self.dataset), split_name)
        names = [str(path.relative_to(self.dataset)) for path in taken]
        text = f"{self}: {len(taken):,} file{'' if len(taken) == 1 else 's'} read: {_shortened(names)}"
        reasons = [f"{len(names):,} {reason}: {_shortened(names)}" for reason, names in left_out.items()]
        return [f"{text}; left out: {'; '.join(reasons)}" if reasons else text]

    def content(self) -> str:
        """A hash of everything iterating would read: file bytes, or the fingerprint `datasets` has."""
        split_name, _, _ = parse_split(self.split)
        files = _local_files(self.dataset, split_name)
        if files is None:
            return _load_from_hub(self.dataset, self.split, self.config_name)._fingerprint
        digest = hashlib.sha256(self.split.encode())
        for path in files:
            digest.update(str(path).encode())
            with _open(path) as file:
                while block := file.read(2**20):
                    digest.update(block)
        return digest.hexdigest()


def read_rows(
    dataset: str, split: str, config_name: str | None = None, streaming: bool = False
) -> Iterator[LocatedRow]:
    """Yield (location, row) from a file, a folder of files, or a hub dataset.

    `split` is a split name with an optional slice in rows or percent: train, train[:1000], train[90%:].
    Raises InputError, with the file and line, for anything that cannot be read.
    """
    split_name, start, stop = parse_split(split)
    files = _local_files(dataset, split_name)
    if files is None:
        yield from _hub_rows(dataset, split, config_name, streaming)
        return
    if any(isinstance(bound, str) or (bound is not None and bound < 0) for bound in (start, stop)):
        start, stop = _absolute_slice(start, stop, sum(1 for _ in _file_rows(files)))
    is_empty = True
    for located_row in islice(_file_rows(files), start, stop):
        is_empty = False
        yield located_row
    if is_empty:
        raise InputError(f"{dataset} has no rows" + (f" in {split}" if split != "train" else ""))


def parse_split(split: str) -> tuple[str, int | str | None, int | str | None]:
    """'train[10%:500]' -> ('train', '10%', 500). Raises InputError."""
    match = re.fullmatch(r"(\w[\w.-]*)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise InputError(
            f"cannot read the split '{split}': expected a name with an optional slice, such as train[:90%]"
        )
    name, *bounds = match.groups()
    return name, *(bound if bound is None or bound.endswith("%") else int(bound) for bound in bounds)


def _absolute_slice(start, stop, row_count: int) -> tuple[int, int]:
    """Percentages and negative bounds as row numbers, rounded the way `datasets` does it."""
    bounds = [
        round(int(bound[:-1]) * row_count / 100) if isinstance(bound, str) else bound
        for bound in (start, stop)
    ]
    return slice(*bounds).indices(row_count)[:2]


# ---------------------------------------------------------------- local or hub?


def _local_files(dataset: str, split_name: str) -> list[Path] | None:
    """The files of a local dataset's split, or None for a hub dataset. Raises InputError."""
    files = _find_local_files(dataset, split_name)
    for path in files or ():
        try:
            str(path).encode()  # as the locations of its rows will be
        except UnicodeEncodeError as error:
            raise InputError(f"the path {_printable(path)} is not UTF-8: rename it") from error
    return files


def _find_local_files(dataset: str, split_name: str) -> list[Path] | None:
    path = Path(dataset)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise InputError(f"cannot read {path}: its type is not one of {', '.join(READERS)}")
        if split_name != "train":
            raise InputError(
                f"{path} is a single file: its only split is 'train' (or a slice of it), not '{split_name}'"
            )
        return [path]
    if path.is_dir():
        return _files_of_split(path, split_name)
    if path.suffix.lower() in READERS or dataset.startswith((".", "/", "~")):
        raise InputError(f"no such data file or folder: {dataset}")
    return None


def _files_of_split(folder: Path, split_name: str) -> list[Path]:
    taken, left_out = _choose_files(folder, split_name)
    if not taken:
        of_split = ""
        if of_splits := [name for reason, names in left_out.items() if " split" in reason for name in names]:
            of_split = f" of split '{split_name}': it has {_shortened(of_splits)}"
        raise InputError(f"{folder} has no {', '.join(READERS)} file{of_split}")
    return taken


def _choose_files(folder: Path, split_name: str) -> tuple[list[Path], dict[str, list[str]]]:
    """(a folder's data files of a split, reason -> names of the files that are left out).

    For train, if no file is named after it: the files that are named after no split. Raises InputError.
    """
    by_split, hidden, other_types, links = defaultdict(list), [], [], []
    # Not rglob(), which skips folders that it cannot read.
    for place, folders, files in os.walk(folder, onerror=_raise_unreadable):
        inside = Path(place).relative_to(folder)
        hidden += [str(inside / name) for name in sorted([*folders, *files]) if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # os.walk() enters these
        links += [str(inside / name) for name in folders if Path(place, name).is_symlink()]  # but not these
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(place, name)
            is_readable = path.is_file() or not path.exists()  # a broken link is an error once it is opened
            if is_readable and path.suffix.lower() in READERS:
                by_split[_split_of(inside / name, split_name)].append(path)
            else:
                other_types.append(str(inside / name))
    taken = by_split.pop(split_name, [])
    if not taken and split_name == "train":
        taken = by_split.pop(None, [])
        if any(_begins_with(path, ["train"]) for path in taken):  # such as train_sft beside test_sft
            by_split[None] = [path for path in taken if _begins_with(path, OTHER_SPLITS)]
            taken = [path for path in taken if path not in by_split[None]]
    left_out = {
        f"of split {split}" if split else "of no split": [str(path.relative_to(folder)) for path in paths]
        for split, paths in by_split.items()
    }
    left_out |= {"hidden": hidden, "of another type": other_types, "linked folders": links}
    return sorted(taken), {reason: names for reason, names in left_out.items() if names}


def _split_of(path: Path, wanted: str) -> str | None:
    """The split that a file belongs to by its `path` inside the folder: `wanted`, or one of the usual names.

    The file's own name decides if it is that of a split, else the innermost folder with such a name. Either
    must name the split as a whole: dev-ops and train_v2 name none.
    """
    if split := _split_named_by(path.stem, wanted, BEFORE_SPLIT, SHARD):
        return split
    return next(filter(None, (_split_named_by(part, wanted) for part in reversed(path.parts[:-1]))), None)


def _split_named_by(name: str, wanted: str, before: str = "", after: str = "") -> str | None:
    for splits in ([wanted], ["train", *OTHER_SPLITS]):
        pattern = rf"{before}({'|'.join(map(re.escape, splits))}){DATA_WORD}{after}"
        if match := re.fullmatch(pattern, name, re.IGNORECASE):
            return wanted if splits == [wanted] else match[1].lower()
    return None


def _begins_with(path: Path, words: Sequence[str]) -> bool:
    return re.match(rf"({'|'.join(words)})[-_. ]", path.stem, re.IGNORECASE) is not None


def _raise_unreadable(error: OSError) -> None:
    raise InputError(f"cannot read {_printable(error.filename)}: {error.strerror}") from error


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_FILES:,} more" if len(names) > SHOWN_FILES else ""
    return ", ".join(map(_printable, names[:SHOWN_FILES])) + more


def _printable(path: str | Path) -> str:
    """A path as text; bytes that are not UTF-8 become \\xe9."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def _load_from_hub(dataset: str, split: str, config_name: str | None, streaming: bool = False):
    import datasets  # slow to import, and generate.py does not need it for local files

    try:
        return datasets.load_dataset(dataset, config_name, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises dozens of types; all mean the same to the user
        raise InputError(
            f"cannot load the dataset '{dataset}' ({split}): it is not a local file or folder, and the hub "
            f"says: {first_line(error)} - check the name, the network and `hf auth login`, or give a file"
        ) from error


def _hub_rows(dataset: str, split: str, config_name: str | None, streaming: bool) -> Iterator[LocatedRow]:
    number = 0
    try:
        for number, row in enumerate(_load_from_hub(dataset, split, config_name, streaming), start=1):
            yield f"{dataset} row {number}", _without_fillers(row)
    except InputError:
        raise
    except Exception as error:  # a stream can hit any network or parser error, of any type, at any row
        raise InputError(f"{dataset} cannot be read after row {number}: {first_line(error)}") from error


# ---------------------------------------------------------------- one reader per file type


def _file_rows(files: list[Path]) -> Iterator[LocatedRow]:
    return chain.from_iterable(READERS[path.suffix.lower()](path) for path in files)


def _read_jsonl(path: Path) -> Iterator[LocatedRow]:
    with _open(path) as file:
        for number, line in enumerate(_decoded_lines(file, path), start=1):
            if line.strip():
                location = f"{path} line {number}"
                yield location, _parse_object(line, location)


def _read_json(path: Path) -> Iterator[LocatedRow]:
    """A list of objects, an object with such a list under "data", or JSON lines in a .json file."""
    with _open(path) as file:
        text = "".join(_decoded_lines(file, path))
    if not text.strip():
        return
    try:
        content = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        first = text.lstrip().splitlines()[0].rstrip()
        if first.startswith("{") and first.endswith("}"):  # JSON lines
            yield from _read_jsonl(path)
            return
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{path}{line} is not valid JSON: {getattr(error, 'msg', error)}") from error
    if isinstance(content, dict):
        content = content["data"] if isinstance(content.get("data"), list) else [content]
    if not isinstance(content, list):
        raise InputError(f"{path} is not a list of objects")
    for number, row in enumerate(content, start=1):
        location = f"{path} row {number}"
        yield location, _checked_object(row, location)


def _read_csv(path: Path) -> Iterator[LocatedRow]:
    csv.field_size_limit(sys.maxsize)
    with _open(path) as file:
        lines = _decoded_lines(file, path)
        # Blank lines above the header are skipped, but count in the locations.
        skipped, header = next(((n, line) for n, line in enumerate(lines) if not line.isspace()), (0, ""))
        rows = csv.DictReader(chain([header], lines), strict=True)
        try:
            for row in rows:
                location = f"{path} line {skipped + rows.reader.line_num}"
                if None in row:
                    raise InputError(f"{location} has more fields than the header has columns")
                yield location, row
        except csv.Error as error:
            line = skipped + rows.reader.line_num
            raise InputError(f"{path} line {line} is not valid CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[LocatedRow]:
    import pyarrow.parquet  # comes with datasets

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", _without_fillers(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as parquet: {first_line(error)}") from error


def _without_fillers(row: dict) -> dict:
    """A row of Arrow data without the nulls in its lists and objects.

    All objects of a column have the same keys there: a message without a call has `tool_calls: null`.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value):
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value


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
    """Lines of a binary file as text, without a byte-order mark. Raises InputError where it is not UTF-8."""
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} line {number} is not UTF-8 (byte {error.start + 1}): convert the file to UTF-8"
            ) from error


def _parse_object(text: str, location: str) -> dict:
    try:
        row = json.loads(text, strict=False)  # strict rejects control characters such as NUL
    except (ValueError, RecursionError) as error:  # ValueError also for huge numbers
        raise InputError(f"{location} is not valid JSON: {error}") from error
    return _checked_object(row, location)


def _checked_object(row, location: str) -> dict:
    if not isinstance(row, dict):
        raise InputError(f"{location} is not a JSON object with named columns")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{location} contains a lone surrogate (half of a character, \\ud800 to \\udfff)"
        ) from error
    return row
