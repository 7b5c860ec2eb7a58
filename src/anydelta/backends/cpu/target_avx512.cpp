// The avx512 build of kernels.inl.h.
#define ANYDELTA_ISA avx512
#include "isa_avx512.h"
#include "kernels.inl.h"
