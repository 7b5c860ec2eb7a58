// The baseline build of kernels.inl.h.
#define ANYDELTA_ISA baseline
#include "isa_baseline.h"
#include "kernels.inl.h"
