// Running a function on several threads without fighting torch's.
#pragma once

namespace anydelta {

// Call `work(context)` once on each of up to `threads` threads, the caller's included; returns when all are done.
// `work` must share its work out by itself (an atomic counter) and be right on fewer threads, even one.
//
// With `share_openmp` and an OpenMP runtime in the process (torch brings one), the threads are that runtime's: its
// idle workers spin for a while after each region, so a second pool would compete with them for the same cores.
// Failing that, they are those of share_threads_of. Otherwise, and in a forked child, where OpenMP's workers do not exist, the threads are a pool of our own.
void parallel(int threads, bool share_openmp, void (*work)(void*), void* context);

// Threads of the host: `parallel` calls work(context) up to `threads` times, each on a thread of its own. OpenMP comes
// before them, because torch wakes all of its threads for a job of two; `first` turns that round, for a runtime whose own
// threads are the ones that are awake.
void share_threads_of(void (*parallel)(int threads, void (*work)(void*), void* context), bool first = false);

// "openmp", "torch" (the host's) or "own": what parallel(n, share_openmp, ...) would use.
const char* thread_provider(bool share_openmp);

}  // namespace anydelta
