// The AVX-512 build of target_avx512.cpp on any CPU with AVX2: simde_avx512/immintrin.h stands in for the compiler's. Its name differs from target_avx512.cpp's, so that a CPU with AVX-512 runs both.
#define ANYDELTA_ISA avx512_emulated
#define PROBE probe_avx512_emulated
#include "isa_avx512.h"
#include "kernels.inl.h"
#include "probe.inl.h"
