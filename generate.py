"""Answer prompts: python generate.py --model BASE --adapter outputs --prompt "What is a cloud?"

One prompt, a file of prompts or, with neither, an interactive chat. Flags: GenerateConfig in qlora/config.py.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import transformers
from tqdm import tqdm

from qlora.commands import compute_of, load_base_of, parse_for_adapter
from qlora.config import GenerateConfig
from qlora.errors import InputError
from qlora.model.adapter import load_adapter
from qlora.model.base import load_config, load_tokenizer
from qlora.model.generation import PromptWriter, generate, read_prompts, room_for_prompt
from qlora.run.files import check_output_file


def main(config: GenerateConfig) -> None:
    tokenizer = load_tokenizer(config.model, config.adapter, config.trust_remote_code)
    model_config = load_config(config.model, config.trust_remote_code).get_text_config()
    writer = PromptWriter(
        tokenizer,
        row_format="text" if config.dataset_format == "auto" else config.dataset_format,
        text_field=config.dataset_text_field,
        max_tokens=room_for_prompt(model_config, config.max_new_tokens, "max_new_tokens"),
    )

    # Prompts before the model: a bad row should not cost the minutes that loading takes.
    if config.prompts_file:
        prompts_file = Path(config.prompts_file)
        output_file = Path(config.output_file or prompts_file.with_suffix(".answers.jsonl"))
        if output_file.resolve() == prompts_file.resolve():
            raise InputError(f"--output_file {output_file} would overwrite the prompts")
        check_output_file(output_file)
        prompts = read_prompts(config.prompts_file, writer)
        for where, row, _ in prompts:
            if "answer" in row:
                raise InputError(f"{where} has a column 'answer', which its answer would replace: rename it")
    elif config.prompt is not None:
        prompt = writer.chat([{"role": "user", "content": config.prompt}])

    model = load_base_of(config)
    if config.adapter:
        model = load_adapter(model, config.adapter, is_trainable=False)
    _, autocast = compute_of(config)
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
        chat(writer, answer, config.seed)


def answer_file(
    prompts: list[tuple[str, dict, list[int]]], output_file: Path, config: GenerateConfig, answer: Callable
) -> None:
    """Write each row with its `answer` to the output file, batch by batch in the rows' order."""
    try:
        file = open(output_file, "w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output_file {output_file} cannot be written: {error.strerror}") from error
    with file, tqdm(total=len(prompts), unit="prompt") as bar:
        for start in range(0, len(prompts), config.batch_size):
            batch = prompts[start : start + config.batch_size]
            answers = answer([ids for _, _, ids in batch], seed=config.seed + start)
            lines = [
                json.dumps({**row, "answer": text.strip()}, ensure_ascii=False, default=str) + "\n"
                for (_, row, _), text in zip(batch, answers, strict=True)
            ]
            try:
                file.write("".join(lines))
                file.flush()
            except OSError as error:
                reason = (
                    f"--output_file {output_file} cannot be written after {start} answers: {error.strerror}"
                )
                raise InputError(reason) from error
            bar.update(len(batch))
    print(f"{len(prompts)} answers in {output_file}")


def chat(writer: PromptWriter, answer: Callable, seed: int) -> None:
    """Ask and answer until an empty line or the end of the input; the chat so far is part of every prompt."""
    print("Ask; an empty line ends the chat.")
    if not writer.has_history:
        print(f"Each question stands alone: the format {writer.row_format} has no earlier turns.")
    messages = []
    while question := read_line("> "):
        messages.append({"role": "user", "content": question})
        try:
            (text,) = answer(
                [writer.chat(messages)], seed=seed + len(messages), streamer=console(writer.tokenizer)
            )
        except (InputError, KeyboardInterrupt) as stop:  # too long, or stopped: the chat goes on without it
            print(f"\n{str(stop) or 'stopped'}")
            messages.pop()
            continue
        text = text if writer.row_format == "text" else text.strip()  # formats put their own space there
        messages.append({"role": "assistant", "content": text})


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
        main(parse_for_adapter(GenerateConfig))
    except InputError as error:
        sys.exit(f"generate.py: error: {error}")
