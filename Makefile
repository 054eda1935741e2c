# The doors of the project. Each works in a fresh clone with nothing but Python 3.11 or newer, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes share a small machine best with one thread each.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1
# Tests in many processes have JAX compile the same things.
ONE_CACHE := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.pytest_cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

# The core's own tests need no framework, and cover its every branch.
CORE := tests/core tests/fuzz tests/conformance/test_numpy.py tests/conformance/test_numpy_run.py
# JAX and TensorFlow run threads, and a process with threads is not to be forked, which data loaders do: each has its own run.
THREADED := tests/jax tests/keras tests/tensorflow tests/parity tests/lab tests/test_docs.py \
  tests/conformance/test_jax.py tests/conformance/test_keras.py tests/conformance/test_tensorflow.py
FORKING := tests $(addprefix --ignore=,$(CORE) $(THREADED))

.PHONY: demo test exhaustive durability statistics fuzz lint bench gpu docs clean

demo: $(VENV)/.demo
	$(BIN)/snapcore train

.PHONY: check core versions

# What to run after every change: side by side, since a type checker uses one core.
check: $(VENV)/.lint
	$(MAKE) --jobs 2 --output-sync lint core

core: $(VENV)/.test
	$(ONE_THREAD) $(PYTEST) -q --hypothesis-profile quick $(CORE)

test: $(VENV)/.test
	SNAPCORE_REQUIRE=torch,jax,keras,tensorflow $(ONE_THREAD) $(PYTEST) $(CORE) --cov --cov-report=term
	$(ONE_THREAD) $(ONE_CACHE) $(PYTEST) $(FORKING)
	$(ONE_THREAD) $(ONE_CACHE) $(PYTEST) $(THREADED) \
	  --doctest-modules --pyargs snapcore snapcore_torch snapcore_jax snapcore_keras snapcore_tensorflow

# What make test leaves out: the same promises on other backends, with more seeds, and by real kills.
exhaustive: $(VENV)/.test
	SNAPCORE_EXHAUSTIVE=only $(ONE_THREAD) $(ONE_CACHE) $(PYTEST) $(FORKING)
	SNAPCORE_EXHAUSTIVE=only $(ONE_THREAD) $(ONE_CACHE) $(PYTEST) $(THREADED)

versions:
	$(ONE_THREAD) $(PYTHON) tests/packaging/versions.py $(PYTHONS)

durability: $(VENV)/.test
	SNAPCORE_KILLS=100 SNAPCORE_DAMAGE=10000 $(ONE_THREAD) $(BIN)/python -m pytest tests/durability -n 2 -q $(ARGS)

# What intervals and verdicts promise, simulated twenty times as often as in the tests.
statistics: $(VENV)/.test
	SNAPCORE_SIMULATIONS=20000 $(ONE_THREAD) $(PYTEST) -q --timeout 3600 tests/core/test_verdict.py $(ARGS)

fuzz: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/python -m tests.fuzz $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/.bench
	$(BIN)/python -m pytest tests/bench --benchmark-only --benchmark-quiet --timeout 900 -q -rs $(ARGS)

# Needs no .venv: a machine with a GPU may have no network, and what is installed there must do.
gpu:
	PYTHONPATH=.:backends:tests/bench$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) tests/gpu $(ARGS)

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --upgrade 'pip>=25.1'

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[torch,lab]'
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e '.[all]' --group test
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) --group lint
	touch $@

# torchensemble asks for torchvision, which it does not import and which needs a build of its own for every PyTorch.
$(VENV)/.bench: $(VENV)/.test
	$(PIP) --group bench
	$(PIP) --no-deps torchensemble
	touch $@

$(VENV)/.docs: $(VENV)/.test
	$(PIP) --group docs
	touch $@

clean:
	rm -rf $(VENV) docs/_build build dist
