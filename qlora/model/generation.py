"""Prompts as token ids, and answers to them in left-padded batches."""

import math
from pathlib import Path

import torch

from qlora.data.formats import (
    FALLBACK_CHAT_TEMPLATE,
    DropRow,
    Segment,
    chat_segments,
    encode,
    prompt_segments,
    starts_with_bos,
)
from qlora.data.sources import read_rows
from qlora.errors import InputError


class PromptWriter:
    """Writes chats and rows as the ids of a prompt, in the row format that the adapter was trained on.

    Raises InputError for a prompt that cannot be written, is empty, or has more than `max_tokens` tokens.
    """

    def __init__(self, tokenizer, row_format: str, text_field: str, max_tokens: float):
        self.tokenizer = tokenizer
        self.row_format = row_format
        self.text_field = text_field
        self.max_tokens = max_tokens
        if row_format == "messages" and tokenizer.chat_template is None:
            tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE
        self.adds_bos = starts_with_bos(row_format, tokenizer)

    @property
    def has_history(self) -> bool:
        """Whether earlier turns of a chat are part of a prompt."""
        return self.row_format not in ("alpaca", "prompt_completion")

    def chat(self, messages: list[dict]) -> list[int]:
        """The prompt of the next answer in a chat of {"role", "content"} turns."""
        try:
            return self._ids(chat_segments(messages, self.row_format, self.tokenizer), "the prompt")
        except DropRow as reason:
            raise InputError(f"the prompt cannot be written as {self.row_format}: {reason}") from reason

    def row(self, row: dict, where: str) -> list[int]:
        """The prompt of a row of data, without its answer if it has one."""
        try:
            return self._ids(prompt_segments(row, self.row_format, self.text_field, self.tokenizer), where)
        except DropRow as reason:
            raise InputError(f"{where}: {reason}") from reason

    def _ids(self, segments: list[Segment], where: str) -> list[int]:
        ids, _ = encode(segments, self.adds_bos, self.tokenizer)
        if not ids:
            raise InputError(f"{where} is empty")
        if len(ids) > self.max_tokens:
            raise InputError(
                f"{where} has {len(ids)} tokens: with the answer's --max_new_tokens that is more than the "
                f"model's context, which leaves {self.max_tokens} for a prompt"
            )
        return ids


def room_for_prompt(model_config, new_tokens: int, flag: str) -> float:
    """Tokens that a prompt may have before an answer of `new_tokens`; raises InputError if there are none."""
    context = getattr(model_config, "max_position_embeddings", math.inf)
    if new_tokens >= context:
        raise InputError(f"--{flag} {new_tokens} leaves no room in a context of {context}")
    return context - new_tokens


def read_prompts(path: str, writer: PromptWriter, split: str = "train") -> list[tuple[str, dict, list[int]]]:
    """(where it stands, row, prompt's ids) of each row of a file or data set: in txt a line, else the columns
    of the row format, or "prompt". Raises InputError."""
    is_txt = Path(path).suffix.lower() == ".txt"
    rows = ((where, {"prompt": row["text"]} if is_txt else row) for where, row in read_rows(path, split))
    return [(where, row, writer.row(row, where)) for where, row in rows]


@torch.no_grad()
def generate(
    model, tokenizer, prompts: list[list[int]], autocast, seed: int = 0, streamer=None, stop=False, **options
) -> list[str]:
    """Continue each prompt (token ids) up to EOS; returns the new text of each, special tokens left out.

    Prompts are padded on the left, so that every answer starts right behind its prompt and a batch answers as
    each prompt alone would. `options` go to `GenerationMixin.generate`. Sampling draws from `seed` alone.
    Training is left undisturbed: the model's mode and the random state are as before. Once `stop` is true,
    the answers end where they are.
    """
    pad_id = tokenizer.eos_token_id  # masked out, so any id serves
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), autocast():
            torch.manual_seed(seed)
            output = model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                pad_token_id=pad_id,
                eos_token_id=stop_ids(model, tokenizer),
                use_cache=True,
                streamer=streamer,
                stopping_criteria=[
                    lambda ids, scores: torch.full((len(ids),), bool(stop), device=ids.device)
                ],
                **options,
            )
    finally:
        model.train(was_training)
    return tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)


def stop_ids(model, tokenizer) -> list[int]:
    """The EOS that training supervises, and the end-of-turn ids that the model itself names."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, *named} - {None})
