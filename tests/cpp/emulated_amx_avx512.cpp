// The amx build of target_amx.cpp with its tiles emulated, and AVX-512 as it is: equal to the real one bit for bit.
#define ANYDELTA_ISA amx_emulated_avx512
#define ANYDELTA_TILES "tiles_amx.h"
#include "isa_avx512.h"
#include "kernels.inl.h"
