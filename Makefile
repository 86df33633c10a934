# `make help` lists what there is. Every target makes the environment first, when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help study plan report test lab check weights clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fmfa needs Python 3.11 or newer, found " + sys.version.split()[0] + "; set PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the packages into $(VENV) (some 2 to 5 minutes the first time) ..."
	$(BIN)/pip install --disable-pip-version-check --progress-bar on \
		--constraint constraints.txt --editable .[test]
	@touch $@

# What the study does: study.yml has the scales and rows. On real data: ROOTS="CUHK-PEDES=/data/CUHK-PEDES ..."
SCALE ?= quick
ROWS ?=
SEEDS ?=
DATASETS ?=
ROOTS ?=
WEIGHTS ?=
GPUS ?= 1
ASKED = scale=$(SCALE) $(if $(ROWS),"chosen=$(ROWS)") $(if $(SEEDS),seeds=$(SEEDS)) $(if $(WEIGHTS),"weights=$(WEIGHTS)") \
	$(if $(DATASETS),"datasets=$(DATASETS)") $(foreach root,$(ROOTS),"root_$(root)")
SNAKEMAKE = PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores all --resources gpu=$(GPUS) --rerun-triggers mtime \
	--rerun-incomplete --keep-going
REPORT = { $(SNAKEMAKE) --quiet all --config $(ASKED) only_finished=true --forcerun report -- all || \
	{ PATH="$(CURDIR)/$(BIN):$$PATH" python -m fmfa.report runs/$(SCALE) && false; }; } && \
	echo "The report: $(CURDIR)/runs/$(SCALE)/report.html"

study: $(READY)  ## the main job on the embedded data, into runs/ (SCALE=quick, or another of study.yml; ROWS="fmfa alpha")
	@$(SNAKEMAKE) --unlock --quiet all --config $(ASKED) 2>/dev/null || true
	@failed=0; $(SNAKEMAKE) --quiet rules host --config $(ASKED) -- evaluations || failed=1; \
		$(REPORT) && exit $$failed

report: $(READY)  ## the comparison, pictures and report of what is finished (make study ends with it)
	@$(REPORT)

plan: $(READY)  ## what make study would run, and for how long
	@$(BIN)/python -m fmfa.plan $(ASKED)
	@$(SNAKEMAKE) --dry-run --quiet rules reason host --config $(ASKED) 2>&1 | sed -n '/^job /,/^total/p; /^total/q'

test: $(READY)  ## every test, the linter and the notebooks
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup

lab: $(READY)  ## JupyterLab in the same environment
	@$(BIN)/jupyter lab --notebook-dir notebooks

check: $(READY)  ## check a copy of a data set: make check ROOT=/data/CUHK-PEDES
	@$(BIN)/python -m fmfa.check $(ROOT)

weights: $(READY)  ## make the shipped weights anew (about an hour on two cores)
	@$(BIN)/python -m fmfa.pretrain data/tiny_clip.safetensors
	@$(BIN)/python -m fmfa.pretrain data/tiny_ivt.safetensors --method ivt
	@$(BIN)/python -m fmfa.pretrain data/tiny_ivt_equal.safetensors --method ivt --pairs 96548

clean:  ## remove the environment and what was made; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
