"""Compare the losses of the fast path with those of the plain one, step by step.

python benchmarks/losses.py --model MODEL --real DATA [--steps 200] [train.py's flags]

Trains three times: as train.py does; uncompiled, on bitsandbytes' own 4-bit layers and with all logits in
memory; and the latter with each step split in two. The third run shows how far rounding alone drives two
trainings apart.
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
    """Train in a process of its own; returns the loss of every step, and tokens/s at the last one."""
    command = [sys.executable, __file__, "--train", *flags, "--output_dir", folder]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines], lines[-1]["tokens_per_s"]


def train_here(flags: list[str]) -> None:
    """Run one of the trainings in this process."""
    import train
    from qlora.config import TrainConfig
    from qlora.flags import parse_args

    if set(PLAIN) <= set(flags):
        train.choose_hidden_states = lambda model: None  # the loss then uses the model's own forward
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
    print(f"fast against plain: {describe_difference(fast, plain)}")
    print(f"plain, split in two, against plain: {describe_difference(split, plain)}")


def describe_difference(left: list[float], right: list[float]) -> str:
    """How far the losses of two runs are apart."""
    differences = [one - other for one, other in zip(left, right, strict=True)]
    sizes = [abs(difference) for difference in differences]
    return (
        f"at most {max(sizes):.1e} at a step, mean {statistics.mean(differences):+.1e}, mean absolute "
        f"{statistics.mean(sizes):.1e}"
    )


if __name__ == "__main__":
    train_here(sys.argv[2:]) if sys.argv[1:2] == ["--train"] else main()
