"""A sharded base computes what the whole one does, bit for bit, and each rank holds only its part of it.

All checks run in the same ranks, so that imports and models are paid for once. The tests look up how each
check went.
"""

import json
import re
import traceback
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

import qlora.speed.layers
from qlora import ranks
from qlora.errors import InputError
from qlora.model.adapter import add_adapter, load_adapter
from qlora.model.base import FLAT, base_memory_bytes, count_frozen, load_base, quantized_share
from qlora.model.forward import decoder, without_adapter
from qlora.model.weights import Weights
from qlora.speed.layers import decoder_layers, set_up_layers
from qlora.speed.nf4 import ShardedLinear4bit, fuse_linears, plain_state
from qlora.speed.sharding import forget_failed_pass, load_sharded_base
from tests.ranks import start

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
INV_FREQ = "self_attn.rotary_emb.inv_freq"
SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "grouped queries": transformers.LlamaConfig(**SIZES),
    "tied embeddings": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "biased": transformers.Qwen2Config(**SIZES),
    # The name of the second layer is the beginning of that of the last one.
    "eleven layers": transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 11}, tie_word_embeddings=True),
}
STORED_IN_4_BITS = "stored in 4 bits"
RANKS = {2: [*CONFIGS, STORED_IN_4_BITS], 3: ["grouped queries", "tied embeddings"]}  # models tried with each
CPU = torch.device("cpu")


def save(folder: Path, name: str) -> Path:
    """Write a model of random weights, all different, as several files."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    model.save_pretrained(folder / name, max_shard_size="100KB")
    return folder / name


def edit(model: Path, change) -> None:
    """Change a model's tensors, and write them as one file."""
    tensors = {}
    for file in model.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def save_all(folder: Path) -> None:
    for name in CONFIGS:
        save(folder, name)
    whole = load_base(str(folder / "grouped queries"), torch.bfloat16, CPU)
    whole.save_pretrained(folder / STORED_IN_4_BITS)
    # As in the files of Llama 2, and in those of models that were saved without their head's class.
    edit(
        folder / "grouped queries",
        lambda tensors: tensors.update({f"model.layers.0.{INV_FREQ}": torch.ones(8)}),
    )
    edit(folder / "biased", without_prefix)
    edit(folder / "eleven layers", with_tied_head)


def without_prefix(tensors: dict) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def with_tied_head(tensors: dict) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def options(name: str) -> dict:
    """How a model is loaded."""
    if name == "tied embeddings":
        return {"dtype": torch.float32, "device": CPU, "quant_type": "fp4", "double_quant": False}
    return {"dtype": torch.bfloat16, "device": CPU}


@cache
def bases(folder: Path, name: str) -> tuple:
    """(whole, sharded) bases, each with the same adapter."""
    path = str(folder / name)
    loaded = load_base(path, **options(name)), load_sharded_base(path, **options(name))
    assert not any(base.training for base in loaded)
    return tuple(map(with_adapter, loaded))


def with_adapter(base):
    torch.manual_seed(0)
    model = add_adapter(base, 4, 8, 0.0, ["all-linear"], use_rslora=False, use_dora=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def input_ids() -> torch.Tensor:
    """Of this rank: all have other rows."""
    return torch.arange(24).view(2, 12) + 7 * dist.get_rank()


def loss_and_gradients(model, checkpointed: int) -> dict[str, torch.Tensor]:
    set_up_layers(decoder_layers(without_adapter(model)), checkpointed)
    return pass_through(model)


def pass_through(model) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(input_ids=input_ids(), labels=input_ids()).loss
    loss.backward()
    results = {name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"loss": loss}
    model.zero_grad(set_to_none=True)
    assert_at_rest(model)
    return results


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    assert all(value.abs().sum() > 0 for value in theirs.values())
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def assert_at_rest(model) -> None:
    """Between passes no rank holds more than its part of any layer."""
    for layer in decoder_layers(without_adapter(model)):
        if isinstance(layer, FSDPModule):
            assert isinstance(getattr(layer, FLAT), DTensor)
            group = layer._get_fsdp_state()._fsdp_param_group
            gathered = [t for p in group.fsdp_params for t in p.all_gather_outputs]
            assert sum(tensor.untyped_storage().size() for tensor in gathered) == 0


def check_weights(folder: Path, name: str) -> None:
    """The quantized weights have the same bits; everything else has the same names and values."""
    whole, sharded = bases(folder, name)
    other_linears = dict(whole.named_modules())
    linears = {n: m for n, m in sharded.named_modules() if isinstance(m, ShardedLinear4bit)}
    assert len(linears) == 7 * sharded.config.num_hidden_layers
    for layer in decoder_layers(without_adapter(sharded)):
        content = getattr(layer, FLAT).full_tensor().view(torch.uint8)
        for name, linear in linears.items():
            if linear.layer[0] is layer:
                *parts, blocks, round_to = plain_state(other_linears[name].weight)
                assert (linear.blocks, linear.round_to) == (blocks, round_to)
                for part, start, end in zip(parts, linear.places[::2], linear.places[1::2], strict=True):
                    assert start % 16 == 0
                    assert torch.equal(part.contiguous().view(torch.uint8), content[start:end])
    kept = {n: p for n, p in sharded.named_parameters() if p.numel() and not n.endswith(FLAT)}
    for name, parameter in kept.items():
        value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        other = whole.get_parameter(name)
        assert torch.equal(value, other) and value.dtype == other.dtype
        assert parameter.requires_grad == other.requires_grad
    others = {n for n, p in whole.named_parameters() if not hasattr(p, "quant_state")}
    assert kept.keys() == others
    for name, buffer in whole.named_buffers():
        assert torch.equal(sharded.get_buffer(name), buffer)


def check_settings(folder: Path, name: str) -> None:
    """What PEFT, transformers and this project read from a base."""
    whole, sharded = (without_adapter(model) for model in bases(folder, name))
    assert sharded.config.to_dict() == whole.config.to_dict()
    assert sharded.config._attn_implementation == whole.config._attn_implementation
    assert sharded.generation_config.to_dict() == whole.generation_config.to_dict()
    assert sharded.name_or_path == whole.name_or_path and sharded.is_loaded_in_4bit
    assert sharded.device == whole.device
    with_whole, with_sharded = bases(folder, name)
    assert with_sharded.peft_config["default"].to_dict() == with_whole.peft_config["default"].to_dict()
    assert [type(m) for m in with_whole.modules() if "peft" in str(type(m))] == [
        type(m) for m in with_sharded.modules() if "peft" in str(type(m))
    ]
    assert fuse_linears(with_sharded) == "bitsandbytes"


def check_memory(folder: Path, name: str) -> None:
    """Each rank holds its part, and the counts know the weights that it does not hold."""
    whole, sharded = bases(folder, name)
    assert count_frozen(sharded) == count_frozen(whole)
    assert quantized_share(sharded) == quantized_share(whole)
    parts = [getattr(layer, FLAT) for layer in decoder_layers(without_adapter(sharded))]
    if name != "tied embeddings":
        parts.append(without_adapter(sharded).get_input_embeddings().weight)
    held = sum(part.to_local().nbytes for part in parts)
    assert held == pytest.approx(sum(part.nbytes for part in parts) / dist.get_world_size(), rel=0.02)
    others = [p for p in sharded.parameters() if not p.requires_grad and not isinstance(p, DTensor)]
    assert base_memory_bytes(sharded) == held + sum(parameter.nbytes for parameter in others)
    assert_at_rest(sharded)


def check_training(folder: Path, name: str) -> None:
    whole, sharded = bases(folder, name)
    for checkpointed in (0, len(decoder_layers(without_adapter(whole))) - 1):
        assert_same(loss_and_gradients(sharded, checkpointed), loss_and_gradients(whole, checkpointed))


def check_evaluation(folder: Path, name: str) -> None:
    """Without gradients, through the causal LM and through its decoder, and between two training steps."""
    results = []
    for model in bases(folder, name):
        model.eval()
        causal_lm = without_adapter(model)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=input_ids()).logits
            hidden = decoder(causal_lm)(input_ids=input_ids(), use_cache=False).last_hidden_state
        assert_at_rest(model)
        results.append({"logits": logits, "hidden": hidden} | loss_and_gradients(model, 0))
    assert_same(*results)


def check_generation(folder: Path, name: str) -> None:
    """Greedy answers with a cache; the first rank's are shorter, and it goes on gathering for the others."""
    answers = []
    for model in bases(folder, name):
        model.eval()
        ids, new_tokens = input_ids(), 3 + 2 * dist.get_rank()
        options = {"max_new_tokens": new_tokens, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        answers.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options))
        assert_at_rest(model)
    assert answers[0].tolist() == answers[1].tolist() and answers[0].shape[1] > ids.shape[1]


CHECKS = [check_weights, check_settings, check_memory, check_training, check_evaluation, check_generation]


def check_compiled(folder: Path) -> None:
    """Compiled and checkpointed layers have the gradients of plain ones."""
    whole, sharded = bases(folder, "biased")
    qlora.speed.layers.COMPILER = "aot_eager"  # trace only
    layers = decoder_layers(without_adapter(sharded))
    set_up_layers(layers, 0)
    set_up_layers(layers[1:], len(layers), compile=True)  # the first would be compiled apart
    assert_same(pass_through(sharded), loss_and_gradients(whole, 0))
    assert counters["stats"]["unique_graphs"] == 1


def check_offloaded(folder: Path) -> None:
    """With the parts in host memory."""
    sharded = with_adapter(load_sharded_base(str(folder / "biased"), **options("biased"), cpu_offload=True))
    for layer in decoder_layers(without_adapter(sharded)):
        assert isinstance(layer._get_fsdp_state()._fsdp_param_group.offload_policy, CPUOffloadPolicy)
    whole, _ = bases(folder, "biased")
    assert_same(loss_and_gradients(sharded, 0), loss_and_gradients(whole, 0))


def check_reading(folder: Path) -> None:
    """Each rank reads its share of the 4-bit weights, and all of what it keeps whole."""
    read, tensor = [], Weights.tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weights, "tensor", lambda self, name: read.append(name) or tensor(self, name))
        load_sharded_base(str(folder / "eleven layers"), **options("eleven layers"))
    in_4bit = [name for name in read if "_proj" in name]
    assert len(set(in_4bit)) == len(in_4bit) == 11 * [4, 3][dist.get_rank()]
    assert len([name for name in read if "layernorm" in name]) == 11 * 2


def check_saved_adapter(folder: Path) -> None:
    """One rank alone saves the adapter; all load it."""
    whole, sharded = bases(folder, "biased")
    saved = folder / "adapter"
    if dist.get_rank() == 0:
        sharded.save_pretrained(saved, save_embedding_layers=False)
    dist.barrier()
    loaded = load_sharded_base(str(folder / "biased"), **options("biased"))
    assert_same(
        loss_and_gradients(load_adapter(loaded, str(saved), is_trainable=True), 0),
        loss_and_gradients(whole, 0),
    )


def check_failed_pass(folder: Path) -> None:
    """An error in a pass, such as memory that runs out, leaves nothing behind."""
    whole, sharded = bases(folder, "biased")
    before = loss_and_gradients(sharded, 0)
    layer = decoder_layers(without_adapter(sharded))[1]
    for fails in (lambda module, inputs, output: fail(), lambda module, inputs, output: fail_later(output)):
        hook = layer.register_forward_hook(fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            pass_through(sharded)
        hook.remove()
        sharded.zero_grad(set_to_none=True)
        forget_failed_pass(sharded)
        assert_at_rest(sharded)
        assert_same(pass_through(sharded), before)
    forget_failed_pass(whole)  # not sharded: nothing to do


def fail(grad=None):
    raise RuntimeError("CUDA out of memory")


def fail_later(output) -> None:
    """In the backward pass."""
    output.register_hook(fail)


SINGLE_CHECKS = [check_compiled, check_offloaded, check_reading, check_saved_adapter, check_failed_pass]


def run_checks(folder: str) -> None:
    """In every rank: write how each check went."""
    with ranks.connected(timeout_seconds=20):
        went, count = {}, ranks.count()
        jobs = [
            (f"{check.__name__} {name}", check, (Path(folder), name))
            for name in RANKS[count]
            for check in CHECKS
        ]
        jobs = [job for job in jobs if "eleven" not in job[0] or job[1] is check_weights]
        if count == 2:
            jobs += [(check.__name__, check, (Path(folder),)) for check in SINGLE_CHECKS]
        for title, check, arguments in jobs:
            try:
                check(*arguments)
                went[title] = "passed"
            except Exception:
                went[title] = traceback.format_exc()
        Path(folder, f"went-{count}-{ranks.number()}.json").write_text(json.dumps(went))


@pytest.fixture(scope="module")
def went(launcher, tmp_path_factory) -> dict[str, list[str]]:
    """How each check went on each rank, by its name and the number of ranks."""
    folder = tmp_path_factory.mktemp("sharding")
    save_all(folder)
    went = {}
    for count in RANKS:
        job = "tests.speed.test_sharding:run_checks"
        run = start(launcher, count, job, str(folder), log=folder / f"{count}.log")
        assert run.wait() == [0] * count, run.output()
        for rank in range(count):
            outcomes = json.loads((folder / f"went-{count}-{rank}.json").read_text())
            for title, outcome in outcomes.items():
                went.setdefault(f"{title} {count}", []).append(outcome)
    return went


PAIRS = [(count, name) for count, names in RANKS.items() for name in names if name != "eleven layers"]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("count, name", PAIRS)
def test_sharded_and_whole_are_the_same(went, check, name, count):
    assert went[f"{check.__name__} {name} {count}"] == ["passed"] * count


def test_names_that_begin_alike_are_told_apart(went):
    assert went["check_weights eleven layers 2"] == ["passed"] * 2


@pytest.mark.parametrize("check", SINGLE_CHECKS, ids=lambda check: check.__name__)
def test_sharded(went, check):
    assert went[f"{check.__name__} 2"] == ["passed"] * 2


def lose(tensors: dict) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors: dict) -> None:
    tensors["model.layers.1.mlp.router.weight"] = torch.ones(4)


def halve(tensors: dict) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][::2].clone()


def untie(tensors: dict) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("grouped queries", lose, "lacks model.layers.1.mlp.up_proj.weight"),
        ("grouped queries", add, "has model.layers.1.mlp.router.weight in its files, which LlamaForCausalLM"),
        ("grouped queries", halve, "of shape (64, 64) in its files, not (128, 64)"),
        ("tied embeddings", untie, "another lm_head.weight than model.embed_tokens.weight"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, name, change, message):
    model = save(tmp_path, name)
    edit(model, change)
    with pytest.raises(InputError, match=f"--shard: .*{re.escape(message)}.*: leave out --shard"):
        load_sharded_base(str(model), torch.bfloat16, CPU)


def test_a_4_bit_weight_without_its_state_is_refused(tmp_path):
    whole = load_base(str(save(tmp_path, "grouped queries")), torch.bfloat16, CPU)
    whole.save_pretrained(tmp_path / "4bit")
    edit(tmp_path / "4bit", lambda tensors: tensors.pop(f"{Q_PROJ}.quant_state.bitsandbytes__nf4"))
    with pytest.raises(InputError, match=f"--shard: .*{Q_PROJ} of shape an unknown shape"):
        load_sharded_base(str(tmp_path / "4bit"), torch.bfloat16, CPU)


class OddConfig(transformers.LlamaConfig):
    model_type = "odd_llama"


class OddLlama(transformers.LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        if config.is_scaled:
            self.register_buffer("scale", self.lm_head.weight.sum())
        else:
            self._keep_in_fp32_modules_strict = {"norm"}


transformers.AutoConfig.register("odd_llama", OddConfig)
transformers.AutoModelForCausalLM.register(OddConfig, OddLlama)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            transformers.CTRLConfig(vocab_size=64, n_embd=64, dff=64, n_layer=1, n_head=2),
            "not made of decoder",
        ),
        (transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2), "of shape"),
        (OddConfig(**SIZES, is_scaled=True), "computes its buffer scale from its weights"),
        (OddConfig(**SIZES, is_scaled=False), "weights that stay in float32"),
    ],
    ids=["no decoder layers", "transposed weights", "buffer", "float32"],
)
def test_models_that_are_built_otherwise_are_refused(tmp_path, config, message):
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"--shard: .*{message}"):
        load_sharded_base(str(tmp_path), torch.bfloat16, CPU)


def test_other_quantization_is_refused(tmp_path):
    model = save(tmp_path, "grouped queries")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="already quantized with gptq"):
        load_sharded_base(str(model), torch.bfloat16, CPU)
