"""What only a CUDA device shows: run with `make test-gpu`."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qlora.adapter import ADAPTER
from qlora.optim import build_optimizer, optimizer_tensors, restore_optimizer

pytestmark = pytest.mark.gpu


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_loss_falls(run, dtype):
    _, folder = run(
        "--num_train_epochs 6 --logging_steps 1 --lora_target_modules all-linear --learning_rate 1e-2",
        f"--dtype {dtype}",
    )
    seen = [loss for loss in losses(folder) if loss is not None]
    assert seen[-1] < 0.6 * seen[0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_evaluation_in_the_middle_changes_nothing(run, rows_file, dtype):
    flags = f"--max_steps 6 --lora_dropout 0.1 --dtype {dtype} --validation_dataset {rows_file}"
    _, plain = run(flags, "--eval_steps 100", out="plain")
    _, watched = run(flags, "--eval_steps 1", out="watched")
    left, right = load_file(plain / ADAPTER), load_file(watched / ADAPTER)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_resume_equals_an_uninterrupted_run(run):
    flags = "--max_steps 6 --save_steps 3 --lora_dropout 0.1 --lora_r 64 --dtype float16 --save_total_limit 0"
    _, folder = run(flags)
    want = load_file(folder / ADAPTER)
    run(flags, "--resume_from_checkpoint", str(folder / "checkpoint-3"))
    got = load_file(folder / ADAPTER)
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch"])
def test_restored_optimizer_state_continues_bit_by_bit_and_stays_paged(name):
    torch.manual_seed(0)
    start, gradients = torch.randn(400, 400, device="cuda"), torch.randn(4, 400, 400, device="cuda")

    def stepped(parameter, optimizer, some_gradients):
        for gradient in some_gradients:
            parameter.grad = gradient.clone()
            optimizer.param_groups[0]["lr"] = 1e-3
            optimizer.step()
        return parameter.detach().clone()

    def fresh(value):
        parameter = torch.nn.Parameter(value.clone())
        return parameter, build_optimizer(name, [parameter], 0.01, (0.9, 0.999), 1e-8)

    parameter, optimizer = fresh(start)
    middle = stepped(parameter, optimizer, gradients[:2])
    saved = optimizer_tensors(optimizer, ["weight"])
    want = stepped(parameter, optimizer, gradients[2:])

    parameter, optimizer = fresh(middle)
    restore_optimizer(optimizer, ["weight"], saved)
    states = optimizer.state[parameter]
    if name.startswith("paged"):  # 160,000 elements: enough for bitsandbytes to page
        assert states["state1"].is_paged and states["state2"].is_paged
    assert torch.equal(stepped(parameter, optimizer, gradients[2:]), want)
