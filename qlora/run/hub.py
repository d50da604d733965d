"""The Hugging Face hub: the model card and the upload."""

import json
import re
import shlex
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from qlora.errors import InputError, first_line
from qlora.run.metrics import is_finite_number

# Nothing else is uploaded: other files of a run contain prompts, answers and paths, which may be private.
UPLOADED = """
    README.md loss.png generate_defaults.json adapter_model.safetensors
    config.json generation_config.json model*.safetensors model.safetensors.index.json
    tokenizer* special_tokens_map.json added_tokens.json vocab* merges.txt
    chat_template* additional_chat_templates/*
""".split()
ADAPTER_CONFIG = "adapter_config.json"

# The model card's lines that ask the model. The repository's chat template asks as in the training; one that
# was trained on plain text has none.
USE = """{imports}

tokenizer = AutoTokenizer.from_pretrained("{repo}"{trust})
model = {model_class}.from_pretrained("{repo}"{options}{trust}, device_map="auto")

question = "What is a cloud?"
if tokenizer.chat_template:
    question = tokenizer.apply_chat_template(
        [{{"role": "user", "content": question}}], tokenize=False, add_generation_prompt=True
    )
inputs = tokenizer(question, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")
answer = model.generate(**inputs.to(model.device), max_new_tokens=256, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
ADAPTER_IMPORTS = """import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer"""
QUANTIZATION = """
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="{bnb_4bit_quant_type}",
    bnb_4bit_use_double_quant={bnb_4bit_use_double_quant},
    bnb_4bit_compute_dtype=torch.{dtype},
)"""


def check_hub(name: str, is_private: bool) -> str:
    """The repository's full id, owner/name.

    Raises InputError if an upload under this name cannot work: invalid name, not logged in, no network; or if
    it is to be private and there is a public one.
    """
    try:
        validate_repo_id(name)
        owner = HfApi().whoami()["name"]
        repo = name if "/" in name else f"{owner}/{name}"
        if is_private:
            _check_not_public(repo)
    except InputError:
        raise
    except HFValidationError as error:
        raise InputError(
            f"--hub_model_id {name} is not a valid repository name: {first_line(error)}"
        ) from error
    except Exception as error:  # the hub's client and its HTTP library raise dozens of types
        raise InputError(
            f"--push_to_hub: cannot log in to the hub ({first_line(error)}): check the network and run "
            "`hf auth login`"
        ) from error
    return repo


def _check_not_public(repo: str) -> None:
    """Raise InputError if the repository exists and is public: create_repo() would leave it so, unsaid."""
    try:
        is_public = not HfApi().repo_info(repo).private
    except RepositoryNotFoundError:
        return
    if is_public:
        raise InputError(
            f"--hub_private_repo: the repository {repo} exists and is public: make it private in its "
            "settings on the hub, choose another --hub_model_id, or leave the flag out"
        )


def push(folder: Path, repo: str, is_private: bool) -> str:
    """Upload the adapter or model in a folder and return its URL. Raises InputError; the folder is unchanged.

    A new repository is as its owner's settings say, unless `is_private`. adapter_config.json is uploaded
    without the local path of its base model.
    """
    adapter_config = _public_adapter_config(folder / ADAPTER_CONFIG)
    try:
        # None, not False, which would make it public in an organisation whose repositories are private.
        url = HfApi().create_repo(repo, private=True if is_private else None, exist_ok=True)
        if is_private:  # it may have become public since check_hub()
            _check_not_public(repo)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, allow_patterns=UPLOADED)
        if adapter_config is not None:
            HfApi().upload_file(path_or_fileobj=adapter_config, path_in_repo=ADAPTER_CONFIG, repo_id=repo)
    except Exception as error:  # the hub's client and its HTTP library raise dozens of types
        raise InputError(
            f"--push_to_hub: the upload to {repo} failed ({first_line(error)}); everything is in {folder}, "
            f"to upload it later: {_upload_command(folder, repo, is_private)}"
        ) from error
    return str(url)


def _upload_command(folder: Path, repo: str, is_private: bool) -> str:
    """The shell command that uploads the same files, with adapter_config.json as it is in the folder."""
    words = ["hf", "upload", repo, str(folder), *(["--private"] if is_private else [])]
    for pattern in (*UPLOADED, ADAPTER_CONFIG):
        words += ["--include", pattern]  # takes one pattern each
    return shlex.join(words)


def _public_adapter_config(path: Path) -> bytes | None:
    if not path.exists():
        return None
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = _public_name(config.get("base_model_name_or_path") or "")
    return json.dumps(config, indent=2).encode()


def model_card(
    repo: str, base_model: str, datasets: list[str], flags: dict, metrics: list[dict], is_merged: bool,
    base: str = "dequantized",
) -> str:  # fmt: skip
    """A model card in Markdown: base model, data, flags and losses, as far as they are known.

    `flags` are those that the card is to show; None values are left out. `metrics` are the lines of
    metrics.jsonl. `base` is what an adapter was merged into, as --base of qlora.merge names it. Of local
    paths only the last part is shown.
    """
    kind = "A QLoRA adapter merged into" if is_merged else "A QLoRA adapter for"
    kind = f"{kind} `{_public_name(base_model)}`. {_describe_base(flags, is_merged, base)}".strip()
    lines = [*_front_matter(base_model, datasets, is_merged), "", f"# {Path(repo).name}", "", kind]
    if datasets:
        lines += ["", f"Trained on {', '.join(f'`{_public_name(name)}`' for name in datasets)}."]
    lines += ["", "```python", _usage(repo, flags, is_merged), "```"]
    flags = {name: value for name, value in flags.items() if value is not None}
    if flags:
        lines += ["", "## Settings", "", "| flag | value |", "|---|---|"]
        lines += [f"| `--{name}` | {_flag_text(value)} |" for name, value in flags.items()]
    if losses := _loss_rows(metrics):
        lines += ["", "## Losses", "", "| step | loss | validation loss |", "|---|---|---|", *losses]
    return "\n".join(lines) + "\n"


def _describe_base(flags: dict, is_merged: bool, base: str) -> str:
    """On which weights of the base the adapter was trained, and so which are meant; "" if that is unknown."""
    if not flags.get("load_in_4bit"):
        return "It was trained on the base's own weights, not quantized." if "load_in_4bit" in flags else ""
    if not is_merged:
        return (
            "It was trained on the base quantized to 4 bits: load it on that, as below. On the base's 16-bit "
            "weights it answers differently."
        )
    if base == "original":
        return "It was trained on the base quantized to 4 bits and merged into the weights from before that."
    return "It was trained on the base quantized to 4 bits and merged into those weights, dequantized."


def _usage(repo: str, flags: dict, is_merged: bool) -> str:
    """Python that loads the model as it was trained, and asks it as it was trained."""
    trust = ", trust_remote_code=True" if flags.get("trust_remote_code") else ""
    if is_merged:
        model_class = "AutoModelForCausalLM"
        imports = f"from transformers import {model_class}, AutoTokenizer"
        options = ', dtype="auto"'
    else:
        model_class = "AutoPeftModelForCausalLM"
        imports = ADAPTER_IMPORTS
        options = f", dtype=torch.{flags['dtype']}" if "dtype" in flags else ""
        if flags.get("load_in_4bit"):
            imports += ", BitsAndBytesConfig\n" + QUANTIZATION.format(**flags)
            options += ", quantization_config=quantization"
    return USE.format(imports=imports, model_class=model_class, repo=repo, options=options, trust=trust)


def _front_matter(base_model: str, datasets: list[str], is_merged: bool) -> list[str]:
    """The card's YAML header, from which the hub links base model and datasets."""
    lines = ["---", f"library_name: {'transformers' if is_merged else 'peft'}"]
    lines += ["pipeline_tag: text-generation"]
    lines += [f"base_model: {base_model}"] if _is_hub_id(base_model) else []
    for key, items in (("datasets", list(filter(_is_hub_id, datasets))), ("tags", ["qlora", "lora"])):
        lines += [f"{key}:", *(f"- {item}" for item in items)] if items else []
    return [*lines, "---"]


def _is_hub_id(name: str) -> bool:
    """Whether a name is a hub id, owner/name, not a local path, even one that no longer exists."""
    is_file = name.endswith((".json", ".jsonl", ".csv", ".parquet", ".txt"))
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not is_file and not Path(name).exists()


def _public_name(name: str) -> str:
    return name if _is_hub_id(name) else Path(name).name


def _flag_text(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _loss_rows(metrics: list[dict]) -> list[str]:
    """Table rows: each evaluation with the last training loss before it; without any, the last loss."""
    rows, loss = [], None
    for line in metrics:
        loss = line["loss"] if is_finite_number(line.get("loss")) else loss
        if is_finite_number(line.get("eval_loss")):
            rows.append((line["step"], loss, line["eval_loss"]))
    if not rows and loss is not None:
        rows = [(metrics[-1]["step"], loss, None)]
    texts = [["" if value is None else f"{value:.4f}" for value in losses] for _, *losses in rows]
    return [f"| {row[0]} | {' | '.join(losses)} |" for row, losses in zip(rows, texts)]
