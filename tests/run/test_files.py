"""Atomic, checksummed writes; the lock on a run's folder; leftovers of killed runs."""

import os
import random
import stat
import subprocess
import sys

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
    for name in ("checkpoint-7.tmp", "checkpoint-1.old.tmp", "adapter.tmp", "my-notes.tmp", "checkpoint-x"):
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
