"""Reading Markdown: code blocks, and the commands in them as bash would run them."""

import importlib
import re
import subprocess
import tempfile
from pathlib import Path

from torch.distributed.run import get_args_parser

from qlora.config import EvaluateConfig, ExportConfig, GenerateConfig, MergeConfig, TrainConfig
from qlora.flags import parse_args
from qlora.log import comparison_parser
from tests.conftest import ROOT

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
CONFIGS = {
    "train.py": TrainConfig, "generate.py": GenerateConfig, "qlora.evaluate": EvaluateConfig,
    "qlora.merge": MergeConfig, "qlora.export": ExportConfig,
}  # fmt: skip
PYTHON, TORCHRUN = ".venv/bin/python", ".venv/bin/torchrun"
# Programs that a bash block may call. Each is replaced by a stub that only writes down its arguments.
PROGRAMS = [PYTHON, TORCHRUN, "bin/python3", "bin/make", "bin/cp", "bin/scontrol"]
STUB = '#!/bin/sh\nprintf \'%s\\0\' "$0" "$@" >> commands\necho >> commands\n'


def code_blocks(text: str, language: str) -> list[str]:
    """The content of each fenced block of a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [content for name, content in blocks if name == language]


def commands(text: str) -> list[list[str]]:
    """The programs that the bash blocks of a text call, each with its arguments: loops run, variables and
    quotes resolved. Programs that are not in PROGRAMS are an error."""
    with tempfile.TemporaryDirectory() as folder:
        for program in PROGRAMS:
            path = Path(folder, program)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(STUB)
            path.chmod(0o755)
        for block in code_blocks(text, "bash"):
            subprocess.run(
                ["/bin/bash", "-euc", block], cwd=folder, check=True, env={"PATH": f"{folder}/bin"}
            )
        written = Path(folder, "commands")
        records = written.read_text().split("\0\n")[:-1] if written.exists() else []
    calls = [record.removeprefix(f"{folder}/bin/").split("\0") for record in records]
    return [[program.removeprefix("./"), *arguments] for program, *arguments in calls]


def check_command(program: str, *arguments: str) -> None:
    """Raise AssertionError or SystemExit unless the program takes these arguments."""
    if program == "make":
        targets = [word for word in arguments if "=" not in word]
        names = [word.partition("=")[0] for word in arguments if "=" in word]
        for definition in [*(f"{target}:" for target in targets), *(f"{name} ?=" for name in names)]:
            assert f"\n{definition}" in (ROOT / "Makefile").read_text(), definition
    elif program == PYTHON:
        parse(list(arguments))
    elif program == TORCHRUN:
        options = get_args_parser().parse_args(arguments)
        parse([options.training_script, *options.training_script_args])
    elif program == "python3":
        assert arguments[:2] == ("-m", "venv")


def parse(words: list[str]):
    """What the words after `python` parse to; None for programs without a parser that can be asked."""
    program, *flags = words[1:] if words[0] == "-m" else words
    if program == "qlora.log":
        return comparison_parser().parse_args(flags)
    if program == "examples.dpo":
        return parse_args(importlib.import_module(program).DpoConfig, flags)
    if program in CONFIGS:
        return parse_args(CONFIGS[program], flags)
    if program == "pip":
        assert flags[:2] == ["install", "-r"] and (ROOT / flags[2]).is_file(), flags
        return None
    source = (ROOT / program).read_text()
    known = set(re.findall(r'add_argument\(\s*"(--\w+)"', source))
    if "parse_known_args" in source:  # it hands the others to train.py
        known |= {f"--{name}" for name in TrainConfig.__dataclass_fields__}
    assert {flag for flag in flags if flag.startswith("--")} <= known, words
    return None
