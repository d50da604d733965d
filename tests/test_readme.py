"""The README says what is true: its commands parse, its flag tables are the configuration's.

After a change of flags: python tests/test_readme.py rewrites the tables.
"""

import dataclasses
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from qlora.config import EvaluateConfig, GenerateConfig, MergeConfig, TrainConfig, parse_args  # noqa: E402
from qlora.log import comparison_parser  # noqa: E402

README = ROOT / "README.md"
CONFIGS = {
    "train.py": TrainConfig, "generate.py": GenerateConfig, "qlora.evaluate": EvaluateConfig,
    "qlora.merge": MergeConfig,
}  # fmt: skip


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def flag_table(config_class) -> str:
    """A Markdown table of every flag, its default and its help text."""
    rows = ["| flag | default | |", "|---|---|---|"]
    for field in dataclasses.fields(config_class):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = " ".join(field.default_factory())
        elif default is dataclasses.MISSING:
            default = "required"
        elif default is None or isinstance(default, bool):
            default = {None: "", True: "on", False: "off"}[default]
        help_text = field.metadata["help"].replace("%%", "%").replace("|", "\\|")
        rows.append(f"| `--{field.name}` | {default} | {help_text} |")
    return "\n".join(rows)


def with_tables(text: str) -> str:
    for config_class in CONFIGS.values():
        name = config_class.__name__
        pattern = rf"(<!-- flags of {name} -->\n).*?(<!-- end -->)"
        table = flag_table(config_class)
        text = re.sub(pattern, lambda match, t=table: f"{match[1]}{t}\n{match[2]}", text, flags=re.DOTALL)
    return text


def parse(words: list[str]):
    """What the words behind `python` come to; a mistake ends the test."""
    program, *flags = words[1:] if words[0] == "-m" else words
    if program == "qlora.log":
        return comparison_parser().parse_args(flags)
    return parse_args(CONFIGS[program], flags)


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command):
    program, *words = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert program == ".venv/bin/python"
        parse(words)


def test_there_are_commands_of_every_kind():
    text = "\n".join(commands())
    assert all(word in text for word in ("make demo", "make test", "train.py --model", "generate.py --model"))
    assert all(
        f"-m qlora.{name} " in text
        for name in ("evaluate --model", "evaluate --quantization", "merge", "log")
    )


def test_the_flag_tables_are_the_configurations():
    assert README.read_text() == with_tables(README.read_text()), "run: python tests/test_readme.py"


def test_every_named_file_and_function_exists():
    text = README.read_text()
    for target in re.findall(r"\]\(([\w/.]+)\)", text):
        assert (ROOT / target).exists(), target
    for names, file in re.findall(r"\| ((?:`\w+`(?:, )?)+) in \[(qlora/[\w/]+\.py)\]", text):
        for name in re.findall(r"`(\w+)`", names):
            defined = rf"^((def|class) {name}\b|{name} = )"
            assert re.search(defined, (ROOT / file).read_text(), re.MULTILINE), name
    for file in re.findall(r"^(?:qlora/)?\w+\.py(?= )", text, re.MULTILINE):
        assert (ROOT / file).exists(), file
    listed = set(re.findall(r"^(qlora/[\w/]+\.py) ", text, re.MULTILINE))
    assert listed == {str(path.relative_to(ROOT)) for path in (ROOT / "qlora").rglob("[a-z]*.py")}


def test_every_test_that_proves_a_promise_exists():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+?)(\.\.\.)?`", README.read_text())
    assert len(named) > 10
    for name, is_cut in named:
        assert re.search(rf"^def {name}{'' if is_cut else '[(]'}", tests, re.MULTILINE), name


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
