"""Generation: batches equal single prompts, the adapter keeps its format, the real command line."""

import io
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import generate as script
import train
from qlora import evaluate
from qlora.commands import EARLIER_SETTINGS, parse_for_adapter
from qlora.config import KEPT_SETTINGS, GenerateConfig, TrainConfig
from qlora.data.chat_template import FALLBACK_CHAT_TEMPLATE
from qlora.data.formats import chat_segments, prompt_segments, row_segments, starts_with_bos
from qlora.data.formatting import Formatting
from qlora.data.segments import encode
from qlora.errors import InputError
from qlora.evaluation.samples import read_samples
from qlora.flags import parse_args
from qlora.model.adapter import ADAPTER, SETTINGS, adapter_file, check_adapter, load_adapter
from qlora.model.base import load_base, load_tokenizer
from qlora.model.generation import PromptWriter, generate, stop_ids
from tests.conftest import ROOT, ROWS

flags_of = partial(parse_for_adapter, GenerateConfig)
FP32 = partial(torch.autocast, "cpu", enabled=False)


def prompt_ids(tokenizer, row) -> list[int]:
    segments = prompt_segments(row, Formatting("prompt_completion"), tokenizer)
    return encode(segments, starts_with_bos("prompt_completion", tokenizer), tokenizer)[0]


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}])
def test_a_batch_answers_as_each_prompt_alone(adapter, tokenizer, options):
    model, _ = adapter
    prompts = [prompt_ids(tokenizer, row) for row in (ROWS[0], ROWS[6], ROWS[3], {"prompt": "What"})]
    assert len({len(ids) for ids in prompts}) > 2
    ask = partial(generate, model, tokenizer, autocast=FP32, max_new_tokens=16, do_sample=False, **options)
    together = ask(prompts)
    assert together == [ask([ids])[0] for ids in prompts]
    assert len(set(together)) > 1


def test_the_adapter_stops_at_eos_and_answers_what_it_learned(adapter, tokenizer):
    model, _ = adapter
    answers = generate(
        model, tokenizer, [prompt_ids(tokenizer, row) for row in ROWS], FP32, max_new_tokens=60
    )
    right = sum(answer.strip() == row["completion"] for answer, row in zip(answers, ROWS))
    assert right > len(ROWS) / 2


def test_sampling_depends_on_the_seed_alone_and_restores_the_random_state(adapter, tokenizer):
    model, _ = adapter
    ids = prompt_ids(tokenizer, ROWS[0])
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0}
    ask = partial(generate, model, tokenizer, [ids], FP32, **options)
    state = torch.get_rng_state()
    first = ask(seed=1)
    torch.rand(3)
    assert ask(seed=1) == first
    assert ask(seed=2) != first
    torch.set_rng_state(state)
    ask(seed=3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "row_format, row",
    [
        ("guanaco", {"text": "### Human: What is red?### Assistant: A leaf."}),
        ("llama2", {"text": "<s>[INST] What is red? [/INST] A leaf. </s>"}),
        ("alpaca", {"instruction": "What is red?", "output": "A leaf."}),
        ("prompt_completion", {"prompt": "What is red?", "completion": " A leaf."}),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": "What is red?"},
                    {"role": "assistant", "content": "A leaf."},
                ]
            },
        ),
    ],
)
def test_a_question_is_written_as_in_training(row_format, row, tokenizer):
    if row_format == "messages":
        tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE
    adds_bos = starts_with_bos(row_format, tokenizer)
    formatting = Formatting(row_format)
    segments, _ = row_segments(row, formatting, tokenizer)
    trained, labels = encode(segments, adds_bos, tokenizer)
    question = chat_segments([{"role": "user", "content": "What is red?"}], formatting, tokenizer)
    prompt, _ = encode(question, adds_bos, tokenizer)
    assert trained[: len(prompt)] == prompt
    assert labels[len(prompt)] != -100 and set(labels[: len(prompt)]) == {-100}


def test_in_a_plain_text_chat_later_questions_get_a_line_of_their_own(tokenizer):
    messages = [{"role": "user", "content": "What is red?"}, {"role": "assistant", "content": " A leaf."}]
    messages.append({"role": "user", "content": "What is blue?"})
    assert chat_segments(messages, Formatting("text"), tokenizer) == [
        ("What is red? A leaf.\nWhat is blue?", True)
    ]


def test_a_prompt_that_leaves_no_room_for_the_answer_is_refused(tokenizer):
    writer = PromptWriter(tokenizer, Formatting("text"), max_tokens=4)
    assert len(writer.row({"text": "What"}, "row 1")) <= 4
    with pytest.raises(InputError, match=r"row 2 has .* tokens"):
        writer.row({"text": "What does a red leaf look like?"}, "row 2")


def test_the_models_own_sampling_settings_are_ignored(adapter, base, tokenizer, tmp_path):
    """Such as Qwen's temperature, penalties and beams. Only its end tokens count."""
    shutil.copytree(base, tmp_path / "model")
    settings = {"num_beams": 3, "repetition_penalty": 5.0, "max_length": 9, "min_p": 0.9}
    settings["eos_token_id"] = [2, 7]
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    ids = prompt_ids(tokenizer, ROWS[0])
    own, plain = (
        load_base(folder, torch.float32, torch.device("cpu")) for folder in (str(tmp_path / "model"), base)
    )
    assert stop_ids(own, tokenizer) == sorted({2, 7, tokenizer.eos_token_id})
    options = {"autocast": FP32, "max_new_tokens": 12}
    assert generate(own, tokenizer, [ids], **options) == generate(plain, tokenizer, [ids], **options)
    options |= {"do_sample": True, "seed": 1}
    assert generate(own, tokenizer, [ids], **options) == generate(plain, tokenizer, [ids], **options)


@pytest.mark.parametrize(
    "flags, changed",
    [
        ("--do_sample --temperature 3", {"do_sample": True, "temperature": 3.0}),
        ("--do_sample --top_k 2", {"do_sample": True, "top_k": 2}),
        ("--do_sample --top_p 0.3", {"do_sample": True, "top_p": 0.3}),
        ("--do_sample --seed 5", {"do_sample": True, "seed": 5}),
        ("--repetition_penalty 1.5", {"repetition_penalty": 1.5}),
        ("--max_new_tokens 3", {"max_new_tokens": 3}),
        ("--bnb_4bit_quant_type fp4", {"quantization": ("fp4", True)}),
        ("--no_bnb_4bit_use_double_quant", {"quantization": ("nf4", False)}),
        ("--no_load_in_4bit", {"quantization": None}),
        ("--dtype bfloat16", {"dtype": torch.bfloat16}),
    ],
)
def test_every_flag_reaches_the_model(adapter, base, flags, changed, monkeypatch):
    calls = []

    def record(model, tokenizer, prompts, autocast, **options):
        layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
        state = getattr(layer.weight, "quant_state", None)
        quantization = state and (state.quant_type, state.nested)
        calls.append(options | {"quantization": quantization, "dtype": model.get_base_model().dtype})

    monkeypatch.setattr(script, "generate", record)
    argv = ["--model", base, "--adapter", adapter[1], "--prompt", "What?", "--max_new_tokens", "40"]
    for more in ([], flags.split()):
        script.main([*argv, *more])
    (plain, got) = ({name: call.get(name) for name in changed} for call in calls)
    assert got == changed and plain != changed


def test_flags_that_are_not_given_are_as_in_the_training(run, base):
    _, folder = run("--max_steps 1 --bnb_4bit_quant_type fp4 --no_bnb_4bit_use_double_quant --dtype bfloat16")
    argv = ["--model", base, "--adapter", str(folder)]
    config = flags_of(argv)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("fp4", False)
    assert (config.dtype, config.dataset_format) == ("bfloat16", "prompt_completion")
    config = flags_of([*argv, "--bnb_4bit_quant_type", "nf4", "--dtype", "float32"])
    assert (config.bnb_4bit_quant_type, config.dtype) == ("nf4", "float32")
    assert flags_of([*argv, "--dataset_format", "auto"]).dataset_format == "prompt_completion"
    settings = json.loads((folder / SETTINGS).read_text())
    for name in KEPT_SETTINGS:
        (folder / SETTINGS).write_text(json.dumps({key: settings[key] for key in settings if key != name}))
        if name in EARLIER_SETTINGS:
            assert getattr(flags_of(argv), name, EARLIER_SETTINGS[name]) == EARLIER_SETTINGS[name]
        else:
            with pytest.raises(InputError, match=name):
                flags_of(argv)
    (folder / SETTINGS).write_text('{"dtype": "float32"')
    with pytest.raises(InputError, match=f"{SETTINGS} is corrupt"):
        flags_of(argv)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_answers_with_one_line(base, tmp_path):
    (tmp_path / "prompts.txt").write_text("What is red?\nWhat is blue?\n")
    argv = ["--model", base, "--prompts_file", str(tmp_path / "prompts.txt"), "--max_new_tokens", "2"]
    with pytest.raises(SystemExit, match="cannot be written after 0 answers: No space left on device"):
        script.main([*argv, "--output_file", "/dev/full"])


def test_answers_are_written_batch_by_batch(tmp_path):
    """A run that is killed keeps the answers that it has."""
    rows, path = [{"prompt": str(number)} for number in range(3)], tmp_path / "answers.jsonl"
    lines = []

    def batches():
        yield ["a", " b "]
        lines.extend(path.read_text().splitlines())
        yield ["c"]

    script.write_answers(rows, batches(), path)
    assert [json.loads(line)["answer"] for line in lines] == ["a", "b"]
    assert path.read_text().splitlines()[2:] == ['{"prompt": "2", "answer": "c"}']


def test_characters_that_the_terminal_lacks_are_printed_as_question_marks(base, monkeypatch, capsys):
    argv = ["--model", base, "--prompt", "What is \u96ea?", "--max_new_tokens", "20", "--dtype", "float32"]
    script.main(argv)
    answer = capsys.readouterr().out
    assert any(ord(character) > 255 for character in answer)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stdout)
    script.main(argv)
    stdout.flush()
    assert stdout.buffer.getvalue() == answer.encode("latin-1", errors="replace")


def test_ctrl_c_ends_the_command_without_a_traceback(base, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "load_base_for", interrupt)
    with pytest.raises(SystemExit) as stop:
        script.main(["--model", base, "--prompt", "What?", "--max_new_tokens", "9"])
    assert stop.value.code == 130


def test_an_adapter_on_another_base_answers_only_if_asked(run, base, tmp_path):
    _, folder = run("--max_steps 1")
    other = shutil.copytree(base, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1000] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    argv = ["--model", str(other), "--adapter", str(folder), "--prompt", "What?", "--max_new_tokens", "2"]
    with pytest.raises(SystemExit, match=r"was trained on another base than --model.* --allow_other_base"):
        script.main(argv)
    script.main([*argv, "--allow_other_base"])


def test_a_warning_is_printed_if_the_adapters_settings_are_unknown(run, base, capsys):
    _, folder = run("--max_steps 1")
    (folder / SETTINGS).unlink()
    assert flags_of(["--model", base, "--adapter", str(folder)]).dataset_format == "auto"
    assert f"has no {SETTINGS}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop(next(iter(tensors))), "it lacks base_model"),
        (
            lambda tensors: tensors.update(
                {"base_model.model.model.layers.9.x.lora_A.weight": torch.ones(1)}
            ),
            "layers.9",
        ),
        (lambda tensors: tensors.update({next(iter(tensors)): torch.ones(3, 3)}), "does not fit"),
    ],
)
def test_an_incomplete_adapter_is_refused(run, base, change, message):
    _, folder = run("--max_steps 1")
    tensors = load_file(folder / ADAPTER)
    change(tensors)
    save_file(tensors, folder / ADAPTER)
    with pytest.raises(SystemExit, match=message):
        script.main(["--model", base, "--adapter", str(folder), "--prompt", "What?", "--max_new_tokens", "9"])


@pytest.mark.parametrize(
    "field, value",
    [("peft_type", "NEWTYPE"), ("r", "x"), ("init_lora_weights", "pissa"), ("modules_to_save", ["lm_head"])],
)
def test_an_adapter_that_peft_cannot_use_is_refused(run, base, field, value):
    _, folder = run("--max_steps 1")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(SystemExit, match=r"error: .*adapter"):
        script.main(["--model", base, "--adapter", str(folder), "--prompt", "What?", "--max_new_tokens", "9"])


def test_an_answer_does_not_replace_a_column_of_the_row(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "What?", "answer": "a reference"}')
    with pytest.raises(SystemExit, match="column 'answer'"):
        script.main(["--model", base, "--prompts_file", str(rows), "--max_new_tokens", "9"])


def test_a_hub_adapter_brings_its_settings_and_tokenizer(run, base, tmp_path, monkeypatch):
    """From the hub's cache, laid out as by hf_hub_download; the network is not used."""
    _, folder = run("--max_steps 1 --bnb_4bit_quant_type fp4")
    snapshot = tmp_path / "hub" / "models--someone--adapter" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    check_adapter("someone/adapter")
    assert flags_of(["--model", base, "--adapter", "someone/adapter"]).bnb_4bit_quant_type == "fp4"
    assert adapter_file("someone/adapter", "tokenizer_config.json").parent == snapshot
    assert adapter_file("someone/adapter", "no-such-file.json") is None
    base_model = load_base(base, torch.float32, torch.device("cpu"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # PEFT would ask the hub now
    assert load_adapter(base_model, "someone/adapter", is_trainable=False)


def test_the_chat_continues_after_an_interruption_and_after_too_long_a_question(
    tokenizer, monkeypatch, capsys
):
    asked, lines = [], iter(["first", "second", "word " * 99, "third", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))

    def reply(prompts, seed, streamer):
        asked.append(tokenizer.decode(prompts[0]))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [" an answer"]

    script.chat(PromptWriter(tokenizer, Formatting("guanaco"), max_tokens=120), reply, seed=0)
    assert len(asked) == 3 and "first" in asked[2] and "an answer" in asked[2] and "second" not in asked[2]
    assert "stopped" in (printed := capsys.readouterr().out) and "the prompt has" in printed


def chat_with(writer: PromptWriter, questions: list[str], answer, monkeypatch) -> list[str]:
    """Ask questions in a chat; returns the prompts as text. `answer` is a function of a prompt's text."""
    asked, lines = [], iter([*questions, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))

    def reply(prompts, seed, streamer):
        asked.append(writer.tokenizer.decode(prompts[0]))
        return [answer(asked[-1])]

    script.chat(writer, reply, seed=0)
    return asked


@pytest.mark.parametrize("row_format", ["messages", "guanaco", "llama2", "text"])
def test_the_chat_continues_after_an_empty_answer(tokenizer, monkeypatch, capsys, row_format):
    writer = PromptWriter(tokenizer, Formatting(row_format), max_tokens=300)
    asked = chat_with(
        writer, ["one", "two", "three"], lambda prompt: " \n" if "two" in prompt else " fine", monkeypatch
    )
    assert len(asked) == 3 and "one" in asked[2] and "fine" in asked[2] and "two" not in asked[2]
    assert capsys.readouterr().out.count("(the answer is empty: ") == 1


@pytest.mark.parametrize("row_format", ["messages", "guanaco", "llama2"])
def test_the_chat_forgets_its_oldest_turns_once_the_context_is_full(
    tokenizer, monkeypatch, capsys, row_format
):
    """Every prompt has as many of the last turns as fit, in whole pairs, and none was refused."""
    writer = PromptWriter(tokenizer, Formatting(row_format), max_tokens=120)
    questions = [f"q{number} a leaf?" for number in range(12)]
    turns = []
    for question in questions:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": "a cloud"}]
    unlimited = PromptWriter(tokenizer, Formatting(row_format), max_tokens=9999)
    expected = []
    for last in range(12):
        prompts = [unlimited.chat(turns[2 * first : 2 * last + 1]) for first in range(last + 1)]
        expected.append(next(tokenizer.decode(ids) for ids in prompts if len(ids) <= 120))
    asked = chat_with(writer, questions, lambda _: "a cloud", monkeypatch)
    assert asked == expected and "q0" not in asked[-1] and "q10" in asked[-1]
    printed = capsys.readouterr().out
    assert "(the context is full: the oldest question is forgotten)" in printed
    assert "leaves 120 for a prompt" not in printed


def test_the_system_turn_stays_when_the_context_is_full(tokenizer):
    roles = ["system", *["user", "assistant"] * 5, "user"]
    messages = [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(roles)]
    unlimited = PromptWriter(tokenizer, Formatting("messages"), max_tokens=9999)
    want = unlimited.chat([messages[0], *messages[-3:]])
    writer = PromptWriter(tokenizer, Formatting("messages"), max_tokens=len(want))
    assert script.write_what_fits(writer, messages) == (want, [messages[0], *messages[-3:]])


def test_a_question_that_does_not_fit_alone_is_refused_and_nothing_is_forgotten(
    tokenizer, monkeypatch, capsys
):
    writer = PromptWriter(tokenizer, Formatting("guanaco"), max_tokens=120)
    asked = chat_with(writer, ["one", "word " * 99, "two"], lambda _: "fine", monkeypatch)
    assert len(asked) == 2 and "one" in asked[1]
    printed = capsys.readouterr().out
    assert "leaves 120 for a prompt" in printed and "forgotten" not in printed


def test_the_chat_tells_if_its_format_has_no_history(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda _: "")
    script.chat(PromptWriter(tokenizer, Formatting("alpaca"), max_tokens=120), None, seed=0)
    assert "stands alone" in capsys.readouterr().out


# ---------------------------------------------------------------- a tokenizer that does not fit


@pytest.fixture
def asks(base, rows_file, tmp_path):
    """Every way to ask a model, as a function of its folder; answers a second, longer prompt too."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[6]) + "\n")
    answers, flags = str(tmp_path / "answers"), ["--dtype", "float32", "--max_new_tokens", "2"]

    def ask(way: str, model: str) -> None:
        argv = ["--model", model, *flags]
        if way == "prompt":
            script.main([*argv, "--prompt", ROWS[0]["prompt"]])
        elif way == "prompts_file":
            script.main([*argv, "--prompts_file", str(prompts), "--output_file", answers])
        elif way == "chat":
            script.main(argv)
        else:
            evaluate.main([*argv, "--prompts_file", str(prompts), "--output_file", answers])

    return ask


WAYS = pytest.mark.parametrize("way", ["prompt", "prompts_file", "chat", "evaluate"])


@WAYS
def test_a_tokenizer_without_eos_is_refused_in_one_line(base, asks, tmp_path, monkeypatch, way):
    model = shutil.copytree(base, tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    lines = iter([ROWS[0]["prompt"], ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    with pytest.raises(SystemExit, match=r"error: the tokenizer has no end-of-sequence token"):
        asks(way, str(model))


@WAYS
def test_a_prompt_beyond_the_vocabulary_is_refused_in_one_line(
    base, asks, tmp_path, monkeypatch, capsys, way
):
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    load_tokenizer(base).save_pretrained(tmp_path / "small")
    lines = iter([ROWS[0]["prompt"], ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    message = r"the tokenizer produces token id \d+, but the model has only 100 tokens"
    if way == "chat":  # which goes on without that question
        asks(way, str(tmp_path / "small"))
        assert re.search(message, capsys.readouterr().out)
        return
    with pytest.raises(SystemExit, match=message):
        asks(way, str(tmp_path / "small"))


def test_a_sample_prompt_beyond_the_vocabulary_is_refused_before_the_training(tmp_path, base, tokenizer):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": ROWS[0]["prompt"]}) + "\n")
    largest = max(prompt_ids(tokenizer, ROWS[0]))
    settings = (str(prompts), tokenizer, Formatting("prompt_completion"))
    config = LlamaConfig(vocab_size=largest + 1, max_position_embeddings=256)
    assert read_samples(*settings, config, 8).prompts == [prompt_ids(tokenizer, ROWS[0])]
    config.vocab_size = largest
    with pytest.raises(InputError, match=rf"token id {largest}, but the model has only {largest} tokens"):
        read_samples(*settings, config, 8)


# ---------------------------------------------------------------- the command itself


def command(*flags: str, **options):
    return subprocess.run(
        [sys.executable, "generate.py", *flags], cwd=ROOT, capture_output=True, text=True, **options
    )


def test_a_file_of_prompts_gives_a_file_of_answers(adapter, base, rows_file, tmp_path):
    _, folder = adapter
    output = tmp_path / "answers.jsonl"
    result = command(
        *("--model", base, "--adapter", folder, "--dtype", "float32", "--prompts_file", rows_file),
        *("--output_file", str(output), "--max_new_tokens", "60", "--batch_size", "10"),
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{"prompt": line["prompt"], "completion": line["completion"]} for line in lines] == ROWS
    assert sum(line["answer"] == line["completion"] for line in lines) > len(ROWS) / 2


def test_each_line_of_a_txt_file_is_a_prompt(adapter, base, tmp_path):
    _, folder = adapter
    prompts = tmp_path / "questions.txt"
    prompts.write_text("".join(f"{row['prompt']}\n" for row in ROWS[:3]))
    result = command(
        *("--model", base, "--adapter", folder, "--dtype", "float32", "--prompts_file", str(prompts)),
        *("--max_new_tokens", "60"),
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "questions.answers.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in ROWS[:3]]
    assert all(line["answer"] for line in lines)


def test_the_format_of_the_training_is_saved_with_the_adapter(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "What is red?", "output": "A leaf."}\n' * 3)
    flags = ["--model", base, "--dataset", str(rows), "--output_dir", str(tmp_path / "out")]
    train.train(parse_args(TrainConfig, [*flags, "--dtype", "float32", "--max_steps", "1"]))
    flags = ["--model", base, "--adapter", str(tmp_path / "out"), "--dtype", "float32"]
    flags += ["--max_new_tokens", "2", "--prompts_file", str(rows)]
    result = command(*flags)  # the rows have no column of another format
    assert result.returncode == 0, result.stderr


def test_the_chat_answers_until_the_input_ends(adapter, base):
    _, folder = adapter
    question = ROWS[0]["prompt"]
    flags = ["--model", base, "--adapter", folder, "--dtype", "float32", "--max_new_tokens", "30"]
    result = command(*flags, input=f"{question}\n")
    assert result.returncode == 0, result.stderr
    alone = command(*flags, "--prompt", question)
    assert alone.stdout.strip() and alone.stdout.strip() in result.stdout


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--prompt", "x", "--prompts_file", "y"], 2, "exclude each other"),
        (["--prompt", "x", "--adapter", "nowhere", "--max_new_tokens", "5"], 1, "nowhere"),
        (["--prompts_file", "missing.txt"], 1, "missing.txt"),
        (["--prompts_file", "a.txt", "--output_file", "./a.txt"], 1, "overwrite the prompts"),
        (["--prompt", "word " * 300], 1, "leaves 216 for a prompt"),
        (["--prompt", "x", "--max_new_tokens", "256"], 1, "no room for a prompt: the model's context is 256"),
        (["--prompts_file", "README.md", "--output_file", "nowhere/a.jsonl"], 1, "existing folder"),
        (["--prompts_file", "README.md", "--output_file", "tests"], 1, "must be a file"),
    ],
)
def test_mistakes_are_one_line(base, flags, code, message):
    result = command("--model", base, "--dtype", "float32", "--max_new_tokens", "40", *flags)
    assert result.returncode == code
    line = result.stderr.strip().splitlines()[-1]
    assert message in line and "Traceback" not in result.stderr
