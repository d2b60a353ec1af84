# mnist-vae: `make run` makes the pictures. Every target sets up what it needs.

PYTHON ?= python3
VENV := .venv
TORCH := torch==2.13.0 torchvision==0.28.0
READY := $(VENV)/ready

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true

.DEFAULT_GOAL := help
.PHONY: help setup run test test-fast test-faults test-shared test-distributed test-sweep test-processors lint audit ui
.PHONY: sync share plots bench bench-quick verify table papers clean lock

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(READY) ## make .venv with the pinned packages (done by the other targets when needed)

$(READY): requirements.lock pyproject.toml tools/plots_page.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.x")'
	@echo "Installing the pinned packages into $(VENV) (a few minutes, once) ..."
	@$(PYTHON) -m venv $(VENV)
	@python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@python -m tools.plots_page
	@touch $@

run: $(READY) ## run the pipeline: data, training, evaluation, pictures
	@dvc repro || { python -m tools.remedies; exit 1; }
	@echo "Pictures: plots/grid.png, plots/samples.png. Next: make plots, make ui."

test: $(READY) ## run all tests but those of the next targets
	@python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not faults and not shared and not distributed and not processors"

test-fast: $(READY) ## run the tests that take seconds
	@python -m pytest -m "not slow and not faults and not shared and not distributed and not processors"

test-faults: $(READY) ## inject every fault of docs/reliability.md (FAULTS=12 takes a sample of 12)
	@FAULTS=$(FAULTS) python -m pytest tests/faults --numprocesses 2

test-shared: $(READY) ## test what is shared, with PostgreSQL, a tracking server and S3 on this machine
	@python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m shared

test-sweep: $(READY) ## sweep over three workers and a server, one worker killed, and the driver too (SWEEP_EXPERIMENTS=24)
	@SWEEP_EXPERIMENTS=$(or $(SWEEP_EXPERIMENTS),24) python -m pytest tests/test_sweep_cluster.py --timeout 3600

test-distributed: $(READY) ## train in several processes, also on two hosts (network namespaces, as root)
	@python -m pytest tests/distributed

test-processors: $(READY) ## compare every output with those made under processors that QEMU emulates
	@python -m pytest -m processors

lint: $(READY) ## check style, format and types
	@ruff check
	@ruff format --check
	@mypy

audit: $(READY) ## look the pinned packages up among known vulnerabilities (needs the network)
	@pip-audit --requirement requirements.lock --no-deps --disable-pip

ui: $(READY) ## open the runs of this project in MLflow: http://127.0.0.1:5000
	@python -m tools.ui

sync: $(READY) ## send MLflow what it has not received yet
	@python -m mnist_vae.tracking.sender .

share: $(READY) ## push every result that was ever made here to the default DVC remote
	@python -m tools.share

plots: $(READY) ## open the page of charts and pictures
	@dvc plots show
	@python -m webbrowser "file://$(CURDIR)/dvc_plots/index.html" >/dev/null || echo "Open that page in a browser."

bench: $(READY) ## measure speed for benchmarks/results.md (more than an hour; keep the machine idle)
	@python -m benchmarks

bench-quick: $(READY) ## one short round of the same, printed only
	@python -m benchmarks --quick

verify: $(READY) ## run the pipeline in a fresh clone and compare every artifact with dvc.lock
	@python -m tools.verify

table: $(READY) ## list the experiments as a narrow table (`dvc exp show` has all columns)
	@dvc exp show --no-pager --md --drop '.*' --keep 'Experiment|model.latent_dim|(nll|elbo|kld|active_units|knn_accuracy)$$'

papers: $(READY) ## run published settings and write docs/papers.md (hours; ROWS="svae-d2 …" takes some)
	@python -m tools.papers $(ROWS)

clean: ## remove the environment and all that can be made again (not the DVC cache, not mlflow.db, not the journal)
	@rm -rf $(VENV) .dvc/page.html .pytest_cache .ruff_cache .mypy_cache .hypothesis dvc_plots
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

lock: ## resolve pyproject.toml's ranges anew into requirements.lock
	@rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python -m pip install --quiet $(TORCH) '.[dev,ssh,s3,server,sweep]'
	@{ echo "# Made by \`make lock\` from pyproject.toml; for \`pip install -r\`. Without hashes: torch is one file on one"; \
	   echo "# package index and another on the next (with and without CUDA), and pip wants hashes for all or for none."; \
	   .venv-lock/bin/python -m pip freeze --exclude mnist-vae | sed 's/+cpu$$//'; } > requirements.lock
	@rm -rf .venv-lock build
