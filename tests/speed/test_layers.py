"""Compiled, checkpointed and offloaded layers compute the same; nothing is compiled after the rehearsal."""

import gc
import json
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

import qlora.speed.layers
import train
from qlora.model.adapter import add_adapter
from qlora.model.base import load_tokenizer, trainable_weights
from qlora.model.forward import VARLEN, hidden_states
from qlora.model.loss import target_logprobs
from qlora.speed.attention import register_varlen
from qlora.speed.graphs import run_without_waiting
from qlora.speed.layers import decoder_layers, has_randomness, set_up_layers
from tests.data.test_stream import use_windows
from tests.results import metrics
from tests.test_gpu import ROWS as GPU_ROWS
from tests.test_gpu import on_gpu, packed_model

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
    """Without a GPU, only trace: the graphs are what matters, and no C++ compiler is needed."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(qlora.speed.layers, "COMPILER", "aot_eager")
    torch._dynamo.reset()


def last_hidden(causal_lm) -> torch.Tensor:
    ids = torch.arange(18, device=causal_lm.device).view(2, 9)
    return causal_lm.model(ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fast_path_has_the_losses_of_the_plain_one(run, base, tmp_path, monkeypatch, name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name])
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(base).save_pretrained(tmp_path / "model")
    flags = "--max_steps 12 --logging_steps 1 --packing --max_length 64 --per_device_train_batch_size 2"
    flags += " --lora_target_modules all-linear"
    before = counters["stats"]["unique_graphs"]
    _, fast = run(flags, "--compile --gradient_checkpointing 1", model=str(tmp_path / "model"), out="fast")
    assert counters["stats"]["unique_graphs"] > before
    monkeypatch.setattr(
        train, "choose_hidden_states", lambda model: None
    )  # the model's own forward, all logits
    _, plain = run(flags, "--gradient_checkpointing none", model=str(tmp_path / "model"), out="plain")
    losses = [[line["loss"] for line in metrics(folder)] for folder in (fast, plain)]
    assert losses[1][-1] < losses[1][0] - 0.1  # something was learned
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_compiled_layer_keeps_nothing_that_elementwise_operations_can_recompute(monkeypatch):
    """The gradient of a LoRA matrix needs the MLP's product, which follows from two tensors that are kept."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(qlora.speed.layers, "COMPILER", "aot_eager_decomp_partition")
    causal_lm = transformers.LlamaForCausalLM(FAMILIES["llama"])
    model = add_adapter(causal_lm, 4, 8, 0.0, ["gate_proj", "up_proj", "down_proj"], False, False)
    set_up_layers(decoder_layers(causal_lm), 0, compile=True, is_random=False)
    kept, wide = {}, SIZES["intermediate_size"]

    def keep(tensor):
        if tensor.shape[-1] == wide and tensor.numel() == 2 * 9 * wide:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = last_hidden(causal_lm)
    hidden.sum().backward()
    assert len(kept) == 2 * SIZES["num_hidden_layers"]
    assert all(weight.grad is not None for _, weight in trainable_weights(model))


def test_a_checkpointed_layer_recomputes_neither_its_attention_nor_its_last_product(monkeypatch):
    """Its backward pass has the products of any backward pass, and those of the forward pass except one,
    which is only added to the layer's input."""
    backward = []

    def note(graph, inputs):
        backward.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph)

    compiler = aot_autograd(
        fw_compiler=lambda graph, inputs: make_boxed_func(graph), bw_compiler=note,
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    monkeypatch.setattr(qlora.speed.layers, "COMPILER", compiler)
    causal_lm = transformers.LlamaForCausalLM(FAMILIES["llama"])
    add_adapter(causal_lm, 4, 8, 0.0, ["q_proj", "v_proj"], False, False)
    products = []
    for checkpointed in (0, 3):
        backward.clear()
        set_up_layers(decoder_layers(causal_lm), checkpointed, compile=True)
        hidden = last_hidden(causal_lm)
        hidden.sum().backward()
        targets = backward[0]  # of the last layer, whose input needs a gradient
        assert [target for target in targets if "attention" in target and "backward" not in target] == []
        products.append(sum(target == "aten.mm.default" for target in targets))
    linears, of_lora = 7, 4
    assert products[1] - products[0] == linears + of_lora - 1


@pytest.fixture
def compiled(monkeypatch):
    """[the number of graphs compiled when the rehearsal ends], to compare with that at the end of the run."""
    graphs, plan_layers = [], train.plan_layers

    def planned(*arguments):
        plan = plan_layers(*arguments)
        graphs.append(counters["stats"]["unique_graphs"])
        return plan

    monkeypatch.setattr(train, "plan_layers", planned)
    return graphs


FULL_RUN = "--compile --num_train_epochs 3 --eval_steps 1 --save_steps 2 --lora_dropout 0.1"


@pytest.mark.parametrize("flags", ["--packing --max_length 64", "", "--streaming --max_steps 20"])
def test_nothing_is_compiled_after_the_rehearsal(run, rows_file, compiled, flags):
    """Even with evaluations, checkpoints and epochs that end in a short batch."""
    flags += " --per_device_train_batch_size 2 --gradient_checkpointing 1"
    _, folder = run(FULL_RUN, flags, "--validation_dataset", rows_file)
    assert compiled[0] > 0 and counters["stats"]["unique_graphs"] == compiled[0]
    assert len(metrics(folder)) > 6


def test_a_stream_whose_rows_get_shorter_keeps_its_shape(run, tmp_path, monkeypatch, compiled):
    """With attention that reads where rows start, as on a GPU."""

    def varlen(query, key, value, starts, *arguments, scale, **kwargs):
        place = torch.arange(len(query))
        row = (place[:, None] >= starts[None, :].long()).sum(1)
        mask = (row[:, None] == row[None, :]) & (place[:, None] >= place[None, :])
        query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
        return mixed[0].transpose(0, 1)

    def choose(model, autocast):
        register_varlen()
        model.get_base_model().set_attn_implementation(VARLEN)
        return None

    monkeypatch.setattr("qlora.speed.attention.varlen_attn", varlen)
    monkeypatch.setattr(train, "choose_attention", choose)
    use_windows(monkeypatch, 40)
    rows = tmp_path / "shrinking.jsonl"
    words = "a red leaf and a green cloud over a blue river by a white stone house".split()
    texts = [" ".join((words * 3)[: length + row % 3]) for length in (36, 20, 7, 1) for row in range(40)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = "--streaming --packing --compile --max_length 64 --max_steps 60 --per_device_train_batch_size 2"
    run(flags, "--gradient_accumulation_steps 1", dataset=str(rows))
    assert compiled[0] > 0 and counters["stats"]["unique_graphs"] == compiled[0]


@pytest.fixture
def fake_streams(monkeypatch):
    """Copies to the host and back happen in place: this leaves to test which tensor comes back when."""
    stream = SimpleNamespace(wait_stream=lambda other: None, wait_event=lambda event: None)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))

    def empty_here(tensor, device=None, pin_memory=False, **options):
        return empty_like(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", empty_here)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 0, 1, 0]])  # also layers that run several times
@pytest.mark.parametrize("checkpointed", [1, 3, 4])
def test_offloaded_tensors_come_back_to_their_layer(fake_streams, monkeypatch, order, checkpointed, compile):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 4}))
    layers = decoder_layers(model)
    model.model.layers = torch.nn.ModuleList([layers[number] for number in order])
    tensors = 3 if compile else 1  # of a layer: its input, and what its attention returns
    kept, held, keep = [], [], qlora.speed.layers.HostActivations.keep

    def watched(host, layer, tensor):
        kept.append((host, tensor.shape))
        held.append(weakref.ref(tensor.untyped_storage()))
        given_back = keep(host, layer, tensor)
        del tensor
        alive = sum(reference() is not None for reference in held)
        assert alive <= 2 * tensors + 1, "tensors of more than two layers are on the device"
        return given_back

    monkeypatch.setattr(qlora.speed.layers.HostActivations, "keep", watched)
    gradients = []
    for offload in (False, True):
        set_up_layers(decoder_layers(model), checkpointed, offload, compile)
        for _ in range(2):  # two micro-batches
            hidden = model.model(torch.arange(2, 50).view(2, 24), use_cache=False).last_hidden_state
            hidden.square().sum().backward()
            held.clear()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
    runs = 2 * sum(number < checkpointed for number in order)  # of layers, in both micro-batches
    assert len(kept) == runs * tensors and kept[-1][0].last is None
    of_attention = {(2, 4, 24, 16), (2, 4, 24)} if compile else set()
    assert {shape for _, shape in kept} == {(2, 24, 64)} | of_attention
    pairs = [pair for pair in zip(*gradients) if pair[0] is not None]
    assert len(pairs) > 10 and all(torch.equal(*pair) for pair in pairs)


@pytest.fixture
def alive(fake_streams, monkeypatch):
    """A function that counts the KeptByLayer objects that are still alive."""
    references, init = [], qlora.speed.layers.KeptByLayer.__init__

    def made(self):
        references.append(weakref.ref(self))
        init(self)

    monkeypatch.setattr(qlora.speed.layers.KeptByLayer, "__init__", made)
    return lambda: sum(reference() is not None for reference in references)


@pytest.mark.parametrize("compile", [False, True])
def test_layers_before_the_first_trained_one_keep_nothing(alive, compile):
    causal_lm = transformers.LlamaForCausalLM(FAMILIES["llama"])
    add_adapter(causal_lm, 4, 8, 0.0, ["layers.2.self_attn.q_proj"], False, False)
    set_up_layers(decoder_layers(causal_lm), 3, offload=True, compile=compile)
    hidden = last_hidden(causal_lm)
    assert alive() == 1
    hidden.sum().backward()
    del hidden
    assert alive() == 0


def test_a_failed_forward_pass_leaves_nothing_behind(alive):
    causal_lm = transformers.LlamaForCausalLM(FAMILIES["llama"])
    layers = decoder_layers(causal_lm)
    set_up_layers(layers, 3, offload=True)
    hook = layers[2].mlp.register_forward_pre_hook(lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        last_hidden(causal_lm)
    hook.remove()
    assert alive() > 0
    gc.disable()
    try:
        set_up_layers(layers, 0)
        assert alive() == 0
    finally:
        gc.enable()


def random_adapter(causal_lm, dropout: float) -> list[torch.nn.Parameter]:
    """Add an adapter with random matrices, and return them."""
    model = add_adapter(causal_lm, 4, 8, dropout, ["q_proj", "v_proj"], False, False).train()
    weights = [weight for _, weight in trainable_weights(model)]
    for weight in weights:
        torch.nn.init.normal_(weight, std=0.1)
    return weights


def gradient(causal_lm, weights) -> torch.Tensor:
    hidden = last_hidden(causal_lm)
    return torch.cat([part.flatten() for part in torch.autograd.grad(hidden[..., 0].sum(), weights)])


def test_a_checkpointed_layer_whose_keys_are_shared_can_be_compiled():
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(
        **SIZES, head_dim=16, global_head_dim=16, sliding_window=16, num_kv_shared_layers=1,
        vocab_size_per_layer_input=448, hidden_size_per_layer_input=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    causal_lm = transformers.Gemma4ForCausalLM(config)
    weights = random_adapter(causal_lm, dropout=0.0)
    set_up_layers(decoder_layers(causal_lm), 0)
    plain, before = gradient(causal_lm, weights), counters["stats"]["unique_graphs"]
    set_up_layers(decoder_layers(causal_lm), 3, compile=True)
    compiled = gradient(causal_lm, weights)
    assert counters["stats"]["unique_graphs"] > before
    assert plain.norm() > 1 and torch.allclose(plain, compiled, rtol=1e-4, atol=1e-5)


def test_checkpointed_layers_repeat_their_dropout(hidden_size=64):
    torch.manual_seed(0)
    causal_lm = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES | {"hidden_size": hidden_size})
    )
    weights = random_adapter(causal_lm, dropout=0.3)
    if torch.cuda.is_available():
        causal_lm.cuda()
    found = []
    for checkpointed in (0, 3):
        set_up_layers(decoder_layers(causal_lm), checkpointed, compile=True)
        for _ in range(2):  # tracing draws other numbers
            torch.manual_seed(1)
            last = gradient(causal_lm, weights)
        found.append(last)
    assert found[0].norm() > 1 and torch.allclose(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_checkpointed_layers_repeat_their_dropout_on_a_gpu():
    # Triton 3.6 cannot compile 64 wide layers in float32 ("operand #0 does not dominate this use", a defect
    # of its own); training then falls back to uncompiled layers.
    test_checkpointed_layers_repeat_their_dropout(hidden_size=256)


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QUIET = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
RANDOM = {  # name: (configuration, LoRA dropout, whether its layers draw random numbers)
    "llama": (transformers.LlamaConfig(**SIZES), 0.0, False),
    "llama, LoRA dropout": (transformers.LlamaConfig(**SIZES), 0.1, True),
    "llama, attention dropout": (transformers.LlamaConfig(**SIZES, attention_dropout=0.1), 0.0, True),
    "mixtral": (transformers.MixtralConfig(**SIZES, **EXPERTS), 0.0, False),
    "mixtral, jitter": (transformers.MixtralConfig(**SIZES, **EXPERTS, router_jitter_noise=0.1), 0.0, True),
    "phimoe": (transformers.PhimoeConfig(**SIZES, **EXPERTS), 0.0, True),
    "phimoe, input jitter": (
        transformers.PhimoeConfig(**SIZES, **EXPERTS, **QUIET | {"input_jitter_noise": 0.1}), 0.0, True,
    ),
    "phimoe, no jitter": (transformers.PhimoeConfig(**SIZES, **EXPERTS, **QUIET), 0.0, True),
}  # fmt: skip


@pytest.mark.parametrize("name", RANDOM)
def test_checkpointed_layers_repeat_their_random_numbers(name):
    """Dropout, a router's jitter, and the experts that PhiMoE samples even without jitter."""
    config, dropout, is_random = RANDOM[name]
    torch.manual_seed(0)
    causal_lm = transformers.AutoModelForCausalLM.from_config(config)
    weights = random_adapter(causal_lm, dropout)
    state = torch.get_rng_state()
    assert has_randomness(causal_lm) == is_random
    assert torch.equal(torch.get_rng_state(), state) and causal_lm.training
    found = []
    for checkpointed in (0, 3):
        set_up_layers(decoder_layers(causal_lm), checkpointed, is_random=has_randomness(causal_lm))
        torch.manual_seed(1)
        found.append(gradient(causal_lm, weights))
    assert found[0].norm() > 1 and torch.allclose(*found, rtol=1e-5, atol=1e-5)


def test_layers_of_a_vision_encoder_are_not_decoder_layers():
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=SIZES | {"head_dim": 16}, vision_config=vision)
    with torch.device("meta"):
        model = transformers.Gemma3ForConditionalGeneration(config)
    assert [type(layer).__name__ for layer in decoder_layers(model)] == ["Gemma3DecoderLayer"] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("flags", ["--packing --max_length 64", "", "--packing --max_length 24"])
def test_nothing_is_compiled_after_the_rehearsal_on_a_gpu(run, rows_file, compiled, flags):
    test_nothing_is_compiled_after_the_rehearsal(run, rows_file, compiled, f"{flags} --dtype float16")


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("packs", [[GPU_ROWS[:2], GPU_ROWS[2:]], [[GPU_ROWS[0]], [GPU_ROWS[2]]]])
def test_the_host_does_not_wait_for_the_device_inside_a_micro_batch(packs, compile):
    model, autocast = packed_model(torch.bfloat16)
    assert model.config._attn_implementation == VARLEN
    set_up_layers(decoder_layers(model.get_base_model()), 1, offload=True, compile=compile)
    batch = on_gpu(packs, pack_length=128)

    def micro_batch():
        with autocast():
            loss = -target_logprobs(model, batch, hidden_states).sum()
        loss.backward()

    micro_batch()  # the first time, libraries set themselves up
    run_without_waiting(micro_batch)
