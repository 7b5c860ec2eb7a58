// How bytes become a call of the mixer: fuzz.h's call of the rule, with what is before and behind it.
#pragma once
#include "fuzz.h"
#include "mixer.h"

namespace anydelta::tests {
namespace {

struct MixerCall {
    Mixer m;
    std::unique_ptr<Call> rule;
    Array z, conv, conv_snapshots, weight, bias, norm_weight;

    std::vector<Array*> arrays() { return {&z, &conv, &conv_snapshots, &weight, &bias, &norm_weight}; }
    void keep() {
        for (Array* a : arrays()) a->keep();
        rule->keep();
    }
    void restore() {
        for (Array* a : arrays()) a->restore();
        rule->restore();
    }
    std::vector<std::vector<char>> bytes() {
        const Results r = results_of(*rule);
        return {r.o, r.state, r.snapshots, conv.bytes(), conv_snapshots.bytes()};
    }
};

// Heads of `a` [B, T, heads, width] side by side in groups where they lie so.
GroupedTokens grouped(const Array& a, Bytes& in) {
    GroupedTokens x;
    x.data = a.data(), x.dtype = a.dtype, x.b = a.strides[0], x.t = a.strides[1], x.g = a.strides[2];
    const int64_t per = 1 + in.below(a.dims[2]);
    if (a.strides[2] == a.dims[3] && a.dims[2] % per == 0) x.per = per, x.g = per * a.dims[3];
    return x;
}

Windows windows(const Array& a) {
    Windows x;
    const size_t first = a.dims.size() - 3;
    x.data = a.data(), x.dtype = a.dtype, x.slot = first ? a.strides[0] : 0;
    x.n = a.strides[first], x.c = a.strides[first + 1], x.s = a.strides[first + 2];
    return x;
}

void fill(Array& a, Random& r, double size) {
    std::vector<int64_t> d = a.dims;
    d.resize(4, 1);
    for (int64_t i = 0; i < d[0]; ++i)
        for (int64_t j = 0; j < d[1]; ++j)
            for (int64_t k = 0; k < d[2]; ++k)
                for (int64_t l = 0; l < d[3]; ++l) a.set(size * r.normal(), i, j, k, l);
}

std::unique_ptr<MixerCall> mixer_of(Bytes& in, bool snapshots = true) {
    auto call = std::make_unique<MixerCall>();
    MixerCall& x = *call;
    const int64_t most = in.pick({2000, 20000, 200000});
    Case c = case_of(in, most);
    c.in_place = true, c.no_state_in = c.no_state_out = false;
    if (!snapshots) c.Ks = 0, c.scattered = false;
    x.rule = make_call(c);
    Problem& p = x.rule->p;
    p.beta_scale = in.pick({1.0f, 2.0f});
    Random r{c.seed};
    Mixer& m = x.m;
    m.W = 1 + in.below(in.flag() ? MAX_TAPS : 4), m.S = m.W - 1 + in.below(3);
    const DType parameters = in.pick({DType::f32, DType::bf16, DType::f16});
    const DType window = in.flag() ? c.dtype : DType::f32;
    const uint64_t flags = in.take(1);
    const auto flag = [&](int i) { return (flags >> i & 1) != 0; };
    const int64_t C = 2 * c.H * c.K + c.HV * c.V;

    x.weight = Array({C, m.W}, parameters, flag(0), 0, r);
    fill(x.weight, r, 1 / std::sqrt(static_cast<double>(m.W)));
    m.weight = x.weight.data(), m.weight_dtype = parameters;
    m.weight_c = x.weight.strides[0], m.weight_w = x.weight.strides[1];
    if (flag(1)) {
        x.bias = Array({C}, parameters, false, 1, r);
        fill(x.bias, r, 1);
        m.bias = x.bias.data(), m.bias_dtype = parameters;
    }
    m.silu = flag(2);
    x.conv = Array({x.rule->state_in.dims[0], C, m.S}, window, c.strided, 0, r);
    for (int64_t n : x.rule->rows)
        for (int64_t i = 0; n >= 0 && i < C; ++i)  // the pool's other rows stay NaN
            for (int64_t j = 0; j < m.S; ++j) x.conv.set(r.normal(), n, i, j);
    m.conv = windows(x.conv);
    if (c.Ks && !c.scattered && flag(3)) {
        x.conv_snapshots = Array({c.Ks, x.rule->N, C, m.S}, window, c.strided, 0, r);
        m.conv_snapshots = windows(x.conv_snapshots);
    }
    m.norm = flag(4), m.norm_eps = flag(5) ? 1e-6f : 0.05f;
    m.gate = m.norm ? in.pick({NormGate::none, NormGate::silu, NormGate::sigmoid}) : NormGate::none;
    if (m.norm && flag(6)) {
        x.norm_weight = Array({c.V}, parameters, false, 1, r);
        fill(x.norm_weight, r, 1);
        m.norm_weight = x.norm_weight.data(), m.norm_dtype = parameters;
    }
    if (m.gate != NormGate::none) {
        x.z = Array({c.B, c.T, c.HV, c.V}, c.dtype, c.strided, 1, r);
        for (int64_t b = 0; b < c.B; ++b)
            for (int64_t t = 0; t < c.T; ++t)
                for (int64_t h = 0; x.rule->live(b, t) && h < c.HV; ++h)  // nobody may look at a masked token
                    for (int64_t j = 0; j < c.V; ++j) x.z.set(r.normal(), b, t, h, j);
        m.z = grouped(x.z, in);
    }
    m.q = grouped(x.rule->q, in), m.k = grouped(x.rule->k, in), m.v = grouped(x.rule->v, in);
    m.o = grouped(x.rule->o, in);
    m.rule = p;
    m.rule.q = m.rule.k = m.rule.v = m.rule.o = Tokens{};
    for (int i = 0; i < 16 && in.flag(); ++i) {
        Array* const arrays[] = {&x.z, &x.weight, &x.bias, &x.norm_weight, &x.conv};
        Array& a = *arrays[in.below(5)];
        if (a) poke(a, in, any_number(in));
    }
    spoil(*x.rule, in);
    x.keep();
    return call;
}

}  // namespace
}  // namespace anydelta::tests
