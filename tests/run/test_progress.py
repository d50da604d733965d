"""What a run remembers of its losses: spikes, skipped steps, the best evaluation, means between log lines."""

import math
import random

import pytest
import torch

from qlora.errors import InputError
from qlora.run.progress import Progress


def record(progress: Progress, loss: float | None) -> str | None:
    return progress.record(loss, tokens=10, epochs=0.5, seconds=2.0, seconds_waited=0.5)


def test_falling_and_noisy_losses_are_not_spikes():
    draw, progress = random.Random(0), Progress()
    losses = [8 * 0.97**step + draw.gauss(1, 0.1) for step in range(300)]
    assert not any(record(progress, loss) for loss in losses)
    message = record(progress, 3.0)
    assert (
        message.startswith("step 301: loss spike, 3.0000 instead of about 1.") and progress.loss_spikes == 1
    )


def test_a_spike_hardly_changes_the_usual_loss():
    progress = Progress()
    for _ in range(50):
        record(progress, 1.0)
    assert record(progress, 2.0) and progress.usual_loss == pytest.approx(1.05)
    assert not record(progress, 1.0)


def test_a_non_finite_evaluation_is_never_the_best():
    progress = Progress()
    assert not progress.record_best(math.nan) and not progress.record_best(math.inf)
    assert progress.record_best(2.0) and not progress.record_best(2.0) and not progress.record_best(math.nan)


@pytest.mark.parametrize(
    "validation, has_checkpoint, best",
    [("rows", True, (2.0, 7)), ("others", True, (None, None)), ("rows", False, (None, None))],
)
def test_the_best_is_forgotten_with_its_rows_or_its_checkpoint(validation, has_checkpoint, best):
    progress = Progress(step=9, best_loss=2.0, best_step=7, validation="rows", owes_evaluation=True)
    progress.use_validation(validation, has_checkpoint)
    assert (progress.best_loss, progress.best_step) == best and progress.validation == validation
    assert progress.owes_evaluation


def test_without_validation_rows_no_evaluation_is_owed():
    progress = Progress(validation="rows", owes_evaluation=True)
    progress.use_validation(None, has_best_checkpoint=False)
    assert not progress.owes_evaluation and progress.validation is None


def test_the_logged_loss_is_the_mean_over_updates_since_the_last_line():
    progress = Progress()
    for loss in (1.0, None, 3.0):
        record(progress, loss)
    assert progress.close_window() == {
        "loss": 2.0, "tokens_per_s": 5.0, "data_wait": 0.25, "tokens_seen": 30, "skipped_steps": 1,
        "loss_spikes": 0,
    }  # fmt: skip
    record(progress, None)
    values = progress.close_window()
    assert math.isnan(values["loss"]) and (values["tokens_seen"], values["skipped_steps"]) == (40, 2)
    assert progress.position() == {"step": 4, "epoch": 0.5}


def test_only_skipped_steps_in_a_row_end_a_run():
    progress, scaler = Progress(), torch.amp.GradScaler("cpu", enabled=False)
    for loss in (1.0, None, None, 1.0, None, None):
        record(progress, loss)
        progress.check_skips(3, math.nan, math.nan, scaler)
    record(progress, None)
    with pytest.raises(
        InputError, match=r"^3 non-finite steps in a row \(step 7: loss nan, gradient inf\); last su.* 4"
    ):
        progress.check_skips(3, math.nan, math.inf, scaler)
