// Runs a function on several threads without competing with torch's.
#pragma once

namespace anydelta {

// Call `work(context)` once on each of up to `threads` threads, the caller's included; returns when all are done.
// `work` must divide its work itself (an atomic counter) and be right on fewer threads, even one.
//
// With `share_openmp` and an OpenMP runtime in the process (torch brings one), that runtime's threads do the work:
// its idle workers spin for a while after each region, so a second pool would compete with them for the same cores.
// Without OpenMP they are the threads of share_threads_of. Otherwise they are our own pool; so too in a forked child,
// which has no OpenMP workers.
void parallel(int threads, bool share_openmp, void (*work)(void*), void* context);

// Threads of the host: `parallel` calls work(context) up to `threads` times, each on its own thread. OpenMP comes
// first, because torch wakes all of its threads for a job of two. `first` reverses this, for a runtime whose own
// threads are already awake.
void share_threads_of(void (*parallel)(int threads, void (*work)(void*), void* context), bool first = false);

// "openmp", "torch" (the host's) or "own": what parallel(n, share_openmp, ...) would use.
const char* thread_provider(bool share_openmp);

}  // namespace anydelta
