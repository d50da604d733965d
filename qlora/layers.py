"""How the decoder layers run in training: compiled one by one, and how much of each is kept for the backward
pass."""

import logging
from functools import partial

import torch
import torch._functorch.config as partitioner
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
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
    others kept are gone, and one layer's recomputation has their room. With `offload` what they keep waits in
    host memory. `is_random` is drops_out's: what was drawn is then drawn again.

    With `compile` each layer is compiled by itself, all sharing the code of the first of their kind;
    `is_dynamic` is for batches of changing shape. Checkpointed ones then also keep what their attention
    returns, and of the rest compute again only what gradients need: not the last product, whose weight is
    frozen.

    Evaluation and generation run the layers as they are: their shapes are many, and nothing is kept.
    """
    if compile:
        # Computed again in the backward pass, beside what is computed there anyway: the products of
        # elementwise operations on what is kept. By default those that go into a matrix product are kept too.
        partitioner.ban_recompute_materialized_backward = False
        partitioner.ban_recompute_used_far_apart = False
    host = HostActivations() if offload else None
    for number, layer in enumerate(layers):
        plain = train = type(layer).forward.__get__(layer)
        is_checkpointed = number < checkpointed
        if compile:
            forward = _checkpointed.__get__(layer) if is_checkpointed else plain
            train = torch.compile(forward, backend=COMPILER, dynamic=is_dynamic, fullgraph=True)
        elif is_checkpointed:
            # Non-reentrant: the reentrant kind needs an input that requires a gradient.
            train = partial(checkpoint, plain, use_reentrant=False, preserve_rng_state=is_random)
        if is_checkpointed and offload:
            train = partial(_offloaded, train, layer, host)
        layer.forward = _by_mode(train, plain)


def _by_mode(train, plain):
    def forward(*args, **kwargs):
        return (train if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward


def _checkpointed(layer, *args, **kwargs):
    """A layer's forward pass for the compiler, which itself sees to what is computed and drawn again."""
    forward = type(layer).forward
    return checkpoint(forward, layer, *args, use_reentrant=False, context_fn=_all_but_attention, **kwargs)


def _what_is_kept(context, operation, *args, **kwargs) -> CheckpointPolicy:
    """The attention's outputs: as large as the input, and the dearer to compute again the longer the rows.
    PyTorch would also have to restore its random state for it, dropout or not, which CUDA graphs rule out."""
    is_attention = any(word in operation.name() for word in ("attention", "attn"))  # SDPA's, varlen_attn
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


def _all_but_attention():
    return create_selective_checkpoint_contexts(_what_is_kept)


_all_but_attention.cache_hash = "all but attention"  # by which the compiler's cache knows it
# "Please make sure the checkpointed region does not contain in-place ops": only what attention returns is kept,
# and no layer changes that in place.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(
    lambda record: "context_fn is passed" not in record.getMessage()
)


def _offloaded(train, layer, host: "HostActivations", *args, **kwargs):
    """Run a checkpointed layer; of what it keeps, its input and what it made itself go to the host."""
    others = [*tree_leaves((args, kwargs))[1:], *layer.parameters(), *layer.buffers()]
    # Autograd keeps the hooks, which therefore must not hold a tensor.
    pointers = {tensor.data_ptr() for tensor in others if isinstance(tensor, torch.Tensor)}
    kept = KeptByLayer(host)

    def pack(tensor: torch.Tensor):
        is_its_own = tensor.is_floating_point() and tensor.data_ptr() not in pointers
        return kept.keep(tensor) if is_its_own and tensor.numel() else tensor

    def unpack(packed):
        return kept.give_back(packed) if isinstance(packed, int) else packed

    with saved_tensors_hooks(pack, unpack):
        return train(*args, **kwargs)


def drops_out(model) -> bool:
    """Whether the layers draw random numbers in training, by their modules and their configuration."""
    config = model.config.get_text_config().to_dict()
    return any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()) or any(
        "drop" in name and bool(value) for name, value in config.items()
    )


class HostActivations:
    """Holds what checkpointed layers keep in host memory until their backward pass.

    Copies run on a stream of their own: out while the next layer is computed (or the layer itself, of what it
    keeps from its start on), back while the layer after it is in its backward pass. At most two layers'
    tensors are then on the device.
    """

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.last = None  # the layer that was the last to keep something; each knows the one before it


class KeptByLayer:
    """What one run of a layer keeps, in page-locked host memory."""

    def __init__(self, host: HostActivations):
        self.host = host
        self.on_host = []
        self.on_device = []  # the same: while they are copied out, and again once they are being copied back
        self.previous = None
        self.copied = torch.cuda.Event()

    def keep(self, tensor: torch.Tensor) -> int:
        """Begin to copy a tensor out, and let go of those of the layer before; returns its number."""
        if not self.on_host:
            self.previous, self.host.last = self.host.last, self
            if self.previous is not None:
                self.previous.let_go()
        # As it lies in memory: compiled code relies on it.
        self.on_host.append(torch.empty_like(tensor, device="cpu", pin_memory=True))
        self.on_device.append(tensor.detach())
        self._copy(self.on_device[-1], self.on_host[-1])
        return len(self.on_host) - 1

    def let_go(self) -> None:
        """Free the device's memory once the copies are made."""
        # Kernels that come now wait for that; record_stream would leave it to the host to find out, which is
        # far ahead.
        torch.cuda.current_stream().wait_event(self.copied)
        self.on_device = [None] * len(self.on_host)

    def give_back(self, number: int) -> torch.Tensor:
        """A tensor again, and those of the layer before on their way."""
        if self.on_device[number] is None:
            self.fetch()
        torch.cuda.current_stream().wait_event(self.copied)
        tensor, self.on_device[number] = self.on_device[number], None
        self.host.last = self.previous
        if self.previous is not None:
            self.previous.fetch()
        return tensor

    def fetch(self) -> None:
        """Begin to copy back what is not on the device."""
        for number, tensor in enumerate(self.on_host):
            if self.on_device[number] is None:
                self.on_device[number] = torch.empty_like(tensor, device="cuda")
                self._copy(tensor, self.on_device[number])

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.host.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.host.stream):
            target.copy_(source, non_blocking=True)
            self.copied.record(self.host.stream)
