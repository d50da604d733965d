"""Reading, counting, cutting, ordering, padding; slices against `datasets`, batches against brute force."""

import json
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from qlora.data import (
    StepOrder,
    TokenizedRows,
    check_vocabulary,
    collate,
    hold_out,
    micro_batches,
    read_rows,
    tokenize_rows,
)
from qlora.errors import InputError
from qlora.prompts import IGNORE_INDEX

ROWS = [
    {"prompt": "What?", "completion": " A leaf."},
    {"prompt": "Sure?", "completion": " Yes.\nAll over. \u00e9"},
]


def read(path, split="train"):
    """The rows of a file or folder without their locations."""
    return [row for _, row in read_rows(str(path), split)]


def located(*rows):
    return [(f"rows line {number}", row) for number, row in enumerate(rows, start=1)]


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


# ---------------------------------------------------------------- bad input: an error that says where


GOOD = b'{"text": "a"}\n'
BROKEN_FILES = {
    "empty jsonl": ("r.jsonl", b"", "no rows"),
    "newlines only": ("r.jsonl", b"\n\r\n  \n", "no rows"),
    "BOM only": ("r.jsonl", b"\xef\xbb\xbf\n", "no rows"),
    "truncated last line": ("r.jsonl", GOOD + b'{"text": "b', "line 2 is not valid JSON"),
    "bad JSON in the middle": ("r.jsonl", GOOD + b'\n{"text": b}\n' + GOOD, "line 3 is not valid JSON"),
    "not an object": ("r.jsonl", GOOD + b'["a"]\n', "line 2 is not a JSON object"),
    "bare number": ("r.jsonl", b"3\n", "line 1 is not a JSON object"),
    "NULs from a lost write": ("r.jsonl", GOOD + b"\0\0\0\0\n", "line 2 is not valid JSON"),
    "not UTF-8": ("r.jsonl", GOOD + b'{"text": "caf\xe9"}\n', r"line 2 is not UTF-8 \(byte 14\)"),
    "UTF-16": ("r.jsonl", GOOD.decode().encode("utf-16"), "line 1 is not UTF-8"),
    "lone surrogate": ("r.jsonl", GOOD + b'{"text": "\\ud800"}\n', "line 2 holds a lone surrogate"),
    "lone surrogate in depth": ("r.jsonl", b'{"a": [{"b": "\\udfff"}]}\n', "line 1 holds a lone surrogate"),
    "endless number": ("r.jsonl", GOOD + b'{"text": ' + b"1" * 5000 + b"}\n", "line 2"),
    "endless nesting": ("r.jsonl", GOOD + b"[" * 100_000 + b"\n", "line 2"),
    "empty json": ("r.json", b"", "no rows"),
    "empty json list": ("r.json", b"[]", "no rows"),
    "json list cut": ("r.json", b'[\n{"text": "a"},\n{"text": "b"\n', "line 4 is not valid JSON"),
    "json text": ("r.json", b'"a"', "not a list of objects"),
    "json list of texts": ("r.json", b'[{"text": "a"}, "b"]', "row 2 is not a JSON object"),
    "json lone surrogate": ("r.json", b'[{"a": "a"}, {"a": "\\ud800"}]', "row 2 holds a lone surrogate"),
    "json not UTF-8": ("r.json", b'[\n{"text": "a"},\n{"text": "\xff"}]', "line 3 is not UTF-8"),
    "json lines under json, cut": ("r.json", GOOD + b'{"text": "b', "line 2 is not valid JSON"),
    "empty csv": ("r.csv", b"", "no rows"),
    "csv header only": ("r.csv", b"text\r\n", "no rows"),
    "csv field too many": ("r.csv", b"text\na\nb,c\n", "line 3 has more fields"),
    "csv open quote": ("r.csv", b'text\na\nb\n"c\nd\n', "line [45] is not valid CSV"),
    "csv stray quote": ("r.csv", b'text\na\n"b"c\nd\n', "line 3 is not valid CSV"),
    "csv not UTF-8": ("r.csv", b"text\na\n\xff\n", "line 3 is not UTF-8"),
    "empty txt": ("r.txt", b"", "no rows"),
    "txt not UTF-8": ("r.txt", b"a\n\xff\n", "line 2 is not UTF-8"),
    "empty parquet": ("r.parquet", b"", "cannot be read as parquet"),
    "parquet cut": ("r.parquet", b"PAR1\0\0", "cannot be read as parquet"),
    "unknown suffix": ("r.md", b"a\n", r"\.jsonl"),
    "no suffix": ("rows", b"a\n", r"\.jsonl"),
}


@pytest.mark.parametrize("name, content, message", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_broken_file_is_an_error_that_names_file_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_broken_line_beyond_the_slice_is_not_reached(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(GOOD + b"oops\n")
    assert read(tmp_path / "r.jsonl", "train[:1]") == [{"text": "a"}]


def test_parquet_text_that_is_not_utf8_is_an_error_that_names_the_file(tmp_path):
    offsets, data = np.array([0, 1, 2], dtype=np.int32).tobytes(), b"a\xff"
    column = pa.StringArray.from_buffers(2, pa.py_buffer(offsets), pa.py_buffer(data))
    pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / "r.parquet")
    with pytest.raises(InputError, match=r"r\.parquet"):
        read(tmp_path / "r.parquet")


def test_an_empty_parquet_table_has_no_rows(tmp_path):
    pyarrow.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "r.parquet")
    with pytest.raises(InputError, match="no rows"):
        read(tmp_path / "r.parquet")


@pytest.mark.parametrize("name", ["none.jsonl", "folder/none.csv", "./none", "~/none"])
def test_a_missing_file_is_an_error_and_no_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such data file or folder"):
        read(name)


def test_a_hub_name_that_cannot_be_loaded_is_one_line(monkeypatch):
    with pytest.raises(InputError, match="cannot load the data set 'nobody/nothing'") as error:
        read("nobody/nothing")
    assert len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------- odd input that is fine


GOOD_FILES = {
    "blank lines": ("r.jsonl", b'\n{"text": "a"}\n  \n\n{"text": "b"}\n\n', ["a", "b"]),
    "no newline at the end": ("r.jsonl", b'{"text": "a"}\n{"text": "b"}', ["a", "b"]),
    "BOM": ("r.jsonl", b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
    "CRLF": ("r.jsonl", b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', ["a", "b"]),
    "raw NUL": ("r.jsonl", b'{"text": "a\0b"}\n', ["a\0b"]),
    "escaped NUL": ("r.jsonl", b'{"text": "a\\u0000b"}\n', ["a\0b"]),
    "surrogate pair": ("r.jsonl", b'{"text": "\\ud83d\\ude00"}\n', ["\U0001f600"]),
    "line separator in text": ("r.jsonl", '{"text": "a\u2028b\x85c"}\n'.encode(), ["a\u2028b\x85c"]),
    "json list": ("r.json", b'[{"text": "a"},\n {"text": "b"}]', ["a", "b"]),
    "json under data": ("r.json", b'{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}', ["a", "b"]),
    "json, one object": ("r.json", b'{\n"text": "a"\n}', ["a"]),
    "json, BOM and CRLF": ("r.json", b'\xef\xbb\xbf[\r\n{"text": "a"}\r\n]\r\n', ["a"]),
    "json lines under json": ("r.json", b'\n{"text": "a"}\r\n\n{"text": "b"}\n', ["a", "b"]),
    "csv": ("r.csv", b'id,text\n1,a\n2,"b, ""c"""\n', ["a", 'b, "c"']),
    "csv, BOM and CRLF": ("r.csv", b"\xef\xbb\xbftext,id\r\na,1\r\n\r\nb,2\r\n", ["a", "b"]),
    "csv, lines in a field": ("r.csv", b'text\n"a\n\nb"\n', ["a\n\nb"]),
    "csv, NUL": ("r.csv", b"text\na\0b\n", ["a\0b"]),
    "csv, blank line in front": ("r.csv", b"\ntext\na\n", ["a"]),
    "csv, huge field": ("r.csv", b"text\n" + b"a" * 200_000 + b"\n", ["a" * 200_000]),
    "txt": ("r.txt", b"\xef\xbb\xbfa\r\n\n  \n b \n", ["a", " b "]),
    "capital suffix": ("R.JSONL", b'{"text": "a"}\n', ["a"]),
}


@pytest.mark.parametrize("name, content, texts", GOOD_FILES.values(), ids=GOOD_FILES)
def test_odd_but_good_files_are_read(tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content)
    assert [row["text"] for row in read(tmp_path / name)] == texts


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif suffix == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif suffix == "csv":
        text = 'prompt,completion\nWhat?, A leaf.\nSure?," Yes.\nAll over. \u00e9"\n'
        path.write_text(text, encoding="utf-8")
    else:
        write_parquet(path, ROWS)
    assert read(path) == ROWS


def test_locations_are_lines_or_rows(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b"\n" + GOOD + b"\n" + GOOD)
    (tmp_path / "r.json").write_bytes(b'[{"text": "a"},\n\n{"text": "b"}]')
    (tmp_path / "r.csv").write_bytes(b'text\n\na\n"b\nc"\n')
    for name, places in {
        "r.jsonl": ["line 2", "line 4"],
        "r.json": ["row 1", "row 2"],
        "r.csv": ["line 3", "line 5"],
    }.items():
        found = [where for where, _ in read_rows(str(tmp_path / name), "train")]
        assert found == [f"{tmp_path / name} {place}" for place in places]


def test_nul_reaches_the_tokenizer_and_comes_back(tokenizer):
    rows = tokenize_rows(located({"text": "a\0b"}), tokenizer)
    assert tokenizer.decode(rows[0][0][1:-1]) == "a\0b"


# ---------------------------------------------------------------- folders and slices


def make_folder(folder, **texts):
    """One jsonl file for each name; __ stands for a slash."""
    for name, text in texts.items():
        path = folder / (name.replace("__", "/") + ".jsonl")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": text}) + "\n")
    return folder


@pytest.mark.parametrize(
    "names, split, chosen",
    [
        (["rows"], "train", ["rows"]),
        (["b", "a"], "train", ["a", "b"]),
        (["train", "validation", "test"], "train", ["train"]),
        (["train", "validation", "test"], "validation", ["validation"]),
        (
            ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"],
            "train",
            ["train-00000-of-00002", "train-00001-of-00002"],
        ),
        (["data__train_1", "data__test_1"], "test", ["data__test_1"]),
        (["train__rows", "validation__rows"], "validation", ["validation__rows"]),
        (["train", "extra"], "train", ["train"]),
        (["rows", "test"], "train", ["rows"]),
        (["my_train_rows", "my_validation_rows"], "train", ["my_train_rows"]),
        (["constraint", "latest"], "train", ["constraint", "latest"]),
        (["train_sft-0", "test_sft-0"], "train_sft", ["train_sft-0"]),
        (["fold1", "fold2"], "fold2", ["fold2"]),
    ],
)
def test_a_split_of_a_folder_is_chosen_by_file_names(tmp_path, names, split, chosen):
    make_folder(tmp_path, **{name: name for name in names})
    assert [row["text"] for row in read(tmp_path, split)] == chosen


@pytest.mark.parametrize(
    "word", ["validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"]
)
def test_files_that_datasets_takes_for_test_or_validation_are_not_trained_on(tmp_path, word):
    make_folder(tmp_path, rows="training row", **{word: "held-out row"})
    assert read(tmp_path) == [{"text": "training row"}]


def test_files_of_other_kinds_and_mixed_kinds_in_a_folder(tmp_path):
    make_folder(tmp_path, a="a")
    (tmp_path / "b.csv").write_text("text\nb\n")
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    assert read(tmp_path) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("split", ["validation", "train2", "test"])
def test_a_split_that_a_folder_lacks_is_an_error(tmp_path, split):
    make_folder(tmp_path, train="a")
    with pytest.raises(InputError, match=f"no .* file of split '{split}'"):
        read(tmp_path, split)


def test_a_folder_without_data_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"has no \.json"):
        read(tmp_path)


def test_a_single_file_has_only_the_split_train(tmp_path):
    make_folder(tmp_path, rows="a")
    with pytest.raises(InputError, match="single file"):
        read(tmp_path / "rows.jsonl", "validation")


BOUNDS = ["", "0", "3", "50", "-5", "-50", "10%", "33%", "90%", "-10%", "100%"]


@pytest.mark.parametrize("number", [1, 7, 10, 25])
def test_slices_are_those_of_datasets(tmp_path, number):
    half = number // 2
    for name, chosen in (("a", range(half)), ("b", range(half, number))):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in chosen))
    for start in BOUNDS:
        for stop in BOUNDS:
            if start and stop and ("%" in start) != ("%" in stop):
                continue  # datasets takes no mixture
            split = f"train[{start}:{stop}]"
            (wanted,) = datasets.ReadInstruction.from_spec(split).to_absolute({"train": number})
            expected = [str(i) for i in range(wanted.from_, wanted.to)]
            if expected:
                assert [row["text"] for row in read(tmp_path, split)] == expected, split
            else:
                with pytest.raises(InputError, match="no rows in"):
                    read(tmp_path, split)


@pytest.mark.parametrize("percent", [1, 37, 50, 90, 99])
def test_complementary_slices_split_the_rows(tmp_path, percent):
    (tmp_path / "r.txt").write_text("".join(f"{i}\n" for i in range(101)))
    first = read(tmp_path / "r.txt", f"train[:{percent}%]")
    second = read(tmp_path / "r.txt", f"train[{percent}%:]")
    assert [row["text"] for row in first + second] == [str(i) for i in range(101)]


@pytest.mark.parametrize(
    "split",
    [
        "",
        " ",
        "train[",
        "train[5]",
        "train[:5",
        "train[a:b]",
        "train[:5.5%]",
        "train[::2]",
        "train[:5][:3]",
        "a b",
        "[:5]",
        "train+test",
    ],
)
def test_a_split_that_cannot_be_read_is_an_error(tmp_path, split):
    make_folder(tmp_path, train="a")
    with pytest.raises(InputError, match="cannot read the split"):
        read(tmp_path, split)


# ---------------------------------------------------------------- rows: used, dropped, cut


USABLE = {"prompt": "What?", "completion": " A leaf."}


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"completion": None}, "'completion' is null, not text"),
        ({"completion": 3}, "'completion' is a number, not text"),
        ({"completion": 2.5}, "'completion' is a number, not text"),
        ({"completion": float("nan")}, "'completion' is a number, not text"),
        ({"completion": True}, "'completion' is a boolean, not text"),
        ({"completion": ["a"]}, "'completion' is a list, not text"),
        ({"completion": {"a": 1}}, "'completion' is an object, not text"),
        ({"prompt": None}, "'prompt' is null, not text"),
        ({"completion": ""}, "empty response"),
        ({"completion": " \n"}, "empty response"),
        ({"completion": ...}, "'completion' is missing"),
        ({"prompt": ...}, "'prompt' is missing"),
    ],
)
def test_a_bad_row_is_dropped_counted_and_located(tokenizer, changed, reason):
    bad = {key: value for key, value in {**USABLE, **changed}.items() if value is not ...}
    rows = tokenize_rows(located(USABLE, bad, USABLE, bad), tokenizer)
    assert (rows.rows_read, len(rows), rows.dropped) == (4, 2, Counter({reason: 2}))
    assert rows.first_dropped == {reason: "rows line 2"}
    assert f"4 rows read = 2 used + 2 dropped (2 {reason}, first: rows line 2)" in rows.describe()


@pytest.mark.parametrize("text, reason", [("?", "one token"), ("", "empty text"), (" ", "empty text")])
def test_a_text_row_that_teaches_nothing_is_dropped(tokenizer, text, reason):
    tokenizer.backend_tokenizer.normalizer = None  # else a lone character is two tokens: a space in front
    rows = tokenize_rows(located({"text": text}, {"text": "is it"}), tokenizer)
    assert (rows.rows_read, len(rows), rows.dropped) == (2, 1, Counter({reason: 1}))


@pytest.mark.parametrize("rows", [[{"text": None}], [{"text": ""}] * 3, [{"prompt": "a", "completion": ""}]])
def test_an_error_if_no_row_is_left(tokenizer, rows):
    with pytest.raises(InputError, match=rf"no row of my\.jsonl .*: {len(rows)} .*first: rows line 1"):
        tokenize_rows(located(*rows), tokenizer, name="my.jsonl")


def test_a_column_that_is_absent_everywhere_is_an_error_that_lists_the_columns(tokenizer):
    with pytest.raises(InputError, match=r"\['answer', 'question'\].*'text'"):
        tokenize_rows(located({"question": "a"}, {"answer": "b"}), tokenizer)
    with pytest.raises(InputError, match=r"no column 'body'.*\['text'\]"):
        tokenize_rows(located({"text": "a"}), tokenizer, "text", text_field="body")


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        tokenize_rows(located({"text": "What is it?"}), tokenizer)


def test_rows_read_are_rows_used_plus_rows_dropped(tokenizer):
    """Rows beyond those that decide the format too, each reason counted; drawn at random."""
    kinds = {
        None: USABLE,
        "empty response": {**USABLE, "completion": ""},
        "'completion' is missing": {"prompt": "a"},
        "prompt fills --max_length": {"prompt": "What? " * 40, "completion": "a"},
    }
    drawn = [None, *np.random.default_rng(0).choice(list(kinds), size=400)]
    rows = tokenize_rows(located(*(kinds[kind] for kind in drawn)), tokenizer, max_length=32)
    expected = Counter(drawn)
    assert len(rows) == expected.pop(None)
    assert rows.dropped == expected
    assert rows.rows_read == len(drawn) == len(rows) + rows.dropped.total()


def test_an_answer_that_is_too_long_is_cut_counted_and_has_no_eos(tokenizer):
    whole = tokenize_rows(located(USABLE), tokenizer)
    ids, labels = whole[0]
    for max_length in range(1, len(ids) + 2):
        if not any(label != IGNORE_INDEX for label in labels[:max_length]):
            with pytest.raises(InputError, match="1 prompt fills --max_length"):
                tokenize_rows(located(USABLE), tokenizer, max_length=max_length)
            continue
        rows = tokenize_rows(located(USABLE), tokenizer, max_length=max_length)
        is_cut = max_length < len(ids)
        assert rows[0][0].tolist() == ids[:max_length].tolist()
        assert rows[0][1].tolist() == labels[:max_length].tolist()
        assert (tokenizer.eos_token_id in rows[0][1]) is not is_cut
        assert rows.truncated == is_cut and ("1 answers cut" in rows.describe()) is is_cut


def test_flat_rows_come_back_one_by_one(tokenizer):
    texts = ["What is it?", "A leaf.", "Yes is it? A leaf."]
    rows = tokenize_rows(located(*({"text": text} for text in texts)), tokenizer)
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    assert [rows[i][0].tolist() for i in range(len(rows))] == expected
    assert rows.lengths == [len(ids) for ids in expected]
    assert rows.targets == sum(len(ids) - 1 for ids in expected)
    chosen = rows.subset([2, 0])
    assert [chosen[i][0].tolist() for i in range(len(chosen))] == [expected[2], expected[0]]


def test_a_token_beyond_the_vocabulary_is_an_error(tokenizer):
    rows = tokenize_rows(located({"text": "What is it?"}, {"text": "A leaf."}), tokenizer)
    largest = max(tokenizer("What is it? A leaf.")["input_ids"])
    check_vocabulary(rows, largest + 1)
    with pytest.raises(InputError, match=f"token id {largest}.* {largest} tokens"):
        check_vocabulary(rows, largest)


# ---------------------------------------------------------------- held-out rows


def make_rows(lengths, seed=0):
    """Rows of random ids, about half of them targets, the last always and the first never."""
    generator = np.random.default_rng(seed)
    ids = [generator.integers(3, 400, size=length) for length in lengths]
    labels = [np.where(generator.random(len(row)) < 0.5, row, IGNORE_INDEX) for row in ids]
    for row_ids, row_labels in zip(ids, labels):
        row_labels[0], row_labels[-1] = IGNORE_INDEX, row_ids[-1]
    offsets = np.cumsum([0, *lengths]).tolist()
    tensors = (torch.from_numpy(np.concatenate(part).astype(np.int32)) for part in (ids, labels))
    return TokenizedRows(*tensors, offsets, "text", rows_read=len(lengths))


def contents(rows):
    return [tuple(rows[i][0].tolist()) for i in range(len(rows))]


@pytest.mark.parametrize("amount, held", [(0.05, 2), (0.1, 4), (0.5, 20), (1, 1), (39, 39)])
def test_held_out_rows_are_disjoint_complete_and_always_the_same(amount, held):
    rows = make_rows(range(5, 45))
    training, validation = hold_out(rows, amount, seed=3)
    assert (len(training), len(validation)) == (40 - held, held)
    assert sorted(contents(training) + contents(validation)) == sorted(contents(rows))
    assert contents(hold_out(rows, amount, seed=3)[1]) == contents(validation)
    if held == 20:
        assert contents(hold_out(rows, amount, seed=4)[1]) != contents(validation)


@pytest.mark.parametrize("amount", [0, 0.01, 40, 41, 0.999])
def test_holding_out_nothing_or_everything_is_an_error(amount):
    with pytest.raises(InputError, match=f"--validation_split {amount} "):
        hold_out(make_rows(range(5, 45)), amount, seed=0)


def test_both_halves_keep_the_books(tokenizer):
    """Rows read = used + dropped in each, and a cut row is counted where it went: cut rows have no EOS."""
    lines = [{**USABLE, "completion": " leaf" * number} for number in range(13)]
    rows = tokenize_rows(located(*lines), tokenizer, max_length=12)
    assert rows.dropped == {"empty response": 1} and 2 < rows.truncated < len(rows) - 2
    for half in (halves := hold_out(rows, 0.5, seed=0)):
        assert half.rows_read == len(half) + half.dropped.total()
        assert half.truncated == sum(ids[-1] != tokenizer.eos_token_id for ids in contents(half))
    assert sum(half.rows_read for half in halves) == 13


# ---------------------------------------------------------------- order


LENGTHS = np.random.default_rng(1).integers(3, 200, size=1003).tolist()
ORDERS = pytest.mark.parametrize("group_by_length", [False, True])


def epoch_rows(order, epoch):
    return [order.rows(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]


@ORDERS
@pytest.mark.parametrize("number, rows_per_step", [(1003, 16), (64, 16), (17, 16), (5, 1), (1, 4), (3, 16)])
def test_an_epoch_takes_every_row_once_and_its_last_step_the_rest(group_by_length, number, rows_per_step):
    order = StepOrder(LENGTHS[:number], rows_per_step, seed=0, group_by_length=group_by_length)
    for epoch in range(3):
        steps = epoch_rows(order, epoch)
        assert sorted(row for step in steps for row in step) == list(range(number))
        assert [len(step) for step in steps[:-1]] == [rows_per_step] * (order.steps_per_epoch - 1)
        assert len(steps[-1]) == (number - 1) % rows_per_step + 1


@ORDERS
def test_order_is_a_pure_function_of_seed_epoch_and_step(group_by_length):
    wanted = list(range(0, 190, 7))
    forwards = StepOrder(LENGTHS, 16, seed=5, group_by_length=group_by_length)
    expected = {step: forwards.rows(step) for step in wanted}
    backwards = StepOrder(LENGTHS, 16, seed=5, group_by_length=group_by_length)
    assert {step: backwards.rows(step) for step in reversed(wanted)} == expected
    for step in wanted:
        assert StepOrder(LENGTHS, 16, seed=5, group_by_length=group_by_length).rows(step) == expected[step]


@ORDERS
def test_order_neither_depends_on_nor_draws_from_global_random_states(group_by_length):
    torch.manual_seed(0)
    np.random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    rows = StepOrder(LENGTHS, 16, seed=5, group_by_length=group_by_length).rows(3)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    np.random.seed(1)
    assert StepOrder(LENGTHS, 16, seed=5, group_by_length=group_by_length).rows(3) == rows


@ORDERS
def test_epochs_and_seeds_differ(group_by_length):
    order, other = (StepOrder(LENGTHS, 16, seed, group_by_length) for seed in (0, 1))
    firsts = order.rows(0), order.rows(order.steps_per_epoch), other.rows(0)
    assert len({frozenset(rows) for rows in firsts}) == 3


@ORDERS
def test_a_step_is_sorted_from_long_to_short(group_by_length):
    order = StepOrder(LENGTHS, 16, seed=0, group_by_length=group_by_length)
    for rows in epoch_rows(order, 0):
        assert [LENGTHS[row] for row in rows] == sorted((LENGTHS[row] for row in rows), reverse=True)


def test_grouping_by_length_pads_less_and_does_not_run_from_long_to_short():
    def padded(steps):
        return sum(max(LENGTHS[row] for row in rows) * len(rows) for rows in steps)

    plain, grouped = (epoch_rows(StepOrder(LENGTHS, 16, 0, group), 0) for group in (False, True))
    assert padded(grouped) < 1.1 * sum(LENGTHS) < padded(plain)
    longest = [max(LENGTHS[row] for row in rows) for rows in grouped[:50]]
    assert abs(np.corrcoef(longest, np.arange(50))[0, 1]) < 0.5


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_the_rows_of_a_step_do_not_depend_on_the_micro_batch_size(batch_size):
    rows = make_rows(LENGTHS[:40])
    indices = StepOrder(rows.lengths, 16, seed=0).rows(1)
    batches = micro_batches(rows, indices, batch_size, pad_id=2)
    assert [len(batch["input_ids"]) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    padded = [row for batch in batches for row in batch["input_ids"].tolist()]
    for index, row in zip(indices, padded, strict=True):
        assert row[: rows.lengths[index]] == rows[index][0].tolist()
    assert sum(len(batch["target_ids"]) for batch in batches) == sum(
        int((rows[index][1] != IGNORE_INDEX).sum()) for index in indices
    )


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("lengths", [[5], [8], [9, 2], [2, 2], [17, 3, 16, 8, 1, 30]])
@pytest.mark.parametrize("pad_id", [0, 2, 399])
def test_every_target_is_paired_with_the_position_before_it(lengths, pad_id):
    rows = make_rows(lengths, seed=len(lengths))
    batch = collate([rows[i] for i in range(len(rows))], pad_id)
    width = 8 * -(-max(lengths) // 8)
    assert batch["input_ids"].shape == (len(lengths), width)
    pairs = []
    for row, (ids, labels) in enumerate(rows[i] for i in range(len(rows))):
        ids, labels = ids.tolist(), labels.tolist()
        assert batch["input_ids"][row].tolist() == ids + [pad_id] * (width - len(ids))
        pairs += [
            (row * width + position, labels[position + 1])
            for position in range(len(ids) - 1)
            if labels[position + 1] != IGNORE_INDEX
        ]
    assert list(zip(batch["target_index"].tolist(), batch["target_ids"].tolist(), strict=True)) == pairs
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_the_targets_of_real_rows_read_as_their_answers(tokenizer):
    rows = tokenize_rows(located(*ROWS), tokenizer)
    batch = collate([rows[0], rows[1]], tokenizer.eos_token_id)
    assert torch.equal(batch["input_ids"].flatten()[batch["target_index"] + 1], batch["target_ids"])
    answers = "".join(row["completion"] + tokenizer.eos_token for row in ROWS)
    assert " " + tokenizer.decode(batch["target_ids"]) == answers
