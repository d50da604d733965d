"""A frozen 4-bit base of which each rank keeps only its part (--shard), with PyTorch's FSDP2.

All 4-bit weights of a decoder layer, with what dequantizes them, are the bytes of one parameter. FSDP gathers
it from all ranks shortly before the layer's forward and backward pass and frees it afterwards. One parameter
per layer, because FSDP spends host time on each, and with many of them the GPU would wait for the host. It is
declared bfloat16, because not every version of PyTorch can shard uint8. Nothing computes with it as such: the
layers in speed/nf4.py view it as bytes.

Norms and the head stay whole on every rank. LoRA weights, which are added later, are ordinary parameters.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from bitsandbytes.utils import unpack_tensor_to_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.modeling_utils import local_torch_dtype
from transformers.quantizers.auto import get_hf_quantizer

from qlora import ranks
from qlora.errors import InputError, first_line
from qlora.model.base import FLAT, check_stored, load_config, prepare_base, quantization
from qlora.model.forward import decoder
from qlora.model.weights import Weights, fetch_weights
from qlora.speed.layers import decoder_layers
from qlora.speed.nf4 import ALIGNMENT, ShardedLinear4bit, quantize

BLOCK, NESTED_BLOCK = 64, 256  # weights with a scale of their own, and scales: bitsandbytes' numbers
OLD_BUFFERS = r"rotary_emb\.inv_freq"  # saved with every layer of Llama 2; models now compute them


def load_sharded_base(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    quant_type: str = "nf4",
    double_quant: bool = True,
    trust_remote_code: bool = False,
    cpu_offload: bool = False,
):
    """load_base() by all ranks together: each keeps its part of the 4-bit weights.

    torch.distributed must be initialized, and `device` be the current one. With `cpu_offload` the parts wait
    in host memory. Loading takes host memory for one tensor, and on the device that of a layer and a 16-bit
    weight beside the part. Every rank must then make the same passes through the decoder. Raises InputError,
    on all ranks alike, if this model cannot be sharded.
    """
    config = load_config(model, trust_remote_code)
    is_in_4bit = check_stored(model, config)
    quantized_here = None if is_in_4bit else quantization(dtype, quant_type, double_quant)
    base = _without_weights(model, config, quantized_here, dtype, device, trust_remote_code)
    layers = decoder_layers(base)
    linears = _linears(model, base, layers)
    weights = fetch_weights(model)
    stored = Stored(weights, _names_in_files(model, base, weights, linears if is_in_4bit else {}), is_in_4bit)

    mesh = init_device_mesh(device.type, (ranks.count(),))
    names = {module: name for name, module in base.named_modules()}
    embedding, sharded = base.get_input_embeddings(), []
    _load_whole(base, f"{names[embedding]}.", stored, device)
    # As the head, it would be needed outside of its own forward pass.
    if f"{names[embedding]}.weight" not in base.all_tied_weights_keys.values():
        sharded.append(fully_shard(embedding, mesh=mesh, reshard_after_forward=True))
    options = {"offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")} if cpu_offload else {}
    for layer in layers:
        prefix = f"{names[layer]}."
        inside = {name: linear for name, linear in linears.items() if name.startswith(prefix)}
        flat = _load_flat(layer, inside, stored, dtype, device)
        _load_whole(base, prefix, stored, device)
        whole = set(layer.parameters())
        setattr(layer, FLAT, torch.nn.Parameter(flat.view(torch.bfloat16), requires_grad=False))
        del flat  # FSDP copies this rank's part of it
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole, **options)
        sharded.append(layer)
    _load_whole(base, "", stored, device)
    base.tie_weights()
    root = decoder(base)
    fully_shard(root, mesh=mesh, ignored_params=set(root.parameters()))
    _prefetch(root, sharded, layers)

    with suppress(OSError):  # no such file: from_config() has taken the tokens from the configuration
        base.generation_config = GenerationConfig.from_pretrained(model)
    prepare_base(base, dtype)
    base.hf_quantizer.postprocess_model(base)
    # Makes generate() go on until the last rank has its answers: until then all must gather.
    base._is_fsdp_managed_module = True
    return base.eval()


def forget_failed_pass(model) -> None:
    """Make another pass possible after one that raised an error, such as out of memory.

    Frees what it had gathered. Like FSDPModule.reset_iter_state(), which not every version of PyTorch has.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            state._training_state = TrainingState.IDLE
            state._state_ctx.iter_forward_root = None
            state._state_ctx.post_backward_final_callback_queued = False
            state._comm_ctx.all_gather_state = None
            state._comm_ctx.post_forward_order.clear()
            if (group := state._fsdp_param_group) is not None:  # the decoder has none
                group._training_state = TrainingState.IDLE
                result, group._all_gather_result = group._all_gather_result, None
                if result is not None and result.all_gather_event is not None:
                    group.device_handle.current_stream().wait_event(result.all_gather_event)
                group._post_forward_indices.clear()
                group._to_sharded()


@dataclass
class Stored:
    """A model's tensors in its files, by the names of its parameters and saved buffers."""

    weights: Weights
    names: dict[str, str]  # of each in the files
    is_in_4bit: bool  # the linear layers' weights, each followed by its state: .absmax, .quant_map ...

    def tensor(self, name: str) -> torch.Tensor:
        return self.weights.tensor(self.names[name])

    def kind(self, name: str, linear: bnb.nn.Linear4bit, dtype: torch.dtype) -> tuple:
        """(quant_type, blocks, round_to) that the weight of a linear layer has once quantized."""
        if not self.is_in_4bit:
            blocks = [BLOCK, NESTED_BLOCK if linear.weight.compress_statistics else 0]
            return linear.weight.quant_type, blocks, dtype
        state = quantization_state(self.weights, self.names[name])
        blocks = [state["blocksize"], state.get("nested_blocksize", 0)]
        return state["quant_type"], blocks, getattr(torch, state["dtype"])

    def quantized(self, name: str, linear, dtype: torch.dtype, device: torch.device) -> bnb.nn.Params4bit:
        """The weight of a linear layer in 4 bits, on `device`."""
        if not self.is_in_4bit:
            return quantize(linear, self.tensor(name).to(device=device, dtype=dtype))
        parts = {
            other: self.weights.tensor(other)
            for other in self.weights.files
            if other.startswith(f"{self.names[name]}.")
        }
        return bnb.nn.Params4bit.from_prequantized(self.tensor(name), parts, device=device)


def quantization_state(weights: Weights, name: str) -> dict | None:
    """What is no tensor of the quantization state of a stored 4-bit weight; None if there is no state."""
    for kind in ("nf4", "fp4"):
        if (packed := f"{name}.quant_state.bitsandbytes__{kind}") in weights.files:
            return unpack_tensor_to_dict(weights.tensor(packed))
    return None


def _without_weights(
    model: str, config, quantized_here, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
):
    """The model with its parameters on the meta device and its buffers on `device`. Those linear layers that
    from_pretrained() would quantize are ShardedLinear4bit."""
    device_map = {"": device}
    quantizer, config, _ = get_hf_quantizer(
        config, quantized_here, device_map, weights_only=True, user_agent={}
    )
    try:
        with init_empty_weights(include_buffers=False), local_torch_dtype(dtype):
            base = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            quantizer.preprocess_model(base, dtype=dtype, device_map=device_map)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise _refusal(model, f"cannot be built without its weights ({first_line(error)})") from error
    base.hf_quantizer = quantizer
    for module in base.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                raise _refusal(model, f"computes its buffer {name} from its weights")
            setattr(module, name, buffer.to(device))
        if type(module) is bnb.nn.Linear4bit:
            module.__class__ = ShardedLinear4bit
    if base._get_dtype_plan(dtype):  # what from_pretrained() leaves in float32 whatever it is asked for
        raise _refusal(model, f"has weights that stay in float32 beside those in {dtype}")
    return base


def _linears(model: str, base, layers: list[torch.nn.Module]) -> dict[str, ShardedLinear4bit]:
    """The 4-bit linear layers by the names of their weights."""
    of_layers = [{m for m in layer.modules() if isinstance(m, ShardedLinear4bit)} for layer in layers]
    linears = {
        f"{name}.weight": module
        for name, module in base.named_modules()
        if isinstance(module, ShardedLinear4bit)
    }
    if not layers or not all(of_layers) or set.union(*of_layers) != set(linears.values()):
        raise _refusal(model, "is not made of decoder layers that hold all its 4-bit weights")
    return linears


def _names_in_files(
    model: str, base, weights: Weights, stored_in_4bit: dict[str, ShardedLinear4bit]
) -> dict[str, str]:
    """The name in the files of each parameter and saved buffer; of tied parameters, that of their source.

    Raises InputError if model and files do not have the same tensors.
    """
    prefix, found, known = f"{base.base_model_prefix}.", {}, set()
    for name, tensor in base.state_dict().items():
        spellings = (name, name.removeprefix(prefix), prefix + name)
        stored = next((spelling for spelling in spellings if spelling in weights.files), None)
        if stored is None:
            continue
        found[name] = stored
        known.add(stored)
        shape, wanted = weights.shape(stored), tensor.shape
        if name in stored_in_4bit:
            shape = (quantization_state(weights, stored) or {}).get("shape", "an unknown shape")
            known |= {other for other in weights.files if other.startswith(f"{stored}.")}
            wanted = stored_in_4bit[name].out_features, stored_in_4bit[name].in_features
        if tuple(shape) != tuple(wanted):
            raise _refusal(model, f"has {stored} of shape {shape} in its files, not {tuple(wanted)}")
    for target, source in base.all_tied_weights_keys.items():
        own = found.pop(target, None)
        source_name = found.setdefault(source, own) if own else found.get(source)
        if own and not torch.equal(weights.tensor(own), weights.tensor(source_name)):
            raise _refusal(model, f"has in its files another {target} than {source}, to which it is tied")
    for name in base.state_dict():
        if name not in found and name not in base.all_tied_weights_keys:
            raise _refusal(model, f"lacks {name} in its files")
    ignored = {*(base._keys_to_ignore_on_load_unexpected or ()), OLD_BUFFERS}
    for name in weights.files:
        if name not in known and not any(re.search(pattern, name) for pattern in ignored):
            raise _refusal(model, f"has {name} in its files, which {type(base).__name__} does not have")
    return found


def _load_whole(base, prefix: str, stored: Stored, device: torch.device) -> None:
    """Load, on every rank, the tensors whose names begin with `prefix`, but for what is already there."""
    for name in stored.names:
        if not name.startswith(prefix):
            continue
        owner, _, leaf = name.rpartition(".")
        owner = base.get_submodule(owner)
        old, is_buffer = getattr(owner, leaf), leaf in owner._buffers
        if old.is_meta or is_buffer:
            value = stored.tensor(name).to(device=device, dtype=old.dtype)
            setattr(owner, leaf, value if is_buffer else torch.nn.Parameter(value, requires_grad=False))


def _load_flat(
    layer, linears: dict[str, ShardedLinear4bit], stored: Stored, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The bytes of a layer's 4-bit weights. Each rank reads and quantizes some, and they tell each other."""
    end = 0
    for name, linear in linears.items():
        end = linear.place(layer, end, *stored.kind(name, linear, dtype))
    chunk = ALIGNMENT * ranks.count()  # FSDP pads what cannot be divided
    flat = torch.zeros(-(-end // chunk) * chunk, dtype=torch.uint8, device=device)
    for number, (name, linear) in enumerate(linears.items()):
        if number % ranks.count() == ranks.number():
            linear.store(stored.quantized(name, linear, dtype, device), flat)
    ranks.any_true(False)  # a rank that has failed is an error here, and not a GPU that waits
    for number, linear in enumerate(linears.values()):
        dist.broadcast(flat[linear.places[0] : linear.places[-1]], src=number % ranks.count())
        linear.drop_weight(device)
    return flat


def _prefetch(root, sharded: list[torch.nn.Module], layers: list[torch.nn.Module]) -> None:
    """Have each module start to gather the next one, so that this takes place while it computes itself."""
    for module, following in pairwise([root, *sharded]):
        module.set_modules_to_forward_prefetch([following])
    for previous, layer in pairwise(layers):
        layer.set_modules_to_backward_prefetch([previous])
    # Nothing follows. Untold, FSDP would gather what ran before: the embedding, or an evaluation.
    layers[0].set_modules_to_backward_prefetch([layers[0]])


def _refusal(model: str, why: str) -> InputError:
    return InputError(f"--shard: {model} {why}: leave out --shard")
