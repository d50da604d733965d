"""README.md says what is true: the step is train.py's, the file tree complete, the figures measured.

After a change of the step: python -m tests.test_readme
"""

import re
import textwrap

from tests.conftest import ROOT
from tests.documents import DOCS, PYTHON, README, code_blocks, commands

TEXT = README.read_text()
MAX_LINES = 250
MAX_IMAGE_BYTES = 100_000
# How the first and the last line of each piece begin.
PASTED = [("learning_rate = ", "optimizer.zero_grad("), ("with autocast():", "return loss.detach()")]


def table_rows(text: str) -> list[str]:
    return re.findall(r"^\| .+ \|$", text, re.MULTILINE)


def test_it_can_be_read_in_one_go():
    assert len(TEXT.splitlines()) <= MAX_LINES


def pasted_pieces() -> list[str]:
    """The step, and the body of forward_backward, without the indentation that they have in train.py."""
    lines = (ROOT / "train.py").read_text().splitlines(keepends=True)
    pieces = []
    for first, last in PASTED:
        (start,) = [number for number, line in enumerate(lines) if line.strip().startswith(first)]
        (end,) = [number for number, line in enumerate(lines) if line.strip().startswith(last)]
        pieces.append(textwrap.dedent("".join(lines[start : end + 1])))
    return pieces


def test_the_pasted_step_is_that_of_train_py():
    assert code_blocks(TEXT, "python") == pasted_pieces(), "run: python -m tests.test_readme"


def test_the_file_tree_lists_exactly_the_modules():
    (tree,) = [block for block in code_blocks(TEXT, "") if block.startswith("train.py")]
    listed, room = {}, ""
    for line in tree.splitlines():
        heading = re.match(r"( *)(\w+)/ ", line)
        if heading:
            room = f"qlora/{heading[2]}" if heading[1] else heading[2]
            line = line[heading.end() :]
        listed[room] = f"{listed.get(room, '')} {line}"
    for room in ["qlora", "examples", "benchmarks", *(f"qlora/{path.name}" for path in rooms())]:
        names = re.findall(r"\w+", re.sub(r"\(.*?\)", "", listed[room]))
        assert sorted(names) == sorted(path.stem for path in (ROOT / room).glob("[a-z]*.py")), room


def rooms() -> list:
    return [path for path in (ROOT / "qlora").iterdir() if path.is_dir() and any(path.glob("[a-z]*.py"))]


def test_every_document_is_linked():
    for path in DOCS:
        assert f"](docs/{path.name})" in TEXT, path.name


def test_the_pinned_versions_are_those_of_the_requirements():
    (line,) = re.findall(r"^\| pinned versions \|(.*)$", TEXT, re.MULTILINE)
    pinned = re.findall(r"(\w+) (\d+\.\d+\.\d+)", line)
    assert len(pinned) == 4
    requirements = (ROOT / "requirements.txt").read_text()
    assert all(f"\n{package}=={version}\n" in requirements for package, version in pinned)


def test_every_row_of_the_speed_table_is_in_the_measured_one():
    speed = TEXT.split("\n## Speed\n")[1].split("\n## ")[0]
    measured = (ROOT / "docs" / "performance.md").read_text()
    rows = [row.strip("| ").split(" | ") for row in table_rows(speed)][1:]
    assert len(rows) == 4
    for name, *cells in rows:
        (row,) = [row for row in table_rows(measured) if row.startswith(f"| {name} |")]
        for cell in cells:
            assert cell.split(" (")[0] in row, name


def test_the_figures_at_the_top_follow_from_the_table():
    ours, theirs = re.findall(r"([\d,]+) tokens/s, ([\d.]+) GB", TEXT.split("\n## Speed\n")[1])[:2]
    speeds, gigabytes = ([float(pair[i].replace(",", "")) for pair in (ours, theirs)] for i in (0, 1))
    assert f"**{speeds[0] / speeds[1]:.2f}x the speed" in TEXT
    assert f"**{gigabytes[0] / gigabytes[1]:.2f}x its memory" in TEXT
    top = TEXT.split("\n## ")[0]
    assert f"{ours[0]} against {theirs[0]} tokens/s" in top and f"{ours[1]} against {theirs[1]} GB" in top


def test_the_pictures_are_small():
    images = re.findall(r'src="([^"]+)"', TEXT)
    assert images
    for image in images:
        assert (ROOT / image).stat().st_size < MAX_IMAGE_BYTES


def test_there_are_commands_of_every_kind():
    programs = {" ".join(words[:2]) for words in commands(TEXT)}
    assert {"make demo", f"{PYTHON} train.py", f"{PYTHON} generate.py"} <= programs


if __name__ == "__main__":
    for pasted, piece in zip(code_blocks(TEXT, "python"), pasted_pieces(), strict=True):
        TEXT = TEXT.replace(pasted, piece)
    README.write_text(TEXT)
