"""What only a CUDA GPU can show. Run with `make test-gpu`."""

import json
from functools import partial

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from qlora.data.batch import collate, to_device
from qlora.model.adapter import ADAPTER
from qlora.model.forward import VARLEN, hidden_states
from qlora.model.loss import target_logprobs
from qlora.optim.optimizer import build_optimizer, optimizer_tensors, restore_optimizer
from qlora.speed.attention import choose_attention
from tests.conftest import TEXTS
from tests.tiny_llama import make_base

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory) -> str:
    """Folder of a two-layer Llama as wide as large models are, so that their kernels run."""
    folder = tmp_path_factory.mktemp("models") / "wide-llama"
    make_base(
        folder, TEXTS, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=8,
        max_position_embeddings=2048,
    )  # fmt: skip
    return str(folder)


@pytest.fixture(scope="session")
def long_rows(tmp_path_factory) -> str:
    """64 rows of up to 1,000 tokens."""
    path = tmp_path_factory.mktemp("data") / "long.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(TEXTS[: 1 + i])}) + "\n" for i in range(64)))
    return str(path)


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


@pytest.mark.parametrize("flags", ["", "--packing --max_length 64"])
def test_resume_equals_an_uninterrupted_run(run, flags):
    flags += (
        " --max_steps 6 --save_steps 3 --lora_dropout 0.1 --lora_r 64 --dtype float16 --save_total_limit 0"
    )
    _, folder = run(flags)
    want = load_file(folder / ADAPTER)
    run(flags, "--resume_from_checkpoint", str(folder / "checkpoint-3"))
    got = load_file(folder / ADAPTER)
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.fixture
def determinism_ends():
    """Undo what --full_determinism sets for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_with_full_determinism_equal_and_resumed_runs_end_bit_identical(
    run, wide_base, long_rows, determinism_ends
):
    flags = "--full_determinism --packing --compile --max_steps 4 --save_steps 2 --save_total_limit 0"
    flags += " --dtype float16 --lora_dropout 0.1 --max_length 1024 --lora_target_modules all-linear"
    ends, data = [], {"model": wide_base, "dataset": long_rows}
    for out in ("one", "two"):
        _, folder = run(flags, out=out, **data)
        ends.append(load_file(folder / ADAPTER))
    run(flags, "--resume_from_checkpoint", str(folder / "checkpoint-2"), out="two", **data)
    ends.append(load_file(folder / ADAPTER))
    for end in ends[1:]:
        assert all(torch.equal(ends[0][name], end[name]) for name in end)


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
        group = {"params": [parameter], "weight_decay": 0.01}
        return parameter, build_optimizer(name, [group], (0.9, 0.999), 1e-8)

    parameter, optimizer = fresh(start)
    middle = stepped(parameter, optimizer, gradients[:2])
    saved = optimizer_tensors(optimizer)
    want = stepped(parameter, optimizer, gradients[2:])

    parameter, optimizer = fresh(middle)
    restore_optimizer(optimizer, saved)
    states = optimizer.state[parameter]
    if name.startswith("paged"):  # 160,000 elements: enough for bitsandbytes to page
        assert states["state1"].is_paged and states["state2"].is_paged
    assert torch.equal(stepped(parameter, optimizer, gradients[2:]), want)


ROWS = [torch.arange(3, 3 + length) % 128 for length in (40, 17, 64, 9, 30)]


def packed_model(dtype):
    """(a two-layer Llama in `dtype` with LoRA and attention for packed rows, its autocast)."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).to("cuda", dtype)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    autocast = partial(torch.autocast, "cuda", dtype=dtype, enabled=dtype != torch.float32)
    assert choose_attention(model, autocast) is None
    return model, autocast


def on_gpu(packs, pack_length=None, starts=0):
    labelled = [[(row, torch.cat([torch.tensor([-100]), row[1:]])) for row in pack] for pack in packs]
    batch = collate(labelled, 0, pack_length, starts)
    return to_device(batch, torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_rows_have_the_loss_and_the_gradient_of_padded_ones(dtype):
    model, autocast = packed_model(dtype)
    assert model.config._attn_implementation == (VARLEN if dtype != torch.float32 else "sdpa")
    assert model.training
    results = []
    for batch in (on_gpu([[row] for row in ROWS]), on_gpu([ROWS[:2], ROWS[2:]], pack_length=128)):
        model.zero_grad()
        with autocast():
            loss = -target_logprobs(model, batch, hidden_states).sum()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        results.append((loss.item(), gradient))
    (want_loss, want), (got_loss, got) = results
    bound = 1e-2 if dtype != torch.float32 else 1e-4
    assert got_loss == pytest.approx(want_loss, rel=bound)
    assert (got - want).norm() < bound * want.norm()


def test_a_model_with_a_sliding_window_keeps_its_own_attention_and_the_training_mode():
    config = transformers.MistralConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    base = transformers.MistralForCausalLM(config).to("cuda", torch.bfloat16)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear")).train()
    assert choose_attention(model, partial(torch.autocast, "cuda", dtype=torch.bfloat16)) is None
    assert base.config._attn_implementation == "sdpa"
    assert model.training and base.model.layers[0].training


def test_a_changed_token_of_one_row_leaves_the_others_bit_identical():
    model, autocast = packed_model(torch.bfloat16)
    changed = [row.clone() for row in ROWS]
    changed[2][5] += 1
    hidden = []
    for pack in (ROWS, changed):
        with torch.no_grad(), autocast():
            output = hidden_states(model.get_base_model(), on_gpu([pack], pack_length=192))[0]
        hidden.append(output.split([40, 17, 64, 9, 30, 32]))
    assert [torch.equal(*pair) for pair in zip(*hidden)] == [True, True, False, True, True, True]
