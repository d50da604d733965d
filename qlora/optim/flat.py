"""Trained weights end to end in memory, one vector for each optimizer group."""

import torch

from qlora import ranks
from qlora.errors import InputError


class FlatParameters:
    """Lays the trained parameters end to end and gives the optimizer one long vector per group.

    One launch updates a group, instead of one launch per parameter. And bitsandbytes pages only states of
    100,000 elements and more, which few LoRA matrices have. Each parameter becomes a view of the vector that
    starts at a multiple of SLOT elements, so its 8-bit states have the same blocks as without this. (Only a
    parameter of fewer than 4,096 elements would have 32-bit states on its own.)

    `groups` are optimizer groups whose "params" are (name, parameter) pairs. Besides the optimizer's own
    options each has "lr_multiple", by which the loop multiplies the learning rate. The optimizer must be
    elementwise (Adam, SGD, Lion): it never sees a parameter's shape. Raises InputError if a parameter is in
    two groups.
    """

    SLOT = 256  # elements in a block of bitsandbytes' 8-bit optimizers

    def __init__(self, groups: list[dict]):
        groups = [group | {"params": list(group["params"])} for group in groups]
        pairs = [pair for group in groups for pair in group["params"]]
        self.names = [name for name, _ in pairs]
        if repeated := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise InputError(f"in more than one optimizer group: {' '.join(repeated)}")
        self.parameters = [parameter for _, parameter in pairs]
        self.slots = [-(-parameter.numel() // self.SLOT) * self.SLOT for parameter in self.parameters]
        weights = self.parameters[0].new_zeros(sum(self.slots))
        for parameter, view in zip(self.parameters, self._views(weights)):
            parameter.data = view.copy_(parameter.data)
        ranks.copy_from_first_(weights)  # equal gradients keep them equal from now on
        slots = iter(self.slots)
        self.group_sizes = [sum(next(slots) for _ in group["params"]) for group in groups]
        self.vectors = [torch.nn.Parameter(vector) for vector in weights.split(self.group_sizes)]
        self.groups = [group | {"params": [vector]} for group, vector in zip(groups, self.vectors)]

    def gather_gradients(self) -> None:
        """Move the parameters' gradients into the groups' vectors; one that is None counts as 0."""
        gradient = self.vectors[0].new_zeros(sum(self.slots))
        views, gradients = [], []
        for view, parameter in zip(self._views(gradient), self.parameters):
            if parameter.grad is not None:
                views.append(view)
                gradients.append(parameter.grad)
        if views:
            torch._foreach_copy_(views, gradients)  # a few launches for all of them
        for parameter in self.parameters:
            parameter.grad = None
        self.gradient = gradient  # (all slots,) the gradients of all vectors, which are parts of it
        for vector, part in zip(self.vectors, gradient.split(self.group_sizes)):
            vector.grad = part

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale the gathered gradients down to this norm; returns the norm before, () float32 on the device.

        Computed as the norm of per-parameter norms, as clip_grad_norm_ does on separate parameters: one
        float32 sum of the squares of 40 million gradients is 0.3% too small on the CPU.
        """
        norm = torch.nn.utils.get_total_norm(self.gradients())
        torch.nn.utils.clip_grads_with_norm_(self.vectors, max_norm, norm)
        return norm

    def gradients(self) -> list[torch.Tensor]:
        """Each parameter's part of the gathered gradients, in the order of `names`."""
        return self._views(self.gradient)

    def check_gradients(self, trainable: list[tuple[str, torch.nn.Parameter]]) -> None:
        """Raise InputError if a trained weight is in no group, or if the backward pass has not reached it.

        Either way it would silently never be trained. Call it before gather_gradients().
        """
        names = set(self.names)
        for name, _ in trainable:
            if name not in names:
                raise InputError(f"the trainable weight {name} is in no optimizer group")
        unreached = ranks.gather([name for name, parameter in trainable if parameter.grad is None])
        for name in unreached[0]:
            if all(name in others for others in unreached):  # an expert may have had tokens of one rank only
                raise InputError(
                    f"the trainable weight {name} got no gradient in the first step: is its layer ever used?"
                )

    def _views(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """The part of such a vector that belongs to each parameter, in its shape."""
        slots = zip(self.parameters, vector.split(self.slots))
        return [slot[: parameter.numel()].view(parameter.shape) for parameter, slot in slots]
