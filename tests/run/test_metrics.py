"""A run's records, and the table that compares runs."""

import json
import math

import pytest

from qlora.run.metrics import Run, compare_table, perplexity, read_metrics, read_run_leniently
from tests.run.test_plots import METRICS


def test_truncated_and_foreign_lines_are_skipped(tmp_path):
    end = '3\n["step"]\n{"loss": 1.0}\n{"step": null}\n{"step": 4, "lo'
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS) + end)
    assert read_metrics(tmp_path) == METRICS


def test_missing_and_corrupt_records_are_empty_if_read_leniently(tmp_path):
    assert read_run_leniently(tmp_path) == Run(tmp_path.name, metrics=[], flags={})
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n{")
    (tmp_path / "train_config.json").write_text("[1]")
    assert read_run_leniently(tmp_path) == Run(tmp_path.name, metrics=[], flags={})


def test_the_table_has_the_differing_flags_and_the_results():
    common = {"lora_r": 16, "dataset": ["x"]}
    runs = [
        Run("a", METRICS, common | {"seed": 42, "packing": True, "output_dir": "a", "run_name": "A"}),
        Run("b", METRICS[:1], common | {"seed": None, "packing": False, "output_dir": "b", "run_name": "B"}),
        Run("c", METRICS[2:3], {}),
    ]
    assert compare_table(runs, ignored=["output_dir", "run_name"]).splitlines() == [
        "run  seed  packing  steps    loss  best eval_loss  perplexity  at step  tokens/s  peak GB  skipped",
        "a    42    on           3  1.0000          2.5000      25.000        2     1,000     3.25        4",
        "b    none  off          1  3.0000                                            100     2.50        0",
        "c                       2                  2.5000      25.000        2",
    ]


def test_a_perplexity_that_is_not_a_finite_number_is_none():
    assert perplexity(math.log(3)) == pytest.approx(3)
    assert [perplexity(loss) for loss in (math.nan, math.inf, 1e6)] == [None] * 3


def test_a_flag_that_a_run_has_no_record_of_does_not_differ():
    runs = [Run("a", METRICS, {"seed": 1, "new": 5}), Run("b", METRICS, {"seed": 2})]
    assert compare_table(runs, ignored=[]).split()[:3] == ["run", "seed", "steps"]
