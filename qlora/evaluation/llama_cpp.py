"""Run a GGUF file with llama-cpp-python, in a process of its own: a build for another CPU crashes."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from qlora.errors import InputError, first_line


@dataclass(frozen=True)
class LlamaOutput:
    """What llama.cpp made of texts, a prompt and rows."""

    tokens: list[list[int]]  # of each text, without BOS
    prompt_tokens: list[int]  # with BOS if the file says so
    logits: list  # of each row, a numpy array (n, vocabulary) float32


def is_installed() -> bool:
    return find_spec("llama_cpp") is not None


def run_llama(file: Path, texts: list[str], prompt: str, rows: list[list[int]]) -> LlamaOutput:
    """Tokenize the texts and the prompt, and predict the next token at each of the rows' token ids.

    Raises InputError if the file cannot be run.
    """
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_run, str(file), texts, prompt, rows).result()
    except BrokenProcessPool as error:
        raise InputError(
            "llama-cpp-python crashed, perhaps because it was built for another CPU, and nothing was saved: "
            "rebuild it with CMAKE_ARGS=-DGGML_NATIVE=OFF, or uninstall it to export without a comparison"
        ) from error
    except (ImportError, OSError, ValueError, RuntimeError) as error:  # OSError: a library is missing
        raise InputError(f"llama-cpp-python cannot run the file: {first_line(error)}") from error


def _run(file: str, texts: list[str], prompt: str, rows: list[list[int]]) -> LlamaOutput:
    from llama_cpp import Llama

    llama = Llama(file, n_ctx=max(map(len, rows)), logits_all=True, verbose=False)
    tokens = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
    prompt_tokens = llama.tokenize(prompt.encode(), add_bos=True, special=True)
    logits = []
    for ids in rows:
        llama.reset()
        llama.eval(ids)
        logits.append(llama.scores[: len(ids)].copy())
    return LlamaOutput(tokens, prompt_tokens, logits)
