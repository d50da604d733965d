"""Atomic, checksummed writes of files and folders, and the lock on a run's folder."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from qlora.errors import InputError, first_line

IS_WINDOWS = os.name == "nt"
MANIFEST = "manifest.json"
STAGED = ".tmp"  # suffix of whatever is incomplete or being deleted
TRIAL = ".trial-checkpoint"
STAGED_NAMES = (
    rf"((checkpoint-\d+|{re.escape(TRIAL)})(\.old)?|adapter|metrics\.jsonl|train_config\.json|\w+\.png)"
)
CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # of a folder: vfat, some network disks


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Be the only run that writes to `folder`. The system releases the lock however the process ends.

    A POSIX lock, because children do not inherit it: a worker that outlives a killed run holds nothing.
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
            f"another run is writing to --output_dir {folder}: wait for it, or choose another folder"
        ) from error
    except OSError as error:
        print(f"--output_dir {folder} cannot be locked ({error.strerror}): make sure to start only one run.")
    try:
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed run was writing or deleting."""
    for path in folder.glob(f"*{STAGED}"):
        if re.fullmatch(rf"{STAGED_NAMES}{STAGED}", path.name):
            with suppress(OSError):  # whatever holds it, a run can do without its space
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_folder(folder: Path, flag: str) -> None:
    """Create a folder unless it exists; raises InputError, naming the `flag`, if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{flag} cannot be written: {error.strerror}") from error


def try_publishing(folder: Path) -> None:
    """Publish and delete a small folder as a checkpoint is, to know before the first step that it works.

    Raises InputError, naming --output_dir, and leaves nothing behind.
    """
    trial = folder / TRIAL
    try:
        with staged(trial) as staging:
            staging.mkdir()
            (staging / "trial").write_text("a file")
            publish_folder(staging, trial)
        problem = damage(trial)
        remove_folder(trial)
    except OSError as error:
        problem = first_line(error)
        shutil.rmtree(trial, ignore_errors=True)
    if problem:
        raise InputError(
            f"--output_dir {folder} cannot hold checkpoints: a trial one could not be written, renamed and "
            f"deleted ({problem}): choose a folder on another file system"
        )


def check_output_file(path: Path) -> None:
    """Raise InputError if an --output_file is a folder, or in a folder that does not exist."""
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--output_file {path} must be a file in an existing folder")


def check_space(folder: Path, needed: int) -> None:
    """Raise OSError if fewer than `needed` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{needed / 2**20:,.0f} MB needed and {free / 2**20:,.0f} MB free", str(folder)
        )


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary path under which to write the future folder `path`. On an error it is deleted."""
    staging = _staging(path)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # its space may be what is missing
        raise


def replace_file(path: Path, text: str) -> None:
    """Replace a file atomically: after a crash or power cut it has its old content or all of the new."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """replace_file() for binary content. A failed write leaves nothing behind."""
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
    """Rename a staged folder to its final name, with a manifest of its files, once all of it is on disk."""
    files = sorted(str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file())
    (staging / MANIFEST).write_text(_manifest(staging, files), encoding="utf-8")
    flush_folder(staging)
    remove_folder(folder)
    os.rename(staging, folder)
    _sync(folder.parent)


def flush_folder(folder: Path) -> None:
    """Flush all files of a folder to disk, readable as the umask says: some writers allow nobody else."""
    mode = _default_mode(folder)
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            path.chmod(mode)
        _sync(path)


def remove_folder(folder: Path) -> None:
    """Delete a folder. Its name is free at once, whatever happens while its files are being deleted."""
    if folder.exists():
        removed = _staging(folder.with_name(folder.name + ".old"))
        shutil.rmtree(removed, ignore_errors=True)
        os.rename(folder, removed)
        shutil.rmtree(removed)


def damage(folder: Path) -> str | None:
    """What is wrong with a published folder; None if every file is as it was written."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        files = json.loads(text)
    except OSError:
        return f"it has no {MANIFEST}"
    except ValueError:
        return f"{MANIFEST} is corrupt"
    for name, digest in files.items() if isinstance(files, dict) else ():
        try:
            if _digest(folder / name) != digest:
                return f"{name} does not match its checksum"
        except OSError:
            return f"{name} is missing"
    # Written again it must be the same to the last byte: no part of it can have changed unnoticed.
    return None if files and text == json.dumps(files, indent=2) + "\n" else f"{MANIFEST} is corrupt"


def _staging(path: Path) -> Path:
    return path.with_name(path.name + STAGED)


def _manifest(folder: Path, files: list[str]) -> str:
    return json.dumps({name: _digest(folder / name) for name in files}, indent=2) + "\n"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _default_mode(folder: Path) -> int:
    """The permissions of a new file in `folder`. (The umask itself can only be read by setting it.)"""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk.

    Where folders cannot be flushed, a rename may be lost in a power cut, but not the content of files.
    """
    is_folder = path.is_dir()
    try:
        # Windows flushes only files that are open for writing, and opens no folders.
        descriptor = os.open(path, os.O_RDWR if IS_WINDOWS else os.O_RDONLY)
    except PermissionError:
        if is_folder and IS_WINDOWS:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in CANNOT_FLUSH:
            raise
    finally:
        os.close(descriptor)
