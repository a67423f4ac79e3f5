# Every target runs the same Python code as on Windows, where make is missing:
#   py -m course_utils env | lab | test | bench
PYTHON ?= python3
ARGS ?=

.PHONY: help env lab test bench lock clean

help:
	@echo "make lab     open the course in JupyterLab (ARGS=\"--no-browser --port 8899\")"
	@echo "make test    lint and run every test (ARGS=\"tests/test_bootstrap.py -k stamp\")"
	@echo "make bench   measure what the chapters quote (some minutes)"
	@echo "make env     only create the environment in .venv"
	@echo "make lock    write requirements.lock anew from pyproject.toml, newest versions (needs uv)"
	@echo "make clean   remove .venv and caches; your notebooks in work/ stay"

env:
	@$(PYTHON) -m course_utils env

lab:
	@$(PYTHON) -m course_utils lab $(ARGS)

test:
	@$(PYTHON) -m course_utils test $(ARGS)

bench:
	@$(PYTHON) -m course_utils bench $(ARGS)

# No index, path or command line goes into the lock; find-links of this machine are not asked.
lock:
	env -u UV_FIND_LINKS uv pip compile pyproject.toml --universal --python-version 3.10 --all-extras \
		--upgrade --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
		--quiet --output-file requirements.lock

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find course_utils tests -name __pycache__ -type d -prune -exec rm -rf {} +
