#define ANYDELTA_ISA probing_neon
#define PROBE probe_neon
#include "isa_neon.h"
#include "probe.inl.h"
