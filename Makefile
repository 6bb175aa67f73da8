PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
GATES_VENV ?= .venv-gates
BENCH_VENV ?= .venv-bench
BENCH_EXTRAS ?= dev,bench
JOBS ?= 2
# A model whose every op the kernels take: heads and experts of whole lanes.
LANES := --model test --model.num_layers 3 --model.hidden_size 256 --model.num_heads 2 --model.num_kv_heads 1 --model.head_size 128 \
	--model.ffn_size 256 --model.expert_size 128 --model.shared_expert_size 128

.PHONY: help env env-gates env-bench demo test test-slow gates gates-all gate-decode gate-golden gate-bf16 gate-kernels lint bench clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

env: $(VENV)/.made  ## the environment: make env PYTHON=python3.12 VENV=.venv312 for another

$(VENV)/.made: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

env-gates: $(GATES_VENV)/.made  ## the compilers for TPUs and GPUs: libtpu, XLA's CUDA plugin, ptxas

$(GATES_VENV)/.made: pyproject.toml
	$(PYTHON) -m venv $(GATES_VENV)
	$(GATES_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[gates]'
	touch $@

env-bench: $(BENCH_VENV)/.made  ## the benchmarks' peers: torch, fla, mlx-lm; on a GPU with BENCH_EXTRAS=dev,bench,cuda

$(BENCH_VENV)/.made: pyproject.toml
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$(BENCH_EXTRAS)]'
	touch $@

demo: env  ## train a small hybrid on real text, draw the loss, generate from it
	$(BIN)/python -m ring_jax.train --output runs/python --overwrite --precision fp32 --tokenizer bytes --seq-len 512 --batch-size 8 --steps 500 --optimizer.schedule linear --optimizer.balance_rate 0.01
	$(BIN)/python -m ring_jax.infer --checkpoint runs/python --prompt 'def __init__(self, ' --max-tokens 400 --temperature 0.9
	@echo 'The loss curve: runs/python/loss.png'

test: env env-gates  ## the test suite
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

test-slow: env env-gates  ## all tests, with those that take minutes, every program compiled as users compile it
	RING_JAX_TEST_OPTIMISED=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m 'not gpu'

gates: env env-gates  ## the gates of every change: kernels through the compilers of four chips, train and inference compared bit by bit
	$(BIN)/python -m pallas_kernels.aot --jobs $(JOBS)
	@$(MAKE) --no-print-directory --output-sync=target --jobs $(JOBS) gate-kernels gate-bf16 gate-golden gate-decode  # the longest first

gate-decode:
	$(BIN)/python -m pallas_kernels.aot --jobs 1 --cases ring_jax.train.gates --kernel model.mini.decode --target h200

gate-golden:
	$(BIN)/python -m ring_jax.infer align --checkpoint tests/golden/trailing --tokens 512

gate-bf16:
	$(BIN)/python -m ring_jax.infer align --checkpoint tests/golden/periodic --tokens 512 --precision bf16 --remat mixers

gate-kernels:
	$(BIN)/python -m ring_jax.train --output runs/lanes --overwrite $(LANES) --precision fp32 --tokenizer bytes --seq-len 128 --batch-size 2 --steps 2
	$(BIN)/python -m ring_jax.infer align --checkpoint runs/lanes --tokens 512 --kernels pallas >runs/lanes/align.txt 2>&1; \
		status=$$?; cat runs/lanes/align.txt; exit $$status
	! grep ': xla' runs/lanes/align.txt  # where a kernel refused

gates-all: gates  ## the long gates: those, the models for all chips, and more of bf16, FP8 and interpreted kernels compared
	$(BIN)/python -m pallas_kernels.aot --jobs $(JOBS) --cases ring_jax.train.gates
	$(BIN)/python -m ring_jax.infer align --checkpoint tests/golden/periodic --tokens 512
	$(BIN)/python -m ring_jax.infer align --checkpoint tests/golden/trailing --tokens 512 --precision bf16
	$(BIN)/python -m ring_jax.infer align --checkpoint tests/golden/periodic --tokens 64 --precision fp8
	$(BIN)/python -m ring_jax.infer align --checkpoint runs/lanes --tokens 512 --kernels pallas --precision bf16
	$(BIN)/python -m ring_jax.infer align --checkpoint runs/lanes --tokens 512 --kernels pallas --precision fp8

lint: env  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: env-bench  ## training, prefill and decode on this machine, beside mlx-lm; then every op beside its peers, torch's and fla's too
	mkdir -p runs
	$(BENCH_VENV)/bin/python -m ring_jax.train.bench --json runs/bench.json
	$(BENCH_VENV)/bin/python -m pallas_kernels.bench --json runs/bench-ops.json

clean:  ## remove what was built
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
