# Each target sets itself up: a virtual environment in .venv with the pinned requirements.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM ?= false

DEMO_MODEL ?= outputs/SmolLM2-135M-Instruct
MODEL ?= meta-llama/Llama-2-7b-hf
MODEL_4BIT ?= unsloth/llama-2-7b-bnb-4bit
DATA ?= sahil2801/CodeAlpaca-20k

.PHONY: demo test lint test-gpu torture bench plan clean

demo: .venv/installed-demo $(filter outputs/%,$(DEMO_MODEL))  ## teach SmolLM2-135M to write orders as JSON: no GPU
	$(BIN)/python demo/make_rows.py outputs/demo-rows
	$(BIN)/python train.py --model $(DEMO_MODEL) --dataset outputs/demo-rows/train.jsonl \
		--validation_dataset outputs/demo-rows/held_out.jsonl --dtype bfloat16 \
		--lora_target_modules q_proj k_proj v_proj o_proj --lora_dropout 0 --learning_rate 3e-3 --max_length 320 \
		--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --num_train_epochs 2 \
		--gradient_checkpointing none --eval_steps 20 --output_dir outputs/demo --overwrite_output_dir
	$(BIN)/python -m qlora.evaluate --model $(DEMO_MODEL) --adapter outputs/demo \
		--dataset outputs/demo-rows/held_out.jsonl --general_dataset demo/general.txt \
		--prompts_file outputs/demo-rows/held_out.jsonl --json --samples 3 --max_new_tokens 48 --batch_size 30
	@sed 's|DEMO_MODEL|$(DEMO_MODEL)|' demo/next-steps.txt

# Made once. `make demo DEMO_MODEL=HuggingFaceTB/SmolLM2-135M-Instruct` takes the hub's own instead.
outputs/SmolLM2-135M-Instruct: | .venv/installed-demo
	$(BIN)/python demo/make_base.py $@

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

.venv/installed-demo: .venv/installed requirements-demo.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-demo.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf .venv outputs
