"""Bad data: an error that names it before the model loads, or a count on the start screen."""

import json

import pytest

import train
from qlora.errors import InputError

GOOD = {"prompt": "What?", "completion": " A leaf."}


def lines(*rows) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


ERRORS = {  # defect: (content of rows.jsonl, text of the error)
    "an empty file": (b"", "rows.jsonl has no rows"),
    "only newlines": (b"\n\r\n\n", "rows.jsonl has no rows"),
    "a truncated last line": (lines(GOOD) + b'{"prompt": "Wh', "rows.jsonl line 2 is not valid JSON"),
    "bad JSON in the middle": (lines(GOOD, b"{oops}", GOOD), "rows.jsonl line 2 is not valid JSON"),
    "not UTF-8": (lines(GOOD, b'{"prompt": "caf\xe9"}'), "rows.jsonl line 2 is not UTF-8"),
    "a lone surrogate": (
        lines(GOOD, b'{"prompt": "\\ud800"}'),
        "rows.jsonl line 2 contains a lone surrogate",
    ),
    "no known column": (lines({"question": "a"}), r"has the columns \['question'\]"),
    "every row dropped": (
        lines({**GOOD, "completion": ""}),
        "no row of .*rows.jsonl can be used: 1 empty response",
    ),
    "every prompt too long": (lines({**GOOD, "prompt": "What? " * 999}), "1 prompt fills --max_length"),
}
COUNTS = {  # oddity: (content of rows.jsonl, text on the start screen)
    "a blank line": (lines(GOOD, b"", GOOD), "2 rows read = 2 used + 0 dropped"),
    "BOM and CRLF": (b"\xef\xbb\xbf" + lines(GOOD).replace(b"\n", b"\r\n"), "1 rows read = 1 used"),
    "a NUL character": (lines({**GOOD, "completion": "a\0b"}), "1 rows read = 1 used"),
    "a column missing in a row": (
        lines(GOOD, {"prompt": "a"}),
        "1 dropped (1 'completion' is missing, first: ",
    ),
    "null": (lines(GOOD, {**GOOD, "completion": None}), "1 dropped (1 'completion' is null, not text"),
    "a number": (lines(GOOD, {**GOOD, "prompt": 3}), "1 dropped (1 'prompt' is a number, not text"),
    "an object": (lines(GOOD, {**GOOD, "prompt": {}}), "1 dropped (1 'prompt' is an object, not text"),
    "an empty response": (lines(GOOD, {**GOOD, "completion": " "}), "1 dropped (1 empty response"),
    "a response too long": (
        lines({**GOOD, "completion": "leaf " * 999}),
        "1 answers cut at --max_length, without EOS",
    ),
    "a prompt that fills the window": (
        lines(GOOD, {**GOOD, "prompt": "a " * 999}),
        "1 prompt fills --max_length",
    ),
    "BOS and EOS in the text": (
        lines({"prompt": "<s>What?", "completion": "It.</s>"}),
        "EOS trained in 100.0% of the rows",
    ),
    "fewer rows than a step takes": (lines(GOOD, GOOD), "epochs of 1 steps"),
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_names_the_defect_before_the_model_loads(run, file, monkeypatch, name):
    content, message = ERRORS[name]
    file.write_bytes(content)
    monkeypatch.setattr(train, "load_base", pytest.fail)
    with pytest.raises(InputError, match=message):
        run("--max_steps 1", dataset=str(file))


@pytest.mark.parametrize("name", COUNTS)
def test_odd_rows_are_counted_and_the_others_trained(run, file, capsys, name):
    content, message = COUNTS[name]
    file.write_bytes(content)
    run("--num_train_epochs 1", dataset=str(file))
    assert message in capsys.readouterr().out
