"""How decoder layers run in training: compiled one by one, checkpointed, offloaded."""

import inspect
import logging
from functools import partial

import torch
import torch._functorch.config as partitioner
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.model.forward import decoder, without_adapter
from qlora.speed.determinism import unchanged_random_states

COMPILER = "inductor"


def decoder_layers(causal_lm) -> list[torch.nn.Module]:
    """The decoder's layers that can be checkpointed, in execution order; [] if there are none."""
    layers, inside = [], set()
    for layer in decoder(causal_lm).modules():  # outer modules come before what they hold
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

    The first `checkpointed` layers keep their input and recompute the rest in the backward pass (arXiv
    1604.06174). The first, because the backward pass reaches them last: the other layers' activations are
    gone by then, and one layer's recomputation fits in their place. With `offload`, what they keep waits in
    host memory.

    With `compile`, each layer is compiled by itself; all share the code of the first of their kind.
    `is_dynamic` is for batches of changing shape. Compiled checkpointed layers also keep what their attention
    returns, and recompute only what gradients need: not the last product if it is only added to the layer's
    input. Without `compile`, `is_random` (see has_randomness) makes the recomputation draw the same random
    numbers.

    Evaluation and generation run the layers as they are: their shapes are many, and nothing is kept.
    """
    if compile:
        # Recompute elementwise operations on what is kept, in the backward pass, where they fuse with other
        # work. By default their results are kept if they feed a matrix product.
        partitioner.ban_recompute_materialized_backward = False
        partitioner.ban_recompute_used_far_apart = False
        # Some layers write what later ones read (Gemma's shared keys and values). Only in the forward pass.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        _keep_attention.cache_hash = inspect.getsource(_policy)  # identifies it in the compiler's cache
        # "Please make sure the checkpointed region does not contain in-place ops": what is kept is only what
        # attention returns, and no layer changes that in place.
        logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_not_about_context_fn)
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
            is_trained = any(weight.requires_grad for weight in layer.parameters())
            train = partial(_offloaded, train, host, layer, is_trained)
        layer.forward = _by_mode(train, plain)


def _by_mode(train, plain):
    def forward(*args, **kwargs):
        return (train if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward


def _checkpointed(layer, *args, **kwargs):
    """A layer's forward pass for the compiler, which recomputes and redraws random numbers on its own."""
    forward = type(layer).forward
    return checkpoint(forward, layer, *args, use_reentrant=False, context_fn=_keep_attention, **kwargs)


def _policy(context, operation, *args, **kwargs) -> CheckpointPolicy:
    """Keep what attention returns: it is as large as the input, and costlier to recompute the longer the
    rows.

    To recompute it, PyTorch would also have to restore its random state, dropout or not, which CUDA graphs
    rule out.
    """
    is_attention = any(word in operation.name() for word in ("attention", "attn"))  # SDPA's, varlen_attn
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_attention():
    return create_selective_checkpoint_contexts(_policy)


def _is_not_about_context_fn(record: logging.LogRecord) -> bool:
    return "context_fn is passed" not in record.getMessage()


def _addresses(tensors: list[torch.Tensor]) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors}


def _offloaded(train, host: "HostActivations", layer, is_trained: bool, *args, **kwargs):
    """Run a checkpointed layer. The floating-point tensors that it keeps go to the host, but for its weights
    and its arguments after the first."""
    inputs = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)]
    if not is_trained and not any(tensor.requires_grad for tensor in inputs):
        return train(*args, **kwargs)  # no backward pass will ask for them
    # Autograd keeps the hooks, so they must not hold a tensor. Sharded weights are elsewhere in each pass.
    others = _addresses([*layer.parameters(), *layer.buffers(), *inputs[1:]])
    kept = KeptByLayer()

    def pack(tensor: torch.Tensor):
        is_its_own = tensor.is_floating_point() and tensor.data_ptr() not in others
        return host.keep(kept, tensor) if is_its_own and tensor.numel() else tensor

    def unpack(packed):
        return packed() if isinstance(packed, partial) else packed

    with saved_tensors_hooks(pack, unpack):
        return train(*args, **kwargs)


@torch.no_grad()
def has_randomness(model) -> bool:
    """Whether the layers draw random numbers in training: dropout, noise in a router, sampled experts.

    Tested by running them, as not all of it stands in a configuration: PhiMoE samples its experts always.
    Dropout is looked up first: it may be in an expert that this run does not reach.
    """
    if any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()):
        return True
    causal_lm, device = without_adapter(model), model.device
    input_ids = torch.arange(8, device=device).unsqueeze(0)
    was_training = causal_lm.training
    with unchanged_random_states(device):
        before = _random_states(device)
        causal_lm.train()
        decoder(causal_lm)(input_ids=input_ids, use_cache=False)
        causal_lm.train(was_training)
        after = _random_states(device)
    return not all(map(torch.equal, before, after))


def _random_states(device: torch.device) -> list[torch.Tensor]:
    """PyTorch's random states, of the CPU and of `device`."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


class KeptByLayer:
    """What one run of a layer keeps for the backward pass."""

    def __init__(self):
        self.on_host = []  # in page-locked memory
        self.on_device = []  # the same tensors while a copy out or back is under way, else None
        self.previous = None  # the run of the layer before this one that kept something
        self.copied = torch.cuda.Event()


class HostActivations:
    """Holds in host memory what checkpointed layers keep, until their backward pass.

    Compiled layers hand over everything at their end, others their input at their start. Copies run on a
    stream of their own: out while the layer itself or the next one is computed, back while the layer after it
    is in its backward pass. So the device holds at most two layers' tensors.
    """

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.last = None  # the last run of a layer that kept something; each knows the one before it

    def keep(self, layer: KeptByLayer, tensor: torch.Tensor) -> partial:
        """Begin to copy a tensor out, and release those of the layer before; returns what gives it back."""
        if not layer.on_host:
            layer.previous, self.last = self.last, layer
            if layer.previous is not None:
                # Their memory may be reused once they are copied. This makes the kernels launched from now on
                # wait for that. record_stream() would leave it to the host, which runs far ahead.
                torch.cuda.current_stream().wait_event(layer.previous.copied)
                layer.previous.on_device = [None] * len(layer.previous.on_host)
        # With the same strides: compiled code relies on them.
        layer.on_host.append(torch.empty_like(tensor, device="cpu", pin_memory=True))
        layer.on_device.append(tensor.detach())
        self._copy(layer, layer.on_device[-1], layer.on_host[-1])
        return partial(self._give_back, layer, len(layer.on_host) - 1)

    def _give_back(self, layer: KeptByLayer, number: int) -> torch.Tensor:
        """A tensor, back on the device. Those of the layer before start on their way."""
        self._fetch(layer, number)
        torch.cuda.current_stream().wait_event(layer.copied)
        tensor, layer.on_device[number] = layer.on_device[number], None
        self.last = layer.previous
        for other in range(len(self.last.on_host)) if self.last is not None else ():
            self._fetch(self.last, other)
        return tensor

    def _fetch(self, layer: KeptByLayer, number: int) -> None:
        if layer.on_device[number] is None:
            layer.on_device[number] = torch.empty_like(layer.on_host[number], device="cuda")
            self._copy(layer, layer.on_host[number], layer.on_device[number])

    def _copy(self, layer: KeptByLayer, source: torch.Tensor, target: torch.Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            layer.copied.record(self.stream)
