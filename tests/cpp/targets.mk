# The core without Python: `make sanitize` and `make emulated`. Included by the Makefile; works from the root of the
# checkout by itself too: make -f tests/cpp/targets.mk sanitize
TEST_CORE_CMAKE ?= $(firstword $(wildcard .venv/bin/cmake) cmake)
TEST_CORE_BUILD = nice -n 10 $(TEST_CORE_CMAKE) --build $(1) --target test_core --parallel 2
# The fuzz targets with the inputs of their corpus: the mixer, the log and the call check are in no other test of C++.
REPLAYS := spec rule backward mixer mixer_backward log
REPLAY_BUILD = nice -n 10 $(TEST_CORE_CMAKE) --build $(1) --target $(REPLAYS:%=replay_%) --parallel 2
REPLAY = for name in $(REPLAYS); do nice -n 10 $(1)/tests/fuzz/replay_$$name tests/fuzz/corpus/$$name 2> $(1)/replay.log || \
  { tail -n 60 $(1)/replay.log; exit 1; }; done
TEST_CORE_CONFIGURE = $(TEST_CORE_CMAKE) -S . -B $(1) -DANYDELTA_PYTHON=OFF -DANYDELTA_TESTS=ON -DANYDELTA_EMULATED_AMX=ON \
  -DCMAKE_BUILD_TYPE=Release

.PHONY: sanitize sanitize-address sanitize-thread emulated emulated-avx512 emulated-neon emulated-tools

# The core under ASan + UBSan, then under TSan. https://github.com/google/sanitizers/wiki/SanitizerCommonFlags
sanitize: sanitize-address sanitize-thread ## Test the C++ core under ASan, UBSan and TSan

sanitize-address:
	$(call TEST_CORE_CONFIGURE,build/asan) -DANYDELTA_SANITIZE=address,undefined
	$(call TEST_CORE_BUILD,build/asan)
	$(call REPLAY_BUILD,build/asan)
	export ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1; \
	  nice -n 10 build/asan/tests/cpp/test_core --share 0/2 && $(call REPLAY,build/asan)

# Data races do not depend on the geometry: a twentieth of the cases is enough. TSan cannot follow a forked child that
# starts threads ("dup thread with used id"), which is all that the fork test is about.
sanitize-thread:
	$(call TEST_CORE_CONFIGURE,build/tsan) -DANYDELTA_SANITIZE=thread
	$(call TEST_CORE_BUILD,build/tsan)
	$(call REPLAY_BUILD,build/tsan)
	export TSAN_OPTIONS=halt_on_error=1; nice -n 10 build/tsan/tests/cpp/test_core --share 0/20 --skip fork && \
	  $(call REPLAY,build/tsan)

# The AVX-512 build through SIMDe and the NEON build under qemu, whatever this CPU is. A forked child that starts threads
# is beyond qemu 7.2: no fork test there.
emulated: emulated-avx512 emulated-neon ## Test the AVX-512 and NEON builds by emulation

emulated-avx512:
	@missing=; test -e /usr/include/simde/x86/avx512.h || missing=libsimde-dev; \
	test -z "$$missing" || { echo "make emulated-avx512 needs $$missing: run make emulated-tools"; exit 1; }
	$(call TEST_CORE_CONFIGURE,build/emulated)
	$(call TEST_CORE_BUILD,build/emulated)
	nice -n 10 build/emulated/tests/cpp/test_core

emulated-neon:
	@missing=; command -v aarch64-linux-gnu-g++ >/dev/null || missing="$$missing g++-aarch64-linux-gnu"; \
	command -v qemu-aarch64 >/dev/null || missing="$$missing qemu-user"; \
	test -z "$$missing" || { echo "make emulated-neon needs$$missing: run make emulated-tools"; exit 1; }
	$(call TEST_CORE_CONFIGURE,build/neon) -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
	$(call TEST_CORE_BUILD,build/neon)
	nice -n 10 qemu-aarch64 build/neon/tests/cpp/test_core --share 0/4 --skip fork

# Debian and Ubuntu packages for `make emulated`; asks for root rights.
emulated-tools:
	$(if $(filter 0,$(shell id -u)),,sudo )apt-get install -y libsimde-dev g++-aarch64-linux-gnu qemu-user
