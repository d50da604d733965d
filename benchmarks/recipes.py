"""Run the recipes of docs/recipes.md on a small model: the results that the page tells you to expect.

python benchmarks/recipes.py --model MODEL --real DATA [--recipes A B] [train.py's flags]

Each recipe's training command, with the model replaced by MODEL, its dataset by DATA (rows of instructions)
in that recipe's row format, and validation rows where the recipe has none. Prints a Markdown table.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from qlora.data.sources import read_rows  # noqa: E402

ROWS = 1500  # of DATA; the recipes' own slices apply to these
# How each recipe's dataset writes a question and its answer.
WRITTEN = {
    "A": "{question}\n{answer}",
    "B": "<s>[INST] {question} [/INST] {answer} </s>",
    "C": "### Human: {question}### Assistant: {answer}",
}


def training_command(recipe: str) -> list[str]:
    """The flags of a recipe's training, from the page."""
    section = re.split(r"^## ", (ROOT / "docs/recipes.md").read_text(), flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(f"{recipe}. ")]
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    calls = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    call = next(call for call in calls if "train.py" in call and "--data_report" not in call)
    return call[call.index("train.py") + 1 :]


def write_rows(path: Path, recipe: str, rows: list[dict]) -> None:
    """The rows in the format of a recipe's dataset."""
    with open(path, "w") as file:
        for row in rows:
            if not row.get("instruction") or "output" not in row:
                sys.exit("--real: rows need the fields instruction and output, and may have input")
            question = "\n".join(filter(None, [row["instruction"], row.get("input")]))
            if recipe in WRITTEN:
                row = {"text": WRITTEN[recipe].format(question=question, answer=row["output"])}
            file.write(json.dumps(row) + "\n")


def flags_of(recipe: str, model: str, rows_file: Path, folder: Path) -> list[str]:
    """The recipe's flags with another model and dataset; argparse takes the last of a repeated flag."""
    flags = training_command(recipe)
    for name, values in (("--push_to_hub", 0), ("--hub_model_id", 1)):
        if name in flags:
            at = flags.index(name)
            del flags[at : at + 1 + values]
    flags += ["--model", model, "--dataset", str(rows_file), "--output_dir", str(folder)]
    return [*flags, "--validation_split", "0.05", "--eval_steps", "1000000", "--logging_steps", "1"]


def run(recipe: str, flags: list[str], folder: Path) -> str:
    """Train in a process of its own; returns the recipe's row of the table."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"recipe {recipe} failed: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    (evaluation,) = [line["eval_loss"] for line in lines if "eval_loss" in line]
    memory = lines[-2].get("peak_memory_gb")
    cells = [
        recipe,
        re.search(r"^adapter +(\S+)", done.stdout, re.MULTILINE)[1],
        str(lines[-1]["step"]),
        f"{sum(losses[:5]) / 5:.3f} to {sum(losses[-5:]) / 5:.3f}",
        f"{evaluation:.3f}",
        f"{seconds:.0f} s",
        f"{memory:.2f} GB" if memory else "no GPU",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--real", required=True)
    parser.add_argument("--recipes", nargs="+", default=list("ABCDE"))
    arguments, more_flags = parser.parse_known_args()
    rows = [row for _, row in islice(read_rows(arguments.real, "train"), ROWS)]
    print("| | trained parameters | steps | loss, first and last 5 steps | validation | time | memory |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for recipe in arguments.recipes:
            rows_file, output = Path(folder) / f"{recipe}.jsonl", Path(folder) / recipe
            write_rows(rows_file, recipe, rows)
            print(
                run(recipe, flags_of(recipe, arguments.model, rows_file, output) + more_flags, output),
                flush=True,
            )


if __name__ == "__main__":
    main()
