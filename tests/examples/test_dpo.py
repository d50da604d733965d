"""examples/dpo.py: its loss is the paper's formula, it learns preferences, and it resumes bit for bit."""

import json
import math
import os
import shutil
import signal
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import log_softmax, logsigmoid

from examples import dpo
from qlora.data.batch import micro_batches
from qlora.errors import InputError
from qlora.flags import parse_args
from qlora.model.adapter import ADAPTER, load_adapter
from qlora.model.base import load_base, load_tokenizer
from qlora.model.forward import hidden_states
from qlora.run.checkpoint import STATE_TENSORS
from qlora.run.log import RunLog
from tests.conftest import COLORS, THINGS
from tests.ranks import start
from tests.results import adapter, assert_same, metrics

PAIRS = [
    {
        "prompt": f"What does a {color} {thing} look like?",
        "chosen": f"A {color} {thing} is {color} all over.",
        "rejected": f"A {thing} is a cloud.",
    }
    for color in COLORS
    for thing in THINGS
]
UNUSABLE = [{"prompt": "Why?", "chosen": "", "rejected": "Because."}, {"prompt": "Why?", "chosen": "So."}]


@pytest.fixture
def preferences(tmp_path) -> str:
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*PAIRS, *UNUSABLE]))
    return str(path)


@pytest.fixture
def run(base, preferences, tmp_path):
    def run(*flags: str, out: str = "out"):
        words = [word for flag in flags for word in flag.split()]
        argv = ["--model", base, "--dataset", preferences, "--output_dir", str(tmp_path / out)]
        argv += "--dtype float32 --learning_rate 3e-3 --gradient_accumulation_steps 2 --lora_r 64".split()
        return dpo.train(parse_args(dpo.DpoConfig, [*argv, *words])), tmp_path / out

    return run


def test_the_loss_is_equation_7():
    """-log sigmoid(beta log(pi(w) / ref(w)) - beta log(pi(l) / ref(l))), written out with probabilities."""
    policy, reference = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)).double()
    losses, margins = dpo.dpo_loss(policy.log(), reference.log(), beta=0.3)
    for pair, (won, lost) in enumerate(((0, 1), (2, 3), (4, 5))):
        margin = 0.3 * math.log(policy[won] / reference[won]) - 0.3 * math.log(policy[lost] / reference[lost])
        assert margins[pair].item() == pytest.approx(margin)
        assert losses[pair].item() == pytest.approx(-math.log(1 / (1 + math.exp(-margin))))


def test_a_micro_batch_has_the_loss_and_gradient_of_a_policy_and_a_separate_reference(run, base, preferences):
    _, folder = run("--max_steps 4 --lora_target_modules all-linear")  # so that the policy differs
    tokenizer, device = load_tokenizer(base), torch.device("cpu")
    policy = load_adapter(load_base(base, torch.float32, device), str(folder), is_trainable=True).train()
    reference = load_base(base, torch.float32, device)
    rows, pairs = dpo.load_pairs(dpo.DpoConfig(base, preferences), tokenizer)
    packs = [[row] for pair in pairs[:3] for row in pair]
    (batch,) = micro_batches(rows, packs, len(packs), tokenizer.eos_token_id)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss, margin, accuracy = dpo.forward_backward(
        policy, batch, 3, hidden_states, nullcontext, scaler, 0.1
    ).tolist()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    got = torch.cat([parameter.grad.flatten() for parameter in trained])
    policy.zero_grad()

    def logprob(model, row: int) -> torch.Tensor:
        ids, labels = (tensor.long() for tensor in rows[row])
        each = log_softmax(model(input_ids=ids[None]).logits[0, :-1], dim=-1).gather(1, ids[1:, None])[:, 0]
        return each[labels[1:] != -100].sum()

    rewards = [
        [0.1 * (logprob(policy, row) - logprob(reference, row).detach()) for row in pair]
        for pair in pairs[:3]
    ]
    margins = torch.stack([chosen - rejected for chosen, rejected in rewards])
    want_loss = -logsigmoid(margins).mean()
    want_loss.backward()
    want = torch.cat([parameter.grad.flatten() for parameter in trained])
    assert margins.abs().max() > 1e-3
    assert loss == pytest.approx(want_loss.item(), rel=1e-5)
    assert margin == pytest.approx(margins.mean().item(), rel=1e-3)
    assert accuracy == pytest.approx((margins > 0).float().mean().item())
    assert (got - want).norm() < 1e-4 * want.norm()


def test_the_reward_margin_grows(run):
    _, folder = run("--max_steps 30 --lora_target_modules all-linear --save_steps 30")
    lines = metrics(folder)
    assert lines[0]["reward_margin"] == 0 and lines[0]["loss"] == pytest.approx(math.log(2))
    assert lines[-1]["reward_margin"] > 1 and lines[-1]["reward_accuracy"] == 1
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]


def test_a_resumed_run_ends_like_one_that_was_left_alone(run, tmp_path, monkeypatch):
    flags = "--max_steps 6 --save_steps 2"
    _, whole = run(flags, out="whole")
    step_done = RunLog.step_done

    def stop_after_step_3(log):
        step_done(log)
        if log.bar.n == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(RunLog, "step_done", stop_after_step_3)
        run(flags)
    run(flags, "--resume_from_checkpoint latest")
    folder = tmp_path / "out"
    assert_same(adapter(folder), adapter(whole))
    assert_same(*(load_file(out / "checkpoint-6" / STATE_TENSORS) for out in (folder, whole)))
    shutil.rmtree(folder / "checkpoint-6")
    (folder / ADAPTER).unlink()
    with pytest.raises(InputError, match=r"beta was 0\.1, now it is 0\.5"):
        run(flags, "--resume_from_checkpoint latest --beta 0.5")


def dpo_rank(argv: list[str]) -> None:
    """The example in one of several processes."""
    dpo.train(parse_args(dpo.DpoConfig, argv))


def test_the_number_of_processes_changes_no_losses(launcher, base, preferences, tmp_path):
    """The last step of an epoch, the sixth, has one micro-batch: there is nothing in it for the second."""
    argv = ["--model", base, "--dataset", preferences, "--dtype", "float32", "--learning_rate", "3e-3"]
    argv += "--lora_r 64 --max_steps 8 --save_steps 5 --per_device_train_batch_size 2".split()

    def losses(count: int, *flags: str) -> list[dict]:
        words = [*argv, "--output_dir", str(tmp_path / f"{count}"), *flags]
        words += ["--gradient_accumulation_steps", str(4 // count)]
        run = start(launcher, count, "tests.examples.test_dpo:dpo_rank", words, log=tmp_path / f"{count}.log")
        assert run.wait() == [0] * count, run.output()
        return metrics(tmp_path / f"{count}")

    whole = losses(1)
    for lines in (losses(2), losses(2, "--resume_from_checkpoint", str(tmp_path / "2" / "checkpoint-5"))):
        for line, expected in zip(lines, whole, strict=True):
            for name in ("loss", "reward_margin", "reward_accuracy", "grad_norm"):
                assert line[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), (name, line)
    assert (tmp_path / "2" / ADAPTER).exists()


def test_a_run_that_may_not_be_resumed_or_replaced_names_flags_that_exist(run, preferences):
    run("--max_steps 1")
    with pytest.raises(InputError, match="--overwrite_output_dir"):
        run("--max_steps 1")
    with pytest.raises(InputError, match="--allow_changes max_steps"):
        run("--max_steps 2 --resume_from_checkpoint latest")
    run("--max_steps 2 --resume_from_checkpoint latest --allow_changes max_steps")
    _, folder = run("--max_steps 1 --overwrite_output_dir")
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    card = (folder / "README.md").read_text()
    assert json.loads((folder / "train_config.json").read_text())["max_steps"] == 1
    assert "| `--beta` | 0.1 |" in card and preferences not in card and str(folder) not in card


def test_a_pair_is_dropped_with_either_of_its_answers(base, preferences, capsys):
    rows, pairs = dpo.load_pairs(dpo.DpoConfig(base, preferences), load_tokenizer(base))
    printed = capsys.readouterr().out
    assert len(pairs) == len(PAIRS) and f"{len(PAIRS) + 2} pairs read, {len(PAIRS)} used" in printed
    assert "1 empty response" in printed and "1 'completion' is null" in printed
    tokenizer = load_tokenizer(base)
    for pair, (chosen, rejected) in zip(PAIRS, pairs):
        for answer, row in (("chosen", chosen), ("rejected", rejected)):
            ids, labels = rows[row]
            assert tokenizer.decode(ids[labels != -100], skip_special_tokens=True).strip() == pair[answer]
