"""docs/changing-the-loop.md: every diff applies, trains, is rehearsed, resumes bit for bit, and does its
job."""

import importlib.util
import math
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora.model.adapter import ADAPTER
from qlora.run.checkpoint import STATE_TENSORS
from tests.conftest import ROOT
from tests.ranks import start
from tests.results import adapter, assert_same, metrics

DOCUMENT = ROOT / "docs" / "changing-the-loop.md"
SECTIONS = re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)
DIFFS = {  # title: diff
    section.splitlines()[0]: diff
    for section in SECTIONS
    for diff in re.findall(r"```diff\n(.*?)```", section, re.DOTALL)
}
DFT, NEFTUNE, BY_LAYER, LION, RESTARTS, LAYER_NORMS = DIFFS
STEPS = 6
FLAGS = (
    f"--max_steps {STEPS} --save_steps 3 --logging_steps 1 --save_total_limit 0 --learning_rate 3e-3 "
    "--max_length 48 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --lora_dropout 0.1 "
    "--lora_r 64 --gradient_checkpointing 1 --compile --warmup_steps 1 --dtype float32"
).split()


def train_twice(folder: str, flags: list[str]) -> None:
    """In a process of its own: train with the train.py of a folder; then again from the checkpoint in the
    middle, as after a kill."""
    import qlora.speed.layers

    sys.path.insert(0, folder)
    del sys.modules["train"]  # that of the repository
    import train

    assert Path(train.__file__).parent == Path(folder)
    qlora.speed.layers.COMPILER = "eager"  # without a GPU a step is rehearsed only if layers are compiled
    out, resumed = Path(folder, "out"), Path(folder, "out-resumed")
    train.main([*flags, "--output_dir", str(out)])
    shutil.copytree(out, resumed)
    shutil.rmtree(resumed / f"checkpoint-{STEPS}")
    (resumed / ADAPTER).unlink()
    train.main([*flags, "--output_dir", str(resumed), "--resume_from_checkpoint", "latest"])


def apply(diff: str, folder: Path) -> None:
    """Copy train.py to `folder` and change it."""
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text((ROOT / "train.py").read_text())
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=folder, check=True)


@pytest.fixture(scope="module")
def trained(launcher, base, rows_file, tmp_path_factory):
    """A function that trains with the diff of a title, or with none; returns (folder, resumed folder)."""

    @cache
    def trained(title: str | None) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("changed")
        apply(DIFFS[title], folder) if title else (folder / "train.py").symlink_to(ROOT / "train.py")
        argv = ["--model", base, "--dataset", rows_file, *FLAGS]
        function = "tests.test_changing_the_loop:train_twice"
        run = start(launcher, 1, function, str(folder), argv, log=folder / "log")
        assert run.wait() == [0], run.output()[-3000:]
        assert "; compiled;" in run.output() and "1 of 2 layers checkpointed" in run.output()
        assert "packs of 48 tokens" in run.output()
        return folder / "out", folder / "out-resumed"

    return trained


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


def test_there_are_six_changes_of_at_most_15_lines():
    assert len(DIFFS) == 6
    for title, diff in DIFFS.items():
        changed = [line for line in diff.splitlines() if re.match(r"[+-](?!\+\+ |-- )", line)]
        assert 1 <= len(changed) <= 15, title


@pytest.mark.parametrize("title", DIFFS)
def test_a_changed_loop_trains_and_resumes_bit_for_bit(trained, title):
    folder, resumed = trained(title)
    assert all(math.isfinite(loss) for loss in losses(folder))
    assert len(losses(folder)) == STEPS
    assert_same(adapter(resumed), adapter(folder))
    assert_same(*(load_file(out / f"checkpoint-{STEPS}" / STATE_TENSORS) for out in (folder, resumed)))


def test_dft_weights_each_target_by_its_probability(trained):
    """At the first step, both loops see the same model and the same rows."""
    folder, _ = trained(DFT)
    spec = importlib.util.spec_from_file_location("changed_train", folder.parent / "train.py")
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    logits = torch.randn(5, 7, requires_grad=True)
    ids = torch.tensor([1, 2, 3, 4, 5])
    changed.target_logprobs = lambda *_: torch.log_softmax(logits, dim=1).gather(1, ids[:, None])[:, 0]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = changed.forward_backward(None, None, 10, None, torch.enable_grad, scaler)
    with torch.no_grad():
        probabilities = logits.softmax(dim=1)
        chosen = probabilities[range(5), ids]
        # The gradient of -p log p with p held constant is p (softmax - one-hot).
        want = chosen[:, None] * (probabilities - torch.nn.functional.one_hot(ids, 7)) / 10
    assert loss.item() == pytest.approx(-(chosen * chosen.log()).sum().item() / 10)
    assert torch.allclose(logits.grad, want, atol=1e-6)


def test_neftune_adds_noise_to_every_step(trained):
    changed, plain = losses(trained(NEFTUNE)[0]), losses(trained(None)[0])
    assert all(0 < abs(one - other) < 1 for one, other in zip(changed, plain))


def test_lower_layers_learn_at_a_smaller_rate(trained):
    folder, plain = trained(BY_LAYER)[0], trained(None)[0]
    states = load_file(folder / f"checkpoint-{STEPS}" / STATE_TENSORS)
    assert {name.split("/")[1] for name in states if name.startswith("optimizer/")} == {"0.0", "1.0"}
    changed, unchanged = adapter(folder), adapter(plain)
    # B starts at 0, and AdamW's steps are as long as the learning rate.
    moved = {
        name.split(".layers.")[1][0]: (changed[name].norm() / unchanged[name].norm()).item()
        for name in changed if "lora_B" in name
    }  # fmt: skip
    assert moved["0"] == pytest.approx(1 / 2.6, rel=0.3) and moved["1"] == pytest.approx(1, rel=0.3)


def test_lion_keeps_one_average(trained):
    states = load_file(trained(LION)[0] / f"checkpoint-{STEPS}" / STATE_TENSORS)
    names = {name.split("/")[-1] for name in states if name.startswith("optimizer/")}
    assert "state1" in names and "state2" not in names


def test_the_schedule_restarts(trained):
    rates = [line["learning_rate"] for line in metrics(trained(RESTARTS)[0])]
    assert rates == [0.0, 3e-3] * 3  # cycles of two steps, the first of which is the warmup


def test_the_norms_of_the_layers_make_up_the_norm_of_the_gradient(trained):
    for line in metrics(trained(LAYER_NORMS)[0]):
        layers = [line[f"grad_norm/layer {layer}"] for layer in (0, 1)]
        assert math.hypot(*layers) == pytest.approx(line["grad_norm"], rel=1e-4)
