"""Replayed passes against the decoder's own. Without a GPU, a replay repeats what was recorded."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import qlora.speed.attention
import qlora.speed.graphs
import train
from qlora.data.batch import worst_batch
from qlora.model.adapter import add_adapter
from qlora.model.base import load_base, trainable_weights
from qlora.model.forward import hidden_states
from qlora.model.loss import target_logprobs
from qlora.speed.graphs import GraphedDecoder, record, run_without_waiting
from qlora.speed.rehearsal import Rehearsal
from tests.results import adapter, assert_same, metrics
from tests.test_gpu import ROWS, on_gpu, packed_model


class Again:
    """Stands in for a CUDA graph: replaying runs the work again."""

    def __init__(self, work, pool=None):
        self.replay = work
        work()

    def pool(self):
        return None


@pytest.fixture
def replays(monkeypatch):
    """Have the CPU record and replay like CUDA; a list with one entry per replayed forward pass."""
    count = []
    apply = qlora.speed.graphs._Replayed.apply
    monkeypatch.setattr(qlora.speed.graphs, "run_without_waiting", lambda work: work())
    monkeypatch.setattr(qlora.speed.graphs, "record", Again)
    monkeypatch.setattr(
        qlora.speed.graphs._Replayed, "apply", lambda *given: count.append(1) or apply(*given)
    )
    return count


@pytest.fixture
def graphed_training(monkeypatch, replays):
    """Trainings on the CPU replay their passes."""
    plan_layers = train.plan_layers

    def plan_with_graphs(rehearsal: Rehearsal, *arguments):
        plan = plan_layers(rehearsal, *arguments)
        causal_lm, parameters = rehearsal.model.get_base_model(), rehearsal.flat.parameters
        batch = worst_batch(rehearsal.shape, vocab_size=448)
        return replace(plan, hidden_states=GraphedDecoder(causal_lm, batch, parameters, rehearsal.autocast))

    monkeypatch.setattr(train, "plan_layers", plan_with_graphs)
    return replays


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_with_replays_equals_the_run_without_bit_by_bit(run, rows_file, dtype, request):
    flags = "--packing --max_length 64 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    flags += f" --num_train_epochs 3 --eval_steps 2 --logging_steps 1 --dtype {dtype} --validation_dataset"
    _, plain = run(flags, rows_file, out="plain")
    replays = request.getfixturevalue("graphed_training")
    _, replayed = run(flags, rows_file, out="replayed")
    assert len(replays) > len(metrics(plain))
    assert_same(adapter(replayed), adapter(plain))


@pytest.fixture
def model(base):
    torch.manual_seed(0)
    base = load_base(base, torch.float32, torch.device("cpu"))
    model = add_adapter(base, 4, 8, 0.0, ["q_proj", "v_proj"], False, False).train()
    for _, weight in trainable_weights(model):
        torch.nn.init.normal_(weight, std=0.1)  # else disabling the adapter would change nothing
    return model


def ids(length: int, first: int = 1) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(first, first + length)[None]}


@pytest.fixture
def graphed(model, replays):
    parameters = [weight for _, weight in trainable_weights(model)]
    return GraphedDecoder(model.get_base_model(), ids(8), parameters, nullcontext)


def gradient(graphed: GraphedDecoder, hidden: torch.Tensor) -> torch.Tensor:
    for parameter in graphed.parameters:
        parameter.grad = None
    hidden.square().sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in graphed.parameters])


def test_a_batch_of_another_shape_takes_the_decoder_itself(model, graphed, replays):
    causal_lm = model.get_base_model()
    for batch in (ids(16), ids(8) | {"position_ids": torch.arange(8)[None]}):
        assert torch.equal(graphed(causal_lm, batch), hidden_states(causal_lm, batch)) and not replays
    assert torch.equal(graphed(causal_lm, ids(8)), hidden_states(causal_lm, ids(8))) and len(replays) == 1


def test_a_disabled_adapter_evaluation_and_no_grad_take_the_decoder_itself(model, graphed, replays):
    """The recording has the adapter, dropout, and activations for a backward pass."""
    causal_lm = model.get_base_model()
    with model.disable_adapter():
        reference = graphed(causal_lm, ids(8))
        assert torch.equal(reference, hidden_states(causal_lm, ids(8)))
    assert not torch.allclose(reference, hidden_states(causal_lm, ids(8)))
    with torch.no_grad():
        graphed(causal_lm, ids(8))
    model.eval()
    graphed(causal_lm, ids(8))
    model.train()
    assert not replays
    graphed(causal_lm, ids(8))
    assert len(replays) == 1


def test_another_adapter_and_another_model_take_the_decoder_itself(base, model, graphed, replays):
    causal_lm = model.get_base_model()
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    assert torch.equal(graphed(causal_lm, ids(8)), hidden_states(causal_lm, ids(8)))
    model.set_adapter("default")
    other = load_base(base, torch.float32, torch.device("cpu")).train()
    assert torch.equal(graphed(other, ids(8)), hidden_states(other, ids(8)))
    assert not replays
    graphed(causal_lm, ids(8))
    assert len(replays) == 1


def test_a_batch_may_have_tensors_of_its_own_beside_what_the_decoder_takes(model, graphed, replays):
    causal_lm, batch = model.get_base_model(), ids(8) | {"row_weights": torch.ones(3)}
    assert torch.equal(graphed(causal_lm, batch), hidden_states(causal_lm, ids(8))) and len(replays) == 1


def test_a_second_pass_before_the_backward_pass_of_the_first_is_not_replayed(model, graphed, replays):
    """A replay would overwrite the activations that the first backward pass needs."""
    causal_lm = model.get_base_model()
    first, second = ids(8), ids(8, first=20)
    want = gradient(graphed, torch.cat([hidden_states(causal_lm, batch) for batch in (first, second)]))
    got = gradient(graphed, torch.cat([graphed(causal_lm, batch) for batch in (first, second)]))
    assert len(replays) == 1
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    gradient(graphed, graphed(causal_lm, first))  # the next micro-batch is replayed again
    assert len(replays) == 2
    hidden = graphed(causal_lm, first)
    del hidden  # it will have no backward pass
    graphed(causal_lm, second)
    assert len(replays) == 4


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("rows", [ROWS[:2], ROWS[:1]])
def test_replayed_graphs_have_the_loss_and_the_gradient_of_the_decoder(rows, compile):
    model, autocast = packed_model(torch.bfloat16)
    qlora.speed.layers.set_up_layers(
        qlora.speed.layers.decoder_layers(model.get_base_model()), 1, compile=compile, is_random=False
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    starts = 8 if len(rows) > 1 else 0
    recorded = on_gpu([ROWS[1:2] * len(rows)] * 2, pack_length=128, starts=starts)
    batches = [on_gpu([rows, rows[:1]], 128, starts), on_gpu([rows[:1], rows], 128, starts)]

    def gradients(hidden_states) -> list[torch.Tensor]:
        for batch in batches:  # two micro-batches
            with autocast():
                loss = -target_logprobs(model, batch, hidden_states).sum()
            loss.backward()
        found = [loss.detach(), *(parameter.grad for parameter in parameters)]
        for parameter in parameters:
            parameter.grad = None
        return found

    want = gradients(hidden_states)
    graphed = GraphedDecoder(model.get_base_model(), recorded, parameters, autocast)
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(gradients(graphed), want))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    ["--lora_dropout 0.1", "--gradient_checkpointing 1"]
    + [f"--compile --gradient_checkpointing 2 --lora_dropout {dropout}" for dropout in (0, 0.1)],
)
def test_a_run_with_graphs_equals_the_run_without(run, flags, capsys):
    flags += " --packing --max_length 64 --max_steps 8 --logging_steps 1 --dtype bfloat16 --save_steps 4"
    _, plain = run(flags, "--no_cuda_graphs", out="plain")
    assert "CUDA graphs" not in capsys.readouterr().out
    _, replayed = run(flags, "--save_total_limit 0", out="replayed")
    assert "replayed as CUDA graphs" in capsys.readouterr().out
    losses = [[line["loss"] for line in metrics(folder)] for folder in (plain, replayed)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-2)
    if "dropout 0.1" not in flags:
        assert_same(adapter(replayed), adapter(plain))
    want = adapter(replayed)
    run(flags, "--resume_from_checkpoint", str(replayed / "checkpoint-4"), out="replayed")
    assert_same(adapter(replayed), want)


@pytest.mark.gpu
def test_a_recording_that_fails_leaves_no_trace():
    stream, result = torch.cuda.current_stream(), []

    def waits():
        torch.rand(4, device="cuda").sum().item()

    def draws():
        result[:] = [torch.rand(4, device="cuda")]

    torch.manual_seed(1)
    want = torch.rand(4, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"):
        run_without_waiting(waits)
    torch.manual_seed(1)
    with pytest.raises(RuntimeError):
        record(waits)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.rand(4, device="cuda"), want)
    graph = record(draws)
    torch.manual_seed(1)
    graph.replay()
    assert torch.equal(result[0], want)


@pytest.mark.gpu
@pytest.mark.parametrize("waits", [False, True])
def test_a_run_that_cannot_be_recorded_is_the_run_without_graphs(run, monkeypatch, capsys, waits):
    if waits:
        monkeypatch.setattr(
            qlora.speed.graphs,
            "hidden_states",
            lambda *given: torch.ones((), device="cuda").item() * hidden_states(*given),
        )
    else:  # as on GPUs before Ampere
        monkeypatch.setattr(qlora.speed.attention, "varlen_attn", None)
    flags = "--packing --max_length 64 --max_steps 4 --logging_steps 1 --dtype bfloat16 --compile"
    flags += " --lora_dropout 0.1"
    _, plain = run(flags, "--no_cuda_graphs", out="plain")
    _, other = run(flags, out="other")
    out = capsys.readouterr().out
    assert "replayed" not in out and out.count("No CUDA graphs: called a synchronizing") == waits
    assert_same(adapter(other), adapter(plain))
