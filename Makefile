# make demo   a question answered on this machine, from nothing
# make test   the tests that everybody can run, in about 20 minutes on 2 cores
# The other targets are explained in the README.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.made

# Compiled bytecode starts daemons and engines far faster.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONSAFEPATH = 1

.PHONY: demo netdemo test test-http test-long test-vllm test-gpu bench bench-queue serve soak check setup constraints clean

demo: $(STAMP)
	$(BIN)/hive demo

netdemo: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m tests.netdemo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not long and not vllm" tests

# The same without trunks: queens ask their hives by plain HTTP.
test-http: $(STAMP)
	HIVE_TEST_TRUNKS=0 $(BIN)/python -m pytest -m "not long and not vllm" tests

test-long: $(STAMP)
	$(BIN)/python -m pytest -m "not vllm" tests

# Installs vLLM for CPUs into .vllm the first time: 3.4 GB.
test-vllm: $(STAMP)
	HIVE_TEST_VLLM=.vllm $(BIN)/python -m pytest -m "vllm" tests

# The same for NVIDIA GPUs, where there is one: 10 GB.
test-gpu: $(STAMP)
	HIVE_TEST_VLLM=.vllm $(BIN)/python -m pytest -m "gpu" tests

# The relay beside its peers, which come into .bench: 1 GB. 40 minutes; ARGS=--quick: 5.
bench: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m bench.peers
	PYTHONPATH=. $(BIN)/python -m bench.relay $(ARGS)

# The queue beside its peers, which come into .bench: 200 MB. 45 minutes; ARGS=--quick: 5.
bench-queue: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m bench.queues
	PYTHONPATH=. $(BIN)/python -m bench.queue $(ARGS)

# vLLM's load generator, through Hive and without it: 7 minutes, and vLLM into .vllm the first time.
serve: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m bench.serve $(ARGS)

# An hour of mixed load with deaths, which must leave nothing. ARGS="--minutes 5": test-long's form.
soak: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m bench.soak $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) tools/check_python.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

# Newest versions that pyproject.toml admits, pinned exactly.
constraints:
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --quiet --upgrade '.[test]' 'setuptools>=77'
	.venv-constraints/bin/python -m pip freeze --exclude hive-inference --all \
	  | grep -v -e '^pip==' -e ' @ ' > constraints.txt
	rm -rf .venv-constraints

clean:
	rm -rf $(VENV) .venv-* .vllm .bench build dist *.egg-info
