"""A small Llama with random weights and a tokenizer trained on the spot, without a download."""

import json
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, UNK = "<s>", "</s>", "<unk>"


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: BPE, with U+2581 for spaces and byte tokens for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True, fuse_unk=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNK, BOS, EOS, *byte_tokens],
        show_progress=False,
        max_token_length=16,
    )
    # Llama's merges cross neither words nor punctuation, so we train on pieces that do not either.
    pieces = (
        piece for text in texts for piece in re.findall(r"▁?(?:\w+|[^\w▁]+)|▁", f"▁{text}".replace(" ", "▁"))
    )
    tokenizer.train_from_iterator(pieces, trainer)
    # Make the byte tokens ordinary ones: decoding would skip special tokens.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in (UNK, BOS, EOS)]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    # Not before training, which would then put a second space in front of every piece.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token=UNK)


def make_base(folder: str | Path, texts: list[str], vocab_size: int = 1024, seed: int = 0, **sizes) -> None:
    """Write a model and its tokenizer to `folder`; `sizes` are options of LlamaConfig."""
    tokenizer = make_tokenizer(texts, vocab_size)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        **sizes,
    )
    with torch.no_grad():
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
