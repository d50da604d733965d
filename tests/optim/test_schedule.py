"""The schedule against transformers'."""

import pytest
import torch
from transformers import get_scheduler

from qlora.optim.schedule import Schedule


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total, warmup", [(10, 0), (10, 3), (100, 1), (1, 0), (1, 1), (7, 7), (5, 9)])
def test_the_schedule_matches_transformers(shape, total, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    name = "constant_with_warmup" if shape == "constant" else shape
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        want = pytest.approx(reference.get_last_lr()[0], abs=1e-18)
        assert Schedule(shape, 2e-4, total, warmup).lr_at(step) == want
        optimizer.step()
        reference.step()


def test_the_corners_of_a_schedule():
    cosine, linear, constant = (Schedule(shape, 1.0, 100, 10) for shape in ("cosine", "linear", "constant"))
    assert cosine.lr_at(0) == 0
    assert cosine.lr_at(5) == 0.5
    assert cosine.lr_at(10) == 1
    assert cosine.lr_at(55) == pytest.approx(0.5)
    assert 0 < cosine.lr_at(99) < 0.001
    assert linear.lr_at(99) == pytest.approx(1 / 90)
    assert constant.lr_at(99) == 1
