# `make demo` and `make test` set themselves up: a .venv in this folder, torch first. A second run starts at once.
# PYTHON with a CUDA build of torch in it (make demo PYTHON=/path/to/python): that torch is used and none is installed.
PYTHON ?= python3
# The CPU build where the package index offers one; pip's own settings (PIP_INDEX_URL, ...) are honoured.
TORCH ?= torch==2.13.0

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: demo serve test test-integrations test-web fuzz lint bench bench-e2e gpu-test

demo: $(VENV)/installed
	@$(RUN) -m fastdllm generate --compare --demo

# OpenAI's API on http://127.0.0.1:8000/v1; SERVE adds options (--model, --port).
serve: $(VENV)/serve-tools
	@$(RUN) -m fastdllm serve $(SERVE)

test: $(VENV)/test-tools
	$(RUN) -m pytest -n auto --maxprocesses 8

lint: $(VENV)/test-tools
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Against the real lm-eval and Ray, which bring much along, and OpenAI's client against the server.
test-integrations: $(VENV)/test-tools $(VENV)/eval-tools $(VENV)/serve-test-tools $(VENV)/ray-tools
	$(RUN) -m pytest -rs tests/integrations

# The server's page in a headless Chromium, where there is one: Debian's package chromium.
test-web: $(VENV)/test-tools $(VENV)/web-test-tools
	$(RUN) -m pytest -rs tests/web

# Random decodes and kernel calls against oracles, some ten minutes on two cores; FUZZ adds options (--device cuda).
fuzz: $(VENV)/test-tools
	$(RUN) tests/fuzz.py --out bench/results/fuzz.json $(FUZZ)

# On a machine with a GPU, the same tests compiled, and more: one process, since it owns the GPU.
gpu-test: $(VENV)/test-tools
	$(RUN) -m pytest

bench: $(VENV)/bench-tools
	$(RUN) -m pytest bench --benchmark --benchmark-json=bench/results/kernels.json
	$(RUN) bench/report.py bench/results/kernels.json --plots bench/results --readme bench/results/README.md

# Whole requests at real shapes; ends at once where bench/results/end-to-end-<gpu>.json holds everything.
bench-e2e: $(VENV)/bench-tools
	$(RUN) bench/end_to_end.py

# A virtual environment of a virtual environment does not see its packages; a .pth file shows them to it.
$(VENV)/python:
	$(PYTHON) -m venv $(VENV)
	@if $(PYTHON) -c "import sys, torch; sys.exit(torch.version.cuda is None)" 2>/dev/null; then \
		$(PYTHON) -c "import sysconfig as s, torch; from pathlib import Path as P; \
			print(*{str(P(torch.__file__).parents[1]), s.get_path('purelib'), s.get_path('platlib')}, sep='\n')" \
			> "$$($(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/host-python.pth"; \
	else \
		$(PIP) "$(TORCH)"; \
	fi
	$(PIP) "setuptools>=70.1"
	@touch $@

$(VENV)/installed: $(VENV)/python setup.py
	$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/%-tools: $(VENV)/installed
	$(PIP) --no-build-isolation -e ".[$*]"
	@touch $@
