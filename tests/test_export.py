"""python -m qlora.export: the GGUF file holds the model and its tokenizer, or there is none."""

import json
import math
import os
import pickle
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qlora import export
from qlora.data.formats import PROMPT_TEMPLATE_MARK
from qlora.data.formatting import Formatting
from qlora.errors import InputError
from qlora.merge import SAMPLE_TEXTS
from qlora.model.adapter import ADAPTER, SETTINGS
from qlora.model.generation import PromptWriter
from qlora.model.gguf_tokenizer import check_sentencepiece, pre_tokenizer_name, read_vocabulary, token_scores
from qlora.model.ollama import go_template, read_chat_texts

HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4, 2, 16, 448
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 256,
    "initializer_range": 0.1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch):
    """As if it were not installed: what the tests say does not depend on it."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)


@pytest.fixture
def model_folder(session_tokenizer, tmp_path):
    """Make a model's folder: model_folder(model_class, config_class, **settings)."""

    def make(model_class=LlamaForCausalLM, config_class=LlamaConfig, **settings) -> Path:
        torch.manual_seed(0)
        model = model_class(config_class(**{**SIZES, "tie_word_embeddings": False, **settings}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.normal_(1, 0.1)  # norms are 1 and biases 0 otherwise
        model.save_pretrained(tmp_path / "merged")
        session_tokenizer.save_pretrained(tmp_path / "merged")
        return tmp_path / "merged"

    return make


def exported(folder: Path, kind: str = "f32", *flags: str) -> GGUFReader:
    export.main(["--model", str(folder), "--gguf", kind, *flags])
    return GGUFReader(folder / f"{folder.name}-{kind}.gguf")


def tensors(reader: GGUFReader) -> dict[str, np.ndarray]:
    """The tensors in float32."""
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def values(reader: GGUFReader) -> dict:
    return {name: field.contents() for name, field in reader.fields.items()}


def gguf_name(name: str) -> str:
    """A tensor's name as the GGUF specification and llama.cpp's llama-arch.cpp give it."""
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "model.layers.": "blk.", "self_attn.o_proj": "attn_output", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for part, other in names.items():
        name = name.replace(part, other)
    return name


def as_transformers_orders(rows: np.ndarray, name: str) -> np.ndarray:
    """llama.cpp rotates rows 2i and 2i + 1 of a head together, transformers i and i + HEAD_DIM / 2."""
    if "attn_q" not in name and "attn_k" not in name:
        return rows
    ordered = np.empty_like(rows)
    for head in range(len(rows) // HEAD_DIM):
        for i in range(HEAD_DIM // 2):
            ordered[head * HEAD_DIM + i] = rows[head * HEAD_DIM + 2 * i]
            ordered[head * HEAD_DIM + i + HEAD_DIM // 2] = rows[head * HEAD_DIM + 2 * i + 1]
    return ordered


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_each_tensor_is_the_models_weight(model_folder, kind):
    folder = model_folder(attention_bias=True)
    weights = load_file(folder / "model.safetensors")
    reader = exported(folder, kind)
    found = tensors(reader)
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert found.keys() == {gguf_name(name) for name in weights}
    for name, weight in weights.items():
        got = as_transformers_orders(found[gguf_name(name)], gguf_name(name))
        weight = weight.numpy()
        if weight.ndim == 1 or kind == "f32":
            assert types[gguf_name(name)] == GGMLQuantizationType.F32
            assert np.array_equal(got, weight), name
        elif kind == "f16":
            assert types[gguf_name(name)] == GGMLQuantizationType.F16
            assert np.array_equal(got, weight.astype(np.float16).astype(np.float32)), name
        else:  # half a step of a block's 255 levels, and the rounding of its scale to 16 bits
            assert types[gguf_name(name)] == GGMLQuantizationType.Q8_0
            largest = np.abs(weight.reshape(-1, 32)).max(axis=1, keepdims=True)
            error = np.abs(got - weight).reshape(-1, 32)
            assert (error <= largest * (0.5 / 127 + 2**-11) * 1.001).all() and error.max() > 0, name


def test_the_files_metadata_are_the_models(model_folder):
    folder = model_folder(rms_norm_eps=3e-6, rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    found = values(exported(folder, "q8_0"))
    expected = {
        "general.architecture": "llama", "general.file_type": 7, "llama.context_length": 256,
        "llama.block_count": 2, "llama.embedding_length": 64, "llama.feed_forward_length": 128,
        "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": HEAD_DIM, "llama.attention.value_length": HEAD_DIM,
        "llama.rope.dimension_count": HEAD_DIM, "llama.rope.freq_base": 12345.0,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(3e-6), "llama.vocab_size": VOCABULARY,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize("number", [VOCABULARY - 1, 5000, -1])
def test_a_stop_id_without_a_token_is_refused(model_folder, number):
    folder = model_folder()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, number]}))
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit, match=f"eos_token_id {number} .*generation_config.json.* no token"):
        exported(folder)
    assert sorted(folder.iterdir()) == before


def test_stop_tokens_that_a_file_cannot_hold_are_named(model_folder, tokenizer, capsys):
    folder = model_folder()
    tokenizer.add_tokens(['<"end">'], special_tokens=True)
    tokenizer.save_pretrained(folder)
    stops = [2, 7, tokenizer.convert_tokens_to_ids('<"end">'), 9, 10]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    found = values(exported(folder))
    assert [found[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == stops[:3]
    output = capsys.readouterr().out
    assert "only 3 stop tokens: llama.cpp may not stop at <0x06>, <0x07>\n" in output
    assert 'a Modelfile cannot name a stop token with a quotation mark: <"end">' in output
    lines = (folder / "merged-f32.Modelfile").read_text().splitlines()
    stops = [line.split()[-1] for line in lines if line.startswith("PARAMETER stop ")]
    assert stops == ['"</s>"', '"<0x04>"', '"<0x06>"', '"<0x07>"']


def test_of_several_chat_templates_the_default_is_written(model_folder, tokenizer):
    folder = model_folder()
    tokenizer.chat_template = {"default": CHATML, "tool_use": NUMBERED}
    tokenizer.save_pretrained(folder)
    assert values(exported(folder))["tokenizer.chat_template"] == CHATML


def test_tied_embeddings_are_written_once(model_folder):
    folder = model_folder(tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()  # as some files have it
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = tensors(exported(folder))
    assert "token_embd.weight" in found and "output.weight" not in found


def test_qwen2_keeps_the_order_of_its_rows(model_folder):
    folder = model_folder(Qwen2ForCausalLM, Qwen2Config)
    weights = load_file(folder / "model.safetensors")
    reader = exported(folder)
    assert values(reader)["general.architecture"] == "qwen2"
    for name, weight in weights.items():
        assert np.array_equal(tensors(reader)[gguf_name(name)], weight.numpy()), name
    assert "blk.1.attn_k.bias" in tensors(reader)


def test_llama3s_frequencies_are_those_of_the_model(model_folder):
    rope = {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    folder = model_folder(rope_parameters=rope)
    factors = tensors(exported(folder))["rope_freqs.weight"]
    frequencies = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq.numpy()
    plain = np.array([500.0 ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)])
    np.testing.assert_allclose(plain / factors, frequencies, rtol=1e-6)
    assert len(set(factors.tolist())) > 2


def test_a_sliding_window_limits_the_context(model_folder):
    folder = model_folder(MistralForCausalLM, MistralConfig, sliding_window=100)
    assert values(exported(folder))["llama.context_length"] == 100


def merge_by_score(text: str, tokens: list[str], scores: list[float]) -> list[str]:
    """llama.cpp's algorithm: join the two neighbors whose joined text is the token with the highest score."""
    scores = dict(zip(tokens, scores))
    symbols = list(text)
    while True:
        pairs = [(scores[one + other], -i) for i, (one, other) in enumerate(pairwise(symbols))
                 if one + other in scores]  # fmt: skip
        if not pairs:
            return symbols
        place = -max(pairs)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


def test_the_scores_give_the_tokens_of_the_merges(model_folder, session_tokenizer):
    found = values(exported(model_folder()))
    tokens, scores = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"]
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("llama", "default")
    assert found["tokenizer.ggml.add_bos_token"] and found["tokenizer.ggml.add_space_prefix"]
    for text in ["What does a red river look like?", "A very old wooden boat is white all over."]:
        want = session_tokenizer.tokenize(text)
        assert merge_by_score("▁" + text.replace(" ", "▁"), tokens, scores) == want
        assert max(map(len, want)) > 3
    kinds = found["tokenizer.ggml.token_type"]
    assert kinds[:3] == [2, 3, 3] and set(kinds[3:259]) == {6}  # unknown, control; bytes
    assert tokens[3] == "<0x00>" and tokens[-1] == f"[PAD{VOCABULARY - 1}]" and kinds[-1] == 5  # unused
    assert kinds[tokens.index("▁")] == 1


def test_the_earlier_merge_has_the_higher_score():
    """With equal scores, "ab" would be merged first: it stands further left."""
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "c", "ab", "bc"]
    bpe = models.BPE({token: number for number, token in enumerate(tokens)}, [("b", "c"), ("a", "b")],
                     byte_fallback=True, unk_token="<unk>")  # fmt: skip
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    vocabulary = read_vocabulary(whole, len(tokens), False, [1])
    assert whole.tokenize("abc") == ["a", "bc"] and not vocabulary.starts_with_space
    assert merge_by_score("abc", vocabulary.tokens, token_scores(vocabulary)) == ["a", "bc"]


def test_merges_that_scores_cannot_give_are_refused(session_tokenizer):
    state = json.loads(session_tokenizer.backend_tokenizer.to_str())
    left, right = state["model"]["merges"].pop()
    incomplete = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    message = f"does not merge '{left}' and '{right}' into '{left}{right}', but llama.cpp would: .*convert_hf"
    with pytest.raises(InputError, match=message):
        read_vocabulary(incomplete, VOCABULARY, True, [2])
    state["model"]["merges"].insert(0, [left, right])  # and the same way again, at the end
    state["model"]["merges"].append([left, right])
    with pytest.raises(InputError, match="no scores give the order of this tokenizer's merges"):
        check_sentencepiece(state, [tuple(merge) for merge in state["model"]["merges"]])


LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS_AND_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)


def byte_level(pre_tokenizer, ignore_merges: bool = False, normalizer=None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer."""
    vocabulary = {"<eos>": 0} | {
        letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)
    }
    vocabulary["ab"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")], ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.add_tokens(["<tool>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def split_then_bytes(pattern: str):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


@pytest.mark.parametrize(
    "tokenizer, name",
    [
        (byte_level(WORDS_AND_BYTES), "gpt-2"),
        (byte_level(pre_tokenizers.Sequence([DIGITS, WORDS_AND_BYTES])), "smollm"),
        (byte_level(split_then_bytes(LLAMA3_WORDS), ignore_merges=True), "llama-bpe"),
        (
            byte_level(split_then_bytes(LLAMA3_WORDS.replace("{1,3}", "")), normalizer=normalizers.NFC()),
            "qwen2",
        ),
        (byte_level(WORDS_AND_BYTES, ignore_merges=True), None),
        (byte_level(WORDS_AND_BYTES, normalizer=normalizers.Lowercase()), None),
        (byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), None),
        (byte_level(split_then_bytes(r"\w+|\W+")), None),
    ],
)
def test_the_pre_tokenizer_is_known_by_its_definition(tokenizer, name):
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    if name is None:
        with pytest.raises(InputError, match=r"pre-tokenizer: .*convert_hf_to_gguf\.py"):
            pre_tokenizer_name(definition)
    else:
        assert pre_tokenizer_name(definition) == name


def test_a_byte_level_tokenizer_is_written_with_its_merges(model_folder):
    folder = model_folder()
    byte_level(WORDS_AND_BYTES).save_pretrained(folder)
    found = values(exported(folder))
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert found["tokenizer.ggml.merges"] == ["a b"] and not found["tokenizer.ggml.add_bos_token"]
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert [kinds[tokens.index(token)] for token in ("<eos>", "<tool>", "ab", "Ġ")] == [3, 4, 1, 1]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, r"rotary .*\(yarn\)"),
        ({"hidden_act": "gelu"}, "llama.cpp computes silu in these models, not gelu"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(model_folder, settings, message):
    folder = model_folder(**settings)
    with pytest.raises(SystemExit, match=message):
        exported(folder)
    assert not list(folder.glob("*.gguf*"))


def test_other_architectures_are_refused_in_one_line(base, tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=448, n_embd=64, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "m"
    )
    with pytest.raises(SystemExit, match=r"type gpt2 cannot be exported, only llama.*convert_hf_to_gguf\.py"):
        exported(tmp_path / "m")


def test_a_failed_export_leaves_no_file(model_folder):
    folder = model_folder()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit, match=r"layers\.1\.mlp\.up_proj.* float16 cannot hold: choose --gguf f32"):
        exported(folder, "f16")
    assert sorted(folder.iterdir()) == before
    assert tensors(exported(folder, "f32"))["blk.1.ffn_up.weight"][3, 4] == 1e6


@pytest.mark.parametrize("name", ["merged-f16.gguf", "merged-f16.Modelfile"])
def test_an_existing_file_is_kept(model_folder, name):
    folder = model_folder()
    (folder / name).write_text("mine")
    with pytest.raises(SystemExit, match=f"{name} already exists: choose another --output_file"):
        exported(folder, "f16")
    assert (folder / name).read_text() == "mine" and len(list(folder.glob("merged-*"))) == 1


def test_the_gguf_file_cannot_have_the_modelfiles_name(model_folder, tmp_path):
    file = tmp_path / "mine.Modelfile"
    with pytest.raises(SystemExit, match=r"mine\.Modelfile is the name of the Modelfile .*mine\.gguf"):
        exported(model_folder(), "f16", "--output_file", str(file))
    assert not file.exists()


def test_the_gguf_file_is_in_place_before_the_modelfile(model_folder, monkeypatch):
    renamed = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda old, new: (renamed.append(new.name), rename(old, new)))
    exported(model_folder(), "f16")
    assert renamed == ["merged-f16.gguf", "merged-f16.Modelfile"]


def test_incomplete_weights_are_refused(model_folder):
    folder = model_folder()
    weights = load_file(folder / "model.safetensors")
    for part in ("up_proj", "down_proj"):
        del weights[f"model.layers.1.mlp.{part}.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    before = sorted(folder.iterdir())
    message = r"incomplete: model\.layers\.1\.mlp\.up_proj\.weight is missing \(1 more\)"
    with pytest.raises(SystemExit, match=message):
        exported(folder)
    assert sorted(folder.iterdir()) == before


def test_without_gguf_the_error_says_what_to_install(model_folder, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("qlora.model.gguf_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delattr("qlora.model.gguf_file", raising=False)
    monkeypatch.delattr("qlora.model.gguf_tokenizer", raising=False)
    with pytest.raises(SystemExit, match=r"needs the package gguf: pip install -r requirements-gguf\.txt"):
        exported(model_folder())


def test_an_adapter_is_to_be_merged_first(tmp_path):
    save_file({}, tmp_path / ADAPTER)
    with pytest.raises(SystemExit, match=r"is an adapter: merge it first \(python -m qlora\.merge\)"):
        exported(tmp_path)


# What Ollama is told


def test_the_modelfile_asks_as_the_training_did(model_folder, capsys):
    folder = model_folder()
    (folder / SETTINGS).write_text(json.dumps({"dataset_format": "alpaca"}))
    exported(folder, "f16")
    lines = (folder / "merged-f16.Modelfile").read_text()
    assert lines.startswith("FROM ./merged-f16.gguf\n")
    assert (
        'TEMPLATE """{{ range $i, $message := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}'
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n"
        '### Instruction:\n{{ $message.Content }}\n\n### Response:\n{{ end }}{{ end }}"""\n' in lines
    )
    assert 'PARAMETER stop "</s>"\n' in lines and "PARAMETER num_ctx 256\n" in lines
    assert "PARAMETER temperature 0\n" in lines
    assert "not compared with the model: llama-cpp-python is not installed" in capsys.readouterr().out


def test_an_unknown_row_format_of_the_training_is_refused(model_folder):
    folder = model_folder()
    (folder / SETTINGS).write_text(json.dumps({"dataset_format": "sharegpt"}))
    with pytest.raises(SystemExit, match=r"generate_defaults\.json .*'sharegpt'.* --dataset_format"):
        exported(folder)
    assert not list(folder.glob("merged-*"))
    exported(folder, "f32", "--dataset_format", "alpaca")


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NUMBERED = "{% for message in messages %}{{ loop.length }}: {{ message['content'] }}{% endfor %}"


def prompt_writer(tokenizer, row_format: str, chat_template: str | None = None) -> PromptWriter:
    tokenizer.chat_template = chat_template
    return PromptWriter(tokenizer, Formatting(row_format), math.inf)


def test_chatml_is_written_in_go(tokenizer):
    template = go_template(read_chat_texts(prompt_writer(tokenizer, "messages", CHATML)))
    assert template == (
        '{{ range $i, $message := .Messages }}{{ if eq $message.Role "system" }}<|im_start|>system\n'
        "{{ $message.Content }}<|im_end|>\n<|im_start|>user\n{{ end }}"
        '{{ if eq $message.Role "user" }}{{ if eq $i 0 }}<|im_start|>user\n'
        '{{ else if not (and (eq $i 1) (eq (index $.Messages 0).Role "system")) }}'
        "<|im_end|>\n<|im_start|>user\n{{ end }}{{ $message.Content }}"
        "<|im_end|>\n<|im_start|>assistant\n{{ end }}"
        '{{ if eq $message.Role "assistant" }}{{ $message.Content }}{{ end }}{{ end }}'
    )


@pytest.mark.parametrize(
    "row_format, start, after_question, before_answer, between",
    [
        ("guanaco", "### Human: ", "### Assistant:", " ", "### Human: "),
        ("llama2", "[INST] ", " [/INST]", " ", " </s><s>[INST] "),  # llama.cpp adds the first <s>
        ("text", "", "", "", "\n"),
        ("prompt_completion", "", "", None, ""),
    ],
)
def test_row_formats_are_written_in_go(tokenizer, row_format, start, after_question, before_answer, between):
    texts = read_chat_texts(prompt_writer(tokenizer, row_format))
    assert (texts.start, texts.after_question, texts.before_answer) == (start, after_question, before_answer)
    assert texts.between == between and texts.system is None


@pytest.mark.parametrize(
    "chat_template, reason",
    [
        (NUMBERED, "does not wrap every turn in the same text"),
        (CHATML.replace("<|im_start|>", "{{"), 'writes {{, }} or """'),
    ],
)
def test_a_template_without_an_equivalent_in_go_is_left_out(model_folder, tokenizer, chat_template, reason):
    folder = model_folder()
    texts = read_chat_texts(prompt_writer(tokenizer, "messages", chat_template))
    assert texts is None or go_template(texts) is None
    (folder / "chat_template.jinja").write_text(chat_template)
    exported(folder)
    text = (folder / "merged-f32.Modelfile").read_text()
    assert "TEMPLATE " not in text.replace("No TEMPLATE", "")
    assert f"# No TEMPLATE: this chat template {reason}" in text


def test_chats_of_a_model_trained_on_other_rows_take_a_template_from_a_file(model_folder, tmp_path):
    folder = model_folder()
    (folder / "chat_template.jinja").write_text(PROMPT_TEMPLATE_MARK + "{{ messages[-1]['content'] }}")
    (tmp_path / "chatml.jinja").write_text(CHATML)
    flags = ["--dataset_format", "messages"]
    with pytest.raises(SystemExit, match=r"row format of its training, not for messages: .*--chat_template"):
        exported(folder, "f32", *flags)
    found = values(exported(folder, "f32", *flags, "--chat_template", str(tmp_path / "chatml.jinja")))
    assert found["tokenizer.chat_template"] == CHATML
    assert "<|im_start|>user\n" in (folder / "merged-f32.Modelfile").read_text()


# The comparison, with a stand-in for llama-cpp-python

STAND_IN = """
import os, pickle
from pathlib import Path

class Llama:
    def __init__(self, path, **options):
        self.output = pickle.loads((Path(__file__).parent / "output").read_bytes())
        if self.output is None:
            os.abort()
        if isinstance(self.output, Exception):
            raise self.output
    def tokenize(self, text, add_bos, special):
        return self.output["prompt"] if add_bos else self.output["tokens"][text.decode()]
    def reset(self):
        pass
    def eval(self, ids):
        self.scores = self.output["logits"][tuple(ids)]
"""


@pytest.fixture
def llama_output(tmp_path, monkeypatch):
    """Install a llama_cpp that returns what the test gives."""

    def install(output: dict | None) -> None:
        (tmp_path / "site" / "llama_cpp").mkdir(parents=True)
        (tmp_path / "site" / "llama_cpp" / "__init__.py").write_text(STAND_IN)
        (tmp_path / "site" / "llama_cpp" / "output").write_bytes(pickle.dumps(output))
        monkeypatch.delitem(sys.modules, "llama_cpp")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    return install


def model_output(folder: Path, tokenizer) -> dict:
    """What a perfect llama.cpp would return."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [tokenizer(text)["input_ids"] for text in SAMPLE_TEXTS]
    with torch.no_grad():
        logits = {tuple(ids): model(torch.tensor([ids])).logits[0].numpy() for ids in rows}
    texts = export.TOKENIZED_TEXTS
    tokens = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts}
    return {"tokens": tokens, "prompt": tokenizer(SAMPLE_TEXTS[0])["input_ids"], "logits": logits}


def test_a_file_that_agrees_with_the_model_is_kept(model_folder, session_tokenizer, llama_output, capsys):
    folder = model_folder()
    llama_output(model_output(folder, session_tokenizer))
    exported(folder)
    output = capsys.readouterr().out
    assert float(re.search(r"in llama\.cpp; KL divergence (\S+) nats per token", output)[1]) < 1e-9
    assert "tokenizes" not in output


@pytest.mark.parametrize(
    "defect, message",
    [
        ("logits", r"KL divergence .*limit --max_kl 0\.01; nothing was saved"),
        ("tokens", r"tokenizes differently: expected .*, llama\.cpp gives .*; nothing was saved"),
        ("crash", r"llama-cpp-python crashed, .*GGML_NATIVE=OFF"),
        ("load", r"llama-cpp-python cannot run the file: libgomp\.so\.1"),
    ],
)
def test_a_file_that_differs_from_the_model_is_not_kept(
    model_folder, session_tokenizer, llama_output, defect, message
):
    folder = model_folder()
    output = model_output(folder, session_tokenizer)
    if defect == "logits":
        output["logits"] = {ids: 2 * logits for ids, logits in output["logits"].items()}
    elif defect == "tokens":
        output["tokens"][export.TOKENIZED_TEXTS[2]][5] += 1
    elif defect == "crash":
        output = None
    elif defect == "load":
        output = OSError("libgomp.so.1: cannot open shared object file")
    llama_output(output)
    with pytest.raises(SystemExit, match=message):
        exported(folder)
    assert not list(folder.glob("merged-*"))


def test_an_os_error_of_the_model_is_not_blamed_on_the_output_file(
    model_folder, session_tokenizer, llama_output, monkeypatch
):
    folder = model_folder()
    llama_output(model_output(folder, session_tokenizer))

    def fail(*_, **__):
        raise OSError("no such library")

    monkeypatch.setattr(export, "load_base", fail)
    with pytest.raises(OSError, match=r"^no such library$"):
        exported(folder)
    assert not list(folder.glob("merged-*"))


def test_a_prompt_that_llama_cpp_tokenizes_differently_is_reported(
    model_folder, session_tokenizer, llama_output, capsys
):
    folder = model_folder()
    output = model_output(folder, session_tokenizer)
    output["prompt"] = output["prompt"][1:]  # without BOS
    llama_output(output)
    exported(folder)
    assert (
        "llama.cpp tokenizes a prompt differently than the training did: expected ['<s>'"
        in capsys.readouterr().out
    )
