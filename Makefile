# make demo: train on a puppet's clip and make a new video of it, in runs/demo
# make test: ruff and the tests, on all processors
# make test-all: the slow ones too, twice as long
# make parity: full-size networks and files against the public implementations; 15 minutes, 10 GB
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test test-all parity clean

demo: .venv/runtime
	$(BIN)/python demo/dance.py

test: .venv/tests
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-all: .venv/tests
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not parity"

parity: .venv/tests
	$(BIN)/python -m pytest -m parity -s

.venv/runtime: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/tests: .venv/runtime requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
