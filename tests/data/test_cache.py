"""The cache of tokens: found again, never stale, never partial, and no obstacle if it cannot be written."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import transformers

from qlora.data.cache import cache_key, find_entry, load_table, new_entry
from qlora.data.formatting import Formatting
from qlora.data.sources import RowSource
from qlora.data.tokenize import tokenize_rows
from qlora.errors import InputError
from tests.conftest import ROOT, ROWS


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"prompt": "a", "completion": ""}]))
    return path


def tokenize(data, tokenizer, cache, **options):
    source = RowSource(str(data))
    options = {"name": str(source), "content": source.content, "cache_folder": cache} | options
    return tokenize_rows(source, tokenizer, **options)


def tokenize_sample(data, tokenizer, cache):
    """As tokenize, but only the first row can be read: the others must come from the cache."""
    source = RowSource(str(data))
    first_row = next(iter(source))
    return tokenize_rows([first_row], tokenizer, name=str(source), content=source.content, cache_folder=cache)


def contents(rows):
    return [(ids.tolist(), labels.tolist()) for ids, labels in rows.fetch(list(range(len(rows))))]


def write_row(folder: Path, text: str) -> None:
    datasets.Dataset.from_list([{"text": text}]).map(cache_file_name=str(folder / "rows.arrow"))


# ---------------------------------------------------------------- found again, never stale


def test_a_second_start_tokenizes_nothing(cache, data, tokenizer):
    first = tokenize(data, tokenizer, cache)
    second = tokenize_sample(data, tokenizer, cache)
    assert contents(second) == contents(first) and len(first) == len(ROWS)
    assert second.dropped == first.dropped == {"empty response": 1}
    assert second.first_dropped == {"empty response": f"{data} line 43"}
    assert len(list(cache.iterdir())) == 1


def test_a_copy_of_the_tokenizer_finds_the_same_tokens(cache, data, tokenizer, tmp_path):
    want = contents(tokenize(data, tokenizer, cache))
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert contents(tokenize_sample(data, copy, cache)) == want


def test_the_cache_is_that_of_datasets_unless_another_is_given(data, tokenizer):
    default = Path(datasets.config.HF_DATASETS_CACHE, "qlora")
    before = set(default.glob("*"))
    tokenize(data, tokenizer, cache=None)
    assert len(set(default.glob("*")) - before) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda data, tokenizer: data.write_text(data.read_text().replace("red", "rod")),
        lambda data, tokenizer: tokenizer.add_tokens(["leaf"]),
        lambda data, tokenizer: setattr(tokenizer, "eos_token", "<unk>"),
        lambda data, tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
        lambda data, tokenizer: {"formatting": Formatting(completion_only_loss=False)},
        lambda data, tokenizer: {"formatting": Formatting("text", "prompt")},
    ],
    ids=["data", "tokens", "eos", "chat template", "completion_only_loss", "format"],
)
def test_changed_data_tokenizer_or_settings_are_tokenized_again(cache, data, tokenizer, change):
    tokenize(data, tokenizer, cache)
    options = change(data, tokenizer)
    tokenize(data, tokenizer, cache, **(options if isinstance(options, dict) else {}))
    assert len(list(cache.iterdir())) == 2


def test_the_key_changes_with_every_code_file(tokenizer, tmp_path):
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    for path in files:
        path.write_text("")
    keys = [cache_key(tokenizer, {}, files)]
    for path in files:
        path.write_text("# changed")
        keys.append(cache_key(tokenizer, {}, files))
    assert len(set(keys)) == 3


@pytest.mark.parametrize("library", ["tokenizers", "transformers"])
def test_the_key_changes_with_the_version_of_a_library(tokenizer, monkeypatch, library):
    before = cache_key(tokenizer, {}, [])
    monkeypatch.setattr(f"{library}.__version__", "0.0.1")
    assert cache_key(tokenizer, {}, []) != before


# ---------------------------------------------------------------- never partial, never in the way


def test_a_cache_that_cannot_be_written_is_not_an_error(cache, data, tokenizer, capsys):
    cache.write_text("a file where the folder should be")
    assert len(tokenize(data, tokenizer, cache)) == len(ROWS)
    assert "Tokens are not cached" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_leaves_nothing_in_the_cache(cache, data, tokenizer):
    with open(data, "a") as file:
        file.write("{")
    with pytest.raises(InputError, match="line 44 is not valid JSON"):
        tokenize(data, tokenizer, cache)
    assert not list(cache.rglob("*"))


@pytest.mark.parametrize("damage", ["lost", "emptied", "no sizes", "all lost"])
def test_damaged_tokens_are_tokenized_again(cache, data, tokenizer, damage):
    want = contents(tokenize(data, tokenizer, cache))
    (part,) = cache.glob("*/*.arrow")
    if damage == "emptied":
        part.write_bytes(b"")
    for path in {
        "lost": [part],
        "no sizes": [part.with_name("sizes.json")],
        "all lost": part.parent.iterdir(),
    }.get(damage, []):
        path.unlink()
    assert contents(tokenize(data, tokenizer, cache)) == want


def test_of_two_processes_that_write_the_same_entry_one_publishes_and_none_fails(cache):
    with new_entry(cache, "key") as (slow, _):
        write_row(slow, "slow")
        with new_entry(cache, "key") as (fast, _):
            write_row(fast, "fast")
        assert find_entry(cache, "key")
    assert load_table(find_entry(cache, "key"))["text"][0] == "fast"
    assert list(cache.iterdir()) == [find_entry(cache, "key")]


def test_an_entry_that_is_published_while_another_process_begins_is_not_removed(cache):
    """The other has looked, found nothing, and now removes what it takes for damaged."""
    with new_entry(cache, "key") as (folder, _):
        write_row(folder, "published")
    entry = find_entry(cache, "key")
    with new_entry(cache, "key") as (folder, _):
        assert load_table(entry)["text"][0] == "published"
        write_row(folder, "late")
    assert list(cache.iterdir()) == [entry]


def test_processes_that_tokenize_the_same_rows_at_once_all_succeed(cache, data, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys\nfrom pathlib import Path\nfrom transformers import AutoTokenizer\n"
        "from qlora.data.sources import RowSource\nfrom qlora.data.tokenize import tokenize_rows\n"
        "tokenizer, source = AutoTokenizer.from_pretrained(sys.argv[1]), RowSource(sys.argv[2])\n"
        "rows = tokenize_rows(source, tokenizer, content=source.content, cache_folder=Path(sys.argv[3]))\n"
        "print(len(rows), rows.fetch([0])[0][0].tolist())"
    )
    command = [sys.executable, "-c", code, tmp_path / "tokenizer", data, cache]
    processes = [
        subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    outputs = [process.communicate() for process in processes]
    want, _ = tokenize(data, tokenizer, None)[0]
    for out, err in outputs:
        assert "Traceback" not in err and out == f"{len(ROWS)} {want.tolist()}\n"
    assert not list(cache.glob("unfinished-*"))


class GrowingSource(RowSource):
    """A file to which another program still writes when its last row has been read."""

    def __iter__(self):
        yield from super().__iter__()
        Path(self.dataset).write_text(json.dumps(ROWS[0]) + "\n")


def test_data_that_change_while_they_are_read_are_refused_and_not_cached(cache, data, tokenizer):
    source = GrowingSource(str(data))
    with pytest.raises(InputError, match="rows changed while it was read"):
        tokenize_rows(source, tokenizer, name="rows", content=source.content, cache_folder=cache)
    assert not list(cache.iterdir())


def test_an_entry_whose_writer_fails_is_not_published(cache):
    with pytest.raises(KeyError):
        with new_entry(cache, "key") as (folder, _):
            write_row(folder, "half")
            raise KeyError
    assert not list(cache.iterdir())


def test_what_killed_processes_left_behind_is_removed_after_a_day(cache, data, tokenizer):
    for name, age in (("unfinished-old", 100_000), ("unfinished-of-another-run", 10)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age, time.time() - age))
    tokenize(data, tokenizer, cache)
    assert not (cache / "unfinished-old").exists() and (cache / "unfinished-of-another-run").exists()


def test_tokens_stay_in_memory_if_the_content_has_no_hash(cache, tokenizer):
    located = [(f"line {number}", row) for number, row in enumerate(ROWS)]
    assert len(tokenize_rows(located, tokenizer, cache_folder=cache)) == len(ROWS) and not cache.exists()
