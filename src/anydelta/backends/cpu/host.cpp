#include "host.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "flush.h"
#include "mixer.h"
#include "threads.h"

#if defined(__x86_64__) || defined(_M_X64)
#define ANYDELTA_X86 1
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace anydelta {

extern const Kernels kernels_baseline;
#if defined(ANYDELTA_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#if defined(ANYDELTA_AMX)
extern const Kernels kernels_amx;
#endif
#if defined(ANYDELTA_EMULATED_AMX)
extern const Kernels kernels_amx_emulated;
#endif
#elif defined(__aarch64__) || defined(_M_ARM64)
#define ANYDELTA_ARM64 1
extern const Kernels kernels_neon;
#endif

namespace {

// ---- which ISA ----

struct Features {
    bool avx2 = false, fma = false, f16c = false, avx512 = false, amx = false;
};

// Whether the system gives this process AMX's tile registers. Linux must be asked once, because they add 8 KiB to
// what a thread switch saves. It refuses if the process has a signal stack that is too short for that. Windows and
// macOS are not asked: nothing has been run there.
bool tiles_given() {
#if defined(__linux__) && defined(ANYDELTA_X86) && defined(SYS_arch_prctl)
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

Features detect() {
    Features f;
#if defined(ANYDELTA_X86)
    auto cpuid = [](unsigned leaf, unsigned out[4], unsigned page = 0) {
#if defined(_MSC_VER)
        int r[4];
        __cpuidex(r, static_cast<int>(leaf), static_cast<int>(page));
        for (int i = 0; i < 4; ++i) out[i] = static_cast<unsigned>(r[i]);
#else
        __cpuid_count(leaf, page, out[0], out[1], out[2], out[3]);
#endif
    };
    unsigned r[4];
    cpuid(0, r);
    if (r[0] < 7) return f;
    cpuid(1, r);
    const unsigned c1 = r[2];
    if (!(c1 >> 27 & 1)) return f;  // OSXSAVE: whether the saved registers can be queried
#if defined(_MSC_VER)
    const unsigned long long saved = _xgetbv(0);
#else
    unsigned lo, hi;
    __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    const unsigned long long saved = lo;
#endif
    cpuid(7, r);
    const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6;
    f.avx2 = ymm && (r[1] >> 5 & 1);
    f.fma = ymm && (c1 >> 12 & 1);
    f.f16c = ymm && (c1 >> 29 & 1);
    const unsigned all = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    f.avx512 = zmm && (r[1] & all) == all;
    const bool tiles = (saved & 0x60000) == 0x60000;
    f.amx = tiles && (r[3] >> 24 & 1) && (r[3] >> 22 & 1);  // AMX-TILE, AMX-BF16
    if (f.amx) {
        cpuid(7, r, 1);
        f.amx = r[0] >> 5 & 1;  // AVX512-BF16
        cpuid(0, r);
        if (r[0] < 0x1d) f.amx = false;
        cpuid(0x1d, r);
        f.amx = f.amx && r[0] >= 1;  // a palette of tiles: some hypervisors have none
    }
#endif
    return f;
}

// ---- distributing work ----

// Below this many FMAs per thread another thread costs more than it saves (waking it, and fetching its
// results): two threads overtake one between 200 and 390 thousand FMAs, 4 to 8 heads of a decode step
// (HACKING.md, "The CPU kernel").
constexpr double MIN_FMAS_PER_THREAD = 150e3;
// Tasks per thread: a slower core then delays the others by at most a quarter of its share.
constexpr int64_t TASKS_PER_THREAD = 4;
constexpr int MAX_THREADS = 256;
// Heads are taken together while their states fit in a small L2: in one token, the rows of neighbouring heads are in
// the same page, while rows of consecutive tokens may be 16 KiB apart. Measured: 0.96 to 1.12 of one head at a time.
constexpr int64_t GROUP_BYTES = int64_t{512} << 10;
// Tokens of one pass over the state (rule.inl.h's C_MAX).
constexpr int64_t SHORT = 6;

// Tasks for several threads. Each thread has the same share on every call, so states stay in its core's cache:
// fetching a state that another core wrote last costs more than computing with it. A thread that finishes early helps
// with the other shares.
class Work {
  public:
    virtual ~Work() = default;
    // Do task i, using `memory`; the same thread will do i + 1 next if that is below `end`. Returns the ISA that ran.
    virtual const char* run(int64_t i, int64_t end, char* memory) const = 0;

    // Memory of the thread that calls.
    int64_t share_of(const char* memory) const { return (memory - workspaces_) / static_cast<int64_t>(workspace_); }

    // Throws only std::bad_alloc, before any task has begun.
    void share_out(int64_t tasks, int threads, size_t workspace, bool share_openmp);

  private:
    struct alignas(64) Share {
        std::atomic<bool> taken{false};
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };
    Share* shares_ = nullptr;
    int threads_ = 1;
    size_t workspace_ = 0;
    char* workspaces_ = nullptr;

    int claim();
    void work();
};

std::atomic<const char*> last_run{""};
std::atomic<int> scratch_byte{-1};

// The share that this thread had last time, if it is free.
int Work::claim() {
    static std::atomic<int> threads_seen{0};
    static thread_local const int preferred = threads_seen.fetch_add(1);
    for (int i = 0; i < threads_; ++i) {
        const int share = (preferred + i) % threads_;
        if (!shares_[share].taken.exchange(true)) return share;
    }
    return -1;  // more threads came than were requested
}

void Work::work() {
    const int mine = claim();
    if (mine < 0) return;
    const FlushSubnormals flushed;
    char* memory = workspaces_ + static_cast<size_t>(mine) * workspace_;
    for (int s = 0; s < threads_; ++s) {
        Share& share = shares_[(mine + s) % threads_];
        for (int64_t i; (i = share.next.fetch_add(1)) < share.end;) {
            if (const int byte = scratch_byte.load(std::memory_order_relaxed); byte >= 0)
                std::memset(memory, byte, workspace_);
            last_run.store(run(i, share.end, memory), std::memory_order_relaxed);
        }
    }
}

// One growing buffer per calling thread; workspaces must be 64-byte aligned.
char* scratch(size_t bytes) {
    static thread_local std::unique_ptr<char[]> memory;
    static thread_local size_t size = 0;
    if (size < bytes + 64) {
        memory.reset();
        size = 0;
        memory.reset(new char[bytes + 64]);
        size = bytes + 64;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    return memory.get() + (64 - address % 64) % 64;
}

void Work::share_out(int64_t tasks, int threads, size_t workspace, bool share_openmp) {
    threads_ = static_cast<int>(std::min<int64_t>({threads, tasks, MAX_THREADS}));
    alignas(Share) char memory[MAX_THREADS * sizeof(Share)];  // every call would clear an array of Share as a whole
    shares_ = reinterpret_cast<Share*>(memory);
    for (int i = 0; i < threads_; ++i)
        new (shares_ + i) Share{{false}, tasks * i / threads_, tasks * (i + 1) / threads_};
    workspace_ = (workspace + 63) / 64 * 64;
    workspaces_ = scratch(workspace_ * static_cast<size_t>(threads_));
    parallel(threads_, share_openmp, [](void* context) { static_cast<Work*>(context)->work(); }, this);
}

int worthwhile(int threads, double fmas) {
    return std::max(1, std::min(threads, static_cast<int>(std::min(fmas / MIN_FMAS_PER_THREAD, 4096.0))));
}

// How many sequences of the greatest length have the same total work.
int64_t alike(const Problem& p) {
    if (!p.cu_seqlens) return p.N;
    int64_t longest = 1;
    for (int64_t n = 0; n < p.N; ++n) longest = std::max(longest, p.cu_seqlens[n + 1] - p.cu_seqlens[n]);
    return std::max<int64_t>(1, p.T / longest);
}

// If there are few heads, columns are distributed too: how many panels of them a task has. Each task prepares its
// tokens again, which takes some 0.2 of the time of a panel (K = 128: 28 of 128 us for 512 tokens). So what counts is
// the thread with the most work: its tasks, each with that preparation and its panels.
int64_t range_of_columns(int64_t heads, int64_t panels, int threads) {
    int64_t best = panels;
    double least = 0;
    for (int64_t range = panels; range > 0; --range) {
        const int64_t tasks = heads * ((panels + range - 1) / range), each = (tasks + threads - 1) / threads;
        const double time = static_cast<double>(each) * (0.2 + static_cast<double>(range));
        if (range == panels || time < least) least = time, best = range;
    }
    return best;
}

// The tasks of the rule: a few heads of one sequence, or a range of columns of one head.
struct RuleWork final : Work {
    const Problem& p;
    const Kernels& kernels;
    int64_t heads;  // per task
    int64_t groups;  // of heads, per sequence
    int64_t split;  // column ranges per head
    int64_t panels_per_range;

    RuleWork(const Problem& problem, const Kernels& k, int64_t together, int64_t ranges, int64_t panels)
        : p(problem),
          kernels(k),
          heads(together),
          groups((p.HV + together - 1) / together),
          split(ranges),
          panels_per_range(panels) {}

    Task task(int64_t i) const {
        const int64_t range = i % split, group = i / split % groups, n = i / split / groups;
        const int64_t width = panels_per_range * kernels.panel, col0 = range * width, hv0 = group * heads;
        return Task{n, hv0, std::min(heads, p.HV - hv0), col0, std::min(width, p.V - col0), nullptr};
    }
    const char* state_of(const Task& t) const {
        const int64_t row = p.state_indices ? p.state_indices[t.n] : t.n;
        if (!p.in.data || row < 0) return nullptr;
        const int64_t size = p.state_dtype == DType::f32 ? 4 : 2;
        return static_cast<const char*>(p.in.data) +
               (row * p.in.n + t.hv0 * p.in.h + t.col0 * (p.vk ? p.in.row : 1)) * size;
    }
    const char* run(int64_t i, int64_t end, char* memory) const override {
        Task t = task(i);
        if (i + 1 < end) t.next_state = state_of(task(i + 1));
        return kernels.run(p, t, memory);
    }
};

// The tasks of the mixer: a few heads of q and k of one sequence.
struct MixerWork final : Work {
    const Mixer& m;
    const Kernels& kernels;
    int64_t heads, groups;

    MixerWork(const Mixer& mixer, const Kernels& k, int64_t together)
        : m(mixer), kernels(k), heads(together), groups((m.rule.H + together - 1) / together) {}

    const char* run(int64_t i, int64_t, char* memory) const override {
        const int64_t h0 = i % groups * heads;
        return kernels.mix(m, MixerTask{i / groups, h0, std::min(heads, m.rule.H - h0)}, memory);
    }
};

// The tasks of the log: the value heads of one q/k head of one sequence, or a range of their columns.
struct LogWork final : Work {
    const Log& g;
    const char* (*kernel)(const Log&, const Task&, char*);
    int64_t split, width;

    LogWork(const Log& log, const char* (*k)(const Log&, const Task&, char*), int64_t ranges, int64_t columns)
        : g(log), kernel(k), split(ranges), width(columns) {}

    Task task(int64_t i) const {
        const Problem& p = g.rule;
        const int64_t col0 = i % split * width, group = i / split, h = group % p.H, values = p.HV / p.H;
        const int64_t cols = std::min(width, p.V - col0);
        return Task{group / p.H, p.tiled ? h : h * values, values, col0, cols, nullptr, p.tiled ? p.H : 1};
    }
    const char* run(int64_t i, int64_t end, char* memory) const override {
        Task t = task(i);
        // whole heads only: a narrow range would prefetch mostly its neighbours' data
        if (i + 1 < end && split == 1) {
            const Problem& p = g.rule;
            const Task after = task(i + 1);
            const int64_t row = p.state_indices[after.n], size = p.state_dtype == DType::f32 ? 4 : 2;
            if (row >= 0)
                t.next_state = static_cast<const char*>(p.in.data) + (row * p.in.n + after.hv0 * p.in.h) * size;
        }
        return kernel(g, t, memory);
    }
};

// The tasks of the backward pass: the value heads of one q/k head of one sequence, or a part of them.
struct BackwardWork final : Work {
    const Backward& g;
    const Kernels& kernels;
    char* kept = nullptr;  // states
    size_t per_thread = 0;  // bytes of states per thread, or 0: each task has its own
    bool keeps_x = false;  // keep x too
    std::vector<int64_t> before, segments_before;  // [N + 1]: spans and segments of the sequences before this one
    size_t state;  // bytes of states that a task keeps per span
    BackwardPass pass = BackwardPass::whole;
    float *starts = nullptr, *d_starts = nullptr;
    int64_t ranges = 1, panels = 0;  // ranges of columns; panels in total

    BackwardWork(const Backward& backward, const Kernels& k)
        : g(backward), kernels(k), state(k.kept_bytes(g.rule, false)) {}

    int64_t tasks() const {
        if (pass == BackwardPass::segment) return segments_before.back() * g.rule.H;
        return g.rule.N * g.rule.H * ranges;
    }
    const char* run(int64_t i, int64_t, char* memory) const override {
        const bool keeps = pass == BackwardPass::whole || pass == BackwardPass::segment;
        BackwardTask task{0, 0, kept, keeps && keeps_x};
        task.pass = pass;
        if (pass == BackwardPass::segment) {
            const int64_t at = i / g.rule.H;
            while (segments_before[static_cast<size_t>(task.n) + 1] <= at) ++task.n;
            task.segment = at - segments_before[static_cast<size_t>(task.n)];
        } else {
            task.n = i / ranges / g.rule.H;
            task.panel0 = panels * (i % ranges) / ranges;
            task.panel1 = ranges > 1 ? panels * (i % ranges + 1) / ranges : INT64_MAX;
        }
        const auto n = static_cast<size_t>(task.n);
        task.h = pass == BackwardPass::segment ? i % g.rule.H : i / ranges % g.rule.H;
        task.row = segments_before[n];
        if (starts) {
            const auto at = (segments_before[n] * g.rule.H + task.h * (segments_before[n + 1] - segments_before[n])) *
                            static_cast<int64_t>(state / 4);
            task.starts = starts + at;
            task.d_starts = d_starts + at;
        }
        if (!keeps) return kernels.differentiate(g, task, memory);
        const auto spans = static_cast<size_t>(before[n] * g.rule.H + task.h * Backward::spans(g.tokens(task.n)));
        task.kept += per_thread ? per_thread * static_cast<size_t>(share_of(memory)) : spans * state;
        return kernels.differentiate(g, task, memory);
    }
};

// How the log's work is divided: q/k heads with their value heads, or, if they are few, ranges of columns.
struct LogShares {
    int threads;
    int64_t split, width;

    LogShares(const Log& g, double fmas, const Kernels& kernels, int most) {
        const Problem& p = g.rule;
        const int64_t groups = std::max<int64_t>(p.N * p.H, 1);
        threads = worthwhile(most, fmas * static_cast<double>(p.HV * p.K * p.V));
        const int64_t panels = (p.V + kernels.panel - 1) / kernels.panel;
        split = threads > 1 && groups < 2 * threads ? std::min(panels, (2 * threads + groups - 1) / groups) : 1;
        width = (panels + split - 1) / split * kernels.panel;
        split = (p.V + width - 1) / width;
    }
    void run(const Log& g, const char* (*kernel)(const Log&, const Task&, char*), const Kernels& kernels,
             bool share_openmp) const {
        if (g.rule.N == 0) return;
        LogWork work(g, kernel, split, width);
        work.share_out(g.rule.N * g.rule.H * split, threads, kernels.log_workspace(g), share_openmp);
    }
};

}  // namespace

const std::vector<const Kernels*>& runnable() {
    static const std::vector<const Kernels*> all = [] {
        std::vector<const Kernels*> v{&kernels_baseline};
#if defined(ANYDELTA_X86)
        const Features f = detect();
#if defined(ANYDELTA_EMULATED_AMX)
        if (f.avx2 && f.fma && f.f16c) v.push_back(&kernels_amx_emulated);
#endif
        if (f.avx2 && f.fma && f.f16c) v.push_back(&kernels_avx2);
        if (f.avx512 && f.avx2 && f.fma && f.f16c) v.push_back(&kernels_avx512);
#if defined(ANYDELTA_AMX)
        if (f.amx && v.back() == &kernels_avx512) v.push_back(&kernels_amx);
#endif
#elif defined(ANYDELTA_ARM64)
        v.push_back(&kernels_neon);
#endif
        return v;
    }();
    return all;
}

namespace {

const Kernels* find(const std::string& name) {
    std::string names;
    for (const Kernels* k : runnable()) {
        if (name == k->name) {
            if (name == "amx" && !tiles_given())
                throw std::invalid_argument(
                    "anydelta: the instruction set amx requires the tile registers; the system does not give them to "
                    "this "
                    "process (a sandbox, or a signal stack of a few KiB). Choose avx512, or unset ANYDELTA_CPU_ISA");
            return k;
        }
        names += (names.empty() ? "" : ", ") + std::string(k->name);
    }
    throw std::invalid_argument("anydelta: the instruction set must be one of " + names + " on this CPU; got '" + name +
                                "'. Correct or unset ANYDELTA_CPU_ISA");
}

// The fastest build whose results keep the contract for all inputs. AMX's do not if updates cancel each other out, so
// it runs by name only (docs/performance.md, "Prefill on AMX").
const Kernels* best() {
    const Kernels* k = nullptr;
    for (const Kernels* each : runnable())
        if (std::string(each->name) != "amx") k = each;
    return k;
}

std::atomic<const Kernels*> choice{nullptr};
std::atomic<long> calls_made{0};

}  // namespace

const Kernels& chosen() {
    const Kernels* k = choice.load(std::memory_order_relaxed);
    if (!k) {
        const char* forced = std::getenv("ANYDELTA_CPU_ISA");
        k = forced && *forced ? find(forced) : best();
        choice.store(k);
    }
    return *k;
}

void choose(const std::string& name) { choice.store(find(name)); }

long calls() { return calls_made.load(); }

void fill_scratch(int byte) { scratch_byte.store(byte); }

void run_chosen(const Problem& p, int threads, bool share_openmp) {
    ++calls_made;
    run(p, chosen(), threads, share_openmp);
}

void run_chosen(const Mixer& m, int threads, bool share_openmp) {
    ++calls_made;
    run(m, chosen(), threads, share_openmp);
}

std::string last_isa() { return last_run.load(std::memory_order_relaxed); }

std::vector<std::string> cpu_features() {
    std::vector<std::string> names;
    const Features f = detect();
    if (f.avx2) names.push_back("avx2");
    if (f.fma) names.push_back("fma");
    if (f.f16c) names.push_back("f16c");
    if (f.avx512) names.push_back("avx512f/bw/dq/vl");
    if (f.amx) names.push_back("amx-tile/bf16");
#if defined(ANYDELTA_ARM64)
    names.push_back("neon");
#endif
    return names;
}

namespace {
// Nothing to do: no token, and no final state to write. A loop over the heads, of any number, would be useless.
bool nothing_to_do(const Problem& p) { return p.T == 0 && !(p.out.data && p.out_dense); }
}  // namespace

void run(const Problem& p, const Kernels& kernels, int threads, bool share_openmp) {
    const int64_t heads = p.N * p.HV;
    if (heads == 0 || nothing_to_do(p)) return;
    const double tokens = p.cu_seqlens ? static_cast<double>(p.T) : static_cast<double>(p.B * p.T);
    const double fmas = 3.0 * tokens * static_cast<double>(p.HV * p.K * p.V);
    threads = worthwhile(threads, fmas);

    const int64_t panels = (p.V + kernels.panel - 1) / kernels.panel;
    const int64_t wanted = threads > 1 ? TASKS_PER_THREAD * threads : 1;
    const int64_t panels_per_range = heads < wanted ? range_of_columns(p.HV * alike(p), panels, threads) : panels;
    const int64_t split = (panels + panels_per_range - 1) / panels_per_range;
    const int64_t fit = std::min(MAX_HEADS, GROUP_BYTES / (p.K * panels * kernels.panel * 4));
    const int64_t together = std::max<int64_t>(1, std::min({fit, heads / wanted, p.HV}));
    RuleWork work(p, kernels, together, split, panels_per_range);
    work.share_out(p.N * work.groups * split, threads, kernels.workspace(p, together), share_openmp);
}

void run(const Mixer& m, const Kernels& kernels, int threads, bool share_openmp) {
    const Problem& p = m.rule;
    if (p.N * p.H == 0 || nothing_to_do(p)) return;
    const double tokens = p.cu_seqlens ? static_cast<double>(p.T) : static_cast<double>(p.B * p.T);
    // the rule, plus convolution, activation and norm: some 8 FMAs' time per number of q, k, v and o
    const double per_token =
        3.0 * static_cast<double>(p.HV * p.K * p.V) + 16.0 * static_cast<double>(p.H * p.K + p.HV * p.V);
    threads = worthwhile(threads, tokens * per_token);
    const int64_t wanted = threads > 1 ? TASKS_PER_THREAD * threads : 1;
    const int64_t values = p.HV / p.H;  // per head of q and k
    const int64_t panels = (p.V + kernels.panel - 1) / kernels.panel;
    const int64_t fit = std::min(MAX_HEADS, GROUP_BYTES / (p.K * panels * kernels.panel * 4)) / values;
    // Long sequences run head by head, so that a head's scratch rows (48 KiB of q and k at K = 128) and state stay in
    // a core's cache: 1.03 to 1.05 of two heads at a time, although each row's page is then visited once more.
    const int64_t longest = p.T <= SHORT ? fit : 1;
    const int64_t together = std::max<int64_t>(1, std::min({longest, p.N * p.H / wanted, p.H}));
    MixerWork work(m, kernels, together);
    work.share_out(p.N * work.groups, threads, kernels.mixer_workspace(m, together), share_openmp);
}

void verify(const Log& g, const Kernels& kernels, int threads, bool share_openmp) {
    const Problem& p = g.rule;
    const double tokens = p.cu_seqlens ? static_cast<double>(p.T) : static_cast<double>(p.B * p.T);
    double entries = 0;
    for (int64_t n = 0; g.folds && n < p.N; ++n) entries += static_cast<double>(g.folds[n] * g.used[n]);
    const LogShares shares(g, 2.0 * tokens + entries, kernels, threads);
    if (shares.split == 1 || entries == 0) return shares.run(g, kernels.verify, kernels, share_openmp);
    // Another range of columns could replace keys and decays before they are read: fold first.
    Log first = g, then = g;
    std::vector<int64_t> folded(static_cast<size_t>(p.N)), left(static_cast<size_t>(p.N));
    for (int64_t n = 0; n < p.N; ++n) {
        folded[static_cast<size_t>(n)] = g.folds[n] * g.used[n];
        left[static_cast<size_t>(n)] = g.used[n] - g.folds[n] * g.used[n];
    }
    first.used = folded.data();
    first.rule.out = p.in;
    first.out_rows = p.state_indices;
    then.used = left.data();
    then.folds = nullptr;
    shares.run(first, kernels.fold, kernels, share_openmp);  // allocates for both
    shares.run(then, kernels.verify, kernels, share_openmp);
}

void fold(const Log& g, const Kernels& kernels, int threads, bool share_openmp) {
    double entries = 0;
    for (int64_t n = 0; n < g.rule.N; ++n) entries += static_cast<double>(g.used[n]);
    LogShares(g, entries, kernels, threads).run(g, kernels.fold, kernels, share_openmp);
}

namespace {
// Memory at a multiple of 64.
struct Aligned {
    std::unique_ptr<char[]> memory;
    char* data;
    explicit Aligned(size_t bytes)
        : memory(new char[bytes + 64]),
          data(memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64) {}
};

// Add the contributions of each sequence's segments, last to first, to its row.
void add_up(const std::vector<float>& parts, float* to, int64_t width, const BackwardWork& work) {
    for (int64_t n = 0; to && n < work.g.rule.N; ++n, to += width) {
        std::fill(to, to + width, 0.0f);
        const auto i = static_cast<size_t>(n);
        for (int64_t s = work.segments_before[i + 1] - 1; s >= work.segments_before[i]; --s)
            for (int64_t j = 0; j < width; ++j) to[j] += parts[static_cast<size_t>(s * width + j)];
    }
}
}  // namespace

size_t differentiate(Backward g, const Kernels& kernels, int threads, bool share_openmp) {
    const Problem& p = g.rule;
    if (p.N * p.H == 0) return 0;
    BackwardWork work(g, kernels);
    int64_t spans = 0, segments = 0;
    for (int64_t n = 0; n < p.N; ++n) {
        work.before.push_back(spans);
        work.segments_before.push_back(segments);
        spans += Backward::spans(g.tokens(n));
        segments += Backward::segments(g.tokens(n));
        g.longest = std::max(g.longest, g.tokens(n));
    }
    work.segments_before.push_back(segments);
    // FMAs of backward.inl.h: 2 products of a state per token forward, most of which run twice, and 6 backward. The
    // mixer has one more.
    const double tokens = p.cu_seqlens ? static_cast<double>(p.T) : static_cast<double>(p.B * p.T);
    threads = std::min(worthwhile(threads, 10.0 * tokens * static_cast<double>(p.HV * p.K * p.V)), MAX_THREADS);
    // If at least half of the threads would be idle: three passes with segments as tasks, 15 products instead of 10.
    // Not for the mixer, whose norm needs whole rows of o.
    const int64_t heads = p.N * p.H;
    const size_t all = static_cast<size_t>(spans * p.H) * work.state,
                 ends = static_cast<size_t>(segments * p.H) * work.state;
    // as many threads as memory allows beside the segments' states
    const auto fit = static_cast<int64_t>((all - std::min(all, 2 * ends)) / (Backward::SEGMENT * work.state));
    const bool split = !g.mixer && threads >= 2 * heads && std::min<int64_t>(fit, threads) >= 2 * heads;
    const int most = threads;
    threads = static_cast<int>(std::min<int64_t>(threads, split ? std::min(segments * p.H, fit) : heads));
    // Memory for the longest sequence, or a segment, in each thread; with x if both need no more than one state per
    // span and head. Or, if that is less, memory for every task.
    const int64_t longest = split ? Backward::SEGMENT : Backward::spans(g.longest);
    const auto room = [&](bool x) {
        return static_cast<size_t>(longest) * kernels.kept_bytes(p, x) * static_cast<size_t>(threads);
    };
    work.keeps_x = room(true) + (split ? 2 * ends : 0) <= all;
    size_t bytes = split ? room(work.keeps_x) : std::min(room(work.keeps_x), all);
    const size_t workspace = kernels.backward_workspace(g);
    work.per_thread = split || bytes < all || work.keeps_x ? bytes / static_cast<size_t>(threads) : 0;
    const Aligned kept(bytes);
    work.kept = kept.data;
    const int64_t wide = p.HV * (p.kda ? p.K : 1);
    std::vector<float> A_log(static_cast<size_t>(g.d_A_log ? segments * p.HV : 0));
    std::vector<float> dt_bias(static_cast<size_t>(g.d_dt_bias ? segments * wide : 0));
    float *const to_A_log = g.d_A_log, *const to_dt_bias = g.d_dt_bias;
    if (g.d_A_log) g.d_A_log = A_log.data();
    if (g.d_dt_bias) g.d_dt_bias = dt_bias.data();
    const auto pass = [&](BackwardPass which, int with) {
        work.pass = which;
        work.share_out(work.tasks(), with, workspace, share_openmp);
    };
    if (split) {
        const Aligned starts(ends), d_starts(ends);
        work.starts = reinterpret_cast<float*>(starts.data);
        work.d_starts = reinterpret_cast<float*>(d_starts.data);
        work.panels = (p.V + kernels.panel - 1) / kernels.panel;
        work.ranges = std::min(work.panels, (most + heads - 1) / heads);
        // these two keep no states in the threads, so more threads may run
        const auto with = static_cast<int>(std::min<int64_t>(most, heads * work.ranges));
        pass(BackwardPass::states, with);
        pass(BackwardPass::d_states, with);
        work.ranges = 1;
        pass(BackwardPass::segment, threads);
        bytes += 2 * ends;
        threads = std::max(threads, with);
    } else {
        pass(BackwardPass::whole, threads);
    }
    add_up(A_log, to_A_log, p.HV, work);
    add_up(dt_bias, to_dt_bias, wide, work);
    return bytes + workspace * static_cast<size_t>(threads);
}

// ---- limits ----

double fma_peak(const Kernels& kernels, int threads, double seconds) {
    struct Measure {
        const Kernels& kernels;
        std::chrono::steady_clock::time_point end;
        std::atomic<int64_t> flops{0};
    };
    const auto start = std::chrono::steady_clock::now();
    Measure m{kernels, start + std::chrono::microseconds(static_cast<int64_t>(seconds * 1e6))};
    parallel(
        threads, true,
        [](void* context) {
            Measure& m = *static_cast<Measure*>(context);
            double flops = 0;
            while (std::chrono::steady_clock::now() < m.end) flops += m.kernels.fma_loop(10000);
            m.flops += static_cast<int64_t>(flops);
        },
        &m);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    return static_cast<double>(m.flops.load()) / took.count() / 1e9;
}

double copy_bandwidth(int threads, int mib) {
    struct Measure {
        char *from, *to;
        size_t piece;
        std::atomic<int> next{0};
        int pieces;
    };
    const size_t bytes = static_cast<size_t>(mib) << 20;
    std::unique_ptr<char[]> from(new char[bytes]), to(new char[bytes]);
    std::memset(from.get(), 1, bytes);
    std::memset(to.get(), 2, bytes);
    double best = 0;
    for (int repeat = 0; repeat < 3; ++repeat) {
        Measure m{from.get(), to.get(), bytes / static_cast<size_t>(threads), {0}, threads};
        const auto start = std::chrono::steady_clock::now();
        parallel(
            threads, true,
            [](void* context) {
                Measure& m = *static_cast<Measure*>(context);
                for (int i; (i = m.next.fetch_add(1)) < m.pieces;)
                    std::memcpy(m.to + static_cast<size_t>(i) * m.piece, m.from + static_cast<size_t>(i) * m.piece,
                                m.piece);
            },
            &m);
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        best = std::max(best, 2.0 * static_cast<double>(bytes) / took.count() / 1e9);
    }
    return best;
}

}  // namespace anydelta
