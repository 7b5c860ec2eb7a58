#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace anydelta {
namespace {

// A pool whose workers wait for a numbered job. Never destroyed: its threads may outlive static destructors.
class Pool {
  public:
    // False when another thread is using the pool: the caller then does the work alone.
    bool run(int threads, void (*work)(void*), void* context) {
        std::unique_lock<std::mutex> busy(users_, std::try_to_lock);
        if (!busy.owns_lock()) return false;
        while (static_cast<int>(workers_.size()) < threads - 1) {
            const int id = static_cast<int>(workers_.size());
            try {
                workers_.emplace_back([this, id] { serve(id); });
            } catch (...) {  // the system has no more threads: fewer will do
                break;
            }
            workers_.back().detach();
        }
        const int helpers =
            static_cast<int>(workers_.size()) < threads - 1 ? static_cast<int>(workers_.size()) : threads - 1;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            work_ = work;
            context_ = context;
            wanted_ = helpers;
            started_ = 0;
            finished_.store(0, std::memory_order_relaxed);
            job_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        work(context);
        int started;
        {  // all work is taken: threads that have not started yet are not needed or waited for
            std::lock_guard<std::mutex> lock(mutex_);
            wanted_ = 0;
            started = started_;
        }
        while (finished_.load(std::memory_order_acquire) < started) std::this_thread::yield();
        return true;
    }

  private:
    std::mutex users_, mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::atomic<unsigned long> job_{0};
    std::atomic<int> finished_{0};
    int wanted_ = 0, started_ = 0;
    void (*work_)(void*) = nullptr;
    void* context_ = nullptr;

    void serve(int id) {
        unsigned long seen = 0;
        for (;;) {
            // 50 us: longer than the gap between two layers' calls, far shorter than a time slice.
            const auto give_up = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
            while (job_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < give_up) {
            }
            void (*work)(void*);
            void* context;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return job_.load(std::memory_order_relaxed) != seen; });
                seen = job_.load(std::memory_order_relaxed);
                if (id >= wanted_) continue;
                ++started_;
                work = work_;
                context = context_;
            }
            work(context);
            finished_.fetch_add(1, std::memory_order_release);
        }
    }
};

std::atomic<bool> forked{false};
std::atomic<Pool*> own_pool{nullptr};

Pool& pool() {
    Pool* p = own_pool.load(std::memory_order_acquire);
    if (!p) {
        Pool* fresh = new Pool;
        if (own_pool.compare_exchange_strong(p, fresh)) return *fresh;
        delete fresh;
    }
    return *p;
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_openmp() {
#if defined(_WIN32)
    return nullptr;
#else
    // The entry that GCC-compiled code calls; GNU's and Intel's runtimes have it, and so does LLVM's on Linux.
    static std::atomic<GompParallel> found{nullptr};
    GompParallel f = found.load(std::memory_order_relaxed);
    if (!f) {
        f = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        found.store(f, std::memory_order_relaxed);
    }
    return f;
#endif
}

using Parallel = void (*)(int, void (*)(void*), void*);
std::atomic<Parallel> host_threads{nullptr};
std::atomic<bool> host_first{false};

bool openmp_usable(bool share_openmp) {
    return share_openmp && !forked.load() && !host_first.load() && find_openmp() != nullptr;
}

#if !defined(_WIN32)
// A forked child has none of the parent's threads: forget the pool (its mutexes may be held) and OpenMP's workers.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
    forked.store(true);
    own_pool.store(nullptr);
});
#endif

}  // namespace

void parallel(int threads, bool share_openmp, void (*work)(void*), void* context) {
    if (threads <= 1) return work(context);
    if (openmp_usable(share_openmp)) return find_openmp()(work, context, static_cast<unsigned>(threads), 0);
    const Parallel host = share_openmp && !forked.load() ? host_threads.load() : nullptr;
    if (host) return host(threads, work, context);
    if (!pool().run(threads, work, context)) work(context);
}

void share_threads_of(Parallel parallel, bool first) {
    host_threads.store(parallel);
    host_first.store(first);
}

const char* thread_provider(bool share_openmp) {
    if (openmp_usable(share_openmp)) return "openmp";
    return share_openmp && !forked.load() && host_threads.load() ? "torch" : "own";
}

}  // namespace anydelta
