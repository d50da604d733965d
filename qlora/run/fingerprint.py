"""What a run depends on, as a few hashes and values that a resume compares: base, tokenizer, rows, flags."""

import hashlib
import json
import os
from datetime import date
from pathlib import Path

from qlora import ranks
from qlora.data.tokenized import TokenizedRows
from qlora.errors import InputError
from qlora.model.adapter import BASE, HELD_OUT, check_base, lora_settings
from qlora.model.weights import loaded_folder, weight_files
from qlora.run.checkpoint import load_state

SAMPLES, SAMPLE_BYTES = 64, 2**14  # read from each file of weights
IGNORED_IN_CONFIG = ("_name_or_path", "transformers_version")  # of a model's configuration


class Fingerprint:
    """What this run depends on, by name. A resume compares each value with the checkpoint's as it is added.

    `flags` are the first values. `allowed` names what may differ. Shapes of saved tensors depend on
    `sets_shapes`: where one of these differs, only a new run can help. Raises InputError if the checkpoint
    cannot be read.
    """

    def __init__(self, checkpoint: Path | None, flags: dict, allowed: list[str], sets_shapes: list[str]):
        self.checkpoint = checkpoint
        saved = load_state(checkpoint)["fingerprint"] if checkpoint and ranks.is_first() else None
        self.saved = ranks.from_first(saved)
        self.allowed, self.sets_shapes = allowed, sets_shapes
        # The day the run began. Chat templates that write a date go on writing this one.
        today = ranks.from_first(date.today().isoformat())
        self.values = {"today": (self.saved or {}).get("today", today)}
        self.add(**flags)

    @property
    def today(self) -> date:
        return date.fromisoformat(self.values["today"])

    def add_global_batch(self, packs_per_step: int, batch_size: int) -> None:
        """Add the packs of rows in a step, of all ranks together; a refusal says which split would fit."""
        saved = (self.saved or {}).get("packs_per_step", packs_per_step)
        if saved != packs_per_step and "packs_per_step" not in self.allowed:
            raise InputError(
                f"{self.checkpoint} was saved with {saved} sequences in a step, over all GPUs; these flags "
                f"make {packs_per_step}. {_advise_split(saved, batch_size, ranks.count())}, or accept the "
                f"change with --allow_changes {' '.join([*self.allowed, 'packs_per_step'])}"
            )
        self.add(packs_per_step=packs_per_step)

    def add_data(self, tokenizer, train_rows: TokenizedRows) -> None:
        self.add(tokenizer=tokenizer_fingerprint(tokenizer), data=rows_fingerprint(train_rows))

    def add_base(self, model: str, adapter: str | None = None) -> None:
        """Add the base; raises InputError if an `adapter` to train further was trained on another one."""
        self.add(base=base_fingerprint(model))
        if adapter is not None and "base" not in self.allowed:
            check_base(adapter, self.values["base"], "--allow_changes base")

    def add_adapter(self, model) -> None:
        self.add(**lora_settings(model))

    @staticmethod
    def of_rows(rows: TokenizedRows | None) -> str | None:
        """The fingerprint of rows that may change on resume: validation rows."""
        return None if rows is None else rows_fingerprint(rows)

    def settings(self, train_rows: TokenizedRows) -> dict:
        """What is saved with the adapter beside the training's flags: what these came to, and the base."""
        formatting = train_rows.formatting
        kept = {"dataset_format": formatting.row_format, "max_length": train_rows.max_length}
        kept["split_special_tokens"] = formatting.takes_special_tokens_as_text
        if held_out := train_rows.held_out:
            kept[HELD_OUT] = {
                "validation_split": held_out.amount,
                "row_hashes": [hashes.tolist() for hashes in held_out.hashes],
            }
        return kept | {BASE: self.values["base"]}

    def add(self, **values) -> None:
        """Add values; raises InputError, naming them, if some differ from the checkpoint's, or between ranks:
        hosts may have other files under the same names."""
        self.values |= values
        if differing := ranks.disagreement(values):
            number, names = differing
            raise InputError(
                f"process {number} has another {' and '.join(names)} than process 0: start the same command, "
                "with the same files, on all hosts"
            )
        if self.saved is None:
            return
        changed = {
            name: value
            for name, value in values.items()
            if name not in self.allowed and self.saved.get(name) != value
        }
        if not changed:
            return
        differences = "; ".join(
            f"{name} {_describe_change(self.saved.get(name), value)}" for name, value in changed.items()
        )
        remedy = f"accept the change with --allow_changes {' '.join([*self.allowed, *changed])}"
        if fixed := [name for name in changed if name in self.sets_shapes]:
            remedy = f"start a new run from its adapter with --adapter (shapes depend on {' '.join(fixed)})"
        raise InputError(
            f"{self.checkpoint} was saved with different settings: {differences} - restore them, or {remedy}"
        )


def base_fingerprint(model: str) -> str:
    """A hash of a model's configuration and of samples from all over its weights.

    `model` is a folder, or the hub id of a model that has been loaded. The hash is the same wherever the
    files are. It takes a moment; hashing all weights would take longer than loading them.
    """
    folder = loaded_folder(model)
    config = json.loads((folder / "config.json").read_text())
    digest = _hash({name: value for name, value in config.items() if name not in IGNORED_IN_CONFIG})
    for path in weight_files(folder):  # if there are none, the configuration has to do
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
        fast |= {"padding": None, "truncation": None}  # left over from its last use
    return _hash([fast, tokenizer.special_tokens_map, tokenizer.chat_template]).hexdigest()


def rows_fingerprint(rows: TokenizedRows) -> str:
    """A hash of the tokens that are trained on, in the order of the rows."""
    digest = _hash(rows.row_format)
    for column in (rows.column("digest"), rows.column("targets"), rows.lengths, rows.source_ids):
        digest.update(column.astype("<i8").tobytes())
    return digest.hexdigest()


def _advise_split(packs: int, batch_size: int, processes: int) -> str:
    """How to split a step of so many packs over so many processes, in micro-batches of at most that size."""
    own, rest = divmod(packs, processes)
    if rest:
        fitting = [str(number) for number in range(1, packs + 1) if packs % number == 0]
        return f"They cannot be split over {processes} processes: start {', '.join(fitting)}"
    size = max(size for size in range(1, batch_size + 1) if own % size == 0)
    return f"Keep them with --per_device_train_batch_size {size} --gradient_accumulation_steps {own // size}"


def _describe_change(saved, value) -> str:
    is_hash = isinstance(value, str) and len(value) == 64
    return "is not the same" if is_hash else f"was {saved}, now it is {value}"


def _hash(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode())
