# make demo       train the tiny model, stream unseen videos, score them (SEED=1 OUT=outputs/seed1 for another run)
# make test       every check; the notebooks are tests too
# make lab        JupyterLab on the notebooks
# make docs       pages, notebooks and API reference as a site in _docs/site (needs no network)
# make clean      remove caches, results and build products (keeps .venv; `make distclean` removes that as well)
# Each sets up .venv first if need be. Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SEED ?= 0
OUT ?= outputs/demo

.PHONY: demo test lab docs clean distclean

demo test: export HF_HUB_OFFLINE = 1
test: export OMP_NUM_THREADS = 1

demo: $(INSTALLED)
	ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node 2 \
	  -m dst_smolvlm.train output_dir=$(OUT) train.seed=$(SEED) train.per_device_train_batch_size=1
	$(BIN)/python -m dst_smolvlm.evaluate output_dir=$(OUT)
	$(BIN)/python -m dst_smolvlm.evaluate data=toy_stream context_strategy=summarize_with_dst context_strategy.max_seq_len=320 \
	  context_strategy.reserved_seq_len=64 'eval.strategies.drop_all={}' eval.controls=0 eval.checkpoint=$(OUT)/checkpoint output_dir=$(OUT)/long
	@echo "Open $(OUT)/report.html and $(OUT)/long/report.html; the figures are in scores.json beside them"

test: $(INSTALLED)
	$(BIN)/nbdev_test --n_workers 2
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "Open _docs/site/index.html"

lab: $(INSTALLED)
	$(BIN)/jupyter lab --notebook-dir=. nbs/index.ipynb

# torch comes first: left to another package's dependencies, pip may take a newer build and gigabytes of CUDA with it.
$(INSTALLED): constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: '$(PYTHON)' is missing, older than 3.11 or has no venv module; name another one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up .venv; the first time takes some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf outputs nbs/outputs _docs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
