"""Write a Llama-2-shaped model with random weights in 4 bits (NF4, double-quantized), a layer at a time.

python benchmarks/random_model.py --shape 70b --tokenizer meta-llama/Llama-2-7b-hf --out models/random-70b

Needs a CUDA GPU, which quantizes, and disk for half a byte per weight (70b: 38 GB). All layers have the same
weights: a step takes as long as with any others.
"""

import argparse
import json
from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaConfig

SHAPES = {  # hidden size, MLP size, layers, heads, heads of keys and values
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}


def random_weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02


def quantized(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """A random linear layer's tensors in a 4-bit checkpoint, by what follows the layer's name."""
    weight = bnb.nn.Params4bit(random_weight(rows, columns), requires_grad=False, quant_type="nf4").cuda()
    state = weight.quant_state.as_dict(packed=True)
    return {"weight": weight.data.cpu()} | {f"weight.{name}": part.cpu() for name, part in state.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--tokenizer", required=True, help="hub id or folder")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    hidden, mlp, layers, heads, kv_heads = SHAPES[options.shape]
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=4096,
        rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()  # fmt: skip
    config.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)

    keys = kv_heads * hidden // heads
    layer = {"input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    layer["post_attention_layernorm.weight"] = layer["input_layernorm.weight"].clone()
    for name, shape in {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp),
    }.items():  # fmt: skip
        layer |= {f"{name}.{part}": tensor for part, tensor in quantized(*shape).items()}
    rest = {
        "model.embed_tokens.weight": random_weight(32000, hidden).cpu(),
        "model.norm.weight": layer["input_layernorm.weight"].clone(),
        "lm_head.weight": random_weight(32000, hidden).cpu(),
    }
    shards = [{f"model.layers.{n}.{name}": part for name, part in layer.items()} for n in range(layers)]
    weight_map = {}
    for number, shard in enumerate(tqdm([*shards, rest], unit="file"), 1):
        file = f"model-{number:05}-of-{layers + 1:05}.safetensors"
        save_file(shard, options.out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (options.out / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
