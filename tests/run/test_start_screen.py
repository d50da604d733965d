"""What a run prints at its start: the plan of its steps, and why rows are not packed."""

import json
import shlex

import numpy as np
import pytest
import transformers

from qlora.data.order import StepOrder
from qlora.model.base import load_tokenizer
from qlora.run import start_screen
from qlora.speed.plan import Plan
from tests.conftest import ROWS


@pytest.fixture
def order() -> StepOrder:
    return StepOrder(np.full(42, 10), packs_per_step=16, seed=0)


@pytest.mark.parametrize("is_wanted, why_not", [(True, None), (False, None), (False, "rows see each other")])
def test_the_steps_are_shown_with_their_rows_and_epochs(order, is_wanted, why_not):
    assert start_screen.describe_steps(order, 6, 4, is_wanted, why_not, None) == (
        "steps       6 of 4 x 4 rows (2.00 epochs of 3 steps, the last step of each may be smaller)"
    )


def test_the_reason_why_rows_are_not_packed_is_shown_if_packing_was_wanted(order):
    text = start_screen.describe_steps(order, 6, 4, True, "rows see each other with sdpa", None)
    assert text.endswith("the last step of each may be smaller; not packed: rows see each other with sdpa)")


def test_a_run_prints_why_its_model_cannot_be_packed(run, base, tmp_path, capsys):
    """Mamba is recurrent: a row sees the state that the row before it left."""
    config = transformers.MambaConfig(vocab_size=448, hidden_size=64, num_hidden_layers=1, state_size=8)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    load_tokenizer(base).save_pretrained(tmp_path / "mamba")
    flags = "--max_steps 1 --lora_target_modules in_proj --gradient_checkpointing none --no_load_in_4bit"
    run(flags, "--packing", model=str(tmp_path / "mamba"))
    assert "may be smaller; not packed: rows see each other with " in capsys.readouterr().out
    run(flags, "--no_packing", model=str(tmp_path / "mamba"), out="asked")
    assert "not packed" not in capsys.readouterr().out


def test_the_last_line_is_a_command_that_a_shell_can_read():
    plan = Plan(checkpointed=0, layers=2, offload=False, peak_bytes=0, limit_bytes=0)
    text = start_screen.describe_result(plan, "my base", "out", trust_remote_code=True)
    ask, command = text.split(": python ")
    assert ask == "adapter saved in out; ask it"
    assert shlex.split(command) == [
        "generate.py", "--model", "my base", "--adapter", "out", "--trust_remote_code", "--prompt", "..."
    ]  # fmt: skip


def test_the_files_of_a_folder_that_are_read_and_left_out_are_beside_the_data_line(run, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train.jsonl", "test.jsonl", "dev-ops.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    run("--max_steps 1 --validation_split test", dataset=str(folder))
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("data  "))
    left_out = "; left out: 1 of no split: dev-ops.jsonl; 1 of split"
    assert lines[start + 2 : start + 4] == [
        f"files       {folder}: 1 file read: train.jsonl{left_out} test: test.jsonl",
        f"            {folder} (test): 1 file read: test.jsonl{left_out} train: train.jsonl",
    ]
