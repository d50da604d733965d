"""Export a merged model to llama.cpp and Ollama: python -m qlora.export --model merged --gguf f16

Writes a GGUF file and a Modelfile. If llama-cpp-python is installed, the file is loaded and compared with the
model, and gets its name only if they agree. Flags: ExportConfig in qlora/config.py.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import get_args

import torch
from torch.nn.functional import log_softmax
from transformers import GenerationConfig

from qlora.commands import choose_device
from qlora.config import ExportConfig, RowFormat
from qlora.data.formatting import Formatting
from qlora.errors import InputError, first_line
from qlora.evaluation import llama_cpp
from qlora.evaluation.divergence import Prediction, measure_difference, predict
from qlora.flags import parse_args
from qlora.merge import SAMPLE_TEXTS
from qlora.model.adapter import ADAPTER, SETTINGS, load_settings
from qlora.model.base import load_base, load_config, load_tokenizer
from qlora.model.generation import PromptWriter
from qlora.model.ollama import modelfile
from qlora.model.weights import fetch_weights
from qlora.run.files import check_output_file, check_space, flush_folder, staged
from qlora.run.terminal import command

PROGRAM = "qlora.export"
# Tokenized by both: the second to fourth are what tokenizers split differently.
TOKENIZED_TEXTS = [
    SAMPLE_TEXTS[0],
    "In 1234567 B.C., 3.14 < 22/7; 100% of 8-bit.\n\n\n  Four spaces:    x\t\ty = [[0]*3]\n",
    "They'll say I'VE won; we'd \"quote\" 'it' -- e.g. http://a.b/c?d=1&e_f#g",
    "Größe, naïve, Ελλάδα, привет, 日本語の文章、한국어, שלום, हिन्दी 🙂🏳️‍🌈",
]
COMPARED_TOKENS = 512  # of a text; llama-cpp-python keeps the logits of all of them


def main(argv: list[str] | None = None) -> None:
    with command(PROGRAM):
        export(parse_args(ExportConfig, argv, program=PROGRAM))


def export(config: ExportConfig) -> None:
    """Write, compare, publish. Raises InputError and then leaves no files behind."""
    try:
        from qlora.model import gguf_file, gguf_tokenizer
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise InputError("--gguf needs the package gguf: pip install -r requirements-gguf.txt") from error
    output, modelfile_path = choose_output(config)
    if (Path(config.model) / ADAPTER).is_file():
        raise InputError(
            f"--model {config.model} is an adapter: merge it first (python -m qlora.merge), or convert it "
            "alone with llama.cpp's convert_lora_to_gguf.py"
        )
    model_config = load_config(config.model)
    gguf_file.check_architecture(model_config)
    tokenizer = load_tokenizer(config.model, chat_template=config.chat_template)
    context = gguf_file.context_length(model_config)
    writer = PromptWriter(tokenizer, formatting(config, tokenizer), context, model_config.vocab_size)
    stops = read_stops(config.model, model_config, tokenizer)
    report_lost_stops(list(stops.values()), len(gguf_tokenizer.STOP_NAMES))
    vocabulary = gguf_tokenizer.read_vocabulary(
        tokenizer, model_config.vocab_size, writer.needs_added_bos(), list(stops)
    )
    weights = fetch_weights(config.model)
    tensors = gguf_file.gguf_tensors(weights, model_config, config.gguf)
    name = Path(config.model).resolve().name
    with staged(output) as staging:
        file = staging / output.name
        with writing(output):
            staging.mkdir()
            check_space(staging, sum(tensor.nbytes for tensor in tensors))
            gguf_file.write_gguf(file, name, model_config, weights, tensors, config.gguf, vocabulary)
            text = modelfile(output.name, writer, context, list(stops.values()))
            (staging / modelfile_path.name).write_text(text, encoding="utf-8")
        print(compare(config, file, tokenizer, writer))
        with writing(output):
            flush_folder(staging)
            os.rename(file, output)  # first: a Modelfile without its model is of no use
            os.rename(staging / modelfile_path.name, modelfile_path)
            staging.rmdir()
    print(f"GGUF file {output}, {output.stat().st_size / 1e6:,.0f} MB; for Ollama: {modelfile_path}")


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Raise InputError in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"--output_file {output} cannot be written: {first_line(error)}") from error


def choose_output(config: ExportConfig) -> tuple[Path, Path]:
    """(GGUF file, Modelfile); raises InputError if one exists or cannot be written, or both are the same."""
    folder = Path(config.model).resolve()
    default = (folder if folder.is_dir() else Path()) / f"{folder.name}-{config.gguf}.gguf"
    output = Path(config.output_file or default)
    check_output_file(output)
    if output.suffix.lower() == ".modelfile":  # some file systems do not tell upper from lower case
        raise InputError(
            f"--output_file {output} is the name of the Modelfile that goes next to the GGUF file: choose "
            f"another, such as {output.with_suffix('.gguf')}"
        )
    paths = output, output.with_suffix(".Modelfile")
    for path in paths:
        if path.exists():
            raise InputError(f"{path} already exists: choose another --output_file")
    return paths


def formatting(config: ExportConfig, tokenizer) -> Formatting:
    """How prompts are written: as --dataset_format says, as trained, or as the tokenizer suggests.

    Raises InputError if the row format of the training is unknown.
    """
    row_format = config.dataset_format
    if row_format == "auto" and (Path(config.model) / SETTINGS).is_file():
        row_format = load_settings(config.model).get("dataset_format", "auto")
        if row_format not in get_args(RowFormat):
            raise InputError(
                f"{SETTINGS} of --model {config.model} has the unknown dataset_format {row_format!r}: give "
                "the right one with --dataset_format"
            )
    if row_format == "auto":
        row_format = "messages" if tokenizer.chat_template else "text"
    return Formatting(row_format)


def read_stops(model: str, model_config, tokenizer) -> dict[int, str]:
    """Stop tokens by id, as generate.py uses them: the tokenizer's EOS first, then those of the model.

    Raises InputError for an id without a token.
    """
    try:
        own_ids = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # not every model has generation settings
        own_ids = GenerationConfig.from_model_config(model_config).eos_token_id
    own_ids = own_ids if isinstance(own_ids, list) else [own_ids]
    ids = [number for number in dict.fromkeys([tokenizer.eos_token_id, *own_ids]) if number is not None]
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    for number in ids:
        if number not in tokens:
            raise InputError(
                f"eos_token_id {number} in generation_config.json or config.json of --model {model} has no "
                "token in the tokenizer: remove it there"
            )
    return {number: tokens[number] for number in ids}


def report_lost_stops(tokens: list[str], room: int) -> None:
    """Print which stop tokens a GGUF file with `room` for them, or a Modelfile, cannot hold."""
    if tokens[room:]:
        print(
            f"a GGUF file holds only {room} stop tokens: llama.cpp may not stop at {', '.join(tokens[room:])}"
        )
    if quoted := [token for token in tokens if '"' in token]:
        print(f"a Modelfile cannot name a stop token with a quotation mark: {', '.join(quoted)}")


def compare(config: ExportConfig, file: Path, tokenizer, writer: PromptWriter) -> str:
    """Tokenize and predict with llama.cpp and with the model; returns a description of the difference.

    Raises InputError if it is too large.
    """
    if not llama_cpp.is_installed():
        return "not compared with the model: llama-cpp-python is not installed"
    rows = [tokenizer(text)["input_ids"][:COMPARED_TOKENS] for text in SAMPLE_TEXTS]
    question = [{"role": "user", "content": SAMPLE_TEXTS[0]}]
    output = llama_cpp.run_llama(file, TOKENIZED_TEXTS, writer.chat_text(question), rows)
    check_tokens(output.tokens, tokenizer)
    text = describe_prompt(writer.chat(question), output.prompt_tokens, tokenizer)
    rows = [torch.tensor(ids) for ids in rows]
    others = [
        Prediction(ids, log_softmax(torch.from_numpy(array[:-1]), dim=-1))
        for ids, array in zip(rows, output.logits)
    ]
    difference = measure_difference(model_predictions(config, rows), others)
    text += (
        f"perplexity {difference.perplexity:.4f} of the model, {difference.other_perplexity:.4f} in "
        f"llama.cpp; KL divergence {difference.kl:.2e} nats per token"
    )
    if not difference.kl <= config.max_kl:  # also if it is NaN
        raise InputError(f"{text}, limit --max_kl {config.max_kl:g}; nothing was saved")
    return text


def check_tokens(tokens: list[list[int]], tokenizer) -> None:
    """Raise InputError unless these are the tokens of TOKENIZED_TEXTS."""
    for text, other_ids in zip(TOKENIZED_TEXTS, tokens):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids != other_ids:
            difference = first_difference(ids, other_ids, tokenizer)
            raise InputError(f"llama.cpp tokenizes differently: {difference}; nothing was saved")


def describe_prompt(ids: list[int], other_ids: list[int], tokenizer) -> str:
    """A warning if a prompt as it was trained has other tokens in llama.cpp, else "".

    Some tokenizers do this after a special token; no GGUF setting fixes it.
    """
    if ids == other_ids:
        return ""
    difference = first_difference(ids, other_ids, tokenizer)
    return f"llama.cpp tokenizes a prompt differently than the training did: {difference}\n"


def first_difference(ids: list[int], other_ids: list[int], tokenizer) -> str:
    """The first tokens that differ."""
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ids, other_ids))))
    one, other = (tokenizer.convert_ids_to_tokens(tokens[same : same + 3]) for tokens in (ids, other_ids))
    return f"expected {one}, llama.cpp gives {other}"


def model_predictions(config: ExportConfig, rows: list[torch.Tensor]) -> list[Prediction]:
    """The predictions of the model itself for rows of token ids (n,)."""
    dtype = getattr(torch, config.dtype)
    device, autocast = choose_device(dtype)
    model = load_base(config.model, dtype, device, load_in_4bit=False).eval()
    return list(predict(model, [ids[None] for ids in rows], autocast))


if __name__ == "__main__":
    main()
