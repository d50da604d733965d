"""The decoder's forward and backward pass as two CUDA graphs: two launches instead of thousands."""

import warnings
import weakref
from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.autograd.function import once_differentiable

from qlora.model.forward import DECODER_INPUTS, hidden_states


class GraphedDecoder:
    """Replays the launches that the decoder made for one batch, for other batches of the same shape.

    Called like hidden_states(), it returns the hidden states (packs, length, d); their backward pass adds to
    the parameters' gradients as the decoder's own does. Whatever the recording does not cover runs through
    the decoder itself: another model or shape, evaluation, another adapter or none, or a second forward pass
    before the backward pass of the first, whose activations a replay would overwrite.

    The hidden states are in memory that the next replay overwrites: clone() what is to outlive a micro-batch.
    Python code inside the decoder, such as a hook, runs only while recording, and hooks on the parameters'
    gradients never.

    The decoder must have run on a batch of that shape before. Raises RuntimeError if the host waits for the
    device while recording, or if an operation cannot be recorded.
    """

    def __init__(
        self, causal_lm, batch: dict[str, torch.Tensor], parameters: list[torch.nn.Parameter], autocast
    ):
        self.causal_lm, self.parameters, self.autocast = causal_lm, parameters, autocast
        self.lora = next(module for module in causal_lm.modules() if isinstance(module, BaseTunerLayer))
        self.adapters = list(self.lora.active_adapters)
        self.batch = {name: tensor.clone() for name, tensor in _inputs(batch).items()}
        # Replayed hidden states must require a gradient, so that autograd calls the backward pass.
        self.anchor = torch.zeros((), device=parameters[0].device, requires_grad=True)
        self.last_replay = None  # a weak reference to the autograd node of the last forward replay

        # Once without recording: a recording that fails because the host waits would leave PyTorch's
        # allocator in recording mode.
        run_without_waiting(self._forward_and_backward)
        self.hidden = self.gradients = None  # the recordings have memory of their own
        self.forward_graph = record(self._forward)
        self.grad_hidden = torch.zeros_like(self.hidden)
        self.backward_graph = record(self._backward, pool=self.forward_graph.pool())

    def _forward(self) -> None:
        with self.autocast():
            self.hidden = hidden_states(self.causal_lm, self.batch)

    def _backward(self) -> None:
        self.gradients = torch.autograd.grad(self.hidden, self.parameters, self.grad_hidden)

    def _forward_and_backward(self) -> None:
        self._forward()
        self.grad_hidden = torch.zeros_like(self.hidden)
        self._backward()

    def __call__(self, causal_lm, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if not self._can_replay(causal_lm, batch):
            return hidden_states(causal_lm, batch)
        for name, tensor in self.batch.items():
            tensor.copy_(batch[name], non_blocking=True)
        self.forward_graph.replay()
        return _Replayed.apply(self.anchor, self)

    def _can_replay(self, causal_lm, batch: dict[str, torch.Tensor]) -> bool:
        is_training = causal_lm is self.causal_lm and causal_lm.training and torch.is_grad_enabled()
        has_adapter = not self.lora.disable_adapters and self.lora.active_adapters == self.adapters
        shapes, recorded_shapes = (
            {name: tensor.shape for name, tensor in inputs.items()} for inputs in (_inputs(batch), self.batch)
        )
        awaits_backward = self.last_replay is not None and self.last_replay() is not None
        return is_training and has_adapter and shapes == recorded_shapes and not awaits_backward

    def replay_backward(self, grad_hidden: torch.Tensor) -> None:
        """Add to the parameters' gradients what follows from the gradient of the hidden states."""
        self.grad_hidden.copy_(grad_hidden)
        self.backward_graph.replay()
        self.last_replay = None
        pairs = list(zip(self.parameters, self.gradients))
        if added := [pair for pair in pairs if pair[0].grad is not None]:
            torch._foreach_add_([parameter.grad for parameter, _ in added], [grad for _, grad in added])
        if new := [pair for pair in pairs if pair[0].grad is None]:
            for parameter, _ in new:  # copies: the next replay writes to the same memory
                parameter.grad = torch.empty_like(parameter)
            torch._foreach_copy_([parameter.grad for parameter, _ in new], [grad for _, grad in new])


def _inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in DECODER_INPUTS if name in batch}


def run_without_waiting(work: Callable[[], None]) -> None:
    """Run `work`; raises RuntimeError where the host would wait for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype": it does not see every wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def record(work: Callable[[], None], pool=None) -> torch.cuda.CUDAGraph:
    """Record the launches of `work`; a replay() then writes its results to the same memory."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    generator = torch.cuda.default_generators[stream.device.index]
    state = generator.clone_state()
    try:
        with torch.cuda.graph(graph, pool=pool):
            work()
    except Exception:
        # PyTorch would stay on the recording's stream and, up to 2.11, lose its random state
        # (pytorch/pytorch issue 171263).
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(state)
        raise
    return graph


class _Replayed(torch.autograd.Function):
    """The hidden states that the forward graph computed; their backward pass replays the backward graph."""

    @staticmethod
    def forward(ctx, anchor, graphed):
        ctx.graphed = graphed
        graphed.last_replay = weakref.ref(ctx)
        return graphed.hidden.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden):
        ctx.graphed.replay_backward(grad_hidden)
        return None, None
