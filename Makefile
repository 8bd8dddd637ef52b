# Every target sets up .venv first. PYTHON=... chooses a Python, ARGS=... adds options: make fit ARGS="--data.root photos"
# PIP_ARGS=... are options for pip, when something is to be installed: docs/install.md
PYTHON ?=
ARGS ?=
export PIP_ARGS ?=
VENV = .venv/bin/python

.PHONY: help install fit test test-slow test-full torture coverage check board rename upgrade bench docs clean clean-cache core dev

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):[^#]*## /make \1\t/' | expand -t 18

install: dev  ## everything, for development

core:
	@PYTHON="$(PYTHON)" sh scripts/venv.sh core
dev:
	@PYTHON="$(PYTHON)" sh scripts/venv.sh dev

fit: core  ## train on the bundled digits, or on ARGS="--data.root DIR"
	$(VENV) -m project.cli fit $(ARGS)

check: dev  ## format, lint, types, dead code, spelling, layers and ceilings, links
	$(VENV) -m ruff format --check .
	$(VENV) -m ruff check .
	$(VENV) -m mypy
	@$(VENV) -c 'from project.cli import VERBS; from project.commands.models import own_networks as own; \
	print(*VERBS, *own(), sep="\n")' >.venv/used.py  # what is called by its name
	$(VENV) -m vulture project benchmarks scripts .venv/used.py
	git ls-files -z | xargs -0 $(VENV) -m codespell_lib
	$(VENV) -m pytest -q tests/test_architecture.py tests/test_readme.py -k "architecture or links"

test: check  ## check, then the fast tests
	$(VENV) -m pytest -m "not slow and not full" -n auto --dist loadfile $(ARGS)

test-slow: dev  ## tests with several processes or fits, a browser or a notebook
	$(VENV) -m pytest -m "slow and not full" -n auto --dist loadfile $(ARGS)

test-full: dev  ## long and rare tests: whole trainings, the notebooks as they are, forks, torture (hours)
	$(VENV) -m pytest -m full $(ARGS)

coverage: dev  ## the share of project/ that the fast and slow tests run; fails below 95 %
	$(VENV) -m pytest -m "not full" -n auto --dist loadfile --cov=project --cov-report=term:skip-covered --cov-fail-under=95 $(ARGS)

torture: dev  ## part of test-full: forty fits killed at random and resumed, 10,000 malformed requests (ten minutes)
	$(VENV) -m pytest -m full -k "killed or abuse" -s $(ARGS)

board: core  ## TensorBoard on runs/; restart it to see a run with a new name
	@sh scripts/board.sh $(ARGS)

rename: dev  ## make the template yours: NAME=flowers, and to remove parts, WITHOUT=serving,benchmarks,export
	$(VENV) scripts/rename.py $(NAME) $(if $(WITHOUT),--without $(WITHOUT))

upgrade: dev  ## take over what has changed in the template since: FROM=its git address
	$(VENV) scripts/rename.py --upgrade $(FROM)

bench: dev  ## compare with other programs: ARGS=training, precision, reading, predict, serve, bundle, accuracy, recipes, ddp or shards
	$(VENV) -m benchmarks $(ARGS)

docs: dev  ## the documentation as a site, in site/: open site/index.html
	$(VENV) -m mkdocs build --strict $(ARGS)

clean-cache:  ## remove decoded images; the next fit decodes them again
	rm -rf data/cache

clean:  ## remove caches and the environment; never runs/ or data/
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find project tests -name __pycache__ -prune -exec rm -rf {} +
