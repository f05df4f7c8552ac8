# make sample | test | check | digits | bench | aot | gpu | tune; each sets up .venv first, once
PYTHON ?= python3
BIN := .venv/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup sample test check digits evaluate bench aot gpu gpu-tests gpu-bench tune wheel

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"fastdiff needs Python 3.11 or newer, {v} is $(PYTHON); try make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[dev]'
	@touch $@

sample: setup
	$(BIN)/fastdiff sample --out samples.png --force

# two processes of one thread each: most tests are too small for more
JOBS ?= 2
test: setup
	$(BIN)/python -m pytest -n $(JOBS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py
	PYTHONPATH=.:kernels $(BIN)/python -m tests.aot --pairwise

# every kernel built for four GPUs with no GPU, and held to tests/aot/table.csv: no spills, full-width memory access; check
# builds the cases that hold every pair of factor values, aot all; OP="philox q_sample" only those, WRITE=1 writes the table
aot: setup
	PYTHONPATH=.:kernels $(BIN)/python -m tests.aot $(foreach op,$(OP),--op $(op)) $(if $(WRITE),--write)

# the bundled model again: trains it, or goes on where a run stopped, then measures the criteria of its card;
# RECIPE=fastdiff/assets/digits/recipe-learned-variance.json RUN=runs/learned the same with a learned variance
RECIPE ?= fastdiff/assets/digits/recipe.json
RUN ?= runs/digits
digits: setup
	$(BIN)/fastdiff train --recipe $(RECIPE) --out $(RUN) $(if $(wildcard $(RUN)/state.safetensors),--resume)
	$(MAKE) evaluate MODEL=$(RUN)/model WEIGHTS='0 1.5 4'

MODEL ?= digits
WEIGHTS ?= 0 0.1 0.3 0.5 1 1.5 2 4
RESULTS ?= runs/results
evaluate: setup
	@mkdir -p runs
	$(BIN)/fastdiff evaluate $(MODEL) --weights $(WEIGHTS) --out $(RESULTS) --plot runs/tradeoff.png --force

# on two cores more than half an hour, most of it compiling peers and ADM-128; CASES="network-adm64-cpu-bfloat16" is a part
CASES ?= not toy
bench: setup
	$(BIN)/python -m pytest benchmarks -q --device cpu -k "$(CASES)" $(if $(RESUME),--resume)

# gpu and tune need no install: torch, triton, numpy, safetensors, pillow, tqdm, pytest and pytest-benchmark, and a GPU;
# where there is no git, COMMIT=... and STATE=clean or dirty say what is measured. A shard is a part of the cases' ids
# that ends within ten minutes; what has rows in OUT or benchmarks/results already is left out.
OUT ?= benchmarks/results
ON_GPU = PYTHONPATH=.:kernels $(PYTHON) -m
ORIGIN = $(if $(COMMIT),--commit $(COMMIT)) $(if $(STATE),--state $(STATE))
NETWORK_SHARDS = $(foreach images,n1 n8 n64,$(foreach w,w0 w1.5,$(foreach network,adm64 adm128hc64,\
	network-$(network)-cuda-float16-$(images)-$(w)))) ladder-adm64-cuda-float16-n1- ladder-adm64-cuda-float16-n8-
TRAINING_SHARDS = $(foreach network,adm64 digits,$(foreach dtype,float32 bfloat16,training-$(network)-cuda-$(dtype)))
PIPELINE_SHARDS = $(foreach case,ddim-adm64-cuda-float16 ddim-adm64-cuda-bfloat16 ddpm-adm64-cuda-float16,\
	$(foreach images,n1 n8 n64,pipeline-$(case)-$(images)-)) scheduler-ddim scheduler-ddpm
SHARDS ?= bench_sampler $(NETWORK_SHARDS) $(TRAINING_SHARDS) $(PIPELINE_SHARDS) guided_step- q_sample- philox- residual-adm64 residual-adm256 backward-adm64 backward-adm256 \
	$(foreach network,adm64 adm256,$(foreach batch,b16 b2 b128,$(foreach op,norm fused,$(op)-$(network)-$(batch)-)))
gpu: gpu-tests gpu-bench

CAPTURE = tests/kernels/test_capture.py
TESTS ?= tests/test_gpu.py tests/test_cuda_graph.py tests/test_training_kernels.py tests/test_integrations_schedulers.py $(CAPTURE) $(filter-out $(CAPTURE),$(sort $(wildcard tests/kernels/test_*.py)))
# 5: a file has no GPU test
gpu-tests:
	@status=0; for file in $(TESTS); do echo "$$file"; \
		$(ON_GPU) pytest -q -m gpu "$$file" || [ $$? -eq 5 ] || status=1; \
	done; exit $$status

gpu-bench:
	@status=0; for shard in $(SHARDS); do echo "$$shard"; \
		$(ON_GPU) pytest benchmarks -q --device cuda --results "$(OUT)" --resume -k "$$shard" $(ORIGIN) || status=1; \
	done; exit $$status

# make tune TUNE="--only adm64-b16- --budget 500"
tune:
	$(ON_GPU) benchmarks.tune $(ORIGIN) $(TUNE)

wheel: setup
	$(BIN)/python .ci/wheel.py
