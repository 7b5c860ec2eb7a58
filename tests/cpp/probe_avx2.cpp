#define ANYDELTA_ISA probing_avx2
#define PROBE probe_avx2
#include "isa_avx2.h"
#include "probe.inl.h"
