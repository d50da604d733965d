"""The frozen 4-bit base, the LoRA adapter on it, and the tokenizer."""

from functools import partial
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from qlora.errors import InputError


def load_config(model: str, trust_remote_code: bool = False):
    """The model's configuration; raises InputError with what to do if it is not to be had."""
    return _from_hub(AutoConfig, model, trust_remote_code=trust_remote_code)


def load_tokenizer(model: str, adapter: str | None = None, trust_remote_code: bool = False):
    """The tokenizer kept beside the adapter, else the model's; no token is added, no pad token needed."""
    kept = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    return _from_hub(AutoTokenizer, adapter if kept else model, trust_remote_code=trust_remote_code)


def load_base(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    load_in_4bit: bool = True,
    quant_type: str = "nf4",
    double_quant: bool = True,
    trust_remote_code: bool = False,
):
    """Load a causal LM onto `device`, its linear layers quantized to 4 bits on the way (the output head is
    not).

    A checkpoint that is already 4-bit is loaded as it is. Unquantized weights get `dtype`. Raises InputError.
    """
    stored = getattr(load_config(model, trust_remote_code), "quantization_config", None)
    options = {"dtype": dtype, "device_map": {"": device}, "trust_remote_code": trust_remote_code}
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        is_4bit = stored.get("load_in_4bit") if isinstance(stored, dict) else stored.load_in_4bit
        if method != "bitsandbytes" or not is_4bit:
            raise InputError(
                f"{model} is already quantized with {method}: give the original model, or one "
                "quantized to 4 bits with bitsandbytes"
            )
        if not load_in_4bit:
            raise InputError(f"{model} is already 4-bit: --no_load_in_4bit needs the original model")
    elif load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    base = _from_hub(AutoModelForCausalLM, model, **options)
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = (
                dtype,
                True,
            )  # a 4-bit checkpoint stores its own
            # On CPUs with AVX512-BF16 a forward in eval mode repacks the weights for inference, after which
            # no gradient reaches the adapter: one evaluation would silently end the training (bitsandbytes
            # 0.50).
            module.support_avx512bf16_for_cpu = False
    base.config.use_cache = False
    return base


def add_adapter(
    base, r: int, alpha: int, dropout: float, target_modules: list[str], use_rslora: bool, use_dora: bool
):
    """Freeze the base and add a fresh float32 LoRA adapter; seed first, its A matrices are random."""
    targets = "all-linear" if target_modules == ["all-linear"] else target_modules
    linear = [name for name, module in base.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    for target in target_modules if targets != "all-linear" else []:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise InputError(
                f"--lora_target_modules: this model has no linear layer named {target!r}; it has {known}"
            )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    return get_peft_model(base, config)


def check_adapter(adapter: str) -> None:
    """Raise InputError, before anything is loaded, if `adapter` is no LoRA adapter folder or hub id."""
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (ValueError, OSError) as error:
        raise InputError(
            f"--adapter {adapter} is no adapter folder with an adapter_config.json, nor one on the hub: "
            f"{_first_line(error)}"
        ) from error
    if config.peft_type != "LORA":
        raise InputError(f"--adapter {adapter} is of type {config.peft_type}, not LoRA")


def load_adapter(base, adapter: str, is_trainable: bool):
    """Put a saved LoRA adapter on the base, float32; raises InputError if it does not belong to it."""
    try:
        model = PeftModel.from_pretrained(base, adapter, is_trainable=is_trainable)
    except (ValueError, OSError, SafetensorError) as error:
        raise InputError(f"cannot load an adapter from {adapter}: {_first_line(error)}") from error
    except RuntimeError as error:
        raise InputError(
            f"the adapter {adapter} does not fit this base model: {_first_line(error)}"
        ) from error
    return model


def check_gradients(trainable: list[tuple[str, torch.nn.Parameter]]) -> None:
    """Raise InputError if the backward pass missed a trained weight: it would silently stay as it is."""
    for name, parameter in trainable:
        if parameter.grad is None:
            raise InputError(
                f"the trainable weight {name} got no gradient in the first step: is its layer ever used?"
            )


def prepare_for_training(model, gradient_checkpointing: bool) -> list[tuple[str, torch.nn.Parameter]]:
    """Set training mode and checkpointing; return the trainable (name, parameter) pairs.

    peft.prepare_model_for_kbit_training is not used: it would cast norms, embeddings and head to float32
    (about 0.5 GB more on 7B). Raises InputError if a trainable weight is not float32: float16 ones cannot be
    unscaled.
    """
    if gradient_checkpointing:
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise InputError("this model's layers cannot be checkpointed: --gradient_checkpointing none")
        for layer in layers:
            layer.gradient_checkpointing = True
            # Non-reentrant: the reentrant kind needs an input that requires a gradient.
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    model.train()
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in trainable:
        if parameter.dtype != torch.float32:
            raise InputError(f"the trainable weight {name} is {parameter.dtype}; it must be float32")
    return trainable


def base_memory_bytes(model) -> int:
    """Bytes of the frozen weights, with the constants of their quantization."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += sum(value.nbytes for value in state.as_dict(packed=True).values())
    return total


def _from_hub(auto_class, model: str, **options):
    try:
        return auto_class.from_pretrained(model, **options)
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise InputError(
            f"cannot load '{model}': {_first_line(error)} - give a model folder or a hub id; for a hub model "
            "check the name and the network, and for a gated one (such as meta-llama/Llama-2-7b-hf) accept "
            "its licence on its page and run `hf auth login`"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
