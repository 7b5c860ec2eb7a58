// Choosing the ISA, sharing a problem out over threads, and measuring the machine's limits.
#pragma once
#include <string>
#include <vector>

#include "backward.h"
#include "log.h"
#include "problem.h"

namespace anydelta {

// The builds that this CPU can run, slowest first.
const std::vector<const Kernels*>& runnable();
// The one that runs calls: the last of runnable() but AMX, or what ANYDELTA_CPU_ISA or choose() names.
// Both throw std::invalid_argument where this CPU cannot run it.
const Kernels& chosen();
void choose(const std::string& name);
// The build that ran the latest task, by the name compiled into it; "" before the first.
std::string last_isa();
// CPU features that matter here, for instance {"avx2", "fma", "f16c"}.
std::vector<std::string> cpu_features();

// Run a valid problem. Throws std::bad_alloc before anything is written, nothing else; users are told OUT_OF_MEMORY.
constexpr const char* OUT_OF_MEMORY =
    "anydelta: requires more memory than the system gives. Run fewer sequences, tokens or heads at once";
void run(const Problem& p, const Kernels& kernels, int threads, bool share_openmp);
void run(const Mixer& m, const Kernels& kernels, int threads, bool share_openmp);
void verify(const Log& g, const Kernels& kernels, int threads, bool share_openmp);
void fold(const Log& g, const Kernels& kernels, int threads, bool share_openmp);
// Fills in `longest`. Returns the bytes that it took beside what it was given.
size_t differentiate(Backward g, const Kernels& kernels, int threads, bool share_openmp);

// The same with chosen().
void run_chosen(const Problem& p, int threads, bool share_openmp);
void run_chosen(const Mixer& m, int threads, bool share_openmp);
// How often that was.
long calls();
// Fill the scratch memory with this byte before each task, or with -1 leave what was there. For tests: no result depends
// on it, and 0xff is NaN in every type.
void fill_scratch(int byte);

double fma_peak(const Kernels& kernels, int threads, double seconds);  // GFLOP/s
double copy_bandwidth(int threads, int mib);                           // GB/s, read + written

}  // namespace anydelta
