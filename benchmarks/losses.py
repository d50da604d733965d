"""Whether the fast path has the losses of the plain one, step by step.

python benchmarks/losses.py --model MODEL --real DATA [--steps 200] [train.py's flags]

Trains three times: as train.py does; uncompiled on bitsandbytes' own 4-bit layers, with all logits held; and
so again with each step split in two. The third shows how far rounding alone drives two trainings apart.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.cases import REAL  # noqa: E402

PLAIN = ["--no_compile", "--no_fused_4bit", "--no_cuda_graphs"]
STEP, SPLIT_STEP = (
    ["--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(4 // batch)]
    for batch in (4, 2)
)


def losses(flags: list[str], folder: str) -> tuple[list[float], float]:
    """The loss of every step, and the tokens a second of the last steps."""
    command = [sys.executable, __file__, "--train", *flags, "--output_dir", folder]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines], lines[-1]["tokens_per_s"]


def train_here(flags: list[str]) -> None:
    """One of the trainings."""
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
        fast, fast_speed = losses([*flags, *STEP], f"{folder}/fast")
        plain, plain_speed = losses([*flags, *STEP, *PLAIN], f"{folder}/plain")
        split, _ = losses([*flags, *SPLIT_STEP, *PLAIN], f"{folder}/split")
    print(f"{len(plain)} steps, loss {plain[0]:.4f} to {plain[-1]:.4f}")
    print(f"{fast_speed:,.0f} tokens/s fast, {plain_speed:,.0f} plain")
    print(f"fast against plain: {difference(fast, plain)}")
    print(f"plain, split in two, against plain: {difference(split, plain)}")


def difference(left: list[float], right: list[float]) -> str:
    """How far two runs are apart."""
    differences = [one - other for one, other in zip(left, right, strict=True)]
    sizes = [abs(difference) for difference in differences]
    return (
        f"at most {max(sizes):.1e} at a step, {statistics.mean(differences):+.1e} in the mean, "
        f"{statistics.mean(sizes):.1e} in the mean size"
    )


if __name__ == "__main__":
    train_here(sys.argv[2:]) if sys.argv[1:2] == ["--train"] else main()
