"""Log-probabilities of targets and their gradients against transformers' own, for heads of every kind."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn.functional import log_softmax

import qlora.model.loss
from qlora.data.batch import collate
from qlora.errors import InputError
from qlora.model.forward import choose_hidden_states, decoder, has_plain_head, hidden_states
from qlora.model.loss import target_logprobs

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MODELS = {  # name: (configuration, whether logits are head(hidden states))
    "llama": (transformers.LlamaConfig(**SIZES), True),
    "mistral, sliding window": (transformers.MistralConfig(**SIZES, sliding_window=8), True),
    "qwen2, tied": (transformers.Qwen2Config(**SIZES, tie_word_embeddings=True), True),
    "gemma2, soft-capped": (
        transformers.Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=5.0),
        False,
    ),
    "cohere, scaled": (transformers.CohereConfig(**SIZES, logit_scale=0.25), False),
    "phi, biased head": (transformers.PhiConfig(**SIZES), True),
    "gpt2": (
        transformers.GPT2Config(
            vocab_size=128,
            n_embd=64,
            n_layer=2,
            n_head=4,
            pad_token_id=0,
            resid_pdrop=0,
            attn_pdrop=0,
            embd_pdrop=0,
        ),
        True,
    ),
}


def rows():
    generator = torch.Generator().manual_seed(0)
    for length, prompt in ((30, 10), (17, 1), (24, 20)):
        ids = torch.randint(3, 128, (length,), generator=generator)
        labels = ids.clone()
        labels[:prompt] = -100
        yield ids, labels


def lora(config, **options):
    """A model with LoRA matrices that are not 0; `config` is left as it is."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
    options = {"target_modules": "all-linear", "init_lora_weights": False} | options
    return get_peft_model(base, LoraConfig(**options))


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of 7 targets, the last one short."""
    monkeypatch.setattr(qlora.model.loss, "LOGITS_PER_CHUNK", 7 * 128)
    monkeypatch.setattr(qlora.model.loss, "MIN_CHUNK", 1)


def gradient(model) -> torch.Tensor:
    """The gradient of all trained weights, which is set to 0."""
    grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return torch.cat(grads)


def reference_logprobs(model, examples) -> torch.Tensor:
    """The log-probability of each target by the model's own forward pass over each row alone."""
    found = []
    for ids, labels in examples:
        each = log_softmax(model(input_ids=ids[None]).logits[0, :-1], dim=-1).gather(1, ids[1:, None])[:, 0]
        found.append(each[labels[1:] != -100])
    return torch.cat(found)


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_and_gradient_are_those_of_the_model_itself(name, small_chunks):
    config, is_plain = MODELS[name]
    model = lora(config)
    assert has_plain_head(model) == is_plain and (choose_hidden_states(model) is not None) == is_plain
    examples = list(rows())
    batch = collate([[row] for row in examples], pad_id=0)
    weights = torch.rand(len(batch["target_ids"]))  # a gradient of its own for each target

    got = target_logprobs(model, batch, choose_hidden_states(model))
    (3 * weights * got).sum().backward()
    got_gradient = gradient(model) / 3
    want = reference_logprobs(model, examples)
    (weights * want).sum().backward()
    want_gradient = gradient(model)
    assert got.dtype == torch.float32 and got.shape == weights.shape
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    assert (got_gradient - want_gradient).norm() < 1e-5 * want_gradient.norm()


def test_the_decoder_of_llama_4_is_found():
    """For transformers the whole model is its own decoder."""
    config = transformers.Llama4TextConfig(
        **SIZES, head_dim=16, intermediate_size_mlp=128, num_local_experts=2, num_experts_per_tok=1
    )
    model = lora(config, target_modules=["q_proj", "v_proj"])
    causal_lm = model.get_base_model()
    assert causal_lm.get_decoder() is causal_lm and decoder(causal_lm) is causal_lm.model
    assert has_plain_head(model)
    examples = list(rows())
    got = target_logprobs(model, collate([[row] for row in examples], 0), choose_hidden_states(model))
    assert torch.allclose(got, reference_logprobs(model, examples), rtol=1e-5, atol=1e-6)
    causal_lm.decoding = causal_lm._modules.pop("model")
    with pytest.raises(InputError, match="Llama4ForCausalLM is not supported: its decoder"):
        decoder(causal_lm)


@pytest.mark.parametrize("name", MODELS)
def test_the_sum_is_the_loss_of_transformers(name, small_chunks):
    model = lora(MODELS[name][0])
    examples = list(rows())
    got = -target_logprobs(model, collate([[row] for row in examples], 0), choose_hidden_states(model)).sum()
    input_ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in examples], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence([labels for _, labels in examples], True, -100)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids, _ in examples], batch_first=True)
    targets = int((labels[:, 1:] != -100).sum())
    want = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss * targets
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_a_trained_head_gets_its_gradient(small_chunks):
    model = lora(MODELS["llama"][0], target_modules=["q_proj", "lm_head"])
    assert has_plain_head(model)
    examples = list(rows())
    got = target_logprobs(model, collate([[row] for row in examples], pad_id=0), hidden_states)
    got.sum().backward()
    got_gradient = gradient(model)
    want = reference_logprobs(model, examples)
    want.sum().backward()
    want_gradient = gradient(model)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    assert (got_gradient - want_gradient).norm() < 1e-5 * want_gradient.norm()


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_a_batch_without_a_target_has_no_logprobs(targets):
    model = lora(MODELS["llama"][0], target_modules=targets)
    ids = torch.arange(3, 9)
    batch = collate([[(ids, torch.full_like(ids, -100))]], pad_id=0)
    logprobs = target_logprobs(model, batch, hidden_states)
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
