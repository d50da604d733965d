"""The documents say what is true: what they link to exists, their Python blocks print what they say, and the
activations that they count are those of a compiled layer."""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.model.adapter import add_adapter
from qlora.speed.layers import decoder_layers, set_up_layers

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))


def blocks() -> list:
    """(document, source) of every Python block, each a test that is named by its line."""
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
            found = []
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found = [child.name]
            elif isinstance(child, (ast.Assign, ast.AnnAssign)):
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                found = [target.id for target in targets if isinstance(target, ast.Name)]
            names.update(found, (owner + name for name in found))
            if not isinstance(child, ast.FunctionDef):  # what is inside a function is its own
                visit(child, f"{child.name}." if isinstance(child, ast.ClassDef) else owner)

    visit(ast.parse(path.read_text()), "")
    return names


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_every_name_is_defined_in_it(path):
    text = path.read_text()
    targets = re.findall(r"\]\(((?!https?:)[^)#\s]+)", text)
    assert targets
    for target in targets:
        assert (path.parent / target).exists(), target
    for name, target in re.findall(r"\[`([\w.]+)`\]\(([^)]+\.py)\)", text):
        assert name in defined_names(path.parent / target), f"{name} in {target}"


@pytest.mark.parametrize("path, source", blocks())
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
    # The compiler's choice of what to keep, without the code that it would write.
    monkeypatch.setattr("qlora.speed.layers.COMPILER", "aot_eager_decomp_partition")
    d, f, heads, r, tokens = 128, 352, 2, 16, 64
    sizes = {"hidden_size": d, "intermediate_size": f, "num_attention_heads": heads, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).bfloat16()
    model = add_adapter(base, r, 16, dropout, ["q_proj", "v_proj"], False, False).train()
    weights = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def kept(checkpointed: int) -> float:
        """Bytes a token that a forward pass keeps for the backward pass."""
        storages = {}

        def note(tensor):
            is_random_state = tensor.dtype == torch.uint8  # where the real compiler has a few numbers
            if tensor.data_ptr() not in weights and not is_random_state:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        set_up_layers(decoder_layers(base), checkpointed, compile=True, is_random=dropout > 0)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            base.get_decoder()(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        return sum(storage.nbytes() for storage in storages.values()) / tokens

    of_lora = 2 * 2 * r  # A x of q and of v, in 16 bits
    of_attention_and_norms = 4 * heads + 2 * 4  # a float32 for each head, and for each of two norms
    full = 2 * (6 * d + 2 * f) + of_lora + of_attention_and_norms + (2 * d if dropout else 0)
    checkpointed = 2 * 2 * d + 4 * heads  # its input, and what the attention returns
    # The compiler may compute one of the norms' numbers again.
    assert kept(0) - kept(1) == pytest.approx(full - checkpointed, abs=4)
