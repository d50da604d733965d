"""The learning rate as a function of the step, AdamW in 8 and 32 bits, and its state as plain tensors."""

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


def build_optimizer(name: str, parameters, weight_decay: float, betas: tuple[float, float], epsilon: float):
    """AdamW over `parameters`; the learning rate is written into its groups at every step."""
    parameters = list(parameters)
    options = {"lr": 0.0, "betas": betas, "eps": epsilon, "weight_decay": weight_decay}
    if name == "adamw_torch":
        return torch.optim.AdamW(parameters, **options)
    is_paged = name.startswith("paged") and parameters[0].device.type == "cuda"
    if name.startswith("paged") and not is_paged:
        print(f"{name} does not page on the CPU: its states simply stay in host memory.")
    adamw = bnb.optim.AdamW8bit if name.endswith("8bit") else bnb.optim.AdamW32bit
    return adamw(parameters, is_paged=is_paged, **options)


def optimizer_tensors(optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """The optimizer's state as "parameter/state" -> tensor; step counts become tensors of one element.

    `names` are the parameters' names in the optimizer's order. bitsandbytes' quantization maps are constants
    and are left out.
    """
    tensors = {}
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not key.startswith("qmap"):
                tensors[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().clone()
    return tensors


@torch.no_grad()
def restore_optimizer(optimizer, names: list[str], tensors: dict[str, torch.Tensor]) -> None:
    """Put tensors from optimizer_tensors back, bit for bit; raises InputError if names or shapes differ.

    bitsandbytes' own load_state_dict replaces its paged buffers by ordinary ones; here the state is first
    created the way the optimizer does it, then filled, so that paged states stay paged.
    """
    left = dict(tensors)
    for index, (name, parameter) in enumerate(zip(names, _parameters(optimizer), strict=True)):
        saved = {
            key.removeprefix(f"{name}/"): left.pop(key) for key in tensors if key.rpartition("/")[0] == name
        }
        if not saved:  # the optimizer has not seen this parameter yet
            continue
        if isinstance(optimizer, torch.optim.AdamW):
            state = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            optimizer.state[parameter] = state
        else:
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
            state = optimizer.state[parameter]
        expected = {key for key in state if not key.startswith("qmap")}
        if expected != set(saved):
            raise InputError(
                f"the saved optimizer state of {name} has {sorted(saved)}, not {sorted(expected)}: "
                "was it written with another --optim?"
            )
        for key, value in saved.items():
            if key == "step" and not isinstance(state[key], torch.Tensor):
                state[key] = int(value)
            elif state[key].shape != value.shape or state[key].dtype != value.dtype:
                raise InputError(
                    f"the saved optimizer state {name}/{key} is {tuple(value.shape)} {value.dtype}, not "
                    f"{tuple(state[key].shape)} {state[key].dtype}"
                )
            else:
                state[key].copy_(value)
    if left:
        raise InputError(
            f"the saved optimizer state has {next(iter(left))}, which this adapter does not have"
        )


def _parameters(optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
