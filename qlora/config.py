"""Every flag of train.py, generate.py and the commands in qlora/: name, type, default, help, limits.

flags.flag() explains what is declared with each.
"""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from qlora import ranks
from qlora.data.formatting import Formatting
from qlora.data.sources import RowSource, parse_split
from qlora.errors import InputError
from qlora.flags import AT_LEAST_1, FRACTION, NON_NEGATIVE, POSITIVE, SEED, Flags, Limit, flag, flag_names

ComputeType = Literal["float16", "bfloat16", "float32"]
AS_TRAINED = "as_trained"  # --validation_split of qlora.evaluate without a value
RowFormat = Literal["auto", "text", "guanaco", "llama2", "alpaca", "prompt_completion", "messages"]

# The formatter would give each piece of metadata a line of its own.
# fmt: off


@dataclass
class TrainConfig(Flags):
    # Model
    model: str = flag(
        ...,
        "Base model: a Hugging Face hub id or a local folder. Quantized on load unless it is already 4-bit.",
        resume="free", compares=("base", "tokenizer"), on_card=False,
    )
    adapter: str | None = flag(
        None,
        "LoRA adapter (folder or hub id) to train further. It keeps its own rank, alpha, dropout and "
        "targets.",
        resume="free", on_card=False,
    )
    dtype: ComputeType = flag(
        "float16",
        "Compute type: of autocast and of the base weights that are not quantized. float16 runs on every "
        "CUDA GPU, with loss scaling. bfloat16 needs Ampere or newer and no scaling; it is the safer choice "
        "there (a fifth of the QLoRA authors' float16 runs failed). LoRA weights are always float32.",
        kept_as="dtype",
    )
    load_in_4bit: bool = flag(
        True,
        "Quantize the base to 4 bits. Off: plain LoRA on an unquantized base. QLoRA matched 16-bit LoRA in "
        "every comparison of its paper (arXiv 2305.14314, tables 3 and 4).",
        kept_as="load_in_4bit",
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = flag(
        "nf4",
        "4-bit data type. Mean MMLU accuracy of LLaMA 7B to 65B: NF4 with double quantization 53.1, FP4 "
        "52.2, bfloat16 53.0 (arXiv 2305.14314, table 4).",
        needs="--load_in_4bit", kept_as="bnb_4bit_quant_type",
    )
    bnb_4bit_use_double_quant: bool = flag(
        True,
        "Quantize the block constants too: 0.127 instead of 0.5 bits per weight (arXiv 2305.14314, section "
        "3).",
        needs="--load_in_4bit", kept_as="bnb_4bit_use_double_quant",
    )
    trust_remote_code: bool = flag(
        False, "Let the model repository run its own Python code. Off for safety.",
        resume="free",
    )

    # LoRA
    lora_r: int = flag(
        16,
        "Rank of the adapter. Ranks from 8 to 256 made no difference in QLoRA's search, with every layer "
        "adapted (arXiv 2305.14314, appendix A).",
        limit=AT_LEAST_1, excludes="--adapter, which keeps its own", resume="free", compares=("lora_r",),
        sets_shapes=True,
    )
    lora_alpha: int = flag(
        16,
        "Scale: the update is multiplied by alpha / r (alpha / sqrt(r) with --use_rslora). QLoRA kept it at "
        "16 and searched the learning rate instead.",
        limit=POSITIVE, excludes="--adapter, which keeps its own", resume="free", compares=("lora_alpha",),
    )
    lora_dropout: float = flag(
        0.05,
        "Dropout on the adapter's input. 0.05 helped 7B and 13B models in QLoRA's search (arXiv 2305.14314, "
        "appendix A).",
        limit=FRACTION, excludes="--adapter, which keeps its own", resume="free", compares=("lora_dropout",),
    )
    lora_target_modules: list[str] = flag(
        ["q_proj", "v_proj"],
        "Names of the linear layers to adapt, or 'all-linear'. Query and value were the best choice at a "
        "fixed number of trained weights in LoRA (arXiv 2106.09685, table 5). QLoRA needed all layers to "
        "match full fine-tuning (arXiv 2305.14314, figure 2).",
        excludes="--adapter, which keeps its own", resume="free", compares=("lora_target_modules",),
        sets_shapes=True,
    )
    use_rslora: bool = flag(
        False, "Rank-stabilized scale alpha / sqrt(r), for high ranks (arXiv 2312.03732).",
        excludes="--adapter, which keeps its own", resume="free", compares=("use_rslora",),
    )
    use_dora: bool = flag(
        False, "Weight-decomposed LoRA; slower (arXiv 2402.09353).",
        excludes="--adapter, which keeps its own", resume="free", compares=("use_dora",), sets_shapes=True,
    )
    init_lora_weights: Literal["default", "gaussian", "loftq", "qera"] = flag(
        "default",
        "How the adapter starts; the base stays as it is. default: A uniform, B 0. gaussian: A normal, B 0. "
        "loftq: a low-rank correction of each weight's quantization error (arXiv 2310.08659). qera: the "
        "same, minimizing the error of each layer's output on training rows (arXiv 2410.06040). Both want a "
        "smaller learning rate: docs/quality.md.",
        excludes="--adapter, which has its weights",
    )

    # Data
    dataset: list[str] = flag(
        ["timdettmers/openassistant-guanaco"],
        "Training rows: a hub id, a file (json, jsonl, csv, parquet, txt) or a folder of such files; or "
        "several of these. The default is the dataset of the Guanaco models.",
        resume="free", compares=("data",), on_card=False,
    )
    dataset_weights: list[float] | None = flag(
        None,
        "Share of each --dataset in an epoch, such as 0.7 0.3. Without it, an epoch has every row once.",
    )
    dataset_config: str | None = flag(
        None, "Configuration name, for a hub dataset that has several.",
        resume="free",
    )
    split: str = flag(
        "train", "Split to train on. Slices such as train[:1000] or train[:90%%] work for files too.",
        resume="free",
    )
    dataset_format: RowFormat = flag(
        "auto", "Row format. auto recognizes it from the columns and, in a text column, from its markers.",
        resume="free", kept_as="dataset_format",
    )
    dataset_text_field: str = flag(
        "text", "Column that holds the text, for rows of text.",
        resume="free", kept_as="dataset_text_field",
    )
    completion_only_loss: bool = flag(
        True,
        "Compute the loss on answers only, where the format tells them from prompts. In QLoRA this beat "
        "training on prompts and answers (arXiv 2305.14314, table 10).",
        kept_as="completion_only_loss",
    )
    train_on: Literal["all", "last"] = flag(
        "all",
        "Of a row of messages, train every turn of the assistant or only the last one. A message with "
        "'weight': 0 or 'train': false is never trained.",
        kept_as="train_on",
    )
    chat_template: str | None = flag(
        None,
        "File with a chat template (Jinja) that replaces the tokenizer's own, for rows of messages. It is "
        "saved with the adapter.",
        resume="free", compares=("tokenizer",), on_card=False,
    )
    split_special_tokens: bool | None = flag(
        None,
        "Tokenize a special token that a row spells, such as </s> in an answer, as plain text. Default: on, "
        "except for text columns, whose rows bring their own special tokens; rows of llama2 always do.",
        kept_as="split_special_tokens",
    )
    max_length: str = flag(
        "512",
        "Longest row in tokens: a number, a percentile of the row lengths (p90), or max. Longer rows are "
        "truncated at their end, and counted. QLoRA trained 7B and 13B Guanaco at 512.",
        kept_as="max_length",
    )
    packing: bool = flag(
        True,
        "Pack several rows into a sequence of --max_length tokens, where attention can keep them apart. "
        "Almost nothing is padding then. Off: one row per sequence, padded to the longest of its "
        "micro-batch.",
        compares=("pack_length", "most_rows"),
    )
    validation_split: str | None = flag(
        None,
        "Validation rows from --dataset: a share (0.05, 5%%) or a number of rows (200) held out of training, "
        "or the name of another split. With --validation_dataset: the name of its split.",
        resume="free",
    )
    validation_dataset: str | None = flag(
        None, "Validation rows from a hub id, file or folder of their own.",
        resume="free", on_card=False,
    )
    group_by_length: bool = flag(
        False, "Put rows of similar length into the same step, so that less is padded. Needs --no_packing.",
    )
    streaming: bool = flag(
        False,
        "Read and tokenize rows while training, in windows of 10,000 rows, each shuffled by itself: for data "
        "that is too large to prepare. Needs --max_steps.",
    )
    data_report: Literal["text", "json"] | None = flag(
        None,
        "Print the data report and exit, with exit code 1 if the data would ruin a run. json: as JSON, "
        "also written to --output_dir with a histogram. Loads no model.",
        bare_value="text", resume="free",
    )

    # Training
    output_dir: str = flag(
        "outputs", "Folder for the adapter, checkpoint-N folders and metrics.jsonl.",
        resume="free", on_card=False, is_place=True,
    )
    overwrite_output_dir: bool = flag(
        False,
        "Replace an earlier run in --output_dir. Its checkpoints, adapter and metrics are deleted after the "
        "first step of this run.",
        resume="free", on_card=False, is_place=True,
    )
    num_train_epochs: float = flag(
        1.0, "Passes over the rows. One epoch is common for 10,000 rows and more.",
        limit=POSITIVE,
    )
    max_steps: int = flag(
        -1, "Optimizer steps. Overrides --num_train_epochs when above 0.",
        limit=Limit(lambda value: value == -1 or value >= 1, "-1 (off) or at least 1"),
    )
    per_device_train_batch_size: int = flag(
        4,
        "Sequences in one forward pass (a micro-batch) on each GPU: packs of rows, or single rows with "
        "--no_packing.",
        limit=AT_LEAST_1, resume="free", compares=("packs_per_step",),
    )
    gradient_accumulation_steps: int = flag(
        4,
        "Micro-batches in one optimizer step, on each GPU. How a step is split into micro-batches does not "
        "change its gradient. QLoRA took 16 rows per step for 7B and 13B: 4 x 4 with --no_packing. A packed "
        "sequence holds several rows, so 4 x 4 packs are a larger step.",
        limit=AT_LEAST_1, resume="free", compares=("packs_per_step",),
    )
    learning_rate: float = flag(
        2e-4,
        "Peak learning rate. QLoRA: 2e-4 for 7B and 13B, 1e-4 for 33B and 65B (arXiv 2305.14314, table 9).",
        limit=POSITIVE,
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = flag(
        "cosine", "Decay after the warmup. cosine and linear end at 0; QLoRA itself used constant.",
    )
    warmup_ratio: float = flag(
        0.03,
        "Share of the steps in which the learning rate climbs from 0 to its peak. 0.03 as in QLoRA. The last "
        "step is never part of the warmup.",
        limit=Limit(lambda value: 0 <= value <= 1, "in [0, 1]"),
    )
    warmup_steps: int = flag(0, "Warmup in steps. Overrides --warmup_ratio when above 0.", limit=NON_NEGATIVE)
    optim: Literal["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch"] = flag(
        "paged_adamw_8bit",
        "Optimizer. 8-bit states match 32-bit states at a quarter of the memory (arXiv 2110.02861). Paged "
        "states move to host memory when the GPU is full (arXiv 2305.14314, section 3).",
        sets_shapes=True,
    )
    weight_decay: float = flag(
        0.0, "Decoupled weight decay on the LoRA weights. QLoRA used none.",
        limit=NON_NEGATIVE,
    )
    loraplus_lr_ratio: float = flag(
        1.0,
        "LoRA+: train the B matrices at this multiple of the learning rate (arXiv 2402.12354, which takes 16 "
        "and a lower rate).",
        limit=POSITIVE,
    )
    adam_beta1: float = flag(0.9, "AdamW's first-moment decay.", limit=FRACTION)
    adam_beta2: float = flag(
        0.999, "AdamW's second-moment decay, as in QLoRA (arXiv 2305.14314, appendix B).",
        limit=FRACTION,
    )
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon.", limit=POSITIVE)
    max_grad_norm: float = flag(
        0.3,
        "Clip the gradient to this norm; 0 turns clipping off. 0.3 as in QLoRA (arXiv 2305.14314, appendix "
        "B).",
        limit=NON_NEGATIVE,
    )
    max_skipped_steps: int = flag(
        10, "Stop after this many steps in a row whose loss or gradient was not finite.",
        limit=AT_LEAST_1, resume="free",
    )
    seed: int = flag(
        42, "Seed of the LoRA initialization, the row order, the held-out rows and dropout.",
        limit=SEED,
    )
    full_determinism: bool = flag(
        False,
        "Use only operations that give the same bits every time. On CUDA, two equal runs then end "
        "bit-identical, and so does a resumed one. Slower. On the CPU this holds anyway.",
        resume="free",
    )

    # Speed and memory
    gradient_checkpointing: str = flag(
        "auto",
        "Layers that keep little but their input and recompute the rest in the backward pass (arXiv "
        "1604.06174): all, none, a number of layers, or auto, which takes the fewest with which a step fits "
        "the GPU, as measured at the start.",
        resume="free",
    )
    offload_activations: Literal["auto", "on", "off"] = flag(
        "auto",
        "Keep in host memory what checkpointed layers save for the backward pass. auto: only where a step "
        "does not fit the GPU otherwise.",
        resume="free", needs_cuda=lambda value: value == "on",
    )
    memory_limit_gb: float | None = flag(
        None, "Plan for this much GPU memory (in 2^30 bytes) and never take more, as on a smaller GPU.",
        limit=POSITIVE, resume="free", needs_cuda=bool,
    )
    plan_only: bool = flag(
        False, "Print what a step needs and which layers are checkpointed, and exit.",
        resume="free", needs_cuda=bool,
    )
    compile: bool | None = flag(
        None,
        "Compile the decoder layers, each by itself. Default: on with CUDA. What cannot be compiled runs "
        "uncompiled.",
        resume="free",
    )
    cuda_graphs: bool | None = flag(
        None,
        "Record the decoder's forward and backward pass once and replay each with a single launch; small "
        "steps take longer to launch than to compute. Needs packed rows, whose batches all have one shape. "
        "Default: on where possible.",
        resume="free", needs_cuda=bool,
    )
    fused_4bit: bool = flag(
        True,
        "On CUDA, dequantize in one kernel instead of bitsandbytes' three. The weights are bit-identical.",
        needs="--load_in_4bit", resume="free",
    )

    # Evaluation, logging, saving
    per_device_eval_batch_size: int = flag(
        8, "Rows in one forward pass of an evaluation.",
        limit=AT_LEAST_1, needs="--validation_split or --validation_dataset", resume="free",
    )
    eval_steps: int = flag(
        100, "Evaluate every N steps and at the end, if there are validation rows.",
        limit=AT_LEAST_1, needs="--validation_split or --validation_dataset", resume="free",
    )
    logging_steps: int = flag(
        10, "Log every N steps to the progress bar, metrics.jsonl and the tracker.",
        limit=AT_LEAST_1, resume="free", on_card=False,
    )
    report_to: Literal["none", "wandb"] = flag(
        "none", "Experiment tracker. One that cannot be reached never stops a run.",
        resume="free", on_card=False, is_place=True,
    )
    run_name: str | None = flag(
        None, "Name of the run in the tracker. Default: the name of the output folder.",
        needs="--report_to wandb", resume="free", on_card=False, is_place=True,
    )
    save_steps: int = flag(
        100, "Save a checkpoint every N steps. It holds everything that an exact resume needs.",
        limit=AT_LEAST_1, resume="free", on_card=False,
    )
    save_total_limit: int = flag(
        2, "Keep the newest N checkpoints, and the best one; 0 keeps all.",
        limit=NON_NEGATIVE, resume="free", on_card=False,
    )
    load_best_model_at_end: bool = flag(
        False,
        "Save a checkpoint whenever the validation loss is the lowest so far, and end with the adapter of "
        "the best one.",
        needs="--validation_split or --validation_dataset", resume="free",
    )
    sample_prompts: str | None = flag(
        None,
        "At every evaluation, answer the rows of this file (as in generate.py's --prompts_file) with and "
        "without the adapter. The answers go to metrics.jsonl and the tracker.",
        needs="--validation_split or --validation_dataset", resume="free", on_card=False,
    )
    sample_max_new_tokens: int = flag(
        64, "Longest answer to --sample_prompts, in tokens.",
        limit=AT_LEAST_1, needs="--sample_prompts", resume="free", on_card=False,
    )
    push_to_hub: bool = flag(
        False, "Upload the adapter with its model card to the Hugging Face hub at the end of the run.",
        resume="free", on_card=False,
    )
    hub_model_id: str | None = flag(
        None, "Repository for --push_to_hub: name or owner/name. Default: the name of the output folder.",
        needs="--push_to_hub", resume="free", on_card=False,
    )
    hub_private_repo: bool = flag(
        False,
        "Create that repository as a private one, and refuse it if it exists and is public. Without this "
        "flag, a new one is as its owner's settings on the hub say.",
        needs="--push_to_hub", resume="free", on_card=False,
    )
    max_hours: float | None = flag(
        None,
        "After this many hours, save a checkpoint at the next step boundary and stop with exit code 124. Set "
        "it below your scheduler's limit. Every run takes at least one step.",
        limit=POSITIVE, resume="free", on_card=False,
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "'latest' in --output_dir (a fresh start if there is none), or the path of a checkpoint-N folder. "
        "Checkpoints after that one are replaced.",
        resume="free", on_card=False, is_place=True,
    )
    shard: bool = flag(
        False,
        "Under torchrun: each GPU keeps a part of the 4-bit base and gathers one layer at a time (PyTorch's "
        "FSDP2), for models that one GPU cannot hold. See docs/several-gpus.md.",
        resume="free", on_card=False,
    )
    shard_cpu_offload: bool = flag(
        False, "Keep the parts in host memory, and copy them to the GPU a layer at a time. Much slower.",
        needs="--shard", resume="free", on_card=False,
    )
    distributed_timeout: float = flag(
        600.0,
        "Under torchrun: seconds after which a process that does not answer counts as lost, and the run "
        "saves a checkpoint and stops.",
        limit=POSITIVE, resume="free", on_card=False,
    )
    allow_changes: list[str] = flag(
        [],
        "Settings that may change on resume, by the names that a refusal lists. With --adapter: base, to "
        "train it on another base.",
        needs="--resume_from_checkpoint or --adapter", resume="free", on_card=False, is_place=True,
    )

    def __post_init__(self):
        super().__post_init__()
        compared = {name for field in fields(self) for name in field.metadata["compares"]}
        names = [*self.compared_values(), *sorted(compared)]
        for name in self.allow_changes:
            if name not in names:
                raise ValueError(f"--allow_changes {name}: the names are {', '.join(names)}")
        _check_output_dir(self.output_dir, self.model)
        _check_max_length(self.max_length)
        if not re.fullmatch("auto|all|none|[0-9]+", self.gradient_checkpointing):
            raise ValueError(
                "--gradient_checkpointing must be auto, all, none or a number of layers, not "
                f"{self.gradient_checkpointing}"
            )
        _check_split("split", self.split)
        self._check_validation()
        if self.resume_from_checkpoint and self.overwrite_output_dir:
            raise ValueError("--resume_from_checkpoint and --overwrite_output_dir exclude each other")
        self._check_weights()
        if self.streaming:
            self._check_streaming()
        if self.init_lora_weights in ("loftq", "qera") and (self.use_dora or not self.load_in_4bit):
            raise ValueError(
                f"--init_lora_weights {self.init_lora_weights} needs --load_in_4bit and does not work with "
                "--use_dora"
            )
        for name in self.lora_target_modules:
            if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name):
                raise ValueError(f"--lora_target_modules takes names of layers, which {name!r} is not")
        checkpoints_layers = self.gradient_checkpointing != "none" and self.gradient_checkpointing.strip("0")
        if self.offload_activations == "on" and not checkpoints_layers:
            raise ValueError("--offload_activations on needs checkpointed layers: it moves what they keep")
        if self.shard:
            self._check_shard()
        if self.cuda_graphs and not self.packing:
            raise ValueError("--cuda_graphs needs packed rows: padded batches have many shapes")
        if self.packing and self.group_by_length:
            raise ValueError("--group_by_length needs --no_packing: packed rows need no padding")
        if "all-linear" in self.lora_target_modules and len(self.lora_target_modules) > 1:
            raise ValueError("--lora_target_modules takes 'all-linear' or names of layers, not both")

    def _check_validation(self) -> None:
        amount = self.held_out
        if self.validation_split and amount is None:
            _check_split("validation_split", self.validation_split)
        is_percent = str(self.validation_split).endswith("%")
        is_row_count = amount is not None and amount >= 1 and amount % 1 == 0 and not is_percent
        if amount is not None and not (0 < amount < 1 or is_row_count):
            raise ValueError(
                "--validation_split must be a share in (0, 1), a whole number of rows or a split name, "
                f"not {self.validation_split}"
            )
        if amount is not None and self.validation_dataset:
            raise ValueError(
                f"--validation_split {self.validation_split} holds rows out of --dataset; with "
                "--validation_dataset it takes the name of a split"
            )

    def _check_weights(self) -> None:
        if self.dataset_weights is None:
            return
        if len(self.dataset_weights) != len(self.dataset):
            raise ValueError(
                f"--dataset_weights has {len(self.dataset_weights)} numbers for {len(self.dataset)} datasets"
            )
        for weight in self.dataset_weights:
            if not 0 < weight < math.inf:
                raise ValueError(f"--dataset_weights must be above 0, not {weight}")
        if self.group_by_length:
            raise ValueError("--dataset_weights and --group_by_length exclude each other")

    def _check_streaming(self) -> None:
        if self.max_steps == -1:
            raise ValueError("--streaming needs --max_steps: the length of a stream is unknown")
        if not self.max_length.isdigit():
            raise ValueError(f"--streaming needs a number for --max_length, not {self.max_length}")
        if len(self.dataset) > 1 or self.held_out is not None:
            raise ValueError("--streaming takes one --dataset, and no validation rows held out of it")
        if self.data_report:
            raise ValueError("--data_report reads all rows, --streaming does not")

    def _check_shard(self) -> None:
        if not self.load_in_4bit or self.use_dora or self.init_lora_weights in ("loftq", "qera"):
            raise ValueError(
                "--shard takes a 4-bit base, and neither --use_dora nor --init_lora_weights loftq or qera: "
                "these read weights of which a GPU has only a part"
            )
        if self.cuda_graphs:
            raise ValueError("--cuda_graphs and --shard exclude each other: weights move at every step")

    def check_device(self, device_type: str) -> None:
        """Raise InputError if a flag needs a CUDA GPU or several processes, and they are not there, or if
        these were started with different flags."""
        flags = {name: value for name, value in vars(self).items() if name not in MAY_DIFFER_BETWEEN_RANKS}
        if differing := ranks.disagreement(flags):
            number, names = differing
            raise InputError(
                f"process {number} was started with another --{' and --'.join(names)} than process 0: "
                "start the same command on all hosts"
            )
        if self.shard and ranks.count() == 1:
            raise InputError("--shard needs several processes: torchrun --nproc-per-node 2 train.py ...")
        if device_type == "cuda":
            return
        for field in fields(self):
            value = getattr(self, field.name)
            if field.metadata["needs_cuda"] and field.metadata["needs_cuda"](value):
                shown = "" if value is True else f" {value}"
                raise InputError(f"--{field.name}{shown} needs a CUDA GPU, and there is none here")

    @property
    def held_out(self) -> float | None:
        """--validation_split as an amount (below 1 a share, else rows); None if it names a split."""
        return _amount(self.validation_split or "")

    @property
    def shape_flags(self) -> list[str]:
        """Names of the flags that shapes in a checkpoint depend on."""
        return flag_names(type(self), "sets_shapes")

    @property
    def repository(self) -> str:
        """The hub repository that the adapter goes to, if it is uploaded."""
        return self.hub_model_id or Path(self.output_dir).resolve().name

    def formatting(self) -> Formatting:
        """How --dataset's rows become text."""
        return Formatting(
            self.dataset_format, self.dataset_text_field, self.completion_only_loss, self.train_on,
            self.split_special_tokens,
        )  # fmt: skip

    def train_sources(self) -> list[RowSource]:
        """The sources that --dataset names."""
        return [
            RowSource(dataset, self.split, self.dataset_config, self.streaming) for dataset in self.dataset
        ]

    def validation_sources(self) -> list[RowSource]:
        """The sources of validation rows; none if there are none or if they are held out of --dataset."""
        if self.validation_dataset:
            return [RowSource(self.validation_dataset, self.validation_split or "train")]
        if self.validation_split and self.held_out is None:
            return [
                RowSource(dataset, self.validation_split, self.dataset_config) for dataset in self.dataset
            ]
        return []

    def kept_settings(self) -> dict:
        """The settings that later commands must share with this training, or answers get worse."""
        return {
            field.metadata["kept_as"]: getattr(self, field.name)
            for field in fields(self)
            if field.metadata["kept_as"]
        }


# What stands where on a host; a run compares the content.
MAY_DIFFER_BETWEEN_RANKS = {
    "model", "adapter", "dataset", "validation_dataset", "chat_template", "sample_prompts", "output_dir",
}  # fmt: skip
# Names of settings and flags by what their metadata says, for modules that only have a run's saved flags.
KEPT_SETTINGS = [field.metadata["kept_as"] for field in fields(TrainConfig) if field.metadata["kept_as"]]
PLACE_FLAGS = flag_names(TrainConfig, "is_place")
CARD_FLAGS = flag_names(TrainConfig, "on_card")


@dataclass
class AdapterFlags(Flags):
    """Flags of the commands that put a trained adapter on its base."""

    model: str = flag(
        ..., "Base model: a Hugging Face hub id or a local folder, the one the adapter was trained on.",
    )
    adapter: str | None = flag(
        None,
        "LoRA adapter (folder or hub id). Without it: the base alone, or a merged model, whose folder has "
        "the training's settings too.",
    )
    dtype: ComputeType = flag(
        "float16", "Compute type. For this and the next three, the adapter's training sets the default.",
    )
    load_in_4bit: bool = flag(True, "Quantize the base to 4 bits.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = flag("nf4", "4-bit data type.", needs="--load_in_4bit")
    bnb_4bit_use_double_quant: bool = flag(True, "Quantize the block constants too.", needs="--load_in_4bit")
    trust_remote_code: bool = flag(
        False, "Let the model repository run its own Python code. Off for safety.",
        for_quantization=True,
    )
    chat_template: str | None = flag(
        None, "File with a chat template (Jinja) that replaces the one saved with the adapter or the base.",
    )
    allow_other_base: bool = flag(
        False, "Run even if the adapter seems to have been trained on another base than --model.",
    )


@dataclass
class GenerateConfig(AdapterFlags):
    # Prompts
    prompt: str | None = flag(
        None, "Answer this prompt. Without --prompt and --prompts_file: an interactive chat.",
        may_be_empty=True,
    )
    prompts_file: str | None = flag(
        None,
        "Answer every row of this file (txt: one prompt per line; json, jsonl, csv, parquet: a 'prompt' "
        "column or the columns of the training format).",
    )
    output_file: str | None = flag(
        None,
        "Where the answers to --prompts_file go; an existing file is replaced. Default: next to it, as "
        "NAME.answers.jsonl.",
        needs="--prompts_file",
    )
    batch_size: int = flag(
        8, "Prompts of --prompts_file answered at once (left-padded).",
        limit=AT_LEAST_1, needs="--prompts_file",
    )
    dataset_format: RowFormat = flag(
        "auto", "How a prompt is formatted. auto: as in the training, or as plain text if that is unknown.",
    )
    dataset_text_field: str = flag(
        "text", "Column of the text in the rows of --prompts_file. Default: as in the training, if known.",
    )
    split_special_tokens: bool | None = flag(
        None, "Tokenize a special token that a prompt spells as plain text. Default: as in the training.",
    )

    # Sampling, with Hugging Face's names
    max_new_tokens: int = flag(
        256, "Longest answer in tokens. It ends earlier at the end-of-sequence token.",
        limit=AT_LEAST_1,
    )
    do_sample: bool = flag(
        False,
        "Sample instead of taking the most likely token each time. Only these flags count, not the sampling "
        "settings that come with the model.",
    )
    temperature: float = flag(
        1.0,
        "Below 1 sharpens, above 1 flattens the distribution. Needs --do_sample. QLoRA evaluated Guanaco at "
        "0.7.",
        limit=POSITIVE, needs="--do_sample",
    )
    top_p: float = flag(
        1.0,
        "Sample from the smallest set of tokens with this total probability. Needs --do_sample. QLoRA "
        "evaluated Guanaco at 0.9.",
        limit=Limit(lambda value: 0 < value <= 1, "in (0, 1]"), needs="--do_sample",
    )
    top_k: int = flag(
        50, "Sample from the k most likely tokens; 0 for all. Needs --do_sample.",
        limit=NON_NEGATIVE, needs="--do_sample",
    )
    repetition_penalty: float = flag(
        1.0, "Above 1 discourages tokens that the text already has (arXiv 1909.05858).",
        limit=POSITIVE,
    )
    seed: int = flag(42, "Seed of the sampling.", limit=SEED, needs="--do_sample")

    def __post_init__(self):
        super().__post_init__()
        if self.prompt is not None and self.prompts_file:
            raise ValueError("--prompt and --prompts_file exclude each other")

    def formatting(self) -> Formatting:
        """How a prompt becomes text."""
        row_format = "text" if self.dataset_format == "auto" else self.dataset_format
        return Formatting(
            row_format, self.dataset_text_field, split_special_tokens=self.split_special_tokens
        )


@dataclass
class EvaluateConfig(AdapterFlags):
    model: str | None = flag(None, "Base model: the one the adapter was trained on, or any other.")
    base: Literal["dequantized", "original"] = flag(
        "dequantized",
        "original: a third column, the adapter on the base before quantization, where vLLM and PEFT put it "
        "by default. dequantized: only the 4-bit base, on which it was trained.",
        needs="--adapter",
    )

    # Loss
    dataset: str | None = flag(
        None, "Rows to compute the loss on: a hub id, a file (json, jsonl, csv, parquet, txt) or a folder.",
    )
    dataset_config: str | None = flag(
        None, "Configuration name, for a hub dataset that has several.",
        needs="--dataset",
    )
    split: str = flag("train", "Split of --dataset.", needs="--dataset")
    validation_split: str | None = flag(
        None,
        "Of --dataset, only the rows that the adapter's training held out. Their hashes are saved with the "
        "adapter, so no value is needed; one that is given must be the training's. Without --adapter: the "
        "rows that train.py would hold out, a share (0.05, 5%%) or a number of rows.",
        needs="--dataset", bare_value=AS_TRAINED,
    )
    validation_seed: int = flag(
        42, "Without --adapter: the --seed with which train.py would hold them out.",
        limit=SEED, needs="--validation_split", excludes="--adapter, whose held-out rows are known",
    )
    dataset_format: RowFormat = flag(
        "auto", "Row format. For this and the next five, the adapter's training sets the default.",
    )
    dataset_text_field: str = flag("text", "Column that holds the text, for rows of text.")
    completion_only_loss: bool = flag(True, "Compute the loss on answers only.")
    train_on: Literal["all", "last"] = flag(
        "all", "Of a row of messages, compute the loss on every turn of the assistant or only on the last.",
    )
    split_special_tokens: bool | None = flag(
        None, "Tokenize a special token that a row spells as plain text. Default: except in text columns.",
    )
    max_length: str = flag("max", "Longest row in tokens: a number, a percentile (p90), or max.")
    per_device_eval_batch_size: int = flag(8, "Rows in one forward pass.", limit=AT_LEAST_1)
    general_dataset: str | None = flag(
        None,
        "Measures forgetting: unrelated text, as a hub id, file or folder with a text column. A higher loss "
        "on it with the adapter means that the adapter made the model forget.",
    )
    general_dataset_config: str | None = flag(
        None, "Configuration name, for a hub dataset that has several.",
        needs="--general_dataset",
    )
    general_split: str = flag("train", "Split of --general_dataset.", needs="--general_dataset")
    general_text_field: str = flag("text", "Its text column.", needs="--general_dataset")

    # Answers
    prompts_file: str | None = flag(
        None,
        "Answer every row of this file (or hub id), which also holds reference answers, and score the "
        "answers.",
    )
    prompts_split: str = flag(
        "train", "Split of --prompts_file. Slices such as train[:100] work for files too.",
        needs="--prompts_file",
    )
    code: bool = flag(
        False,
        "The answers are Python: also compute CodeBLEU (arXiv 2009.10297) with its four parts, and the share "
        "that parses.",
        needs="--prompts_file",
    )
    json: bool = flag(
        False,
        "Also score answers as JSON: the share that parses, and the share equal to the reference regardless "
        "of key order and spacing.",
        needs="--prompts_file",
    )
    samples: int = flag(
        0, "Print the answers of every column to the first N rows of --prompts_file, side by side.",
        limit=NON_NEGATIVE, needs="--prompts_file",
    )
    max_new_tokens: int = flag(256, "Longest answer in tokens.", limit=AT_LEAST_1, needs="--prompts_file")
    batch_size: int = flag(8, "Prompts answered at once.", limit=AT_LEAST_1, needs="--prompts_file")

    quantization: str | None = flag(
        None,
        "Instead of all this: the error that 4-bit quantization makes in each layer of this model (hub id or "
        "folder).",
        for_quantization=True,
    )
    output_file: str | None = flag(
        None,
        "Where the results go as JSON; an existing file is replaced. Default: evaluation.json in the "
        "adapter's folder or here, or quantization.json here.",
        for_quantization=True,
    )

    def __post_init__(self):
        super().__post_init__()
        _check_max_length(self.max_length)
        for name in ("split", "general_split", "prompts_split"):
            _check_split(name, getattr(self, name))
        if self.validation_split == AS_TRAINED:
            if not self.adapter:
                raise ValueError(
                    "--validation_split without --adapter needs a value: a share or a number of rows"
                )
        elif self.validation_split and not (self.held_out or 0) > 0:
            raise ValueError(
                f"--validation_split must be a share or a number of rows, not {self.validation_split}"
            )
        if self.base == "original" and not self.load_in_4bit:
            raise ValueError(
                "--base original: the base is not quantized (--no_load_in_4bit, as in the adapter's training "
                "unless given), so the adapter is measured on the original weights anyway: leave --base out"
            )
        has_work = self.dataset or self.general_dataset or self.prompts_file
        if not self.quantization and not (self.model and has_work):
            raise ValueError(
                "nothing to do: give --model with --dataset, --general_dataset or --prompts_file, or give "
                "--quantization"
            )

    def check_given(self, given: set[str]) -> None:
        if self.quantization:
            for name in sorted(given - set(flag_names(type(self), "for_quantization"))):
                raise ValueError(f"--{name} cannot be used with --quantization")
        super().check_given(given)

    formatting = TrainConfig.formatting  # the flags have the same names

    @property
    def held_out(self) -> float | None:
        """--validation_split as an amount (below 1 a share, else rows); None if it has no value."""
        return _amount(self.validation_split or "")


@dataclass
class MergeConfig(AdapterFlags):
    adapter: str | None = flag(None, "LoRA adapter (folder or hub id). Required.")

    output_dir: str = flag("merged", "Folder for the merged model; it must be new or empty.")
    base: Literal["dequantized", "original"] = flag(
        "dequantized",
        "What the adapter is added to: the 4-bit weights dequantized to 16 bits, on which it was trained, or "
        "the weights from before quantization, whose answers differ (docs/after-training.md).",
    )
    max_kl: float = flag(
        0.01,
        "Refuse a merged model that differs by more than this from the adapter on its base: mean KL "
        "divergence, in nats per token, over the rows compared.",
        limit=NON_NEGATIVE,
    )
    dataset: str | None = flag(
        None,
        "Rows to compare on: a hub id, file or folder; the first 2,048 tokens are used. Default: a short "
        "text of our own.",
    )
    split: str = flag("train", "Split of --dataset.", needs="--dataset")
    dataset_format: RowFormat = flag(
        "auto", "Row format of --dataset. Default: as in the training, if known.",
    )
    dataset_text_field: str = flag("text", "Column that holds the text, for rows of text.")
    push_to_hub: bool = flag(False, "Upload the merged model with its model card to the Hugging Face hub.")
    hub_model_id: str | None = flag(
        None, "Repository for --push_to_hub: name or owner/name. Default: the name of the output folder.",
        needs="--push_to_hub",
    )
    hub_private_repo: bool = flag(
        False,
        "Create that repository as a private one, and refuse it if it exists and is public. Without this "
        "flag, a new one is as its owner's settings on the hub say.",
        needs="--push_to_hub",
    )

    def __post_init__(self):
        super().__post_init__()
        _check_output_dir(self.output_dir, self.model)
        _check_split("split", self.split)
        if not self.adapter:
            raise ValueError("--adapter is missing: what is to be merged into --model?")


    def formatting(self) -> Formatting:
        """How the rows of --dataset become text."""
        return Formatting(self.dataset_format, self.dataset_text_field, completion_only_loss=False)


@dataclass
class ExportConfig(Flags):
    model: str = flag(
        ..., "Model to export: the folder of a merged model, or any unquantized one (folder or hub id).",
    )
    gguf: Literal["f16", "q8_0", "f32"] = flag(
        ..., "Weights in the GGUF file: 16 bits, 8.5 bits (blocks of 32 with a common scale), or 32 bits.",
    )
    output_file: str | None = flag(
        None,
        "The GGUF file; it must not exist. Default: NAME-GGUF.gguf in the model's folder, or in the current "
        "one for a hub id. The Modelfile for Ollama goes next to it.",
    )
    dataset_format: RowFormat = flag(
        "auto",
        "How the Modelfile writes a prompt. auto: as in the training; if that is unknown, with the chat "
        "template, or as plain text without one.",
    )
    chat_template: str | None = flag(
        None, "File with a chat template (Jinja) that replaces the one saved with the model.",
    )
    max_kl: float = flag(
        0.01,
        "Refuse a file with which llama.cpp differs by more than this from the model: mean KL divergence, in "
        "nats per token, on a short text. Measured if llama-cpp-python is installed.",
        limit=NON_NEGATIVE,
    )
    dtype: ComputeType = flag(
        "float32",
        "Compute type of the model it is compared with. The 16-bit types need half the memory, but their own "
        "rounding is measured too.",
    )


# fmt: on


def _amount(text: str) -> float | None:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _check_output_dir(output_dir: str, model: str) -> None:
    """Raise ValueError if a command would write into the base model's own folder.

    An adapter there would be loaded as part of the base from then on, and uploaded together with it. The same
    goes for a folder with a hub id's name, which would be loaded in the place of that hub model.
    """
    if Path(output_dir).resolve() == Path(model).resolve():
        raise ValueError(f"--output_dir {output_dir} is the folder of --model itself: choose another one")


def _check_max_length(value: str) -> None:
    percent = re.fullmatch(r"p(\d+(?:\.\d+)?)", value)
    is_number = re.fullmatch(r"[0-9]+", value) and int(value) >= 1
    if not (is_number or value == "max" or (percent and 0 < float(percent[1]) <= 100)):
        raise ValueError(
            f"--max_length must be a number of at least 1, pNN (a percentile) or max, not {value}"
        )


def _check_split(name: str, split: str) -> None:
    try:
        parse_split(split)
    except InputError as error:
        raise ValueError(f"--{name}: {error}") from error
