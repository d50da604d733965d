"""Sources to training and validation rows: length limit, vocabulary, held-out rows, streams, weights."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from qlora.data.formatting import Formatting
from qlora.data.prepare import choose_max_length, cut_rows, load_rows, tokenize_source
from qlora.data.sources import RowSource
from qlora.data.tokenize import tokenize_rows
from qlora.errors import InputError
from tests.conftest import ROWS, make_tokenizer

MODEL = SimpleNamespace(vocab_size=448, max_position_embeddings=256)


def write(path, *rows) -> RowSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RowSource(str(path))


def load(tokenizer, train_sources, validation_sources=(), **options):
    settings = {
        "formatting": Formatting(), "max_length": "256", "held_out": None, "seed": 0,
    }  # fmt: skip
    return load_rows(tokenizer, MODEL, train_sources, list(validation_sources), **(settings | options))


def contents(rows):
    return [(ids.tolist(), labels.tolist()) for ids, labels in rows.fetch(list(range(len(rows))))]


# ---------------------------------------------------------------- the length limit


@pytest.mark.parametrize(
    "max_length, tokens", [("20", 20), ("p50", 64), ("max", 64), ("p1", 64), ("300", 256)]
)
def test_the_length_is_a_number_or_a_percentile_capped_by_the_context(
    tokenizer, rows_file, max_length, tokens
):
    rows, _, _ = load(tokenizer, [RowSource(rows_file)], max_length=max_length)
    assert rows.max_length == tokens


def test_a_percentile_is_rounded_up_to_a_multiple_of_64(tokenizer, tmp_path):
    """Ten rows of 20 to more than 200 tokens: p80 is the length of the eighth, rounded up."""
    texts = [{"text": "leaf " * 10 * number} for number in range(1, 11)]
    lengths = tokenize_rows([("", row) for row in texts], tokenizer).lengths
    rows, _, _ = load(tokenizer, [write(tmp_path / "rows.jsonl", *texts)], max_length="p80")
    assert rows.max_length == -(-sorted(lengths)[7] // 64) * 64 < 256
    assert rows.answers_cut == sum(length > rows.max_length for length in lengths)


def test_the_context_counts_in_multiples_of_8_and_may_be_unknown(capsys):
    lengths = np.array([900])
    assert choose_max_length("max", lengths, SimpleNamespace(max_position_embeddings=100)) == 96
    assert "--max_length max exceeds the model's context: using 96" in capsys.readouterr().out
    assert choose_max_length("max", lengths, SimpleNamespace(max_position_embeddings=None)) == 960
    assert choose_max_length("77", lengths, SimpleNamespace()) == 77


def test_a_token_that_the_model_lacks_is_an_error(tokenizer):
    rows = tokenize_rows([("line 1", {"text": "What is it?"})], tokenizer)
    with pytest.raises(InputError, match="the model has only 5 tokens"):
        cut_rows(rows, 64, vocab_size=5)


def test_no_usable_row_is_an_error_with_the_reasons(tokenizer, tmp_path):
    source = write(tmp_path / "rows.jsonl", {"prompt": "a", "completion": ""})
    with pytest.raises(InputError, match=r"no row of .*rows\.jsonl can be used: 1 empty response"):
        tokenize_source(tokenizer, Formatting(), source)
    rows = tokenize_rows([("line 1", {"prompt": "What? " * 40, "completion": "a"})], tokenizer)
    with pytest.raises(InputError, match="no row can be used: 1 prompt fills --max_length, first: line 1"):
        cut_rows(rows, 16, MODEL.vocab_size)


# ---------------------------------------------------------------- training and validation rows


def sides(tokenizer, path, rows, **options) -> dict[str, str]:
    """On which side of a split each row of a file is, by its JSON; without those that are dropped."""
    sources = [write(path, *rows)]
    training, validation, _ = load(tokenizer, sources, **({"held_out": 0.3, "seed": 3} | options))
    lines = path.read_text().splitlines()
    return {
        lines[int(part.location(row).split()[-1]) - 1]: side
        for side, part in (("training", training), ("validation", validation))
        for row in range(len(part))
    }


def test_no_row_changes_sides_because_of_other_rows_lengths_or_tokenizers(tokenizer, tmp_path):
    """A row that was trained on is never a validation row of another run with the same seed and share."""
    path = tmp_path / "rows.jsonl"
    before = sides(tokenizer, path, ROWS)
    assert len(before) == 42 and 5 < list(before.values()).count("validation") < 20
    new = [{"prompt": f"New {number}?", "completion": "Yes."} for number in range(30)]
    empty = {"prompt": "What?", "completion": ""}
    other = make_tokenizer(["What does a leaf look like?"], vocab_size=300)
    changes = {
        "appended": sides(tokenizer, path, [*new[:10], *ROWS, *new[10:]]),
        "removed": sides(tokenizer, path, ROWS[::-3]),
        "dropped": sides(tokenizer, path, [empty, *ROWS[5:], empty]),
        "cut": sides(tokenizer, path, ROWS, max_length="10"),
        "tokenizer": sides(other, path, ROWS),
        "format": sides(tokenizer, path, ROWS, formatting=Formatting("text", "prompt")),
    }
    assert [len(after) for after in changes.values()][:3] == [72, 14, 37]
    assert 5 < len(changes["cut"]) < 42  # prompts of 10 tokens or more are dropped
    for change, after in changes.items():
        common = before.keys() & after.keys()
        assert len(common) >= 14 and {line: after[line] for line in common} == {
            line: before[line] for line in common
        }, change
    assert sides(tokenizer, path, ROWS, seed=4) != before
    ten, cut = (sides(tokenizer, path, ROWS, held_out=10, max_length=length) for length in ("256", "10"))
    assert len(cut) < 42 and cut == {line: ten[line] for line in cut}


def test_validation_rows_are_held_out_or_come_from_sources_of_their_own(tokenizer, rows_file, tmp_path):
    train_rows, validation_rows, _ = load(tokenizer, [RowSource(rows_file)])
    assert len(train_rows) == 42 and validation_rows is None
    train_rows, validation_rows, _ = load(tokenizer, [RowSource(rows_file)], held_out=10, seed=3)
    assert (len(train_rows), len(validation_rows)) == (32, 10)
    train_rows, validation_rows, _ = load(
        tokenizer, [RowSource(rows_file)], [write(tmp_path / "other.jsonl", *ROWS[:5])], max_length="24"
    )
    assert (len(train_rows), len(validation_rows)) == (42, 5)
    assert train_rows.max_length == validation_rows.max_length == 24


def test_rows_of_a_single_validation_source_are_read_in_the_format_of_the_training_rows(tokenizer, tmp_path):
    """They would be taken for text, as not every one has guanaco's marks."""
    training = write(tmp_path / "train.jsonl", {"text": "### Human: What?### Assistant: A leaf."})
    validation = write(
        tmp_path / "validation.jsonl", {"text": "no marks"}, {"text": "### Human: Red?### Assistant: Yes."}
    )
    _, rows, _ = load(tokenizer, [training], [validation])
    assert rows.row_format == "guanaco" and rows.dropped == {"no response": 1}
    _, rows, _ = load(tokenizer, [training], [validation, training])
    assert rows.row_format == "text" and len(rows) == 3


def test_several_sources_are_one_data_set_and_different_formats_are_announced(
    tokenizer, rows_file, tmp_path, capsys
):
    other = write(tmp_path / "other.jsonl", {"text": "What is it?"}, {"text": "A leaf."})
    rows, _, _ = load(tokenizer, [RowSource(rows_file), other])
    assert rows.row_format == "prompt_completion" and rows.source_ids.tolist() == [0] * 42 + [1] * 2
    assert "the formats prompt_completion, text: generate.py will use the first" in capsys.readouterr().out


def test_a_source_with_a_weight_needs_a_row(tokenizer, rows_file, tmp_path):
    long = write(tmp_path / "long.jsonl", {"prompt": "What? " * 99, "completion": "a"})
    sources = [RowSource(rows_file), long]
    rows, _, _ = load(tokenizer, sources, max_length="64")
    assert len(rows) == 42
    with pytest.raises(InputError, match=r"--dataset_weights: no row of .*long\.jsonl is left"):
        load(tokenizer, sources, max_length="64", weights=[0.5, 0.5])


def test_of_a_stream_only_the_first_window_is_read(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "not json\n")
    whole, _, _ = load(tokenizer, [write(tmp_path / "good.jsonl", *ROWS)])
    rows, _, _ = load(tokenizer, [RowSource(str(path), streaming=True)], window_rows=18)
    assert rows.rows_read == 18 and contents(rows) == contents(whole)[:18]
    with pytest.raises(InputError, match="line 43 is not valid JSON"):
        load(tokenizer, [RowSource(str(path), streaming=True)], window_rows=43)


def test_the_tokenizer_asks_as_the_first_datasets_rows_are_spelled(tmp_path, tokenizer):
    lines = write(
        tmp_path / "a.jsonl", *[{"text": f"### Human:\n{n}?\n### Assistant:\n{n}."} for n in range(3)]
    )
    usual = write(tmp_path / "b.jsonl", *[{"text": f"### Human: {n}?### Assistant: {n}."} for n in range(9)])
    load(tokenizer, [lines, usual])
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False)
    assert asked == "<s>### Human:\nWhy?\n### Assistant:"
