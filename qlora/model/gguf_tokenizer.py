"""A tokenizer as llama.cpp reads it from a GGUF file. Needs the package gguf.

llama.cpp has two algorithms for BPE. "llama" merges neighbors whose joined text is the token with the highest
score, as SentencePiece does. "gpt2" is byte-level BPE with a list of merges and one of the pre-tokenizers
that llama.cpp knows by name. A tokenizer that neither reproduces is refused.
"""

import json
from dataclasses import dataclass
from itertools import groupby

from gguf import GGUFWriter, TokenType

from qlora.errors import InputError

CONVERTER = "convert it with llama.cpp's convert_hf_to_gguf.py, which knows more of them"
STOP_NAMES = "eos", "eot", "eom"  # a file names no other tokens that end an answer
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]

# The regular expressions with which tokenizers split a text before BPE.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# (normalizer, steps of the pre-tokenizer, ignore_merges) -> its name in llama.cpp (src/llama-vocab.cpp).
# llama.cpp has no NFC: text that is not in this form already gets other tokens with Qwen's.
PRE_TOKENIZERS = {
    (None, ("ByteLevel with words",), False): "gpt-2",
    (None, (GPT2_WORDS, "ByteLevel"), False): "gpt-2",
    (None, ("Digits", "ByteLevel with words"), False): "smollm",
    (None, (WORDS % "{1,3}", "ByteLevel"), True): "llama-bpe",
    (None, (WORDS % "{1,3}", "ByteLevel"), False): "smaug-bpe",  # the same, with merges
    ("NFC", (WORDS % "", "ByteLevel"), False): "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str  # "llama" or "gpt2"
    pre_tokenizer: str
    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]
    starts_with_space: bool
    special_ids: dict[str, int]  # by the names that the writer's methods have
    adds_bos: bool
    chat_template: str | None


def read_vocabulary(tokenizer, vocab_size: int, adds_bos: bool, stop_ids: list[int]) -> Vocabulary:
    """The tokenizer for llama.cpp; raises InputError if llama.cpp cannot tokenize as it does.

    `vocab_size` is the number of rows of the embeddings. `adds_bos` says whether llama.cpp is to put a BOS in
    front of a text. `stop_ids` are the tokens that end an answer, EOS first; there are names for the first
    few alone (STOP_NAMES).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"a {type(tokenizer).__name__} has no tokenizer.json: {CONVERTER}")
    definition = json.loads(backend.to_str())
    model = definition["model"]
    if model["type"] != "BPE" or model.get("dropout"):
        raise InputError(f"no tokenizer of the type {model['type']} can be exported: {CONVERTER}")
    if len(tokenizer) > vocab_size:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens, but the model only {vocab_size}")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    has_byte_tokens = bool(model.get("byte_fallback"))
    if has_byte_tokens:
        check_sentencepiece(definition, merges)
    special_ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "unk", "pad")}
    special_ids |= dict(zip(STOP_NAMES, stop_ids))
    tokens, types = _tokens(tokenizer, definition, vocab_size)
    chat_template = tokenizer.chat_template
    if isinstance(chat_template, dict):  # several, by name; a chat without tools gets this one
        chat_template = chat_template.get("default")
    return Vocabulary(
        model="llama" if has_byte_tokens else "gpt2",
        pre_tokenizer="default" if has_byte_tokens else pre_tokenizer_name(definition),
        tokens=tokens,
        types=types,
        merges=merges,
        starts_with_space=has_byte_tokens and _starts_with_space(definition),
        special_ids={name: number for name, number in special_ids.items() if number is not None},
        adds_bos=adds_bos,
        chat_template=chat_template,
    )


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add it to a file."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        writer.add_token_scores(token_scores(vocabulary))
        writer.add_add_space_prefix(vocabulary.starts_with_space)
    else:
        writer.add_token_merges([" ".join(merge) for merge in vocabulary.merges])
    for name, number in vocabulary.special_ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    # llama.cpp has defaults of its own for these two.
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def pre_tokenizer_name(definition: dict) -> str:
    """llama.cpp's name of the pre-tokenizer in a tokenizer.json; raises InputError if it has none."""
    normalizer, pre_tokenizer = definition["normalizer"], definition["pre_tokenizer"]
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    key = (
        normalizer and normalizer["type"],
        tuple(_step(part) for part in parts),
        bool(definition["model"].get("ignore_merges")),
    )
    if key not in PRE_TOKENIZERS:
        raise InputError(f"no name of llama.cpp's is known for this tokenizer's pre-tokenizer: {CONVERTER}")
    return PRE_TOKENIZERS[key]


def _step(part: dict | None) -> str | None:
    """One step of a pre-tokenizer as PRE_TOKENIZERS names it; None if llama.cpp has nothing like it."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "ByteLevel with words" if part.get("use_regex", True) else "ByteLevel"
        case {"type": "Digits", "individual_digits": True}:
            return "Digits"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return pattern
    return None


def _starts_with_space(definition: dict) -> bool:
    """Whether a tokenizer with byte fallback puts a space in front of a text.

    Raises InputError if it splits texts, or does more to them.
    """
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer, pre_tokenizer = definition["normalizer"], definition["pre_tokenizer"]
    match normalizer, pre_tokenizer:
        case {"normalizers": [{"type": "Prepend", "prepend": "▁"}, last]}, None if last == replace:
            return True
        case _, None if normalizer == replace or normalizer == {"type": "Sequence", "normalizers": [replace]}:
            return False
        case None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
            return scheme != "never"
    raise InputError(f"llama.cpp does not normalize or split text as this tokenizer does: {CONVERTER}")


def check_sentencepiece(definition: dict, merges: list[tuple[str, str]]) -> None:
    """Raise InputError unless merging by score gives the same tokens as merging by this list.

    This holds for a list made from a SentencePiece model: all ways to join two tokens into a third, ordered
    by the third.
    """
    vocabulary = definition["model"]["vocab"]
    added = {token["content"] for token in definition["added_tokens"]}
    if missing := [token for token in BYTE_TOKENS if token not in vocabulary]:
        raise InputError(f"the tokenizer has byte fallback, but no token {missing[0]}: {CONVERTER}")
    listed = set(merges)
    for token in vocabulary.keys() - added - set(BYTE_TOKENS):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary and (left, right) not in listed:
                raise InputError(
                    f"the tokenizer does not merge {left!r} and {right!r} into {token!r}, but llama.cpp "
                    f"would: {CONVERTER}"
                )
    joined = [left + right for left, right in merges]
    if len(list(groupby(joined))) != len(set(joined)):
        raise InputError(f"no scores give the order of this tokenizer's merges: {CONVERTER}")


def token_scores(vocabulary: Vocabulary) -> list[float]:
    """Minus each token's place in the list: llama.cpp merges into the token with the highest score first."""
    joined = dict.fromkeys(left + right for left, right in vocabulary.merges)
    scores = {token: -float(place) for place, token in enumerate(joined, 1)}
    return [scores.get(token, 0.0) for token in vocabulary.tokens]


def _tokens(tokenizer, definition: dict, vocab_size: int) -> tuple[list[str], list[int]]:
    """(text, type) of each id. The embeddings may have more rows than there are tokens: those are unused."""
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    has_byte_tokens = definition["model"].get("byte_fallback")
    for token, number in definition["model"]["vocab"].items():
        is_byte = has_byte_tokens and token in BYTE_TOKENS
        tokens[number], types[number] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in definition["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if has_byte_tokens and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    return tokens, [int(kind) for kind in types]
