"""Segments of a row's text, each trained or not, and their token ids."""

import re
from collections.abc import Iterator
from functools import lru_cache

IGNORE_INDEX = -100  # label of a token left out of the loss: cross_entropy's default ignore_index

Segment = tuple[str, bool]  # (text, whether it is trained)

# What a row spells between these two is plain text, even if it reads like a special token. They are Unicode
# noncharacters, which no text for interchange contains (Unicode, section 23.7).
PLAIN_START, PLAIN_END = "\ufdd0", "\ufdd1"
NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
PLAIN = re.compile(f"{PLAIN_START}(.*?){PLAIN_END}", re.DOTALL)


class DropRow(Exception):
    """This row cannot be trained on. The message is the reason it is counted under."""


def mark_special_tokens(text: str, tokenizer) -> str:
    """Mark each special token that a text spells, so that encode() takes it as plain text.

    Without this, an answer that mentions `</s>` would end there. Raises DropRow for a text that contains
    noncharacters, which are what it is marked with.
    """
    if NONCHARACTERS.search(text):
        raise DropRow("its text contains Unicode noncharacters (U+FDD0 to U+FDEF)")
    return special_tokens(tokenizer).sub(f"{PLAIN_START}\\g<0>{PLAIN_END}", text)


def spells_special_tokens(segments: list[Segment]) -> bool:
    """Whether mark_special_tokens() found any in these texts."""
    return any(PLAIN_START in text for text, _ in segments)


def special_tokens(tokenizer) -> re.Pattern:
    """A pattern that finds the tokenizer's special tokens in a text."""
    return _special_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)  # asked for every row, and slow to build for the hundreds of special tokens of Llama 3
def _special_tokens(tokenizer, _vocabulary: int) -> re.Pattern:
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    alternatives = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    return re.compile(alternatives or r"(?!)")  # which matches nothing


def encode(segments: list[Segment], adds_bos: bool, tokenizer) -> tuple[list[int], list[int]]:
    """Tokenize segments into (input_ids, labels) of equal length, with one leading BOS or none.

    There is a BOS if `adds_bos`, or if the text itself starts with one; never two. A segment's ids do not
    depend on what follows it: a prompt has the same ids with and without its answer, so generation starts
    from exactly what was trained. Labels are the ids, and IGNORE_INDEX where not trained.
    """
    input_ids, labels = [], []
    (first, is_first_trained), *others = segments
    while tokenizer.bos_token and first.lstrip().startswith(tokenizer.bos_token):
        first, adds_bos = first.lstrip().removeprefix(tokenizer.bos_token), True
    if adds_bos:
        input_ids.append(tokenizer.bos_token_id)
        labels.append(IGNORE_INDEX)
    held_spaces = ""  # from the end of the segment before
    previous, previous_ids = "", None  # text of the last piece with any; its ids if tokenized alone
    for text, is_trained in [(first, is_first_trained), *others]:
        text = held_spaces + text
        # Tokenizers join a space with the word after it, so a prompt's trailing spaces belong to the answer.
        held_spaces = "" if is_trained else text[len(text.rstrip(" ")) :]
        for piece, is_plain in _pieces(text.removesuffix(held_spaces)):
            if is_plain:
                ids = _ids("\n" + piece, tokenizer, is_plain=True)[len(_ids("\n", tokenizer)) :]
                previous, previous_ids = "\n", None
            else:
                ids = _continuation_ids(previous, previous_ids, piece, tokenizer)
                previous, previous_ids = piece, None if previous else ids
            input_ids += ids
            labels += ids if is_trained else [IGNORE_INDEX] * len(ids)
    return input_ids, labels


def adds_bos_itself(tokenizer) -> bool:
    """Whether the tokenizer puts a BOS in front of a text, as Llama's does; Qwen's and GPT-2's do not."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """(piece, whether it is marked as plain text) for each nonempty piece of a text."""
    for number, piece in enumerate(PLAIN.split(text)):
        if piece:
            yield piece, number % 2 == 1


def _continuation_ids(previous: str, previous_ids: list[int] | None, text: str, tokenizer) -> list[int]:
    """Ids of `text` as it stands after `previous`, whose own ids must not change.

    Tokenized alone, a text may start differently: Llama 2's tokenizer puts a space in front of it. If the end
    of `previous` and the start of `text` would merge into one token, it is tokenized as after a newline.
    """
    for context, context_ids in ((previous, previous_ids), ("\n", None)) if previous else ():
        context_ids = context_ids or _ids(context, tokenizer)
        joined_ids = _ids(context + text, tokenizer)
        if joined_ids[: len(context_ids)] == context_ids:
            return joined_ids[len(context_ids) :]
    return _ids(text, tokenizer)


def _ids(text: str, tokenizer, is_plain: bool = False) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=is_plain)
    return encoded["input_ids"]
