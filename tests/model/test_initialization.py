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
from qlora.model.base import load_base, load_config, load_tokenizer
from qlora.model.initialization import check_initialization, initialize_adapter, second_moments
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


def test_loftq_corrects_as_much_of_each_weight_as_its_rank_allows(base, rows):
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


def test_second_moments_are_means_over_the_tokens_of_rows_of_any_length(base, rows):
    model = new_adapter(base, "default", rows)
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", LAYER]
    moments = second_moments(model, set(names), rows.fetch(range(20)))
    inputs = {name: [] for name in names}
    for name in names:
        model.get_base_model().get_submodule(name).register_forward_hook(
            lambda module, args, output, seen=inputs[name]: seen.append(args[0].detach()[0].double())
        )
    for number in range(20):
        model.eval()(input_ids=rows[number][0][None])
    for name in names:
        x = torch.cat(inputs[name])
        assert torch.allclose(moments[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("method", ["gaussian", "loftq", "qera"])
def test_the_adapter_loads_as_any_other(base, rows, tmp_path, method):
    model = new_adapter(base, method, rows)
    save_adapter(tmp_path, model, load_tokenizer(base), {})
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    loaded = PeftModel.from_pretrained(load_base(base, torch.float32, torch.device("cpu")), tmp_path)
    ids = torch.tensor([[1, 300, 301, 302]])
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_base_that_is_already_quantized_is_refused(base, tmp_path):
    load_base(base, torch.float32, torch.device("cpu")).save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    for method in ("loftq", "qera"):
        with pytest.raises(InputError, match=f"--init_lora_weights {method} needs the original weights, and"):
            check_initialization(method, str(tmp_path), config)
        check_initialization(method, base, load_config(base))
    check_initialization("gaussian", str(tmp_path), config)
