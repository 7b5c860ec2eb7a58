// Chooses the ISA, distributes a problem over threads, and measures the machine's limits.
#pragma once
#include <string>
#include <vector>

#include "backward.h"
#include "log.h"
#include "problem.h"

namespace anydelta {

// The builds that this CPU can run, slowest first.
const std::vector<const Kernels*>& runnable();
// The build that runs calls: the one that ANYDELTA_CPU_ISA or choose() names, otherwise the last of runnable() except
// AMX.
// Both throw std::invalid_argument if this CPU cannot run the named one.
const Kernels& chosen();
void choose(const std::string& name);
// The build that ran the latest task, by the name compiled into it; "" before the first.
std::string last_isa();
// CPU features that matter here, for instance {"avx2", "fma", "f16c"}.
std::vector<std::string> cpu_features();

// Run a valid problem. Throws only std::bad_alloc, before anything is written; the user then sees OUT_OF_MEMORY.
constexpr const char* OUT_OF_MEMORY =
    "anydelta: requires more memory than the system gives. Run fewer sequences, tokens or heads at once";
void run(const Problem& p, const Kernels& kernels, int threads, bool share_openmp);
void run(const Mixer& m, const Kernels& kernels, int threads, bool share_openmp);
void verify(const Log& g, const Kernels& kernels, int threads, bool share_openmp);
void fold(const Log& g, const Kernels& kernels, int threads, bool share_openmp);
// Sets `longest`. Returns the bytes that it allocated.
size_t differentiate(Backward g, const Kernels& kernels, int threads, bool share_openmp);

// The same on chosen().
void run_chosen(const Problem& p, int threads, bool share_openmp);
void run_chosen(const Mixer& m, int threads, bool share_openmp);
// The number of these calls.
long calls();
// Fill the scratch memory with this byte before each task; -1 does not. For tests: no result may depend on it, and
// 0xff is NaN in every type.
void fill_scratch(int byte);

double fma_peak(const Kernels& kernels, int threads, double seconds);  // GFLOP/s
double copy_bandwidth(int threads, int mib);                           // GB/s, read + written

}  // namespace anydelta
