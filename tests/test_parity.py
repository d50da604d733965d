"""benchmarks/parity.py: TRL gets the tokens that train.py takes; the summary says how far they are apart."""

import sys

import pytest
import torch

import train
from benchmarks import parity
from benchmarks.parity import Run
from qlora.config import TrainConfig
from qlora.data.segments import IGNORE_INDEX
from qlora.errors import InputError
from qlora.flags import parse_args


def configuration(base: str, rows_file: str, *flags: str) -> TrainConfig:
    return parse_args(TrainConfig, ["--model", base, "--dataset", rows_file, *flags])


@pytest.mark.parametrize("packing", ["--packing", "--no_packing"])
def test_trl_gets_the_tokens_of_the_run_in_their_order(run, base, rows_file, packing, monkeypatch):
    seen = []  # micro-batches
    trained = train.forward_backward

    def record(model, batch, *arguments, **options):
        seen.append(batch)
        return trained(model, batch, *arguments, **options)

    monkeypatch.setattr(train, "forward_backward", record)
    flags = [packing, "--max_steps", "3", "--per_device_train_batch_size", "2", "--max_length", "64"]
    flags += ["--gradient_accumulation_steps", "1", "--seed", "7"]
    run(*flags)
    config = configuration(base, rows_file, *flags)
    _, _, rows, _, _ = train.load_data(config)

    packs = parity.ordered_packs(config, rows)

    assert len(packs) == 3 * 2
    for step, batch in enumerate(seen[-3:]):  # the memory plan rehearses earlier ones
        targets = []
        for position, pack in enumerate(packs[2 * step : 2 * step + 2]):
            ids = torch.cat([ids for ids, _ in pack])
            assert torch.equal(batch["input_ids"][position, : len(ids)], ids.long())
            targets += [labels[labels != IGNORE_INDEX] for _, labels in pack]
        assert torch.equal(batch["target_ids"], torch.cat(targets).long())


def test_too_few_rows_are_an_error_with_a_remedy(base, rows_file):
    flags = ["--no_packing", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
    config = configuration(base, rows_file, "--max_steps", "11", *flags)
    _, _, rows, _, _ = train.load_data(config)
    with pytest.raises(InputError, match=r"rows for 11 steps.*give more rows"):  # 42 rows: the last has two
        parity.ordered_packs(config, rows)


def test_the_summary_has_mean_and_largest_differences():
    ours = Run([1.0, 2.0, 3.0], [1.0, 1.0, 2.0], 1234)
    theirs = Run([1.0, 2.01, 2.97], [1.0, 0.8, 2.0], 1234)
    row = parity.describe_summary({"padded": (ours, theirs)}).splitlines()[-1]
    assert row == "| padded | 1,234 | 1.3e-02 | 3.0e-02 | 2.5e-01 |"


def test_without_trl_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(sys, "argv", ["parity.py", "--model", "absent", "--dataset", "absent"])
    with pytest.raises(SystemExit, match="TRL is not installed: python -m pip install trl"):
        parity.main()
