"""The data of each step: complete, in order, resumed exactly, from prepared rows and from a stream."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from qlora.data.batch import micro_batches
from qlora.data.loader import StepData, in_background, make_loader
from qlora.data.order import StepOrder
from qlora.data.sources import RowSource
from qlora.data.tokenize import tokenize_rows
from qlora.errors import InputError
from qlora.model.adapter import ADAPTER
from qlora.run.checkpoint import STATE, STATE_TENSORS
from tests.conftest import ROWS
from tests.data.random_rows import random_rows
from tests.data.test_stream import open_stream, use_windows
from tests.test_train import assert_same, metrics

FLAGS = "--streaming --lora_dropout 0.1 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"


def assert_equal_data(one: StepData, other: StepData) -> None:
    assert (one.targets, one.tokens, one.epochs, one.place) == (
        other.targets, other.tokens, other.epochs, other.place
    )  # fmt: skip
    assert one.micro_batches.keys() == other.micro_batches.keys()
    for number, batch in one.micro_batches.items():
        assert_same(batch, other.micro_batches[number])


# ---------------------------------------------------------------- prepared rows


@pytest.mark.parametrize("pack_length", [None, 64])
def test_a_step_has_the_micro_batches_of_its_packs_and_counts_their_targets(pack_length):
    rows = random_rows(list(range(5, 55)) * 2)
    order = StepOrder(rows.lengths, 8, seed=1, pack_length=pack_length)
    shape = order.batch_shape(2)
    loader = make_loader(rows, order, shape, pad_id=2, total_steps=order.steps_until(2))
    for step in range(order.steps_until(2)):
        data, packs = loader.take(step), order.packs(step)
        indices = [row for pack in packs for row in pack]
        want = micro_batches(rows, packs, 2, 2, pack_length, shape.starts, multiple=2)
        assert list(data.micro_batches) == list(range(len(want)))
        for number, batch in data.micro_batches.items():
            assert_same(batch, want[number])
        assert data.targets == rows.subset(indices).targets
        assert data.tokens == rows.lengths[indices].sum()
        assert data.epochs == order.epochs_at(step + 1) and data.place is None
        loader.prepare(step + 1)


def test_a_step_is_made_ahead_and_nothing_beyond_the_last():
    rows = random_rows(range(5, 25))
    order = StepOrder(rows.lengths, 4, seed=0)
    loader = make_loader(rows, order, order.batch_shape(4), pad_id=2, total_steps=3)
    made, make = [], loader.make
    loader.make = lambda step: made.append(step) or make(step)
    loader.prepare(0)
    first = loader.take(0)
    assert loader.take(0) is first and made == [0]  # made once
    loader.take(2)  # as after a resume: not prepared
    loader.prepare(3)
    assert made == [0, 2]


def test_an_error_in_the_background_is_raised_where_its_result_is_taken():
    def fail(message):
        raise InputError(message)

    assert in_background(max, 3, 4).result() == 4
    future = in_background(fail, "line 99 is not valid JSON")
    with pytest.raises(InputError, match="line 99"):
        future.result()


# ---------------------------------------------------------------- streams, windows of 18 rows: 18, 18, 6


def stream_loader(rows_file, tokenizer, total_steps, place=None, **options):
    """A loader of steps of four rows in micro-batches of two."""
    stream = open_stream(RowSource(str(rows_file), streaming=True), tokenizer)
    first_rows = next(stream.windows()).rows
    order = StepOrder(first_rows.lengths, 4, 42, source_ids=first_rows.source_ids, **options)
    shape = order.batch_shape(2, stream.max_length)
    return make_loader(first_rows, order, shape, tokenizer.eos_token_id, total_steps, stream, place)


def rows_of(data: StepData, tokenizer) -> list[int]:
    """Indices in ROWS of the rows in padded batches; each row ends in its first EOS, which also pads."""
    eos = tokenizer.eos_token_id
    lines = [line.tolist() for batch in data.micro_batches.values() for line in batch["input_ids"]]
    keys = [tuple(line[: line.index(eos) + 1]) for line in lines if line[0] != eos]
    rows = tokenize_rows([("", row) for row in ROWS], tokenizer)
    index = {tuple(rows[number][0].tolist()): number for number in range(len(rows))}
    return [index[key] for key in keys]


def test_every_row_of_a_window_comes_once_and_windows_come_pass_after_pass(rows_file, tokenizer):
    loader = stream_loader(rows_file, tokenizer, 14)
    data = [loader.take(step) for step in range(14)]
    seen = [rows_of(step, tokenizer) for step in data]
    assert [len(rows) for rows in seen] == [4, 4, 4, 4, 2] * 2 + [4, 2] + [4, 4]
    for steps, first, last in ((seen[:5], 0, 18), (seen[5:10], 18, 36), (seen[10:12], 36, 42)):
        assert sorted(row for step in steps for row in step) == list(range(first, last))
    orders = [[frozenset(row % 18 for row in rows) for rows in steps] for steps in (seen[:4], seen[5:9])]
    assert orders[0] != orders[1]  # each window has an order of its own
    assert [step.epochs for step in data] == [0] * 12 + [1] * 2
    assert [step.place["first_step"] for step in data] == [0] * 5 + [5] * 5 + [10] * 2 + [12] * 2
    assert data[11].place == {"turn": 0, "row": 36, "first_step": 10}


def test_a_window_without_a_usable_row_costs_no_step(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = ROWS[:18] + [{"prompt": "a", "completion": ""}] * 18 + ROWS[:4]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loader = stream_loader(path, tokenizer, 7)
    assert [len(rows_of(loader.take(step), tokenizer)) for step in range(7)] == [4, 4, 4, 4, 2, 4, 4]


@pytest.mark.parametrize("options", [{}, {"pack_length": 64}, {"group_by_length": True}, {"weights": [2.0]}])
def test_a_loader_resumed_at_any_step_gives_the_same_data(rows_file, tokenizer, options):
    """From the place that a checkpoint after the step before keeps as JSON."""
    total = 14
    loader = stream_loader(rows_file, tokenizer, total, **options)
    expected = [loader.take(step) for step in range(total)]
    for first_step in range(1, total):
        place = json.loads(json.dumps(expected[first_step - 1].place))
        resumed = stream_loader(rows_file, tokenizer, total, place, **options)
        for step in range(first_step, min(first_step + 4, total)):
            assert_equal_data(resumed.take(step), expected[step])


def test_batches_of_a_packed_stream_have_one_shape(rows_file, tokenizer):
    loader = stream_loader(rows_file, tokenizer, 12, pack_length=64)
    batches = [batch for step in range(12) for batch in loader.take(step).micro_batches.values()]
    for name in ("input_ids", "position_ids", "seq_starts"):
        assert len({batch[name].shape for batch in batches}) == 1
    assert batches[0]["input_ids"].shape == torch.Size([2, 64])


# ---------------------------------------------------------------- streams in a training


@pytest.fixture
def small_windows(monkeypatch):
    use_windows(monkeypatch, 18)


def test_the_epoch_in_the_log_is_the_number_of_passes_done(run, small_windows):
    _, folder = run(FLAGS, "--max_steps 14 --logging_steps 1")
    assert [line["epoch"] for line in metrics(folder)] == [0] * 12 + [1] * 2


@pytest.mark.parametrize("flags", ["", "--packing --max_length 64"])
@pytest.mark.parametrize("killed_after", [3, 9])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(run, small_windows, flags, killed_after):
    flags = f"{FLAGS} {flags} --max_steps 15 --save_steps 1 --save_total_limit 0"
    _, folder = run(flags)
    want, want_state = load_file(folder / ADAPTER), load_file(folder / "checkpoint-15" / STATE_TENSORS)
    for step in range(killed_after + 1, 16):
        shutil.rmtree(folder / f"checkpoint-{step}")
    run(flags, "--resume_from_checkpoint latest")
    assert_same(load_file(folder / ADAPTER), want)
    assert_same(load_file(folder / "checkpoint-15" / STATE_TENSORS), want_state)


def test_a_checkpoint_keeps_the_place_in_the_stream(run, small_windows):
    _, folder = run(FLAGS, "--max_steps 12 --save_steps 11 --save_total_limit 0")
    place = json.loads((folder / "checkpoint-11" / STATE).read_text())["progress"]["place"]
    assert place == {"turn": 0, "row": 36, "first_step": 10}


def test_a_bad_row_ends_a_run_only_once_it_is_reached(run, small_windows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 2) + "not json\n")
    run(FLAGS, "--max_steps 5", dataset=str(path), out="short")
    with pytest.raises(InputError, match="line 85 is not valid JSON"):
        run(FLAGS, "--max_steps 99", dataset=str(path), out="long")


def test_a_streamed_run_evaluates_its_validation_rows(run, rows_file, small_windows):
    _, folder = run(FLAGS, "--max_steps 2 --validation_dataset", rows_file)
    assert any("eval_loss" in line for line in metrics(folder))
