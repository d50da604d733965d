"""How the decoder layers run in training: compiled one by one, and how much of each is kept for the backward
pass."""

from functools import partial

import torch
import torch._functorch.config as partitioner
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

COMPILER = "inductor"


def decoder_layers(causal_lm) -> list[torch.nn.Module]:
    """The decoder's layers that can be checkpointed, in the order in which they run; [] if there are none."""
    layers, inside = [], set()
    for layer in causal_lm.get_decoder().modules():  # outer modules come before what they hold
        if isinstance(layer, GradientCheckpointingLayer) and layer not in inside:
            layers.append(layer)
            inside.update(layer.modules())
    return layers


def set_up_layers(
    layers: list[torch.nn.Module],
    checkpointed: int,
    offload: bool = False,
    compile: bool = False,
    is_dynamic: bool = False,
    is_random: bool = True,
) -> None:
    """Decide how the layers run wherever gradients are recorded; may be called again with other choices.

    The first `checkpointed` layers keep only their input and are computed again in the backward pass (arXiv
    1604.06174). The first, because the backward pass comes to them last: by then the activations that the
    others kept are gone, and one layer's recomputation has their room. With `offload` those inputs wait in
    host memory. With `compile` each layer is compiled by itself, all sharing the code of the first of their
    kind; `is_dynamic` for batches of changing shape. `is_random` is drops_out's: what was drawn is then drawn
    again.

    Evaluation and generation run the layers as they are: their shapes are many, and nothing is kept.
    """
    if compile:
        # Computed again in the backward pass, beside what is computed there anyway: the products of
        # elementwise operations on what is kept. By default those that go into a matrix product are kept too.
        partitioner.ban_recompute_materialized_backward = False
        partitioner.ban_recompute_used_far_apart = False
    host = HostInputs() if offload else None
    for number, layer in enumerate(layers):
        plain = train = type(layer).forward.__get__(layer)
        if compile:
            train = torch.compile(plain, backend=COMPILER, dynamic=is_dynamic, fullgraph=True)
        if number < checkpointed:
            train = _checkpointed(train, host, is_random)
        layer.forward = _by_mode(train, plain)


def _by_mode(train, plain):
    def forward(*args, **kwargs):
        return (train if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward


def _checkpointed(forward, host: "HostInputs | None", is_random: bool):
    # Non-reentrant: the reentrant kind needs an input that requires a gradient.
    again = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=is_random)
    return again if host is None else partial(_offloaded, again, host)


def _offloaded(again, host: "HostInputs", hidden: torch.Tensor, *args, **kwargs):
    pointer = hidden.data_ptr()  # autograd keeps the hook, which therefore must not hold the tensor

    def pack(tensor: torch.Tensor):
        return host.keep(tensor) if tensor.data_ptr() == pointer else tensor

    def unpack(packed):
        return host.give_back(packed) if isinstance(packed, HostInput) else packed

    with saved_tensors_hooks(pack, unpack):
        return again(hidden, *args, **kwargs)


def drops_out(model) -> bool:
    """Whether the layers draw random numbers in training, by their modules and their configuration."""
    config = model.config.get_text_config().to_dict()
    return any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()) or any(
        "drop" in name and bool(value) for name, value in config.items()
    )


class HostInput:
    """The input of one checkpointed layer, in page-locked host memory."""

    def __init__(self, hidden: torch.Tensor, previous: "HostInput | None"):
        self.host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
        self.on_device = hidden  # while it is copied out, and again once it is being copied back
        self.previous = previous
        self.copied = torch.cuda.Event()


class HostInputs:
    """Holds the inputs of checkpointed layers in host memory until their backward pass.

    Copies run on a stream of their own: out while the layer is computed, back while the layer after it is in
    its backward pass. At most two inputs are then on the device.
    """

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.last = None  # the input that was kept last; each knows the one before it

    def keep(self, hidden: torch.Tensor) -> HostInput:
        """Begin to copy an input out, and let go of the one before."""
        if self.last is not None:
            # Its memory may be taken once its copy is made. Kernels that come now wait for that;
            # record_stream would leave it to the host to find out, which is far ahead.
            torch.cuda.current_stream().wait_event(self.last.copied)
            self.last.on_device = None
        self.last = kept = HostInput(hidden.detach(), self.last)
        self._copy(kept, kept.on_device, kept.host)
        return kept

    def give_back(self, kept: HostInput) -> torch.Tensor:
        """The input again, and the one before it on its way."""
        self._fetch(kept)
        torch.cuda.current_stream().wait_event(kept.copied)
        hidden, kept.on_device = kept.on_device, None
        self.last = kept.previous
        if self.last is not None:
            self._fetch(self.last)
        return hidden

    def _fetch(self, kept: HostInput) -> None:
        if kept.on_device is None:
            kept.on_device = torch.empty_like(kept.host, device="cuda")
            self._copy(kept, kept.host, kept.on_device)

    def _copy(self, kept: HostInput, source: torch.Tensor, target: torch.Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            kept.copied.record(self.stream)
