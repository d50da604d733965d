"""The summed, chunked loss against transformers' own, for heads of every kind."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import qlora.model.loss
from qlora.data.batch import collate
from qlora.model.loss import has_plain_head, next_token_loss

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


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_those_of_the_model_itself(name, monkeypatch):
    monkeypatch.setattr(qlora.model.loss, "LOGITS", 7 * 128)  # several chunks of 7, the last one short
    monkeypatch.setattr(qlora.model.loss, "MIN_CHUNK", 1)
    config, is_plain = MODELS[name]
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert has_plain_head(model) == is_plain
    examples = list(rows())
    batch = collate([[row] for row in examples], pad_id=0)

    def gradients():
        grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
        model.zero_grad()
        return torch.cat([grad.flatten() for grad in grads])

    loss = next_token_loss(model, batch, is_plain)
    (3 * loss).backward()  # as divided by a count, or scaled for float16
    got = gradients() / 3

    input_ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in examples], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence([labels for _, labels in examples], True, -100)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids, _ in examples], batch_first=True)
    targets = int((labels[:, 1:] != -100).sum())
    want_loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss * targets
    want_loss.backward()
    want = gradients()
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-5)
    assert (got - want).norm() < 1e-5 * want.norm()


def test_a_trained_head_gets_its_gradient():
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(MODELS["llama"][0])
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "lm_head"]))
    assert has_plain_head(model)
    next_token_loss(model, collate([[row] for row in rows()], pad_id=0), plain_head=True).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if "lm_head.lora_B" in name}
    assert all(grad.any() for grad in grads.values()) and grads
