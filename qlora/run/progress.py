"""How far a run is, and what it has seen of its losses. Stored whole in every checkpoint."""

import math
from dataclasses import dataclass


@dataclass
class Progress:
    step: int = 0  # optimizer steps done; with the seed, this alone says which rows come next ...
    place: dict | None = None  # ... but with --streaming, where the Place of the last step is needed too
    epochs: float = 0.0
    tokens_seen: int = 0  # without padding
    skipped_steps: int = 0  # steps that were not taken because their loss or gradient was not finite
    skipped_in_a_row: int = 0
    owes_evaluation: bool = False  # the one of this step was left early
    best_loss: float | None = None  # the lowest of the evaluations ...
    best_step: int | None = None  # ... and the step that it was after
    validation: str | None = None  # the fingerprint of the rows of those evaluations
    loss_spikes: int = 0
    usual_loss: float = 0.0  # running means of the loss and of its distance from that
    usual_distance: float = 0.0
    window_steps: int = 0  # from here on: the sums that the next log line averages
    window_loss: float = 0.0
    window_tokens: int = 0
    window_seconds: float = 0.0
    window_waited: float = 0.0  # seconds of them in which a step waited for its data

    def record(self, loss: float | None, tokens: int, seconds: float, waited: float) -> bool:
        """Count one finished step, `loss` None if it was skipped; returns whether the loss is a spike."""
        self.window_waited += waited
        self.step += 1
        self.tokens_seen += tokens
        self.window_tokens += tokens
        self.window_seconds += seconds
        if loss is None:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            return False
        self.skipped_in_a_row = 0
        self.window_steps += 1
        self.window_loss += loss
        return self._watch(loss)

    def _watch(self, loss: float) -> bool:
        """Whether a loss stands out: by 6 times the usual distance and a fifth, after 20 steps."""
        taken = self.step - self.skipped_steps
        distance = loss - self.usual_loss
        is_spike = taken > 20 and distance > max(6 * self.usual_distance, 0.2 * self.usual_loss)
        weight = max(1 / taken, 0.05)  # of the newest: a plain mean at first, then over about 20 steps
        self.usual_loss += weight * distance
        self.usual_distance += weight * (abs(distance) - self.usual_distance) if taken > 1 else 0.0
        self.loss_spikes += is_spike
        return is_spike

    def is_best(self, eval_loss: float) -> bool:
        """Note an evaluation after the last step; whether none before had so low a loss."""
        if not math.isfinite(eval_loss) or (self.best_loss is not None and eval_loss >= self.best_loss):
            return False
        self.best_loss, self.best_step = eval_loss, self.step
        return True

    def close_window(self) -> dict[str, float]:
        """The mean loss and speed since the last call, and the totals so far."""
        values = {
            "loss": self.window_loss / self.window_steps if self.window_steps else float("nan"),
            "tokens_per_s": self.window_tokens / self.window_seconds,
            "data_wait": self.window_waited / self.window_seconds,
            "tokens_seen": self.tokens_seen,
            "skipped_steps": self.skipped_steps,
            "loss_spikes": self.loss_spikes,
        }
        self.window_steps, self.window_loss, self.window_tokens = 0, 0.0, 0
        self.window_seconds = self.window_waited = 0.0
        return values
