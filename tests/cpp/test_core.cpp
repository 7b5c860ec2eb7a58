// Drives anydelta::run, without Python, on every instruction set that is linked and that this machine can run, and
// compares it with the recurrence in float64 of rule.h. Runs under ASan + UBSan, TSan and qemu: see targets.mk.
//
//     test_core [--share I/N] [--only WORD] [--skip NAME]
//
// runs every Nth random case from the Ith on, and of the tests those whose name has WORD, but not NAME.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "flush.h"
#include "host.h"
#include "mixer.h"
#include "probe.h"
#include "rule.h"
#include "threads.h"

namespace anydelta {
extern const Kernels kernels_avx512_emulated;
extern const Kernels kernels_amx_emulated_avx512;
}  // namespace anydelta

// Makes allocations of this thread fail, to see that run() has then written nothing.
static thread_local bool allocations_fail = false;
void* operator new[](std::size_t size) {
    if (allocations_fail) throw std::bad_alloc();
    if (void* p = std::malloc(size ? size : 1)) return p;
    throw std::bad_alloc();
}
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }

namespace {

using namespace anydelta;
using namespace anydelta::tests;

void on_crash(int signal) {
    const auto say = [](const char* text) { (void)!write(1, text, std::strlen(text)); };
    say("FAIL  the process received a fatal signal: memory outside an array was read or written\n      in ");
    say(context);
    say("\n");
    _exit(128 + signal);
}

struct Isa {
    const Kernels* kernels;
    const Probe* probe;
};

std::vector<Isa> isas() {
    std::vector<Isa> all;
    for (const Kernels* k : runnable()) {
        const std::string name = k->name;
        const Kernels& before = chosen();
        try {
            choose(name);  // asks the system for what it needs
        } catch (const std::invalid_argument& refused) {
            std::printf("%s\n", refused.what());
            continue;
        }
        choose(before.name);
        const Probe* probe = &probe_baseline;
#if defined(__x86_64__)
        if (name == "avx2" || name == "amx_emulated") probe = &probe_avx2;
        if (name == "avx512" || name == "amx") probe = &probe_avx512;
#elif defined(__aarch64__)
        if (name == "neon") probe = &probe_neon;
#endif
        all.push_back({k, probe});
    }
#if defined(ANYDELTA_EMULATED_AVX512)
    for (const Kernels* k : runnable())
        if (std::string(k->name) == "avx2") all.push_back({&kernels_avx512_emulated, &probe_avx512_emulated});
#endif
    return all;
}

void drive(const Case& c, const std::vector<Isa>& all) {
    const std::unique_ptr<Call> call = make_call(c);
    Call& x = *call;
    const auto e = expect(x);
    const Allowed w = what_may_be_written(x, e);
    for (const Isa& isa : all) {
        const Kernels& kernels = *isa.kernels;
        std::snprintf(context, sizeof context, "%s: %s", kernels.name, c.text().c_str());
        x.restore();
        run(x.p, kernels, 1, false);
        check_strays(x, w);
        compare(x, e);
        const Results one = results_of(x);
        for (const int threads : {2, 3, 7}) {
            x.restore();
            run(x.p, kernels, threads, false);
            check(results_of(x) == one, "%d threads and 1 differ", threads);
        }
        for (const int64_t size : {1, 3}) {
            x.restore();
            run_tasks(x.p, kernels, size, size);
            check_strays(x, w);
            check(results_of(x) == one, "tasks of %" PRId64 " heads and panels differ from one thread's", size);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// tests

// Deals the values of an axis in a random order, each as often as the others.
template <class T>
class Deck {
  public:
    Deck(std::vector<T> values) : values_(std::move(values)) {}
    T draw(Random& r) {
        if (left_.empty()) left_ = values_;
        const auto i = static_cast<size_t>(r.below(static_cast<int64_t>(left_.size())));
        const T x = left_[i];
        left_.erase(left_.begin() + static_cast<std::ptrdiff_t>(i));
        return x;
    }

  private:
    std::vector<T> values_, left_;
};

std::vector<Case> random_cases(int count) {
    Random r{2024};
    const std::vector<int64_t> sizes{1, 7, 16, 32, 33, 64, 80, 96, 128, 130, 256, 300};
    Deck<int64_t> T({0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 48, 49, 100}), K(sizes), V(sizes),
        Ks({0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 17});
    Deck<int> group({1, 1, 2, 3}), heads({1, 1, 2, 3}), batch({1, 1, 1, 2, 3}), shape({0, 0, 0, 1, 2, 3}),
        memory({0, 0, 1, 2, 3});
    Deck<bool> kda({true, false}), tiled({true, false}), vk({true, false}), logit({true, false, false}),
        l2norm({true, false}), in_place({true, false}), strided({true, false}), bf16_state({true, false, false}),
        half_gates({true, false, false}), bias({true, true, false});
    Deck<Decay> decay({Decay::log, Decay::log, Decay::linear, Decay::raw, Decay::raw});
    Deck<DType> dtype({DType::f32, DType::f32, DType::bf16, DType::f16});
    Deck<Mask> mask({Mask::none, Mask::none, Mask::none, Mask::none, Mask::none, Mask::left, Mask::random, Mask::random,
                     Mask::all, Mask::single, Mask::tail});
    std::vector<Case> cases;
    for (int i = 0; i < count; ++i) {
        Case c;
        c.seed = static_cast<uint64_t>(i) + 1;
        c.T = T.draw(r);
        c.K = K.draw(r);
        c.V = V.draw(r);
        c.Ks = Ks.draw(r);
        c.H = heads.draw(r);
        c.HV = c.H * group.draw(r);
        c.B = batch.draw(r);
        c.kda = kda.draw(r);
        c.tiled = tiled.draw(r);
        c.vk = vk.draw(r);
        c.logit = logit.draw(r);
        c.l2norm = l2norm.draw(r);
        c.in_place = in_place.draw(r);
        c.strided = strided.draw(r);
        c.decay = decay.draw(r);
        c.lower_bound = c.decay == Decay::raw && r.chance(0.5);
        c.dt_bias = bias.draw(r);
        c.dtype = dtype.draw(r);
        c.gates = half_gates.draw(r) ? (r.chance(0.5) ? DType::bf16 : DType::f16) : DType::f32;
        c.state = bf16_state.draw(r) ? DType::bf16 : DType::f32;
        c.mask = mask.draw(r);
        const int s = shape.draw(r);
        if (s == 1 || s == 2) {  // packed
            c.B = 1;
            c.packed = 1 + r.below(5);
        }
        if (s >= 2) c.pool = 1 + r.below(3);
        if (!c.in_place) {
            const int m = memory.draw(r);
            c.no_state_in = m == 1 || m == 3;
            c.no_state_out = m == 2 || m == 3;
        }
        static const double lows[] = {-1, -0.05, -20, -3}, highs[] = {-0.001, 0, -0.5, 0};
        const auto range = static_cast<size_t>(r.below(4));
        c.g_low = lows[range];
        c.g_high = highs[range];
        c.beta_high = r.chance(0.3) ? 1.9 : 1;
        // Enough work for several threads at times, without a few giants eating the budget.
        while (c.B * c.T * c.HV * c.K * c.V > 1500000 && (c.HV > c.H || c.B > 1 || c.H > 1)) {
            if (c.B > 1)
                c.B -= 1;
            else if (c.HV > c.H)
                c.HV = c.H;
            else
                c.H -= 1, c.HV = c.H;
        }
        while (c.Ks > 1 && c.Ks * (c.packed ? c.packed : c.B) * c.HV * c.K * c.V > 1500000) c.Ks /= 2;
        c.scattered = c.pool && c.in_place && c.Ks && i % 2 == 0;
        cases.push_back(c);
    }
    return cases;
}

int share_index = 0, share_count = 1;

void test_random_cases(const std::vector<Isa>& all) {
    const std::vector<Case> cases = random_cases(460);
    for (size_t i = static_cast<size_t>(share_index); i < cases.size(); i += static_cast<size_t>(share_count))
        drive(cases[i], all);
}

// Chosen ones: each once went wrong, or stands at an edge of the three regimes.
void test_chosen_cases(const std::vector<Isa>& all) {
    std::vector<Case> cases;
    const auto add = [&](auto change) {
        Case c;
        c.H = 2, c.HV = 4, c.K = 64, c.V = 64;
        change(c);
        c.seed = 1000 + cases.size();
        cases.push_back(c);
    };
    // decode and short blocks on several threads: a range of columns of a head need not end at a whole panel
    for (const bool vk : {false, true})
        for (const DType state : {DType::f32, DType::bf16})
            for (const int64_t V : {130, 200})
                add([&](Case& c) { c.T = 6, c.HV = 6, c.K = 96, c.V = V, c.vk = vk, c.state = state; });
    for (const bool vk : {false, true})
        for (const int64_t V : {128, 130})
            add([&](Case& c) { c.T = 4, c.HV = 8, c.K = 96, c.V = V, c.vk = vk, c.Ks = 4; });
    // snapshots that reach back over several blocks and batches of blocks
    for (const int64_t T : {49, 54, 97}) add([&](Case& c) { c.T = T, c.Ks = 53; });
    add([](Case& c) { c.T = 60, c.Ks = 60, c.mask = Mask::random, c.vk = true, c.state = DType::bf16; });
    // long memory, and forgetting within a token
    add([](Case& c) { c.T = 100, c.g_low = -1e-6, c.g_high = 0; });
    add([](Case& c) { c.T = 100, c.kda = true, c.g_low = -1e4, c.g_high = 0; });
    add([](Case& c) { c.T = 20, c.g_low = -1e4, c.g_high = -1e4; });
    add([](Case& c) { c.T = 20, c.kda = true, c.g_low = -88.5, c.g_high = -86; });
    // big and small keys
    add([](Case& c) { c.T = 30, c.key_size = 100; });
    add([](Case& c) { c.T = 30, c.key_size = 1e-3; });
    for (const double size : {1e-12, 1e-2, 1e8, 1e17})
        add([&](Case& c) { c.T = 30, c.key_size = size, c.l2norm = true; });
    add([](Case& c) { c.T = 30, c.key_size = 1e17, c.l2norm = true, c.kda = true, c.K = 300; });
    // beta up to 2: reflections
    add([](Case& c) { c.T = 100, c.beta_high = 2; });
    for (const Case& c : cases) drive(c, all);
}

// No bit of a result depends on what the scratch memory held: zeros, NaN, or numbers of 1e-12. Gates above 0 too, with which
// numbers overflow that are multiplied with the zeros beyond the last channel.
void test_scratch(const std::vector<Isa>& all) {
    Random r{63};
    std::vector<Case> cases = random_cases(40);
    for (int i = 0; i < 60; ++i) {
        Case c;
        c.seed = static_cast<uint64_t>(5000 + i);
        c.K = 63, c.V = 12, c.T = 1 + r.below(60), c.H = 1, c.HV = 2, c.Ks = r.below(8);
        c.vk = !r.chance(0.2), c.kda = r.chance(0.5), c.l2norm = r.chance(0.5), c.in_place = r.chance(0.5);
        c.state = r.chance(0.8) ? DType::bf16 : DType::f32, c.gates = DType::f16;
        c.mask = r.chance(0.3) ? Mask::random : Mask::none;
        c.g_low = -1, c.g_high = r.chance(0.5) ? 1 : 100;
        cases.push_back(c);
    }
    for (const Case& c : cases) {
        const std::unique_ptr<Call> call = make_call(c);
        for (const Isa& isa : all) {
            std::snprintf(context, sizeof context, "%s: scratch of %s", isa.kernels->name, c.text().c_str());
            Results first;
            for (const int fill : {0x00, 0xff, 0x2b}) {
                call->restore();
                run_tasks(call->p, *isa.kernels, 2, 1, fill);
                if (fill == 0x00)
                    first = results_of(*call);
                else
                    check(results_of(*call) == first, "results differ from those with zeros in the scratch memory");
            }
        }
    }
}

// The emulated tiles of AMX compute what the CPU's do, bit for bit.
void test_emulated_tiles(const std::vector<Isa>& all) {
#if defined(ANYDELTA_AMX)
    const Kernels* amx = nullptr;
    for (const Isa& isa : all)
        if (std::string(isa.kernels->name) == "amx") amx = isa.kernels;
    if (!amx) return void(std::printf("      no AMX here: emulated tiles are compared with the oracle alone\n"));
    std::vector<Case> cases = random_cases(200);
    for (Case& c : cases) {
        if (c.kda || c.T < 40) c.T = 40 + c.T, c.kda = false;
        const std::unique_ptr<Call> call = make_call(c);
        std::snprintf(context, sizeof context, "emulated tiles: %s", c.text().c_str());
        run(call->p, *amx, 1, false);
        const Results real = results_of(*call);
        call->restore();
        run(call->p, kernels_amx_emulated_avx512, 1, false);
        check(results_of(*call) == real, "the emulated and the real tiles differ");
    }
#else
    (void)all;
#endif
}

void forget_rounding_errors() { worst_nmse = worst_half = 0; }

// Gates and keys at their limits, in closed form.
void test_limits(const std::vector<Isa>& all) {
    for (const Isa& isa : all)
        for (const bool kda : {false, true})
            for (const bool vk : {false, true})
                for (const int64_t T : {1, 5, 20}) {
                    Case c;
                    c.T = T, c.H = c.HV = 2, c.K = 33, c.V = 40, c.kda = kda, c.vk = vk, c.seed = 5;
                    if (vk) c.K = 64;
                    const std::unique_ptr<Call> call = make_call(c);
                    Call& x = *call;
                    const auto fill = [&](Array& a, double value) {
                        for (int64_t t = 0; t < c.T; ++t)
                            for (int64_t h = 0; h < a.dims[2]; ++h)
                                for (int64_t i = 0; i < (a.dims.size() == 4 ? a.dims[3] : 1); ++i)
                                    a.set(value, 0, t, h, i);
                    };
                    const auto go = [&](const char* what) {
                        std::snprintf(context, sizeof context, "%s: %s: %s", isa.kernels->name, what, c.text().c_str());
                        run(x.p, *isa.kernels, 1, false);
                        bool finite = true;
                        for (int64_t t = 0; t < c.T; ++t)
                            for (int64_t h = 0; h < c.HV; ++h)
                                for (int64_t j = 0; j < c.V; ++j) finite &= std::isfinite(x.o.get(0, t, h, j));
                        for (int64_t h = 0; h < c.HV; ++h)
                            for (int64_t i = 0; i < x.state_in.dims[2]; ++i)
                                for (int64_t j = 0; j < x.state_in.dims[3]; ++j)
                                    finite &= std::isfinite(x.state_in.get(0, h, i, j));
                        check(finite, "o or the state is not finite");
                    };
                    const auto state_is = [&](bool old) {
                        bool same = true;
                        for (size_t i = 0; i < x.state_in.memory->size(); i += 4) {
                            float now, before;
                            std::memcpy(&now, x.state_in.data() + i, 4);
                            std::memcpy(&before, x.state_in.before.data() + i, 4);
                            same &= now == (old ? before : 0.0f);
                        }
                        return same;
                    };
                    // g = 0 and zero keys, or beta = 0: the state stays, bit for bit
                    fill(x.g, 0);
                    fill(x.k, 0);
                    go("g = 0, k = 0");
                    check(state_is(true), "the state changed");
                    x.restore();
                    fill(x.g, 0);
                    fill(x.beta, 0);
                    go("g = 0, beta = 0");
                    check(state_is(true), "the state changed");
                    // g = -1e4 or -inf: the state is gone after one token, and nothing is NaN
                    for (const double g : {-1e4, -HUGE_VAL}) {
                        x.restore();
                        fill(x.g, g);
                        fill(x.beta, 0);
                        go("g = -1e4 or -inf, beta = 0");
                        check(state_is(false), "the state is not zero");
                        x.restore();
                        fill(x.g, g);
                        fill(x.beta, 1);
                        const auto e = expect(x);
                        go("g = -1e4 or -inf, beta = 1");
                        compare(x, e);
                    }
                    // beta = 1 and 2, g = 0
                    for (const double beta : {1.0, 2.0}) {
                        x.restore();
                        fill(x.g, 0);
                        fill(x.beta, beta);
                        const auto e = expect(x);
                        go("g = 0, beta = 1 or 2");
                        compare(x, e);
                    }
                }
}

// A NaN or an infinity spoils what depends on it and nothing else.
void test_nan_stays(const std::vector<Isa>& all) {
    for (const Isa& isa : all)
        for (const bool vk : {false, true})
            for (const int64_t T : {1, 4, 30})
                for (const int64_t Ks : {0, 3}) {
                    // a chunk with a number that is not finite goes through the blocks, which round otherwise
                    const double slack = std::string(isa.kernels->name).rfind("amx", 0) == 0 ? 1e-3 : 0;
                    Case c;
                    c.B = 2, c.T = T, c.H = 2, c.HV = 4, c.K = 64, c.V = 72, c.vk = vk, c.Ks = Ks, c.seed = 9;
                    const std::unique_ptr<Call> call = make_call(c);
                    Call& x = *call;
                    std::snprintf(context, sizeof context, "%s: NaN: %s", isa.kernels->name, c.text().c_str());
                    run(x.p, *isa.kernels, 1, false);
                    std::vector<double> o, s;
                    for (int64_t b = 0; b < c.B; ++b)
                        for (int64_t h = 0; h < c.HV; ++h) {
                            for (int64_t t = 0; t < c.T; ++t)
                                for (int64_t j = 0; j < c.V; ++j) o.push_back(x.o.get(b, t, h, j));
                            for (int64_t i = 0; i < x.state_in.dims[2]; ++i)
                                for (int64_t j = 0; j < x.state_in.dims[3]; ++j)
                                    s.push_back(x.state_in.get(b, h, i, j));
                        }
                    // `spoilt(b, hv, column)`: may be NaN now; all else must be as before
                    const auto run_spoilt = [&](const char* what, auto spoilt) {
                        std::snprintf(context, sizeof context, "%s: %s: %s", isa.kernels->name, what, c.text().c_str());
                        run(x.p, *isa.kernels, 1, false);
                        size_t at_o = 0, at_s = 0;
                        int64_t wrong = 0, nan = 0;
                        for (int64_t b = 0; b < c.B; ++b)
                            for (int64_t h = 0; h < c.HV; ++h) {
                                for (int64_t t = 0; t < c.T; ++t)
                                    for (int64_t j = 0; j < c.V; ++j, ++at_o) {
                                        const double y = x.o.get(b, t, h, j);
                                        if (!spoilt(b, h, j))
                                            wrong += !(std::fabs(y - o[at_o]) <= slack);
                                        else
                                            nan += std::isnan(y);
                                    }
                                for (int64_t i = 0; i < x.state_in.dims[2]; ++i)
                                    for (int64_t j = 0; j < x.state_in.dims[3]; ++j, ++at_s) {
                                        const double y = x.state_in.get(b, h, i, j);
                                        if (!spoilt(b, h, vk ? i : j))
                                            wrong += !(std::fabs(y - s[at_s]) <= slack);
                                        else
                                            nan += std::isnan(y);
                                    }
                            }
                        check(wrong == 0, "%" PRId64 " elements changed that do not depend on it", wrong);
                        check(nan > 0, "it vanished: nothing became NaN");
                    };
                    const int64_t last = c.T - 1;
                    x.restore();
                    x.v.set(NAN, 1, last, 2, 40);
                    run_spoilt("NaN in v", [](int64_t b, int64_t h, int64_t j) { return b == 1 && h == 2 && j == 40; });
                    x.restore();
                    x.k.set(NAN, 0, last, 1, 7);
                    run_spoilt("NaN in k", [](int64_t b, int64_t h, int64_t) { return b == 0 && h >= 2; });
                    x.restore();
                    x.q.set(HUGE_VAL, 0, last, 1, 7);
                    x.q.set(-HUGE_VAL, 0, last, 1, 8);
                    x.state_in.set(NAN, 0, 2, 1, 1);
                    run_spoilt("infinity in q", [](int64_t b, int64_t h, int64_t) { return b == 0 && h >= 2; });
                    x.restore();
                    x.beta.set(NAN, 1, last, 3);
                    run_spoilt("NaN in beta", [](int64_t b, int64_t h, int64_t) { return b == 1 && h == 3; });
                    x.restore();
                    x.g.set(NAN, 1, last, 3);
                    run_spoilt("NaN in g", [](int64_t b, int64_t h, int64_t) { return b == 1 && h == 3; });
                    x.restore();
                    x.state_in.set(NAN, 1, 0, 5, 5);
                    run_spoilt("NaN in the state",
                               [](int64_t b, int64_t h, int64_t j) { return b == 1 && h == 0 && j == 5; });
                }
}

// ---- elementary functions ----

struct Worst {
    double error = 0, at = 0;
};
// Largest |got - exact| / max(|exact|, floor) in units of 2^-24 (half a float32 ulp is 0.5 to 1 of them).
Worst worst_error(void (*f)(const float*, float*, int64_t), double (*exact)(double), double lo, double hi,
                  double floor) {
    constexpr int64_t n = 1 << 14;
    std::vector<float> x(n), y(n);
    Worst worst;
    for (int round = 0; round < (share_count > 1 ? 2 : 8); ++round) {
        for (int64_t i = 0; i < n; ++i) {
            const double t = (static_cast<double>(i) + round / 8.0) / (n - 1);
            // evenly spaced, and evenly spaced in magnitude down to 1e-10
            x[static_cast<size_t>(i)] = static_cast<float>(
                round % 2 ? lo + (hi - lo) * std::fmin(t, 1) : (i % 2 ? lo : hi) * std::pow(10, -10 * std::fmin(t, 1)));
        }
        f(x.data(), y.data(), n);
        for (size_t i = 0; i < x.size(); ++i) {
            const double want = exact(static_cast<double>(x[i]));
            const double error =
                std::fabs(static_cast<double>(y[i]) - want) / std::fmax(std::fabs(want), floor) * 0x1p24;
            if (!(error <= worst.error)) worst = {error, static_cast<double>(x[i])};
        }
    }
    return worst;
}

void test_elementary_functions(const std::vector<Isa>& all) {
    for (const Isa& isa : all) {
        const Probe& f = *isa.probe;
        std::snprintf(context, sizeof context, "%s: elementary functions", isa.kernels->name);
        const auto bounded = [&](const char* name, Worst w, double limit) {
            check(w.error <= limit, "%s(%.9g): error %.3g * 2^-24 > %.3g", name, w.at, w.error, limit);
            std::printf("      %-18s %-9s error <= %.2f * 2^-24\n", isa.kernels->name, name, w.error);
        };
        // Relative errors. Below exp(-87.33) = 2^-126 results are flushed to zero, so there the error is absolute.
        const double floor = std::exp(-87.33);
        bounded("exp", worst_error(f.exp, [](double x) { return std::exp(x); }, -87.3, 0, floor), 3);
        bounded("exp", worst_error(f.exp, [](double x) { return std::exp(x); }, 0, 88, floor), 3);
        bounded("sigmoid", worst_error(f.sigmoid, sigmoid, -87, 30, floor), 6);
        bounded("softplus", worst_error(f.softplus, softplus, -87, 100, floor), 6);
        bounded("silu", worst_error(f.silu, [](double x) { return x * sigmoid(x); }, -87, 100, floor), 6);

        const float inf = HUGE_VALF;
        std::vector<float> x(16), y(16);
        const auto one = [&](void (*function)(const float*, float*, int64_t), float value) {
            std::fill(x.begin(), x.end(), value);
            function(x.data(), y.data(), 16);
            return y[0];
        };
        check(one(f.exp, 0) == 1 && one(f.exp, -0.0f) == 1, "exp(0) is %g", static_cast<double>(one(f.exp, 0)));
        for (const float low : {-87.34f, -100.0f, -1e4f, -1e30f, -inf})
            check(one(f.exp, low) == 0, "exp(%g) is %g", static_cast<double>(low),
                  static_cast<double>(one(f.exp, low)));
        check(one(f.exp, 88) > 1.6e38f && std::isfinite(one(f.exp, 1000)), "exp(88), exp(1000)");
        check(one(f.sigmoid, 0) == 0.5f, "sigmoid(0)");
        check(one(f.sigmoid, inf) == 1 && one(f.sigmoid, -inf) == 0, "sigmoid(+-inf)");
        check(one(f.sigmoid, 1e30f) == 1 && one(f.sigmoid, -1e30f) == 0, "sigmoid(+-1e30)");
        check(one(f.softplus, -inf) == 0 && one(f.softplus, -1e30f) == 0, "softplus(-inf)");
        check(one(f.softplus, 1e30f) == 1e30f && one(f.softplus, 50) == 50, "softplus(50), softplus(1e30)");
        check(one(f.softplus, inf) == inf, "softplus(inf) is %g", static_cast<double>(one(f.softplus, inf)));
        check(one(f.silu, 0) == 0 && one(f.silu, 1e30f) == 1e30f, "silu(0), silu(1e30)");
        check(std::fabs(one(f.silu, -1e3f)) < 1e-34, "silu(-1000) is %g", static_cast<double>(one(f.silu, -1e3f)));
        for (auto function : {f.exp, f.sigmoid, f.softplus, f.silu})
            check(std::isnan(one(function, NAN)), "%s(NaN) is %g",
                  function == f.exp       ? "exp"
                  : function == f.sigmoid ? "sigmoid"
                  : function == f.silu    ? "silu"
                                          : "softplus",
                  static_cast<double>(one(function, NAN)));
        // a decay must be in [0, 1]
        int above = 0;
        for (float v = -1e-9f; v > -1; v *= 1.01f) above += !(one(f.exp, v) <= 1);
        check(above == 0, "exp(x) > 1 for %d numbers x < 0", above);
    }
}

// All 65536 half numbers, and all float32 numbers at and next to the middle between two neighbours.
void test_half_types(const std::vector<Isa>& all) {
    for (const Isa& isa : all)
        for (const bool bf16 : {true, false})
            for (const int scalar : {0, 1}) {
                std::snprintf(context, sizeof context, "%s: %s, %s", isa.kernels->name, bf16 ? "bf16" : "f16",
                              scalar ? "one number" : "vectors");
                const auto from = bf16 ? isa.probe->from_bf16[scalar] : isa.probe->from_f16[scalar];
                const auto to = bf16 ? isa.probe->to_bf16[scalar] : isa.probe->to_f16[scalar];
                const auto decode = [&](uint16_t bits) { return bf16 ? decode_bf16(bits) : decode_f16(bits); };
                const auto round = [&](double v) { return bf16 ? round_bf16(v) : round_f16(v); };
                constexpr size_t n = 65536;
                std::vector<uint16_t> h(n), back(n);
                std::vector<float> x(n);
                for (size_t i = 0; i < n; ++i) h[i] = static_cast<uint16_t>(i);
                from(h.data(), x.data(), n);
                to(x.data(), back.data(), n);
                int wrong = 0, lost = 0;
                for (size_t i = 0; i < n; ++i) {
                    const double want = decode(h[i]);
                    if (std::isnan(want)) {
                        wrong += !std::isnan(x[i]);
                        lost += !std::isnan(decode(back[i]));
                    } else {
                        wrong += !(static_cast<double>(x[i]) == want && std::signbit(x[i]) == std::signbit(want));
                        lost += back[i] != h[i];
                    }
                }
                check(wrong == 0, "%d numbers are read wrongly", wrong);
                check(lost == 0, "%d numbers do not survive reading and writing", lost);

                // Neighbours a, b and the float32 numbers around (a + b) / 2, a and b.
                std::vector<float> tricky;
                for (uint32_t i = 0; i < 0x7c00u + (bf16 ? 0x380u : 0u); ++i) {
                    const double a = decode(static_cast<uint16_t>(i)), b = decode(static_cast<uint16_t>(i + 1));
                    const double top = bf16 ? 0x1.ffp127 : 65520;
                    const float middle = static_cast<float>(std::isinf(b) ? top : (a + b) / 2);
                    for (const float m : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, HUGE_VALF),
                                          std::nextafter(static_cast<float>(a), HUGE_VALF)}) {
                        tricky.push_back(m);
                        tricky.push_back(-m);
                    }
                }
                for (const float f : {0.0f, 1e-45f, 1.17549435e-38f, 3.4e38f, 3.40282347e38f, HUGE_VALF, 65519.9f,
                                      65520.0f, 65536.0f, 5.9604645e-8f, 2.9802322e-8f, 2.9802326e-8f})
                    for (const float s : {f, -f}) tricky.push_back(s);
                Random r{3};
                for (int i = 0; i < 20000; ++i) {  // any bits
                    const auto bits = static_cast<uint32_t>(r.next());
                    float f;
                    std::memcpy(&f, &bits, 4);
                    tricky.push_back(f);
                }
                while (tricky.size() % 16) tricky.push_back(0);
                std::vector<uint16_t> got(tricky.size());
                to(tricky.data(), got.data(), static_cast<int64_t>(tricky.size()));
                int bad = 0;
                for (size_t i = 0; i < tricky.size(); ++i) {
                    const double want = round(static_cast<double>(tricky[i])), have = decode(got[i]);
                    const bool same =
                        std::isnan(want) ? std::isnan(have) : want == have && std::signbit(want) == std::signbit(have);
                    if (!same && ++bad <= 3)
                        check(false, "%.9g (%a) becomes %.9g, not %.9g", static_cast<double>(tricky[i]),
                              static_cast<double>(tricky[i]), have, want);
                }
                check(bad == 0, "%d numbers are rounded wrongly", bad);
            }
}

// ---- threads ----

std::vector<Case> busy_cases() {  // each is work for several threads
    std::vector<Case> cases;
    for (int i = 0; i < 4; ++i) {
        Case c;
        c.T = 24 + i, c.H = 1, c.HV = 1 + i, c.K = 128, c.V = 160, c.kda = i % 2 == 1, c.Ks = i * 2, c.vk = i == 3;
        c.seed = 300 + static_cast<uint64_t>(i);
        cases.push_back(c);
    }
    return cases;
}

void test_callers_side_by_side(const std::vector<Isa>& all) {
    for (const Isa& isa : all) {
        std::snprintf(context, sizeof context, "%s: several threads call run() at once", isa.kernels->name);
        std::vector<std::unique_ptr<Call>> calls;
        std::vector<Results> want;
        for (const Case& c : busy_cases()) {
            calls.push_back(make_call(c));
            run(calls.back()->p, *isa.kernels, 1, false);
            want.push_back(results_of(*calls.back()));
        }
        std::atomic<int> wrong{0};
        std::vector<std::thread> callers;
        for (size_t i = 0; i < calls.size(); ++i)
            callers.emplace_back([&, i] {
                for (int repeat = 0; repeat < 8; ++repeat) {
                    calls[i]->restore();
                    run(calls[i]->p, *isa.kernels, 1 + static_cast<int>(i + static_cast<size_t>(repeat)) % 4, false);
                    if (!(results_of(*calls[i]) == want[i])) ++wrong;
                }
            });
        for (std::thread& t : callers) t.join();
        check(wrong == 0, "%d calls gave other results", wrong.load());
    }
}

// True when a forked child computes `want` and leaves within 60 seconds.
bool child_agrees(Call& x, const Kernels& kernels, const Results& want) {
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        bool same = true;
        for (int repeat = 0; repeat < 3; ++repeat) {
            x.restore();
            run(x.p, kernels, 3, false);
            same &= results_of(x) == want;
        }
        _exit(same ? 0 : 1);
    }
    for (int i = 0; i < 6000; ++i) {
        int status = 0;
        if (waitpid(child, &status, WNOHANG) == child) return WIFEXITED(status) && WEXITSTATUS(status) == 0;
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    return false;
}

void test_fork(const std::vector<Isa>& all) {
    const Kernels& kernels = *all.back().kernels;
    std::snprintf(context, sizeof context, "%s: fork", kernels.name);
    const std::vector<Case> cases = busy_cases();
    const std::unique_ptr<Call> call = make_call(cases[1]), other = make_call(cases[2]);
    run(call->p, kernels, 3, false);
    const Results want = results_of(*call);
    check(child_agrees(*call, kernels, want), "a child forked after use hangs or computes something else");
    // ... and while another thread is using the pool
    std::atomic<bool> stop{false};
    std::thread user([&] {
        while (!stop) {
            other->restore();
            run(other->p, kernels, 3, false);
        }
    });
    for (int i = 0; i < 3; ++i)
        check(child_agrees(*call, kernels, want), "a child forked during use hangs or computes something else");
    stop = true;
    user.join();
    call->restore();
    run(call->p, kernels, 3, false);
    check(results_of(*call) == want, "the parent computes something else after fork");
}

void test_out_of_memory(const std::vector<Isa>& all) {
    for (const Isa& isa : all) {
        std::snprintf(context, sizeof context, "%s: out of memory", isa.kernels->name);
        const std::unique_ptr<Call> call = make_call(busy_cases()[1]);
        bool thrown = false, unchanged = false, recovered = true;
        std::thread([&] {  // its own thread: the scratch memory is kept per thread
            const uint64_t control = float_control();
            allocations_fail = true;
            try {
                run(call->p, *isa.kernels, 1, false);
            } catch (const std::bad_alloc&) {
                thrown = true;
            }
            allocations_fail = false;
            unchanged = float_control() == control;
            for (Array* a : call->arrays())
                if (*a) unchanged &= a->stray({}) == 0;
            run(call->p, *isa.kernels, 1, false);
        })
            .join();
        const auto e = [&] {
            const Results after = results_of(*call);
            call->restore();
            const auto exact = expect(*call);
            run(call->p, *isa.kernels, 1, false);
            recovered = results_of(*call) == after;
            return exact;
        }();
        check(thrown, "run() did not throw bad_alloc");
        check(unchanged, "run() wrote before it threw");
        check(recovered, "the call after it is wrong");
        compare(*call, e);
    }
}

// ---- subnormal numbers ----

// Kernels that note, task by task, the control register of their thread and what the real ones did to it.
struct Spy {
    const Kernels* real = nullptr;
    int threads = 1;      // each waits in its first task until so many have begun one
    bool throws = false;  // after the task
    std::mutex lock;
    std::set<std::thread::id> seen;
    long tasks = 0, unflushed = 0, subnormal_operands = 0;

    void expect(const Kernels* kernels, int thread_count) {
        real = kernels;
        threads = thread_count;
        seen.clear();
        tasks = unflushed = subnormal_operands = 0;
    }
    size_t begun() {
        const std::lock_guard<std::mutex> guard(lock);
        seen.insert(std::this_thread::get_id());
        return seen.size();
    }
    template <class F>
    const char* watch(F&& task) {
        for (int ms = 0; begun() < static_cast<size_t>(threads) && ms < 20000; ++ms)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        const uint64_t before = float_control();
#if defined(__x86_64__)
        set_float_control(before & ~uint64_t{0x3f});  // the sticky flags; bit 1 is "an operand was subnormal"
        const char* name = task();
        const bool subnormal = float_control() & 2;
        set_float_control(before);
#else
        const char* name = task();
        const bool subnormal = false;
#endif
        const std::lock_guard<std::mutex> guard(lock);
        ++tasks;
        unflushed += (before & FLUSH_BITS) != FLUSH_BITS;
        subnormal_operands += subnormal;
        if (throws) throw std::runtime_error("a task failed");
        return name;
    }
} spy;

Kernels spying_on(const Kernels& real) {
    Kernels k = real;
    k.run = [](const Problem& p, const Task& t, char* m) { return spy.watch([&] { return spy.real->run(p, t, m); }); };
    k.mix = [](const Mixer& x, const MixerTask& t, char* m) {
        return spy.watch([&] { return spy.real->mix(x, t, m); });
    };
    k.verify = [](const Log& g, const Task& t, char* m) {
        return spy.watch([&] { return spy.real->verify(g, t, m); });
    };
    k.fold = [](const Log& g, const Task& t, char* m) { return spy.watch([&] { return spy.real->fold(g, t, m); }); };
    return k;
}

int64_t subnormals_in(const char* data, size_t bytes, DType t) {
    int64_t count = 0;
    for (size_t i = 0; i < bytes; i += static_cast<size_t>(size_of(t)))
        if (t != DType::f16) {  // whose subnormal numbers are normal ones of float32
            const double x = std::fabs(load(data + i, t));
            count += x > 0 && x < static_cast<double>(std::numeric_limits<float>::min());
        }
    return count;
}
int64_t subnormals_in(const std::vector<float>& x) {
    return subnormals_in(reinterpret_cast<const char*>(x.data()), x.size() * 4, DType::f32);
}

// A call on `kernels`, whose tasks the spy has seen, in a thread whose register must come out as it went in.
template <class F>
void watched(const Kernels& real, int threads, F&& call) {
    spy.expect(&real, threads);
    const uint64_t before = float_control();
    call();
    check(float_control() == before, "the caller's control register changed from %" PRIx64 " to %" PRIx64, before,
          float_control());
    check(spy.tasks > 0 && spy.seen.size() == static_cast<size_t>(threads), "%zu threads ran, not %d", spy.seen.size(),
          threads);
    check(spy.unflushed == 0, "%ld of %ld tasks ran without flushing", spy.unflushed, spy.tasks);
    check(spy.subnormal_operands == 0, "%ld of %ld tasks met a subnormal operand", spy.subnormal_operands, spy.tasks);
}

// Decays as models begin with them and stronger, faded states and tiny keys.
std::vector<Case> strong_cases() {
    std::vector<Case> cases;
    for (const int64_t T : {1, 2, 4, 6, 16, 64, 1024})
        for (const bool kda : {false, true}) {
            const auto add = [&](auto change) {
                Case c;
                c.T = T, c.H = 2, c.HV = 4, c.K = c.V = 32, c.kda = kda, c.l2norm = true;
                change(c);
                c.seed = 2000 + cases.size();
                cases.push_back(c);
            };
            add([](Case& c) { c.decay = Decay::raw, c.initialised = true; });
            for (const double g : {-8, -16, -20, -40}) add([&](Case& c) { c.g_low = c.g_high = g; });
            add([](Case& c) { c.g_low = -1e-4, c.state_size = 1e-39; });
            add([](Case& c) { c.key_size = 1e-20; });
            if (T == 4 || T == 64) {  // the other ways through the kernels
                add([](Case& c) { c.g_low = c.g_high = -16, c.vk = true, c.V = 64; });
                add([](Case& c) { c.g_low = c.g_high = -16, c.state = DType::bf16, c.dtype = DType::f16; });
                add([](Case& c) { c.g_low = c.g_high = -16, c.Ks = 4; });
            }
        }
    return cases;
}

// One sequence of a mixer, and of a log whose every entry is then folded, both of strong decays.
struct Strong {
    int64_t T, H = 4, HV = 16, D = 128, C, capacity;
    bool kda;
    std::vector<float> qkv, z, g, beta, o, weight, window, state, deltas, decays, keys, factors;
    std::vector<int64_t> parents, row{0}, used{0};

    std::vector<float> normal(int64_t n, double size, Random& r) {
        std::vector<float> x(static_cast<size_t>(n));
        for (float& e : x) e = static_cast<float>(size * r.normal());
        return x;
    }
    Strong(int64_t tokens, bool vector_gates, double state_size, double decay)
        : T(tokens), C((2 * H + HV) * D), capacity(T), kda(vector_gates) {
        Random r{77};
        const int64_t gates = T * HV * (kda ? D : 1);
        qkv = normal(T * C, 1, r), z = normal(T * HV * D, 1, r), weight = normal(C * 4, 0.5, r);
        g.assign(static_cast<size_t>(gates), static_cast<float>(decay));
        beta.assign(static_cast<size_t>(T * HV), 0.5f);
        o.assign(static_cast<size_t>(T * HV * D), NAN);
        window = normal(C * 3, 1, r), state = normal(HV * D * D, state_size, r);
        keys.assign(static_cast<size_t>(H * capacity * D), 0);
        factors.assign(static_cast<size_t>(H * capacity), 0);
        deltas.assign(static_cast<size_t>(HV * capacity * D), 0);
        decays.assign(static_cast<size_t>(HV * capacity * (kda ? D : 1)), 0);
        for (int64_t e = 0; e < capacity; ++e) parents.push_back(e - 1);
    }
    static Tokens dense(std::vector<float>& x, int64_t heads, int64_t width, int64_t token, int64_t first = 0) {
        Tokens t;
        t.data = x.data() + first;
        t.t = token ? token : heads * width;
        t.h = width;
        return t;
    }
    Problem rule() {
        Problem p{};
        p.B = p.N = 1, p.T = T, p.H = H, p.HV = HV, p.K = p.V = D, p.kda = kda, p.qk_l2norm = true;
        p.decay = Decay::log, p.scale = 0.1f, p.qk_l2norm_eps = 1e-6f;
        p.q = dense(qkv, H, D, C), p.k = dense(qkv, H, D, C, H * D), p.v = dense(qkv, HV, D, C, 2 * H * D);
        p.g = dense(g, HV, kda ? D : 1, 0), p.beta = dense(beta, HV, 1, 0), p.o = dense(o, HV, D, 0);
        p.in.data = state.data(), p.in.n = HV * D * D, p.in.h = D * D, p.in.row = D;
        p.out = p.in;
        return p;
    }
    void mix(const Kernels& kernels, int threads) {
        Mixer m;
        m.rule = rule();
        const auto grouped = [&](const void* data, int64_t token) {
            GroupedTokens x;
            x.data = data, x.t = token, x.g = D;
            return x;
        };
        m.q = grouped(qkv.data(), C), m.k = grouped(qkv.data() + H * D, C), m.v = grouped(qkv.data() + 2 * H * D, C);
        m.z = grouped(z.data(), HV * D), m.o = grouped(o.data(), HV * D);
        m.W = 4, m.S = 3, m.weight = weight.data(), m.weight_c = 4, m.weight_w = 1;
        m.conv.data = window.data(), m.conv.n = C * 3, m.conv.c = 3, m.conv.s = 1;
        m.norm = true, m.gate = NormGate::silu, m.norm_eps = 1e-6f;
        run(m, kernels, threads, false);
    }
    Log log() {
        Log g;
        g.rule = rule();
        g.rule.state_indices = row.data();
        g.capacity = capacity;
        g.keys = keys.data(), g.factors = factors.data(), g.deltas = deltas.data(), g.decays = decays.data();
        g.parents = parents.data(), g.rows = row.data(), g.used = used.data(), g.out_rows = row.data();
        return g;
    }
    void verify_and_fold(const Kernels& kernels, int threads) {
        verify(log(), kernels, threads, false);
        used[0] = T;
        Log g = log();
        g.rule.T = 0;
        fold(g, kernels, threads, false);
    }
    int64_t subnormals() const {
        return subnormals_in(o) + subnormals_in(state) + subnormals_in(deltas) + subnormals_in(decays);
    }
};

void test_subnormal_numbers(const std::vector<Isa>& all) {
    if (FLUSH_BITS == 0) return;
    for (const Isa& isa : all) {
        const Kernels watching = spying_on(*isa.kernels);
        for (const Case& c : strong_cases()) {
            std::snprintf(context, sizeof context, "%s: subnormals: %s", isa.kernels->name, c.text().c_str());
            const std::unique_ptr<Call> call = make_call(c);
            Call& x = *call;
            const Expected e = expect(x);
            watched(*isa.kernels, 1, [&] { run(x.p, watching, 1, false); });
            compare(x, e);
            int64_t found = subnormals_in(x.o.data(), x.o.memory->size(), c.dtype) +
                            subnormals_in(x.state_in.data(), x.state_in.memory->size(), c.state);
            if (c.Ks) found += subnormals_in(x.snapshots.data(), x.snapshots.memory->size(), c.state);
            check(found == 0, "%" PRId64 " subnormal numbers came out", found);
            const Results one = results_of(x);
            spy.expect(isa.kernels, 1);
            x.restore();
            run(x.p, watching, 2, false);
            check(results_of(x) == one, "two threads gave other results");
            check(spy.unflushed == 0, "%ld of %ld tasks ran without flushing", spy.unflushed, spy.tasks);
        }
        for (const bool kda : {false, true})
            for (const int64_t T : {1, 2, 4, 6, 16, 64})
                for (const double decay : {-1e-4, -8.0, -16.0, -40.0}) {
                    const auto both = [&](const char* what, auto call) {
                        Strong one(T, kda, decay > -1 ? 1e-39 : 1, decay), two = one;
                        std::snprintf(context, sizeof context, "%s: subnormals: %s T %" PRId64 " %s g %g",
                                      isa.kernels->name, what, T, kda ? "kda" : "gda", decay);
                        watched(*isa.kernels, 1, [&] { call(one, watching, 1); });
                        watched(*isa.kernels, 2, [&] { call(two, watching, 2); });
                        check(one.subnormals() == 0, "%" PRId64 " subnormal numbers came out", one.subnormals());
                        check(one.o == two.o && one.state == two.state, "two threads gave other results");
                    };
                    both("rule", [](Strong& s, const Kernels& k, int n) { run(s.rule(), k, n, false); });
                    both("mixer", [](Strong& s, const Kernels& k, int n) { s.mix(k, n); });
                    if (T <= 16) both("log", [](Strong& s, const Kernels& k, int n) { s.verify_and_fold(k, n); });
                }

        // threads of the host, and a task that throws
        std::snprintf(context, sizeof context, "%s: subnormals: threads of the host", isa.kernels->name);
        static std::atomic<int> changed{0};
        changed = 0;
        share_threads_of([](int threads, void (*work)(void*), void* data) {
            std::vector<std::thread> workers;
            for (int i = 0; i < threads; ++i)
                workers.emplace_back([&] {
                    const uint64_t before = float_control();
                    work(data);
                    changed += float_control() != before;
                });
            for (std::thread& t : workers) t.join();
        });
        Strong host(64, false, 1, -16);
        watched(*isa.kernels, 2, [&] { run(host.rule(), watching, 2, true); });
        check(changed == 0, "the control registers of %d threads changed", changed.load());
        share_threads_of(nullptr);
        std::snprintf(context, sizeof context, "%s: subnormals: a task throws", isa.kernels->name);
        spy.throws = true;
        bool thrown = false;
        watched(*isa.kernels, 1, [&] {
            try {
                run(host.rule(), watching, 1, false);
            } catch (const std::runtime_error&) {
                thrown = true;
            }
        });
        spy.throws = false;
        check(thrown, "run() swallowed an exception");
    }
}

}  // namespace

int main(int argc, char** argv) {
    std::string only, skip;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (std::string(argv[i]) == "--share") std::sscanf(argv[i + 1], "%d/%d", &share_index, &share_count);
        if (std::string(argv[i]) == "--only") only = argv[i + 1];
        if (std::string(argv[i]) == "--skip") skip = argv[i + 1];
    }
#if !EXACT_HEAP
    std::signal(SIGSEGV, on_crash);
    std::signal(SIGBUS, on_crash);
    std::signal(SIGILL, on_crash);
#endif
    const std::vector<Isa> all = isas();
    std::string names;
    for (const Isa& isa : all) names += std::string(names.empty() ? "" : ", ") + isa.kernels->name;
    std::printf("test_core: %s\n", names.c_str());

    const struct {
        const char* name;
        void (*test)(const std::vector<Isa>&);
    } tests[] = {
        {"half types", test_half_types},
        {"elementary functions", test_elementary_functions},
        {"limits", test_limits},
        {"NaN stays", test_nan_stays},
        {"chosen cases", test_chosen_cases},
        {"scratch", test_scratch},
        {"emulated tiles", test_emulated_tiles},
        {"random cases", test_random_cases},
        {"subnormal numbers", test_subnormal_numbers},
        {"out of memory", test_out_of_memory},
        {"callers side by side", test_callers_side_by_side},
        {"fork", test_fork},
    };
    for (const auto& t : tests) {
        if (std::string(t.name).find(only) == std::string::npos || t.name == skip) continue;
        failures_here = 0;
        const auto start = std::chrono::steady_clock::now();
        forget_rounding_errors();
        t.test(all);
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        std::printf("%-4s  %-22s %6.1f s", failures_here == 0 ? "ok" : "FAIL", t.name, took.count());
        if (worst_nmse > 0) std::printf("   worst float32 NMSE %.1e", worst_nmse);
        if (worst_half > 0) std::printf(", half error / rounding %.2f", worst_half);
        if (failures_here > 5) std::printf("   %d failures", failures_here);
        std::printf("\n");
        std::fflush(stdout);
    }
    std::printf("%s: %ld checks, %d failures\n", failures == 0 ? "ok" : "FAIL", checks, failures);
    return failures == 0 ? 0 : 1;
}
