"""How the layers run changes nothing: compiled, checkpointed, chunked; and nothing is compiled in mid-run."""

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import qlora.layers
import train
from qlora.attention import VARLEN
from qlora.layers import decoder_layers
from qlora.loss import next_token_loss
from qlora.model import load_tokenizer
from tests.test_gpu import ROWS as CARD_ROWS
from tests.test_gpu import on_card, packed_model
from tests.test_train import metrics

SIZES = {
    "vocab_size": 448, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "llama 3, grouped queries": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "tied embeddings": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral, sliding window": transformers.MistralConfig(**SIZES, sliding_window=16),
    "qwen 2, biased": transformers.Qwen2Config(**SIZES),
    "qwen 3, normed": transformers.Qwen3Config(**SIZES, head_dim=16),
    "gemma 2, soft-capped": transformers.Gemma2Config(**SIZES, head_dim=16),
}


@pytest.fixture(autouse=True)
def no_code_generation(monkeypatch):
    """Without a card the compiler only traces: the graphs are what matters, and no C++ compiler is needed."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(qlora.layers, "COMPILER", "aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fast_path_has_the_losses_of_the_plain_one(run, base, tmp_path, monkeypatch, name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name])
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(base).save_pretrained(tmp_path / "model")
    flags = "--max_steps 12 --logging_steps 1 --packing --max_length 64 --per_device_train_batch_size 2"
    flags += " --lora_target_modules all-linear"
    compiled = counters["stats"]["unique_graphs"]
    _, fast = run(flags, "--compile --gradient_checkpointing 1", model=str(tmp_path / "model"), out="fast")
    assert counters["stats"]["unique_graphs"] > compiled
    monkeypatch.setattr(train, "has_plain_head", lambda model: False)  # the model's own forward, all logits
    _, plain = run(flags, "--gradient_checkpointing none", model=str(tmp_path / "model"), out="plain")
    losses = [[line["loss"] for line in metrics(folder)] for folder in (fast, plain)]
    assert losses[1][-1] < losses[1][0] - 0.1  # something was learned
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


FULL_RUN = "--compile --num_train_epochs 3 --eval_steps 1 --save_steps 2 --lora_dropout 0.1"


@pytest.mark.parametrize("flags", ["--packing --max_length 64", "", "--streaming --max_steps 20"])
def test_nothing_is_compiled_after_the_rehearsal(run, rows_file, monkeypatch, flags):
    """With evaluations, checkpoints and epochs that end in a short batch."""
    graphs = []
    plan_layers = train.plan_layers

    def planned(*arguments):
        plan = plan_layers(*arguments)
        graphs.append(counters["stats"]["unique_graphs"])
        return plan

    monkeypatch.setattr(train, "plan_layers", planned)
    flags += " --per_device_train_batch_size 2 --gradient_checkpointing 1"
    _, folder = run(FULL_RUN, flags, "--validation_dataset", rows_file)
    assert graphs[0] > 0 and counters["stats"]["unique_graphs"] == graphs[0]
    assert len(metrics(folder)) > 6


@pytest.mark.gpu
@pytest.mark.parametrize("flags", ["--packing --max_length 64", "", "--packing --max_length 24"])
def test_nothing_is_compiled_after_the_rehearsal_on_a_card(run, rows_file, monkeypatch, flags):
    test_nothing_is_compiled_after_the_rehearsal(run, rows_file, monkeypatch, f"{flags} --dtype float16")


@pytest.mark.gpu
@pytest.mark.parametrize("packs", [[CARD_ROWS[:2], CARD_ROWS[2:]], [[CARD_ROWS[0]], [CARD_ROWS[2]]]])
def test_the_host_does_not_wait_for_the_device_inside_a_micro_batch(packs):
    model, attention, autocast = packed_model(torch.bfloat16)
    assert attention == VARLEN
    qlora.layers.set_up_layers(decoder_layers(model), 1, offload=True)
    batch = on_card(packs, pack_length=128)
    for mode in ("default", "error"):  # the first time, libraries set themselves up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with autocast():
                loss = next_token_loss(model, batch, plain_head=True)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
