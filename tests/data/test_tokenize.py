"""The cache of tokens: found again, never stale, never half, never in the way; and any number of cores."""

import datetime
import decimal
import json
import os
import time

import datasets
import pyarrow.parquet
import pytest
import transformers

import qlora.data.tokenize
from qlora.data.sources import RowSource
from qlora.data.tokenize import tokenize_rows
from qlora.errors import InputError
from tests.conftest import ROWS


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "qlora"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"prompt": "a", "completion": ""}]))
    return path


def tokenize(data, tokenizer, **options):
    source = RowSource(str(data))
    return tokenize_rows(source, tokenizer, name=str(source), content=source.content(), **options)


def contents(rows):
    return [(ids.tolist(), labels.tolist()) for ids, labels in rows.fetch(list(range(len(rows))))]


def test_a_second_start_tokenizes_nothing(cache, data, tokenizer, monkeypatch):
    first = tokenize(data, tokenizer)
    monkeypatch.setattr(qlora.data.tokenize, "_tokenize_batch", pytest.fail)
    second = tokenize(data, tokenizer)
    assert contents(second) == contents(first) and len(first) == len(ROWS)
    assert second.dropped == first.dropped == {"empty response": 1}
    assert second.first_dropped == {"empty response": f"{data} line 43"}
    assert len(list(cache.iterdir())) == 1


def test_a_copy_of_the_tokenizer_elsewhere_finds_the_same_tokens(
    cache, data, tokenizer, tmp_path, monkeypatch
):
    tokenize(data, tokenizer)
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    monkeypatch.setattr(qlora.data.tokenize, "_tokenize_batch", pytest.fail)
    tokenize(data, copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda data, tokenizer: data.write_text(data.read_text().replace("red", "rod")),
        lambda data, tokenizer: tokenizer.add_tokens(["leaf"]),
        lambda data, tokenizer: setattr(tokenizer, "eos_token", "<unk>"),
        lambda data, tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
        lambda data, tokenizer: {"completion_only_loss": False},
        lambda data, tokenizer: {"row_format": "text", "text_field": "prompt"},
    ],
)
def test_a_change_of_data_tokenizer_or_settings_tokenizes_again(cache, data, tokenizer, change):
    tokenize(data, tokenizer)
    options = change(data, tokenizer)
    tokenize(data, tokenizer, **(options if isinstance(options, dict) else {}))
    assert len(list(cache.iterdir())) == 2


def test_a_change_of_the_code_that_makes_tokens_tokenizes_again(
    cache, data, tokenizer, tmp_path, monkeypatch
):
    tokenize(data, tokenizer)
    (tmp_path / "formats.py").write_text("# another template")
    monkeypatch.setattr(qlora.data.tokenize.formats, "__file__", str(tmp_path / "formats.py"))
    tokenize(data, tokenizer)
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_no_error(cache, data, tokenizer, capsys):
    cache.parent.write_text("a file where the folder should be")
    assert len(tokenize(data, tokenizer)) == len(ROWS)
    assert "Tokens are not cached" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_leaves_nothing_in_the_cache(cache, data, tokenizer):
    with open(data, "a") as file:
        file.write("{")
    with pytest.raises(InputError, match="line 44 is not valid JSON"):
        tokenize(data, tokenizer)
    assert not list(cache.rglob("*"))


def test_several_processes_give_what_one_gives(cache, data, tokenizer, monkeypatch):
    one = tokenize(data, tokenizer)
    monkeypatch.setattr(qlora.data.tokenize, "ROWS_PER_PROCESS", 10)
    monkeypatch.setattr(qlora.data.tokenize, "SLICE_ROWS", 35)  # 35 rows in three processes, 8 in one
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    data.rename(data.with_name("again.jsonl"))
    several = tokenize(data.with_name("again.jsonl"), tokenizer)
    assert contents(several) == contents(one) and several.dropped == one.dropped
    assert len(list(cache.rglob("*.arrow"))) == 1 + 3 + 1


@pytest.mark.parametrize("damage", ["lost", "emptied", "no sizes", "all lost"])
def test_a_damaged_cache_is_tokenized_again(cache, data, tokenizer, damage):
    want = contents(tokenize(data, tokenizer))
    (part,) = cache.glob("*/*.arrow")
    if damage == "emptied":
        part.write_bytes(b"")
    for path in {
        "lost": [part],
        "no sizes": [part.with_name("sizes.json")],
        "all lost": part.parent.iterdir(),
    }.get(damage, []):
        path.unlink()
    assert contents(tokenize(data, tokenizer)) == want


def test_what_kills_left_behind_is_swept(cache, data, tokenizer):
    for name, age in (("unfinished-old", 100_000), ("unfinished-of-another-run", 10)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age, time.time() - age))
    tokenize(data, tokenizer)
    assert not (cache / "unfinished-old").exists() and (cache / "unfinished-of-another-run").exists()


def test_what_is_no_text_is_never_trained_as_text(cache, tmp_path, tokenizer):
    """Bytes and dates of a parquet file, which JSON does not know."""
    path = tmp_path / "rows.parquet"
    values = [b"A leaf.", datetime.date(2020, 1, 1), decimal.Decimal("1.5")]
    for value in values:
        rows = [{"prompt": "What?", "completion": value}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        assert tokenize(path, tokenizer).dropped == {"'completion' is an object, not text": 1}


def test_a_template_that_writes_the_date_is_not_cached_beyond_it(cache, tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": "A leaf."}]}))
    tokenizer.chat_template = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenize(path, tokenizer)
    monkeypatch.setattr(time, "strftime", lambda _: "another day")
    tokenize(path, tokenizer)
    assert len(list(cache.iterdir())) == 2


def test_without_a_cache_tokens_stay_in_memory(cache, tokenizer):
    located = [(f"line {number}", row) for number, row in enumerate(ROWS)]
    assert len(tokenize_rows(located, tokenizer)) == len(ROWS) and not cache.exists()
