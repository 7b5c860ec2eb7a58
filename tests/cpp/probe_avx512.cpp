#define ANYDELTA_ISA probing_avx512
#define PROBE probe_avx512
#include "isa_avx512.h"
#include "probe.inl.h"
