"""A rehearsal of the largest step: the loop's own forward and backward pass on the largest batch."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from qlora import ranks
from qlora.data.batch import BatchShape, to_device, worst_batch
from qlora.errors import first_line
from qlora.model.forward import without_adapter
from qlora.optim.flat import FlatParameters
from qlora.optim.optimizer import create_state, reset_optimizer
from qlora.speed.determinism import unchanged_random_states
from qlora.speed.graphs import GraphedDecoder
from qlora.speed.layers import decoder_layers, has_randomness, set_up_layers
from qlora.speed.memory import is_out_of_memory
from qlora.speed.sharding import forget_failed_pass


@dataclass
class Rehearsal:
    """Takes the largest step that the data can make, to measure what it needs. It leaves no trace."""

    model: torch.nn.Module
    flat: FlatParameters
    optimizer: torch.optim.Optimizer
    train_batch: Callable  # the loop's own forward and backward pass, of (batch, step_targets, hidden_states)
    hidden_states: Callable | None  # see choose_hidden_states
    autocast: Callable
    shape: BatchShape  # of the largest micro-batch
    has_many_micro_batches: bool  # gradients of an earlier micro-batch are then in memory
    compile: bool
    evaluate: Callable[[], object] | None = None  # runs the largest batch of an evaluation
    has_any_shape: bool = False  # compile once for batches of every shape, as is done for padded ones
    rows_per_example: int = 1  # of what --per_device_train_batch_size counts

    @property
    def on_cuda(self) -> bool:
        return self.model.device.type == "cuda"

    @cached_property
    def layers(self) -> list[torch.nn.Module]:
        return decoder_layers(without_adapter(self.model))

    @cached_property
    def is_random(self) -> bool:
        return has_randomness(self.model)

    def set_up(self, checkpointed: int, offload: bool) -> None:
        """Set up the layers with the first `checkpointed` of them checkpointed."""
        is_dynamic = self.has_any_shape or not self.shape.is_packed
        set_up_layers(self.layers, checkpointed, offload, self.compile, is_dynamic, self.is_random)

    def peak_bytes(
        self, checkpointed: int, offload: bool, hidden_states: Callable | None = None
    ) -> int | None:
        """Peak bytes allocated during a step and an evaluation batch; None if memory runs out.

        Of all ranks, the highest peak counts, and an error of one is raised on all. `hidden_states` replaces
        the rehearsal's own. Without CUDA the step runs too, and the result is 0.
        """
        self.set_up(checkpointed, offload)
        peak = None
        try:
            create_state(self.optimizer)  # the loop has it from the second step on
            if self.on_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            with unchanged_random_states(self.model.device):
                self._step(hidden_states or self.hidden_states)
            peak = torch.cuda.max_memory_allocated() if self.on_cuda else 0
        except Exception as error:
            if not is_out_of_memory(error):
                ranks.gather(first_line(error))  # instead of a peak, for which the others wait
                raise
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.model.zero_grad(set_to_none=True)
            reset_optimizer(self.optimizer)
        gc.collect()  # frees what the error's frames hold
        if peak is None:
            forget_failed_pass(self.model)
        peaks = ranks.gather(peak)
        if failures := [peak for peak in peaks if isinstance(peak, str)]:
            raise RuntimeError(failures[0])
        return None if None in peaks else max(peaks)

    def record(self) -> tuple[GraphedDecoder, int]:
        """The decoder as CUDA graphs, and the bytes they hold that PyTorch counts as free."""
        with unchanged_random_states(self.model.device):
            torch.cuda.reset_peak_memory_stats()
            causal_lm = without_adapter(self.model)
            graphed = GraphedDecoder(causal_lm, self._batch(), self.flat.parameters, self.autocast)
        return graphed, torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()

    def _batch(self) -> dict[str, torch.Tensor]:
        vocabulary = self.model.config.get_text_config().vocab_size
        return to_device(worst_batch(self.shape, vocabulary), self.model.device)

    def _step(self, hidden_states: Callable | None) -> None:
        for parameter in self.flat.parameters if self.has_many_micro_batches else []:
            parameter.grad = torch.zeros_like(parameter)
        batch = self._batch()
        self.train_batch(batch, len(batch["target_ids"]), hidden_states)
        self.flat.gather_gradients()
        for vector in self.flat.vectors:
            vector.grad.zero_()  # with the learning rate at 0, the update then changes no weight
        self.optimizer.step()
        if self.evaluate is not None:
            self.optimizer.zero_grad(set_to_none=True)
            self.evaluate()
