"""The Hugging Face hub: a model card for what was trained, and the upload."""

import json
import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from qlora.errors import InputError, first_line
from qlora.run.metrics import is_number, read_flags, read_metrics

# Flags that a card leaves out: they name places, or stand elsewhere in it.
UNSAID = """
    model adapter dataset validation_dataset output_dir overwrite_output_dir run_name report_to sample_prompts
    sample_max_new_tokens resume_from_checkpoint allow_changes push_to_hub hub_model_id hub_private_repo
    max_hours logging_steps save_steps save_total_limit
""".split()
# All that is uploaded. Other files of a run have prompts, answers and paths that are nobody's business.
UPLOADED = """
    README.md loss.png generate_defaults.json adapter_model.safetensors
    config.json generation_config.json model*.safetensors model.safetensors.index.json
    tokenizer* special_tokens_map.json added_tokens.json vocab* merges.txt
    chat_template* additional_chat_templates/*
""".split()
ADAPTER_CONFIG = "adapter_config.json"

ADAPTER_USE = """from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("{repo}")"""
MERGED_USE = """from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto")"""


def check_hub(name: str) -> str:
    """The repository's full id, owner/name; raises InputError if nothing could be uploaded under it: not
    logged in, no network, no valid name."""
    try:
        validate_repo_id(name)
        owner = HfApi().whoami()["name"]
    except HFValidationError as error:
        raise InputError(f"--hub_model_id {name} is no name for a repository: {first_line(error)}") from error
    except Exception as error:  # the hub's client has many
        raise InputError(
            f"--push_to_hub: the hub does not know you ({first_line(error)}): run `hf auth login`"
        ) from error
    return name if "/" in name else f"{owner}/{name}"


def push(folder: Path, repo: str, is_private: bool) -> str:
    """Upload adapter or model of a folder; returns the address. Raises InputError: the folder is safe."""
    try:
        url = HfApi().create_repo(repo, private=is_private, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, allow_patterns=UPLOADED)
        if (folder / ADAPTER_CONFIG).exists():
            config = json.loads((folder / ADAPTER_CONFIG).read_text())
            config["base_model_name_or_path"] = _public(config.get("base_model_name_or_path") or "")
            content = json.dumps(config, indent=2).encode()
            HfApi().upload_file(path_or_fileobj=content, path_in_repo=ADAPTER_CONFIG, repo_id=repo)
    except Exception as error:
        raise InputError(
            f"--push_to_hub: {repo} could not be uploaded ({first_line(error)}); all of it is in {folder}: "
            f"hf upload {repo} {folder} --include {' '.join([*UPLOADED, ADAPTER_CONFIG])}"
        ) from error
    return str(url)


def model_card(repo: str, base: str, run: Path, is_merged: bool) -> str:
    """A model card in Markdown: base, data, flags and losses, as far as the folder of the `run` tells them.

    Of local paths only the last part is said.
    """
    flags, metrics = _known(read_flags, run, {}), _known(read_metrics, run, [])
    datasets = flags.get("dataset")
    datasets = [name for name in datasets if isinstance(name, str)] if isinstance(datasets, list) else []
    lines = ["---", f"library_name: {'transformers' if is_merged else 'peft'}"]
    lines += ["pipeline_tag: text-generation"]
    lines += [f"base_model: {base}"] if _is_hub_id(base) else []
    for name, items in (("datasets", list(filter(_is_hub_id, datasets))), ("tags", ["qlora", "lora"])):
        lines += [f"{name}:", *(f"- {item}" for item in items)] if items else []
    what = "A QLoRA adapter merged into" if is_merged else "A QLoRA adapter for"
    lines += ["---", "", f"# {Path(repo).name}", "", f"{what} `{_public(base)}`."]
    if datasets:
        lines += ["", f"Trained on {', '.join(f'`{_public(name)}`' for name in datasets)}."]
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


def _is_hub_id(name: str) -> bool:
    """Whether a name is owner/name, and not a path, also not of something that was here once."""
    is_file = name.endswith((".json", ".jsonl", ".csv", ".parquet", ".txt"))
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not is_file and not Path(name).exists()


def _public(name: str) -> str:
    return name if _is_hub_id(name) else Path(name).name


def _shown(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _losses(metrics: list[dict]) -> list[str]:
    """Rows of a table: each evaluation with the training loss logged last before it, or the last loss."""
    rows, loss = [], None
    for line in metrics:
        loss = line["loss"] if is_number(line.get("loss")) else loss
        if is_number(line.get("eval_loss")):
            rows.append((line["step"], loss, line["eval_loss"]))
    if not rows and loss is not None:
        rows = [(metrics[-1]["step"], loss, None)]
    shown = [["" if value is None else f"{value:.4f}" for value in losses] for _, *losses in rows]
    return [f"| {row[0]} | {' | '.join(losses)} |" for row, losses in zip(rows, shown)]
