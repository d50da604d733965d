"""Speed and memory on one and on several GPUs of this host, in a Markdown table.

python benchmarks/several_gpus.py --model MODEL --real DATA [--gpus 1 2] [--batches 8] [--modes whole shard]

Trains on packed real rows (DATA: a hub id or a file of instructions): on every number of GPUs with a whole
base on each, and with the base sharded over them. Speed is tokens/s of all GPUs together, without padding,
the median over the steps after the warm-up; memory is the peak that PyTorch allocated on the first GPU.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.cases import WARM_UP  # noqa: E402


def train(gpus: int, mode: str, batch: int, options: argparse.Namespace, flags: list[str]) -> dict:
    """Train in processes of their own; returns the figures, or an error message."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
        command = f"""--model {options.model} --dataset {options.real} --output_dir {folder} --dtype bfloat16
            --lora_dropout 0 --max_length {options.length} --per_device_train_batch_size {batch}
            --gradient_accumulation_steps 1 --max_steps {options.steps} --logging_steps 1 --save_steps 1000"""
        command = [sys.executable, *launcher * (gpus > 1), str(ROOT / "train.py"), *command.split(), *flags]
        command += ["--shard"] * (mode == "shard")
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            return {"error": done.stderr.strip()[-1000:]}
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "tokens_per_s" in line]
    screen = {line.split()[0]: line for line in done.stdout.splitlines() if line[:1].strip()}
    return {
        "tokens_per_s": round(statistics.median(line["tokens_per_s"] for line in lines[WARM_UP:])),
        "gb": round(lines[-1]["peak_memory_gb"], 2),
        "exchange_ms": round(statistics.median(line.get("exchange_ms", 0) for line in lines[WARM_UP:]), 2),
        "base_gb": re.search(r", ([\d.]+) GB", screen["model"])[1],
        "layers": screen["layers"].removeprefix("layers").strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--real", required=True)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[8])
    parser.add_argument("--modes", nargs="+", default=["whole", "shard"])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    options, flags = parser.parse_known_args()
    print(f"{date.today()}, {torch.cuda.get_device_name()}, PyTorch {torch.__version__}\n")
    print("| GPUs | base | a GPU | tokens/s | of the first row | peak GB | base GB | exchange ms | layers |")
    print("|---|---|---|---|---|---|---|---|---|")
    first = None
    for batch in options.batches:
        for mode in options.modes:
            for gpus in options.gpus:
                if mode == "shard" and gpus == 1:
                    continue
                got = train(gpus, mode, batch, options, flags)
                if "error" in got:
                    print(
                        f"| {gpus} | {mode} | {batch} x {options.length} | failed: {got['error']} |",
                        flush=True,
                    )
                    continue
                first = first or got["tokens_per_s"]
                ratio = f"{got['tokens_per_s'] / first:.2f}x"
                figures = [f"{got['tokens_per_s']:,}", ratio, got["gb"], got["base_gb"], got["exchange_ms"]]
                row = [gpus, mode, f"{batch} x {options.length}", *figures, got["layers"]]
                print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
