# make demo      runs jobs/demo.yaml on this machine, from nothing
# make test      runs every check
# make chaos     runs pretraining through faults on three nodes in namespaces; needs root, and up to 45 minutes
# make s3        runs a real S3 server on this machine, for jobs that want object storage
# make stack     runs Ray, S3 and Prometheus on this machine, for jobs that are submitted
# make alerts    causes every fault that there is an alert for, and sees it fire and end, some minutes
# make install   only the environment
# make licences  writes and checks infra/licences.csv; benchmarks' packages keep their rows where they are not installed
# make sbom      writes build/p2r.cdx.json, a CycloneDX bill of materials

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Where bytecode is not kept, every process compiles torch and ray again: a quarter of a minute each, for nothing.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test chaos s3 stack alerts install licences sbom
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/p2r run jobs/demo.yaml

test: $(VENV)/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n auto --maxprocesses 4

# CHAOS="--faults 3" makes it shorter; CHAOS="--world elastic" lets the number of workers change.
CHAOS ?= --faults 10

chaos: $(VENV)/.installed-tests
	$(BIN)/python -m tests.chaos.chaos --output jobs/results/chaos $(CHAOS)

S3_FOLDER ?= ~/p2r/s3
S3_PORT ?= 9000

s3: $(VENV)/.installed-tests
	$(BIN)/python infra/local/s3.py --folder $(S3_FOLDER) --port $(S3_PORT)

STACK_FOLDER ?= ~/p2r/stack
STACK_SPEED ?= 1

stack: $(VENV)/.installed-tests
	$(BIN)/python -m infra.local.stack --folder $(STACK_FOLDER) --speed $(STACK_SPEED)

alerts: $(VENV)/.installed-tests
	$(BIN)/python -m tests.infra.alerts_fire

install: $(VENV)/.installed

licences: $(VENV)/.installed-tests
	$(BIN)/python infra/supply_chain.py licences

sbom: $(VENV)/.installed-tests
	$(BIN)/python infra/supply_chain.py sbom build/p2r.cdx.json

# --no-compile: Python compiles what is imported, when it is first imported; compiling all of torch and ray takes minutes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12) and "p2r needs Python 3.11 or 3.12, found " + sys.version.split()[0] + "; call make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e .
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[tests]'
	touch $@
