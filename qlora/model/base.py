"""The frozen 4-bit base and its tokenizer."""

from contextlib import suppress
from datetime import date

import bitsandbytes as bnb
import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.utils.peft_utils import find_adapter_config_file

from qlora.data.chat_template import set_chat_template
from qlora.data.formats import PROMPT_TEMPLATE_MARK
from qlora.errors import InputError, first_line
from qlora.model.adapter import adapter_file, check_adapter, saved_chat_template

REMOTE_CODE = "transformers_modules"  # the package of classes that come with a model
FLAT = "flat_4bit"  # a decoder layer's parameter in a sharded base: the bytes of all its 4-bit weights


def load_config(model: str, trust_remote_code: bool = False):
    """The model's configuration; raises InputError, with a remedy, if it cannot be loaded.

    Also if there is an adapter in its folder, which transformers would silently load as part of the base.
    """
    if _has_adapter(model):
        raise InputError(
            f"--model {model} has an adapter_config.json, whose adapter would be loaded as part of the base: "
            f"give the base alone with --model, and this one with --adapter {model}"
        )
    return _from_hub(AutoConfig, model, trust_remote_code=trust_remote_code)


def load_tokenizer(
    model: str,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    today: date | None = None,
):
    """The tokenizer saved with the adapter, else the model's. No token is added; no pad token is needed.

    Of remote code only the model's is run, never that in the adapter's folder: a tokenizer with code of its
    own is loaded from the model, and only its chat template from the adapter. The chat template is that of
    the file `chat_template`, if given; one that writes the date writes `today`, by default the day it is.
    If the adapter's template was written only for other programs, or omitted (see save_tokenizer), the
    model's is used. Raises InputError if any of this cannot be loaded.
    """
    tokenizer = _saved_tokenizer(model, adapter, trust_remote_code)
    template = tokenizer.chat_template
    if adapter is not None and (template is None or str(template).startswith(PROMPT_TEMPLATE_MARK)):
        with suppress(OSError, ValueError):  # no such model, or no network: loading it will say so
            tokenizer.chat_template = saved_chat_template(model)
    set_chat_template(tokenizer, chat_template, today or date.today())
    return tokenizer


def load_base(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    load_in_4bit: bool = True,
    quant_type: str = "nf4",
    double_quant: bool = True,
    trust_remote_code: bool = False,
):
    """Load a causal LM onto `device`; its linear layers except the output head are quantized on the way.

    A 4-bit checkpoint is loaded as it is. Unquantized weights get `dtype`. Raises InputError.
    """
    options = {"dtype": dtype, "device_map": {"": device}, "trust_remote_code": trust_remote_code}
    is_stored_in_4bit = check_stored(model, load_config(model, trust_remote_code), load_in_4bit)
    if load_in_4bit and not is_stored_in_4bit:
        options["quantization_config"] = quantization(dtype, quant_type, double_quant)
    base = _from_hub(AutoModelForCausalLM, model, use_safetensors=True, **options)  # pickles can run code
    prepare_base(base, dtype)
    return base


def check_stored(model: str, config, load_in_4bit: bool = True) -> bool:
    """Whether the model is stored in 4 bits; raises InputError if it cannot be loaded as it is stored."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return False
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    is_4bit = stored.get("load_in_4bit") if isinstance(stored, dict) else stored.load_in_4bit
    if method != "bitsandbytes" or not is_4bit:
        raise InputError(
            f"{model} is already quantized with {method}: give the original model, or one quantized to "
            "4 bits with bitsandbytes"
        )
    if not load_in_4bit:
        raise InputError(f"{model} is already 4-bit: --no_load_in_4bit needs the original model")
    return True


def quantization(dtype: torch.dtype, quant_type: str, double_quant: bool) -> BitsAndBytesConfig:
    """What quantizes the linear layers of an unquantized model while it is loaded."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def prepare_base(base, dtype: torch.dtype) -> None:
    """Set what a base that was just loaded computes with, and how it generates."""
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = dtype  # a 4-bit checkpoint brings its own
            module.compute_type_is_set = True  # else bitsandbytes would derive it from the first input
            # On CPUs with AVX512-BF16, a forward pass in eval mode repacks the weights for inference. No
            # gradient reaches the adapter after that: one evaluation would silently end the training
            # (bitsandbytes 0.50).
            module.support_avx512bf16_for_cpu = False
    base.config.use_cache = False
    # Sampling follows generate.py's flags. transformers would silently add the model's own temperature, beams
    # and penalties. Keep only the tokens that end an answer.
    base.generation_config = GenerationConfig(eos_token_id=base.generation_config.eos_token_id)


def trainable_weights(model) -> list[tuple[str, torch.nn.Parameter]]:
    """The trained (name, parameter) pairs, in the model's order.

    Raises InputError if one is not float32: GradScaler cannot unscale float16 gradients.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in trainable:
        if parameter.dtype != torch.float32:
            raise InputError(f"the trainable weight {name} is {parameter.dtype}; it must be float32")
    return trainable


def quantized_share(model) -> float:
    """Share of the frozen parameters that are held in 4 bits."""
    in_4bit, others = count_frozen(model)
    return in_4bit / (in_4bit + others)


def count_frozen(model) -> tuple[int, int]:
    """How many frozen parameters the model has in 4 bits, and how many others, on all ranks together."""
    in_4bit = others = 0
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            in_4bit += module.in_features * module.out_features
    for name, parameter in model.named_parameters():
        is_in_4bit = isinstance(parameter, bnb.nn.Params4bit) or name.endswith(FLAT)
        if not is_in_4bit and not parameter.requires_grad:
            others += parameter.numel()
    return in_4bit, others


def is_sharded(model) -> bool:
    """Whether each rank has only a part of the frozen weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def base_memory_bytes(model) -> int:
    """Bytes of the frozen weights, including the constants of their quantization, that this rank holds."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        total += (parameter.to_local() if isinstance(parameter, DTensor) else parameter).nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += sum(value.nbytes for value in state.as_dict(packed=True).values())
    return total


def _has_adapter(model: str) -> bool:
    """Whether transformers would find an adapter in a model's folder or hub repository."""
    try:
        return find_adapter_config_file(model) is not None
    except (OSError, ValueError):  # no such model, or no network: loading it will say so
        return False


def _saved_tokenizer(model: str, adapter: str | None, trust_remote_code: bool):
    if adapter is not None:
        check_adapter(adapter)
    if adapter is None or adapter_file(adapter, "tokenizer_config.json") is None:
        return _from_hub(AutoTokenizer, model, trust_remote_code=trust_remote_code)
    if trust_remote_code:
        tokenizer = _from_hub(AutoTokenizer, model, trust_remote_code=True)
        if type(tokenizer).__module__.startswith(REMOTE_CODE):
            tokenizer.chat_template = saved_chat_template(adapter) or tokenizer.chat_template
            return tokenizer
    return _from_hub(AutoTokenizer, adapter, trust_remote_code=False)


def _from_hub(auto_class, model: str, **options):
    try:
        return auto_class.from_pretrained(model, **options)
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise InputError(
            f"cannot load '{model}': {first_line(error)} - give a model folder or a hub id; for a hub model "
            "check the name and the network, and for a gated one (such as meta-llama/Llama-2-7b-hf) accept "
            "its license on its page and run `hf auth login`"
        ) from error
