// The avx2 build of kernels.inl.h.
#define ANYDELTA_ISA avx2
#include "isa_avx2.h"
#include "kernels.inl.h"
