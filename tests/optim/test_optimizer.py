"""Optimizers, and their state as plain tensors: saved, restored, reset, for any optimizer and any groups."""

import bitsandbytes as bnb
import pytest
import torch

from qlora.errors import InputError
from qlora.optim.flat import FlatParameters
from qlora.optim.optimizer import (
    build_optimizer,
    create_state,
    optimizer_bytes,
    optimizer_tensors,
    reset_optimizer,
    restore_optimizer,
)

OPTIMIZERS = ["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch"]
OTHERS = {  # what a researcher may put in their place
    "lion_8bit": lambda groups: bnb.optim.Lion8bit(groups, lr=1.0, betas=(0.9, 0.99)),
    "torch_sgd": lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9),
    "torch_nadam": lambda groups: torch.optim.NAdam(groups, lr=1.0),  # its state does not start at 0
}
ALL = OPTIMIZERS + list(OTHERS)


def build(name: str, groups: list[dict]):
    if name in OTHERS:
        return OTHERS[name](groups)
    return build_optimizer(name, groups, (0.9, 0.999), 1e-8)


def trained(name: str, steps: int = 3):
    """(FlatParameters of two groups, optimizer) after some steps."""
    torch.manual_seed(0)
    shapes = ((64, 128), (3, 5), (4097,))
    weights = [(f"weight {shape}", torch.nn.Parameter(torch.randn(shape))) for shape in shapes]
    groups = [
        {"params": weights[:2], "lr_multiple": 1.0, "weight_decay": 0.01},
        {"params": weights[2:], "lr_multiple": 4.0, "weight_decay": 0.0},
    ]
    flat = FlatParameters(groups)
    optimizer = build(name, flat.groups)
    step(flat, optimizer, steps)
    return flat, optimizer


def step(flat: FlatParameters, optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in flat.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        flat.gather_gradients()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group["lr_multiple"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def weights(flat: FlatParameters) -> torch.Tensor:
    return torch.cat([vector.detach() for vector in flat.vectors])


@pytest.mark.parametrize("name", ALL)
def test_a_restored_optimizer_continues_bit_by_bit(name):
    flat, optimizer = trained(name)
    saved, start = optimizer_tensors(optimizer), weights(flat).clone()
    assert {key.split("/")[0] for key in saved} == {"0.0", "1.0"}  # both groups
    step(flat, optimizer, 2)
    want, want_state = weights(flat), optimizer_tensors(optimizer)

    other, new = trained(name, steps=0)
    for vector, part in zip(other.vectors, start.split([vector.numel() for vector in other.vectors])):
        vector.data.copy_(part)
    restore_optimizer(new, saved)
    restored = optimizer_tensors(new)
    assert restored.keys() == saved.keys()
    assert all(torch.equal(saved[key], restored[key]) for key in saved)
    assert torch.equal(weights(other), start)  # restoring changes no weight
    step(other, new, 2)
    assert torch.equal(weights(other), want)
    assert all(torch.equal(tensor, optimizer_tensors(new)[key]) for key, tensor in want_state.items())


@pytest.mark.parametrize("name", ALL)
def test_creating_the_state_and_resetting_it_leaves_no_trace(name):
    flat, optimizer = trained(name, steps=0)
    start = weights(flat).clone()
    create_state(optimizer)
    assert torch.equal(weights(flat), start)
    assert optimizer_bytes(optimizer) > sum(vector.nbytes for vector in flat.vectors)
    reset_optimizer(optimizer)
    step(flat, optimizer, 3)
    want, new = trained(name)
    assert torch.equal(weights(flat), weights(want))
    state, want_state = optimizer_tensors(optimizer), optimizer_tensors(new)
    assert all(torch.equal(tensor, state[key]) for key, tensor in want_state.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_choices_of_optim_are_adamw(name):
    """32-bit states agree with torch's AdamW; 8-bit ones stay within a tenth of how far the steps can go."""
    want, _ = trained("adamw_torch")
    got, _ = trained(name)
    reach = 3 * 1e-2 * 4  # steps times the largest learning rate
    difference = (weights(got) - weights(want)).abs()
    assert difference.max() < (0.1 * reach if "8bit" in name else 1e-5)
    assert difference.mean() < (0.01 * reach if "8bit" in name else 1e-6)


def test_state_of_another_optimizer_group_or_shape_is_refused():
    saved = optimizer_tensors(trained("adamw_8bit")[1])
    with pytest.raises(InputError, match="another --optim"):
        restore_optimizer(trained("adamw_torch", steps=0)[1], saved)
    one_group = {key: tensor for key, tensor in saved.items() if key.startswith("0.")}
    with pytest.raises(InputError, match="other optimizer groups"):
        restore_optimizer(trained("adamw_8bit", steps=0)[1], one_group)
    wrong = saved | {"0.0/state1": torch.zeros(64, 64, dtype=torch.uint8)}
    with pytest.raises(InputError, match=r"0\.0/state1 is \(64, 64\)"):
        restore_optimizer(trained("adamw_8bit", steps=0)[1], wrong)


def test_state_saved_before_the_first_update_restores_to_none():
    _, optimizer = trained("adamw_8bit")
    restore_optimizer(optimizer, {})
    assert not any(tensor.any() for tensor in optimizer_tensors(optimizer).values())


def test_the_paged_optimizer_says_once_on_the_cpu_that_it_does_not_page(capsys, recwarn):
    trained("paged_adamw_8bit")
    assert capsys.readouterr().out.count("does not page on the CPU") == 1
    assert not [warning for warning in recwarn if "aged" in str(warning.message)]
