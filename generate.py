"""Answer prompts: python generate.py --model BASE --adapter outputs --prompt "What is a cloud?"

One prompt, a file of prompts or, with neither, an interactive chat. Flags: GenerateConfig in qlora/config.py.
"""

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from qlora.checkpoint import load_prompt_format
from qlora.config import GenerateConfig, parse_args
from qlora.errors import InputError
from qlora.generation import generate
from qlora.model import check_adapter, load_adapter, load_base, load_config, load_tokenizer
from qlora.prompts import DropRow, Segment, chat_segments, encode, prompt_segments, starts_with_bos
from qlora.rows import read_rows


def main(config: GenerateConfig) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, config.dtype)
    if config.adapter:
        check_adapter(config.adapter)
    tokenizer = load_tokenizer(config.model, config.adapter, config.trust_remote_code)
    row_format, text_field = "text", "text"
    if config.adapter and (kept := load_prompt_format(config.adapter)):
        row_format, text_field = kept["dataset_format"], kept["dataset_text_field"]
    if config.dataset_format != "auto":
        row_format = config.dataset_format

    adds_bos = starts_with_bos(row_format, tokenizer)
    model_config = load_config(config.model, config.trust_remote_code).get_text_config()
    context = getattr(model_config, "max_position_embeddings", math.inf)

    def prompt_ids(segments: list[Segment], where: str) -> list[int]:
        ids, _ = encode(segments, adds_bos, tokenizer)
        if not ids:
            raise InputError(f"{where} is empty")
        if len(ids) + config.max_new_tokens > context:
            raise InputError(
                f"{where} has {len(ids)} tokens: with --max_new_tokens {config.max_new_tokens} that is more "
                f"than the model's context of {context}"
            )
        return ids

    def question_ids(messages: list[dict]) -> list[int]:
        try:
            return prompt_ids(chat_segments(messages, row_format, tokenizer), "the prompt")
        except DropRow as reason:
            raise InputError(f"the prompt cannot be written as {row_format}: {reason}") from reason

    # Prompts before the model: a bad row should not cost the minutes that loading takes.
    if config.prompts_file:
        prompts_file = Path(config.prompts_file)
        output_file = Path(config.output_file or prompts_file.with_suffix(".answers.jsonl"))
        if output_file.resolve() == prompts_file.resolve():
            raise InputError(f"--output_file {output_file} would overwrite the prompts")
        prompts = []
        for where, row in read_rows(config.prompts_file, "train"):
            row = {"prompt": row["text"]} if prompts_file.suffix.lower() == ".txt" else row
            try:
                segments = prompt_segments(row, row_format, text_field, tokenizer)
            except DropRow as reason:
                raise InputError(f"{where}: {reason}") from reason
            prompts.append((row, prompt_ids(segments, where)))
    elif config.prompt is not None:
        prompt = question_ids([{"role": "user", "content": config.prompt}])

    model = load_base(
        config.model, dtype, device, config.load_in_4bit, config.bnb_4bit_quant_type,
        config.bnb_4bit_use_double_quant, config.trust_remote_code,
    )  # fmt: skip
    if config.adapter:
        model = load_adapter(model, config.adapter, is_trainable=False)
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    options = {
        "max_new_tokens": config.max_new_tokens,
        "repetition_penalty": config.repetition_penalty,
        "do_sample": config.do_sample,
    }
    if config.do_sample:
        options |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    answer = partial(generate, model, tokenizer, autocast=autocast, **options)
    if config.prompts_file:
        answer_file(prompts, output_file, config, answer)
    elif config.prompt is not None:
        answer([prompt], seed=config.seed, streamer=console(tokenizer))
    else:
        chat(question_ids, answer, config.seed, tokenizer)


def answer_file(
    prompts: list[tuple[dict, list[int]]], output_file: Path, config: GenerateConfig, answer: Callable
) -> None:
    """Write each row with its `answer` to the output file, batch by batch in the rows' order."""
    try:
        file = open(output_file, "w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output_file {output_file} cannot be written: {error.strerror}") from error
    with file, tqdm(total=len(prompts), unit="prompt") as bar:
        for start in range(0, len(prompts), config.batch_size):
            batch = prompts[start : start + config.batch_size]
            answers = answer([ids for _, ids in batch], seed=config.seed + start)
            for (row, _), text in zip(batch, answers, strict=True):
                file.write(
                    json.dumps({**row, "answer": text.strip()}, ensure_ascii=False, default=str) + "\n"
                )
            file.flush()
            bar.update(len(batch))
    print(f"{len(prompts)} answers in {output_file}")


def chat(question_ids: Callable, answer: Callable, seed: int, tokenizer) -> None:
    """Ask and answer until an empty line or the end of the input; the chat so far is part of every prompt."""
    print("Ask; an empty line ends the chat.")
    messages = []
    while question := read_line("> "):
        messages.append({"role": "user", "content": question})
        try:
            prompt = question_ids(messages)
        except InputError as error:  # too long, say: the chat goes on without this question
            print(error)
            messages.pop()
            continue
        (text,) = answer([prompt], seed=seed + len(messages), streamer=console(tokenizer))
        messages.append({"role": "assistant", "content": text.strip()})


def read_line(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def console(tokenizer) -> transformers.TextStreamer:
    """Prints the answer as it is generated."""
    return transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


if __name__ == "__main__":
    try:
        main(parse_args(GenerateConfig))
    except InputError as error:
        sys.exit(f"generate.py: error: {error}")
