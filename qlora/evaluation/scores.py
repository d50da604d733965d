"""Scores of answers against reference answers: exact match, equal JSON, code that parses, CodeBLEU."""

import ast
import json
import logging
import re
import warnings
from statistics import mean

from qlora.errors import InputError

FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
PARTS = {  # the package's name: ours
    "ngram_match_score": "ngram", "weighted_ngram_match_score": "weighted_ngram",
    "syntax_match_score": "syntax", "dataflow_match_score": "dataflow",
}  # fmt: skip


def score(
    answers: list[str], references: list[str], is_code: bool = False, is_json: bool = False
) -> dict[str, float | None]:
    """Mean scores from 0 to 1 of answers against their references; some are for Python or JSON only."""
    pairs = list(zip(answers, references, strict=True))
    scores = {"exact_match": mean(float(answer.strip() == reference.strip()) for answer, reference in pairs)}
    if is_json:
        texts = [[canonical_json(extract_code(text)) for text in pair] for pair in pairs]
        scores["is_json"] = mean(float(text is not None) for text, _ in texts)
        scores["equal_json"] = mean(float(text is not None and text == other) for text, other in texts)
    if not is_code:
        return scores
    answers, references = [[extract_code(text) for text in texts] for texts in zip(*pairs)]
    return scores | {"parses": mean(map(float, map(parses, answers)))} | codebleu(answers, references)


def extract_code(answer: str) -> str:
    """The first fenced block of an answer; the whole answer if it has none."""
    fenced = FENCED.search(answer)
    return fenced[1] if fenced else answer


def canonical_json(text: str) -> str | None:
    """A JSON object or list with sorted keys and uniform spacing; None if the text is neither.

    Compared as text, true is not 1, as it is in Python. Numbers have one type in JSON: 1.0 becomes 1.
    """
    try:
        value = json.loads(text, parse_float=_number, parse_constant=_refuse_constant)
        return json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else None
    except (ValueError, RecursionError):
        return None


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")  # NaN, Infinity and -Infinity, which Python would take


def parses(code: str) -> bool:
    """Whether this is valid Python with at least one statement."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about invalid escapes and the like
            return bool(ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ast.parse raises all of these
        return False


def codebleu(answers: list[str], references: list[str]) -> dict[str, float | None]:
    """CodeBLEU (arXiv 2009.10297) over all pairs: the mean of its four parts, and each part.

    If no reference has a dataflow, that part is None and not in the mean. The mean is computed here, because
    the package's own counts a dataflow match of 0 as 1.
    """
    calc_codebleu = import_codebleu()
    logging.disable(logging.WARNING)  # about references without a dataflow, which None reports
    try:
        parts = calc_codebleu([[reference] for reference in references], answers, lang="python")
        perfect = calc_codebleu([[reference] for reference in references], references, lang="python")
    finally:
        logging.disable(logging.NOTSET)
    part_scores = {our_name: float(parts[name]) for name, our_name in PARTS.items()}
    if not perfect["dataflow_match_score"]:
        part_scores["dataflow"] = None
    total = mean(part for part in part_scores.values() if part is not None)
    return {"codebleu": total} | {f"codebleu_{name}": part for name, part in part_scores.items()}


def import_codebleu():
    """The package's calc_codebleu(); raises InputError if it is not installed."""
    try:
        from codebleu import calc_codebleu
    except ImportError as error:
        raise InputError("--code needs CodeBLEU: pip install -r requirements-codebleu.txt") from error
    return calc_codebleu
