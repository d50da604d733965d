"""Scores of answers: exact match, code that parses, CodeBLEU."""

import sys

import pytest

from qlora.errors import InputError
from qlora.evaluation.scores import codebleu, extract_code, import_codebleu, parses, score


def test_exact_match_ignores_the_space_around_an_answer():
    assert score([" a\n", "b", "c"], ["a", "b ", "d"], is_code=False) == {"exact_match": pytest.approx(2 / 3)}


def test_codebleu_is_1_for_the_reference_and_0_for_nothing():
    code = "def f(x):\n    y = x + 1\n    return y"
    assert set(codebleu([code], [code]).values()) == {1.0}
    assert set(codebleu([""], [code]).values()) == {0.0}
    renamed = codebleu([code.replace("y", "total")], [code])
    assert renamed["codebleu_syntax"] == 1 and renamed["codebleu_ngram"] < 1
    assert renamed["codebleu"] == pytest.approx(sum(list(renamed.values())[1:]) / 4)


def test_without_a_dataflow_codebleu_is_the_mean_of_the_other_parts():
    scores = codebleu(["assert 1 < 2 < 3 and not 4 > 5"], ["assert 1 < 2 < 3 and not 4 > 5"])
    assert scores["codebleu_dataflow"] is None and scores["codebleu"] == 1


def test_only_code_parses_and_its_fence_is_removed():
    assert extract_code("Here:\n```python\nx = 1\n```\nDone.") == "x = 1\n"
    assert [parses(text) for text in ("x = 1", "x = ", "", "# nothing", "\0")] == [True] + [False] * 4
    assert score(["```\nx = 1\n```"], ["x = 1"], is_code=True)["parses"] == 1


def test_equal_json_may_be_written_in_another_way():
    reference = '{"a": 1, "b": null}'
    answers = [reference, '```json\n{"b": null, "a": 1.0}\n```', '{"a": 2, "b": null}', '{"a": 1', "1", ""]
    scores = score(answers, [reference] * 6, is_json=True)
    assert scores == {"exact_match": 1 / 6, "is_json": 3 / 6, "equal_json": 2 / 6}
    assert score(["no"], ["nor this"], is_json=True) == {"exact_match": 0, "is_json": 0, "equal_json": 0}


def test_json_values_of_other_types_are_not_equal():
    reference = '{"a": true, "b": [1, 2], "c": "1"}'
    others = ['{"a": 1, "b": [1, 2], "c": "1"}', '{"a": true, "b": [2, 1], "c": "1"}']
    others += ['{"a": true, "b": [1, 2], "c": 1}', '{"a": true, "b": [true, 2], "c": "1"}']
    spaced = '{ "c":"1",\n"b" : [1,2.0],"a":true }'
    scores = score([*others, spaced], [reference] * 5, is_json=True)
    assert scores == {"exact_match": 0, "is_json": 1, "equal_json": 1 / 5}


@pytest.mark.parametrize("answer", ['{"a": NaN}', "[Infinity]", "[-Infinity]"])
def test_what_only_python_takes_for_json_is_not_json(answer):
    assert score([answer], [answer], is_json=True) == {"exact_match": 1, "is_json": 0, "equal_json": 0}


def test_without_codebleu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "codebleu", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"--code needs CodeBLEU: pip install -r requirements-codebleu\.txt"):
        import_codebleu()
