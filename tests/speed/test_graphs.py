"""Replayed passes against the decoder's own. Without a card a replay does again what was recorded."""

from contextlib import nullcontext

import pytest
import torch

import qlora.speed.attention
import qlora.speed.graphs
import train
from qlora.model.forward import decode
from qlora.model.loss import next_token_loss
from qlora.speed.graphs import GraphedDecoder, record, run_without_waiting
from qlora.speed.plan import Rehearsal
from tests.test_gpu import ROWS, on_card, packed_model
from tests.test_train import adapter, assert_same, metrics


class Again:
    """In place of a CUDA graph."""

    def __init__(self, work, pool=None):
        self.replay = work
        work()

    def pool(self):
        return None


@pytest.fixture
def replays(monkeypatch):
    """Train on the CPU as if its passes were CUDA graphs; the number of replayed forward passes so far."""
    count = []
    apply = qlora.speed.graphs._Replayed.apply
    monkeypatch.setattr(qlora.speed.graphs, "run_without_waiting", lambda work: work())
    monkeypatch.setattr(qlora.speed.graphs, "record", Again)
    monkeypatch.setattr(
        qlora.speed.graphs._Replayed, "apply", lambda *given: count.append(1) or apply(*given)
    )
    plan_layers = train.plan_layers

    def planned(rehearsal: Rehearsal, *arguments):
        plan = plan_layers(rehearsal, *arguments)
        causal_lm, parameters = rehearsal.model.get_base_model(), rehearsal.flat.parameters
        rehearsal.decode = GraphedDecoder(causal_lm, rehearsal._batch(), parameters, rehearsal.autocast)
        return plan

    monkeypatch.setattr(train, "plan_layers", planned)
    return count


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_by_replays_is_the_run_without_bit_by_bit(run, rows_file, monkeypatch, dtype, request):
    flags = "--packing --max_length 64 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    flags += f" --num_train_epochs 3 --eval_steps 2 --logging_steps 1 --dtype {dtype} --validation_dataset"
    _, plain = run(flags, rows_file, out="plain")
    replays = request.getfixturevalue("replays")
    _, replayed = run(flags, rows_file, out="replayed")
    assert len(replays) > len(metrics(plain))
    assert_same(adapter(replayed), adapter(plain))


def test_a_batch_of_another_shape_takes_the_decoder_itself(run, replays):
    model, _ = run("--max_steps 1")
    causal_lm, done = model.get_base_model(), len(replays)
    short, long = ({"input_ids": torch.arange(1, length)[None]} for length in (9, 17))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    graphed = GraphedDecoder(causal_lm, short, parameters, nullcontext)
    assert torch.equal(graphed(causal_lm, long), decode(causal_lm, long)) and len(replays) == done
    packed = short | {"position_ids": torch.arange(8)[None]}
    assert torch.equal(graphed(causal_lm, packed), decode(causal_lm, packed)) and len(replays) == done
    assert torch.equal(graphed(causal_lm, short), decode(causal_lm, short)) and len(replays) == done + 1


# ---------------------------------------------------------------- on a card


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("rows", [ROWS[:2], ROWS[:1]])
def test_replayed_graphs_have_the_loss_and_the_gradient_of_the_decoder(rows, compile):
    model, _, autocast = packed_model(torch.bfloat16)
    qlora.speed.layers.set_up_layers(
        qlora.speed.layers.decoder_layers(model.get_base_model()), 1, compile=compile, is_random=False
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    starts = 8 if len(rows) > 1 else 0
    recorded = on_card([ROWS[1:2] * len(rows)] * 2, pack_length=128, starts=starts)
    batches = [on_card([rows, rows[:1]], 128, starts), on_card([rows[:1], rows], 128, starts)]

    def gradients(decode) -> list[torch.Tensor]:
        for batch in batches:  # two micro-batches
            with autocast():
                loss = next_token_loss(model, batch, True, decode)
            loss.backward()
        found = [loss.detach(), *(parameter.grad for parameter in parameters)]
        for parameter in parameters:
            parameter.grad = None
        return found

    want = gradients(decode)
    graphed = GraphedDecoder(model.get_base_model(), recorded, parameters, autocast)
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(gradients(graphed), want))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    ["--lora_dropout 0.1", "--gradient_checkpointing 1"]
    + [f"--compile --gradient_checkpointing 2 --lora_dropout {dropout}" for dropout in (0, 0.1)],
)
def test_a_run_by_graphs_is_the_run_without(run, flags, capsys):
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
            qlora.speed.graphs, "decode", lambda *given: torch.ones((), device="cuda").item() * decode(*given)
        )
    else:  # as on cards before Ampere
        monkeypatch.setattr(qlora.speed.attention, "varlen_attn", None)
    flags = "--packing --max_length 64 --max_steps 4 --logging_steps 1 --dtype bfloat16 --compile"
    flags += " --lora_dropout 0.1"
    _, plain = run(flags, "--no_cuda_graphs", out="plain")
    _, other = run(flags, out="other")
    out = capsys.readouterr().out
    assert "replayed" not in out and out.count("No CUDA graphs: called a synchronizing") == waits
    assert_same(adapter(other), adapter(plain))
