// The mixer's kernels of every instruction set, on any valid call and any finite numbers: as the rule's target, with the
// convolution before the rule, the norm and the gate behind it, and the windows that the convolution keeps.
#include "mixer_calls.h"

namespace anydelta::tests {
namespace {

Bounded silu(const Bounded& y) {
    const double slope = 1.1;  // at most
    return {y.x * sigmoid(y.x), slope * y.m};
}

struct Wanted {
    Expected<Bounded> rule;
    // [rows or Ks N, C, S] after the call, and which of the rows are written
    std::vector<double> conv, conv_snapshots;
    std::vector<char> conv_written, conv_snapshots_written;
};

Wanted expect(const MixerCall& x) {
    const Call& rule = *x.rule;
    const Case& c = rule.c;
    const Mixer& m = x.m;
    const int64_t C = x.conv.dims[1], S = m.S;
    Wanted e;
    e.conv.resize(static_cast<size_t>(x.conv.dims[0] * C * S));
    e.conv_written.resize(static_cast<size_t>(x.conv.dims[0]));
    e.conv_snapshots.resize(static_cast<size_t>(c.Ks * rule.N * C * S));
    e.conv_snapshots_written.resize(static_cast<size_t>(c.Ks * rule.N));
    Channels<Bounded> y;
    y.q.resize(static_cast<size_t>(c.B * c.T * c.H * c.K));
    y.k = y.q;
    y.v.resize(static_cast<size_t>(c.B * c.T * c.HV * c.V));
    // channel i of the C: array, head, element
    const auto input = [&](int64_t b, int64_t t, int64_t i) {
        if (i < c.H * c.K) return rule.q.get(b, t, i / c.K, i % c.K);
        if (i < 2 * c.H * c.K) return rule.k.get(b, t, i / c.K - c.H, i % c.K);
        return rule.v.get(b, t, (i - 2 * c.H * c.K) / c.V, (i - 2 * c.H * c.K) % c.V);
    };
    const auto output = [&](int64_t token, int64_t i) -> Bounded& {
        if (i < c.H * c.K) return y.q[static_cast<size_t>(token * c.H * c.K + i)];
        if (i < 2 * c.H * c.K) return y.k[static_cast<size_t>(token * c.H * c.K + i - c.H * c.K)];
        return y.v[static_cast<size_t>(token * c.HV * c.V + i - 2 * c.H * c.K)];
    };
    for (int64_t n = 0; n < rule.N; ++n) {
        const int64_t row = rule.rows[static_cast<size_t>(n)], b = c.packed ? 0 : n;
        if (row < 0) continue;
        const int64_t start = rule.start(n), end = rule.end(n);
        for (int64_t i = 0; i < C; ++i) {
            std::vector<double> seen;
            for (int64_t j = 0; j < S; ++j) seen.push_back(x.conv.get(row, i, j));
            const auto newest = [&](std::vector<double>& to, int64_t to_row) {
                std::copy(seen.end() - S, seen.end(), to.begin() + (to_row * C + i) * S);
            };
            for (int64_t t = start; t < end; ++t) {
                if (rule.live(b, t)) {
                    seen.push_back(input(b, t, i));
                    Bounded sum = m.bias ? x.bias.get(i) : 0;
                    for (int64_t j = 0; j < m.W; ++j)
                        sum = sum + Bounded(x.weight.get(i, j)) * seen[seen.size() - static_cast<size_t>(m.W - j)];
                    output(b * c.T + t, i) = m.silu ? silu(sum) : sum;
                }
                const int64_t slot = end - 1 - t;
                if (slot >= c.Ks) continue;
                if (c.scattered) {
                    const int64_t to = rule.snapshot_rows[static_cast<size_t>(slot * rule.N + n)];
                    newest(e.conv, to);
                    e.conv_written[static_cast<size_t>(to)] = 1;
                } else if (x.conv_snapshots) {
                    newest(e.conv_snapshots, slot * rule.N + n);
                    e.conv_snapshots_written[static_cast<size_t>(slot * rule.N + n)] = 1;
                }
            }
            if (c.scattered) continue;
            newest(e.conv, row);
            e.conv_written[static_cast<size_t>(row)] = 1;
        }
    }
    e.rule = tests::expect<Bounded>(rule, y);
    if (!m.norm) return e;
    for (int64_t token = 0; token < c.B * c.T; ++token)
        for (int64_t h = 0; h < c.HV; ++h) {
            Bounded* o = e.rule.o.data() + (token * c.HV + h) * c.V;
            double square = 0, error = 0;  // means of o^2, and of |o| times its error
            for (int64_t j = 0; j < c.V; ++j) {
                square += o[j].x * o[j].x / static_cast<double>(c.V);
                error += std::fabs(o[j].x) * o[j].m / static_cast<double>(c.V);
            }
            const double f = 1 / std::sqrt(square + static_cast<double>(m.norm_eps));
            for (int64_t j = 0; j < c.V; ++j) {
                Bounded y(o[j].x * f, f * o[j].m + std::fabs(o[j].x) * f * (1 + f * f * error));
                // a first order's formula: errors must be small beside the norm, and no square may overflow
                if (o[j].m * f > 1e3 || square > Bounded::MOST) y.m = HUGE_VAL;
                if (x.norm_weight) y = y * x.norm_weight.get(j);
                if (x.z && rule.live(token / c.T, token % c.T)) {
                    const double z = x.z.get(token / c.T, token % c.T, h, j);
                    y = y * (m.gate == NormGate::silu ? silu(z) : Bounded(sigmoid(z)));
                }
                o[j] = y;
            }
        }
    return e;
}

// Rows of windows that are written hold the wanted inputs exactly, or rounded to their type; all others their bytes.
void compare_windows(const char* part, Array& a, const std::vector<double>& want, const std::vector<char>& written) {
    if (!a) return;
    std::vector<char> allowed = a.none_allowed();
    const bool slots = a.dims.size() == 4;
    const int64_t C = a.dims[slots ? 2 : 1], S = a.dims[slots ? 3 : 2], N = slots ? a.dims[1] : 1;
    int64_t wrong = 0;
    for (int64_t row = 0; row < static_cast<int64_t>(written.size()); ++row) {
        if (!written[static_cast<size_t>(row)]) continue;
        for (int64_t i = 0; i < C; ++i)
            for (int64_t j = 0; j < S; ++j) {
                const char* at = slots ? a.at(row / N, row % N, i, j) : a.at(row, i, j);
                a.allow(allowed, at);
                const double exact = rounded(want[static_cast<size_t>((row * C + i) * S + j)], a.dtype);
                wrong += std::fabs(load(at, a.dtype) - exact) > Bounded::FLOOR;
            }
    }
    check(wrong == 0, "%s: %" PRId64 " inputs are wrong", part, wrong);
    check(a.stray(allowed) == 0, "%s: bytes changed that must not", part);
}

}  // namespace
}  // namespace anydelta::tests

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace anydelta;
    using namespace anydelta::tests;
    Bytes in(data, size);
    const std::unique_ptr<MixerCall> call = mixer_of(in);
    MixerCall& x = *call;
    const Wanted want = expect(x);
    const Allowed allowed = what_may_be_written(*x.rule, want.rule);
    for (const Kernels* kernels : builds()) {
        std::snprintf(context, sizeof context, "%s: mixer W %" PRId64 " S %" PRId64 " %s", kernels->name, x.m.W, x.m.S,
                      x.rule->c.text().c_str());
        x.restore();
        run(x.m, *kernels, 1, false);
        check_strays(*x.rule, allowed);
        for (Array* a : {&x.z, &x.weight, &x.bias, &x.norm_weight})
            if (*a) check(a->stray({}) == 0, "an input was changed");
        compare(*x.rule, want.rule);
        compare_windows("conv_state", x.conv, want.conv, want.conv_written);
        compare_windows("conv_snapshots", x.conv_snapshots, want.conv_snapshots, want.conv_snapshots_written);
        const auto one = x.bytes();
        x.restore();
        run(x.m, *kernels, 2, false);
        check(x.bytes() == one, "2 threads and 1 differ");
        // heads one by one, with exactly as much scratch memory as asked for
        x.restore();
        const Memory workspace(kernels->mixer_workspace(x.m, 1));
        const FlushSubnormals flushed;  // as `run` does
        for (int64_t n = 0; n < x.m.rule.N; ++n)
            for (int64_t h = 0; h < x.m.rule.H; ++h) kernels->mix(x.m, MixerTask{n, h, 1}, workspace.data());
        check(x.bytes() == one, "smaller tasks differ");
    }
    return verdict();
}
