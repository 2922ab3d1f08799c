# make demo      runs jobs/demo.yaml on this machine, from nothing
# make test      runs every check
# make chaos     runs pretraining through faults on three nodes in namespaces; needs root, and up to 45 minutes
# make s3        runs a real S3 server on this machine, for jobs that want object storage
# make stack     runs Ray, S3 and Prometheus on this machine, for jobs that are submitted
# make alerts    causes every fault that there is an alert for, and sees it fire and end, some minutes
# make install   only the environment; with LOCKED=1 a new one, in which every file has the sha256 that requirements.lock gives
# make lock      writes requirements.lock, from pyproject.toml and constraints.txt
# make wheel     writes dist/p2r-VERSION-py3-none-any.whl, which knows its commit and brings the jobs
# make licences  writes and checks infra/licences.csv; benchmarks' packages keep their rows where they are not installed
# make docs      builds the documentation into build/docs
# make sbom      writes build/p2r.cdx.json, a CycloneDX bill of materials

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed$(if $(filter 1,$(LOCKED)),-locked)

# Where bytecode is not kept, every process compiles torch and ray again: a quarter of a minute each, for nothing.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test docs chaos s3 stack alerts install lock wheel supported licences sbom
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/p2r run jobs/demo.yaml

test: $(VENV)/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n auto --maxprocesses 4

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# CHAOS="--faults 3" makes it shorter; CHAOS="--world elastic" lets the number of workers change.
CHAOS ?= --faults 10

chaos: $(VENV)/.installed-tests
	$(BIN)/python -m tests.chaos.chaos --output jobs/results/chaos $(CHAOS)

S3_FOLDER ?= ~/p2r-runs/s3
S3_PORT ?= 9000

s3: $(VENV)/.installed-tests
	$(BIN)/python infra/local/s3.py --folder $(S3_FOLDER) --port $(S3_PORT)

STACK_FOLDER ?= ~/p2r-runs/stack
STACK_SPEED ?= 1

stack: $(VENV)/.installed-tests
	$(BIN)/python -m infra.local.stack --folder $(STACK_FOLDER) --speed $(STACK_SPEED)

alerts: $(VENV)/.installed-tests
	$(BIN)/python -m tests.infra.alerts_fire

install: $(INSTALLED)

# Existing pins are kept where pyproject.toml and constraints.txt allow; of what they leave open (CUDA libraries), delete the lines to renew them.
lock: $(VENV)/.installed-tests
	$(BIN)/uv pip compile --no-config --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
		--custom-compile-command 'make lock' --extra cluster -c constraints.txt pyproject.toml -o requirements.lock

# What an earlier build left would be packed again, also modules that are gone.
wheel: $(INSTALLED)
	rm -rf build/lib build/bdist.*
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

licences: $(VENV)/.installed-tests
	$(BIN)/python infra/supply_chain.py licences

sbom: $(VENV)/.installed-tests
	$(BIN)/python infra/supply_chain.py sbom build/p2r.cdx.json

supported:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12) and "p2r needs Python 3.11 or 3.12, found " + sys.version.split()[0] + "; call make PYTHON=python3.12")'

# --no-compile: Python compiles what is imported, when it is first imported; compiling all of torch and ray takes minutes.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt | supported
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[cluster]'
	touch $@

# Nothing that was there before is trusted, and nothing is built by tools that are not in the file: setuptools comes first.
$(VENV)/.installed-locked: pyproject.toml setup.py requirements.lock | supported
	$(PYTHON) -m venv --clear $(VENV)
	awk '/^[^ ]/ {kept = /^setuptools==/} kept' requirements.lock > $(VENV)/build.lock
	$(BIN)/python -m pip install --no-compile --require-hashes -r $(VENV)/build.lock
	$(BIN)/python -m pip install --no-compile --require-hashes --no-build-isolation -r requirements.lock
	$(BIN)/python -m pip install --no-compile --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.installed-tests: $(INSTALLED) constraints-tests.txt
	$(BIN)/python -m pip install --no-compile -c constraints.txt -c constraints-tests.txt -e '.[tests]'
	touch $@

$(VENV)/.installed-docs: $(INSTALLED) constraints-tests.txt
	$(BIN)/python -m pip install --no-compile -c constraints.txt -c constraints-tests.txt -e '.[docs]'
	touch $@
