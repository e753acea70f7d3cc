# Two commands matter: `make train` (the whole demo, from nothing to scores) and `make test`.
# Everything made here stays in the checkout: .venv/ for the environment, runs/ for data and results.

PYTHON ?= python3
VENV = .venv
DEVICE ?= cpu
TORCH_INDEX ?=
SMOKE ?=
# Two ranks, or with CUDA one a GPU and at most two; known once the environment is there.
GPUS = $(shell $(VENV)/bin/python -c 'import torch; print(min(2, max(1, torch.cuda.device_count())))' 2>/dev/null)
NPROC ?= $(if $(filter cuda,$(DEVICE)),$(or $(GPUS),1),2)
# More than cores: fault tests mostly wait for time-outs.
TEST_WORKERS ?= 3
OUT ?= $(if $(SMOKE),runs/smoke,runs/demo)
DATA = runs/data/complete_journey
LOG = $(OUT)/log
DRY ?=
STEPS ?=
BUDGET ?=
LEAGUE ?=
DEVLOG ?=
GPU_OUT = $(if $(DRY),runs/gpu-dry,runs/gpu)
# What `make train` has left, for the step `demo`.
GPU_LOG = $(if $(DRY),,$(addprefix --log ,$(wildcard $(LOG))))

# fbgemm's binaries load on this torch release only; the requirement files hold the matching rest.
TORCH = torch==2.13.0
PIP = $(VENV)/bin/pip install --no-cache-dir --disable-pip-version-check --quiet
# Compiled when the package is installed.
KERNEL = $(wildcard trainer/model/ops/top_products.[ch])
CHECKED = launch pipelines trainer embeddings
FORMATTED = $(CHECKED) tests benchmarks docs/tools

# The smoke run goes through every step on a slice of the data.
INGEST_SMOKE = $(if $(SMOKE),--set users=200)
ONLINE_SMOKE = $(if $(SMOKE),--users 600 --every 6h --pace 0.5)
TRAIN_SMOKE = $(if $(SMOKE),train.max_steps=40)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install install-dev install-s3 install-spark train serve test lint format bench docs pins clean

help: ## this list
	@echo "Start with 'make train', then 'make test'. All targets of 'make TARGET [VARIABLE=value]':"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables:"
	@echo "  PYTHON=python3   the interpreter the environment is made with, 3.11 or newer"
	@echo "  DEVICE=cpu       requirement set: cpu or cuda"
	@echo "  TORCH_INDEX=URL  package index for torch, such as PyTorch's CPU-only one (a far smaller download)"
	@echo "  OUT=runs/demo    where 'make train' writes"
	@echo "  NPROC=2          ranks it trains on; with DEVICE=cuda one a GPU, at most 2"
	@echo "  SMOKE=1          'make train', 'make serve', 'make online' and 'make league' in small, in runs/smoke"
	@echo "  TEST_WORKERS=3   processes of 'make test'"
	@echo "  DRY=1            'make gpu-check' with tiny sizes, on a CPU too"
	@echo "  STEPS=right      only some steps of 'make gpu-check'; BUDGET=600 is the seconds that it may take"
	@echo "  LEAGUE=--seeds=17  options of 'make league', see 'tandemrec bench league --help'"

install: $(VENV)/.installed-$(DEVICE) ## the environment, in .venv/

install-dev: $(VENV)/.installed-dev ## the same, with the test and lint tools

install-s3: $(VENV)/.installed-s3 ## places under s3:// too, see docs/object_storage.md

install-spark: $(VENV)/.installed-spark ## PySpark too (430 MB), for ingest --engine spark and its tests

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tandemrec needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# torch first and with its dependencies, because a CUDA build has libraries of its own among them; then the
# pinned rest with --no-deps, because torchrec would pull the CUDA build of fbgemm (see common.txt).
# A second set into the same environment would leave files of both builds, and the torch of the first.
$(VENV)/.installed-$(DEVICE): requirements/common.txt requirements/$(DEVICE).txt pyproject.toml $(KERNEL) | $(VENV)/bin/python
	@for other in $(filter-out $(DEVICE),cpu cuda); do if [ -e $(VENV)/.installed-$$other ]; then \
	  echo "$(VENV) holds the set for DEVICE=$$other: make clean install DEVICE=$(DEVICE)" >&2; exit 2; fi; done
	@echo "== installing the environment into $(VENV) ($(DEVICE)); this takes some minutes"
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) --no-deps -r requirements/$(DEVICE).txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: requirements/dev.txt requirements/docs.txt requirements/kubernetes.txt requirements/s3.txt $(VENV)/.installed-$(DEVICE)
	$(PIP) --no-deps -r requirements/dev.txt
	@touch $@

$(VENV)/.installed-docs: requirements/docs.txt $(VENV)/.installed-$(DEVICE)
	$(PIP) --no-deps -r requirements/docs.txt
	@touch $@

$(VENV)/.installed-s3: requirements/s3.txt $(VENV)/.installed-$(DEVICE)
	$(PIP) --no-deps -r requirements/s3.txt
	@touch $@

$(VENV)/.installed-spark: requirements/spark.txt $(VENV)/.installed-$(DEVICE)
	$(PIP) --no-deps -r requirements/spark.txt
	@touch $@

train: install ## the demo: fetch, ingest, train on NPROC ranks, evaluate, export, score
	@echo "== 1/7 check the environment"
	@tandemrec doctor
	@echo "== 2/7 fetch the Complete Journey events into $(DATA)"
	@tandemrec fetch --out $(DATA)
	@echo "== 3/7 ingest them into a sequence log, $(LOG)"
	@tandemrec ingest --events $(DATA)/events.parquet --config configs/complete_journey.toml \
	  --out "$(LOG)" --overwrite $(INGEST_SMOKE)
	@echo "== 4/7 train DARE on $(NPROC) ranks into $(OUT)/run (a run that is there is resumed)"
	@torchx run -s local_cwd -cfg log_dir="$(OUT)"/torchx launch/components.py:train \
	  --config configs/dare.toml --out "$(OUT)"/run -j 1x$(NPROC) -- data.log="$(LOG)" $(TRAIN_SMOKE)
	@echo "== 5/7 evaluate on the test split"
	@tandemrec evaluate --run "$(OUT)"/run --split test
	@echo "== 6/7 export a serving snapshot, $(OUT)/snapshot"
	@tandemrec export --run "$(OUT)"/run --out "$(OUT)"/snapshot --dtype fp32 --attention-dtype fp32
	@echo "== 7/7 score up to 1000 test requests with the snapshot"
	@tandemrec score --snapshot "$(OUT)"/snapshot --requests "$(LOG)" --split test --limit 1000 \
	  --out "$(OUT)"/scores.parquet --against "$(OUT)"/run/scores-test.parquet
	@echo
	@echo "done. metrics: $(OUT)/run/summary.json   curve: $(OUT)/run/metrics.jsonl"
	@echo "      snapshot: $(OUT)/snapshot          scores: $(OUT)/scores.parquet"
	@echo "next: make serve$(if $(SMOKE), SMOKE=1)    # score over HTTP, with a page"
	@echo "      $(VENV)/bin/tensorboard --logdir $(OUT)/run"
	@echo "      $(VENV)/bin/tandemrec analyze $(OUT)/run --out $(OUT)/report    # what the tables learned, as a page"
	@echo "      $(VENV)/bin/tandemrec plan --config configs/dare.toml --set data.log=$(LOG) --world-size 8 --hbm 80GB"

serve: install ## after `make train`: score over HTTP, with a page at http://127.0.0.1:8000
	@tandemrec serve --snapshot "$(OUT)"/snapshot --histories "$(LOG)"

.PHONY: online
online: install ## a stream, a training and a server that follow it: how fresh served scores are
	@mkdir -p "$(OUT)"/online
	@python -m benchmarks online freshness --config configs/dare.toml --out "$(OUT)"/online $(ONLINE_SMOKE) \
	  --page "$(OUT)"/online/freshness.md --image "$(OUT)"/online/scores.svg
	@echo "done. page: $(OUT)/online/freshness.md   served scores over time: $(OUT)/online/scores.svg"

# Byte code is kept even where containers say not to, or each worker compiles all plugins and files again.
test: install-dev ## the tests
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: cluster-test
cluster-test: install-dev ## as root, with Debian's slurm-wlm and munge: jobs on a Slurm of two nodes, made of namespaces
	@python -m tests.cluster.slurm
	OMP_NUM_THREADS=1 python -m pytest tests/cluster

.PHONY: gpu-check
gpu-check: install-dev ## on a machine with a GPU (DEVICE=cuda): is all right there, and how fast; see docs/gpu.md
	@code=0; python -m benchmarks.gpu --out $(GPU_OUT) $(if $(DRY),--dry) $(if $(BUDGET),--budget $(BUDGET)) $(GPU_LOG) $(STEPS) || code=$$?; \
	[ $$code -eq 2 ] || python -m benchmarks.gpu report $(GPU_OUT); exit $$code

lint: install-dev ## ruff and mypy
	ruff check $(FORMATTED)
	ruff format --check $(FORMATTED)
	mypy $(CHECKED)

format: install-dev ## rewrite the code the way lint wants it
	ruff check --fix $(FORMATTED)
	ruff format $(FORMATTED)

bench: install ## after `make train`: all benchmarks on this machine, into benchmarks/*.md (half an hour)
	python -m benchmarks.harness.refresh --log "$(LOG)"

.PHONY: league
league: install ## every preset on every log, five seeds each, beside lines to beat (hours), into benchmarks/league.md
	@python -m benchmarks league --jobs 2 --out $(if $(SMOKE),runs/smoke/league --smoke,runs/league) \
	  --page $(if $(SMOKE),runs/smoke/league/league.md,benchmarks/league.md) $(if $(DEVLOG),--raw devlog="$(DEVLOG)") $(LEAGUE)

docs: $(VENV)/.installed-docs ## docs/config.md from the code, then the site of docs/ and the API, in runs/site
	python -m docs.tools.config_page
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict
	@echo "open runs/site/index.html, or with a search field: python -m http.server -d runs/site"

pins: ## whether all pinned releases are there for Linux and Python 3.11 and 3.12 (needs uv)
	bash requirements/check.sh

clean: ## remove the environment and all caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
