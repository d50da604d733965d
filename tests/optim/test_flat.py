"""Flat parameters: the optimizer sees one vector per group and computes what it would for single
parameters."""

import math

import pytest
import torch

from qlora.errors import InputError
from qlora.optim.flat import FlatParameters
from qlora.optim.optimizer import build_optimizer
from tests.optim.test_optimizer import OPTIMIZERS


def named(*parameters: torch.nn.Parameter) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"weight {number}", parameter) for number, parameter in enumerate(parameters)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_flat_vector_is_updated_like_its_parameters_one_by_one(name):
    """Bit by bit, also for sizes that are not multiples of a block. States of 4,096 elements have 8 bits."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((64, 128), (4097,), (16, 300))]
    gradients = [[torch.randn_like(tensor) for tensor in start] for _ in range(3)]
    flat = FlatParameters([{"params": named(*map(torch.nn.Parameter, (t.clone() for t in start)))}])
    alone = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    groups = [flat.groups, *([{"params": [parameter]}] for parameter in alone)]
    optimizers = [build_optimizer(name, group, (0.9, 0.999), 1e-8) for group in groups]
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_are_updated_like_optimizers_of_their_own(name):
    """Bit by bit: each group has its learning rate and its weight decay."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((64, 128), (4097,), (16, 300))]
    gradients = [[torch.randn_like(tensor) for tensor in start] for _ in range(3)]
    a, b, c = named(*(torch.nn.Parameter(tensor.clone()) for tensor in start))
    flat = FlatParameters(
        [
            {"params": [a, c], "lr_multiple": 1.0, "weight_decay": 0.1},
            {"params": [b], "lr_multiple": 16.0, "weight_decay": 0.0},
        ]
    )
    assert flat.names == ["weight 0", "weight 2", "weight 1"]
    optimizer = build_optimizer(name, flat.groups, (0.9, 0.999), 1e-8)
    alone = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    single = [
        build_optimizer(name, [{"params": [parameter], "weight_decay": decay}], (0.9, 0.999), 1e-8)
        for parameter, decay in zip(alone, (0.1, 0.0, 0.1))
    ]
    for step in gradients:
        for (_, parameter), twin, gradient in zip((a, b, c), alone, step):
            parameter.grad, twin.grad = gradient.clone(), gradient.clone()
        flat.gather_gradients()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group["lr_multiple"]
        for each, multiple in zip(single, (1, 16, 1)):
            each.param_groups[0]["lr"] = 1e-2 * multiple
        for each in (optimizer, *single):
            each.step()
    assert all(torch.equal(parameter, twin) for (_, parameter), twin in zip((a, b, c), alone))


def test_groups_are_clipped_together():
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    flat = FlatParameters([{"params": [pair]} for pair in named(*parameters)])
    parameters[0].grad, parameters[1].grad = torch.full((3,), 2.0), torch.full((2, 2), 1.0)
    flat.gather_gradients()
    norm = flat.clip_grad_norm_(1.0)
    assert norm.item() == pytest.approx(4.0)  # sqrt(3 * 4 + 4 * 1)
    clipped = torch.cat([gradient.flatten() for gradient in flat.gradients()])
    assert clipped.tolist() == pytest.approx([0.5] * 3 + [0.25] * 4, abs=1e-6)


def test_the_norm_is_as_exact_as_that_of_the_parameters():
    """One float32 sum over all squares would be 2e-4 too small here, on the CPU."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(2**16)) for _ in range(128)]
    flat = FlatParameters([{"params": named(*parameters)}])
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    exact = math.sqrt(sum(parameter.grad.double().square().sum().item() for parameter in parameters))
    flat.gather_gradients()
    assert flat.clip_grad_norm_(math.inf).item() == pytest.approx(exact, rel=1e-6)
    flat.clip_grad_norm_(1.0)
    assert flat.vectors[0].grad.double().norm().item() == pytest.approx(1.0, rel=2e-6)


def test_a_parameter_without_a_gradient_counts_as_0():
    flat = FlatParameters(
        [{"params": named(*(torch.nn.Parameter(torch.ones(shape)) for shape in (3, (2, 2))))}]
    )
    flat.parameters[1].grad = torch.full((2, 2), 5.0)
    flat.gather_gradients()
    assert [gradient.tolist() for gradient in flat.gradients()] == [[0, 0, 0], [[5, 5], [5, 5]]]
    assert flat.vectors[0].grad.sum() == 20  # nothing in the gaps


def test_without_any_gradient_all_of_them_count_as_0():
    flat = FlatParameters([{"params": named(torch.nn.Parameter(torch.ones(3)))}])
    flat.gather_gradients()
    assert flat.vectors[0].grad.tolist() == [0.0] * FlatParameters.SLOT


def test_a_parameter_in_two_groups_is_refused_and_pairs_may_come_from_an_iterator():
    pairs = named(torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(InputError, match="in more than one optimizer group: weight 0"):
        FlatParameters([{"params": pairs}, {"params": pairs[:1]}])
    flat = FlatParameters([{"params": (pair for pair in pairs)}])
    assert flat.names == ["weight 0", "weight 1"] and flat.group_sizes == [2 * FlatParameters.SLOT]


def test_a_weight_that_would_silently_not_be_trained_is_an_error():
    first, second = named(torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3)))
    flat = FlatParameters([{"params": [first]}])
    first[1].grad = torch.ones(3)
    flat.check_gradients([first])
    with pytest.raises(InputError, match="weight 1 is in no optimizer group"):
        flat.check_gradients([first, second])
    first[1].grad = None
    with pytest.raises(InputError, match="weight 0 got no gradient in the first step"):
        flat.check_gradients([first])
