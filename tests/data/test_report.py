"""The data report: every count against a case made for it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from qlora.data.report import data_report, full_report, short_report, show_rows
from qlora.data.segments import IGNORE_INDEX
from qlora.data.tokenize import TOKENS, tokenize_rows
from tests.conftest import ROWS
from tests.data.random_rows import random_rows

TALE = "Once upon a time a red leaf fell from a very old tree and came to rest on a stone in the river"


OTHER = "A stone in the green river is not a cloud, and nobody ever said that it was one, at least not here"


def rows_of(tokenizer, *texts: str):
    located = [(f"line {number}", {"text": text}) for number, text in enumerate(texts, start=1)]
    return tokenize_rows(located, tokenizer).cut(256)


def test_the_counts_of_a_cut_data_set_add_up(tokenizer):
    texts = [f"{TALE} {'leaf ' * number}" for number in range(30)]
    whole = rows_of(tokenizer, *texts)
    rows = whole.cut(80)
    split = data_report(rows, None, 4, 1, 0)["train"]
    assert split["rows_read"] == 30 == split["rows_used"] and split["answers_lost"] == 0
    assert split["answers_cut"] == int((whole.lengths > 80).sum()) > 3
    assert split["tokens"] + split["tokens_lost"] == int(whole.lengths.sum())
    assert sum(split["histogram"]["rows"]) == 30
    assert split["lengths"]["min"] == whole.lengths.min() and split["lengths"]["max"] == whole.lengths.max()
    assert split["ends_in_trained_eos"] == pytest.approx(1 - split["answers_cut"] / 30)
    assert split["starts_with_bos"] == 1


def test_answers_lost_to_long_prompts_are_counted_with_their_tokens(tokenizer):
    located = [("line 1", {"prompt": "What? " * 40, "completion": "A leaf."}), ("line 2", ROWS[0])]
    whole = tokenize_rows(located, tokenizer)
    split = data_report(whole.cut(64), None, 4, 1, 0)["train"]
    assert (split["answers_lost"], split["answers_cut"]) == (1, 0)
    assert split["rows_dropped"] == {"prompt fills --max_length": 1}
    assert split["tokens_lost"] == int(whole.lengths[0])
    assert split["lengths"]["max"] == int(whole.lengths[0])


def test_padding_and_packing_are_counted_as_batches_are_made():
    rows = random_rows([8] * 10 + [64] * 2).cut(64)
    split = data_report(rows, None, batch_size=12, accumulation=1, seed=0)["train"]
    assert split["padded_full"] == pytest.approx((80 + 128) / (12 * 64))
    assert split["packs"] == 4 and split["packed_full"] == pytest.approx((80 + 128) / (4 * 64))


def test_duplicates_and_near_duplicates_are_told_apart(tokenizer):
    near = TALE.replace("very old", "very, very old").upper() + "!"
    rows = rows_of(tokenizer, TALE, OTHER, TALE, near, f"{OTHER} {TALE}")
    split = data_report(rows, None, 4, 1, 0)["train"]
    assert (split["duplicates"], split["near_duplicates"]) == (1, 1)


def test_validation_rows_that_are_also_training_rows_are_counted(tokenizer):
    training = rows_of(tokenizer, OTHER, TALE)
    validation = rows_of(
        tokenizer, TALE, TALE + " again", "Something quite different: what does a cloud look like?"
    )
    report = data_report(training, validation, 4, 1, 0)
    assert report["in_both"] == {"exact": 1, "near": 1}
    leaks = "1 validation rows are also training rows, 1 more are near-duplicates of training rows"
    assert short_report(report)["leaks"] == leaks and leaks in full_report(report)


def test_rows_that_would_ruin_a_run_are_a_problem(tokenizer):
    assert data_report(rows_of(tokenizer, TALE), None, 4, 1, 0)["problems"] == []
    (problem,) = data_report(rows_of(tokenizer, TALE).cut(8), None, 4, 1, 0)["problems"]
    assert "never learn to stop" in problem
    rows = random_rows([9, 9]).cut(16)
    table = rows.table.map(lambda row: {**row, "leading_bos": 2, "ends_in_eos": True}, features=TOKENS)
    (problem,) = data_report(replace(rows, table=table), None, 4, 1, 0)["problems"]
    assert problem == "2 rows start with two BOS tokens"


def test_shown_rows_mark_the_trained_text_and_spell_out_special_tokens(tokenizer):
    rows = tokenize_rows([("line 1", {"prompt": "What?", "completion": " A leaf."})], tokenizer).cut(64)
    shown = show_rows(rows, tokenizer, 3, use_color=False)
    assert shown.splitlines()[1].replace(" ", "") == "<s>What?⟦Aleaf.</s>⟧"
    in_color = show_rows(rows, tokenizer, 3, use_color=True)
    assert "\033[32m" in in_color and "⟦" not in in_color
    assert all(torch.equal(labels != IGNORE_INDEX, labels > 0) for _, labels in rows.fetch([0]))


def test_what_is_not_trained_is_in_the_report_with_its_first_row(tokenizer):
    rows = [
        {"prompt": "What?", "completion": " A leaf."},
        {"prompt": "Why?", "completion": " So.", "id": "b"},
    ]
    rows += [{"prompt": "Who?", "completion": " I.", "id": "c"}]
    located = [(f"rows line {number}", row) for number, row in enumerate(rows, start=1)]
    report = data_report(tokenize_rows(located, tokenizer).cut(256), None, 1, 1, 0)
    assert report["train"]["notes"] == {"column 'id' is not read": {"count": 2, "first": "rows line 2"}}
    assert short_report(report)["notes"] == "column 'id' is not read (2, first: rows line 2)"
    assert "  note: column 'id' is not read (2, first: rows line 2)" in full_report(report)


def test_the_notes_of_a_subset_are_those_of_its_rows(tokenizer):
    rows = [
        {"prompt": "What?", "completion": " A leaf.", "id": "a"},
        {"prompt": "Why?", "completion": " So."},
    ]
    whole = tokenize_rows([("row", row) for row in rows], tokenizer)
    assert list(whole.notes) == ["column 'id' is not read"] and not whole.subset(np.array([1])).notes
