// What the fuzz targets share: how bytes become a call of the rule, and which builds of the kernels run it.
//
// A target is a function of bytes that ends the process when something is wrong. libFuzzer looks for such bytes (make
// fuzz), replay.cpp gives it those of corpus/ (make test).
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "rule.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace anydelta {
extern const Kernels kernels_avx512_emulated;
}

namespace anydelta::tests {
namespace {

// Reads numbers from the bytes, front to back; zeros once they are used up.
class Bytes {
  public:
    Bytes(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}
    bool empty() const { return at_ == end_; }
    uint64_t take(int count) {
        uint64_t x = 0;
        for (int i = 0; i < count && at_ < end_; ++i) x |= uint64_t{*at_++} << 8 * i;
        return x;
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(take(n <= 256 ? 1 : 4) % static_cast<uint64_t>(n)); }
    bool flag() { return take(1) & 1; }
    template <class T>
    T pick(std::initializer_list<T> options) {
        return options.begin()[below(static_cast<int64_t>(options.size()))];
    }

  private:
    const uint8_t *at_, *end_;
};

// Every build that this machine runs, and the AVX-512 one through SIMDe where it is linked.
const std::vector<const Kernels*>& builds() {
    static const std::vector<const Kernels*> all = [] {
        std::vector<const Kernels*> v = runnable();
#if defined(ANYDELTA_EMULATED_AVX512)
        v.push_back(&kernels_avx512_emulated);
#endif
        return v;
    }();
    return all;
}

// The end of a target: whether all checks of checks.h held.
int verdict() {
    if (failures > 0) std::abort();
    return 0;
}

// A call with at most `most` numbers of state times tokens.
Case case_of(Bytes& in, int64_t most) {
    Case c;
    c.seed = in.take(2);
    const int64_t sizes[] = {1, 2, 7, 8, 16, 17, 31, 32, 33, 64, 80, 96, 128, 130, 256, 300};
    c.K = sizes[in.below(16)], c.V = sizes[in.below(16)];
    c.T = in.below(72);
    c.H = 1 + in.below(3), c.HV = c.H * (1 + in.below(12)), c.B = in.below(4);
    const uint64_t flags = in.take(2);
    const auto flag = [&](int i) { return (flags >> i & 1) != 0; };
    c.kda = flag(0), c.tiled = flag(1), c.vk = flag(2), c.logit = flag(3), c.l2norm = flag(4), c.dt_bias = flag(5);
    c.in_place = flag(6), c.strided = flag(7), c.no_state_in = !c.in_place && flag(8);
    c.no_state_out = !c.in_place && flag(9);
    c.decay = in.pick({Decay::log, Decay::linear, Decay::raw});
    c.lower_bound = c.decay == Decay::raw && flag(10);
    c.dtype = in.pick({DType::f32, DType::bf16, DType::f16});
    c.gates = in.pick({DType::f32, DType::bf16, DType::f16});
    c.state = flag(11) ? DType::bf16 : DType::f32;
    c.mask = in.pick({Mask::none, Mask::left, Mask::random, Mask::all, Mask::single, Mask::tail});
    if (flag(12)) c.B = 1, c.packed = 1 + in.below(5);
    c.pool = in.below(4);
    if (c.no_state_in) c.pool = 0;
    c.Ks = in.below(18);
    c.scattered = flag(13) && c.pool && c.in_place && c.Ks;
    c.g_low = in.pick({-1.0, -0.05, -20.0, -1e4}), c.g_high = in.pick({0.0, -1e-3});
    c.key_size = in.pick({1.0, 0.01, 100.0}), c.beta_high = in.pick({1.0, 2.0});
    for (int64_t* n : {&c.B, &c.HV, &c.T, &c.Ks, &c.K, &c.V}) {  // smaller, in this order, until it fits
        const auto size = [&] { return (c.B + c.packed) * (c.T + c.Ks + 1) * c.HV * c.K * c.V; };
        while (size() > most && *n > 1 + (n == &c.HV ? c.H - 1 : 0)) *n = n == &c.HV ? *n - c.H : *n / 2;
    }
    c.scattered = c.scattered && c.Ks;
    return c;
}

// A finite number of any size that the kernels are judged on.
double any_number(Bytes& in) {
    const double sizes[] = {0,     1,     0.5,     1e-3,  3,       100,         6e4, 1e6,
                            1e-10, 1e-20, 1.2e-38, 1e-40, 1.4e-45, 1 + 0x1p-23, 65,  2};
    const uint64_t b = in.take(1);
    return (b & 128 ? -1 : 1) * sizes[b & 15];
}
double clipped(double x, DType t) {
    return t == DType::f16 && std::isfinite(x) ? std::fmax(-6e4, std::fmin(x, 6e4)) : x;
}

// Any element of an array becomes `value`.
void poke(Array& a, Bytes& in, double value) {
    int64_t index[5] = {};
    for (size_t i = 0; i < a.dims.size(); ++i) {
        if (a.dims[i] == 0) return;
        index[i] = in.below(a.dims[i]);
    }
    a.set(clipped(value, a.dtype), index[0], index[1], index[2], index[3], index[4]);
}

// Up to `count` numbers that no generator of calls would draw, as long as there are bytes.
void spoil(Call& x, Bytes& in, int64_t count = 64) {
    for (int64_t i = 0; i < count && !in.empty(); ++i) {
        const int64_t which = in.below(8);
        Array* const arrays[] = {&x.q, &x.k, &x.v, &x.g, &x.beta, &x.state_in, &x.A_log, &x.dt_bias};
        Array& a = *arrays[which];
        if (!a) continue;
        double value = any_number(in);
        if (&a == &x.g && x.c.decay == Decay::log)
            value = value < 0 && in.flag() ? -HUGE_VAL : -std::fabs(value);
        else if (&a == &x.g && x.c.decay == Decay::linear)
            value = std::fmin(std::fabs(value), 1);
        else if (&a == &x.A_log)
            value = std::fmin(value, 10);
        poke(a, in, value);
    }
    x.keep();
}

}  // namespace
}  // namespace anydelta::tests
