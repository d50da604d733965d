"""Checkpoints: what they restore, what they refuse, what they keep."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.errors import InputError
from qlora.model.adapter import ADAPTER
from qlora.optim.optimizer import create_state, optimizer_tensors
from qlora.run.checkpoint import STATE, Checkpoints, find_checkpoint, list_checkpoints
from tests.results import assert_same
from tests.run.faults import flip_bit


def save(checkpoints: Checkpoints, step: int) -> Path:
    checkpoints.progress.step = step
    checkpoints.mark_boundary()
    assert checkpoints.save(print)
    return checkpoints.folder(step)


def restore(checkpoints: Checkpoints, folder: Path):
    return checkpoints.start(folder, total_steps=1000, validation=None)


def edit_state(folder: Path, **values) -> None:
    state = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps(state | values))


def test_weights_optimizer_and_scaler_are_restored(new_checkpoints):
    saved = new_checkpoints()
    torch.manual_seed(0)
    for parameter in saved.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    saved.optimizer.state[saved.optimizer.param_groups[0]["params"][0]]["state1"].random_(0, 256)
    saved.scaler.load_state_dict(saved.scaler.state_dict() | {"scale": 1024.0})
    folder = save(saved, 7)

    restored = new_checkpoints()
    restore(restored, folder)
    assert_same(dict(restored.model.named_parameters()), dict(saved.model.named_parameters()))
    assert_same(optimizer_tensors(restored.optimizer), optimizer_tensors(saved.optimizer))
    assert restored.scaler.get_scale() == 1024


def test_a_torn_update_is_never_saved(new_checkpoints):
    """Once the optimizer has begun, some weights are those of the next step."""
    checkpoints, messages = new_checkpoints(), []
    checkpoints.progress.step = 7
    checkpoints.mark_boundary()
    create_state(checkpoints.optimizer)
    assert not checkpoints.save(messages.append)
    assert messages == ["step 8 failed in the middle of its update: it cannot be saved"]
    assert not list_checkpoints(checkpoints.output_dir)
    checkpoints.progress.step = 8
    checkpoints.mark_boundary()
    assert checkpoints.save(pytest.fail)


def test_without_a_best_checkpoint_the_last_adapter_stays_and_one_line_says_so(new_checkpoints):
    messages = []
    new_checkpoints().load_best(messages.append)
    assert messages == ["there is no best checkpoint: the adapter is that of the last step"]


def test_the_newest_checkpoints_are_kept_and_the_last_is_found(new_checkpoints):
    checkpoints = new_checkpoints(keep=2)
    for step in (9, 10, 11):
        save(checkpoints, step)
    folder = checkpoints.output_dir
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-11"]
    (folder / "checkpoint-12.tmp").mkdir()  # left by a kill in the middle of a save
    assert find_checkpoint(folder, "latest").name == "checkpoint-11"


def test_latest_in_an_empty_folder_is_a_fresh_start(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None


def test_weights_in_another_order_are_refused(new_checkpoints):
    checkpoints = new_checkpoints()
    folder = save(checkpoints, 3)
    edit_state(folder, parameters=checkpoints.parameter_names[::-1])
    with pytest.raises(InputError, match="another order"):
        restore(checkpoints, folder)


def test_a_checkpoint_contains_no_pickle(new_checkpoints):
    folder = save(new_checkpoints(), 3)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("content", ["{}", '{"scaler": {}, "progress": {}}', "[]", "nonsense"])
def test_an_unreadable_state_is_refused_in_one_line(new_checkpoints, content):
    checkpoints = new_checkpoints()
    folder = save(checkpoints, 3)
    (folder / STATE).write_text(content)
    with pytest.raises(InputError, match=r"training_state.json cannot be read") as error:
        restore(checkpoints, folder)
    assert "\n" not in str(error.value)


def test_a_state_of_another_version_is_refused(new_checkpoints):
    checkpoints = new_checkpoints()
    folder = save(checkpoints, 3)
    edit_state(folder, progress={"steps": 3})
    with pytest.raises(InputError, match="does not fit this version of the code"):
        restore(checkpoints, folder)


def test_an_adapter_of_other_shapes_or_layers_is_refused(new_checkpoints):
    checkpoints = new_checkpoints()
    folder = save(checkpoints, 3)
    tensors = load_file(folder / ADAPTER)
    first = next(iter(tensors))
    save_file(tensors | {first: torch.zeros(2, 64)}, folder / ADAPTER)
    with pytest.raises(InputError, match="other shapes"):
        restore(checkpoints, folder)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, folder / ADAPTER)
    with pytest.raises(InputError, match="lora_target_modules"):
        restore(checkpoints, folder)


def test_the_state_is_readable_json(new_checkpoints):
    state = json.loads((save(new_checkpoints(), 3) / "training_state.json").read_text())
    assert state["progress"]["step"] == 3


class FailingTokenizer:
    """A tokenizer that cannot be saved."""

    def __init__(self, error: Exception):
        self.error = error

    def save_pretrained(self, folder) -> None:
        raise self.error


def test_a_bug_in_saving_is_raised(new_checkpoints):
    """Only what a full disk or memory raises is reported and survived."""
    checkpoints = new_checkpoints(tokenizer=FailingTokenizer(TypeError("not a path")), first_step=3)
    with pytest.raises(TypeError, match="not a path"):
        checkpoints.save(pytest.fail)
    with pytest.raises(TypeError, match="not a path"):
        checkpoints.save_final_adapter(card="")
    assert not any(checkpoints.output_dir.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        MemoryError("no memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
        Exception("IO error"),  # all that the Rust code of `tokenizers` raises
    ],
)
def test_a_save_that_fails_is_reported_and_leaves_nothing_behind(new_checkpoints, error):
    checkpoints = new_checkpoints(tokenizer=FailingTokenizer(error), first_step=3)
    messages = []
    assert not checkpoints.save(messages.append)
    (message,) = messages
    assert message.startswith("step 3: no checkpoint could be saved (") and str(error) in message
    with pytest.raises(InputError) as raised:
        checkpoints.save_final_adapter(card="")
    assert "the adapter could not be saved in " in str(raised.value)
    assert "there is no checkpoint to save it from" in str(raised.value)
    assert "--resume_from_checkpoint" not in str(raised.value)
    assert not any(checkpoints.output_dir.iterdir())


def test_an_adapter_that_cannot_be_saved_names_the_checkpoint_that_has_it(new_checkpoints):
    checkpoints = new_checkpoints()
    save(checkpoints, 3)
    checkpoints.tokenizer = FailingTokenizer(OSError(28, "No space left on device"))
    with pytest.raises(
        InputError, match="--resume_from_checkpoint latest resumes from checkpoint-3 and saves it"
    ):
        checkpoints.save_final_adapter(card="")


def test_the_best_checkpoint_is_kept_beside_the_newest(new_checkpoints):
    checkpoints = new_checkpoints(keep=1)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, 2.0)):
        checkpoints.progress.step = step
        checkpoints.progress.record_best(loss)
        assert checkpoints.save(print)
    names = [path.name for path in list_checkpoints(checkpoints.output_dir)]
    assert names == ["checkpoint-2", "checkpoint-4"]


def test_after_a_failed_save_the_best_is_the_best_one_on_disk(new_checkpoints):
    checkpoints = new_checkpoints()
    tokenizer, full_disk = checkpoints.tokenizer, FailingTokenizer(OSError(28, "No space left on device"))
    progress = checkpoints.progress
    progress.step = 1
    assert progress.record_best(3.0) and checkpoints.save(print)
    progress.step, checkpoints.tokenizer = 2, full_disk
    assert progress.record_best(2.0) and not checkpoints.save(print)
    assert (progress.best_step, progress.best_loss) == (1, 3.0)
    progress.step, checkpoints.tokenizer = 3, tokenizer
    assert checkpoints.save(print)
    # An evaluation that was owed: its step has been saved before it.
    assert progress.record_best(1.0)
    progress.step, checkpoints.tokenizer = 4, full_disk
    assert not checkpoints.save(print)
    assert (progress.best_step, progress.best_loss) == (3, 1.0)


def test_a_corrupt_best_checkpoint_is_not_loaded(new_checkpoints):
    checkpoints, messages = new_checkpoints(), []
    checkpoints.progress.step = 1
    checkpoints.progress.record_best(1.0)
    assert checkpoints.save(print)
    flip_bit(checkpoints.folder(1) / ADAPTER, 500)
    checkpoints.progress.step = 2
    before = {name: tensor.clone() for name, tensor in checkpoints.model.named_parameters()}
    checkpoints.load_best(messages.append)
    assert f"{ADAPTER} does not match its checksum: the adapter is that of the last step" in messages[0]
    assert_same(dict(checkpoints.model.named_parameters()), before)
