"""The learning rate as a function of the step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warmup from 0, then cosine or linear decay that would reach 0 at `total_steps`, or a constant.

    The warmup takes `warmup_steps` steps or, where that is 0, the share `warmup_ratio` of all, but never the
    last one. The values are those of transformers.get_scheduler.
    """

    shape: str  # cosine, linear or constant
    peak: float
    total_steps: int
    warmup_steps: int = 0
    warmup_ratio: float = 0.0

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, 0 <= step < total_steps.

        A pure function: a resume has nothing to restore, and a skipped step cannot shift the schedule.
        """
        share = math.ceil(self.warmup_ratio * self.total_steps)
        warmup_steps = self.warmup_steps or min(share, self.total_steps - 1)
        if step < warmup_steps:
            return self.peak * step / warmup_steps
        progress = (step - warmup_steps) / max(1, self.total_steps - warmup_steps)
        if self.shape == "cosine":
            return self.peak * 0.5 * (1 + math.cos(math.pi * progress))
        if self.shape == "linear":
            return self.peak * (1 - progress)
        return self.peak
