"""Every flag of train.py and generate.py: name, type, default, help text and limits. Parsing is strict."""

import argparse
import dataclasses
import math
import re
import sys
from dataclasses import dataclass
from typing import Literal

from transformers import HfArgumentParser

from qlora.data.sources import parse_split
from qlora.errors import InputError

ComputeType = Literal["float16", "bfloat16", "float32"]
RowFormat = Literal["auto", "text", "guanaco", "llama2", "alpaca", "prompt_completion", "messages"]


def flag(default, help: str):
    """A dataclass field with a help text; lists are copied for each instance."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def optional_flag(help: str):
    """A switch that is None unless it stands on the command line."""
    return dataclasses.field(default=None, metadata={"help": help, "nargs": "?", "const": True})


# Flags that may change when a run is resumed: they leave the weights as they are, up to rounding. Of model
# and data it is the content that must be as it was, wherever it lies (qlora/run/fingerprint.py).
FREE_FLAGS = """
    model adapter trust_remote_code dataset dataset_config split dataset_format dataset_text_field
    validation_split validation_dataset data_report output_dir overwrite_output_dir
    per_device_train_batch_size gradient_accumulation_steps
    gradient_checkpointing offload_activations memory_limit_gb plan_only compile cuda_graphs fused_4bit
    full_determinism per_device_eval_batch_size eval_steps logging_steps report_to run_name
    save_steps save_total_limit load_best_model_at_end metric_for_best_model
    sample_prompts sample_max_new_tokens push_to_hub hub_model_id hub_private_repo
    max_skipped_steps max_hours resume_from_checkpoint allow_changes
""".split()
# Compared in their place: content, what batch sizes and packing come to, the adapter's own LoRA settings.
COMPARED = """
    base tokenizer data packs_per_step pack_length most_rows
    lora_r lora_alpha lora_dropout lora_target_modules use_rslora use_dora
""".split()


@dataclass
class TrainConfig:
    # Model
    model: str = dataclasses.field(
        metadata={
            "help": "Base model: a Hugging Face hub id or a local folder. Quantized on load unless "
            "it is already 4-bit."
        }
    )
    adapter: str | None = flag(
        None,
        "LoRA adapter folder (or hub id) to train further; its own rank, alpha, dropout and targets are "
        "kept.",
    )
    dtype: ComputeType = flag(
        "float16",
        "Compute type of the autocast forward and of the unquantized base weights. float16 runs on every "
        "CUDA card and is loss-scaled; bfloat16 needs Ampere or newer and no scaling, and is the safer one "
        "there (QLoRA's authors saw a fifth of their float16 runs fail). LoRA weights are float32 always.",
    )
    load_in_4bit: bool = flag(
        True,
        "Quantize the base to 4 bits. Off: plain LoRA on an unquantized base. QLoRA matched 16-bit LoRA in "
        "every comparison of its paper (arXiv 2305.14314, tables 3 and 4).",
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = flag(
        "nf4",
        "4-bit data type. Mean MMLU of LLaMA 7B to 65B: NF4 with double quantization 53.1, FP4 52.2, "
        "bfloat16 53.0 (arXiv 2305.14314, table 4).",
    )
    bnb_4bit_use_double_quant: bool = flag(
        True,
        "Quantize the block constants too: 0.127 instead of 0.5 bits a weight (arXiv 2305.14314, section 3).",
    )
    trust_remote_code: bool = flag(False, "Let the model repository run its own Python code. Off for safety.")

    # LoRA
    lora_r: int = flag(
        16,
        "Rank of the adapter. Ranks 8 to 256 made no difference in QLoRA's search when every layer is "
        "adapted (arXiv 2305.14314, appendix A).",
    )
    lora_alpha: int = flag(
        16,
        "Scale: the update is multiplied by alpha / r (alpha / sqrt(r) with --use_rslora). QLoRA kept 16 and "
        "searched the learning rate instead.",
    )
    lora_dropout: float = flag(
        0.05,
        "Dropout on the adapter's input. 0.05 was useful for 7B and 13B in QLoRA's search (arXiv 2305.14314, "
        "appendix A).",
    )
    lora_target_modules: list[str] = flag(
        ["q_proj", "v_proj"],
        "Names of the linear layers to adapt, or 'all-linear'. Query and value was the best choice at a "
        "fixed budget in LoRA (arXiv 2106.09685, table 5); all layers match full fine-tuning in QLoRA (arXiv "
        "2305.14314, figure 2).",
    )
    use_rslora: bool = flag(
        False, "Rank-stabilized scale alpha / sqrt(r), for high ranks (arXiv 2312.03732)."
    )
    use_dora: bool = flag(False, "Weight-decomposed LoRA; slower (arXiv 2402.09353).")

    # Data
    dataset: list[str] = flag(
        ["timdettmers/openassistant-guanaco"],
        "Training rows: a hub id, a file (json, jsonl, csv, parquet, txt) or a folder of such files; or "
        "several of them. The default is the data of the Guanaco models.",
    )
    dataset_weights: list[float] | None = flag(
        None,
        "Share of each --dataset in an epoch, such as 0.7 0.3; without it every row comes once an epoch.",
    )
    dataset_config: str | None = flag(None, "Configuration name of a hub data set that has several.")
    split: str = flag(
        "train", "Split to train on; slices such as train[:1000] or train[:90%%] work for files too."
    )
    dataset_format: RowFormat = flag(
        "auto", "Row format. auto recognises it from the columns (and a text column's markers)."
    )
    dataset_text_field: str = flag("text", "Name of the column that holds the text of text rows.")
    completion_only_loss: bool = flag(
        True,
        "Count the loss on answers only, where the format tells them from prompts. Training on the target "
        "only beat training on source and target in QLoRA (arXiv 2305.14314, table 10).",
    )
    max_length: str = flag(
        "512",
        "Longest row in tokens: a number, a percentile of the rows' lengths (p90), or max; longer ones are "
        "cut at their end, and counted. QLoRA trained 7B and 13B Guanaco at 512.",
    )
    packing: bool = flag(
        True,
        "Put several rows into a sequence of --max_length tokens, where attention can keep them apart: next "
        "to nothing is padded. Off: one row a sequence, padded to the longest of its micro-batch.",
    )
    validation_split: str | None = flag(
        None,
        "Validation rows of --dataset: a share (0.05, 5%%) or a number of rows (200) held out of training, "
        "or the name of another split; beside --validation_dataset, the name of its split.",
    )
    validation_dataset: str | None = flag(None, "Validation rows from a hub id, file or folder of their own.")
    group_by_length: bool = flag(
        False, "Put rows of similar length into the same step, so that less is padded."
    )

    streaming: bool = flag(
        False,
        "Read and tokenize rows while training, in windows of 10,000 that are shuffled by themselves: for "
        "data that is too large to prepare. Needs --max_steps.",
    )
    data_report: Literal["text", "json"] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Print the data report and end, with exit code 1 if the data would ruin a training. "
            "json: as JSON, also written to --output_dir with a histogram. Loads no model.",
            "nargs": "?",
            "const": "text",
        },
    )

    # Training
    output_dir: str = flag("outputs", "Folder for the adapter, checkpoint-N folders and metrics.jsonl.")
    overwrite_output_dir: bool = flag(
        False,
        "Replace an earlier run in --output_dir: its checkpoints, adapter and metrics go after this run's "
        "first step.",
    )
    num_train_epochs: float = flag(1.0, "Passes over the rows. One epoch is common for 10,000 rows and more.")
    max_steps: int = flag(-1, "Optimizer steps; wins over --num_train_epochs when above 0.")
    per_device_train_batch_size: int = flag(
        4, "Sequences in one forward pass (a micro-batch): packs of rows, or single rows with --no_packing."
    )
    gradient_accumulation_steps: int = flag(
        4,
        "Micro-batches in one optimizer step. 4 x 4 gives the 16 rows a step that QLoRA used for 7B and 13B; "
        "the split does not change the gradient.",
    )
    learning_rate: float = flag(
        2e-4,
        "Peak learning rate. QLoRA: 2e-4 for 7B and 13B, 1e-4 for 33B and 65B (arXiv 2305.14314, table 9).",
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = flag(
        "cosine", "Decay after the warm-up. cosine and linear end at 0; QLoRA itself used constant."
    )
    warmup_ratio: float = flag(
        0.03,
        "Share of the steps in which the rate climbs from 0 to its peak, as in QLoRA; never the last step.",
    )
    warmup_steps: int = flag(0, "Warm-up in steps; wins over --warmup_ratio when above 0.")
    optim: Literal["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch"] = flag(
        "paged_adamw_8bit",
        "Optimizer. 8-bit states match 32-bit ones at a quarter of the memory (arXiv 2110.02861); paged "
        "states move to host memory when the card is full (arXiv 2305.14314, section 3).",
    )
    weight_decay: float = flag(0.0, "Decoupled weight decay on the LoRA weights. QLoRA used none.")
    adam_beta1: float = flag(0.9, "AdamW's first-moment decay.")
    adam_beta2: float = flag(
        0.999, "AdamW's second-moment decay, as in QLoRA (arXiv 2305.14314, appendix B)."
    )
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = flag(
        0.3,
        "Clip the gradient to this norm; 0 turns clipping off. 0.3 as in QLoRA (arXiv 2305.14314, appendix "
        "B).",
    )
    max_skipped_steps: int = flag(
        10, "End the run after so many steps in a row whose loss or gradient was not finite."
    )
    seed: int = flag(42, "Seed of LoRA's start, the row order, the held-out rows and dropout.")
    full_determinism: bool = flag(
        False,
        "Only operations that give the same bits every time: on CUDA two equal runs then end alike, and so "
        "does one that was resumed. Slower; on the CPU they do anyway.",
    )

    # Speed and memory
    gradient_checkpointing: str = flag(
        "auto",
        "Layers that keep little but their input and are computed again in the backward pass (arXiv "
        "1604.06174): all, none, a number of them, or auto: the fewest with which a step fits the card, "
        "measured at the start.",
    )
    offload_activations: Literal["auto", "on", "off"] = flag(
        "auto",
        "Hold in host memory what checkpointed layers keep for their backward pass. auto: where a step "
        "does not fit the card otherwise.",
    )
    memory_limit_gb: float | None = flag(
        None, "Plan for, and never take more than, this much memory (2^30 bytes), as on a smaller card."
    )
    plan_only: bool = flag(False, "Print what a step needs and which layers are checkpointed, and end.")
    compile: bool | None = optional_flag(
        "Compile the decoder layers, each by itself. Default: with CUDA. What cannot be compiled runs as it "
        "is."
    )
    cuda_graphs: bool | None = optional_flag(
        "Record the decoder's forward and backward pass once, and replay them with one launch each: small "
        "steps take longer to launch than to compute. Needs packed rows: batches of one shape. Default: "
        "where it can be done."
    )
    fused_4bit: bool = flag(
        True,
        "On CUDA, dequantize in one kernel instead of bitsandbytes' three: the same weights to the last bit.",
    )

    # Evaluation, logging, saving
    per_device_eval_batch_size: int = flag(8, "Rows in one forward pass of an evaluation.")
    eval_steps: int = flag(100, "Evaluate every N steps and at the end, if there are validation rows.")
    logging_steps: int = flag(10, "Log every N steps to the progress bar, metrics.jsonl and the tracker.")
    report_to: Literal["none", "wandb"] = flag(
        "none", "Tracker. One that cannot be reached never stops a run."
    )
    run_name: str | None = flag(None, "Name of the run in the tracker. Default: the output folder's name.")
    save_steps: int = flag(100, "Save a checkpoint every N steps; one holds all that an exact resume needs.")
    save_total_limit: int = flag(2, "Keep the newest N checkpoints, and the best; 0 keeps all.")
    load_best_model_at_end: bool = flag(
        False,
        "Save a checkpoint whenever an evaluation is the best so far, and end with the adapter of the best "
        "one.",
    )
    metric_for_best_model: Literal["eval_loss"] = flag("eval_loss", "What is best: the lowest of this.")
    sample_prompts: str | None = flag(
        None,
        "At every evaluation, answer the rows of this file (as generate.py's --prompts_file) without and "
        "with the adapter; the answers go to metrics.jsonl and the tracker.",
    )
    sample_max_new_tokens: int = flag(64, "Longest answer to --sample_prompts in tokens.")
    push_to_hub: bool = flag(
        False, "Upload the adapter with its model card to the Hugging Face hub at the end of the run."
    )
    hub_model_id: str | None = flag(
        None, "Repository for --push_to_hub: name or you/name. Default: the output folder's name."
    )
    hub_private_repo: bool = flag(False, "Create that repository as a private one.")
    max_hours: float | None = flag(
        None,
        "After so many hours, save a checkpoint at the next step boundary and end with exit code 124. Give "
        "less than your scheduler does.",
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "'latest' in --output_dir (a fresh start if there is none), or the path of a checkpoint-N folder; "
        "checkpoints after that one are replaced.",
    )
    allow_changes: list[str] = flag(
        [],
        "What a resumed run may have other than it began with, by the names that a refusal gives (base also "
        "for --adapter).",
    )

    def __post_init__(self):
        _require_text(self)
        guarded = [*self.guarded_flags(), *COMPARED]
        for name in self.allow_changes:
            if name not in guarded:
                raise ValueError(f"--allow_changes {name}: the names are {', '.join(guarded)}")
        _require(
            self,
            "lora_r per_device_train_batch_size gradient_accumulation_steps "
            "per_device_eval_batch_size eval_steps logging_steps save_steps max_skipped_steps "
            "sample_max_new_tokens",
            lambda value: value >= 1,
            "at least 1",
        )
        _require(
            self, "lora_alpha num_train_epochs learning_rate adam_epsilon", lambda value: value > 0, "above 0"
        )
        _require(self, "lora_dropout adam_beta1 adam_beta2", lambda value: 0 <= value < 1, "in [0, 1)")
        _require(self, "warmup_ratio", lambda value: 0 <= value <= 1, "in [0, 1]")
        _require(
            self,
            "warmup_steps weight_decay max_grad_norm save_total_limit",
            lambda value: value >= 0,
            "0 or more",
        )
        _require(self, "seed", lambda value: 0 <= value < 2**32, "in [0, 2^32)")
        _require(self, "max_steps", lambda value: value == -1 or value >= 1, "-1 (off) or at least 1")
        _require_max_length(self.max_length)
        if self.gradient_checkpointing not in ("auto", "all", "none") and not re.fullmatch(
            "[0-9]+", self.gradient_checkpointing
        ):
            raise ValueError(
                "--gradient_checkpointing must be auto, all, none or a number of layers, not "
                f"{self.gradient_checkpointing}"
            )
        if self.memory_limit_gb is not None:
            _require(self, "memory_limit_gb", lambda value: value > 0, "above 0")
        if self.max_hours is not None:
            _require(self, "max_hours", lambda value: value > 0, "above 0")
        _require_split("split", self.split)
        if self.validation_split and self.held_out is None:
            _require_split("validation_split", self.validation_split)
        amount, is_percent = self.held_out, str(self.validation_split).endswith("%")
        is_number = amount is not None and amount >= 1 and amount % 1 == 0 and not is_percent
        if amount is not None and not (0 < amount < 1 or is_number):
            raise ValueError(
                "--validation_split must be a share in (0, 1), a whole number of rows or a split's name, "
                f"not {self.validation_split}"
            )
        if amount is not None and self.validation_dataset:
            raise ValueError(
                f"--validation_split {self.validation_split} holds rows out of --dataset; beside "
                "--validation_dataset it takes the name of a split"
            )
        if self.resume_from_checkpoint and self.overwrite_output_dir:
            raise ValueError("--resume_from_checkpoint and --overwrite_output_dir exclude each other")
        if self.dataset_weights is not None:
            given, wanted = len(self.dataset_weights), len(self.dataset)
            if given != wanted:
                raise ValueError(f"--dataset_weights has {given} numbers for {wanted} data sets")
            for weight in self.dataset_weights:
                if not 0 < weight < math.inf:
                    raise ValueError(f"--dataset_weights must be above 0, not {weight}")
            if self.group_by_length:
                raise ValueError("--dataset_weights and --group_by_length exclude each other")
        if self.streaming:
            if self.max_steps == -1:
                raise ValueError("--streaming needs --max_steps: the length of a stream is not known")
            if not self.max_length.isdigit():
                raise ValueError(f"--streaming needs a number as --max_length, not {self.max_length}")
            if len(self.dataset) > 1 or self.held_out is not None:
                raise ValueError(
                    "--streaming takes one --dataset, and validation rows that are not held out of it"
                )
            if self.data_report:
                raise ValueError("--data_report reads all rows, --streaming does not")
        for name in self.lora_target_modules:
            if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name):
                raise ValueError(f"--lora_target_modules takes names of layers, and {name!r} is none")
        if "all-linear" in self.lora_target_modules and len(self.lora_target_modules) > 1:
            raise ValueError("--lora_target_modules takes 'all-linear' or names of layers, not both")

    def guarded_flags(self) -> dict:
        """The flags that a resumed run must have as it began, with their values; COMPARED comes to that."""
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if name not in (*FREE_FLAGS, *COMPARED)}

    @property
    def held_out(self) -> float | None:
        """--validation_split as an amount (below 1 a share, else rows), or None if it names a split."""
        return _amount(self.validation_split or "")

    def check_given(self, given: set[str]) -> None:
        """Refuse flags that would be ignored; `given` names the flags that stand on the command line."""
        if self.adapter:
            _refuse(
                given,
                "lora_r lora_alpha lora_dropout lora_target_modules use_rslora use_dora",
                "is fixed by the adapter given with --adapter",
            )
        if not self.load_in_4bit:
            names = "bnb_4bit_quant_type bnb_4bit_use_double_quant fused_4bit"
            _refuse(given, names, "means nothing with --no_load_in_4bit")
        is_none = self.gradient_checkpointing == "none" or not self.gradient_checkpointing.strip("0")
        if is_none and self.offload_activations == "on":
            raise ValueError("--offload_activations on needs checkpointed layers: it is for what they keep")
        if not (self.validation_split or self.validation_dataset):
            _refuse(
                given,
                "eval_steps per_device_eval_batch_size load_best_model_at_end metric_for_best_model "
                "sample_prompts",
                "needs --validation_split or --validation_dataset",
            )
        if self.cuda_graphs and not self.packing:
            raise ValueError("--cuda_graphs needs packed rows: padded batches have many shapes")
        if self.packing and self.group_by_length:
            raise ValueError("--group_by_length needs --no_packing: packed rows need no padding")
        if not self.sample_prompts:
            _refuse(given, "sample_max_new_tokens", "needs --sample_prompts")
        if not self.push_to_hub:
            _refuse(given, "hub_model_id hub_private_repo", "needs --push_to_hub")
        if self.report_to == "none":
            _refuse(given, "run_name", "needs --report_to wandb")
        if self.allow_changes and not (self.resume_from_checkpoint or self.adapter):
            raise ValueError("--allow_changes needs --resume_from_checkpoint or --adapter")


@dataclass
class AdaptedModel:
    """The flags of commands that put a trained adapter on its base."""

    model: str = dataclasses.field(
        metadata={
            "help": "Base model: a Hugging Face hub id or a local folder, the one the adapter was trained on."
        }
    )
    adapter: str | None = flag(None, "LoRA adapter folder (or hub id). Without it: the base alone.")
    dtype: ComputeType = flag(
        "float16", "Compute type. This and the next three: as in the training, where the adapter says it."
    )
    load_in_4bit: bool = flag(True, "Quantize the base to 4 bits.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = flag("nf4", "4-bit data type.")
    bnb_4bit_use_double_quant: bool = flag(True, "Quantize the block constants too.")
    trust_remote_code: bool = flag(False, "Let the model repository run its own Python code. Off for safety.")
    allow_other_base: bool = flag(
        False, "Go on although the adapter was trained on another base than --model, as far as one can tell."
    )

    def check_given(self, given: set[str]) -> None:
        """Refuse flags that would be ignored; `given` names the flags that stand on the command line."""
        if not self.load_in_4bit:
            names = "bnb_4bit_quant_type bnb_4bit_use_double_quant"
            _refuse(given, names, "means nothing with --no_load_in_4bit")


@dataclass
class GenerateConfig(AdaptedModel):
    # Prompts
    prompt: str | None = flag(
        None, "Answer this prompt. Without --prompt and --prompts_file: an interactive chat."
    )
    prompts_file: str | None = flag(
        None,
        "Answer every row of this file (txt: a prompt a line; json, jsonl, csv, parquet: a 'prompt' column "
        "or the columns of the training format).",
    )
    output_file: str | None = flag(
        None,
        "Where the answers to --prompts_file go (replaced if it is there). Default: beside it, as "
        "NAME.answers.jsonl.",
    )
    batch_size: int = flag(8, "Prompts answered at once with --prompts_file (left-padded).")
    dataset_format: RowFormat = flag(
        "auto", "How a prompt is wrapped. auto: as in the training, or as plain text if that is unknown."
    )
    dataset_text_field: str = flag(
        "text", "Column of the text in the rows of --prompts_file; as in the training, where that is known."
    )

    # Sampling, under Hugging Face's names
    max_new_tokens: int = flag(256, "Longest answer in tokens; it ends earlier at the end-of-sequence token.")
    do_sample: bool = flag(
        False,
        "Sample instead of taking the likeliest token each time. Only these flags count, not the sampling "
        "settings that come with the model.",
    )
    temperature: float = flag(
        1.0,
        "Below 1 sharpens, above 1 flattens the distribution. Needs --do_sample. QLoRA evaluated Guanaco at "
        "0.7.",
    )
    top_p: float = flag(
        1.0,
        "Sample from the smallest set of tokens that holds this probability. Needs --do_sample. QLoRA "
        "evaluated Guanaco at 0.9.",
    )
    top_k: int = flag(50, "Sample from the k likeliest tokens; 0 for all. Needs --do_sample.")
    repetition_penalty: float = flag(
        1.0, "Above 1 discourages tokens that stand in the text (arXiv 1909.05858)."
    )
    seed: int = flag(42, "Seed of the sampling.")

    def __post_init__(self):
        _require_text(self)
        _require(self, "batch_size max_new_tokens", lambda value: value >= 1, "at least 1")
        _require(self, "temperature repetition_penalty", lambda value: value > 0, "above 0")
        _require(self, "top_p", lambda value: 0 < value <= 1, "in (0, 1]")
        _require(self, "top_k", lambda value: value >= 0, "0 or more")
        _require(self, "seed", lambda value: 0 <= value < 2**32, "in [0, 2^32)")
        if self.prompt is not None and self.prompts_file:
            raise ValueError("--prompt and --prompts_file exclude each other")
        if self.output_file and not self.prompts_file:
            raise ValueError("--output_file needs --prompts_file")

    def check_given(self, given: set[str]) -> None:
        super().check_given(given)
        if not self.do_sample:
            _refuse(given, "temperature top_p top_k seed", "needs --do_sample")
        if not self.prompts_file:
            _refuse(given, "batch_size", "needs --prompts_file")


@dataclass
class EvaluateConfig(AdaptedModel):
    model: str | None = flag(None, "Base model: the one the adapter was trained on, or any.")

    # Loss
    dataset: str | None = flag(
        None, "Rows to take the loss over: a hub id, a file (json, jsonl, csv, parquet, txt) or a folder."
    )
    dataset_config: str | None = flag(None, "Configuration name of a hub data set that has several.")
    split: str = flag("train", "Split of --dataset.")
    validation_split: str | None = flag(
        None,
        "Of --dataset only the rows that train.py held out of it by the same --validation_split: a share "
        "(0.05, 5%%) or a number of rows.",
    )
    validation_seed: int = flag(42, "The training's --seed; as in the training, where the adapter says it.")
    dataset_format: RowFormat = flag(
        "auto", "Row format. This and the next three: as in the training, where the adapter says it."
    )
    dataset_text_field: str = flag("text", "Name of the column that holds the text of text rows.")
    completion_only_loss: bool = flag(True, "Count the loss on answers only.")
    max_length: str = flag("max", "Longest row in tokens: a number, a percentile (p90), or max.")
    per_device_eval_batch_size: int = flag(8, "Rows in one forward pass.")
    general_dataset: str | None = flag(
        None,
        "Forgetting: a general text that has nothing to do with the training, as hub id, file or folder with "
        "a text column. What the loss on it rises by, the adapter has forgotten.",
    )
    general_dataset_config: str | None = flag(None, "Configuration name of a hub data set that has several.")
    general_split: str = flag("train", "Split of --general_dataset.")
    general_text_field: str = flag("text", "Name of its column.")

    # Answers
    prompts_file: str | None = flag(
        None,
        "Answer every row of this file (or hub id), which has the reference answers too, and score the "
        "answers.",
    )
    prompts_split: str = flag(
        "train", "Split of --prompts_file; slices such as train[:100] work for files too."
    )
    code: bool = flag(
        False,
        "The answers are Python: also CodeBLEU (arXiv 2009.10297) with its four parts, and the share that "
        "parses.",
    )
    samples: int = flag(
        0, "Print the answers of base and tuned model to the first N rows of --prompts_file side by side."
    )
    max_new_tokens: int = flag(256, "Longest answer in tokens.")
    batch_size: int = flag(8, "Prompts answered at once.")

    quantization: str | None = flag(
        None,
        "Instead of all this: what quantizing this model (hub id or folder) to 4 bits does to each layer.",
    )
    output_file: str | None = flag(
        None,
        "Where everything goes as JSON, in place of what was there. Default: evaluation.json in the "
        "adapter's folder or here, or quantization.json here.",
    )

    def __post_init__(self):
        _require_text(self)
        _require(
            self,
            "per_device_eval_batch_size batch_size max_new_tokens",
            lambda value: value >= 1,
            "at least 1",
        )
        _require(self, "samples", lambda value: value >= 0, "0 or more")
        _require(self, "validation_seed", lambda value: 0 <= value < 2**32, "in [0, 2^32)")
        _require_max_length(self.max_length)
        _require_split("split", self.split)
        _require_split("general_split", self.general_split)
        _require_split("prompts_split", self.prompts_split)
        amount = self.held_out
        if self.validation_split and (amount is None or amount <= 0):
            raise ValueError(
                f"--validation_split must be a share or a number of rows, not {self.validation_split}"
            )
        work = self.dataset or self.general_dataset or self.prompts_file
        if not self.quantization and not (self.model and work):
            raise ValueError(
                "nothing to do: give --model with --dataset, --general_dataset or --prompts_file, or give "
                "--quantization"
            )

    def check_given(self, given: set[str]) -> None:
        if self.quantization:
            others = given - {"quantization", "trust_remote_code", "output_file"}
            _refuse(given, " ".join(sorted(others)), "means nothing with --quantization")
        super().check_given(given)
        if not self.dataset:
            _refuse(given, "dataset_config split validation_split", "needs --dataset")
        if not self.validation_split:
            _refuse(given, "validation_seed", "needs --validation_split")
        if not self.general_dataset:
            _refuse(
                given, "general_dataset_config general_split general_text_field", "needs --general_dataset"
            )
        if not self.prompts_file:
            _refuse(given, "prompts_split code samples max_new_tokens batch_size", "needs --prompts_file")

    @property
    def held_out(self) -> float | None:
        """--validation_split as an amount: below 1 a share, else rows."""
        return _amount(self.validation_split or "")


@dataclass
class MergeConfig(AdaptedModel):
    adapter: str | None = flag(None, "LoRA adapter folder (or hub id); it must be given.")

    output_dir: str = flag("merged", "Folder for the merged model; new, or empty.")
    base: Literal["dequantized", "original"] = flag(
        "dequantized",
        "What the adapter is added to: the 4-bit weights as 16-bit ones, on which it was trained, or the "
        "weights as they were before they were quantized, which answer a little differently.",
    )
    max_kl: float = flag(
        0.01,
        "Refuse a merged model that differs by more than this from the adapter on its base: KL divergence in "
        "nats a token, mean over the rows compared.",
    )
    dataset: str | None = flag(
        None,
        "Rows to compare on: a hub id, file or folder; the first 2,048 tokens count. Default: a short text "
        "that comes along.",
    )
    split: str = flag("train", "Split of --dataset.")
    dataset_format: RowFormat = flag(
        "auto", "Row format of --dataset; as in the training, where the adapter says it."
    )
    dataset_text_field: str = flag("text", "Name of the column that holds the text of text rows.")
    push_to_hub: bool = flag(False, "Upload the merged model with its model card to the Hugging Face hub.")
    hub_model_id: str | None = flag(
        None, "Repository for --push_to_hub: name or you/name. Default: the output folder's name."
    )
    hub_private_repo: bool = flag(False, "Create that repository as a private one.")

    def __post_init__(self):
        _require_text(self)
        _require(self, "max_kl", lambda value: value >= 0, "0 or more")
        _require_split("split", self.split)
        if not self.adapter:
            raise ValueError("--adapter is missing: what is to be merged into --model?")

    def check_given(self, given: set[str]) -> None:
        super().check_given(given)
        if not self.dataset:
            _refuse(given, "split", "needs --dataset")
        if not self.push_to_hub:
            _refuse(given, "hub_model_id hub_private_repo", "needs --push_to_hub")


def parse_args(
    config_class, argv: list[str] | None = None, defaults: dict | None = None, program: str | None = None
):
    """Parse `argv` (default: the command line) into `config_class`; any mistake is one line and exit code 2.

    `defaults` stand in for flags that are not given, and are checked like them.
    HfArgumentParser.parse_args_into_dataclasses is avoided: it reads a stray `train.args` file and shows
    tracebacks.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _OneLineParser(config_class, prog=program, allow_abbrev=False, formatter_class=_Help)
    for field in dataclasses.fields(config_class):
        if field.type == bool | None:  # HfArgumentParser gives only those that are on an opposite
            off = f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"
            parser.add_argument(*off, dest=field.name, action="store_false", help="")
    default_flags = [f"--{name}={value}" for name, value in (defaults or {}).items()]
    values = vars(parser.parse_args([*default_flags, *argv]))
    words = [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    given = {word.removeprefix("no_") for word in words}
    try:
        config = config_class(**values)
        config.check_given(given)
    except ValueError as error:
        parser.error(str(error))
    return config


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        if action.required or action.default is None:  # "default: None" says nothing
            return action.help
        return super()._get_help_string(action)


class _OneLineParser(HfArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def _amount(text: str) -> float | None:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _require(config, names: str, holds, limit: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        if value != value or value in (math.inf, -math.inf) or not holds(value):
            raise ValueError(f"--{name} must be {limit}, not {value}")


def _require_max_length(value: str) -> None:
    percent = re.fullmatch(r"p(\d+(?:\.\d+)?)", value)
    is_number = re.fullmatch(r"[0-9]+", value) and int(value) >= 1
    if not (is_number or value == "max" or (percent and 0 < float(percent[1]) <= 100)):
        raise ValueError(f"--max_length must be a number from 1 on, pNN (a percentile) or max, not {value}")


def _require_split(name: str, split: str) -> None:
    try:
        parse_split(split)
    except InputError as error:
        raise ValueError(f"--{name}: {error}") from error


def _require_text(config) -> None:
    """Refuse empty values, as an unset shell variable leaves them; an empty prompt is refused as a prompt."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.strip() and field.name != "prompt":
                raise ValueError(f"--{field.name} is empty")


def _refuse(given: set[str], names: str, why: str) -> None:
    for name in names.split():
        if name in given:
            raise ValueError(f"--{name} {why}")
