"""Compare speed and memory of train.py with its peers, in a Markdown table.

python benchmarks/run.py --model MODEL --real DATA [--cases 0 1 ...] [--peers unsloth trl]

MODEL is a 4-bit checkpoint, which the peers load too; DATA is a hub id or a file of instructions. Peers that
are not installed are skipped. Each case runs train.py in a process of its own. Speed is tokens/s without
padding, the median over the steps after the warm-up; memory is the peak that PyTorch allocated.
"""

import argparse
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.cases import CASES, REAL, TARGETS, WARM_UP, Case  # noqa: E402

LONG = 4096  # longer cases get a process of their own, as peers allocate for the longest case they load


def run_ours(case: Case, model: str, real: str, folder: Path) -> dict:
    """Train on a case; returns speed, memory and the plan, {} if it fails."""
    data = real if case.is_real else write_full_rows(folder / f"full-{case.length}.jsonl", case)
    output = folder / f"run-{CASES.index(case)}"
    model = with_positions(model, case.length, folder / "longer")
    command = [sys.executable, str(ROOT / "train.py"), "--model", model, "--dataset", str(data)]
    command += ["--output_dir", str(output), "--lora_target_modules", *TARGETS[case.targets]]
    command += ["--per_device_train_batch_size", str(case.batch), "--max_length", str(case.length)]
    command += ["--max_steps", str(case.steps), "--gradient_accumulation_steps", "1", "--logging_steps", "1"]
    command += ["--lora_dropout", "0", "--save_steps", "1000", "--no_completion_only_loss"]
    command += [] if "--dtype" in case.flags else ["--dtype", "bfloat16"]
    done = subprocess.run([*command, *case.flags.split()], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return {}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    plan = next((line for line in done.stdout.splitlines() if line.startswith("layers")), "")
    return {
        "tokens_per_s": round(statistics.median(line["tokens_per_s"] for line in lines[WARM_UP:])),
        "gb": round(lines[-1]["peak_memory_gb"], 2),
        "plan": plan.removeprefix("layers").strip(),
    }


def with_positions(model: str, length: int, folder: Path) -> str:
    """The model, or a folder of links to its files with a configuration that allows `length` tokens.

    train.py respects the context length that a model was made for; its peers extend it silently.
    """
    if AutoConfig.from_pretrained(model).max_position_embeddings >= length:
        return model
    folder.mkdir(exist_ok=True)
    for file in Path(model if Path(model).is_dir() else snapshot_download(model)).iterdir():
        if file.name != "config.json" and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    config = AutoConfig.from_pretrained(model)
    config.max_position_embeddings = length
    config.save_pretrained(folder)
    return str(folder)


def write_full_rows(path: Path, case: Case) -> Path:
    """Rows of random words, each longer than the case's length in tokens."""
    words = random.Random(0)
    syllables = ["ba", "den", "fir", "go", "kal", "lum", "mi", "nor", "pe", "ru", "sa", "tis", "vo", "zen"]
    with open(path, "w") as file:
        for _ in range(case.batch * (case.steps + 1)):
            text = " ".join("".join(words.choices(syllables, k=3)) for _ in range(case.length))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def run_peer(peer: str, numbers: list[int], model: str, real: str) -> dict[int, dict]:
    """A peer's results by case. Cases lost in a failure are tried again one by one, then skipped."""
    command = [sys.executable, str(ROOT / "benchmarks/peers.py"), peer, model, real, *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    results = {result["case"]: result for result in lines}
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        lost = [number for number in numbers if number not in results]
        for number in lost if len(numbers) > 1 else ():
            results |= run_peer(peer, [number], model, real)
    return results


def describe(result: dict, ours: dict | None = None) -> str:
    """A cell of the table; with `ours`, also the ratios of our speed and memory to theirs."""
    if not result:
        return "failed"
    text = f"{result['tokens_per_s']:,} tokens/s, {result['gb']:.2f} GB"
    if ours:
        speed, memory = ours["tokens_per_s"] / result["tokens_per_s"], ours["gb"] / result["gb"]
        text += f" ({speed:.2f}x, {memory:.2f}x)"
    return text


def group_cases(numbers: list[int], peers: list[str]) -> list[tuple[str, list[int]]]:
    """(peer, its cases that can share a loaded model) for each process to start."""
    groups = {}
    for number in numbers:
        case = CASES[number]
        for peer in case.peers:
            package = peer.split("-")[0]
            if package in peers and importlib.util.find_spec(package):
                key = peer, case.targets, max(case.length, LONG)
                groups.setdefault(key, []).append(number)
    return [(peer, group) for (peer, *_), group in groups.items()]


def print_table(results: dict[int, dict[str, dict]]) -> None:
    print(f"{torch.cuda.get_device_name()}, {date.today()}, torch {torch.__version__}; GB are 2^30 bytes;")
    print("in brackets: our speed and memory as multiples of theirs\n")
    print("| | ours | peers |\n|---|---|---|")
    for number, by_program in results.items():
        ours = by_program["ours"]
        others = "; ".join(
            f"{peer}: {describe(result, ours)}"
            for peer, result in sorted(by_program.items())
            if peer != "ours"
        )
        print(f"| {CASES[number].name} | {describe(ours)} | {others} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--real", default=REAL)
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)))
    parser.add_argument("--peers", nargs="*", default=["unsloth", "trl"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/run.py: error: a CUDA GPU is needed")
    if AutoConfig.from_pretrained(arguments.model).to_dict().get("quantization_config") is None:
        sys.exit(
            f"benchmarks/run.py: error: {arguments.model} is not a 4-bit checkpoint, which the peers need too"
        )
    results = {number: {} for number in arguments.cases}
    for peer, numbers in group_cases(arguments.cases, arguments.peers):
        for number, result in run_peer(peer, numbers, arguments.model, arguments.real).items():
            results[number][peer] = result
            print(f"{peer}: {CASES[number].name}: {describe(result)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for number in arguments.cases:
            case = CASES[number]
            results[number]["ours"] = run_ours(case, arguments.model, arguments.real, Path(folder))
            print(f"ours: {case.name}: {results[number]['ours']}", file=sys.stderr, flush=True)
    print_table(results)


if __name__ == "__main__":
    main()
