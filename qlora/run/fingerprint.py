"""What a training depends on, in a few hashes and values: base, tokenizer, rows, flags."""

import hashlib
import json
import os
from pathlib import Path

from qlora.data.tokenize import TokenizedRows
from qlora.errors import InputError
from qlora.model.weights import loaded_folder, weight_files

SAMPLES, SAMPLE_BYTES = 64, 2**14  # that are read of each file of weights
FIXED = ("lora_r", "lora_target_modules", "use_dora", "optim")  # decide the shapes of what a checkpoint holds
UNIMPORTANT = ("_name_or_path", "transformers_version")  # of a model's configuration


def base_fingerprint(model: str) -> str:
    """A hash of a model's configuration and of samples from all over its weights.

    `model` is a folder or the hub id of a model that has been loaded. The same wherever the files lie; it
    takes a moment, where a hash of all the weights would take longer than loading them.
    """
    folder = loaded_folder(model)
    config = json.loads((folder / "config.json").read_text())
    digest = _hash({name: value for name, value in config.items() if name not in UNIMPORTANT})
    for path in weight_files(folder):  # without any the configuration must do
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(str(size).encode())
            for sample in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1) if size > SAMPLE_BYTES else 0)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of a tokenizer's vocabulary, special tokens and chat template."""
    fast = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    if tokenizer.is_fast:
        fast |= {"padding": None, "truncation": None}  # set by whoever used it last
    return _hash([fast, tokenizer.special_tokens_map, tokenizer.chat_template]).hexdigest()


def rows_fingerprint(rows: TokenizedRows) -> str:
    """A hash of the tokens that are trained on, in the order of the rows."""
    digest = _hash(rows.row_format)
    for column in (rows.column("digest"), rows.column("targets"), rows.lengths, rows.sources):
        digest.update(column.astype("<i8").tobytes())
    return digest.hexdigest()


def refuse_changes(then: dict | None, now: dict, allowed: list[str], checkpoint: Path | None) -> None:
    """Raise InputError, naming them, if entries of `now` differ from those of the checkpoint's run; `then` is
    None if there is none."""
    if then is None:
        return
    changed = {name: value for name, value in now.items() if name not in allowed and then.get(name) != value}
    if changed:
        were = "; ".join(f"{name} {_change(then.get(name), value)}" for name, value in changed.items())
        way = f"accept what has changed by --allow_changes {' '.join([*allowed, *changed])}"
        if fixed := [name for name in changed if name in FIXED]:
            way = f"train its adapter further, by --adapter, without what {' '.join(fixed)} decides"
        raise InputError(f"{checkpoint} is of another training: {were} - go on as it began, or {way}")


def _change(then, now) -> str:
    is_hash = isinstance(now, str) and len(now) == 64
    return "is another" if is_hash else f"was {then}, now it is {now}"


def _hash(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode())
