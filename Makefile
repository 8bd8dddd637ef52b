# Every target sets up .venv by itself. PYTHON=... chooses a Python, ARGS=... adds options: make fit ARGS="--data.root photos"
PYTHON ?=
ARGS ?=
VENV = .venv/bin/python

.PHONY: help install fit test test-slow torture check board bench clean clean-cache core dev

help:  ## these lines
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):[^#]*## /make \1\t/' | expand -t 18

install: dev  ## everything, for developing

core:
	@PYTHON="$(PYTHON)" sh scripts/venv.sh core
dev:
	@PYTHON="$(PYTHON)" sh scripts/venv.sh dev

fit: core  ## train on the bundled digits, or on ARGS="--data.root DIR"
	$(VENV) -m project.cli fit $(ARGS)

check: dev  ## format, lint, types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

test: check  ## check, then the fast tests
	$(VENV) -m pytest -m "not slow" -n auto --dist loadfile $(ARGS)

test-slow: dev  ## the tests with many processes, a browser and notebooks
	$(VENV) -m pytest -m slow $(ARGS)

torture: dev  ## forty fits killed at random and resumed until done; 10,000 malformed requests (a quarter of an hour)
	TORTURE=40 $(VENV) -m pytest tests/test_torture.py tests/test_serving.py tests/test_board.py -k "killed or abuse or cost_of" -s $(ARGS)

board: core  ## TensorBoard on runs/; a run of a new name needs a restart
	@sh scripts/board.sh $(ARGS)

bench: core  ## how fast this machine trains, beside the usual ways
	$(VENV) -m project.cli bench $(ARGS)

clean-cache:  ## decoded pictures and kept lists of files; they are made again
	rm -rf data/cache

clean:  ## caches and the environment; never runs/ or data/
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find project tests -name __pycache__ -prune -exec rm -rf {} +
