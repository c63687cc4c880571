# Each target sets up what it needs in .venv/. On a fresh machine: Python >= 3.11 (with venv) is needed; a C++ compiler
# is used where there is one.
#
#   make quickstart   set up, then run the main job on embedded sample data
#   make test         set up, then run the whole test suite
#   make lint         ruff, mypy, import-linter, generated pages up to date
#   make bench        benchmarks
#   make docs         write the generated pages
#   make thorough     the test suite with every case of which make test takes a part, as grids and variations of models (nightly)
#   make sanitize     find data races between the threads of CUDA kernels, on the host (nightly)
#   make gpu-check    on a machine with a GPU: try everything that this project could not, write a report to send
#   make cuda-check   without a GPU: build and load the CUDA kernels in .venv-cuda/ (5.5 GB), run the model on fakes

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv quickstart test lint bench docs thorough sanitize gpu-check cuda-check

BIN := .venv/bin
STAMP := .venv/.installed

help:
	@sed -n 's/^#   //p' Makefile

venv: $(STAMP)

# torch first and pinned: with an open range pip would look for the newest build, of several gigabytes.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*.h csrc/*/*)
	@for candidate in python3.11 python3.12 python3.13 python3 python; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "make: no Python 3.11 or newer was found; install one (Debian: apt-get install python3 python3-venv)" >&2; exit 1; \
	fi; \
	test -x $(BIN)/python || "$$found" -m venv .venv || { \
	  echo "make: $$found cannot create .venv; its venv module may be missing (Debian: apt-get install python3-venv)" >&2; \
	  rm -rf .venv; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $(STAMP)

quickstart: venv
	$(BIN)/python examples/quickstart/quickstart.py

test: venv
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m megatron.config.reference docs/configuration.md --check
	$(BIN)/python -m megatron.config.megatron_llm.page docs/megatron_llm.md --check

bench: venv
	@for script in benchmarks/*.py; do $(BIN)/python "$$script" || exit 1; done

thorough: venv
	THOROUGH=1 $(BIN)/python -m pytest

sanitize: venv
	$(BIN)/python -m tests.cuda_host.races

docs: venv
	$(BIN)/python -m megatron.config.reference docs/configuration.md
	$(BIN)/python -m megatron.config.megatron_llm.page docs/megatron_llm.md

gpu-check: venv
	$(BIN)/python -m tools.gpu_check

# Its own environment, since a CUDA build of torch is several gigabytes and CI's is a CPU build; and its own copy of the
# sources, so that what is built there is not met here.
CUDA_TORCH ?= torch>=2.11,<2.15
CUDA_SOURCE := .venv-cuda/source

cuda-check: venv
	test -x .venv-cuda/bin/python || $(BIN)/python -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet --disable-pip-version-check \
	  '$(CUDA_TORCH)' 'setuptools>=77' wheel numpy pyyaml sentencepiece tokenizers jinja2
	rm -rf $(CUDA_SOURCE) && mkdir $(CUDA_SOURCE)
	cp -r megatron csrc tools setup.py pyproject.toml README.md LICENSE $(CUDA_SOURCE)
	find $(CUDA_SOURCE) -name '*.so' -delete
	cd $(CUDA_SOURCE) && ../bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-build-isolation --no-deps -e . && ../bin/python -m tools.cuda_check
