"""Generation: batches equal single prompts, formats travel with the adapter, the real command line."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch

import train
from qlora.config import TrainConfig, parse_args
from qlora.generation import generate
from qlora.prompts import chat_segments, encode, prompt_segments, row_segments, starts_with_bos
from tests.conftest import ROOT, ROWS

FP32 = partial(torch.autocast, "cpu", enabled=False)


@pytest.fixture(scope="module")
def adapter(base, rows_file, tmp_path_factory):
    """An adapter that has learned some of the rows by heart."""
    out = str(tmp_path_factory.mktemp("generate") / "out")
    argv = [
        "--model",
        base,
        "--dataset",
        rows_file,
        "--output_dir",
        out,
        "--dtype",
        "float32",
        "--num_train_epochs",
        "25",
        "--learning_rate",
        "1e-2",
        "--lora_target_modules",
        "all-linear",
        "--lora_dropout",
        "0",
    ]
    return train.train(parse_args(TrainConfig, argv)), out


def prompt_ids(tokenizer, row) -> list[int]:
    segments = prompt_segments(row, "prompt_completion", "text", tokenizer)
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


def test_sampling_depends_on_the_seed_alone_and_leaves_the_random_state(adapter, tokenizer):
    model, _ = adapter
    ask = partial(
        generate,
        model,
        tokenizer,
        [prompt_ids(tokenizer, ROWS[0])],
        FP32,
        max_new_tokens=12,
        do_sample=True,
        temperature=3.0,
    )
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
        from qlora.prompts import FALLBACK_CHAT_TEMPLATE

        tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE
    adds_bos = starts_with_bos(row_format, tokenizer)
    trained, labels = encode(row_segments(row, row_format, "text", tokenizer), adds_bos, tokenizer)
    question = chat_segments([{"role": "user", "content": "What is red?"}], row_format, tokenizer)
    prompt, _ = encode(question, adds_bos, tokenizer)
    assert trained[: len(prompt)] == prompt
    assert labels[len(prompt)] != -100 and set(labels[: len(prompt)]) == {-100}


def command(*flags: str, **options):
    return subprocess.run(
        [sys.executable, "generate.py", *flags], cwd=ROOT, capture_output=True, text=True, **options
    )


def test_a_file_of_prompts_becomes_a_file_of_answers(adapter, base, rows_file, tmp_path):
    _, folder = adapter
    output = tmp_path / "answers.jsonl"
    result = command(
        "--model",
        base,
        "--adapter",
        folder,
        "--dtype",
        "float32",
        "--prompts_file",
        rows_file,
        "--output_file",
        str(output),
        "--max_new_tokens",
        "60",
        "--batch_size",
        "10",
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{"prompt": line["prompt"], "completion": line["completion"]} for line in lines] == ROWS
    assert sum(line["answer"] == line["completion"] for line in lines) > len(ROWS) / 2


def test_lines_of_text_are_prompts_too(adapter, base, tmp_path):
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


def test_the_format_of_the_training_is_kept_beside_the_adapter(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "What is red?", "output": "A leaf."}\n' * 3)
    flags = ["--model", base, "--dataset", str(rows), "--output_dir", str(tmp_path / "out")]
    train.train(parse_args(TrainConfig, [*flags, "--dtype", "float32", "--max_steps", "1"]))
    flags = [
        "--model",
        base,
        "--adapter",
        str(tmp_path / "out"),
        "--dtype",
        "float32",
        "--max_new_tokens",
        "2",
    ]
    result = command(*flags, "--prompts_file", str(rows))  # has no column that another format would know
    assert result.returncode == 0, result.stderr


def test_the_chat_answers_until_the_input_ends(adapter, base):
    _, folder = adapter
    question = ROWS[0]["prompt"]
    result = command(
        "--model",
        base,
        "--adapter",
        folder,
        "--dtype",
        "float32",
        "--max_new_tokens",
        "30",
        input=f"{question}\n",
    )
    assert result.returncode == 0, result.stderr
    alone = command(
        "--model",
        base,
        "--adapter",
        folder,
        "--dtype",
        "float32",
        "--max_new_tokens",
        "30",
        "--prompt",
        question,
    )
    assert alone.stdout.strip() and alone.stdout.strip() in result.stdout


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--prompt", "x", "--prompts_file", "y"], 2, "exclude each other"),
        (["--prompt", "x", "--adapter", "nowhere", "--max_new_tokens", "5"], 1, "nowhere"),
        (["--prompts_file", "missing.txt"], 1, "missing.txt"),
        (["--prompts_file", "a.txt", "--output_file", "./a.txt"], 1, "overwrite the prompts"),
        (["--prompt", "word " * 300], 1, "context of 256"),
    ],
)
def test_mistakes_are_one_line(base, flags, code, message):
    result = command("--model", base, "--dtype", "float32", *flags)
    assert result.returncode == code
    line = result.stderr.strip().splitlines()[-1]
    assert message in line and "Traceback" not in result.stderr
