"""The objects of a run, built directly on the tiny base."""

import pytest
import torch

from qlora.model.adapter import add_adapter
from qlora.model.base import load_base, trainable_weights
from qlora.optim.flat import FlatParameters
from qlora.optim.optimizer import build_optimizer, create_state
from qlora.run.checkpoint import Checkpoints


@pytest.fixture
def new_checkpoints(base, tokenizer, tmp_path):
    """Build the Checkpoints of a new model, in tmp_path / "out": its optimizer has a state."""
    output_dir = tmp_path / "out"
    output_dir.mkdir()

    def new_checkpoints(keep: int = 0, tokenizer=tokenizer, first_step: int = 0) -> Checkpoints:
        model = add_adapter(
            load_base(base, torch.float32, torch.device("cpu")), 4, 8, 0.0, ["q_proj", "v_proj"],
            use_rslora=False, use_dora=False,
        )  # fmt: skip
        flat = FlatParameters([{"params": trainable_weights(model), "lr_multiple": 1.0}])
        optimizer = build_optimizer("adamw_8bit", flat.groups, (0.9, 0.999), 1e-8)
        create_state(optimizer)
        checkpoints = Checkpoints(
            output_dir, keep, model, tokenizer, optimizer, torch.amp.GradScaler("cpu"), flat.names,
            settings={}, fingerprint={}, config={},
        )  # fmt: skip
        checkpoints.start(None, total_steps=1000, validation=None)
        checkpoints.progress.step = first_step
        return checkpoints

    return new_checkpoints
