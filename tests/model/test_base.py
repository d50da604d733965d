"""Loading the base and its tokenizer: no adapter comes with it unasked, and only the base's own code runs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import generate
import train
from qlora.errors import InputError
from qlora.model.base import load_base, load_config, load_tokenizer
from tests.conftest import ROWS

# ---------------------------------------------------------------- an adapter in the base's folder


@pytest.fixture
def adapter_in_base(base, tmp_path) -> Path:
    """A copy of the base's folder into which an adapter with random weights was saved."""
    folder = shutil.copytree(base, tmp_path / "model")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def test_a_base_folder_with_an_adapter_in_it_is_refused(adapter_in_base, base):
    names = AutoModelForCausalLM.from_pretrained(adapter_in_base).state_dict()
    assert any("lora_A" in name for name in names)  # what transformers does with it, without a word
    with pytest.raises(InputError, match=r"--model .*model has an adapter_config.json.* --adapter .*model"):
        load_config(str(adapter_in_base))
    with pytest.raises(InputError, match=r"has an adapter_config.json"):
        load_base(str(adapter_in_base), torch.float32, torch.device("cpu"))
    assert load_config(base).vocab_size == 448


def test_an_adapter_given_as_the_base_is_refused(adapter, rows_file, tmp_path, capsys):
    _, folder = adapter
    message = r"give the base alone with --model, and this one with --adapter"
    flags = ["--model", folder, "--dataset", rows_file, "--output_dir", str(tmp_path / "out")]
    for main, argv in ((train.main, flags), (generate.main, ["--model", folder, "--prompt", "What?"])):
        with pytest.raises(SystemExit, match=message):
            main(argv)


def test_a_hub_repository_with_an_adapter_is_refused(adapter_in_base, tmp_path, monkeypatch):
    """From the hub's cache, laid out as by hf_hub_download; the network is not used."""
    snapshot = tmp_path / "hub" / "models--someone--model" / "snapshots" / ("0" * 40)
    shutil.copytree(adapter_in_base, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(InputError, match=r"--model someone/model has an adapter_config.json"):
        load_config("someone/model")
    (snapshot / "adapter_config.json").unlink()
    assert load_config("someone/model").vocab_size == 448


# ---------------------------------------------------------------- remote code

# A tokenizer with code of its own, which leaves a file behind when it runs.
TOKENIZER_CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({marker!r}).touch()
class {name}(PreTrainedTokenizerFast):
    pass
"""


def add_code(folder: Path, name: str, marker: Path) -> None:
    """Give a folder's tokenizer code of its own, whose class is called `name`."""
    (folder / f"{name}_code.py").write_text(TOKENIZER_CODE.format(marker=str(marker), name=name))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": name}
    path.write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": [None, f"{name}_code.{name}"]}}))


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Where transformers copies remote code to before it runs it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])


@pytest.fixture
def own_adapter(adapter, tmp_path) -> Path:
    """A copy of the adapter that a test may change."""
    return shutil.copytree(adapter[1], tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoint-*"))


def test_the_adapters_tokenizer_code_never_runs(base, own_adapter, modules_cache, tmp_path):
    add_code(own_adapter, "Stranger", tmp_path / "stranger")
    AutoTokenizer.from_pretrained(own_adapter, trust_remote_code=True)
    assert (tmp_path / "stranger").exists()  # the code works
    (tmp_path / "stranger").unlink()
    for name in [name for name in sys.modules if name.endswith("Stranger_code")]:
        del sys.modules[name]
    with pytest.raises(InputError, match=r"cannot load .*adapter.* contains custom code"):
        load_tokenizer(base, str(own_adapter), trust_remote_code=True)
    assert not (tmp_path / "stranger").exists()


def test_a_base_whose_tokenizer_is_remote_code_is_asked_with_the_adapters_chat_template(
    base, own_adapter, modules_cache, tmp_path
):
    model = shutil.copytree(base, tmp_path / "model")
    add_code(model, "Own", tmp_path / "own")
    add_code(own_adapter, "Stranger", tmp_path / "stranger")
    question = ROWS[0]["prompt"]
    want = load_tokenizer(base)(question)["input_ids"]

    def load():
        return load_tokenizer(str(model), str(own_adapter), trust_remote_code=True)

    assert type(load()).__name__ == "Own" and load()(question)["input_ids"] == want
    assert load().chat_template is None
    (own_adapter / "chat_template.jinja").write_text("{{ messages }}")
    assert load().chat_template == "{{ messages }}"
    (own_adapter / "additional_chat_templates").mkdir()
    (own_adapter / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert load().chat_template == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    assert (tmp_path / "own").exists() and not (tmp_path / "stranger").exists()
    with pytest.raises(InputError, match="contains custom code"):
        load_tokenizer(str(model), str(own_adapter))


def test_without_code_of_its_own_an_adapter_brings_its_whole_tokenizer(base, own_adapter):
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<of the adapter>"])
    tokenizer.save_pretrained(own_adapter)
    for is_trusted in (False, True):
        loaded = load_tokenizer(base, str(own_adapter), trust_remote_code=is_trusted)
        assert "<of the adapter>" in loaded.get_vocab()
