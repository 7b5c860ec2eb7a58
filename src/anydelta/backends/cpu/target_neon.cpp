// The neon build of kernels.inl.h.
#define ANYDELTA_ISA neon
#include "isa_neon.h"
#include "kernels.inl.h"
