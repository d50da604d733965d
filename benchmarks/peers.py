"""A peer's speed on cases of benchmarks/cases.py: python benchmarks/peers.py PEER MODEL REAL CASE [CASE ...]

PEER is trl or unsloth, with the suffix -nockpt for no gradient checkpointing; CASE is an index into CASES.
All cases run in one process, on a model that is loaded once, with the settings from the peer's documentation.
Prints a line of JSON for each case: its index, tokens/s without padding (median over the steps), peak GB.
"""
# ruff: noqa: E402

import json
import os
import statistics
import sys
import time
from pathlib import Path

# At import, because Unsloth patches torch, transformers and trl and must come before them.
os.environ.update(UNSLOTH_DISABLE_STATISTICS="1", WANDB_DISABLED="true")
peer, model_name, real, *numbers = sys.argv[1:]
if peer.startswith("unsloth"):
    from unsloth import FastLanguageModel

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, default_data_collator
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.cases import CASES, TARGETS, WARM_UP, Case
from qlora.data.formats import detect_format, row_segments
from qlora.data.formatting import Formatting
from qlora.data.sources import RowSource


def load(case: Case):
    """The peer's (model, tokenizer, LoRA configuration); the last is None if the model already has LoRA."""
    if peer.startswith("unsloth"):
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name, max_seq_length=case.length, dtype=torch.bfloat16, load_in_4bit=True
        )
        checkpointing = False if peer.endswith("-nockpt") else "unsloth"
        model = FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=16, lora_dropout=0, target_modules=TARGETS[case.targets], bias="none",
            use_gradient_checkpointing=checkpointing,
        )  # fmt: skip
        lora = None
    else:
        model = AutoModelForCausalLM.from_pretrained(
            model_name, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa"
        )
        tokenizer = AutoTokenizer.from_pretrained(model_name)
        lora = LoraConfig(
            r=16, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS[case.targets], bias="none",
            task_type="CAUSAL_LM",
        )  # fmt: skip
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return model, tokenizer, lora


class StepTimer(TrainerCallback):
    """Measures the seconds of each step, with the GPU idle at its start and end."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *arguments, **kwargs):
        torch.cuda.synchronize()
        if len(self.seconds) == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()

    def on_step_end(self, *arguments, **kwargs):
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)


class CountingCollator:
    """A data collator that also counts the tokens of each batch."""

    def __init__(self, collate):
        self.collate = collate
        self.tokens = []

    def __call__(self, rows):
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self.collate(rows)


def real_texts(tokenizer) -> list[str]:
    """The rows of REAL, written as in train.py."""
    rows = [row for _, row in RowSource(real, "train", None)]
    formatting = Formatting(detect_format(rows[:100], "text"))
    return [
        "".join(text for text, _ in row_segments(row, formatting, tokenizer)[0]) + tokenizer.eos_token
        for row in rows
    ]


def measure(case: Case, model, tokenizer, lora) -> dict:
    """Train for the case's steps; returns speed and peak memory."""
    if case.is_real:
        data, options = {"text": real_texts(tokenizer)}, {"packing": True, "dataset_text_field": "text"}
    else:
        generator = torch.Generator().manual_seed(0)
        shape = (case.batch * (case.steps + 1), case.length)
        ids = torch.randint(3, min(32000, len(tokenizer)), shape, generator=generator).tolist()
        data = {"input_ids": ids, "labels": ids, "attention_mask": [[1] * case.length] * len(ids)}
        options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    args = SFTConfig(
        output_dir="/tmp/peer", per_device_train_batch_size=case.batch, gradient_accumulation_steps=1,
        max_steps=case.steps, bf16=True,
        learning_rate=2e-4, optim="paged_adamw_8bit", max_grad_norm=0.3, max_length=case.length,
        gradient_checkpointing=not peer.endswith("-nockpt"), logging_steps=100, save_strategy="no",
        report_to="none", **options,
    )  # fmt: skip
    timer = StepTimer()
    trainer = SFTTrainer(
        model=model, train_dataset=Dataset.from_dict(data), args=args, processing_class=tokenizer,
        callbacks=[timer], **({} if case.is_real else {"data_collator": default_data_collator}),
        **({"peft_config": lora} if lora else {}),
    )  # fmt: skip
    trainer.data_collator = CountingCollator(trainer.data_collator)
    trainer.train()
    tokens = trainer.data_collator.tokens
    speeds = [count / seconds for count, seconds in zip(tokens, timer.seconds)][WARM_UP:]
    gb = torch.cuda.max_memory_allocated() / 2**30
    return {"tokens_per_s": round(statistics.median(speeds)), "gb": round(gb, 2)}


def main() -> None:
    cases = {number: CASES[int(number)] for number in numbers}
    loaded = load(max(cases.values(), key=lambda case: case.length))
    for number, case in cases.items():
        print(json.dumps({"case": int(number), **measure(case, *loaded)}), flush=True)


if __name__ == "__main__":
    main()
