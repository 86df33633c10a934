# `make help` lists what there is. Every target makes the environment first, when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PYTHONUNBUFFERED := 1

# What the study does: study.yml has the scales and rows. On real data: ROOTS="CUHK-PEDES=/data/CUHK-PEDES ..."
SCALE ?= quick
GPUS ?= 1
# Values go to the commands through the environment, as they were given: neither make nor the shell reads them.
$(foreach name,PYTHON BIN SCALE ROWS SEEDS DATASETS ROOTS WEIGHTS GPUS ROOT GALLERY,\
	$(eval override export $(name) := $$(value $(name))))
RUN := exec "$$BIN/python" -m
ASKED := "scale=$$SCALE" "chosen=$$ROWS" "seeds=$$SEEDS" "datasets=$$DATASETS" "folders=$$ROOTS" "weights=$$WEIGHTS"

.DEFAULT_GOAL := help
.PHONY: help study plan report notebooks test lab search check weights clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	@"$$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fmfa needs Python 3.11 or newer, found " + sys.version.split()[0] + "; set PYTHON=...")'
	@test -x "$$BIN/python" || "$$PYTHON" -m venv $(VENV)
	@echo "Installing the packages into $(VENV) (some 2 to 5 minutes the first time) ..."
	"$$BIN/python" -m pip install --disable-pip-version-check --progress-bar on \
		--constraint constraints.txt --editable .[test]
	@touch $@

study: $(READY)  ## the main job on the embedded data, into runs/ (SCALE=quick, or another of study.yml; ROWS="fmfa alpha")
	@$(RUN) fmfa.workflow study $(ASKED) --gpus "$$GPUS"

report: $(READY)  ## the comparison, pictures and report of what is finished (make study ends with it)
	@$(RUN) fmfa.workflow report $(ASKED) --gpus "$$GPUS"

plan: $(READY)  ## what make study would run, and for how long
	@$(RUN) fmfa.workflow plan $(ASKED)

test: $(READY)  ## every test, the linter and the notebooks
	@"$$BIN/python" -m ruff check
	@"$$BIN/python" -m ruff format --check
	@OMP_NUM_THREADS=1 $(RUN) pytest -n 2 --dist loadgroup

notebooks: $(READY)  ## execute the notebooks at their defaults and write them back with their outputs
	@for each in notebooks/*.ipynb; do "$$BIN/python" -m fmfa.notebook "$$each" --in-place || exit; done

lab: $(READY)  ## JupyterLab in the same environment
	@$(RUN) jupyterlab --notebook-dir notebooks

search: $(READY)  ## search a gallery in the browser: make search GALLERY=runs/gallery (without: SimPEDES' test pictures)
	@$(RUN) fmfa.page -- "$$GALLERY"

check: $(READY)  ## check a copy of a data set: make check ROOT=/data/CUHK-PEDES
	@test -n "$$ROOT" || { echo "Which data set? make check ROOT=/data/CUHK-PEDES" >&2; exit 2; }
	@$(RUN) fmfa.data.check -- "$$ROOT"

weights: $(READY)  ## make the shipped weights again (about an hour on two cores)
	@$(RUN) fmfa.pretrain data/tiny_clip.safetensors
	@$(RUN) fmfa.pretrain data/tiny_ivt.safetensors --method ivt
	@$(RUN) fmfa.pretrain data/tiny_ivt_equal.safetensors --method ivt --pairs 96548

clean:  ## remove the environment and what was made; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
