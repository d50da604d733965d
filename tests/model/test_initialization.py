"""Initial LoRA weights: what each method promises, and a base that keeps its weights."""

import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors.torch import load_file

import qlora.model.initialization as initialization
from qlora.data.formatting import Formatting
from qlora.data.tokenize import tokenize_window
from qlora.errors import InputError
from qlora.model.adapter import add_adapter, save_adapter
from qlora.model.base import load_base, load_tokenizer
from qlora.model.initialization import initialize_adapter
from tests.conftest import ROWS

R, ALPHA = 4, 8  # a scale of 2
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def rows(base):
    located = [(f"row {number}", row) for number, row in enumerate(ROWS)]
    return tokenize_window(located, load_tokenizer(base), Formatting("prompt_completion")).cut(64)


def new_adapter(base: str, method: str, rows, **options):
    model = load_base(base, torch.float32, torch.device("cpu"), **options)
    torch.manual_seed(0)
    model = add_adapter(model, R, ALPHA, 0.1, ["all-linear"], False, False).train()
    before = {name: weight.clone() for name, weight in model.named_parameters() if "lora_" not in name}
    initialize_adapter(model, method, base, rows)
    for name, weight in before.items():
        assert torch.equal(model.get_parameter(name), weight), name
    assert model.training
    return model


def factors(model, name: str = LAYER) -> tuple[torch.Tensor, torch.Tensor]:
    layer = model.get_base_model().get_submodule(name)
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def test_gaussian_draws_a_with_a_deviation_of_one_over_r(base, rows):
    model = new_adapter(base, "gaussian", rows)
    a = torch.cat([factors(model, f"model.layers.{n}.mlp.down_proj")[0].flatten() for n in (0, 1)])
    assert a.std().item() == pytest.approx(1 / R, rel=0.1) and not factors(model)[1].any()
    assert torch.equal(factors(new_adapter(base, "gaussian", rows))[0], factors(model)[0])


def test_loftq_wins_back_as_much_of_each_weight_as_its_rank_allows(base, rows):
    model = new_adapter(base, "loftq", rows)
    files = load_file(f"{base}/model.safetensors")
    for name in (LAYER, "model.layers.0.self_attn.k_proj"):
        weight = model.get_base_model().get_submodule(name).base_layer.weight
        lost = files[f"{name}.weight"] - dequantize_4bit(weight, weight.quant_state)
        a, b = factors(model, name)
        rest = (lost - ALPHA / R * b @ a).norm()
        smallest = torch.linalg.svdvals(lost.double())[R:].square().sum().sqrt().item()  # Eckart-Young
        assert rest.item() == pytest.approx(smallest, rel=1e-4)
        assert smallest < 0.95 * lost.norm().item()


def test_qera_brings_the_outputs_as_close_as_its_rank_allows(base, rows, monkeypatch):
    """Of all updates of this rank, none has outputs nearer to the original weight's on these inputs."""
    monkeypatch.setattr(initialization, "MOMENTS_BYTES", 70_000)  # in several passes over the rows
    model = new_adapter(base, "qera", rows)
    layer = model.get_base_model().get_submodule(LAYER)
    inputs = []
    layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach()[0]))
    model.get_base_model().eval()
    with model.disable_adapter():
        for number in range(len(rows)):
            model(input_ids=rows[number][0][None])
    inputs = torch.cat(inputs).double()
    weight = layer.base_layer.weight
    lost = load_file(f"{base}/model.safetensors")[f"{LAYER}.weight"] - dequantize_4bit(
        weight, weight.quant_state
    )
    wrong = (lost.double() @ inputs.T).norm().item()
    smallest = torch.linalg.svdvals(lost.double() @ inputs.T)[R:].square().sum().sqrt().item()  # Eckart-Young
    left = {}
    for method, (a, b) in (("qera", factors(model)), ("loftq", factors(new_adapter(base, "loftq", rows)))):
        left[method] = ((lost - ALPHA / R * b @ a).double() @ inputs.T).norm().item()
    assert left["qera"] == pytest.approx(smallest, rel=1e-3)
    assert smallest * 1.02 < left["loftq"] < wrong


def test_eva_spans_the_directions_in_which_the_inputs_vary(base, rows):
    model = new_adapter(base, "eva", rows)
    inputs = []
    layer = model.get_base_model().get_submodule(LAYER)
    layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach()[0]))
    for number in range(len(rows)):
        ids, labels = rows[number]
        length = len(inputs)
        model.eval()(input_ids=ids[None])
        inputs[length:] = [inputs[length][labels != -100]]  # EVA looks at the positions of targets only
    inputs = torch.cat(inputs)
    a, b = factors(model)
    assert not b.any() and torch.allclose(a @ a.T, torch.eye(R), atol=1e-4)
    centered = inputs - inputs.mean(0)
    best = torch.linalg.svdvals(centered)[:R].square().sum()
    assert (centered @ a.T).square().sum() > 0.9 * best
    random = torch.linalg.qr(torch.randn(a.shape[1], R))[0]
    assert (centered @ random).square().sum() < 0.5 * best


@pytest.mark.parametrize("method", ["gaussian", "loftq", "qera", "eva"])
def test_the_adapter_loads_as_any_other(base, rows, tmp_path, method):
    model = new_adapter(base, method, rows)
    save_adapter(tmp_path, model, load_tokenizer(base), {})
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    loaded = PeftModel.from_pretrained(load_base(base, torch.float32, torch.device("cpu")), tmp_path)
    ids = torch.tensor([[1, 300, 301, 302]])
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_loftq_needs_the_original_weights(base, rows, tmp_path):
    load_base(base, torch.float32, torch.device("cpu")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"--init_lora_weights needs original weights: .* is already 4-bit"):
        new_adapter(str(tmp_path), "loftq", rows)
