"""The layout: rooms import only from the floors below them, and train.py stays small enough to be read."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ["errors", "ranks", "data", "model", "optim", "speed", "run", "evaluation"]  # lowest first
# The command line, above all rooms.
COMMANDS = {"flags", "config", "commands", "evaluate", "merge", "export", "log"}


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it the import stands."""
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("floor", FLOORS)
def test_a_room_imports_only_from_the_floors_below_it(floor):
    file = ROOT / "qlora" / f"{floor}.py"
    files = [file] if file.exists() else (ROOT / "qlora" / floor).glob("*.py")
    forbidden = {*FLOORS[FLOORS.index(floor) + 1 :], *COMMANDS}
    for path in files:
        parts = [name.split(".") for name in imported_modules(path)]
        imported = {name[1] for name in parts if name[0] == "qlora" and len(name) > 1}
        assert not imported & forbidden, f"{path} imports {imported & forbidden}"
        assert not {name[0] for name in parts} & {"train", "generate", "examples", "tests"}, path


def test_the_modules_of_a_room_import_each_other_in_one_direction():
    graph = {}
    for path in (ROOT / "qlora").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[name] = {other for other in imported_modules(path) if other.startswith("qlora.")}
    order = []
    while graph:
        leaves = [name for name, imported in graph.items() if not imported & graph.keys() - {name}]
        assert leaves, f"these modules import each other in a circle: {sorted(graph)}"
        order += leaves
        for name in leaves:
            del graph[name]


def test_train_py_stays_small_enough_to_be_read():
    source = (ROOT / "train.py").read_text()
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert len(source.splitlines()) <= 300
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 150
    assert len([node for node in tree.body if node in functions]) == len(functions), "a nested function"
    assert sum(len(node.names) for node in imports) <= 45
