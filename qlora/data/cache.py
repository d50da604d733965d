"""Tokens on disk: an entry is a folder of .arrow files, named after its key, published when complete."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import datasets
import tokenizers
import transformers
from datasets import Dataset

SIZES = "sizes.json"  # file name -> bytes, for every part of an entry
UNFINISHED = "unfinished-"
ABANDONED_SECONDS = 24 * 3600  # an unfinished entry this old was left by a killed process


def cache_key(tokenizer, settings: dict, code_files: list[Path]) -> str:
    """A hash of all that the tokens depend on: settings, tokenizer files, code and library versions."""
    versions = [tokenizers.__version__, transformers.__version__]
    digest = hashlib.sha256(json.dumps([settings, versions], sort_keys=True).encode())
    for path in code_files:
        digest.update(path.read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def is_complete(entry: Path) -> bool:
    """Whether an entry exists and all its parts have their size: not lost or truncated since."""
    try:
        sizes = json.loads((entry / SIZES).read_text())
        return sizes == {path.name: path.stat().st_size for path in entry.glob("*.arrow")}
    except (OSError, ValueError):
        return False


def find_entry(cache_folder: Path, key: str) -> Path | None:
    """A complete entry of this key, if there is one."""
    return next((entry for entry in sorted(cache_folder.glob(f"{key}*")) if is_complete(entry)), None)


def load_table(entry: Path) -> Dataset:
    """The table of a complete entry, memory-mapped. Its rows are those of its parts by file name."""
    parts = sorted(str(path) for path in entry.glob("*.arrow"))
    return datasets.concatenate_datasets([Dataset.from_file(part) for part in parts])


@contextmanager
def new_entry(cache_folder: Path, key: str) -> Iterator[tuple[Path, Path]]:
    """Yield (folder to fill with .arrow files, scratch folder), and publish the first under this key.

    It is published by one rename if the block ends without an error, so a kill leaves no partial entry.
    Processes that write the same entry at once each use a folder and a name of their own, and no complete
    entry is ever removed: none can take away what another is about to load. Usually the first to finish
    publishes and the others discard theirs. Raises OSError if nothing can be written.
    """
    cache_folder.mkdir(parents=True, exist_ok=True)
    for folder in cache_folder.glob(f"{UNFINISHED}*"):
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
    for entry in cache_folder.glob(f"{key}*"):
        if not is_complete(entry):  # it was when it was published, so it is damaged
            shutil.rmtree(entry, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=UNFINISHED, dir=cache_folder, ignore_cleanup_errors=True
    ) as staging:
        parts, scratch = Path(staging, "parts"), Path(staging, "scratch")
        parts.mkdir()
        scratch.mkdir()
        yield parts, scratch
        sizes = {path.name: path.stat().st_size for path in parts.iterdir()}
        (parts / SIZES).write_text(json.dumps(sizes))
        if find_entry(cache_folder, key) is None:
            os.rename(parts, cache_folder / f"{key}-{Path(staging).name.removeprefix(UNFINISHED)}")
