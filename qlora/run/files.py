"""Files and folders that appear whole or not at all, and are what they were when they were written."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from qlora.errors import InputError

MANIFEST = "manifest.json"
STAGED = ".tmp"  # ends the name of whatever is not complete, or no longer wanted
STAGED_NAMES = r"(checkpoint-\d+(\.old)?|adapter|metrics\.jsonl|train_config\.json|\w+\.png)"
_UMASK = os.umask(0)  # can only be read by setting it
os.umask(_UMASK)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Be the one run that writes to `folder`. The system lets go of the lock however the process ends.

    POSIX locks, because children do not inherit them: a worker that outlives a killed run holds nothing.
    """
    path = folder / ".lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise InputError(f"the lock {path} cannot be opened: {error.strerror}") from error
    try:
        if fcntl is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        os.close(descriptor)
        raise InputError(
            f"--output_dir {folder} is being written by another run: wait for it, or give another folder"
        ) from error
    except OSError as error:
        print(f"--output_dir {folder} cannot be locked ({error.strerror}): take care to run only once.")
    try:
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed run had begun to write or to delete."""
    for path in folder.glob(f"*{STAGED}"):
        if re.fullmatch(rf"{STAGED_NAMES}{STAGED}", path.name):
            with suppress(OSError):  # whatever holds it, a run can do without its room
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_folder(folder: Path, what: str) -> None:
    """Make a folder unless it is there; raises InputError, naming `what`, if nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{what} cannot be written: {error.strerror}") from error


def check_output_file(path: Path) -> None:
    """Raise InputError if an --output_file cannot be one: a folder, or in none."""
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--output_file {path} must be a file in a folder that is there")


def check_space(folder: Path, needed: int) -> None:
    """Raise OSError if less than `needed` bytes are free where `folder` is."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{needed / 2**20:,.0f} MB needed and {free / 2**20:,.0f} MB free", str(folder)
        )


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A free name under which to write what will be the folder `path`; what stands there goes on an error."""
    staging = _staging(path)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # its room may be what is missing
        raise


def replace_file(path: Path, text: str) -> None:
    """Write a file that has its old content until it has all of the new one, also after a power cut."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """replace_file() for what is not text. What could not be written whole leaves nothing behind."""
    staging = _staging(path)
    try:
        staging.write_bytes(content)
        _sync(staging)
        os.replace(staging, path)
    except BaseException:
        with suppress(OSError):
            staging.unlink()
        raise
    _sync(path.parent)


def publish_folder(staging: Path, folder: Path) -> None:
    """Give a staged folder its name, with a manifest of its files, once all of it is on the disk."""
    files = sorted(str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file())
    (staging / MANIFEST).write_text(_manifest(staging, files), encoding="utf-8")
    make_durable(staging)
    remove_folder(folder)
    os.rename(staging, folder)
    _sync(folder.parent)


def make_durable(folder: Path) -> None:
    """Have all files of a folder on the disk, readable as the umask says: some writers allow nobody else."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            path.chmod(0o666 & ~_UMASK)
        _sync(path)


def remove_folder(folder: Path) -> None:
    """Delete a folder, which stops being there under its name at once."""
    if folder.exists():
        removed = _staging(folder.with_name(folder.name + ".old"))
        shutil.rmtree(removed, ignore_errors=True)
        os.rename(folder, removed)
        shutil.rmtree(removed)


def damage(folder: Path) -> str | None:
    """What of a published folder is not as it was written; None if all is."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        files = json.loads(text)
    except OSError:
        return f"it has no {MANIFEST}"
    except ValueError:
        return f"{MANIFEST} is damaged"
    for name, written in files.items() if isinstance(files, dict) else ():
        try:
            if _digest(folder / name) != written:
                return f"{name} does not have its checksum"
        except OSError:
            return f"{name} is missing"
    # Written anew it is the same to the last byte: no part of it can have changed unseen.
    return None if files and text == json.dumps(files, indent=2) + "\n" else f"{MANIFEST} is damaged"


def _staging(path: Path) -> Path:
    return path.with_name(path.name + STAGED)


def _manifest(folder: Path, files: list[str]) -> str:
    return json.dumps({name: _digest(folder / name) for name in files}, indent=2) + "\n"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
