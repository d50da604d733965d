"""The Hugging Face hub: a model card for what was trained, and the upload."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from qlora.errors import InputError, first_line
from qlora.runs import read_flags, read_metrics

# Flags that a card leaves out: they name places, or stand elsewhere in it.
UNSAID = """
    model adapter dataset validation_dataset output_dir overwrite_output_dir run_name report_to sample_prompts
    sample_max_new_tokens resume_from_checkpoint allow_changes push_to_hub hub_model_id hub_private_repo
    max_hours logging_steps save_steps save_total_limit
""".split()
# Of an upload. What the flags say of this machine's folders is nobody's business.
LEFT_OUT = ["checkpoint-*", "*.tmp*", ".lock", "wandb*", "evaluation.json", "train_config.json"]

ADAPTER_USE = """from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("{repo}")"""
MERGED_USE = """from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto")"""


def check_hub(repo: str) -> None:
    """Raise InputError if nothing could be uploaded under this name: not logged in, no network, no name."""
    try:
        validate_repo_id(repo)
        HfApi().whoami()
    except HFValidationError as error:
        raise InputError(f"--hub_model_id {repo} is no name for a repository: {first_line(error)}") from error
    except Exception as error:  # the hub's client has many
        raise InputError(
            f"--push_to_hub: the hub does not know you ({first_line(error)}): run `hf auth login`"
        ) from error


def push(folder: Path, repo: str, is_private: bool) -> str:
    """Upload a folder without its checkpoints; returns the address. Raises InputError: the folder is safe."""
    try:
        url = HfApi().create_repo(repo, private=is_private, exist_ok=True)
        HfApi().upload_folder(repo_id=url.repo_id, folder_path=folder, ignore_patterns=LEFT_OUT)
    except Exception as error:
        raise InputError(
            f"--push_to_hub: {repo} could not be uploaded ({first_line(error)}); all of it is in {folder}: "
            f"hf upload {repo} {folder} --exclude 'checkpoint-*'"
        ) from error
    return str(url)


def model_card(repo: str, base: str, run: Path, is_merged: bool) -> str:
    """A model card in Markdown: base, data, flags and losses, as far as the folder of the `run` tells them.

    Of local paths only the last part is said.
    """
    flags, metrics = _known(read_flags, run, {}), _known(read_metrics, run, [])
    datasets = flags.get("dataset", [])
    public = [name for name in datasets if not Path(name).exists()]
    lines = ["---", f"library_name: {'transformers' if is_merged else 'peft'}"]
    lines += ["pipeline_tag: text-generation"]
    lines += [] if Path(base).exists() else [f"base_model: {base}"]
    for name, items in (("datasets", public), ("tags", ["qlora", "lora"])):
        lines += [f"{name}:", *(f"- {item}" for item in items)] if items else []
    what = "A QLoRA adapter merged into" if is_merged else "A QLoRA adapter for"
    lines += ["---", "", f"# {Path(repo).name}", "", f"{what} `{_name(base)}`."]
    if datasets:
        lines += ["", f"Trained on {', '.join(f'`{_name(name)}`' for name in datasets)}."]
    use = (MERGED_USE if is_merged else ADAPTER_USE).format(repo=repo)
    lines += ["", "```python", use, "```"]
    said = {name: value for name, value in flags.items() if name not in UNSAID and value is not None}
    if said:
        lines += ["", "## Settings", "", "| flag | value |", "|---|---|"]
        lines += [f"| `--{name}` | {_shown(value)} |" for name, value in said.items()]
    if losses := _losses(metrics):
        lines += ["", "## Losses", "", "| step | loss | validation loss |", "|---|---|---|", *losses]
    return "\n".join(lines) + "\n"


def _known(read, run: Path, otherwise):
    try:
        return read(run)
    except InputError:
        return otherwise


def _name(path: str) -> str:
    return Path(path).name if Path(path).exists() else path


def _shown(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _losses(metrics: list[dict]) -> list[str]:
    """Rows of a table: each evaluation with the training loss logged last before it, or the last loss."""
    rows, loss = [], None
    for line in metrics:
        loss = line.get("loss") if line.get("loss") is not None else loss
        if line.get("eval_loss") is not None:
            rows.append((line["step"], loss, line["eval_loss"]))
    if not rows and loss is not None:
        rows = [(metrics[-1]["step"], loss, None)]
    shown = [["" if value is None else f"{value:.4f}" for value in losses] for _, *losses in rows]
    return [f"| {row[0]} | {' | '.join(losses)} |" for row, losses in zip(rows, shown)]
