"""The learning rate as a function of the step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warmup from 0, then cosine or linear decay that would reach 0 at `total_steps`, or a constant.

    The values are those of transformers.get_scheduler.
    """

    shape: str  # cosine, linear or constant
    peak: float
    total_steps: int
    warmup_steps: int

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, 0 <= step < total_steps.

        A pure function: a resume has nothing to restore, and a skipped step cannot shift the schedule.
        """
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.shape == "cosine":
            return self.peak * 0.5 * (1 + math.cos(math.pi * progress))
        if self.shape == "linear":
            return self.peak * (1 - progress)
        return self.peak
