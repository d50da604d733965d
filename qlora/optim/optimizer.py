"""The learning rate as a function of the step, AdamW over one flat vector, and its state as plain tensors."""

import math

import bitsandbytes as bnb
import torch

from qlora.errors import InputError


def lr_at(step: int, total_steps: int, warmup_steps: int, peak: float, schedule: str) -> float:
    """Learning rate of optimizer step `step`, 0 <= step < total_steps.

    Linear warm-up from 0, then cosine or linear decay that would reach 0 at `total_steps`, or a constant. A
    pure function: a resume has nothing to restore, and a skipped step cannot put it out of order. The values
    are those of transformers.get_scheduler.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return peak * (1 - progress)
    return peak


class FlatParameters:
    """Parameters laid end to end in one vector, which the optimizer steps as a whole.

    One launch instead of one a parameter, one norm to clip by; and bitsandbytes pages only states of 100,000
    elements and more, which few LoRA matrices have. Each parameter becomes a view of the vector at a multiple
    of SLOT elements, so that the blocks of 8-bit states hold what they would hold without it. (Alone, one of
    fewer than 4,096 elements would have 32-bit states.)
    """

    SLOT = 256  # elements of a block of bitsandbytes' 8-bit optimizers

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.parameters = list(parameters)
        self.sizes = [-(-parameter.numel() // self.SLOT) * self.SLOT for parameter in self.parameters]
        self.vector = torch.nn.Parameter(self.parameters[0].new_zeros(sum(self.sizes)))
        for parameter, view in zip(self.parameters, self.views(self.vector.data)):
            parameter.data = view.copy_(parameter.data)

    def views(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """The part of such a vector that belongs to each parameter, in its shape."""
        slots = zip(self.parameters, vector.split(self.sizes))
        return [slot[: parameter.numel()].view(parameter.shape) for parameter, slot in slots]

    def gather_gradients(self) -> None:
        """Move the parameters' gradients into that of the vector; one that has none counts as 0."""
        self.vector.grad = torch.zeros_like(self.vector)
        pairs = [
            (view, parameter.grad)
            for view, parameter in zip(self.views(self.vector.grad), self.parameters)
            if parameter.grad is not None
        ]
        torch._foreach_copy_(*map(list, zip(*pairs)))  # a few launches for all
        for parameter in self.parameters:
            parameter.grad = None


def build_optimizer(
    name: str, vector: torch.nn.Parameter, weight_decay: float, betas: tuple[float, float], epsilon: float
):
    """AdamW over FlatParameters' vector; the learning rate is written into its group at every step."""
    options = {"lr": 0.0, "betas": betas, "eps": epsilon, "weight_decay": weight_decay}
    if name == "adamw_torch":
        return torch.optim.AdamW([vector], **options)
    is_paged = name.startswith("paged") and vector.device.type == "cuda"
    if name.startswith("paged") and not is_paged:
        print(f"{name} does not page on the CPU: its states simply stay in host memory.")
    adamw = bnb.optim.AdamW8bit if name.endswith("8bit") else bnb.optim.AdamW32bit
    return adamw([vector], is_paged=is_paged, **options)


def optimizer_tensors(optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by name, on the CPU; the step count becomes a tensor of one element.

    bitsandbytes' quantization maps are constants and are left out.
    """
    return {
        name: torch.as_tensor(value).detach().cpu().clone()
        for name, value in optimizer.state.get(_vector(optimizer), {}).items()
        if not name.startswith("qmap")
    }


def optimizer_bytes(optimizer) -> int:
    """Bytes of the vector and of the optimizer's state."""
    vector = _vector(optimizer)
    state = optimizer.state.get(vector, {}).values()
    return vector.nbytes + sum(value.nbytes for value in state if isinstance(value, torch.Tensor))


@torch.no_grad()
def restore_optimizer(optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put tensors from optimizer_tensors back, bit for bit; raises InputError if names or shapes differ.

    bitsandbytes' own load_state_dict replaces its paged buffers by ordinary ones; here the state is created
    the way the optimizer does it, then filled, so that paged states stay paged.
    """
    state = reset_optimizer(optimizer)
    if not tensors:  # no step was taken yet
        return
    expected = {name for name in state if not name.startswith("qmap")}
    if expected != set(tensors):
        raise InputError(
            f"the saved optimizer state has {sorted(tensors)}, not {sorted(expected)}: was it written with "
            "another --optim?"
        )
    for name, value in tensors.items():
        if name == "step" and not isinstance(state[name], torch.Tensor):
            state[name] = int(value)
        elif state[name].shape != value.shape or state[name].dtype != value.dtype:
            raise InputError(
                f"the saved optimizer state {name} is {tuple(value.shape)} {value.dtype}, not "
                f"{tuple(state[name].shape)} {state[name].dtype}"
            )
        else:
            state[name].copy_(value)


@torch.no_grad()
def reset_optimizer(optimizer) -> dict:
    """Make the optimizer's state that of before its first step, in the memory it has; returns it."""
    vector = _vector(optimizer)
    state = optimizer.state[vector]
    if not state and isinstance(optimizer, torch.optim.AdamW):
        state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(vector)}
        state |= {"exp_avg_sq": torch.zeros_like(vector)}
    elif not state:
        optimizer.init_state(optimizer.param_groups[0], vector, 0, 0)
    for name, value in state.items():
        if name == "step" and not isinstance(value, torch.Tensor):
            state[name] = 0
        elif not name.startswith("qmap"):
            value.zero_()
    return state


def _vector(optimizer) -> torch.nn.Parameter:
    return optimizer.param_groups[0]["params"][0]
