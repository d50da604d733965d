"""How good answers are: the same as the reference, code that parses, CodeBLEU."""

import ast
import logging
import re
import warnings
from statistics import mean

from qlora.errors import InputError

FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
PARTS = {  # codebleu's name: ours
    "ngram_match_score": "ngram", "weighted_ngram_match_score": "weighted_ngram",
    "syntax_match_score": "syntax", "dataflow_match_score": "dataflow",
}  # fmt: skip


def score(answers: list[str], references: list[str], is_code: bool) -> dict[str, float | None]:
    """Each score of `answers` to as many `references`, from 0 to 1; those of code for Python."""
    pairs = list(zip(answers, references, strict=True))
    scores = {"exact_match": mean(float(answer.strip() == wanted.strip()) for answer, wanted in pairs)}
    if not is_code:
        return scores
    answers, references = [[code_of(text) for text in texts] for texts in zip(*pairs)]
    return scores | {"parses": mean(map(float, map(parses, answers)))} | codebleu(answers, references)


def code_of(answer: str) -> str:
    """The first fenced block of an answer, or all of it if there is none."""
    fenced = FENCED.search(answer)
    return fenced[1] if fenced else answer


def parses(code: str) -> bool:
    """Whether this is Python, and not nothing."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes and the like
            return bool(ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what ast.parse has for bad code
        return False


def codebleu(answers: list[str], references: list[str]) -> dict[str, float | None]:
    """CodeBLEU (arXiv 2009.10297) over all pairs: the mean of its parts, and the four parts.

    The dataflow is None, and no part of the mean, if no reference has any. The mean is taken here: the
    package counts a dataflow match of 0 as 1.
    """
    calc = calc_codebleu()
    logging.disable(logging.WARNING)  # of references without a dataflow, which None says
    try:
        parts = calc([[wanted] for wanted in references], answers, lang="python")
        whole = calc([[wanted] for wanted in references], references, lang="python")
    finally:
        logging.disable(logging.NOTSET)
    named = {ours: float(parts[theirs]) for theirs, ours in PARTS.items()}
    if not whole["dataflow_match_score"]:
        named["dataflow"] = None
    scores = {"codebleu": mean(part for part in named.values() if part is not None)}
    return scores | {f"codebleu_{name}": part for name, part in named.items()}


def calc_codebleu():
    """The package's function; raises InputError where it is missing."""
    try:
        from codebleu import calc_codebleu
    except ImportError as error:
        raise InputError("--code needs CodeBLEU: pip install -r requirements-codebleu.txt") from error
    return calc_codebleu
