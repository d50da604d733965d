"""Atomic, checksummed writes; the lock on a run's folder; leftovers of killed runs."""

import errno
import os
import random
import stat
import subprocess
import sys
from contextlib import contextmanager

import pytest

import qlora.run.files
from qlora.errors import InputError
from qlora.model.adapter import ADAPTER
from qlora.run.checkpoint import STATE, STATE_TENSORS
from qlora.run.files import (
    MANIFEST,
    check_space,
    damage,
    flush_folder,
    lock_folder,
    publish_folder,
    remove_folder,
    replace_file,
    staged,
    try_publishing,
)
from tests.conftest import ROOT
from tests.run.faults import flip_bit


def test_every_flipped_bit_and_every_truncation_is_detected(run):
    _, folder = run("--max_steps 1")
    checkpoint, draw = folder / "checkpoint-1", random.Random(0)
    assert damage(checkpoint) is None
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert {ADAPTER, STATE, STATE_TENSORS, MANIFEST, "tokenizer.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        positions = range(len(content))
        for position in positions if path.name == MANIFEST else draw.sample(positions, 40):
            flip_bit(path, position, draw.randrange(8))
            assert damage(checkpoint) if path.name == MANIFEST else path.name in damage(checkpoint)
            path.write_bytes(content)
        for length in [0, len(content) - 1, *draw.sample(positions, 5)]:
            path.write_bytes(content[:length])
            assert path.name in damage(checkpoint)
        path.unlink()
        assert path.name in damage(checkpoint)
        path.write_bytes(content)
    assert damage(checkpoint) is None


def test_a_published_folder_replaces_the_one_before(tmp_path):
    for text in ("old", "new"):
        with staged(tmp_path / "checkpoint-1") as staging:
            staging.mkdir()
            (staging / "file").write_text(text)
            publish_folder(staging, tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "file").read_text() == "new"
    assert damage(tmp_path / "checkpoint-1") is None
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    remove_folder(tmp_path / "checkpoint-1")
    assert not os.listdir(tmp_path)


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(qlora.run.files, "_sync", fail)
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "file", "new")
    with pytest.raises(OSError, match="No space left"), staged(tmp_path / "checkpoint-1") as staging:
        staging.mkdir()
        publish_folder(staging, tmp_path / "checkpoint-1")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


@contextmanager
def folders_refused(monkeypatch, name: str, error: OSError):
    """os.open() or os.fsync() of a folder fails with `error`, as on some file systems."""
    call = getattr(os, name)

    def refuse_folders(target, *arguments):
        if os.path.isdir(target):  # a path or a descriptor
            raise error
        return call(target, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refuse_folders)
        yield patch


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])  # EOPNOTSUPP is the same on Linux
def test_a_file_system_that_cannot_flush_folders_keeps_checkpoints_and_resumes(run, monkeypatch, number):
    with folders_refused(monkeypatch, "fsync", OSError(number, os.strerror(number))):
        run("--max_steps 1")
        _, folder = run("--max_steps 2 --allow_changes max_steps --resume_from_checkpoint latest")
    assert [damage(folder / f"checkpoint-{step}") for step in (1, 2)] == [None, None]
    assert (folder / ADAPTER).exists()


def test_other_errors_of_flushing_count(tmp_path, monkeypatch):
    with folders_refused(monkeypatch, "fsync", OSError(errno.EIO, "Input/output error")):
        with pytest.raises(OSError, match="Input/output error"):
            replace_file(tmp_path / "file", "new")

    def refuse_files(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse_files)
    with pytest.raises(OSError, match="Invalid argument"):
        replace_file(tmp_path / "file", "new")


def test_windows_cannot_open_folders_to_flush_them(tmp_path, monkeypatch):
    with folders_refused(monkeypatch, "open", PermissionError(errno.EACCES, "Permission denied")) as patch:
        with pytest.raises(PermissionError):
            replace_file(tmp_path / "file", "new")
        patch.setattr(qlora.run.files, "IS_WINDOWS", True)
        replace_file(tmp_path / "file", "new")
        with staged(tmp_path / "checkpoint-1") as staging:
            staging.mkdir()
            publish_folder(staging, tmp_path / "checkpoint-1")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "file"]


@pytest.mark.parametrize("name", ["fsync", "rename", "chmod"])
def test_a_file_system_that_cannot_publish_is_refused_before_the_data_is_read(
    run, tmp_path, monkeypatch, name
):
    def fail(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("train.load_data", lambda config: pytest.fail("read"))
    with monkeypatch.context() as patch, pytest.raises(InputError) as error:
        patch.setattr(os, name, fail)
        run("--max_steps 1")
    assert str(error.value) == (
        f"--output_dir {tmp_path / 'out'} cannot hold checkpoints: a trial one could not be written, renamed "
        "and deleted ([Errno 1] Operation not permitted): choose a folder on another file system"
    )
    assert os.listdir(tmp_path / "out") == [".lock"]


def test_a_file_system_that_does_not_keep_what_is_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(qlora.run.files, "flush_folder", lambda folder: (folder / "trial").write_text("lost"))
    with pytest.raises(InputError, match=r"renamed and deleted \(trial does not match its checksum\)"):
        try_publishing(tmp_path)
    assert not os.listdir(tmp_path)


@pytest.fixture
def umask():
    """A umask of 027 during a test: new files get the mode 640."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_all_files_of_a_run_get_the_permissions_of_the_umask(run, umask):
    _, folder = run("--max_steps 1")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert folder / ADAPTER in files and folder / "checkpoint-1" / STATE_TENSORS in files
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


def test_flushing_a_folder_leaves_no_file_behind(tmp_path):
    (tmp_path / "file").touch(mode=0o600)  # some writers allow nobody else
    flush_folder(tmp_path)
    assert os.listdir(tmp_path) == ["file"]
    (tmp_path / "new").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_only_leftovers_of_a_killed_run_are_deleted(run):
    _, folder = run("--max_steps 1")
    for name in (
        "checkpoint-7.tmp", "checkpoint-1.old.tmp", "adapter.tmp", "my-notes.tmp", "checkpoint-x",
        ".trial-checkpoint", ".trial-checkpoint.tmp", ".trial-checkpoint.old.tmp",
    ):  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "a").write_text("")
    (folder / "metrics.jsonl.tmp").write_text("")
    run("--max_steps 1 --resume_from_checkpoint latest")
    left = {path.name for path in folder.iterdir() if path.is_dir() or path.suffix == ".tmp"}
    assert left == {"checkpoint-1", "my-notes.tmp", "checkpoint-x"}


def test_a_second_run_in_the_same_folder_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    script = f"""
import time
from pathlib import Path
from qlora.run.files import lock_folder
with lock_folder(Path({str(tmp_path / "out")!r})):
    print("locked", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(InputError, match="another run is writing to --output_dir"):
        run("--max_steps 1")
    holder.kill()
    holder.wait()
    run("--max_steps 1")  # the lock of a dead process is released


def test_a_lock_that_cannot_be_opened_is_reported(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(InputError, match=r"the lock .*\.lock cannot be opened: Is a directory"):
        with lock_folder(tmp_path):
            pytest.fail("locked")


def test_too_little_disk_space_is_an_error(tmp_path):
    check_space(tmp_path, needed=1)
    with pytest.raises(OSError, match=r"MB needed and .* MB free"):
        check_space(tmp_path, needed=2**60)
