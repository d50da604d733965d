"""The frozen 4-bit linear layer: an opaque operation around one dequantization kernel in Triton.

bitsandbytes takes three launches to dequantize; here one kernel writes the 16-bit weight. Autograd and the
compiler cannot look into the operation, so nothing but the packed weight is kept for the backward pass, which
dequantizes it again. ShardedLinear4bit is the same for a weight among the bytes of its decoder layer.
"""

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch.nn.functional import linear

from qlora.errors import first_line
from qlora.model.base import FLAT

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without it
    triton = None

TILE = 2048  # weights written by one program of the kernel
ALIGNMENT = 16  # bytes: of each part of a sharded layer, as the kernel's widest loads like it

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

    @triton.jit
    def _dequantize_flat_kernel(
        flat, weight, numel, packed_at, absmax_at, constants_at,
        BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROUND_TO: tl.constexpr, TILE: tl.constexpr,
        WORD: tl.constexpr,
    ):  # fmt: skip
        """The same for a weight whose parts begin at these bytes of `flat`, whatever the type of that.

        Slices and views in Python would cost more time than the launch.
        """
        content = flat.to(tl.pointer_type(tl.uint8))
        packed = content + packed_at
        if WORD == 8:
            packed = packed.to(tl.pointer_type(tl.int32))
        absmax = content + absmax_at
        if NESTED_BLOCK == 0:
            absmax = absmax.to(tl.pointer_type(tl.float32))
        constants = (content + constants_at).to(tl.pointer_type(tl.float32))
        _dequantize_kernel(
            packed, absmax, constants, weight, numel, BLOCK, NESTED_BLOCK, ROUND_TO, TILE, WORD
        )

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


def dequantize_flat(
    flat: torch.Tensor,
    places: list[int],
    blocks: list[int],
    round_to: torch.dtype,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """dequantize() for a weight whose three parts begin at places[0], [2] and [4] of the bytes of `flat`."""
    weight = torch.empty(shape, dtype=dtype, device=flat.device)
    numel = shape[0] * shape[1]
    word = 8 if numel % 8 == 0 else 2
    _dequantize_flat_kernel[(triton.cdiv(numel, TILE),)](
        flat,
        weight,
        numel,
        places[0],
        places[2],
        places[4],
        *blocks,
        TRITON_TYPE[round_to],
        TILE,
        word,
        enable_fp_fusion=False,
    )
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


_PLACE = "int[] places, int[] blocks, ScalarType round_to, str quant_type, bool is_fused"
torch.library.define(
    "qlora::flat_linear_4bit", f"(Tensor x, Tensor flat, {_PLACE}, Tensor? bias, int out_features) -> Tensor"
)
torch.library.define(
    "qlora::flat_linear_4bit_backward", f"(Tensor grad, Tensor flat, {_PLACE}, int in_features) -> Tensor"
)


def _parts(flat: torch.Tensor, places: list[int], blocks: list[int]) -> tuple:
    """(packed, absmax, constants) of one weight: views of its layer's bytes."""
    content = flat.view(torch.uint8)
    packed, absmax, constants = (content[places[i] : places[i + 1]] for i in (0, 2, 4))
    return packed, absmax if blocks[1] else absmax.view(torch.float32), constants.view(torch.float32)


def _rebuilt_state(absmax, constants, blocks, round_to, quant_type, shape) -> QuantState:
    """bitsandbytes' state of a weight, from what plain_state() made of it."""
    offset = nested = None
    if blocks[1]:
        offset, code, nested_absmax = constants[272], constants[16:272], constants[273:]
        nested = QuantState(nested_absmax, code=code, blocksize=blocks[1], dtype=torch.float32)
    code = constants[:16]
    return QuantState(absmax, torch.Size(shape), code, blocks[0], quant_type, round_to, offset, nested)


@torch.library.impl("qlora::flat_linear_4bit", ("cpu", "cuda"))
def _flat_linear(x, flat, places, blocks, round_to, quant_type, is_fused, bias, out_features):
    shape = (out_features, x.shape[-1])
    if is_fused:
        return linear(x, dequantize_flat(flat, places, blocks, round_to, shape, x.dtype), bias)
    packed, absmax, constants = _parts(flat, places, blocks)
    state = _rebuilt_state(absmax, constants, blocks, round_to, quant_type, shape)
    return bnb.matmul_4bit(x, packed.view(-1, 1), state, bias=bias)


@torch.library.impl("qlora::flat_linear_4bit_backward", ("cpu", "cuda"))
def _flat_linear_backward(grad, flat, places, blocks, round_to, quant_type, is_fused, in_features):
    shape = (grad.shape[-1], in_features)
    if is_fused:
        return grad @ dequantize_flat(flat, places, blocks, round_to, shape, grad.dtype)
    packed, absmax, constants = _parts(flat, places, blocks)
    state = _rebuilt_state(absmax, constants, blocks, round_to, quant_type, shape)
    return grad @ dequantize_4bit(packed.view(-1, 1), state).to(grad.dtype)


@torch.library.register_fake("qlora::flat_linear_4bit")
def _flat_linear_shape(x, flat, places, blocks, round_to, quant_type, is_fused, bias, out_features):
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("qlora::flat_linear_4bit_backward")
def _flat_linear_backward_shape(grad, flat, places, blocks, round_to, quant_type, is_fused, in_features):
    return grad.new_empty((*grad.shape[:-1], in_features))


class _FlatLinear(torch.autograd.Function):
    """_FrozenLinear for a weight that lies somewhere in its layer's bytes.

    The operations take the whole of `flat` and look for their parts in it, so autograd and the compiler keep
    that one tensor, whose memory FSDP frees and fills again between the two passes.
    """

    @staticmethod
    def forward(ctx, x, flat, places, blocks, round_to, quant_type, is_fused, bias, out_features):
        ctx.save_for_backward(flat)
        ctx.where, ctx.in_features = (places, blocks, round_to, quant_type, is_fused), x.shape[-1]
        return torch.ops.qlora.flat_linear_4bit(
            x, flat, places, blocks, round_to, quant_type, is_fused, bias, out_features
        )

    @staticmethod
    def backward(ctx, grad):
        (flat,) = ctx.saved_tensors
        grad = torch.ops.qlora.flat_linear_4bit_backward(grad, flat, *ctx.where, ctx.in_features)
        return grad, None, None, None, None, None, None, None, None


class ShardedLinear4bit(bnb.nn.Linear4bit):
    """A quantized Linear4bit whose weight lies in its decoder layer's parameter FLAT: see speed/sharding.py.

    Its own `weight` is empty, and only tells PEFT what kind of layer this is. The forward pass works inside
    that of the decoder layer alone: elsewhere a rank has only its part of the parameter.
    """

    is_fused = False

    def place(
        self, layer: torch.nn.Module, start: int, quant_type: str, blocks: list[int], round_to: torch.dtype
    ) -> int:
        """Take a place in the layer's bytes, from `start` on; returns where the next one may begin.

        `blocks` and `round_to` are what plain_state() will return for the weight.
        """
        self.layer = (layer,)  # in a tuple, or the layer would become a submodule of its own part
        self.quant_type, self.blocks, self.round_to = quant_type, blocks, round_to
        numel = self.in_features * self.out_features
        scales = -(-numel // blocks[0])
        constants = 16 + (257 + -(-scales // blocks[1]) if blocks[1] else 0)
        self.places = []  # start and end of each of the three parts
        for size in (-(-numel // 2), scales * (1 if blocks[1] else 4), constants * 4):
            self.places += [start, start + size]
            start = -(-(start + size) // ALIGNMENT) * ALIGNMENT
        return start

    def store(self, weight: bnb.nn.Params4bit, content: torch.Tensor) -> None:
        """Copy a quantized weight to its place in the layer's bytes."""
        *parts, blocks, round_to = plain_state(weight)
        assert (blocks, round_to) == (self.blocks, self.round_to)
        for i, part in enumerate(parts):
            content[self.places[2 * i] : self.places[2 * i + 1]] = part.view(torch.uint8)

    def drop_weight(self, device: torch.device) -> None:
        """Leave of the layer's own weight only what tells PEFT about it."""
        nothing = torch.empty(0, dtype=torch.uint8, device=device)
        kind = {"compress_statistics": bool(self.blocks[1]), "quant_type": self.quant_type}
        self.weight = bnb.nn.Params4bit(nothing, requires_grad=False, bnb_quantized=True, **kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features), of x's dtype, computed in compute_dtype."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        out = _FlatLinear.apply(
            x.to(self.compute_dtype), getattr(self.layer[0], FLAT), self.places, self.blocks, self.round_to,
            self.quant_type, self.is_fused, bias, self.out_features,
        )  # fmt: skip
        return out.to(x.dtype)


def fuse_linears(model, is_wanted: bool = True) -> str:
    """Give the model's 4-bit linear layers the fused operation; returns what runs them, "" if it has none.

    Tried on the first weight, which must come out bit-identical to bitsandbytes' dequantization. Without CUDA
    or Triton, if the trial fails, or if it is not wanted, bitsandbytes' own path stays.
    """
    kinds = (bnb.nn.Linear4bit, ShardedLinear4bit)
    layers = [module for module in model.modules() if type(module) in kinds]
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
        if isinstance(layer, ShardedLinear4bit):
            layer.is_fused = True
        else:
            layer.__class__ = FusedLinear4bit
            layer.share_state()
    return "the fused kernel"


@torch.no_grad()
def _dequantizes_alike(layer: bnb.nn.Linear4bit) -> bool:
    """Whether both ways give the layer's weight the same bits; leaves the layer as it is."""
    weight, dtype = layer.weight, layer.compute_dtype
    if isinstance(layer, ShardedLinear4bit):  # no rank holds it: try another of its kind
        shape = layer.out_features, layer.in_features
        generator = torch.Generator(weight.device).manual_seed(0)  # the training's numbers stay undrawn
        weight = torch.randn(shape, dtype=layer.round_to, device=weight.device, generator=generator)
        weight = quantize(layer, weight)
    ours = dequantize(*plain_state(weight), weight.quant_state.shape, dtype)
    return torch.equal(ours, dequantize_4bit(weight, weight.quant_state).to(dtype))


def quantize(layer: bnb.nn.Linear4bit, weight: torch.Tensor) -> bnb.nn.Params4bit:
    """A weight in 4 bits, on its device, quantized as the layer's is."""
    options = {"compress_statistics": layer.weight.compress_statistics, "quant_type": layer.weight.quant_type}
    return bnb.nn.Params4bit(weight, requires_grad=False, **options).to(weight.device)
