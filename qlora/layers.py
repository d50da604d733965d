"""How the decoder layers run in training: compiled one by one, and how much of each is kept for the backward
pass."""

from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

COMPILER = "inductor"


def decoder_layers(model) -> list[torch.nn.Module]:
    """The layers that can be checkpointed, in the order in which they run; [] if the model has none."""
    layers, inside = [], set()
    for layer in model.modules():  # outer modules come before what they hold
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
    stream = torch.cuda.Stream() if offload else None
    before = None
    for number, layer in enumerate(layers):
        plain = train = type(layer).forward.__get__(layer)
        if compile:
            train = torch.compile(plain, backend=COMPILER, dynamic=is_dynamic, fullgraph=True)
        if number < checkpointed:
            before = HostInput(stream, before) if offload else None
            train = _checkpointed(train, before, is_random)
        layer.forward = _by_mode(train, plain)


def _by_mode(train, plain):
    def forward(*args, **kwargs):
        return (train if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward


def _checkpointed(forward, host_input: "HostInput | None", is_random: bool):
    # Non-reentrant: the reentrant kind needs an input that requires a gradient.
    again = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=is_random)

    def run(hidden, *args, **kwargs):
        if host_input is None:
            return again(hidden, *args, **kwargs)
        with saved_tensors_hooks(host_input.pack(hidden), host_input.unpack):
            return again(hidden, *args, **kwargs)

    return run


def drops_out(model) -> bool:
    """Whether the layers draw random numbers in training, by their modules and their configuration."""
    config = model.config.get_text_config().to_dict()
    return any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()) or any(
        "drop" in name and bool(value) for name, value in config.items()
    )


class HostInput:
    """Holds the input of one checkpointed layer in page-locked host memory until its backward pass.

    Copies run on a stream of their own: out while the layer is computed, back while the layer after it is
    in its backward pass. `previous` is the HostInput of the layer before.
    """

    def __init__(self, stream: torch.cuda.Stream, previous: "HostInput | None"):
        self.stream, self.previous = stream, previous
        self.copied = torch.cuda.Event()
        self.host = None
        self.on_device = None  # going out: the tensor that is copied; coming back: where it is copied to

    def pack(self, hidden: torch.Tensor):
        """A hook for saved_tensors_hooks that takes `hidden` to the host and leaves other tensors alone."""

        pointer = hidden.data_ptr()  # autograd keeps the hook, which therefore must not hold the tensor

        def take(tensor: torch.Tensor):
            if tensor.data_ptr() != pointer:
                return tensor
            if self.previous is not None:
                self.previous.release()
            if self.host is None or self.host.shape != tensor.shape or self.host.dtype != tensor.dtype:
                self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy(tensor.detach(), self.host)
            self.on_device = tensor.detach()
            return self

        return take

    def release(self) -> None:
        """Let go of the tensor that was copied out. Its memory may be taken once the copy is made: kernels
        that come now wait for that, which record_stream would leave to the host to find out."""
        torch.cuda.current_stream().wait_event(self.copied)
        self.on_device = None

    def fetch(self) -> None:
        """Begin to copy the input back."""
        self.on_device = torch.empty_like(self.host, device="cuda")
        self._copy(self.host, self.on_device)

    def unpack(self, packed):
        """The hook for the backward pass: the input again, and the one before it on its way."""
        if packed is not self:
            return packed
        if self.on_device is None:
            self.fetch()
        torch.cuda.current_stream().wait_event(self.copied)
        hidden, self.on_device = self.on_device, None
        if self.previous is not None:
            self.previous.fetch()
        return hidden

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            self.copied.record(self.stream)
