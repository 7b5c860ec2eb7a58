#define ANYDELTA_ISA probing_baseline
#define PROBE probe_baseline
#include "isa_baseline.h"
#include "probe.inl.h"
