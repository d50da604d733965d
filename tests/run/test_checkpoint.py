"""Checkpoints: what comes back, what is refused, what is left on the disk."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.errors import InputError
from qlora.model.adapter import ADAPTER
from qlora.model.base import load_tokenizer, trainable_weights
from qlora.optim.optimizer import FlatParameters, build_optimizer
from qlora.run.checkpoint import STATE, find_checkpoint, load_checkpoint, save_checkpoint
from qlora.run.progress import Progress


@pytest.fixture
def trained(run):
    """(model, tokenizer, optimizer, scaler, names, folder) after two steps."""
    model, folder = run("--max_steps 2 --save_steps 1")
    names, parameters = zip(*trainable_weights(model))
    optimizer = build_optimizer("adamw_8bit", FlatParameters(parameters).vector, 0.0, (0.9, 0.999), 1e-8)
    return model, load_tokenizer(str(folder)), optimizer, torch.amp.GradScaler("cpu"), list(names), folder


def save(trained, step: int, keep: int = 0):
    model, tokenizer, optimizer, scaler, names, folder = trained
    return save_checkpoint(
        folder, model, tokenizer, {}, optimizer, scaler, names, Progress(step), {}, {}, keep
    )


def load(trained, checkpoint):
    model, _, optimizer, scaler, names, _ = trained
    return load_checkpoint(checkpoint, model, optimizer, scaler, names)


def test_every_random_state_comes_back(trained):
    def draw():
        return random.random(), random.gauss(), np.random.rand(), np.random.randn(), torch.rand(1).item()

    draw()
    checkpoint = save(trained, 7)
    want = draw()
    draw()
    assert load(trained, checkpoint).step == 7
    assert draw() == want


def test_the_newest_checkpoints_are_kept_and_found(trained):
    folder = trained[-1]
    for step in (9, 10, 11):
        save(trained, step, keep=2)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-11"]
    (folder / "checkpoint-12.tmp").mkdir()  # left by a kill in the middle of a save
    assert find_checkpoint(folder, "latest").name == "checkpoint-11"


def test_weights_in_another_order_are_refused(trained):
    checkpoint = save(trained, 3)
    state = json.loads((checkpoint / STATE).read_text())
    state["parameters"].reverse()
    (checkpoint / STATE).write_text(json.dumps(state))
    with pytest.raises(InputError, match="another order"):
        load(trained, checkpoint)


def test_a_checkpoint_holds_no_pickle(trained):
    checkpoint = save(trained, 3)
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    "change", ["{}", '{"scaler": {}, "python_rng": [3, [1, 2], null], "progress": {}}', "[]", "nonsense"]
)
def test_a_state_of_another_kind_is_one_line(trained, change):
    checkpoint = save(trained, 3)
    (checkpoint / STATE).write_text(change)
    with pytest.raises(InputError, match=r"training_state.json cannot be read"):
        load(trained, checkpoint)


def test_an_adapter_of_another_shape_or_other_layers_is_refused(trained):
    checkpoint = save(trained, 3)
    tensors = load_file(checkpoint / ADAPTER)
    first = next(iter(tensors))
    save_file(tensors | {first: torch.zeros(2, 64)}, checkpoint / ADAPTER)
    with pytest.raises(InputError, match="other shapes"):
        load(trained, checkpoint)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, checkpoint / ADAPTER)
    with pytest.raises(InputError, match="lora_target_modules"):
        load(trained, checkpoint)


def test_the_state_is_readable_json(trained):
    state = json.loads((save(trained, 3) / "training_state.json").read_text())
    assert state["progress"]["step"] == 3
