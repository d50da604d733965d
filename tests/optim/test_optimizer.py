"""The schedule against transformers', the flat vector, and optimizer state as plain tensors."""

import pytest
import torch
from transformers import get_scheduler

from qlora.errors import InputError
from qlora.optim.optimizer import (
    FlatParameters,
    build_optimizer,
    lr_at,
    optimizer_tensors,
    reset_optimizer,
    restore_optimizer,
)


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
    flat = FlatParameters(parameters)
    optimizer = build_optimizer(name, flat.vector, 0.01, (0.9, 0.999), 1e-8)
    optimizer.param_groups[0]["lr"] = 1e-2
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        flat.gather_gradients()
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_state_is_bit_identical(name):
    _, optimizer = trained(name)
    saved = optimizer_tensors(optimizer)
    assert "step" in saved and any(value.numel() == 64 * 128 + 256 for value in saved.values())
    _, other = trained(name, steps=0)
    restore_optimizer(other, saved)
    again = optimizer_tensors(other)
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[key], again[key]) for key in saved)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_reset_optimizer_steps_like_a_new_one(name):
    parameters, optimizer = trained(name, steps=0)
    flat = FlatParameters(parameters)
    optimizer = build_optimizer(name, flat.vector, 0.01, (0.9, 0.999), 1e-8)
    start = flat.vector.detach().clone()
    flat.vector.grad = torch.zeros_like(flat.vector)
    optimizer.step()  # as a rehearsal does: learning rate 0, gradients of 0
    assert torch.equal(flat.vector, start)
    reset_optimizer(optimizer)
    new = build_optimizer(name, torch.nn.Parameter(start.clone()), 0.01, (0.9, 0.999), 1e-8)
    for each in (optimizer, new):
        vector = each.param_groups[0]["params"][0]
        each.param_groups[0]["lr"] = 1e-2
        for seed in range(3):
            vector.grad = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
            each.step()
    want, got = optimizer_tensors(new), optimizer_tensors(optimizer)
    assert torch.equal(flat.vector, new.param_groups[0]["params"][0])
    assert all(torch.equal(want[key], got[key]) for key in want)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_flat_vector_steps_like_its_parameters_one_by_one(name):
    """Bit by bit, also for sizes that are no multiple of a block; states of 4,096 elements have 8 bits."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((64, 128), (4097,), (16, 300))]
    gradients = [[torch.randn_like(tensor) for tensor in start] for _ in range(3)]
    flat = FlatParameters([torch.nn.Parameter(tensor.clone()) for tensor in start])
    alone = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    optimizers = [build_optimizer(name, p, 0.01, (0.9, 0.999), 1e-8) for p in (flat.vector, *alone)]
    for step in gradients:
        for parameters in (flat.parameters, alone):
            for parameter, gradient in zip(parameters, step):
                parameter.grad = gradient.clone()
        flat.gather_gradients()
        assert all(parameter.grad is None for parameter in flat.parameters)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2
            optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(flat.parameters, alone))


def test_a_parameter_without_a_gradient_counts_as_0():
    flat = FlatParameters([torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))])
    flat.parameters[1].grad = torch.full((2, 2), 5.0)
    flat.gather_gradients()
    assert [view.tolist() for view in flat.views(flat.vector.grad)] == [[0, 0, 0], [[5, 5], [5, 5]]]
    assert flat.vector.grad.sum() == 20  # nothing in the gaps


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_optimizers_step_like_adamw(name):
    """32-bit states agree with torch's AdamW; 8-bit ones stay within a tenth of the way the steps can go."""
    (want, _), _ = trained("adamw_torch")
    (got, _), _ = trained(name)
    way = 3 * 1e-2  # steps times learning rate
    difference = (got - want).abs()
    assert difference.max() < (0.1 * way if "8bit" in name else 1e-5)
    assert difference.mean() < (0.01 * way if "8bit" in name else 1e-6)


def test_state_of_another_shape_or_optimizer_is_refused():
    saved = optimizer_tensors(trained("adamw_8bit")[1])
    with pytest.raises(InputError, match="another --optim"):
        restore_optimizer(trained("adamw_torch", steps=0)[1], saved)
    wrong = saved | {"state1": torch.zeros(64, 64, dtype=torch.uint8)}
    with pytest.raises(InputError, match=r"state1 is \(64, 64\)"):
        restore_optimizer(trained("adamw_8bit", steps=0)[1], wrong)


def test_the_paged_optimizer_says_once_on_the_cpu_that_it_does_not_page(capsys, recwarn):
    trained("paged_adamw_8bit")
    assert capsys.readouterr().out.count("does not page on the CPU") == 1
    assert not [warning for warning in recwarn if "aged" in str(warning.message)]
