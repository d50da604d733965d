"""The report on 4-bit quantization."""

import pytest
import torch

from qlora.evaluation.quantization import measure


def test_the_constants_take_half_a_bit_per_weight_and_an_eighth_with_double_quantization():
    layer = measure("layer", torch.randn(1024, 1024))
    constants = {name: values["bits"] - 4 for name, values in layer["schemes"].items()}
    assert constants["nf4"] == 0.5
    assert constants["nf4 double"] == pytest.approx(8 / 64 + 32 / (64 * 256), abs=1e-4)  # 0.127
