# Each target sets itself up: a virtual environment in .venv with the pinned requirements.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM ?= false

MODEL ?= meta-llama/Llama-2-7b-hf
MODEL_4BIT ?= unsloth/llama-2-7b-bnb-4bit
DATA ?= sahil2801/CodeAlpaca-20k

.PHONY: demo test lint test-gpu torture bench plan clean

demo: .venv/installed  ## train a small random Llama on demo/rows.jsonl, then ask it: no GPU, a network only to install
	$(BIN)/python demo/make_base.py demo/rows.jsonl outputs/demo-base
	$(BIN)/python train.py --model outputs/demo-base --dataset demo/rows.jsonl --validation_split 0.1 \
		--dtype float32 --lora_target_modules all-linear --lora_r 64 --lora_alpha 64 --learning_rate 5e-3 \
		--max_length 64 --per_device_train_batch_size 12 --gradient_accumulation_steps 1 \
		--gradient_checkpointing none --max_steps 120 --eval_steps 20 --output_dir outputs/demo --overwrite_output_dir
	$(BIN)/python generate.py --model outputs/demo-base --adapter outputs/demo --dtype float32 \
		--prompt "What is the capital of Italy?"

test: .venv/installed-dev  ## all tests that need no GPU
	$(BIN)/python -m pytest -n 2

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test-gpu: .venv/installed-dev  ## the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu tests

torture: .venv/installed  ## kill 100 trainings, stop 20, and compare the result with an uninterrupted run
	$(BIN)/python tests/torture.py

bench: .venv/installed  ## speed and memory beside Unsloth and TRL, as far as they are installed
	$(BIN)/python benchmarks/run.py --model $(MODEL_4BIT) --real $(DATA)

plan: .venv/installed  ## memory of a step of MODEL, as planned for GPUs of 24 and of 8 GB
	for gb in 24 8; do \
		$(BIN)/python train.py --model $(MODEL) --dataset $(DATA) --memory_limit_gb $$gb --plan_only || exit; \
	done

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf .venv outputs
