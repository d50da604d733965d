"""Packed rows are, to the model, exactly what they are alone."""

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention as sdpa

import qlora.speed.attention
from qlora.data.batch import collate
from qlora.model.forward import VARLEN, choose_hidden_states, hidden_states
from qlora.model.loss import target_logprobs
from qlora.speed.attention import are_rows_apart, choose_attention, register_varlen
from tests.model.test_loss import MODELS, gradient, lora

OFF = torch.enable_grad  # in place of autocast: a context that changes nothing here


@pytest.fixture(autouse=True)
def varlen_is_registered():
    register_varlen()


def rows_of_ids():
    generator = torch.Generator().manual_seed(0)
    for length in (30, 17, 24, 9, 40):
        ids = torch.randint(3, 128, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3 + 1] = -100
        yield ids, labels


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_have_the_loss_and_the_gradient_of_padded_ones(name):
    model = lora(MODELS[name][0])
    assert choose_attention(model, OFF) is None
    rows, results = list(rows_of_ids()), []
    for packs, pack_length in (([[row] for row in rows], None), ([rows[:2], rows[2:]], 80)):
        loss = -target_logprobs(model, collate(packs, 0, pack_length), choose_hidden_states(model)).sum()
        loss.backward()
        results.append((loss.item(), gradient(model)))
    (want_loss, want), (got_loss, got) = results
    assert got_loss == pytest.approx(want_loss, rel=1e-5)
    assert (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("name", MODELS)
def test_a_changed_token_of_one_row_leaves_the_others_bit_identical(name):
    model = lora(MODELS[name][0]).eval()
    rows = list(rows_of_ids())
    changed = [(row[0].clone(), row[1]) for row in rows]
    changed[1][0][4] += 1
    hidden = []
    for pack in (rows, changed):
        batch = collate([pack], pad_id=0, pack_length=128)
        decoder = model.get_base_model().get_decoder()
        with torch.no_grad():
            output = decoder(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        hidden.append(output.last_hidden_state[0].split([30, 17, 24, 9, 40, 8]))
    same = [torch.equal(left, right) for left, right in zip(*hidden)]
    assert same == [True, False, True, True, True, True]


def test_a_model_that_cannot_keep_rows_apart_is_not_packed():
    """A recurrent model carries its state from row to row."""
    config = transformers.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8)
    reason = choose_attention(lora(config, target_modules=["in_proj"]), OFF)
    assert reason.startswith("rows see each other with ")


def test_a_trial_that_fails_leaves_the_model_as_it_was_and_says_why(monkeypatch):
    def fail(*_):
        raise RuntimeError("no kernel for this GPU")

    model = lora(MODELS["llama"][0]).train()
    monkeypatch.setattr(qlora.speed.attention, "are_rows_apart", fail)
    assert choose_attention(model, OFF) == "sdpa: no kernel for this GPU"
    assert all(module.training for module in model.modules())
    assert model.get_base_model().config._attn_implementation == "sdpa"


def reference_varlen(query, key, value, starts, _, longest, __, scale, window_size):
    """torch's varlen_attn, row by row."""
    mixed = torch.empty_like(query)
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist()):
        rows = [states[start:end].transpose(0, 1) for states in (query, key, value)]
        if end > start:
            mixed[start:end] = sdpa(*rows, is_causal=True, scale=scale).transpose(0, 1)
    return mixed


@pytest.mark.parametrize("name", ["llama", "qwen2, tied", "phi, biased head"])
def test_variable_length_attention_equals_the_models_own(name, monkeypatch):
    monkeypatch.setattr(qlora.speed.attention, "varlen_attn", reference_varlen)
    model = lora(MODELS[name][0]).eval()
    causal_lm = model.get_base_model()
    assert are_rows_apart(causal_lm, VARLEN, "sdpa", OFF)
    rows = list(rows_of_ids())
    batch = collate([rows[:2], rows[2:]], pad_id=0, pack_length=80)
    padded = collate([[row] for row in rows], pad_id=0)
    results = []
    for implementation in (VARLEN, "sdpa"):
        causal_lm.set_attn_implementation(implementation)
        with torch.no_grad():
            results += [target_logprobs(model, each, hidden_states).sum().item() for each in (batch, padded)]
    assert results == pytest.approx([results[0]] * 4, rel=1e-5)


@pytest.mark.parametrize("name", ["mistral, sliding window", "gemma2, soft-capped"])
def test_windowed_attention_is_refused_by_variable_length_attention(name, monkeypatch):
    monkeypatch.setattr(qlora.speed.attention, "varlen_attn", reference_varlen)
    causal_lm = lora(MODELS[name][0]).eval().get_base_model()
    with pytest.raises(ValueError, match="more than a causal mask"):
        are_rows_apart(causal_lm, VARLEN, causal_lm.config._attn_implementation, OFF)


def test_a_model_with_variable_length_attention_generates_from_padded_prompts(monkeypatch):
    monkeypatch.setattr(qlora.speed.attention, "varlen_attn", None)  # not to be called
    causal_lm = lora(MODELS["llama"][0]).eval().get_base_model()
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    answers = []
    for implementation in (VARLEN, "sdpa"):
        causal_lm.set_attn_implementation(implementation)
        answers.append(
            causal_lm.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=8, do_sample=False)
        )
    assert torch.equal(*answers)
