"""The fused 4-bit linear layer against bitsandbytes', bit for bit: run with `make test-gpu`."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from qlora.model.base import FLAT
from qlora.speed.nf4 import FusedLinear4bit, ShardedLinear4bit, dequantize, fuse_linears, plain_state

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def quantized(
    shape, dtype, quant_type="nf4", double_quant=True, bias=False, compute_dtype=None, device="cuda"
) -> bnb.nn.Linear4bit:
    out_features, in_features = shape
    layer = bnb.nn.Linear4bit(
        in_features, out_features, bias, compute_dtype or dtype, double_quant, quant_type
    )
    layer.weight = bnb.nn.Params4bit(
        torch.randn(shape).to(dtype),
        requires_grad=False,
        compress_statistics=double_quant,
        quant_type=quant_type,
    )
    layer.compute_type_is_set = True
    layer.support_avx512bf16_for_cpu = False
    return layer.to(device)


def in_flat(layer: bnb.nn.Linear4bit, start: int = 0) -> ShardedLinear4bit:
    """A copy of a layer whose weight is in the bytes of a module, from `start` on."""
    sharded, owner, device = copy.deepcopy(layer), torch.nn.Module(), layer.weight.device
    sharded.__class__ = ShardedLinear4bit
    *_, blocks, round_to = plain_state(layer.weight)
    end = sharded.place(owner, start, layer.weight.quant_type, blocks, round_to)
    content = torch.full((end,), 255, dtype=torch.uint8, device=device)  # as bfloat16: NaN
    sharded.store(layer.weight, content)
    setattr(owner, FLAT, torch.nn.Parameter(content.view(torch.bfloat16), requires_grad=False))
    sharded.drop_weight(device)
    return sharded


def output_and_kept(layer, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A layer's output, and what autograd keeps for its backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        return layer(x), kept


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 11008), (64, 64), (37, 53), (5, 129), (1, 1), (130, 8192)])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantized_weights_are_those_of_bitsandbytes(quant_type, double_quant, shape):
    torch.manual_seed(0)
    for stored in DTYPES:
        weight = quantized(shape, stored, quant_type, double_quant).weight
        for dtype in DTYPES:
            got = dequantize(*plain_state(weight), shape, dtype)
            assert torch.equal(got, dequantize_4bit(weight, weight.quant_state).to(dtype)), (stored, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_output_and_gradient_are_those_of_the_dequantized_weight_and_no_input_is_kept(
    quant_type, dtype, bias
):
    torch.manual_seed(0)
    layer = quantized((96, 200), torch.bfloat16, quant_type, bias=bias, compute_dtype=dtype)
    x = torch.randn(3, 7, 200, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 7, 96, device="cuda", dtype=dtype)
    weight = dequantize_4bit(layer.weight, layer.weight.quant_state).to(dtype)
    want = torch.nn.functional.linear(x, weight, layer.bias.to(dtype) if bias else None)
    (want_grad,) = torch.autograd.grad(want, x, grad)
    assert fuse_linears(torch.nn.Sequential(layer)) == "the fused kernel"
    assert type(layer) is FusedLinear4bit
    got, kept = output_and_kept(layer, x)
    (got_grad,) = torch.autograd.grad(got, x, grad)
    assert torch.equal(got, want) and torch.equal(got_grad, want_grad)
    held = {tensor.data_ptr() for tensor in (layer.packed, layer.absmax, layer.constants)}
    assert {tensor.data_ptr() for tensor in kept} <= held


@pytest.mark.gpu
def test_the_operations_are_proper_ones():
    layer = quantized((96, 200), torch.bfloat16)
    x, grad = (torch.randn(5, size, device="cuda", dtype=torch.bfloat16) for size in (200, 96))
    state = plain_state(layer.weight)
    torch.library.opcheck(torch.ops.qlora.linear_4bit.default, (x, *state, None, 96))
    torch.library.opcheck(torch.ops.qlora.linear_4bit_backward.default, (grad, *state, 200))


@pytest.mark.gpu
def test_a_kernel_that_gives_other_weights_is_not_used(monkeypatch):
    layer = quantized((96, 200), torch.bfloat16)
    monkeypatch.setattr("qlora.speed.nf4.dequantize", lambda *arguments: torch.zeros(96, 200, device="cuda"))
    assert "computes other weights" in fuse_linears(torch.nn.Sequential(layer))
    assert type(layer) is bnb.nn.Linear4bit


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(96, 200), (37, 53)])
def test_a_weight_among_its_layers_bytes_gives_what_it_gives_alone(
    shape, quant_type, double_quant, bias, device
):
    torch.manual_seed(0)
    alone = quantized(shape, torch.bfloat16, quant_type, double_quant, bias, device=device)
    sharded = in_flat(alone, start=48)
    x = torch.randn(3, 7, shape[1], device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(3, 7, shape[0], device=device, dtype=torch.bfloat16)
    for kernels in ["bitsandbytes"] + ["the fused kernel"] * (device == "cuda"):
        for layer in (alone, sharded):
            assert fuse_linears(torch.nn.Sequential(layer), kernels != "bitsandbytes") == kernels
        got, kept = output_and_kept(sharded, x)
        assert [tensor.data_ptr() for tensor in kept] == [getattr(sharded.layer[0], FLAT).data_ptr()]
        assert torch.equal(got, alone(x))
        (got_grad,) = torch.autograd.grad(got, x, grad)
        (want_grad,) = torch.autograd.grad(alone(x), x, grad)
        assert torch.equal(got_grad, want_grad) and got_grad.abs().sum() > 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_operations_of_sharded_layers_are_proper_ones(device):
    layer = in_flat(quantized((96, 200), torch.bfloat16, device=device))
    x, grad = (torch.randn(5, size, device=device, dtype=torch.bfloat16) for size in (200, 96))
    where = layer.places, layer.blocks, layer.round_to, layer.quant_type, device == "cuda"
    flat = getattr(layer.layer[0], FLAT).detach()
    torch.library.opcheck(torch.ops.qlora.flat_linear_4bit.default, (x, flat, *where, None, 96))
    torch.library.opcheck(torch.ops.qlora.flat_linear_4bit_backward.default, (grad, flat, *where, 200))


def test_without_a_card_bitsandbytes_own_path_stays():
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    assert fuse_linears(torch.nn.Sequential(layer)) == "bitsandbytes"
    assert type(layer) is bnb.nn.Linear4bit
    assert fuse_linears(torch.nn.Linear(4, 4)) == ""
