"""Reading rows: every type of file, broken and unusual ones, folders, slices as `datasets` makes them."""

import errno
import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from qlora.data.sources import RowSource, read_rows
from qlora.data.tokenize import tokenize_rows
from qlora.errors import InputError

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


# ---------------------------------------------------------------- bad input: errors with the location


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
    "lone surrogate": ("r.jsonl", GOOD + b'{"text": "\\ud800"}\n', "line 2 contains a lone surrogate"),
    "nested lone surrogate": ("r.jsonl", b'{"a": [{"b": "\\udfff"}]}\n', "line 1 contains a lone surrogate"),
    "huge number": ("r.jsonl", GOOD + b'{"text": ' + b"1" * 5000 + b"}\n", "line 2"),
    "deep nesting": ("r.jsonl", GOOD + b"[" * 100_000 + b"\n", "line 2"),
    "empty json": ("r.json", b"", "no rows"),
    "empty json list": ("r.json", b"[]", "no rows"),
    "json list cut": ("r.json", b'[\n{"text": "a"},\n{"text": "b"\n', "line 4 is not valid JSON"),
    "json text": ("r.json", b'"a"', "not a list of objects"),
    "json list of texts": ("r.json", b'[{"text": "a"}, "b"]', "row 2 is not a JSON object"),
    "json lone surrogate": ("r.json", b'[{"a": "a"}, {"a": "\\ud800"}]', "row 2 contains a lone surrogate"),
    "json not UTF-8": ("r.json", b'[\n{"text": "a"},\n{"text": "\xff"}]', "line 3 is not UTF-8"),
    "json lines under json, cut": ("r.json", GOOD + b'{"text": "b', "line 2 is not valid JSON"),
    "empty csv": ("r.csv", b"", "no rows"),
    "csv header only": ("r.csv", b"text\r\n", "no rows"),
    "csv with a field too many": ("r.csv", b"text\na\nb,c\n", "line 3 has more fields"),
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
def test_a_broken_file_is_an_error_with_its_name_and_the_location(tmp_path, name, content, message):
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
def test_a_missing_file_is_an_error_and_not_taken_for_a_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such data file or folder"):
        read(name)


def test_a_hub_data_set_that_cannot_be_loaded_is_a_one_line_error(monkeypatch):
    with pytest.raises(InputError, match="cannot load the dataset 'nobody/nothing'") as error:
        read("nobody/nothing")
    assert len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------- unusual but valid input


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
def test_unusual_but_valid_files_are_read(tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content)
    assert [row["text"] for row in read(tmp_path / name)] == texts


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_type_of_file_gives_the_same_rows(tmp_path, suffix):
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
        locations = [where for where, _ in read_rows(str(tmp_path / name), "train")]
        assert locations == [f"{tmp_path / name} {place}" for place in places]


def test_nul_characters_survive_tokenization(tokenizer):
    rows = tokenize_rows(located({"text": "a\0b"}), tokenizer)
    assert tokenizer.decode(rows[0][0][1:-1]) == "a\0b"


# ---------------------------------------------------------------- folders and slices


def make_folder(folder, **texts):
    """Write one jsonl file for each name; __ stands for a slash."""
    for name, text in texts.items():
        path = folder / (name.replace("__", "/") + ".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
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
def test_a_split_of_a_folder_is_its_files_of_that_name(tmp_path, names, split, chosen):
    make_folder(tmp_path, **{name: name for name in names})
    assert [row["text"] for row in read(tmp_path, split)] == chosen


@pytest.mark.parametrize(
    "word", ["validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"]
)
def test_files_named_after_other_splits_are_not_training_data(tmp_path, word):
    make_folder(tmp_path, rows="training row", **{word: "held-out row"})
    assert read(tmp_path) == [{"text": "training row"}]


@pytest.mark.parametrize(
    "name, split",
    [
        ("train", "train"), ("TRAIN", "train"), ("train-00000-of-00001", "train"), ("train_1", "train"),
        ("train-00000-of-00001-a09b74b3ef9c3b56", "train"),  # as push_to_hub() of `datasets` names its files
        ("squad.train", "train"), ("alpaca_train", "train"), ("alpaca-test", "test"), ("my dev", "dev"),
        ("alpaca_test-00000-of-00002", "test"), ("test-2026-01-05", "test"), ("test2", "test"),
        ("test_data", "test"), ("my_validation_rows", "validation"), ("testset", "test"),
        ("test/part1", "test"), ("a/test/b/part1", "test"), ("test/train/part1", "train"),
        ("test/train-1", "train"), ("train/test", "test"), ("train_v2/test", "test"), ("test_data/a", "test"),
        ("dev-ops", None), ("unit-test-writing", None), ("latest", None), ("constraint", None),
        ("train_v2/rows", None), ("test-suite/rows", None), ("train_v2", None), ("evaluate", None),
    ],
)  # fmt: skip
def test_a_file_belongs_to_the_split_that_its_name_or_its_folder_names_as_a_whole(tmp_path, name, split):
    """Rows of no split are training rows where no file is named after train."""
    make_folder(tmp_path, **{name.replace("/", "__"): "this", "rows_of_no_split": "other"})
    trained = [row["text"] for row in read(tmp_path)]
    assert sorted(trained) == {"train": ["this"], None: ["other", "this"]}.get(split, ["other"])
    if split not in ("train", None):
        assert [row["text"] for row in read(tmp_path, split)] == ["this"]


def test_hidden_files_and_folders_are_skipped(tmp_path):
    make_folder(
        tmp_path / ".hidden", train="a", **{".ipynb_checkpoints__train-checkpoint": "old", "b__.c": "x"}
    )
    assert read(tmp_path / ".hidden") == [{"text": "a"}]  # only what is inside the folder counts


def described(folder, split="train") -> str:
    (line,) = RowSource(str(folder), split).describe_files()
    return line


def test_a_folder_describes_what_is_read_and_what_is_left_out_and_why(tmp_path):
    make_folder(
        tmp_path, b="b", a="a", test="t", **{".ipynb_checkpoints__a-checkpoint": "old", "x__dev": "d"}
    )
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / "link").symlink_to(tmp_path / "x", target_is_directory=True)
    assert described(tmp_path) == (
        f"{tmp_path}: 2 files read: a.jsonl, b.jsonl; left out: 1 of split test: test.jsonl; "
        "1 of split dev: x/dev.jsonl; 1 hidden: .ipynb_checkpoints; 1 of another type: README.md; "
        "1 linked folders: link"
    )
    make_folder(tmp_path, train="c")
    no_split = "left out: 2 of no split: a.jsonl, b.jsonl; 1 of split "
    assert described(tmp_path).startswith(f"{tmp_path}: 1 file read: train.jsonl; {no_split}test: ")
    text = f"{tmp_path} (test[:1]): 1 file read: test.jsonl; {no_split}train: "
    assert described(tmp_path, "test[:1]").startswith(text)


def test_long_lists_of_files_are_shortened_with_a_count(tmp_path):
    make_folder(tmp_path, **{f"rows-{number:03}": "a" for number in range(120)})
    assert described(tmp_path) == (
        f"{tmp_path}: 120 files read: rows-000.jsonl, rows-001.jsonl, rows-002.jsonl and 117 more"
    )


def test_only_a_folder_describes_its_files(tmp_path):
    make_folder(tmp_path, rows="a")
    assert RowSource(str(tmp_path / "rows.jsonl")).describe_files() == []
    assert RowSource("someone/data").describe_files() == []


@pytest.mark.parametrize("name", [b"caf\xe9.jsonl", b"caf\xe9/rows.jsonl"], ids=["file", "folder"])
def test_a_name_that_is_not_utf8_is_a_one_line_error_if_the_file_is_to_be_read(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(GOOD)
    message = r"caf\\xe9.* is not UTF-8: rename it"
    for dataset in map(str, (tmp_path, path.parent, path)):
        for read_it in (RowSource.content, list):
            with pytest.raises(InputError, match=message) as error:
                read_it(RowSource(dataset))
            str(error.value).encode()  # can be printed


def test_a_name_that_is_not_utf8_does_not_matter_if_the_file_is_left_out(tmp_path):
    make_folder(tmp_path, train="a")
    (tmp_path / os.fsdecode(b"caf\xe9.md")).write_bytes(b"notes")
    assert read(tmp_path) == [{"text": "a"}]
    assert described(tmp_path).endswith(r"1 of another type: caf\xe9.md")


def test_a_folder_inside_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    make_folder(tmp_path, a="a", sub__b="b")
    scandir = os.scandir

    def refuse(path):  # a mode would not stop root
        if str(path).endswith("sub"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot read .*sub: Permission denied"):
        read(tmp_path)


def test_beside_files_that_begin_with_train_those_that_begin_with_another_split_are_left_out(tmp_path):
    make_folder(tmp_path, train_sft="a", test_sft="b", test_gen="c", more="d")
    assert read(tmp_path) == [{"text": "d"}, {"text": "a"}]
    assert "left out: 2 of no split: test_gen.jsonl, test_sft.jsonl" in described(tmp_path)


def test_a_link_to_a_file_that_is_gone_is_an_error(tmp_path):
    make_folder(tmp_path, a="a")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match=r"cannot read .*b\.jsonl: No such file"):
        read(tmp_path)


def test_a_folder_may_mix_file_types_and_other_files_are_ignored(tmp_path):
    make_folder(tmp_path, a="a")
    (tmp_path / "b.csv").write_text("text\nb\n")
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    assert read(tmp_path) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("split", ["validation", "train2", "test"])
def test_a_split_missing_from_a_folder_is_an_error(tmp_path, split):
    make_folder(tmp_path, train="a")
    with pytest.raises(InputError, match=f"no .* file of split '{split}': it has train.jsonl"):
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
def test_slices_are_the_same_as_those_of_datasets(tmp_path, number):
    half = number // 2
    for name, chosen in (("a", range(half)), ("b", range(half, number))):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in chosen))
    for start in BOUNDS:
        for stop in BOUNDS:
            if start and stop and ("%" in start) != ("%" in stop):
                continue  # datasets rejects a mixture
            split = f"train[{start}:{stop}]"
            (absolute,) = datasets.ReadInstruction.from_spec(split).to_absolute({"train": number})
            expected = [str(i) for i in range(absolute.from_, absolute.to)]
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
def test_an_invalid_split_is_an_error(tmp_path, split):
    make_folder(tmp_path, train="a")
    with pytest.raises(InputError, match="cannot read the split"):
        read(tmp_path, split)


def test_a_hub_data_set_can_be_streamed(monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(RowSource("someone/data", "train", "configuration", streaming=True))
    assert [row for _, row in rows] == ROWS and rows[1][0] == "someone/data row 2"
    assert calls == [(("someone/data", "configuration"), {"split": "train", "streaming": True})]


def test_an_error_in_the_middle_of_a_stream_is_one_line(monkeypatch):
    def rows():
        yield ROWS[0]
        raise ConnectionError("the network is gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    with pytest.raises(InputError, match="someone/data cannot be read after row 1: the network is gone"):
        list(RowSource("someone/data", streaming=True))


def test_objects_in_parquet_rows_have_only_the_keys_that_were_written(tmp_path):
    """Arrow gives all messages of a column the same keys: a template would see `tool_calls: null`."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "b"}]}]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages, "id": None}]), path)
    assert list(read_rows(str(path), "train")) == [(f"{path} row 1", {"messages": messages, "id": None})]
