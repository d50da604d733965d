"""docs/recipes.md: its commands parse and train, with the settings and parameter counts of each system."""

import dataclasses
import inspect
import json
import math
import re
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import generate
import train
from qlora import evaluate
from qlora.config import EvaluateConfig, GenerateConfig, TrainConfig
from qlora.flags import parse_args
from qlora.model.adapter import ADAPTER, SETTINGS, add_adapter
from qlora.model.base import load_tokenizer
from qlora.optim.flat import FlatParameters
from qlora.optim.schedule import Schedule
from qlora.run import hub
from qlora.run.checkpoint import STATE, STATE_TENSORS
from tests.conftest import ROOT, ROWS
from tests.documents import PYTHON, parse
from tests.documents import commands as document_commands
from tests.results import metrics

RECIPES = ROOT / "docs" / "recipes.md"
DEFAULTS = dataclasses.asdict(TrainConfig("any"))
QUERY_VALUE = ["q_proj", "v_proj"]
LLAMA_2_7B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32000,
    tie_word_embeddings=False,
)

# The settings that each system names; the rest are the defaults.
ASKED = {
    "A": {
        "model": "meta-llama/Llama-2-7b-hf", "dataset_text_field": "text", "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "dtype": "float16",
        "lora_r": 64, "lora_alpha": 32, "lora_dropout": 0.05, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4, "packing": False, "learning_rate": 2e-4,
        "lr_scheduler_type": "linear", "optim": "paged_adamw_8bit", "max_length": "512",
        "num_train_epochs": 1, "max_steps": 10, "logging_steps": 10,
        "push_to_hub": True, "hub_model_id": "you/finetuning-llms",
    },
    "B": {
        "model": "NousResearch/Llama-2-7b-chat-hf", "dataset": ["mlabonne/guanaco-llama2-1k"],
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False,
        "dtype": "float16", "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.1,
        "lora_target_modules": QUERY_VALUE, "num_train_epochs": 10, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8, "learning_rate": 2e-4, "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.03, "max_grad_norm": 0.3, "weight_decay": 0.001, "optim": "paged_adamw_32bit",
        "group_by_length": True, "packing": False, "max_length": "256",
    },
    "C": {
        "model": "meta-llama/Llama-2-7b-hf", "dataset": ["timdettmers/openassistant-guanaco"],
        "split": "train[:1000]", "validation_split": "test", "load_in_4bit": True, "lora_r": 16,
        "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_modules": QUERY_VALUE, "optim": "adamw_8bit",
    },
    "D": {"model": "meta-llama/Llama-2-7b-hf"},
    "E": {
        "model": "meta-llama/Llama-2-7b-hf", "dataset": ["iamtarun/python_code_instructions_18k_alpaca"],
        "split": "train[:10000]", "validation_split": "0.05", "max_length": "p90", "lora_r": 4,
        "lora_target_modules": ["all-linear"], "gradient_checkpointing": "auto", "dtype": "float16",
        "optim": "paged_adamw_8bit", "max_grad_norm": 0.3, "lr_scheduler_type": "cosine",
        "eval_steps": 25, "logging_steps": 10,
    },
}  # fmt: skip


def plain_text(question: str, answer: str) -> dict:
    return {"text": f"{question} {answer}"}


def llama2(question: str, answer: str) -> dict:
    return {"text": f"<s>[INST] {question} [/INST] {answer} </s>"}


def guanaco(question: str, answer: str) -> dict:
    return {"text": f"### Human: {question}### Assistant: {answer}"}


def custom(question: str, answer: str) -> dict:
    return {"prompt": question, "completion": answer}


def alpaca(question: str, answer: str) -> dict:
    return {"instruction": question, "input": "", "output": answer, "prompt": f"{question}\n{answer}"}


# The rows that each system trains on, and their format, which is to be recognized.
DATA = {
    "A": (plain_text, "text"),
    "B": (llama2, "llama2"),
    "C": (guanaco, "guanaco"),
    "D": (custom, "prompt_completion"),
    "E": (alpaca, "alpaca"),
}


@cache
def sections() -> dict[str, str]:
    """The text of each system, by its letter."""
    parts = re.split(r"^## ", RECIPES.read_text(), flags=re.MULTILINE)
    return {part[0]: part for part in parts if re.match(r"[A-Z]\. ", part)}


@cache
def commands(system: str) -> list[list[str]]:
    """The words of a system's commands, without the program."""
    calls = document_commands(sections()[system])
    assert all(program == PYTHON for program, *_ in calls)
    return [words for _, *words in calls]


def trainings(system: str) -> list[list[str]]:
    return [
        words[1:] for words in commands(system) if words[0] == "train.py" and "--data_report" not in words
    ]


def questions(system: str) -> list[list[str]]:
    return [words[1:] for words in commands(system) if words[0] == "generate.py"]


def settings(argv: list[str]) -> dict:
    return dataclasses.asdict(parse_args(TrainConfig, argv))


def lora_parameters(config: LlamaConfig, r: int, targets: list[str]) -> int:
    """Elements of A (r x inputs) and B (outputs x r) of every adapted layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    ends = {
        "q_proj": hidden + hidden,
        "k_proj": hidden + keys,
        "v_proj": hidden + keys,
        "o_proj": hidden + hidden,
        "gate_proj": hidden + inner,
        "up_proj": hidden + inner,
        "down_proj": inner + hidden,
    }
    adapted = ends if targets == ["all-linear"] else targets
    return config.num_hidden_layers * r * sum(ends[name] for name in adapted)


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    """Folder of a system's rows, 36 of them as train and 6 as test."""

    @cache
    def data_of(system: str) -> str:
        row, _ = DATA[system]
        folder = tmp_path_factory.mktemp(f"rows-{system}")
        lines = [json.dumps(row(pair["prompt"], pair["completion"])) + "\n" for pair in ROWS]
        (folder / "train.jsonl").write_text("".join(lines[:36]))
        (folder / "test.jsonl").write_text("".join(lines[36:]))
        return str(folder)

    return data_of


@pytest.fixture(scope="module")
def trained(base, data_of, tmp_path_factory):
    """Train as a system's recipe says, on the tiny base; `calls` has the last arguments of some functions."""

    @cache
    def trained(system: str) -> SimpleNamespace:
        folder, calls = tmp_path_factory.mktemp(f"recipe-{system}") / "out", {}
        changed = ["--model", base, "--dataset", data_of(system), "--output_dir", str(folder)]
        if system != "A":  # which has its own number of steps
            changed += ["--max_steps", "2"]
        with pytest.MonkeyPatch.context() as patch:
            for module, name in (
                (train, "build_optimizer"), (train, "Schedule"), (FlatParameters, "clip_grad_norm_")
            ):  # fmt: skip
                patch.setattr(module, name, recording(getattr(module, name), name, calls))
            patch.setattr(hub, "check_hub", lambda name, is_private: name)
            patch.setattr(hub, "push", recording(lambda folder, repo, is_private: "hub", "push", calls))
            train.train(parse_args(TrainConfig, [*trainings(system)[0], *changed]))
        return SimpleNamespace(folder=folder, calls=calls)

    return trained


def recording(function, name: str, calls: dict):
    """The function, which then leaves its last arguments in calls[name], by parameter name."""

    def call(*arguments, **options):
        calls[name] = inspect.signature(function).bind(*arguments, **options).arguments
        return function(*arguments, **options)

    return call


def test_there_is_a_recipe_for_each_system():
    assert list(sections()) == list(ASKED)
    assert {system: (len(trainings(system)), len(questions(system))) for system in ASKED} == {
        "A": (1, 0), "B": (1 + 12 + 4, 1), "C": (1, 1), "D": (1, 1), "E": (1, 0)
    }  # fmt: skip


@pytest.mark.parametrize("system", ASKED)
def test_every_command_parses(system):
    for words in commands(system):
        parse(words)


@pytest.mark.parametrize("system", ASKED)
def test_a_recipe_has_the_settings_of_its_system_and_defaults_otherwise(system):
    given = settings(trainings(system)[0])
    free = {name: given[name] for name in ("dataset", "output_dir")}
    assert given == DEFAULTS | free | ASKED[system]


@pytest.mark.parametrize("system", ASKED)
def test_the_trained_adapter_has_the_settings_of_the_recipe(system, trained, base):
    expected = DEFAULTS | ASKED[system]
    folder = trained(system).folder
    lora = json.loads((folder / "adapter_config.json").read_text())
    assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"], lora["bias"]) == (
        expected["lora_r"], expected["lora_alpha"], expected["lora_dropout"], "none"
    )  # fmt: skip
    tensors = load_file(folder / ADAPTER)
    linear = set(re.findall(r"\w+_proj", " ".join(tensors)))
    targets = expected["lora_target_modules"]
    assert linear == set(targets) if targets != ["all-linear"] else len(linear) == 7
    parameters = lora_parameters(AutoConfig.from_pretrained(base), expected["lora_r"], targets)
    assert sum(tensor.numel() for tensor in tensors.values()) == parameters
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    kept = json.loads((folder / SETTINGS).read_text())
    assert kept["dataset_format"] == DATA[system][1]
    for name in ("dtype", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        assert kept[name] == expected[name]


@pytest.mark.parametrize("system", ASKED)
def test_the_training_steps_use_the_settings_of_the_recipe(system, trained):
    expected = DEFAULTS | ASKED[system]
    run, steps = trained(system), ASKED[system].get("max_steps", 2)
    optimizer = run.calls["build_optimizer"]
    (group,) = optimizer["groups"]
    assert (optimizer["name"], group["weight_decay"]) == (expected["optim"], expected["weight_decay"])
    schedule = run.calls["Schedule"]
    assert (schedule["peak"], schedule["shape"]) == (expected["learning_rate"], expected["lr_scheduler_type"])
    assert schedule["total_steps"] == steps
    warmup = math.ceil(expected["warmup_ratio"] * steps)
    rates = [Schedule(**schedule).lr_at(step) for step in range(warmup + 1)]
    assert rates == [0.0, expected["learning_rate"]]  # a warmup of one step
    assert run.calls["clip_grad_norm_"]["max_norm"] == expected["max_grad_norm"]

    checkpoint = run.folder / f"checkpoint-{steps}"
    moment = load_file(checkpoint / STATE_TENSORS)["optimizer/0.0/state1"]
    assert moment.dtype == (torch.uint8 if "8bit" in expected["optim"] else torch.float32)
    fingerprint = json.loads((checkpoint / STATE).read_text())["fingerprint"]
    batch = expected["per_device_train_batch_size"] * expected["gradient_accumulation_steps"]
    assert fingerprint["packs_per_step"] == batch
    assert (fingerprint["pack_length"] is not None) == expected["packing"]
    assert fingerprint["group_by_length"] == expected["group_by_length"]


@pytest.mark.parametrize("system", ASKED)
def test_all_logged_losses_are_finite(system, trained):
    lines = metrics(trained(system).folder)
    assert all(math.isfinite(line["loss"]) for line in lines if "eval_loss" not in line)
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(evaluated) == ("validation_split" in ASKED[system])
    assert all(math.isfinite(loss) for loss in evaluated)


def test_the_ten_steps_of_a_override_its_epoch(trained):
    (line,) = metrics(trained("A").folder)
    assert line["step"] == 10
    assert line["epoch"] == 5  # 36 rows: a step of 32 and one of 4


def test_only_the_adapter_of_a_is_pushed_to_the_hub(trained):
    assert trained("A").calls["push"]["repo"] == "you/finetuning-llms"
    assert "push" not in trained("D").calls


def test_the_answers_of_e_are_scored_as_code(trained, base, data_of, tmp_path):
    (argv,) = [words[2:] for words in commands("E") if words[:2] == ["-m", "qlora.evaluate"]]
    asked = parse_args(EvaluateConfig, argv)
    assert asked.adapter == settings(trainings("E")[0])["output_dir"] and asked.model == ASKED["E"]["model"]
    data = data_of("E")
    changed = ["--model", base, "--adapter", str(trained("E").folder), "--dataset", data]
    changed += ["--prompts_file", data, "--prompts_split", "train[:3]", "--max_new_tokens", "8"]
    evaluate.main([*argv, *changed, "--output_file", str(tmp_path / "e.json")])
    report = json.loads((tmp_path / "e.json").read_text())
    for name in ("base", "tuned"):
        assert {"loss", "codebleu_ngram", "codebleu_weighted_ngram", "codebleu_syntax"} < report[name].keys()
        assert {"codebleu_dataflow", "exact_match", "parses"} < report[name].keys()
    assert len(report["answers"]) == 3


@pytest.mark.parametrize("system", [system for system in ASKED if questions(system)])
def test_the_adapter_answers_the_question_of_its_recipe(system, trained, base, capsys, monkeypatch):
    calls = {}
    monkeypatch.setattr(generate, "generate", recording(generate.generate, "generate", calls))
    (argv,) = questions(system)
    asked = parse_args(GenerateConfig, argv)
    assert asked.adapter == settings(trainings(system)[0])["output_dir"]
    assert asked.model == ASKED[system]["model"]
    changed = ["--model", base, "--adapter", str(trained(system).folder)]
    if system != "B":  # the tiny base has a context of 256 tokens
        changed += ["--max_new_tokens", "8"]
    capsys.readouterr()
    generate.main([*argv, *changed])
    assert capsys.readouterr().out.strip()
    if system == "B":
        assert calls["generate"]["options"]["max_new_tokens"] == 200
        (prompt,) = calls["generate"]["prompts"]
        assert load_tokenizer(base).decode(prompt) == "<s> [INST] What is a large language model? [/INST]"


def test_the_data_report_of_e_plots_the_row_lengths(base, data_of, tmp_path, capsys):
    (argv,) = [words[1:] for words in commands("E") if "--data_report" in words]
    report, training = settings(argv), settings(trainings("E")[0])
    assert all(report[name] == training[name] for name in ("model", "dataset", "split", "max_length"))
    with pytest.raises(SystemExit) as end:
        train.main([*argv, "--model", base, "--dataset", data_of("E"), "--output_dir", str(tmp_path)])
    assert end.value.code == 0
    assert sum(json.loads(capsys.readouterr().out)["train"]["histogram"]["rows"]) == 36
    assert (tmp_path / "data_report.png").exists()


def test_the_loops_of_b_vary_only_what_they_compare():
    plain, *others = map(settings, trainings("B"))
    sweep, schemes = others[:12], others[12:]
    assert len({run["output_dir"] for run in others}) == 16
    varied = {"lora_r lora_target_modules": sweep, "bnb_4bit_quant_type bnb_4bit_use_double_quant": schemes}
    for names, runs in varied.items():
        assert len({str([run[name] for name in names.split()]) for run in runs}) == len(runs)
        for run in runs:
            changed = {name for name in run if run[name] != plain[name]}
            assert changed <= {*names.split(), "validation_split", "output_dir"}


@pytest.mark.parametrize("system", ASKED)
def test_the_stated_numbers_of_trained_parameters_are_those_of_llama_2_7b(system):
    (stated,) = re.findall(r"([\d,]+)\strained\sparameters\s\(([\d.]+%)\)", sections()[system])
    asked = settings(trainings(system)[0])
    with torch.device("meta"):
        model = add_adapter(
            LlamaForCausalLM(LLAMA_2_7B), asked["lora_r"], asked["lora_alpha"], asked["lora_dropout"],
            asked["lora_target_modules"], asked["use_rslora"], asked["use_dora"],
        )  # fmt: skip
    trained, total = model.get_nb_trainable_parameters()
    assert total - trained == 6_738_415_616
    assert trained == lora_parameters(LLAMA_2_7B, asked["lora_r"], asked["lora_target_modules"])
    assert stated == (f"{trained:,}", f"{trained / total:.3%}")


def test_the_table_of_b_states_the_trained_parameters_of_every_run():
    table = re.findall(r"^\| (.+) \|$", sections()["B"], re.MULTILINE)
    (_, *ranks), *rows = (line.split(" | ") for line in table)
    stated = {
        (targets.strip("`"), int(rank.removeprefix("r="))): int(number.replace(",", ""))
        for targets, *numbers in rows
        for rank, number in zip(ranks, numbers, strict=True)
    }
    runs = [settings(argv) for argv in trainings("B")[1:13]]
    assert stated == {
        (" ".join(run["lora_target_modules"]), run["lora_r"]): lora_parameters(
            LLAMA_2_7B, run["lora_r"], run["lora_target_modules"]
        )
        for run in runs
    }
