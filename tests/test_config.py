"""Flags: strict parsing, where every mistake is one line on stderr and exit code 2, and their metadata."""

import dataclasses
import math
import re
import subprocess
import sys
import typing

import pytest

from qlora.config import (
    CARD_FLAGS,
    KEPT_SETTINGS,
    PLACE_FLAGS,
    EvaluateConfig,
    GenerateConfig,
    MergeConfig,
    TrainConfig,
)
from qlora.errors import InputError
from qlora.flags import parse_args
from qlora.run.checkpoint import load_state
from tests.conftest import ROOT

CLASSES = [TrainConfig, GenerateConfig, EvaluateConfig, MergeConfig]
ALL = pytest.mark.parametrize("config_class", CLASSES)
BOTH = pytest.mark.parametrize("config_class", [TrainConfig, GenerateConfig])
DIGITS = "9" * 400  # an int that no float can hold


def parse(config_class, *argv):
    return parse_args(config_class, ["--model", "m", *argv])


def number_types(config_class) -> dict[str, type]:
    """The flags that are numbers, with their types: int or float."""
    found = {}
    for name, annotation in typing.get_type_hints(config_class).items():
        for number_type in (int, float):
            if annotation in (number_type, number_type | None):
                found[name] = number_type
    return found


def refusal(capsys, config_class, *argv):
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as exit_:
        parse(config_class, *argv)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == "" and err.endswith("\n") and len(err.splitlines()) == 1 and ": error: " in err
    return err


# ---------------------------------------------------------------- refused


@BOTH
@pytest.mark.parametrize(
    "argv, named",
    [
        (["--bogus", "1"], "--bogus"),
        (["--bogus=1"], "--bogus=1"),
        (["--trust"], "--trust"),  # the start of --trust_remote_code
        (["--load_in"], "--load_in"),
        (["-model", "m"], "-model"),
        (["stray"], "stray"),
        (["\u2013seed", "1"], "\u2013seed"),  # an en dash, as word processors and the QLoRA README write it
        (["\u2014seed", "1"], "\u2014seed"),
        (["--dtype", "half"], "half"),
        (["--dtype"], "--dtype"),
        (["--bnb_4bit_quant_type", "int8"], "int8"),
        (["--load_in_4bit", "maybe"], "maybe"),
        (["--model", ""], "--model is empty"),
        (["--model", " "], "--model is empty"),
        (["--adapter", ""], "--adapter"),  # as from an unset shell variable
        (["--no_load_in_4bit", "--bnb_4bit_quant_type", "fp4"], "--bnb_4bit_quant_type"),
        (["--no-load-in-4bit", "--bnb-4bit-use-double-quant", "1"], "--bnb_4bit_use_double_quant"),
        (["--load_in_4bit=false", "--bnb_4bit_quant_type=fp4"], "--bnb_4bit_quant_type"),
        (["--no_load_in_4bit", "--no_bnb_4bit_use_double_quant"], "bnb_4bit_use_double_quant"),
    ],
)
def test_a_wrong_flag_is_refused_by_both_scripts(capsys, config_class, argv, named):
    assert named in refusal(capsys, config_class, *argv)


@BOTH
def test_a_missing_model_is_refused(capsys, config_class):
    with pytest.raises(SystemExit) as exit_:
        parse_args(config_class, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and "--model" in line


NUMBERS = {
    "lora_r": ["0", "-1", "1.5", "1e3", "nan", "x", ""],
    "lora_alpha": ["0", "-16", "0.5"],
    "lora_dropout": ["-0.1", "1", "1.5", "nan", "inf", "x"],
    "num_train_epochs": ["0", "-1", "nan", "inf"],
    "max_steps": ["0", "-2", "1.5", "inf"],
    "per_device_train_batch_size": ["0", "-4"],
    "gradient_accumulation_steps": ["0", "-4"],
    "per_device_eval_batch_size": ["0"],
    "learning_rate": ["0", "-1e-4", "-0.1", "nan", "inf", "-inf", "1e999", "2e-4x", "0,1"],
    "warmup_ratio": ["-0.1", "1.1", "nan"],
    "warmup_steps": ["-1", "0.5"],
    "weight_decay": ["-0.1", "nan", "inf"],
    "loraplus_lr_ratio": ["0", "-1", "nan"],
    "adam_beta1": ["-0.1", "1", "nan"],
    "adam_beta2": ["1", "1.5", "nan"],
    "adam_epsilon": ["0", "-1e-8", "nan", "inf"],
    "max_grad_norm": ["-0.1", "nan", "inf"],
    "memory_limit_gb": ["0", "-8", "nan", "inf", "x"],
    "max_hours": ["0", "-1", "nan", "inf", "x"],
    "distributed_timeout": ["0", "-1", "nan", "inf", "x"],
    "max_skipped_steps": ["0", "-1", "1.5"],
    "sample_max_new_tokens": ["0", "-1", "1.5"],
    "seed": ["-1", "1.5", "4294967296", DIGITS],  # above 2**32 - 1, numpy takes no seed
    "eval_steps": ["0", "-1"],
    "logging_steps": ["0", "-1"],
    "save_steps": ["0", "-1"],
    "save_total_limit": ["-1", "x"],
}


@pytest.mark.parametrize(
    "name, value",
    [(name, value) for name, values in NUMBERS.items() for value in values],
    ids=lambda text: text[:20],
)
def test_a_number_out_of_range_is_refused(capsys, name, value):
    assert f"--{name}" in refusal(capsys, TrainConfig, f"--{name}", value)


def test_the_list_above_has_every_number_of_a_training():
    assert set(number_types(TrainConfig)) == set(NUMBERS)


@ALL
def test_every_number_has_a_limit_which_its_default_keeps_and_its_refusal_names(capsys, config_class):
    numbers = number_types(config_class)
    assert numbers
    for field in dataclasses.fields(config_class):
        if field.name not in numbers:
            continue
        limit, default = field.metadata["limit"], field.default
        assert default is None or limit.allows(default), field.name
        outside = [number for number in (-2, 0, 1, 2, 2**32) if not limit.allows(number)]
        assert outside, field.name
        for value in outside if numbers[field.name] is int else [*outside, math.nan, math.inf]:
            err = refusal(capsys, config_class, f"--{field.name}={value}")
            assert f"--{field.name} must be {limit.text}, not " in err


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--dataset", ""], "--dataset is empty"),
        (["--split", " "], "--split is empty"),
        (["--output_dir", ""], "--output_dir is empty"),
        (["--dataset_text_field", ""], "--dataset_text_field is empty"),
        (["--validation_split", ""], "--validation_split"),
        (["--validation_dataset", ""], "--validation_dataset"),
        (["--resume_from_checkpoint", ""], "--resume_from_checkpoint"),
        (["--lora_target_modules"], "--lora_target_modules"),
        (["--lora_target_modules", ""], "--lora_target_modules"),
        (["--lora_target_modules", "q_proj", "\u2013lora_r", "8"], "\u2013lora_r"),  # no name of a layer
        (["--lora_target_modules", "all-linear", "q_proj"], "all-linear"),
        (["--learning", "1"], "--learning"),
        (["--dataset_format", "sharegpt"], "sharegpt"),
        (["--lr_scheduler_type", "polynomial"], "polynomial"),
        (["--optim", "paged_adamw_4bit"], "paged_adamw_4bit"),
        (["--gradient_checkpointing", "true"], "true"),
        (["--report_to", "tensorboard"], "tensorboard"),
        (["--run_name", "a"], "--run_name needs --report_to wandb"),
        (["--validation_split", "0.1", "--validation_dataset", "d"], "--validation_dataset"),
        (["--validation_split", "nan"], "--validation_split"),
        (["--validation_split", "inf"], "--validation_split"),
        (["--validation_split", "-1"], "--validation_split"),
        (["--validation_split", "1.5"], "--validation_split"),  # neither a share nor a number of rows
        *(
            (["--max_length", value], "--max_length must be")
            for value in ("0", "x", "p0", "p101", "p", "1.5", "P9")
        ),
        (["--streaming"], "--streaming needs --max_steps"),
        (["--streaming", "--max_steps", "9", "--max_length", "p90"], "needs a number for --max_length"),
        (["--streaming", "--max_steps", "9", "--dataset", "a", "b"], "takes one --dataset"),
        (["--streaming", "--max_steps", "9", "--validation_split", "0.1"], "no validation rows held out"),
        (["--streaming", "--max_steps", "9", "--data_report"], "--data_report reads all rows"),
        (["--dataset_weights", "0.5", "0.5"], "has 2 numbers for 1 datasets"),
        (["--dataset", "a", "b", "--dataset_weights", "1", "0"], "--dataset_weights must be above 0"),
        (["--dataset", "a", "b", "--dataset_weights", "1", "nan"], "--dataset_weights must be above 0"),
        (["--dataset", "a", ""], "--dataset is empty"),
        (["--data_report", "xml"], "xml"),
        (["--group_by_length"], "--group_by_length needs --no_packing"),
        (["--split", "train[:10"], "--split: cannot read the split 'train[:10'"),
        (["--validation_split", "val[5"], "--validation_split: cannot read"),
        (["--validation_split", "100%"], "--validation_split"),
        (["--validation_split", "200%"], "--validation_split"),
        (["--eval_steps", "5"], "--eval_steps needs --validation_split or --validation_dataset"),
        (["--per_device_eval_batch_size", "5"], "--per_device_eval_batch_size needs"),
        (["--resume_from_checkpoint", "latest", "--overwrite_output_dir"], "exclude each other"),
        (["--adapter", "a", "--lora_r", "8"], "--lora_r cannot be used with --adapter"),
        (["--adapter", "a", "--lora-r=8"], "--lora_r cannot be used with --adapter"),
        (["--adapter", "a", "--lora_alpha", "8"], "--lora_alpha cannot be used with --adapter"),
        (["--adapter", "a", "--lora_dropout", "0.1"], "--lora_dropout cannot be used with --adapter"),
        (
            ["--adapter", "a", "--lora_target_modules", "q_proj"],
            "--lora_target_modules cannot be used with --adapter",
        ),
        (["--use-rslora", "--adapter", "a"], "--use_rslora cannot be used with --adapter"),
        (["--use_dora", "true", "--adapter=a"], "--use_dora cannot be used with --adapter"),
    ],
)
def test_a_wrong_train_command_is_refused(capsys, argv, named):
    assert named in refusal(capsys, TrainConfig, *argv)


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--prompt", "a", "--prompts_file", "b"], "exclude each other"),
        (["--prompt", "", "--prompts_file", "b"], "exclude each other"),
        (["--prompts_file", ""], "--prompts_file"),
        (["--output_file", "a"], "--output_file needs --prompts_file"),
        (["--prompt", "a", "--output_file", "b"], "--output_file needs --prompts_file"),
        (["--batch_size", "2"], "--batch_size needs --prompts_file"),
        (["--temperature", "0.7"], "--temperature needs --do_sample"),
        (["--top_p", "0.9"], "--top_p needs --do_sample"),
        (["--top-k=9"], "--top_k needs --do_sample"),
        (["--seed", "1"], "--seed needs --do_sample"),
        (["--do_sample", "false", "--seed", "1"], "--seed needs --do_sample"),
        (["--do_sample", "--temperature", "0"], "--temperature"),
        (["--do_sample", "--temperature", "nan"], "--temperature"),
        (["--do_sample", "--top_p", "0"], "--top_p"),
        (["--do_sample", "--top_p", "1.1"], "--top_p"),
        (["--do_sample", "--top_k", "-1"], "--top_k"),
        (["--do_sample", "--seed", "-1"], "--seed"),
        (["--do_sample", "--seed", DIGITS], "--seed"),
        (["--repetition_penalty", "0"], "--repetition_penalty"),
        (["--repetition_penalty", "inf"], "--repetition_penalty"),
        (["--max_new_tokens", "0"], "--max_new_tokens"),
        (["--prompts_file", "a", "--batch_size", "0"], "--batch_size"),
        (["--lora_r", "8"], "--lora_r"),
    ],
)
def test_a_wrong_generate_command_is_refused(capsys, argv, named):
    assert named in refusal(capsys, GenerateConfig, *argv)


@pytest.mark.parametrize("config_class", [TrainConfig, MergeConfig])
def test_the_base_models_own_folder_is_no_output_folder(capsys, config_class, tmp_path, monkeypatch):
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    (tmp_path / "link").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    argv = ["--adapter", "a"] if config_class is MergeConfig else []
    for output_dir in (str(base), "models/../models/base/", "link"):
        error = refusal(capsys, config_class, *argv, "--model", str(base), "--output_dir", output_dir)
        assert f"--output_dir {output_dir} is the folder of --model itself: choose another one" in error
    # A folder with the name of a hub model would be loaded in its place from then on.
    assert "--output_dir" in refusal(
        capsys, config_class, *argv, "--model", "owner/name", "--output_dir", "owner/name"
    )
    assert parse(config_class, *argv, "--model", str(base), "--output_dir", "models/base/out")
    assert not list(base.iterdir())


# ---------------------------------------------------------------- accepted


@BOTH
def test_without_flags_every_value_is_the_default(config_class):
    assert parse(config_class) == config_class(model="m")


def test_the_defaults_are_the_qlora_recipe():
    config = parse(TrainConfig)
    assert config.load_in_4bit and config.bnb_4bit_use_double_quant and config.completion_only_loss
    assert (config.bnb_4bit_quant_type, config.dtype, config.optim) == ("nf4", "float16", "paged_adamw_8bit")
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (16, 16, 0.05)
    assert config.lora_target_modules == ["q_proj", "v_proj"]
    assert (config.learning_rate, config.lr_scheduler_type, config.warmup_ratio) == (2e-4, "cosine", 0.03)
    assert (config.max_grad_norm, config.gradient_checkpointing) == (0.3, "auto")
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 16
    assert config.dataset == ["timdettmers/openassistant-guanaco"]


def test_dashes_underscores_and_equals_signs_mean_the_same():
    for argv in (["--lora_r", "8"], ["--lora-r", "8"], ["--lora_r=8"], ["--lora-r=8"]):
        assert parse(TrainConfig, *argv).lora_r == 8


@pytest.mark.parametrize(
    "argv, value",
    [
        ([], True),
        (["--load_in_4bit"], True),
        (["--load-in-4bit", "yes"], True),
        (["--load_in_4bit=1"], True),
        (["--load_in_4bit", "False"], False),
        (["--load_in_4bit", "no"], False),
        (["--load_in_4bit=0"], False),
        (["--no_load_in_4bit"], False),
        (["--no-load-in-4bit"], False),
    ],
)
def test_a_boolean_can_be_written_in_many_ways(argv, value):
    assert parse(TrainConfig, *argv).load_in_4bit is value


@pytest.mark.parametrize(
    "argv, value",
    [
        ([], None),  # depends on the device
        (["--compile"], True),
        (["--compile", "true"], True),
        (["--compile=false"], False),
        (["--no_compile"], False),
        (["--no-compile"], False),
    ],
)
def test_a_boolean_may_have_no_default(argv, value):
    assert parse(TrainConfig, *argv).compile is value


@pytest.mark.parametrize("value", ["some", "-1", "1.5", "", "All", "²"])
def test_checkpointing_takes_three_words_or_a_number(capsys, value):
    assert "--gradient_checkpointing" in refusal(capsys, TrainConfig, f"--gradient_checkpointing={value}")
    for right in ("auto", "all", "none", "0", "12"):
        parse(TrainConfig, "--gradient_checkpointing", right)


def test_speed_flags_that_would_be_ignored_are_refused(capsys):
    flags = ["--gradient_checkpointing", "none", "--offload_activations", "on"]
    assert "--offload_activations" in refusal(capsys, TrainConfig, *flags)
    assert "--cuda_graphs" in refusal(capsys, TrainConfig, "--no_packing", "--cuda_graphs")
    assert "--fused_4bit" in refusal(capsys, TrainConfig, "--no_load_in_4bit", "--fused_4bit")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--shard --no_load_in_4bit", "--shard takes a 4-bit base"),
        ("--shard --use_dora", "--shard takes a 4-bit base, and neither --use_dora"),
        ("--shard --init_lora_weights loftq", "--init_lora_weights loftq or qera"),
        ("--shard --init_lora_weights qera", "--init_lora_weights loftq or qera"),
        ("--shard --cuda_graphs", "--cuda_graphs and --shard exclude each other"),
        ("--shard_cpu_offload", "--shard_cpu_offload"),
    ],
)
def test_what_needs_whole_weights_is_refused_with_sharding(capsys, flags, message):
    assert message in refusal(capsys, TrainConfig, *flags.split())


def test_sharding_needs_several_processes():
    with pytest.raises(InputError, match="--shard needs several processes: torchrun"):
        parse(TrainConfig, "--shard").check_device("cpu")


@pytest.mark.parametrize(
    "argv, value",
    [([], False), (["--use_dora"], True), (["--use-dora", "true"], True), (["--use_dora", "false"], False)],
)
def test_a_boolean_may_be_off_by_default(argv, value):
    assert parse(TrainConfig, *argv).use_dora is value


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--lora_target_modules", "k_proj", "down_proj"], "lora_target_modules", ["k_proj", "down_proj"]),
        (["--lora_target_modules", "all-linear"], "lora_target_modules", ["all-linear"]),
        (["--learning_rate", "1e-5"], "learning_rate", 1e-5),
        (["--num_train_epochs", "0.5"], "num_train_epochs", 0.5),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--max_grad_norm", "0"], "max_grad_norm", 0.0),
        (["--save_total_limit", "0"], "save_total_limit", 0),
        (["--warmup_ratio", "0"], "warmup_ratio", 0.0),
        (["--lora_dropout", "0"], "lora_dropout", 0.0),
        (["--seed", "4294967295"], "seed", 2**32 - 1),
        (["--split", "train[:90%]"], "split", "train[:90%]"),
        (["--validation_split", "0.05"], "validation_split", "0.05"),
        (["--report_to", "wandb", "--run_name", "a b"], "run_name", "a b"),
        (["--adapter", "a"], "adapter", "a"),
        (["--validation_dataset", "d", "--validation_split", "test"], "validation_split", "test"),
        (["--resume_from_checkpoint", "latest"], "resume_from_checkpoint", "latest"),
    ],
)
def test_a_value_arrives_with_its_type(argv, name, value):
    got = getattr(parse(TrainConfig, *argv), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "value, amount",
    [
        ("0.05", 0.05),
        (".5", 0.5),
        ("10%", 0.1),
        ("validation", None),
        ("train[:10]", None),
        ("val[5%:]", None),
    ],
)
def test_a_validation_amount_is_told_from_the_name_of_a_split(value, amount):
    assert parse(TrainConfig, "--validation_split", value).held_out == amount
    assert parse(TrainConfig).held_out is None


@pytest.mark.parametrize("prompt", ["", "-5", "-5 + 3 = ?", "--seed is a flag, top_p too", "a\nb", "\u2013x"])
def test_a_prompt_may_look_odd(prompt):
    assert parse(GenerateConfig, "--prompt", prompt).prompt == prompt


def test_two_configs_do_not_share_a_list():
    parse(TrainConfig).lora_target_modules.append("k_proj")
    assert parse(TrainConfig).lora_target_modules == ["q_proj", "v_proj"]


def test_a_stray_args_file_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "train.args").write_text("--lora_r 99\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py"), "--model", "m"])
    assert parse_args(TrainConfig).lora_r == 16


# ---------------------------------------------------------------- help


@ALL
def test_every_flag_has_a_help_text(config_class):
    for field in dataclasses.fields(config_class):
        text = field.metadata["help"]
        assert len(text) > 10 and text.endswith((".", ")")), field.name


@BOTH
def test_help_shows_every_flag_with_its_default(capsys, monkeypatch, config_class):
    monkeypatch.setenv("COLUMNS", "1000")  # else a default may be broken at a hyphen
    with pytest.raises(SystemExit) as exit_:
        parse_args(config_class, ["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and "%%" not in text
    entries = dict(re.findall(r"^  --(\w+)[ ,](.*?)(?=^  -|\Z)", text, re.MULTILINE | re.DOTALL))
    for field in dataclasses.fields(config_class)[1:]:
        default = getattr(config_class(model="m"), field.name)
        text = " ".join(entries[field.name].split())
        assert text.endswith(f"(default: {default})") != (default is None), field.name
    assert "model" in entries and "(default: None)" not in " ".join(entries.values())


def test_the_same_flag_means_the_same_in_both_scripts():
    train, generate = (
        {field.name: field.type for field in dataclasses.fields(config_class)}
        for config_class in (TrainConfig, GenerateConfig)
    )
    shared = train.keys() & generate.keys()
    assert {"model", "adapter", "dtype", "load_in_4bit", "dataset_format", "seed"} <= shared
    assert {name: train[name] for name in shared} == {name: generate[name] for name in shared}


# ---------------------------------------------------------------- metadata


def a_value(config_class, name: str) -> str:
    """A value that the flag accepts."""
    annotation = typing.get_type_hints(config_class)[name]
    values = {"validation_split": "0.5", "allow_changes": "seed", "report_to": "wandb"}
    if name in values:
        return values[name]
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)[0]
    return {bool: "true", int: "1", float: "0.5"}.get(annotation, "train")


def conditional_flags(key: str) -> list:
    """(class, flag, the flags that it needs or excludes) of each flag with that metadata."""
    return [
        pytest.param(config_class, field.name, re.findall(r"--(\w+)", field.metadata[key]),
                     id=f"{config_class.__name__}-{field.name}")
        for config_class in CLASSES
        for field in dataclasses.fields(config_class)
        if field.metadata[key]
    ]  # fmt: skip


def setting(config_class, name: str) -> list[str]:
    """Set a flag, and the flags that it needs itself."""
    needs = {field.name: field.metadata["needs"] for field in dataclasses.fields(config_class)}
    needed = re.findall(r"--(\w+)", needs[name] or "")[:1]
    return [word for other in needed for word in setting(config_class, other)] + [
        f"--{name}", a_value(config_class, name),
    ]  # fmt: skip


@pytest.mark.parametrize("config_class, name, needed", conditional_flags("needs"))
def test_a_flag_is_refused_without_the_flag_that_it_needs(capsys, config_class, name, needed):
    argv = [f"--{name}", a_value(config_class, name)]
    if config_class is MergeConfig:
        argv += ["--adapter", "a"]
    if config_class is EvaluateConfig:  # it refuses to do nothing
        argv += ["--general_dataset", "g"] if "dataset" in needed else ["--dataset", "d"]
    off = ["--no_load_in_4bit"] if needed == ["load_in_4bit"] else []
    assert f"--{name} needs --{needed[0]}" in refusal(capsys, config_class, *argv, *off)
    for other in needed:
        parse(config_class, *argv, *setting(config_class, other))


@pytest.mark.parametrize("config_class, name, excluded", conditional_flags("excludes"))
def test_a_flag_is_refused_beside_a_flag_that_it_excludes(capsys, config_class, name, excluded):
    argv = setting(config_class, name)
    parse(config_class, *argv)
    for other in excluded:
        both = [*argv, f"--{other}", a_value(config_class, other)]
        assert f"--{name} cannot be used with --{other}" in refusal(capsys, config_class, *both)


def test_every_flag_of_a_training_says_whether_it_may_change_on_resume():
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["resume"] in ("same", "free"), field.name
    assert {"seed", "learning_rate", "max_steps", "dtype"} <= parse(TrainConfig).compared_values().keys()
    assert not {"logging_steps", "output_dir", "compile"} & parse(TrainConfig).compared_values().keys()


@pytest.mark.parametrize("flags", ["--packing", "--no_packing"])
def test_allow_changes_accepts_exactly_the_names_that_a_resume_compares(capsys, run, flags):
    _, folder = run(f"--max_steps 1 {flags}")
    compared = set(load_state(folder / "checkpoint-1")["fingerprint"]) - {
        "today"
    }  # carried over, not compared
    capsys.readouterr()
    for name in compared:
        parse(TrainConfig, "--adapter", "a", "--allow_changes", name)
    err = refusal(capsys, TrainConfig, "--adapter", "a", "--allow_changes", "nothing")
    accepted = set(err.partition("the names are ")[2].strip().split(", "))
    assert accepted == compared
    for name in {field.name for field in dataclasses.fields(TrainConfig)} - compared:
        assert name in refusal(capsys, TrainConfig, "--adapter", "a", "--allow_changes", name)


def test_paths_and_names_of_places_are_not_on_the_model_card():
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names - set(CARD_FLAGS) == {
        "model", "adapter", "dataset", "validation_dataset", "output_dir", "overwrite_output_dir", "run_name",
        "report_to", "sample_prompts", "sample_max_new_tokens", "resume_from_checkpoint", "allow_changes",
        "push_to_hub", "hub_model_id", "hub_private_repo", "max_hours", "logging_steps", "save_steps",
        "save_total_limit", "chat_template", "shard", "shard_cpu_offload", "distributed_timeout",
    }  # fmt: skip
    assert set(PLACE_FLAGS) == {
        "output_dir", "overwrite_output_dir", "run_name", "report_to", "resume_from_checkpoint",
        "allow_changes",
    }  # fmt: skip


def test_the_settings_kept_beside_an_adapter_are_flags_of_the_commands_that_take_them():
    kept = parse(TrainConfig, "--max_length", "64", "--dtype", "bfloat16").kept_settings()
    assert list(kept) == KEPT_SETTINGS and len(set(KEPT_SETTINGS)) == len(KEPT_SETTINGS)
    assert (kept["max_length"], kept["dtype"]) == ("64", "bfloat16")
    types_of = {config_class: typing.get_type_hints(config_class) for config_class in CLASSES}
    assert set(kept) <= types_of[EvaluateConfig].keys()
    for config_class in (GenerateConfig, EvaluateConfig, MergeConfig):
        shared = kept.keys() & types_of[config_class].keys()
        assert {"dtype", "load_in_4bit", "dataset_format", "dataset_text_field"} <= shared
        for name in shared:
            assert types_of[config_class][name] == types_of[TrainConfig][name]


# ---------------------------------------------------------------- the real command line


def test_the_script_refuses_with_one_line_and_exit_code_2():
    result = subprocess.run(
        [sys.executable, "train.py", "--model", "m", "--bogus", "1"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "train.py: error: unrecognized arguments: --bogus 1\n"
