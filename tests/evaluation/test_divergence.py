"""The KL divergence between two models' predictions."""

import math

import pytest
import torch

from qlora.evaluation.divergence import Prediction, measure_difference


def test_kl_is_that_of_the_two_distributions():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    ids = torch.tensor([0, 1])
    difference = measure_difference([Prediction(ids, p.log())], [Prediction(ids, q.log())])
    assert (difference.perplexity, difference.other_perplexity) == pytest.approx((4, 2))
    assert difference.kl == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))


def test_rows_of_different_lengths_are_averaged_over_their_tokens():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, (10,), generator=generator)
    p, q = torch.randn(2, 9, 5, generator=generator).log_softmax(-1)
    parts = [slice(0, 2), slice(2, 9)]
    difference = measure_difference(
        [Prediction(ids[part.start : part.stop + 1], p[part]) for part in parts],
        [Prediction(ids[part.start : part.stop + 1], q[part]) for part in parts],
    )
    kl = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    assert difference.kl == pytest.approx(kl.item(), rel=1e-5)
    loss = torch.nn.functional.nll_loss(q, ids[1:])
    assert difference.other_perplexity == pytest.approx(loss.exp().item(), rel=1e-5)
