"""A run's --output_dir: locked, and checked for an earlier run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora import ranks
from qlora.errors import InputError
from qlora.model.adapter import ADAPTER
from qlora.run.checkpoint import find_checkpoint, list_checkpoints
from qlora.run.files import lock_folder, make_folder, remove_leftovers, try_publishing


@contextmanager
def claim_folder(
    output_dir: Path | None, resume_from: str | None, overwrite: bool, adapter: str | None
) -> Iterator[Path | None]:
    """Lock the folder of a run and yield the checkpoint to resume from, None for a fresh start.

    Only the first rank looks at the folder: the others may not see it. Without a folder, in a run that writes
    nothing, there is nothing to lock. Raises InputError if the folder is not writable, in use, cannot hold
    checkpoints, or holds a run that this one would overwrite unasked. Nothing of an earlier run is deleted
    yet: see Checkpoints.replace_earlier_run().
    """
    if output_dir is None:
        yield None
        return
    if not ranks.is_first():
        yield ranks.from_first(None)
        return
    make_folder(output_dir, f"--output_dir {output_dir}")
    with lock_folder(output_dir):
        remove_leftovers(output_dir)
        checkpoint = find_checkpoint(output_dir, resume_from)
        home = output_dir.resolve()
        earlier = [
            *list_checkpoints(output_dir),
            *output_dir.glob(ADAPTER),
            *output_dir.glob("metrics.jsonl"),
        ]
        resumes_here = resume_from == "latest" or (checkpoint and checkpoint.resolve().parent == home)
        if earlier and not overwrite and not resumes_here:
            raise InputError(
                f"--output_dir {output_dir} holds an earlier run ({earlier[0].name}): resume it with "
                "--resume_from_checkpoint latest, replace it with --overwrite_output_dir, or choose another "
                "folder"
            )
        if overwrite and adapter and Path(adapter).resolve().is_relative_to(home):
            raise InputError(f"--overwrite_output_dir would delete what --adapter {adapter} starts from")
        try_publishing(output_dir)
        yield ranks.from_first(checkpoint)
