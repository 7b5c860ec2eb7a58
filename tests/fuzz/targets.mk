# Fuzzing: `make fuzz`. Included by the Makefile.
FUZZ_CORE := $(REPLAYS)
FUZZ ?= $(FUZZ_CORE) checkpoints checkpoint case table model
SECONDS ?= 60

.PHONY: fuzz fuzz-build fuzz-tools

fuzz: $(VENV)/.built fuzz-build ## Look for inputs that break the C++ core and the loaders: SECONDS=60 each, FUZZ="rule case" some
	nice -n 10 $(BIN)/python tests/fuzz/run.py --seconds $(SECONDS) $(FUZZ)

fuzz-build: $(VENV)/.installed
	@missing=; command -v clang++ >/dev/null || missing=" clang"; \
	echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' | \
	  clang++ -x c++ -fsanitize=fuzzer,address - -o /dev/null 2>/dev/null || missing="$$missing libFuzzer"; \
	$(BIN)/python -c 'import atheris' 2>/dev/null || missing="$$missing atheris"; \
	test -z "$$missing" || { echo "make fuzz needs$$missing: run make fuzz-tools"; exit 1; }
	$(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -S . -B build/fuzz -DANYDELTA_PYTHON=OFF \
	  -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_BUILD_TYPE=Release -DANYDELTA_FUZZ=ON \
	  -DANYDELTA_SANITIZE=fuzzer-no-link,address,undefined
	nice -n 10 $(BIN)/cmake --build build/fuzz --parallel 2

# Debian and Ubuntu packages for `make fuzz`, and atheris; asks for root rights. SIMDe is for the AVX-512 build.
fuzz-tools: $(VENV)/.installed
	$(SUDO) apt-get install -y clang libclang-rt-dev libsimde-dev
	$(BIN)/python -m pip install -q --group fuzz
