"""The schedule against transformers', and optimizer state as plain tensors."""

import pytest
import torch
from transformers import get_scheduler

from qlora.errors import InputError
from qlora.optim import build_optimizer, lr_at, optimizer_tensors, restore_optimizer


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total, warmup", [(10, 0), (10, 3), (100, 1), (1, 0), (1, 1), (7, 7), (5, 9)])
def test_lr_at_is_transformers_schedule(schedule, total, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert lr_at(step, total, warmup, 2e-4, schedule) == pytest.approx(
            reference.get_last_lr()[0], abs=1e-18
        )
        optimizer.step()
        reference.step()


def test_lr_at_corners():
    assert lr_at(0, 100, 10, 1.0, "cosine") == 0
    assert lr_at(5, 100, 10, 1.0, "cosine") == 0.5
    assert lr_at(10, 100, 10, 1.0, "cosine") == 1
    assert lr_at(55, 100, 10, 1.0, "cosine") == pytest.approx(0.5)
    assert 0 < lr_at(99, 100, 10, 1.0, "cosine") < 0.001
    assert lr_at(99, 100, 10, 1.0, "linear") == pytest.approx(1 / 90)
    assert lr_at(99, 100, 10, 1.0, "constant") == 1


OPTIMIZERS = ["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch"]


def trained(name: str, steps: int = 3):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 128), (3, 5))]
    optimizer = build_optimizer(name, parameters, 0.01, (0.9, 0.999), 1e-8)
    optimizer.param_groups[0]["lr"] = 1e-2
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_state_is_bit_identical(name):
    _, optimizer = trained(name)
    saved = optimizer_tensors(optimizer, ["large", "small"])
    assert {key.rpartition("/")[0] for key in saved} == {"large", "small"}
    _, other = trained(name, steps=0)
    restore_optimizer(other, ["large", "small"], saved)
    again = optimizer_tensors(other, ["large", "small"])
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[key], again[key]) for key in saved)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_optimizers_step_like_adamw(name):
    """32-bit states agree with torch's AdamW; 8-bit ones stay within a tenth of the way the steps can go."""
    (want, _), _ = trained("adamw_torch")
    (got, _), _ = trained(name)
    way = 3 * 1e-2  # steps times learning rate
    difference = (got - want).abs()
    assert difference.max() < (0.1 * way if "8bit" in name else 1e-5)
    assert difference.mean() < (0.01 * way if "8bit" in name else 1e-6)


def test_state_of_another_shape_optimizer_or_name_is_refused():
    _, optimizer = trained("adamw_8bit")
    saved = optimizer_tensors(optimizer, ["large", "small"])
    _, other = trained("adamw_8bit", steps=0)
    with pytest.raises(InputError, match="does not have"):
        restore_optimizer(other, ["renamed", "small"], saved)
    with pytest.raises(InputError, match="another --optim"):
        restore_optimizer(trained("adamw_torch", steps=0)[1], ["large", "small"], saved)
    wrong = saved | {"large/state1": torch.zeros(64, 64, dtype=torch.uint8)}
    with pytest.raises(InputError, match=r"large/state1 is \(64, 64\)"):
        restore_optimizer(trained("adamw_8bit", steps=0)[1], ["large", "small"], wrong)


def test_the_paged_optimizer_says_once_on_the_cpu_that_it_does_not_page(capsys, recwarn):
    trained("paged_adamw_8bit")
    assert capsys.readouterr().out.count("does not page on the CPU") == 1
    assert not [warning for warning in recwarn if "aged" in str(warning.message)]
