"""Answer prompts: python generate.py --model BASE --adapter outputs --prompt "What is a cloud?"

One prompt, a file of prompts or, with neither, an interactive chat. Flags: GenerateConfig in qlora/config.py.
"""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import transformers

from qlora.commands import choose_device, load_base_for, parse_for_adapter
from qlora.config import GenerateConfig
from qlora.errors import InputError
from qlora.model.adapter import load_adapter
from qlora.model.base import load_config, load_tokenizer
from qlora.model.generation import (
    PromptTooLong,
    PromptWriter,
    generate,
    generate_batches,
    read_prompts,
    room_for_prompt,
)
from qlora.run.files import check_output_file
from qlora.run.terminal import command


def main(argv: list[str] | None = None) -> None:
    with command("generate.py"):
        answer(parse_for_adapter(GenerateConfig, argv))


def answer(config: GenerateConfig) -> None:
    """Answer what the flags ask for; raises InputError."""
    tokenizer = load_tokenizer(config.model, config.adapter, config.trust_remote_code, config.chat_template)
    model_config = load_config(config.model, config.trust_remote_code).get_text_config()
    writer = PromptWriter(
        tokenizer,
        config.formatting(),
        max_tokens=room_for_prompt(model_config, config.max_new_tokens, "max_new_tokens"),
        vocab_size=model_config.vocab_size,
    )

    # Prompts before the model: an invalid row should not cost the minutes that loading takes.
    rows, prompts = [], []
    if config.prompts_file:
        output_file = choose_output_file(config.prompts_file, config.output_file)
        rows, prompts = read_rows_to_answer(config.prompts_file, writer)
    elif config.prompt is not None:
        prompts = [writer.chat([{"role": "user", "content": config.prompt}])]

    model = load_base_for(config, config.load_in_4bit)
    if config.adapter:
        model = load_adapter(model, config.adapter, is_trainable=False)
    _, autocast = choose_device(getattr(torch, config.dtype))
    options = generation_options(config)
    if config.prompts_file:
        batches = generate_batches(
            model, tokenizer, prompts, config.batch_size, autocast, seed=config.seed, **options
        )
        write_answers(rows, batches, output_file)
        print(f"{len(rows)} answers in {output_file}")
    elif config.prompt is not None:
        streamer = stdout_streamer(tokenizer)
        generate(model, tokenizer, prompts, autocast, seed=config.seed, streamer=streamer, **options)
    else:
        chat(writer, partial(generate, model, tokenizer, autocast=autocast, **options), config.seed)


def generation_options(config: GenerateConfig) -> dict:
    """The flags that GenerationMixin.generate() takes; it warns about sampling flags without do_sample."""
    options = {
        "max_new_tokens": config.max_new_tokens,
        "repetition_penalty": config.repetition_penalty,
        "do_sample": config.do_sample,
    }
    if config.do_sample:
        options |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    return options


def choose_output_file(prompts_file: str, output_file: str | None) -> Path:
    """Where the answers go; raises InputError if nothing can or should be written there."""
    path = Path(output_file or Path(prompts_file).with_suffix(".answers.jsonl"))
    if path.resolve() == Path(prompts_file).resolve():
        raise InputError(f"--output_file {path} would overwrite the prompts")
    check_output_file(path)
    return path


def read_rows_to_answer(prompts_file: str, writer: PromptWriter) -> tuple[list[dict], list[list[int]]]:
    """(rows, their prompts in token ids); raises InputError."""
    prompts = read_prompts(prompts_file, writer)
    for where, row, _ in prompts:
        if "answer" in row:
            raise InputError(f"{where} has a column 'answer', which its answer would replace: rename it")
    return [row for _, row, _ in prompts], [ids for _, _, ids in prompts]


def write_answers(rows: list[dict], batches: Iterable[list[str]], output_file: Path) -> None:
    """Write each row with its answer as a JSON line, one batch at a time: a killed run keeps its answers."""
    written = 0
    try:
        with open(output_file, "w", encoding="utf-8") as file:
            for texts in batches:
                batch = rows[written : written + len(texts)]
                for row, text in zip(batch, texts, strict=True):
                    line = json.dumps({**row, "answer": text.strip()}, ensure_ascii=False, default=str)
                    file.write(line + "\n")
                file.flush()
                written += len(texts)
    except OSError as error:
        raise InputError(
            f"--output_file {output_file} cannot be written after {written} answers: {error.strerror}"
        ) from error


def chat(writer: PromptWriter, reply: Callable, seed: int) -> None:
    """Answer questions until an empty line or the end of the input. Prompts contain the chat so far, without
    its oldest questions once the context is full, and without questions that got no answer.

    `reply` is generate() but for its prompts, seed and streamer.
    """
    print("Ask a question; an empty line ends the chat.")
    if not writer.has_history:
        print(f"Each question stands alone: the format {writer.row_format} has no earlier turns.")
    messages = []
    while question := read_line("> "):
        asked = [*messages, {"role": "user", "content": question}]
        try:
            prompt, asked = write_what_fits(writer, asked)
            if dropped := (len(messages) + 1 - len(asked)) // 2:
                questions = "question is" if dropped == 1 else f"{dropped} questions are"
                print(f"(the context is full: the oldest {questions} forgotten)")
            streamer = stdout_streamer(writer.tokenizer)
            (text,) = reply([prompt], seed=seed + len(asked), streamer=streamer)
        except (InputError, KeyboardInterrupt) as error:  # too long, or interrupted: continue without it
            print(f"\n{str(error) or 'stopped'}")
            continue
        if not text.strip():  # templates refuse an empty turn, and a question without an answer
            print("(the answer is empty: the chat continues without this question)")
            continue
        text = text if writer.row_format == "text" else text.strip()  # other formats add the space themselves
        messages = [*asked, {"role": "assistant", "content": text}]


def write_what_fits(writer: PromptWriter, messages: list[dict]) -> tuple[list[int], list[dict]]:
    """The prompt for the next answer, and the turns in it.

    The oldest questions, each with its answer, are left out until it fits. Raises InputError if the last one
    does not fit alone.
    """
    oldest = int(messages[0]["role"] == "system")  # which stays
    while True:
        try:
            return writer.chat(messages), messages
        except PromptTooLong:
            if len(messages) - oldest < 3:
                raise
            messages = messages[:oldest] + messages[oldest + 2 :]


def read_line(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def stdout_streamer(tokenizer) -> transformers.TextStreamer:
    """Prints an answer while it is generated."""
    return transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


if __name__ == "__main__":
    main()
