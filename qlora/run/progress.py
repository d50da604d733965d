"""How far a run has got, and statistics of its losses. Every checkpoint holds all of it."""

import math
from dataclasses import dataclass

from qlora.errors import InputError


@dataclass
class Progress:
    step: int = 0  # optimizer steps done; with the seed, this alone determines which rows come next ...
    place: dict | None = None  # ... except with --streaming, which also needs the Place of the last step
    epochs: float = 0.0
    tokens_seen: int = 0  # without padding
    skipped_steps: int = 0  # steps whose update was skipped: the loss or gradient was not finite
    skipped_in_a_row: int = 0
    owes_evaluation: bool = False  # this step's evaluation has not been completed
    best_loss: float | None = None  # with --load_best_model_at_end, the lowest validation loss ...
    best_step: int | None = None  # ... and its step
    validation: str | None = None  # fingerprint of the rows that these were measured on
    loss_spikes: int = 0
    usual_loss: float = 0.0  # running means of the loss and of its distance from that mean
    usual_distance: float = 0.0
    window_steps: int = 0  # from here on: sums over the steps since the last log line
    window_loss: float = 0.0
    window_tokens: int = 0
    window_seconds: float = 0.0
    window_waited: float = 0.0  # seconds that steps waited for their data
    window_all_steps: int = 0  # skipped ones included
    window_exchanged: float = 0.0  # seconds that steps spent summing their gradients over the ranks

    def record(
        self,
        loss: float | None,
        *,
        tokens: int,
        epochs: float,
        seconds: float,
        seconds_waited: float = 0.0,
        seconds_exchanged: float = 0.0,
        place: dict | None = None,
    ) -> str | None:
        """Count one step; returns a message if its loss is a spike.

        `loss` is None if the update was skipped. `epochs` counts the passes over the rows that are complete
        with this step; `place` is that of its StepData.
        """
        self.step += 1
        self.epochs, self.place = epochs, place
        self.tokens_seen += tokens
        self.window_tokens += tokens
        self.window_seconds += seconds
        self.window_waited += seconds_waited
        self.window_all_steps += 1
        self.window_exchanged += seconds_exchanged
        if loss is None:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            return None
        self.skipped_in_a_row = 0
        self.window_steps += 1
        self.window_loss += loss
        usual_loss = self.usual_loss
        if not self._is_spike(loss):
            return None
        self.loss_spikes += 1
        return f"step {self.step}: loss spike, {loss:.4f} instead of about {usual_loss:.4f}"

    def _is_spike(self, loss: float) -> bool:
        """Update the usual loss; whether the loss exceeds the usual one by 6 times the usual distance and by
        a fifth, after 20 updates."""
        updates = self.step - self.skipped_steps
        distance = loss - self.usual_loss
        is_spike = updates > 20 and distance > max(6 * self.usual_distance, 0.2 * self.usual_loss)
        weight = max(1 / updates, 0.05)  # a plain mean at first, then over about the last 20 updates
        self.usual_loss += weight * distance
        self.usual_distance += weight * (abs(distance) - self.usual_distance) if updates > 1 else 0.0
        return is_spike

    def record_best(self, eval_loss: float | None) -> bool:
        """Record this step's validation loss, if any; returns whether it is finite and lower than all
        before."""
        if eval_loss is None or not math.isfinite(eval_loss):
            return False
        if self.best_loss is not None and eval_loss >= self.best_loss:
            return False
        self.best_loss, self.best_step = eval_loss, self.step
        return True

    def use_validation(self, fingerprint: str | None, has_best_checkpoint: bool) -> None:
        """Start measuring on these validation rows (None: there are none).

        The best so far is forgotten if it was measured on other rows, or if its checkpoint is not there.
        """
        if self.validation != fingerprint or not has_best_checkpoint:
            self.best_loss = self.best_step = None
        self.validation = fingerprint
        self.owes_evaluation = self.owes_evaluation and fingerprint is not None

    def close_window(self) -> dict[str, float]:
        """Mean loss and speed since the last call, and the totals so far."""
        values = {
            "loss": self.window_loss / self.window_steps if self.window_steps else math.nan,
            "tokens_per_s": self.window_tokens / self.window_seconds,
            "data_wait": self.window_waited / self.window_seconds,
            "tokens_seen": self.tokens_seen,
            "skipped_steps": self.skipped_steps,
            "loss_spikes": self.loss_spikes,
        }
        if self.window_exchanged:  # several ranks
            values["exchange_ms"] = 1000 * self.window_exchanged / self.window_all_steps
        self.window_steps, self.window_loss, self.window_tokens = 0, 0.0, 0
        self.window_seconds = self.window_waited = self.window_exchanged = 0.0
        self.window_all_steps = 0
        return values

    def position(self) -> dict[str, float]:
        """What every line of the log begins with."""
        return {"step": self.step, "epoch": round(self.epochs, 4)}

    def check_skips(self, limit: int, loss: float, grad_norm: float, scaler) -> None:
        """Raise InputError, with advice, if the last `limit` steps or more were skipped."""
        if self.skipped_in_a_row < limit:
            return
        scale = f", loss scale {scaler.get_scale():g}" if scaler.is_enabled() else ""
        dtype_advice = "--dtype bfloat16 --allow_changes dtype, " if scaler.is_enabled() else ""
        last_update = self.step - self.skipped_in_a_row
        raise InputError(
            f"{self.skipped_in_a_row} non-finite steps in a row (step {self.step}: loss {loss}, "
            f"gradient {grad_norm}{scale}); last successful update: step {last_update}. Try {dtype_advice}a "
            "lower --learning_rate with --allow_changes learning_rate, or inspect the rows (--data_report of "
            "train.py)"
        )
