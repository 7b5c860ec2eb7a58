// The amx build of kernels.inl.h: AVX-512, and products on AMX tiles.
#define ANYDELTA_ISA amx
#define ANYDELTA_TILES "tiles_amx.h"
#include "isa_avx512.h"
#include "kernels.inl.h"
