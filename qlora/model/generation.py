"""Prompts as token ids, and answers to them in left-padded batches."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from qlora.data.chat_template import FALLBACK_CHAT_TEMPLATE
from qlora.data.formats import asks_otherwise, chat_segments, prompt_segments, starts_with_bos
from qlora.data.formatting import Formatting
from qlora.data.segments import DropRow, Segment, adds_bos_itself, encode
from qlora.data.sources import read_rows
from qlora.data.tokenized import check_token_id
from qlora.errors import InputError
from qlora.model.forward import evaluation_mode


class PromptTooLong(InputError):
    """A prompt leaves no room for its answer in the model's context."""


class PromptWriter:
    """Writes chats and rows as prompts in token ids, in the row format that the adapter was trained on.

    Raises InputError for a prompt that does not fit the format, is empty, exceeds `max_tokens`, or has a
    token that a model of `vocab_size` tokens lacks, and for a tokenizer without EOS.
    """

    def __init__(self, tokenizer, formatting: Formatting, max_tokens: float, vocab_size: float = math.inf):
        if tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has no end-of-sequence token, so no answer would end: set eos_token in its "
                "tokenizer_config.json"
            )
        check_token_id(tokenizer.eos_token_id, vocab_size)
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.formatting = formatting
        self.row_format = formatting.row_format
        self.max_tokens = max_tokens
        if self.row_format == "messages" and asks_otherwise(tokenizer):
            raise InputError(
                "--dataset_format messages: the saved chat template is for the row format of its training, "
                "not for messages: give another with --chat_template"
            )
        if self.row_format == "messages" and tokenizer.chat_template is None:
            tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE
        self.adds_bos = starts_with_bos(self.row_format, tokenizer)

    @property
    def has_history(self) -> bool:
        """Whether a prompt contains the earlier turns of a chat."""
        return self.row_format not in ("alpaca", "prompt_completion")

    def needs_added_bos(self) -> bool:
        """Whether a program that tokenizes chat_text() has to put a BOS in front of it."""
        begins_with_bos = self.chat([{"role": "user", "content": "a"}])[0] == self.tokenizer.bos_token_id
        return begins_with_bos and adds_bos_itself(self.tokenizer)

    def chat(self, messages: list[dict]) -> list[int]:
        """The prompt for the next answer in a chat of {"role", "content"} turns."""
        try:
            return self._encode(chat_segments(messages, self.formatting, self.tokenizer), "the prompt")
        except DropRow as reason:
            raise InputError(f"the prompt cannot be written as {self.row_format}: {reason}") from reason

    def chat_text(self, messages: list[dict]) -> str:
        """The same as text, without the BOS that needs_added_bos() speaks of. Raises DropRow."""
        text = "".join(text for text, _ in chat_segments(messages, self.formatting, self.tokenizer))
        return text.removeprefix(self.tokenizer.bos_token or "") if self.needs_added_bos() else text

    def row(self, row: dict, where: str) -> list[int]:
        """The prompt of a data row, without the row's answer."""
        try:
            segments = prompt_segments(row, self.formatting, self.tokenizer)
            return self._encode(segments, where)
        except DropRow as reason:
            raise InputError(f"{where}: {reason}") from reason

    def _encode(self, segments: list[Segment], where: str) -> list[int]:
        ids, _ = encode(segments, self.adds_bos, self.tokenizer)
        if not ids:
            raise InputError(f"{where} is empty")
        check_token_id(max(ids), self.vocab_size)
        if len(ids) > self.max_tokens:
            raise PromptTooLong(
                f"{where} has {len(ids)} tokens, but the answer (--max_new_tokens) leaves {self.max_tokens} "
                "for a prompt in the model's context"
            )
        return ids


def room_for_prompt(model_config, new_tokens: int, flag: str) -> float:
    """The number of tokens that a prompt may have if the answer may have `new_tokens`.

    Raises InputError, naming the `flag` for `new_tokens`, if that is none.
    """
    context = getattr(model_config, "max_position_embeddings", math.inf)
    if new_tokens >= context:
        raise InputError(
            f"--{flag} {new_tokens} leaves no room for a prompt: the model's context is {context} tokens"
        )
    return context - new_tokens


def read_prompts(path: str, writer: PromptWriter, split: str = "train") -> list[tuple[str, dict, list[int]]]:
    """(location, row, prompt ids) of each row of a file or dataset; raises InputError.

    In a txt file every line is a prompt. Other rows have the columns of the row format, or "prompt".
    """
    is_txt = Path(path).suffix.lower() == ".txt"
    rows = ((where, {"prompt": row["text"]} if is_txt else row) for where, row in read_rows(path, split))
    return [(where, row, writer.row(row, where)) for where, row in rows]


@torch.no_grad()
def generate(
    model,
    tokenizer,
    prompts: list[list[int]],
    autocast,
    seed: int = 0,
    streamer=None,
    should_stop: Callable[[], bool] = lambda: False,
    **options,
) -> list[str]:
    """Continue each prompt (token ids) up to EOS; returns the new text of each, without special tokens.

    Prompts are padded on the left, so every answer starts right after its prompt, and a batch gives the same
    answers as its prompts one at a time. `options` go to `GenerationMixin.generate`. Sampling depends on
    `seed` alone. Once `should_stop()` is true, asked at every token, the answers end where they are. Does not
    disturb a run: the model's mode and the random state are restored.
    """
    pad_id = tokenizer.eos_token_id  # padding is masked, so any id works
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    cuda_devices = [model.device] if model.device.type == "cuda" else []
    with evaluation_mode(model), torch.random.fork_rng(devices=cuda_devices), autocast():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            pad_token_id=pad_id,
            eos_token_id=stop_ids(model, tokenizer),
            use_cache=True,
            streamer=streamer,
            stopping_criteria=[lambda ids, scores: torch.full((len(ids),), should_stop(), device=ids.device)],
            **options,
        )
    return tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)


def generate_batches(
    model,
    tokenizer,
    prompts: list[list[int]],
    batch_size: int,
    autocast,
    seed: int = 0,
    description: str | None = None,
    **options,
) -> Iterator[list[str]]:
    """Answer the prompts in order and yield the answers of each batch, under a progress bar.

    The batch that starts with prompt i samples with `seed` + i. For the rest, see generate().
    """
    with tqdm(total=len(prompts), desc=description, unit="prompt") as bar:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            yield generate(model, tokenizer, batch, autocast, seed=seed + start, **options)
            bar.update(len(batch))


def stop_ids(model, tokenizer) -> list[int]:
    """The tokenizer's EOS, with which training ends answers, and the model's own end-of-turn ids."""
    own_ids = model.generation_config.eos_token_id
    own_ids = own_ids if isinstance(own_ids, list) else [own_ids]
    return sorted({tokenizer.eos_token_id, *own_ids} - {None})
