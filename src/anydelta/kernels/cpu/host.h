// Choosing the ISA, sharing a problem out over threads, and measuring the machine's limits.
#pragma once
#include <string>
#include <vector>

#include "problem.h"

namespace anydelta {

// The builds that this CPU can run, slowest first.
const std::vector<const Kernels*>& runnable();
// The build that ran the latest task, by the name compiled into it; "" before the first.
std::string last_isa();
// CPU features that matter here, for instance {"avx2", "fma", "f16c"}.
std::vector<std::string> cpu_features();

// Run a valid problem. Throws std::bad_alloc before anything is written, nothing else.
void run(const Problem& p, const Kernels& kernels, int threads, bool share_openmp);
void run(const Mixer& m, const Kernels& kernels, int threads, bool share_openmp);

double fma_peak(const Kernels& kernels, int threads, double seconds);  // GFLOP/s
double copy_bandwidth(int threads, int mib);                           // GB/s, read + written

}  // namespace anydelta
