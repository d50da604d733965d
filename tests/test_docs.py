"""README.md and docs/ say what is true: commands parse, links lead somewhere, Python blocks print what they
say, and the activations that docs/qlora.md counts are those of a compiled layer.

docs/flags.md is generated. After a change of flags: python -m tests.test_docs
"""

import ast
import contextlib
import dataclasses
import io
import re
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.flags import default_of
from qlora.model.adapter import add_adapter
from qlora.speed.layers import decoder_layers, set_up_layers
from tests.conftest import ROOT
from tests.documents import CONFIGS, DOCS, README, check_command, commands

PAGES = [README, *DOCS]
FLAGS = ROOT / "docs" / "flags.md"
INTRODUCTION = """\
# Flags

<!-- Generated from qlora/config.py by `python -m tests.test_docs`. -->

Flags have the names that transformers, TRL and PEFT use for the same thing. Write them with underscores or
dashes (`--max_length`, `--max-length`), but in full. A switch needs no value: `--packing` turns it on,
`--no_packing` off. A mistake in the flags is one line and exit code 2, before anything is loaded. A mistake
that only the data or the model can show is one line and exit code 1, before the training begins.

[train.py](#trainpy), [generate.py](#generatepy), [qlora.evaluate](#qloraevaluate),
[qlora.merge](#qloramerge), [qlora.export](#qloraexport). `python -m qlora.log RUN ...` takes the output
folders of runs, and `--output FILE` for the picture (default: compare.png).
"""
ABOUT = {
    "train.py": """\
The last column says what may change when a run is resumed:

- *free*: may change.
- *same*: must be as it was, unless `--allow_changes` names it. Where other names follow, these are compared,
  by content: the base, the tokenizer, the tokens of all rows (`data`), or the sequences in a step
  (`packs_per_step`).
- *fixed*: must be as it was, because shapes in the checkpoint depend on it. To change it, start a new run
  from the adapter with `--adapter`.

Flags that only select or format rows are free, but the rows that come out must be the same.
""",
    "generate.py": """\
With neither `--prompt` nor `--prompts_file` it is an interactive chat.
""",
    "qlora.evaluate": """\
Run it as `python -m qlora.evaluate`.
""",
    "qlora.merge": """\
Run it as `python -m qlora.merge`.
""",
    "qlora.export": """\
Run it as `python -m qlora.export`. It needs `pip install -r requirements-gguf.txt`.
""",
}


def flags_page() -> str:
    """docs/flags.md."""
    parts = [INTRODUCTION]
    for program, config_class in CONFIGS.items():
        parts += [f"## {program}\n", ABOUT[program], flag_table(config_class, program == "train.py")]
    return "\n".join(parts)


def flag_table(config_class, has_resume: bool) -> str:
    """A Markdown table of every flag: default, help text and, if asked for, what a resumed run may change."""
    columns = ["flag", "default", "", "on resume"][: 3 + has_resume]
    lines = [columns, ["---"] * len(columns)]
    for field in dataclasses.fields(config_class):
        help_text = field.metadata["help"].replace("%%", "%").replace("|", "\\|")
        cells = [f"`--{field.name}`", default_text(field), help_text, resume_text(field)]
        lines.append(cells[: len(columns)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def default_text(field: dataclasses.Field) -> str:
    default = default_of(field)
    if default is dataclasses.MISSING:
        return "required"
    if default is None or isinstance(default, bool):
        return {None: "", True: "on", False: "off"}[default]
    return " ".join(default) if isinstance(default, list) else str(default)


def resume_text(field: dataclasses.Field) -> str:
    """free, same or fixed, with the names that --allow_changes takes where they are not the flag's."""
    is_same = field.metadata["resume"] == "same"
    compared = [field.name] * is_same + list(field.metadata["compares"])
    if field.metadata["sets_shapes"]:
        return "fixed"
    if not compared:
        return "free"
    return "same" if compared == [field.name] else f"same: {', '.join(f'`{name}`' for name in compared)}"


def python_blocks() -> list:
    """(document, source) of every Python block in docs/, each a test that is named after its line."""
    return [
        pytest.param(path, match[1], id=f"{path.name}:{path.read_text()[: match.start()].count(chr(10)) + 1}")
        for path in DOCS
        for match in re.finditer(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    ]


def defined_names(path: Path) -> set[str]:
    """Functions, classes and variables of a module, also inside `if`; methods also as `Class.method`."""
    names = set()

    def visit(node, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            defined = []
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                defined = [child.name]
            elif isinstance(child, (ast.Assign, ast.AnnAssign)):
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                defined = [target.id for target in targets if isinstance(target, ast.Name)]
            names.update(defined, (owner + name for name in defined))
            if not isinstance(child, ast.FunctionDef):  # names inside a function are local
                visit(child, f"{child.name}." if isinstance(child, ast.ClassDef) else owner)

    visit(ast.parse(path.read_text()), "")
    return names


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_every_name_is_defined_in_it(path):
    text = path.read_text()
    links = [*re.findall(r"\]\(((?!https?:)[^)\s]+)", text), *re.findall(r'src="([^"]+)"', text)]
    for file, _, anchor in (link.partition("#") for link in links):
        target = path.parent / file if file else path
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"#{anchor} in {target.name}"
    for name, file in re.findall(r"\[`([\w.]+)`\]\(([^)]+\.py)\)", text):
        assert name in defined_names(path.parent / file), f"{name} in {file}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_parses(path):
    for words in commands(path.read_text()):
        check_command(*words)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_flag_in_the_text_exists(path):
    known = {field.name for config_class in CONFIGS.values() for field in dataclasses.fields(config_class)}
    known |= {"output", "cuda"}  # of qlora.log and tests/torture.py
    known |= {action.dest for action in get_args_parser()._actions}  # of torchrun
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`(--[^`]+)`", prose):
        for name in re.findall(r"--([\w-]+)", code):
            name = name.replace("-", "_")
            assert name in known or name.removeprefix("no_") in known, code


def test_every_named_test_exists():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for path in PAGES:
        for name in re.findall(r"`(test_\w+)`", path.read_text()):
            assert f"\ndef {name}(" in tests, f"{name} in {path.name}"


def test_every_promise_has_a_test():
    rows = re.findall(r"^\| (P\d+) (.*)$", (ROOT / "docs" / "recovery.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == [f"P{number}" for number in range(1, 11)]
    assert all("`test_" in text for _, text in rows)


def test_the_page_of_flags_is_up_to_date():
    assert FLAGS.read_text() == flags_page(), "run: python -m tests.test_docs"


@pytest.mark.parametrize("path, source", python_blocks())
def test_every_python_block_prints_the_comment_at_its_end(path, source):
    expected = re.search(r"((?:^# .*\n)*)\Z", source, re.MULTILINE)[1]
    assert expected, "the block does not say what it prints"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, path.name, "exec"), {})
    assert printed.getvalue().splitlines() == [line[2:] for line in expected.splitlines()]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_compiled_layer_keeps_the_activations_that_the_document_counts(monkeypatch, dropout):
    torch._dynamo.reset()
    # The compiler's choice of what to keep, without generating code.
    monkeypatch.setattr("qlora.speed.layers.COMPILER", "aot_eager_decomp_partition")
    d, f, heads, r, tokens = 128, 352, 2, 16, 64
    sizes = {"hidden_size": d, "intermediate_size": f, "num_attention_heads": heads, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).bfloat16()
    model = add_adapter(base, r, 16, dropout, ["q_proj", "v_proj"], False, False).train()
    weights = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def kept(checkpointed: int) -> float:
        """Bytes per token that a forward pass keeps for the backward pass."""
        storages = {}

        def note(tensor):
            is_random_state = tensor.dtype == torch.uint8  # the real compiler keeps only a few numbers
            if tensor.data_ptr() not in weights and not is_random_state:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        set_up_layers(decoder_layers(base), checkpointed, compile=True, is_random=dropout > 0)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            base.get_decoder()(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        return sum(storage.nbytes() for storage in storages.values()) / tokens

    of_lora = 2 * 2 * r  # A x for q and v, in 16 bits
    of_attention_and_norms = 4 * heads + 2 * 4  # a float32 per head, and per norm
    full = 2 * (6 * d + 2 * f) + of_lora + of_attention_and_norms + (2 * d if dropout else 0)
    checkpointed = 2 * 2 * d + 4 * heads  # its input, and what attention returns
    # The compiler may recompute the number of one of the norms.
    assert kept(0) - kept(1) == pytest.approx(full - checkpointed, abs=4)


if __name__ == "__main__":
    FLAGS.write_text(flags_page())
