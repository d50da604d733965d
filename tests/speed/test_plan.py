"""Which layers are checkpointed, the advice if nothing fits, and rehearsals, which leave no trace."""

import random
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

import qlora.speed.layers
import train
from qlora.data.batch import BatchShape, to_device, worst_batch
from qlora.errors import InputError
from qlora.model.adapter import add_adapter
from qlora.model.base import load_base, trainable_weights
from qlora.model.forward import hidden_states
from qlora.model.loss import target_logprobs
from qlora.optim.flat import FlatParameters
from qlora.optim.optimizer import build_optimizer, optimizer_tensors
from qlora.speed.memory import GB
from qlora.speed.plan import Plan, choose_plan, largest_step, plan_layers
from qlora.speed.rehearsal import Rehearsal
from tests.results import metrics

LAYERS = 32


def needs(checkpointed: int, offload: bool) -> int:
    """The memory of a 7B step in units of a layer's input: 40 for weights, 11 for a layer not
    checkpointed."""
    kept = LAYERS - checkpointed
    return 40 + 11 * max(kept, 1) + (0 if offload else checkpointed)


@pytest.mark.parametrize("offload", ["auto", "off", "on"])
@pytest.mark.parametrize("limit", range(45, 420, 7))
def test_auto_is_the_fewest_layers_that_fit(limit, offload):
    calls = []

    def peak(*choice):
        calls.append(choice)
        return needs(*choice) if needs(*choice) < 300 else None  # above, the card itself has no more

    plan = choose_plan(peak, LAYERS, "auto", offload, limit)
    fits = [n for n in range(LAYERS + 1) if needs(n, offload == "on" and n > 0) <= min(limit, 299)]
    if fits:
        assert (plan.checkpointed, plan.offload) == (fits[0], offload == "on" and fits[0] > 0)
        assert plan.peak_bytes == needs(plan.checkpointed, plan.offload) and plan.limit_bytes == limit
    elif offload == "auto" and needs(LAYERS, True) <= limit:
        assert (plan.checkpointed, plan.offload) == (LAYERS, True)  # the last resort
    else:
        assert plan is None
    assert len(calls) <= 8


@pytest.mark.parametrize("checkpointing, count", [("all", 32), ("none", 0), ("7", 7), ("32", 32), ("0", 0)])
def test_a_given_number_of_layers_is_checkpointed(checkpointing, count):
    assert choose_plan(needs, LAYERS, checkpointing, "auto", 10_000).checkpointed == count
    assert choose_plan(needs, LAYERS, checkpointing, "off", 50) is None


def test_a_given_number_is_offloaded_only_if_it_does_not_fit_otherwise():
    assert not choose_plan(needs, LAYERS, "all", "auto", needs(32, False)).offload
    assert choose_plan(needs, LAYERS, "all", "auto", needs(32, False) - 1).offload
    assert choose_plan(needs, LAYERS, "all", "on", 10_000).offload
    assert choose_plan(needs, LAYERS, "none", "auto", needs(0, False) - 1) is None


def test_a_plan_describes_itself():
    assert Plan(0, 32, False, 1, 2).describe() == "none of 32 layers checkpointed"
    assert Plan(32, 32, True, 1, 2).describe() == "all of 32 layers checkpointed and offloaded to the host"
    assert Plan(5, 32, False, 1, 2).describe() == "5 of 32 layers checkpointed"


def a_rehearsal(model, compile=False, packs=2, length=16, optim="adamw_8bit") -> Rehearsal:
    groups = [{"params": trainable_weights(model), "lr_multiple": 1.0, "weight_decay": 0.1}]
    flat = FlatParameters(groups)
    optimizer = build_optimizer(optim, flat.groups, (0.9, 0.999), 1e-8)
    autocast = partial(torch.autocast, model.device.type, enabled=False)
    scaler = torch.amp.GradScaler(model.device.type, enabled=False)
    train_batch = partial(train.forward_backward, model, autocast=autocast, scaler=scaler)
    shape = BatchShape(packs, length, is_packed=True, starts=16)
    return Rehearsal(
        model, flat, optimizer, train_batch, hidden_states, autocast, shape, has_many_micro_batches=True,
        compile=compile,
    )  # fmt: skip


def weights(rehearsal: Rehearsal) -> torch.Tensor:
    return torch.cat([vector.detach().clone() for vector in rehearsal.flat.vectors])


@pytest.fixture
def model(base):
    torch.manual_seed(0)
    base = load_base(base, torch.float32, torch.device("cpu"))
    return add_adapter(base, 4, 8, 0.5, ["q_proj", "v_proj"], False, False).train()


def failing(error: BaseException):
    """A loop whose loss raises an error."""

    def train_batch(batch, step_targets, hidden_states):
        raise error

    return train_batch


@pytest.mark.parametrize(
    "limit, largest", [(150, (7, 512)), (70, (2, 512)), (60, (1, 512)), (44, (1, 448)), (31, None)]
)
def test_the_largest_step_that_fits_is_found(model, monkeypatch, limit, largest):
    def peak_bytes(self, checkpointed, offload):
        assert checkpointed == 2 and offload
        return 30 + self.shape.packs * self.shape.length // 32  # 16 for each pack of 512

    monkeypatch.setattr(Rehearsal, "peak_bytes", peak_bytes)
    assert largest_step(a_rehearsal(model, packs=8, length=512), True, limit) == largest


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch"])
def test_a_rehearsal_leaves_no_trace(model, optim):
    rehearsal = a_rehearsal(model, optim=optim)
    before, random_state = weights(rehearsal), torch.get_rng_state()
    assert rehearsal.peak_bytes(1, False) == 0  # nothing is measured without a GPU
    assert torch.equal(weights(rehearsal), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in (*rehearsal.flat.vectors, *rehearsal.flat.parameters))
    assert not any(tensor.any() for tensor in optimizer_tensors(rehearsal.optimizer).values())


def test_the_loops_own_forward_and_backward_pass_is_rehearsed_on_the_largest_batch(model):
    rehearsal = a_rehearsal(model, packs=3, length=24)
    batches, loops_own = [], rehearsal.train_batch

    def train_batch(batch, step_targets, hidden_states):
        batches.append((tuple(batch["input_ids"].shape), step_targets))
        return loops_own(batch, step_targets, hidden_states)

    rehearsal.train_batch = train_batch
    rehearsal.peak_bytes(0, False)
    assert batches == [((3, 24), 3 * 23)]  # in each pack every token but the first is a target


def test_the_rank_that_needs_most_decides_and_an_error_of_one_is_raised_on_all(model, monkeypatch):
    rehearsal = a_rehearsal(model)
    for others, expected in (([7, 9], 9), ([None, 9], None)):
        monkeypatch.setattr("qlora.ranks.gather", lambda own, others=others: [own, *others])
        assert rehearsal.peak_bytes(0, False) == expected  # 0 for this one: nothing is measured on a CPU
    monkeypatch.setattr("qlora.ranks.gather", lambda own: [own, "the compiler has failed"])
    with pytest.raises(RuntimeError, match="the compiler has failed"):
        rehearsal.peak_bytes(0, False)


def test_a_model_whose_layers_cannot_be_checkpointed_is_refused():
    config = OpenAIGPTConfig(vocab_size=64, n_embd=64, n_layer=1, n_head=1)
    model = add_adapter(OpenAIGPTLMHeadModel(config), 4, 8, 0.0, ["attn.c_attn"], False, False)
    with pytest.raises(InputError, match="--gradient_checkpointing none"):
        plan_layers(a_rehearsal(model), "all", "auto", None)
    assert plan_layers(a_rehearsal(model), "auto", "auto", None).layers == 0


def test_more_layers_than_the_model_has_are_refused(model):
    with pytest.raises(InputError, match="--gradient_checkpointing 3: this model has 2 layers"):
        plan_layers(a_rehearsal(model), "3", "auto", None)


@pytest.mark.parametrize(
    "flag", ["--plan_only", "--memory_limit_gb 8", "--offload_activations on", "--cuda_graphs --packing"]
)
def test_flags_that_need_a_gpu_are_refused_without_one(run, flag, tmp_path):
    with pytest.raises(InputError, match=f"{flag.split()[0]}.* needs a CUDA GPU"):
        run(flag)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def no_compiler(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(qlora.speed.layers, "COMPILER", broken)
    torch._dynamo.reset()


def test_a_compiler_that_fails_costs_one_line(run, no_compiler, capsys):
    _, folder = run("--max_steps 2 --logging_steps 1 --compile", out="broken")
    out = capsys.readouterr().out
    assert out.count("cannot be compiled here (") == 1 and "; not compiled;" in out
    _, plain = run("--max_steps 2 --logging_steps 1", out="plain")
    assert [line["loss"] for line in metrics(folder)] == [line["loss"] for line in metrics(plain)]


@pytest.mark.parametrize("compile", [False, True])
def test_a_mistake_in_the_loss_is_not_blamed_on_the_compiler(model, capsys, compile):
    rehearsal = a_rehearsal(model, compile=compile)
    rehearsal.train_batch = failing(TypeError("my own mistake"))
    with pytest.raises(TypeError, match="my own mistake"):
        rehearsal.peak_bytes(1, False)
    if compile:  # else nothing runs before the first step, without a GPU
        with pytest.raises(TypeError, match="my own mistake"):
            plan_layers(rehearsal, "auto", "auto", None)
    assert "compiled" not in capsys.readouterr().out


@pytest.mark.parametrize("message", ["CUDA out of memory.", "CUBLAS_STATUS_ALLOC_FAILED when calling"])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_any_kind_of_running_out_of_memory_means_that_the_step_does_not_fit(model, message, is_wrapped):
    error = RuntimeError(message)
    if is_wrapped:
        error = RuntimeError("backend failed")
        error.__cause__ = RuntimeError(message)
    rehearsal = a_rehearsal(model)
    rehearsal.train_batch = failing(error)
    assert rehearsal.peak_bytes(1, False) is None
    assert all(parameter.grad is None for parameter in rehearsal.flat.parameters)


def test_nothing_of_a_failed_compilation_is_left_when_the_plan_is_made_again(model, no_compiler, monkeypatch):
    """Otherwise the second plan would be measured with the activations of the first in memory."""
    batches, alive = [], []
    rehearsal = a_rehearsal(model, compile=True)
    loops_own = rehearsal.train_batch

    def train_batch(batch, step_targets, hidden_states):
        batches.append(weakref.ref(batch["input_ids"]))
        return loops_own(batch, step_targets, hidden_states)

    def choose(*arguments):
        alive.append([reference() is not None for reference in batches])
        return choose_plan(*arguments)

    rehearsal.train_batch = train_batch
    monkeypatch.setattr(qlora.speed.plan, "choose_plan", choose)
    plan_layers(rehearsal, "auto", "auto", None)
    assert alive == [[], [False]]


def test_a_plan_leaves_the_rehearsal_as_it_was(model, no_compiler):
    rehearsal = a_rehearsal(model, compile=True)
    assert not plan_layers(rehearsal, "auto", "auto", None).is_compiled
    assert rehearsal.compile


def test_a_rehearsal_leaves_every_random_state(model):
    rehearsal = a_rehearsal(model)
    loops_own = rehearsal.train_batch

    def train_batch(*arguments):
        random.random(), np.random.rand(), torch.rand(1)
        return loops_own(*arguments)

    def states():
        return random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()

    before, rehearsal.train_batch = states(), train_batch
    rehearsal.peak_bytes(0, False)
    assert states() == before


def test_the_largest_step_is_given_in_what_the_flag_counts(model, monkeypatch):
    """In examples/dpo.py, a pair is two rows."""
    monkeypatch.setattr(Rehearsal, "peak_bytes", lambda self, *_: self.shape.packs * self.shape.length)
    rehearsal = replace(a_rehearsal(model, packs=8, length=512), rows_per_example=2)
    assert largest_step(rehearsal, True, limit=5 * 512) == (2, 512)
    assert largest_step(rehearsal, True, limit=512) == (1, 256)


def test_the_advice_fits_a_model_whose_layers_cannot_be_checkpointed(model, monkeypatch):
    monkeypatch.setattr(Rehearsal, "peak_bytes", lambda self, *_: self.shape.packs * self.shape.length)
    rehearsal = a_rehearsal(model, packs=8, length=512)
    with_layers = qlora.speed.plan._advise(rehearsal, "auto", False, 1024)
    assert "all layers checkpointed: --per_device_train_batch_size 2 --max_length 512" in with_layers
    rehearsal.layers = []
    without_layers = qlora.speed.plan._advise(rehearsal, "none", False, 1024)
    assert "checkpointed" not in without_layers and "--per_device_train_batch_size 2" in without_layers


def test_no_optimizer_state_is_left_if_even_that_does_not_fit(model, monkeypatch):
    rehearsal = a_rehearsal(model, optim="adamw_torch")
    step = rehearsal.optimizer.step

    def runs_out():
        step()
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rehearsal.optimizer, "step", runs_out)
    assert rehearsal.peak_bytes(1, False) is None
    assert not rehearsal.optimizer.state


def test_an_evaluation_is_rehearsed_after_the_step(model):
    modes = []
    rehearsal = a_rehearsal(model)
    rehearsal.evaluate = lambda: modes.append([p.grad is None for p in rehearsal.flat.vectors])
    rehearsal.peak_bytes(0, False)
    assert modes == [[True]]  # once, when the step's gradients are gone


# ---------------------------------------------------------------- on a GPU


@pytest.fixture
def large_model():
    """Ten layers whose activations weigh more than their weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    return add_adapter(base, 4, 8, 0.0, ["q_proj", "v_proj"], False, False).train()


@pytest.mark.gpu
def test_checkpointing_more_layers_takes_less_memory_and_offloading_even_less(large_model):
    rehearsal = a_rehearsal(large_model, packs=4, length=2048)
    none, half, all_, offloaded = (
        rehearsal.peak_bytes(*choice) for choice in ((0, False), (5, False), (10, False), (10, True))
    )
    assert none > half > all_ > offloaded
    hidden = 4 * 2048 * 512 * 2
    assert all_ - offloaded > 7 * hidden  # of ten inputs, two or three are on the GPU at a time


@pytest.mark.gpu
def test_the_plan_counts_an_evaluation_that_needs_more_than_the_step(large_model):
    rehearsal = a_rehearsal(large_model, packs=1, length=256)
    step = rehearsal.peak_bytes(10, False)
    evaluation = to_device(worst_batch(BatchShape(32, 2048, False, 0), 512), large_model.device)

    @torch.no_grad()
    def evaluate():
        target_logprobs(large_model, evaluation, hidden_states)

    rehearsal.evaluate = evaluate
    assert rehearsal.peak_bytes(10, False) > 2 * step - torch.cuda.memory_allocated()


@pytest.mark.gpu
def test_the_plan_fits_its_limit_and_the_advice_for_a_larger_step_is_right(large_model):
    rehearsal = a_rehearsal(large_model, packs=4, length=2048)
    none, all_ = rehearsal.peak_bytes(0, False), rehearsal.peak_bytes(10, False)
    limit = (none + all_) // 2
    plan = choose_plan(rehearsal.peak_bytes, 10, "auto", "auto", limit)
    assert 0 < plan.checkpointed < 10 and plan.peak_bytes <= limit
    assert rehearsal.peak_bytes(plan.checkpointed - 1, False) > limit
    packs, length = largest_step(rehearsal, False, (all_ + torch.cuda.memory_allocated()) // 2)
    assert length == 2048 and packs in (1, 2)
    free, total = torch.cuda.mem_get_info()
    ours = (all_ + torch.cuda.memory_allocated()) / 2 + 64 * 2**20
    limit_gb = (total - free - torch.cuda.memory_reserved() + ours) / GB
    try:
        with pytest.raises(InputError, match=r"4 x 2048 .* --per_device_train_batch_size [12] --max_length"):
            plan_layers(rehearsal, "auto", "off", limit_gb)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_checkpointed_and_offloaded_layers_have_the_gradient_of_plain_ones(large_model, compile):
    rehearsal = a_rehearsal(large_model, compile, packs=2, length=256)
    for vector in rehearsal.flat.vectors:
        torch.nn.init.normal_(vector, std=0.02)  # B starts at 0, which leaves A without a gradient
    gradients, loops_own = [], rehearsal.train_batch

    def train_batch(batch, step_targets, hidden_states):
        loops_own(batch, step_targets, hidden_states)
        gradients.append([parameter.grad.clone() for parameter in rehearsal.flat.parameters])

    rehearsal.train_batch = train_batch
    for choice in ((0, False), (10, False), (10, True), (4, True)):
        rehearsal.peak_bytes(*choice)
    for other in gradients[1:]:
        assert all(torch.equal(*pair) for pair in zip(gradients[0], other))
