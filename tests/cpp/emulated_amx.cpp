// The amx build of target_amx.cpp on any CPU with AVX2, its tiles emulated: emulated_amx/immintrin.h stands in.
#define ANYDELTA_ISA amx_emulated
#define ANYDELTA_TILES "tiles_amx.h"
#include "isa_avx2.h"
#include "kernels.inl.h"
