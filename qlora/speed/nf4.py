"""The frozen 4-bit linear layer: an opaque operation around one dequantization kernel in Triton.

bitsandbytes takes three launches to dequantize; here one kernel writes the 16-bit weight. Autograd and the
compiler cannot look into the operation, so nothing but the packed weight is kept for the backward pass, which
dequantizes it again.
"""

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch.nn.functional import linear

from qlora.errors import first_line

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without it
    triton = None

TILE = 2048  # weights written by one program of the kernel

if triton is not None:

    @triton.jit
    def _dequantize_kernel(
        packed, absmax, constants, weight, numel,
        BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROUND_TO: tl.constexpr, TILE: tl.constexpr,
        WORD: tl.constexpr,
    ):  # fmt: skip
        """weight = code[nibble] * absmax[block of BLOCK weights], the high nibble of a byte first.

        With double quantization (NESTED_BLOCK > 0) absmax holds bytes; a block's scale is then
        nested_code[byte] * nested_absmax[block // NESTED_BLOCK] + offset (arXiv 2305.14314, section 3).
        `constants` are code (16 values), nested_code (256), offset (1) and nested_absmax, all float32.

        Each lane reads one word of `packed` and writes its WORD weights. With WORD = 8 that is 4 bytes read
        and 16 written. Consecutive lanes touch consecutive addresses, so accesses coalesce.
        """
        word = tl.program_id(0) * (TILE // WORD) + tl.arange(0, TILE // WORD)
        is_word = word * WORD < numel
        block = word // (BLOCK // WORD)
        scale = tl.load(absmax + block, mask=is_word, other=0)
        if NESTED_BLOCK:
            nested_absmax = tl.load(constants + 273 + block // NESTED_BLOCK, mask=is_word, other=0.0)
            scale = tl.load(constants + 16 + scale.to(tl.int32)) * nested_absmax + tl.load(constants + 272)
        bits = tl.load(packed + word, mask=is_word, other=0).to(tl.int32)
        place = tl.arange(0, WORD)
        shift = place // 2 * 8 + (1 - place % 2) * 4  # lowest byte first, high nibble first
        value = tl.load(constants + (bits[:, None] >> shift[None, :] & 15)) * scale[:, None]
        out = word[:, None] * WORD + place[None, :]
        value = value.to(ROUND_TO)  # the dtype before quantization
        tl.store(weight + out, value.to(weight.dtype.element_ty), mask=out < numel)

    TRITON_TYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    constants: torch.Tensor,
    blocks: list[int],
    round_to: torch.dtype,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight of `shape` in `dtype`, bit-identical to bitsandbytes' dequantize_4bit.

    The first five arguments come from plain_state(): `packed` holds two weights per byte, `absmax` the scale
    of each block of blocks[0] weights (with double quantization as bytes, blocks[1] of which share a scale of
    their own). The kernel describes `constants`. `round_to` is the dtype before quantization, to which
    bitsandbytes rounds.
    """
    weight = torch.empty(shape, dtype=dtype, device=packed.device)
    numel = weight.numel()
    word = 8 if numel % 8 == 0 else 2  # read four bytes at a time, or one where four would pass the end
    _dequantize_kernel[(triton.cdiv(numel, TILE),)](
        packed.view(torch.int32) if word == 8 else packed, absmax, constants, weight, numel, *blocks,
        TRITON_TYPE[round_to], TILE, word,
        enable_fp_fusion=False,  # bitsandbytes rounds between the product and the sum
    )  # fmt: skip
    return weight


def plain_state(weight: bnb.nn.Params4bit) -> tuple:
    """(packed, absmax, constants, blocks, round_to) of a quantized weight, as dequantize() takes them."""
    state, nested = weight.quant_state, weight.quant_state.state2
    # Ask bitsandbytes for the values of the 16 codes: codes 0 and 1 in the first byte, 2 and 3 in the
    # second...
    codes = torch.arange(0x01, 0x100, 0x22, dtype=torch.uint8, device=weight.device)[:, None]
    ones = QuantState(
        absmax=torch.ones(1, device=weight.device), shape=torch.Size([16]), dtype=torch.float32, blocksize=64,
        quant_type=state.quant_type,
    )  # fmt: skip
    constants, blocks = [dequantize_4bit(codes, ones)], [state.blocksize, 0]
    if nested is not None:
        constants += [nested.code, state.offset, nested.absmax]
        blocks[1] = nested.blocksize
    constants = torch.cat([part.flatten().float() for part in constants])
    return weight.detach().view(torch.uint8).flatten(), state.absmax, constants, blocks, state.dtype


_STATE = "Tensor packed, Tensor absmax, Tensor constants, int[] blocks, ScalarType round_to"  # plain_state's
torch.library.define("qlora::linear_4bit", f"(Tensor x, {_STATE}, Tensor? bias, int out_features) -> Tensor")
torch.library.define("qlora::linear_4bit_backward", f"(Tensor grad, {_STATE}, int in_features) -> Tensor")


@torch.library.impl("qlora::linear_4bit", "CUDA")
def _linear(x, packed, absmax, constants, blocks, round_to, bias, out_features):
    shape = (out_features, x.shape[-1])
    return linear(x, dequantize(packed, absmax, constants, blocks, round_to, shape, x.dtype), bias)


@torch.library.impl("qlora::linear_4bit_backward", "CUDA")
def _linear_backward(grad, packed, absmax, constants, blocks, round_to, in_features):
    shape = (grad.shape[-1], in_features)
    return grad @ dequantize(packed, absmax, constants, blocks, round_to, shape, grad.dtype)


@torch.library.register_fake("qlora::linear_4bit")
def _linear_shape(x, packed, absmax, constants, blocks, round_to, bias, out_features):
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("qlora::linear_4bit_backward")
def _linear_backward_shape(grad, packed, absmax, constants, blocks, round_to, in_features):
    return grad.new_empty((*grad.shape[:-1], in_features))


class _FrozenLinear(torch.autograd.Function):
    """x @ weight.T + bias, and its gradient with respect to x.

    Both operations are opaque to the compiler, which would otherwise see that they dequantize the same
    weight, and keep it in between.
    """

    @staticmethod
    def forward(ctx, x, packed, absmax, constants, blocks, round_to, bias, out_features):
        ctx.save_for_backward(packed, absmax, constants)  # not x: the frozen weight needs no gradient
        ctx.blocks, ctx.round_to, ctx.in_features = blocks, round_to, x.shape[-1]
        return torch.ops.qlora.linear_4bit(x, packed, absmax, constants, blocks, round_to, bias, out_features)

    @staticmethod
    def backward(ctx, grad):
        grad = torch.ops.qlora.linear_4bit_backward(
            grad, *ctx.saved_tensors, ctx.blocks, ctx.round_to, ctx.in_features
        )
        return grad, None, None, None, None, None, None, None


class FusedLinear4bit(bnb.nn.Linear4bit):
    """A quantized Linear4bit whose forward pass is the operation above. Only fuse_linears() makes one.

    It shares its memory with the layer it was, so PEFT and checkpoints still find weight and quant_state.
    """

    def share_state(self) -> None:
        """Give the weight and its quantization state the layout that the operation takes."""
        packed, absmax, constants, self.blocks, self.round_to = plain_state(self.weight)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("absmax", absmax, persistent=False)
        self.register_buffer("constants", constants, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features), of x's dtype, computed in compute_dtype."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        out = _FrozenLinear.apply(
            x.to(self.compute_dtype), self.packed, self.absmax, self.constants, self.blocks, self.round_to,
            bias, self.out_features,
        )  # fmt: skip
        return out.to(x.dtype)


def fuse_linears(model, is_wanted: bool = True) -> str:
    """Give the model's 4-bit linear layers the fused operation; returns what runs them, "" if it has none.

    Tried on the first weight, which must come out bit-identical to bitsandbytes' dequantization. Without CUDA
    or Triton, if the trial fails, or if it is not wanted, bitsandbytes' own path stays.
    """
    layers = [module for module in model.modules() if type(module) is bnb.nn.Linear4bit]
    if not layers:
        return ""
    if not is_wanted or layers[0].weight.device.type != "cuda":
        return "bitsandbytes"
    if triton is None:
        return "bitsandbytes (no Triton for the fused kernel)"
    try:
        is_same = _dequantizes_alike(layers[0])
    except Exception as error:  # a compiler that does not fit the GPU or the system throws many types
        return f"bitsandbytes (the fused kernel fails here: {first_line(error)})"
    if not is_same:
        return "bitsandbytes (the fused kernel computes other weights here)"
    for layer in layers:
        layer.__class__ = FusedLinear4bit
        layer.share_state()
    return "the fused kernel"


@torch.no_grad()
def _dequantizes_alike(layer: bnb.nn.Linear4bit) -> bool:
    """Whether both ways give the layer's weight the same bits; leaves the layer as it is."""
    state, dtype = layer.weight.quant_state, layer.compute_dtype
    ours = dequantize(*plain_state(layer.weight), state.shape, dtype)
    return torch.equal(ours, dequantize_4bit(layer.weight, state).to(dtype))
