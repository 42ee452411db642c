# `make test` and `make reproduce` need only a fresh clone and Python 3.11.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/ready-$(shell cat requirements.txt pyproject.toml 2>/dev/null | sha256sum | cut -c1-12)
OUT ?= runs/digits

.PHONY: install test test-slow test-gpu lint reproduce clean

install: $(READY)

$(READY):
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/ready-*
	touch $@

test: install
	$(RUN) -m pytest -n 2 --dist loadfile

test-slow: install
	$(RUN) -m pytest -m slow

test-gpu: install
	$(RUN) -m pytest -m gpu

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m codespell_lib
	$(VENV)/bin/hadolint Dockerfile

reproduce: install
	$(RUN) launch.py reproduce --data digits --in-process --out $(OUT)

clean:
	rm -rf $(VENV) runs
