"""Which layers are checkpointed: the plan, what is said if nothing fits; a rehearsal leaves no trace."""

import weakref
from functools import partial

import pytest
import torch
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

import qlora.speed.layers
import qlora.speed.plan
from qlora.data.batch import BatchShape
from qlora.errors import InputError
from qlora.model.adapter import add_adapter
from qlora.model.base import load_base, trainable_weights
from qlora.optim.optimizer import FlatParameters, build_optimizer, optimizer_tensors
from qlora.speed.layers import decoder_layers
from qlora.speed.plan import GB, Plan, Rehearsal, choose_plan, largest_step, plan_layers
from tests.test_train import metrics

LAYERS = 32


def needs(checkpointed: int, offload: bool) -> int:
    """A model of a 7B step, in units of a layer's input: 40 of weights, and 11 for a layer that is kept."""
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
def test_a_given_number_is_kept(checkpointing, count):
    assert choose_plan(needs, LAYERS, checkpointing, "auto", 10_000).checkpointed == count
    assert choose_plan(needs, LAYERS, checkpointing, "off", 50) is None


def test_a_given_number_is_offloaded_only_if_it_must():
    assert not choose_plan(needs, LAYERS, "all", "auto", needs(32, False)).offload
    assert choose_plan(needs, LAYERS, "all", "auto", needs(32, False) - 1).offload
    assert choose_plan(needs, LAYERS, "all", "on", 10_000).offload
    assert choose_plan(needs, LAYERS, "none", "auto", needs(0, False) - 1) is None


def test_the_plan_reads_as_what_it_is():
    assert Plan(0, 32, False, 1, 2).describe() == "none of 32 layers checkpointed"
    assert Plan(32, 32, True, 1, 2).describe() == "all of 32 layers checkpointed and offloaded to the host"
    assert Plan(5, 32, False, 1, 2).describe() == "5 of 32 layers checkpointed"


def a_rehearsal(model, compile=False, packs=2, length=16, optim="adamw_8bit") -> Rehearsal:
    flat = FlatParameters([parameter for _, parameter in trainable_weights(model)])
    optimizer = build_optimizer(optim, flat.vector, 0.1, (0.9, 0.999), 1e-8)
    autocast = partial(torch.autocast, model.device.type, enabled=False)
    shape = BatchShape(packs, length, is_packed=True, starts=16)
    return Rehearsal(
        model, decoder_layers(model.get_base_model()), flat, optimizer, autocast, True, compile, shape, True
    )


@pytest.fixture
def model(base):
    torch.manual_seed(0)
    base = load_base(base, torch.float32, torch.device("cpu"))
    return add_adapter(base, 4, 8, 0.5, ["q_proj", "v_proj"], False, False).train()


@pytest.mark.parametrize(
    "limit, largest", [(150, (7, 512)), (70, (2, 512)), (60, (1, 512)), (44, (1, 448)), (31, None)]
)
def test_the_largest_step_that_fits_is_found(model, monkeypatch, limit, largest):
    def peak(self, checkpointed, offload):
        assert checkpointed == 2 and offload
        return 30 + self.shape.packs * self.shape.length // 32  # 16 for each pack of 512

    monkeypatch.setattr(Rehearsal, "peak", peak)
    assert largest_step(a_rehearsal(model, packs=8, length=512), True, limit) == largest


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch"])
def test_a_rehearsal_leaves_no_trace(model, optim):
    rehearsal = a_rehearsal(model, optim=optim)
    weights, random = rehearsal.flat.vector.detach().clone(), torch.get_rng_state()
    assert rehearsal.peak(1, False) == 0  # nothing is measured without a card
    assert torch.equal(rehearsal.flat.vector, weights)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in (rehearsal.flat.vector, *rehearsal.flat.parameters))
    assert not any(tensor.any() for tensor in optimizer_tensors(rehearsal.optimizer).values())


def test_a_model_whose_layers_cannot_be_checkpointed_is_refused():
    config = OpenAIGPTConfig(vocab_size=64, n_embd=64, n_layer=1, n_head=1)
    model = add_adapter(OpenAIGPTLMHeadModel(config), 4, 8, 0.0, ["attn.c_attn"], False, False)
    with pytest.raises(InputError, match="--gradient_checkpointing none"):
        plan_layers(a_rehearsal(model), "all", "auto", None)
    assert plan_layers(a_rehearsal(model), "auto", "auto", None).layers == 0


def test_more_layers_than_there_are_are_refused(model):
    with pytest.raises(InputError, match="--gradient_checkpointing 3: this model has 2 layers"):
        plan_layers(a_rehearsal(model), "3", "auto", None)


@pytest.mark.parametrize(
    "flag", ["--plan_only", "--memory_limit_gb 8", "--offload_activations on", "--cuda_graphs --packing"]
)
def test_what_needs_a_card_is_refused_without_one(run, flag, tmp_path):
    with pytest.raises(InputError, match=f"{flag.split()[0]}.* needs a CUDA device"):
        run(flag)
    assert not (tmp_path / "out").exists()


def test_a_compiler_that_fails_costs_one_line(run, monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(qlora.speed.layers, "COMPILER", broken)
    torch._dynamo.reset()
    _, folder = run("--max_steps 2 --logging_steps 1 --compile", out="broken")
    out = capsys.readouterr().out
    assert out.count("cannot be compiled") == 1 and "; not compiled;" in out
    _, plain = run("--max_steps 2 --logging_steps 1", out="plain")
    assert [line["loss"] for line in metrics(folder)] == [line["loss"] for line in metrics(plain)]


@pytest.mark.parametrize("message", ["CUDA out of memory.", "CUBLAS_STATUS_ALLOC_FAILED when calling"])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_any_error_of_memory_is_a_step_that_does_not_fit(model, monkeypatch, message, is_wrapped):
    def fail():
        if is_wrapped:
            raise RuntimeError("backend failed") from RuntimeError(message)
        raise RuntimeError(message)

    rehearsal = a_rehearsal(model)
    monkeypatch.setattr(rehearsal.flat, "gather_gradients", fail)
    assert rehearsal.peak(1, False) is None
    assert all(parameter.grad is None for parameter in rehearsal.flat.parameters)


def test_another_error_in_a_rehearsal_is_not_hidden(model, monkeypatch):
    rehearsal = a_rehearsal(model)
    monkeypatch.setattr(rehearsal.flat, "gather_gradients", lambda: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        rehearsal.peak(1, False)


def test_nothing_of_a_failed_compilation_is_left_when_the_plan_is_made_again(run, monkeypatch):
    """Else the second plan would be measured beside the activations of the first."""

    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    batches, alive = [], []
    make = Rehearsal._batch

    def batch(self):
        made = make(self)
        batches.append(weakref.ref(made["input_ids"]))
        return made

    def choose(*arguments):
        alive.append([reference() is not None for reference in batches])
        return choose_plan(*arguments)

    monkeypatch.setattr(qlora.speed.layers, "COMPILER", broken)
    monkeypatch.setattr(Rehearsal, "_batch", batch)
    monkeypatch.setattr(qlora.speed.plan, "choose_plan", choose)
    torch._dynamo.reset()
    run("--max_steps 1 --compile")
    assert alive == [[], [False]]


def test_an_evaluation_is_rehearsed_beside_the_step(model, monkeypatch):
    seen, loss = [], qlora.speed.plan.next_token_loss

    def watched(model, batch, *arguments):
        seen.append((model.training, torch.is_grad_enabled(), tuple(batch["input_ids"].shape)))
        return loss(model, batch, *arguments)

    monkeypatch.setattr(qlora.speed.plan, "next_token_loss", watched)
    rehearsal = a_rehearsal(model)
    rehearsal.evaluates = 3, 21
    rehearsal.peak(0, False)
    assert seen[1:] == [(False, False, (3, 24))] and seen[0][:2] == (True, True)
    assert model.training


# ---------------------------------------------------------------- on a card


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
def test_fewer_layers_checkpointed_take_more_memory_and_offloading_takes_less(large_model):
    rehearsal = a_rehearsal(large_model, packs=4, length=2048)
    none, half, all_, offloaded = (
        rehearsal.peak(*choice) for choice in ((0, False), (5, False), (10, False), (10, True))
    )
    assert none > half > all_ > offloaded
    hidden = 4 * 2048 * 512 * 2
    assert all_ - offloaded > 7 * hidden  # of ten inputs, two or three are on the card at a time


@pytest.mark.gpu
def test_an_evaluation_that_needs_more_than_the_step_is_what_the_plan_counts(large_model):
    rehearsal = a_rehearsal(large_model, packs=1, length=256)
    step = rehearsal.peak(10, False)
    rehearsal.evaluates = 32, 2048
    assert rehearsal.peak(10, False) > 2 * step - torch.cuda.memory_allocated()


@pytest.mark.gpu
def test_the_plan_fits_the_memory_it_was_made_for_and_a_larger_step_says_what_would(large_model):
    rehearsal = a_rehearsal(large_model, packs=4, length=2048)
    none, all_ = rehearsal.peak(0, False), rehearsal.peak(10, False)
    limit = (none + all_) // 2
    plan = choose_plan(rehearsal.peak, 10, "auto", "auto", limit)
    assert 0 < plan.checkpointed < 10 and plan.peak_bytes <= limit
    assert rehearsal.peak(plan.checkpointed - 1, False) > limit
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
    torch.nn.init.normal_(rehearsal.flat.vector, std=0.02)  # B starts at 0, which leaves A without a gradient
    gradients = []
    monkey = rehearsal.flat.gather_gradients

    def keep():
        gradients.append([parameter.grad.clone() for parameter in rehearsal.flat.parameters])
        monkey()

    rehearsal.flat.gather_gradients = keep
    for choice in ((0, False), (10, False), (10, True), (4, True)):
        rehearsal.peak(*choice)
    for other in gradients[1:]:
        assert all(torch.equal(*pair) for pair in zip(gradients[0], other))
