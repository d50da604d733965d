"""Whether the fast path has the losses of the plain one, step by step.

python benchmarks/losses.py --model MODEL --real DATA [--steps 200] [train.py's flags]

Trains twice: as train.py does, and uncompiled on bitsandbytes' own 4-bit layers, with all logits held. Prints
the largest and the mean difference of their losses.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.cases import REAL  # noqa: E402

PLAIN = ["--no_compile", "--no_fused_4bit"]


def losses(flags: list[str], folder: str) -> tuple[list[float], float]:
    """The loss of every step, and the tokens a second of the last steps."""
    command = [sys.executable, __file__, "--train", *flags, "--output_dir", folder]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines], lines[-1]["tokens_per_s"]


def train_here(flags: list[str]) -> None:
    """One of the two trainings."""
    import train
    from qlora.config import TrainConfig, parse_args

    if set(PLAIN) <= set(flags):
        train.has_plain_head = lambda model: False  # the loss then takes the model's own forward
    train.train(parse_args(TrainConfig, flags))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--real", default=REAL)
    parser.add_argument("--steps", type=int, default=200)
    arguments, flags = parser.parse_known_args()
    flags += ["--model", arguments.model, "--dataset", arguments.real, "--max_steps", str(arguments.steps)]
    flags += ["--logging_steps", "1", "--save_steps", "100000", "--lora_dropout", "0"]
    with tempfile.TemporaryDirectory() as folder:
        fast, fast_speed = losses(flags, f"{folder}/fast")
        plain, plain_speed = losses([*flags, *PLAIN], f"{folder}/plain")
    differences = [abs(left - right) for left, right in zip(fast, plain, strict=True)]
    print(
        f"{len(differences)} steps, loss {plain[0]:.4f} to {plain[-1]:.4f}: differences at most "
        f"{max(differences):.1e}, {sum(differences) / len(differences):.1e} in the mean; "
        f"{fast_speed:,.0f} and {plain_speed:,.0f} tokens/s"
    )


if __name__ == "__main__":
    train_here(sys.argv[2:]) if sys.argv[1:2] == ["--train"] else main()
