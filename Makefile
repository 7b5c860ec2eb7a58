# anydelta: everything a newcomer or a CI job calls. `make help` lists the targets.
#
# The first call sets up .venv in this folder: torch, the tools, the peers of the benchmark, and the
# package itself, editable. Later calls only rebuild what changed. Needs Python 3.10 or newer and a C++17 compiler.
# pip's own environment variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...) work as usual.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
ISOLATE := env -u PYTHONPATH -u PYTHONHOME
KERNELS := $(wildcard src/anydelta/ggml/*.cpp src/anydelta/ggml/*.h src/anydelta/backends/cpu/*.cpp src/anydelta/backends/cpu/*.h src/anydelta/export/*.cpp src/anydelta/export/*.h)
SHADERS := $(wildcard src/anydelta/backends/vulkan/*.comp src/anydelta/backends/vulkan/*.glsl)
SYCL := $(wildcard src/anydelta/backends/sycl/*.?pp)
CPP := $(KERNELS) $(SYCL) $(wildcard tests/cpp/*.cpp tests/cpp/*.h tests/fuzz/*.cpp tests/fuzz/*.h tests/metal/*.cpp tests/metal/*.h examples/export/*.cpp)
# Short enough for five minutes; the words behind the commands below do all of it.
DEMO_CASES := default
DEMO_CONFORM := T=17
EXPORT_RUNTIMES := aoti executorch onnx
EXPORT_RUNNERS := aoti executorch
EXPORT_PROMPT := In the beginning God created
# Transformers that `make test-transformers` tests: the oldest, two between, and the one that `make test` has.
TRANSFORMERS := 5.15.0 5.20.0 5.23.0 5.24.0
README_CASES := gda-t1-h16x32-d128-b1-cold,gda-t512-h16x32-d128-b1
README_PEERS := ggml onnxruntime executorch transformers
README_RECORDING := 'anydelta doctor' 'anydelta generate -m examples/tiny_model --compare -n 48 -t 1 "Psalm 1"'
DEMO_PROMPT := "And it came to pass in those days, that"

# What `make backends` installs: Debian packages, and dependency groups of pyproject.toml.
BACKENDS_APT := libvulkan1 mesa-vulkan-drivers vulkan-validationlayers glslang-tools pocl-opencl-icd
BACKENDS_PIP := vulkan webgpu opencl sycl

# Files of tests run beside each other, one for each CPU. Threads that wait for others then give their CPU away.
BESIDE := --numprocesses auto --maxprocesses 8 --dist loadfile
PYTEST := $(ISOLATE) OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(BESIDE)

.DEFAULT_GOAL := help
.PHONY: help setup backends test test-transformers test-vllm lint format docs demo demo-export wheel readme figures release-check clean distclean
.DELETE_ON_ERROR:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.built ## Set up .venv and build the package in place

# The stamp goes so that the next build finds glslang and intel-sycl-rt.
backends: $(VENV)/.installed ## Install the runtimes of the GPU backends, with drivers that run on the CPU (Debian, Ubuntu)
	$(SUDO) apt-get update -q
	$(SUDO) apt-get install -q -y --no-install-recommends $(BACKENDS_APT)
	$(BIN)/python -m pip install -q $(BACKENDS_PIP:%=--group %)
	rm -f $(VENV)/.built

test: $(VENV)/.built lint ## Check style and types, then run all tests
	$(PYTEST) $(PYTEST_ARGS)

test-transformers: $(VENV)/.built ## Test the plug on other Transformers, installed below build/: TRANSFORMERS="5.15.0 5.20.0"
	for version in $(TRANSFORMERS); do \
	  $(BIN)/python -m pip install -q --target build/transformers-$$version transformers==$$version && \
	  $(ISOLATE) PYTHONPATH=build/transformers-$$version $(BIN)/python -c 'import transformers; print(transformers.__version__)' && \
	  $(ISOLATE) PYTHONPATH=build/transformers-$$version $(BIN)/python -m pytest $(BESIDE) tests/test_transformers.py tests/test_speculative.py $(PYTEST_ARGS) || exit 1; done

test-vllm: $(VENV)/.built build/vllm/.installed ## Test vLLM's plug-in over HTTP; vLLM goes below build/ (3.5 GB): PYTEST_ARGS="-k mtp"
	rm -rf build/vllm-wheel
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation --wheel-dir build/vllm-wheel .
	build/vllm/bin/python -m pip install -q --no-deps --force-reinstall build/vllm-wheel/*.whl
	cd build && $(ISOLATE) vllm/bin/python -m pytest -p no:cacheprovider ../tests/vllm_engine/serve_checks.py $(PYTEST_ARGS)

build/vllm/.installed: tests/vllm_engine/install.sh tests/vllm_engine/sitecustomize.py
	tests/vllm_engine/install.sh build/vllm $(PYTHON)
	@touch $@

demo: $(VENV)/.built ## Show what runs here, prove it, write text with it, measure it: out/model.svg, out/ops.svg
	mkdir -p out
	$(ISOLATE) $(BIN)/anydelta info
	$(ISOLATE) $(BIN)/anydelta conform --backend cpu --require cpu --filter $(DEMO_CONFORM)
	$(ISOLATE) $(BIN)/anydelta generate --compare --echo -n 200 $(DEMO_PROMPT)
	$(ISOLATE) $(BIN)/anydelta gguf write examples/tiny_model --type Q8_0 --force -o out/tiny-Q8_0.gguf
	$(ISOLATE) $(BIN)/anydelta generate -m out/tiny-Q8_0.gguf --echo -n 200 $(DEMO_PROMPT)
	$(ISOLATE) $(BIN)/anydelta bench model -c anydelta -p 512 -n 64 --profile --plot out/model.svg -o out/model.json
	$(ISOLATE) $(BIN)/anydelta bench ops -r 5 --cases $(DEMO_CASES) --decays mild --plot out/ops.svg -o out/ops.json
	@echo "The figures are out/model.svg and out/ops.svg, their numbers out/model.json and out/ops.json."

demo-export: $(VENV)/.built ## Export the tiny model to each runtime, generate with it in Python and in C++: out/export
	mkdir -p out/export
	for runtime in $(EXPORT_RUNTIMES); do \
	  $(ISOLATE) $(BIN)/python examples/export/export_$$runtime.py examples/tiny_model out/export && \
	  $(ISOLATE) $(BIN)/python examples/export/run_python.py $$runtime examples/tiny_model out/export 64 $(EXPORT_PROMPT) > out/export/$$runtime.txt && \
	  cat out/export/$$runtime.txt || exit 1; done
	$(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -S examples/export -B out/export/build -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build out/export/build
	for runtime in $(EXPORT_RUNNERS); do \
	  out/export/build/run_$$runtime out/export 64 $$(sed -n 's/^prompt: //p' out/export/$$runtime.txt) > out/export/$$runtime.cpp.txt && \
	  test "$$(sed -n 's/^tokens: //p' out/export/$$runtime.txt)" = "$$(cat out/export/$$runtime.cpp.txt)" || exit 1; \
	  echo "$$runtime: C++ gives the same 64 tokens"; done

lint: $(VENV)/.installed ## Check style, types and prose
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/codespell
	$(BIN)/python scripts/prose.py

format: $(VENV)/.installed ## Format Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Without --quiet, which would hide warnings from --strict.
docs: $(VENV)/.docs ## Build the site into build/site; a broken link or a missing docstring fails
	NO_MKDOCS_2_WARNING=1 $(ISOLATE) $(BIN)/mkdocs build --strict

readme: $(VENV)/.built ## Write the generated tables of README.md and docs/transformers.md anew
	$(ISOLATE) $(BIN)/anydelta conform --support --json | $(ISOLATE) $(BIN)/python scripts/support_table.py --from - --write README.md
	$(ISOLATE) $(BIN)/python scripts/families_table.py --write docs/transformers.md

# The core without Python; the recipes are in tests/cpp.
-include tests/cpp/targets.mk
-include tests/fuzz/targets.mk

wheel: $(VENV)/.installed ## Build sdist and wheel into dist/
	$(BIN)/python -m build --outdir dist .

# The machine should be quiet. The recording needs a terminal of Unix.
figures: $(VENV)/.built ## Measure and write README's speed table, its picture and the recording of the program
	$(ISOLATE) $(BIN)/anydelta bench ops -r 11 -t 1 --decays mild --cases $(README_CASES) $(README_PEERS:%=--peer %) -o docs/measurements/readme.json
	$(ISOLATE) $(BIN)/python scripts/speed_figures.py --from docs/measurements/readme.json --write README.md --plot docs/images/speed.svg
	$(ISOLATE) $(BIN)/python scripts/recording.py docs/images/terminal.svg $(README_RECORDING)

release-check: $(VENV)/.release ## Build a release, check it, install it for every Python here and run README's lines
	$(ISOLATE) $(BIN)/python scripts/release_check.py

clean: ## Remove what was built, and all caches
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(VENV)/.built

distclean: clean ## As clean, and .venv too
	rm -rf $(VENV)

# Stamps: an empty file says that the step is done, and make compares its date with the files it depends on.

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "anydelta needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"  # the first with --group
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install -q --group build --group dev --group peers || { \
	  echo "The peers of the benchmark do not install on this machine (reason above); their tests will be skipped."; \
	  $(BIN)/python -m pip install -q --group build --group dev; }
	$(BIN)/python -m pip install -q --group gguf || \
	  echo "ggml-python does not build on this machine (reason above); the tests of GGUF files will be skipped."
	@touch $@

$(VENV)/.docs: $(VENV)/.built
	$(BIN)/python -m pip install -q --group docs
	@touch $@

$(VENV)/.release: $(VENV)/.installed
	$(BIN)/python -m pip install -q --group release
	@touch $@

# Without build isolation, so that build/ keeps its objects and only what changed is compiled.
$(VENV)/.built: $(VENV)/.installed CMakeLists.txt $(wildcard tests/cpp/emulated_amx.cpp tests/cpp/emulated_amx/*) src/anydelta/export/CMakeLists.txt $(KERNELS) $(SHADERS) $(SYCL) $(wildcard src/anydelta/*/arguments.py) src/anydelta/backends/devices/structs.py scripts/generate_arguments.py
	$(BIN)/python -m pip install -q --no-build-isolation --config-settings=cmake.define.ANYDELTA_EMULATED_AMX=ON --editable .
	@touch $@
