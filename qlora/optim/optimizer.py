"""The optimizer, and its state as plain tensors that a checkpoint can hold."""

from collections.abc import Iterator

import bitsandbytes as bnb
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit  # the base class of all their optimizers

from qlora.errors import InputError


def lora_groups(trainable: list[tuple], weight_decay: float, loraplus_lr_ratio: float = 1.0) -> list[dict]:
    """Groups for FlatParameters of the (name, parameter) pairs: one or, with a ratio other than 1, two.

    LoRA+ (arXiv 2402.12354) trains the B matrices at `loraplus_lr_ratio` times the learning rate of the rest.
    """
    if loraplus_lr_ratio == 1:
        return [{"params": trainable, "lr_multiple": 1.0, "weight_decay": weight_decay}]
    b_matrices = [pair for pair in trainable if ".lora_B." in pair[0]]
    others = [pair for pair in trainable if ".lora_B." not in pair[0]]
    return [
        {"params": others, "lr_multiple": 1.0, "weight_decay": weight_decay},
        {"params": b_matrices, "lr_multiple": loraplus_lr_ratio, "weight_decay": weight_decay},
    ]


def build_optimizer(name: str, groups: list[dict], betas: tuple[float, float], epsilon: float):
    """AdamW over FlatParameters' groups. The learning rate is 0 until the loop writes one into each group.

    A group without a weight decay of its own has none.
    """
    options = {"lr": 0.0, "betas": betas, "eps": epsilon, "weight_decay": 0.0}
    if name == "adamw_torch":
        return torch.optim.AdamW(groups, **options)
    on_cuda = groups[0]["params"][0].device.type == "cuda"
    if name.startswith("paged") and not on_cuda:
        print(f"{name} does not page on the CPU: its states simply stay in host memory.")
    adamw = bnb.optim.AdamW8bit if name.endswith("8bit") else bnb.optim.AdamW32bit
    return adamw(groups, is_paged=name.startswith("paged") and on_cuda, **options)


def optimizer_tensors(optimizer) -> dict[str, torch.Tensor]:
    """The state of every parameter in every group, on the CPU, by "group.parameter/name".

    Numbers become tensors of one element. bitsandbytes' quantization maps are constants and are left out.
    """
    return {
        f"{place}/{name}": torch.as_tensor(value).detach().cpu().clone()
        for place, parameter in _parameters(optimizer)
        for name, value in optimizer.state.get(parameter, {}).items()
        if not name.startswith("qmap")
    }


def optimizer_bytes(optimizer) -> int:
    """Bytes of the trained weights and of the optimizer's state."""
    total = 0
    for _, parameter in _parameters(optimizer):
        state = optimizer.state.get(parameter, {}).values()
        total += parameter.nbytes + sum(value.nbytes for value in state if isinstance(value, torch.Tensor))
    return total


@torch.no_grad()
def create_state(optimizer) -> None:
    """Have the optimizer allocate its state, in its own way, by a step that changes no weight.

    The step is at learning rate 0 over gradients of 0.
    """
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def reset_optimizer(optimizer) -> None:
    """Return to the state before the first step. bitsandbytes' buffers stay: paged ones are never freed."""
    for _, parameter in _parameters(optimizer):
        if not isinstance(optimizer, Optimizer8bit):
            optimizer.state.pop(parameter, None)
            continue
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if name == "step":
                state[name] = 0
            elif not name.startswith("qmap"):
                value.zero_()


@torch.no_grad()
def restore_optimizer(optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what optimizer_tensors() returned, bit for bit; raises InputError if names or shapes differ.

    The state is created first, then filled: bitsandbytes' own load_state_dict would replace paged buffers
    with ordinary ones.
    """
    if not tensors:  # saved before the first update
        reset_optimizer(optimizer)
        return
    create_state(optimizer)
    expected = optimizer_tensors(optimizer)
    if expected.keys() != tensors.keys():
        raise InputError(
            f"the saved optimizer state has {' '.join(sorted(tensors))}, not {' '.join(sorted(expected))}: "
            "was it saved with another --optim or other optimizer groups?"
        )
    for name, value in tensors.items():
        if expected[name].shape != value.shape or expected[name].dtype != value.dtype:
            raise InputError(
                f"the saved optimizer state {name} is {tuple(value.shape)} {value.dtype}, not "
                f"{tuple(expected[name].shape)} {expected[name].dtype}"
            )
    for place, parameter in _parameters(optimizer):
        state = optimizer.state[parameter]
        for name in [name for name in state if f"{place}/{name}" in tensors]:
            value = tensors[f"{place}/{name}"]
            if isinstance(state[name], torch.Tensor):
                state[name].copy_(value)
            else:  # a step count
                state[name] = value.item()


def _parameters(optimizer) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """("group.number", parameter) of every parameter in every group."""
    for group_number, group in enumerate(optimizer.param_groups):
        for number, parameter in enumerate(group["params"]):
            yield f"{group_number}.{number}", parameter
