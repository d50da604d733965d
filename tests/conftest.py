"""A tiny random Llama, a tokenizer made on the spot, and rows to train on; all offline, on the CPU."""

import atexit
import os
import shutil
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of transformers
if "gpu" not in sys.argv:  # without -m gpu the tests are those of a CPU, also where there is a card
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before any import of torch or bitsandbytes, which look at once
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_CACHE"] = CACHE = tempfile.mkdtemp(prefix="qlora-tests-")

import json
import signal
from pathlib import Path

import pytest
import torch

atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started to ignore it
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.ranks import Ranks, start, start_launcher  # noqa: E402
from tests.tiny_llama import make_base, make_tokenizer  # noqa: E402

# Double quantization on the CPU depends on the number of threads: identity needs it fixed.
torch.set_num_threads(1)


COLORS = ["red", "green", "blue", "white", "black", "brown"]
THINGS = ["leaf", "cloud", "river", "stone", "house", "apple tree", "very old wooden boat"]
ROWS = [
    {
        "prompt": f"What does a {color} {thing} look like?",
        "completion": f"A {color} {thing} is {color} all over.",
    }
    for color in COLORS
    for thing in THINGS
]
TEXTS = [f"{row['prompt']} {row['completion']}" for row in ROWS] + [
    "### Human: ### Assistant: [INST] [/INST]"
]


@pytest.fixture(scope="session")
def session_tokenizer():
    return make_tokenizer(TEXTS, vocab_size=448)


@pytest.fixture
def tokenizer(session_tokenizer, tmp_path):
    """A tokenizer of the test's own, which it may change."""
    session_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return type(session_tokenizer).from_pretrained(tmp_path / "tokenizer")


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    """Folder of a two-layer Llama with random weights and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_base(
        folder,
        TEXTS,
        vocab_size=448,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    return str(folder)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> str:
    """42 prompt/completion rows of different lengths."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture(scope="session")
def adapter(base, rows_file, tmp_path_factory):
    """(model, folder) of an adapter that has learned some of the rows by heart."""
    import train
    from qlora.config import TrainConfig
    from qlora.flags import parse_args

    out = str(tmp_path_factory.mktemp("adapter") / "out")
    flags = f"--model {base} --dataset {rows_file} --output_dir {out} --dtype float32 --num_train_epochs 25 "
    flags += "--learning_rate 1e-2 --lora_target_modules all-linear --lora_dropout 0 --no_packing"
    return train.train(parse_args(TrainConfig, flags.split())), out


@pytest.fixture(scope="session")
def launcher():
    """The process that forks what tests.ranks.start() runs."""
    process = start_launcher()
    yield process
    process.stdin.close()  # not kill(): it has a cache to remove
    process.wait()


@pytest.fixture
def start_run(launcher, base, rows_file, tmp_path):
    """Start train.py in some processes; {rank} in a flag is the number of the process."""

    def start_run(
        count: int, *flags: str, out: str = "out", function: str = "tests.ranks:train_rank"
    ) -> Ranks:
        argv = ["--model", base, "--dataset", rows_file, "--output_dir", str(tmp_path / out)]
        argv += ["--dtype", "float32", "--no_packing", "--learning_rate", "3e-3"]
        argv += [word for flag in flags for word in flag.split()]
        log = tmp_path / f"{out}.log"
        return start(launcher, count, function, argv, log=log)

    return start_run


@pytest.fixture
def run(base, rows_file, tmp_path, monkeypatch):
    """Run train.py's train() on the tiny base in this process; returns (model, output folder).

    Its pictures are empty files and its garbage stays: each would take a quarter of the time of a short run.
    """
    import train
    from qlora.config import TrainConfig
    from qlora.flags import parse_args

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **options: None)
    monkeypatch.setattr("gc.collect", lambda generation=2: 0)

    def run(*flags: str, out: str = "out", model: str = base, dataset: str = rows_file):
        flags = [word for flag in flags for word in flag.split()]
        argv = [
            "--model",
            model,
            "--dataset",
            dataset,
            "--output_dir",
            str(tmp_path / out),
            "--dtype",
            "float32",
            "--learning_rate",
            "3e-3",
            *flags,
        ]
        if "--adapter" not in flags:
            argv[6:6] = ["--lora_dropout", "0"]
        if "--packing" not in flags:  # 42 short rows would be one or two packs
            argv[6:6] = ["--no_packing"]
        if "--compile" not in flags:  # on a card it would take longer than the rest of a test
            argv[6:6] = ["--no_compile"]
        return train.train(parse_args(TrainConfig, argv)), tmp_path / out

    return run
