# Two commands do all the set-up: `make demo` runs the main job, `make test` runs every check.
SHELL := /bin/bash
PYTHON ?= python3
BENCHMARK ?= phantom
SEED ?= 0
# of `make figures`: cores to spread the runs over (a run takes one), and what is run
CORES ?= 2
PRESET ?= laptop
SEEDS ?= 0,1,2,3
BENCHMARKS ?= phantom,openi_rendered
BIN := .venv/bin
# uv installs what pip would, in a fifth of the time. It does not read pip's own configuration: a mirror is named
# in UV_DEFAULT_INDEX, or pip does the work: make setup INSTALL='.venv/bin/pip install'
INSTALL ?= uv pip install --python $(BIN)/python
# two torch processes that spin for each other's cores are many times slower than two that wait
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false
export PATH := $(CURDIR)/$(BIN):$(PATH)
# set-up leaves compiling to the first import; where nothing may be kept (containers often say so) every process would compile torch again
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo smoke test lab site setup scorers flamingo figures
# shorter stages and a shorter SFT than the preset's, so that it ends within a quarter of an hour
SHORTER_phantom := --set sft_lr=0.003 --set sft_epochs=3
SHORTER_openi_rendered := --set sft_epochs=2 --set batch_size=4
DEMO ?= $(SHORTER_$(BENCHMARK)) --set stage1_steps=20 --set stage2_steps=25
demo: setup
	valor run --preset laptop --set benchmark=$(BENCHMARK) --set seed=$(SEED) $(DEMO)

smoke: setup
	valor run --preset smoke --set benchmark=$(BENCHMARK) --set seed=$(SEED)

test: setup
	ruff check nbs tests docs/site.py && ruff format --check nbs tests docs/site.py && lint-imports --no-logo
	python tests/check_notebooks.py
	cd nbs && VALOR_RUNS=$$(mktemp -d) nbdev_test --n_workers 2 --timing
	pytest -q -n 2 --dist loadfile --no-loadscope-reorder

figures: setup   # every table and figure; resumes, and runs again only what changed
	snakemake -j $(CORES) --keep-going --rerun-incomplete --config preset=$(PRESET) seeds=$(SEEDS) benchmarks=$(BENCHMARKS)

lab: setup   # with the repository as root, so that links to docs/ and pictures of figures/ work
	jupyter lab --config .jupyter/jupyter_lab_config.py --ServerApp.root_dir=$(CURDIR) nbs/index.ipynb

site: setup $(BIN)/.docs   # README, docs, an API reference and all notebooks as pages in _site/; a warning is an error
	python docs/site.py

$(BIN)/.docs: pyproject.toml constraints.txt $(BIN)/.installed
	$(INSTALL) -q -c constraints.txt -e '.[docs]'
	touch $@

setup: $(BIN)/.installed
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("valor needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt uv
	$(INSTALL) -q -c constraints.txt -e '.[dev,figures]'
	touch $@

# RaTEScore and GREEN need other versions of numpy and spaCy than we do, and RadEval others than they: environments of their own
scorers: .scorers/.installed .scorers/radeval/.installed
.scorers/.installed: scorers/requirements.txt scorers/constraints.txt
	test -x .scorers/bin/pip || $(PYTHON) -m venv .scorers
	.scorers/bin/pip install -q --disable-pip-version-check -c scorers/constraints.txt -r scorers/requirements.txt
	touch $@

.scorers/radeval/.installed: scorers/radeval.txt scorers/radeval-constraints.txt
	test -x .scorers/radeval/bin/pip || $(PYTHON) -m venv .scorers/radeval
	.scorers/radeval/bin/pip install -q --disable-pip-version-check -c scorers/radeval-constraints.txt -r scorers/radeval.txt
	touch $@

# Med-Flamingo needs the open-flamingo, torch and transformers of its time: an environment of its own
flamingo: .flamingo/.installed
.flamingo/.installed: scorers/flamingo.txt scorers/flamingo-constraints.txt
	test -x .flamingo/bin/pip || $(PYTHON) -m venv .flamingo
	.flamingo/bin/pip install -q --disable-pip-version-check -c scorers/flamingo-constraints.txt -r scorers/flamingo.txt
	touch $@
