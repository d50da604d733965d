"""The decoder's forward and backward pass as two CUDA graphs: two launches instead of thousands."""

import warnings
from collections.abc import Callable

import torch

from qlora.model.forward import decode


class GraphedDecoder:
    """Replays what the decoder did to one batch on other batches of its shape.

    Called in place of attention.decode it returns the hidden states (packs, length, d); their backward pass
    adds to the parameters' gradients as that of the decoder does. A batch of another shape takes the decoder
    itself. Everything must have run before on that shape. Raises RuntimeError if the host waits for the
    device in it, or if something else cannot be recorded.
    """

    def __init__(
        self, causal_lm, batch: dict[str, torch.Tensor], parameters: list[torch.nn.Parameter], autocast
    ):
        self.parameters = parameters
        self.batch = {name: tensor.clone() for name, tensor in _inputs(batch).items()}
        self.anchor = torch.zeros((), device=parameters[0].device, requires_grad=True)

        def forward():
            with autocast():
                self.hidden = decode(causal_lm, self.batch)

        def backward():
            self.gradients = torch.autograd.grad(self.hidden, parameters, self.grad_hidden)

        def both():
            forward()
            self.grad_hidden = torch.zeros_like(self.hidden)
            backward()

        run_without_waiting(both)
        self.hidden = self.gradients = None  # a recording takes their memory once more
        self.forward = record(forward)
        self.backward = record(backward, pool=self.forward.pool())

    def __call__(self, causal_lm, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if not self._fits(batch):
            return decode(causal_lm, batch)
        for name, tensor in self.batch.items():
            tensor.copy_(batch[name], non_blocking=True)
        self.forward.replay()
        return _Replayed.apply(self.anchor, self)

    def _fits(self, batch: dict[str, torch.Tensor]) -> bool:
        shapes = [{name: x.shape for name, x in inputs.items()} for inputs in (_inputs(batch), self.batch)]
        return shapes[0] == shapes[1]

    def replay_backward(self, grad_hidden: torch.Tensor) -> None:
        """Add to the parameters' gradients what follows from that of the hidden states."""
        self.grad_hidden.copy_(grad_hidden)
        self.backward.replay()
        added, new = [], []
        for parameter, gradient in zip(self.parameters, self.gradients):
            (new if parameter.grad is None else added).append((parameter, gradient))
        if added:
            torch._foreach_add_(
                [parameter.grad for parameter, _ in added], [gradient for _, gradient in added]
            )
        if new:  # copies: the next replay writes to the same memory
            for parameter, _ in new:
                parameter.grad = torch.empty_like(parameter)
            torch._foreach_copy_([parameter.grad for parameter, _ in new], [gradient for _, gradient in new])


def _inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a batch goes into the decoder: all but the targets."""
    return {name: tensor for name, tensor in batch.items() if not name.startswith("target")}


def run_without_waiting(work: Callable[[], None]) -> None:
    """Run `work`; raises RuntimeError where the host would wait for the device. A recording would fail there
    too, but leave PyTorch's allocator as if it went on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype": it does not see every wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def record(work: Callable[[], None], pool=None) -> torch.cuda.CUDAGraph:
    """Record the launches of `work`, whose results a replay() then writes to the same memory."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    random = torch.cuda.default_generators[stream.device.index]
    state = random.clone_state()
    try:
        with torch.cuda.graph(graph, pool=pool):
            work()
    except Exception:
        # PyTorch would go on with the recording's stream and, up to 2.11, without random numbers
        # (pytorch/pytorch issue 171263).
        torch.cuda.set_stream(stream)
        random.graphsafe_set_state(state)
        raise
    return graph


class _Replayed(torch.autograd.Function):
    """Hidden states that the forward graph has left, and the backward graph behind them."""

    @staticmethod
    def forward(ctx, anchor, graphed):
        ctx.graphed = graphed
        return graphed.hidden.detach()

    @staticmethod
    def backward(ctx, grad_hidden):
        ctx.graphed.replay_backward(grad_hidden)
        return None, None
