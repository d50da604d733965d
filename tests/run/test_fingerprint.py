"""What a training depends on: hashes of its base, tokenizer and rows, compared on resume."""

import json
from datetime import date

import pytest
from transformers import AutoModelForCausalLM

from qlora.data.tokenize import tokenize_rows
from qlora.errors import InputError
from qlora.run.checkpoint import STATE
from qlora.run.fingerprint import Fingerprint, base_fingerprint, rows_fingerprint, tokenizer_fingerprint
from tests.run.faults import flip_bit


@pytest.fixture
def resume(tmp_path):
    """Begin the fingerprint of a run with these flags, resumed from a checkpoint with the `saved` values."""

    def resume(saved: dict, allowed: tuple[str, ...] = (), **flags) -> Fingerprint:
        state = {"progress": {}, "parameters": [], "scaler": {}, "python_rng": [], "fingerprint": saved}
        (tmp_path / STATE).write_text(json.dumps(state))
        return Fingerprint(tmp_path, flags, list(allowed), sets_shapes=["lora_r"])

    return resume


def test_a_new_run_may_have_any_values():
    fingerprint = Fingerprint(None, {"seed": 1}, allowed=[], sets_shapes=[])
    fingerprint.add(dtype="float32")
    assert fingerprint.values == {"today": str(fingerprint.today), "seed": 1, "dtype": "float32"}


def test_a_resumed_run_keeps_the_day_on_which_it_began(resume):
    assert resume({"today": "2024-02-29"}).today == date(2024, 2, 29)


def test_all_changes_are_named_with_a_remedy(resume):
    saved = {"seed": 1, "rate": 0.1, "base": "a" * 64}
    with pytest.raises(InputError) as error:
        resume(saved, seed=2, rate=0.1, base="b" * 64)
    message = str(error.value)
    assert "was saved with different settings: seed was 1, now it is 2; base is not the same" in message
    assert message.endswith("restore them, or accept the change with --allow_changes seed base")


def test_an_allowed_change_passes_and_is_repeated_in_the_remedy_for_others(resume):
    fingerprint = resume({"seed": 1, "rate": 0.1}, ("seed",), seed=2)
    with pytest.raises(InputError, match=r"rate was 0\.1, now it is 0\.2 - .* --allow_changes seed rate$"):
        fingerprint.add(rate=0.2)


def test_a_change_of_shapes_needs_a_new_run(resume):
    with pytest.raises(InputError, match=r"start a new run from its adapter with --adapter \(.* lora_r\)"):
        resume({"lora_r": 8}, lora_r=16)


def test_a_value_that_the_checkpoint_lacks_is_a_change(resume):
    with pytest.raises(InputError, match="seed was None, now it is 1"):
        resume({}, seed=1)


def test_rows_of_equal_lengths_have_different_fingerprints(tokenizer):
    rows = [
        tokenize_rows([("row 1", {"prompt": prompt, "completion": "yes"})], tokenizer)
        for prompt in ("red leaf", "leaf red", "red leaf")
    ]
    assert rows[0].lengths == rows[1].lengths
    first, second, third = map(rows_fingerprint, rows)
    assert first == third != second


def test_using_a_tokenizer_does_not_change_its_fingerprint(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("a red leaf", padding="max_length", truncation=True, max_length=8)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(tokenizer) != before


def test_every_shard_of_a_base_counts_and_its_version_of_transformers_does_not(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    fingerprints = {base_fingerprint(base), base_fingerprint(str(tmp_path))}
    for shard in shards:
        flip_bit(shard, -100)
        fingerprints.add(base_fingerprint(str(tmp_path)))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_version": "0"}))
    assert base_fingerprint(str(tmp_path)) in fingerprints and len(fingerprints) == 2 + len(shards)
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1.0}))
    assert base_fingerprint(str(tmp_path)) not in fingerprints
