# `make help` lists what there is. Every target makes the environment first, when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help study test lab check weights clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fmfa needs Python 3.11 or newer, found " + sys.version.split()[0] + "; set PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the packages into $(VENV) (some 2 to 5 minutes the first time) ..."
	$(BIN)/pip install --disable-pip-version-check --progress-bar on \
		--constraint constraints.txt --editable .[test]
	@touch $@

SCALE ?= quick
SNAKEMAKE = PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --config scale=$(SCALE)

study: $(READY)  ## the main job on the embedded data, into runs/ (SCALE=quick, or another of study.yml)
	@$(SNAKEMAKE) --unlock --quiet all 2>/dev/null || true
	@$(SNAKEMAKE) --cores all --rerun-incomplete --keep-incomplete --keep-going --rerun-triggers mtime --quiet rules
	@echo "The data: $(CURDIR)/runs/$(SCALE)/data.html"
	@echo "The comparison: $(CURDIR)/runs/$(SCALE)/comparison.html"

test: $(READY)  ## every test, the linter and the notebooks
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pytest -n 2 --dist loadgroup

lab: $(READY)  ## JupyterLab in the same environment
	@$(BIN)/jupyter lab --notebook-dir notebooks

check: $(READY)  ## check a copy of a data set: make check ROOT=/data/CUHK-PEDES
	@$(BIN)/python -m fmfa.check $(ROOT)

weights: $(READY)  ## make the shipped weights anew (about a quarter of an hour on two cores)
	@$(BIN)/python -m fmfa.pretrain data/tiny_clip.safetensors

clean:  ## remove the environment and what was made; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
