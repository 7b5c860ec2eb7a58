// Calls of the rule for tests: a case, its arrays, the recurrence in float64, and what a kernel made of the call compared
// with it: errors, bytes that must not change, the same bits by other tasks.
#pragma once
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "arrays.h"
#include "checks.h"
#include "flush.h"
#include "host.h"

namespace anydelta::tests {
namespace {

// ---------------------------------------------------------------------------------------------------------------
// a case, and its arrays

enum class Mask { none, left, random, all, single, tail };

struct Case {
    int64_t B = 1, T = 1, H = 1, HV = 1, K = 16, V = 16;
    bool kda = false, tiled = false, vk = false, logit = false, l2norm = false, lower_bound = false, dt_bias = true;
    Decay decay = Decay::log;
    DType dtype = DType::f32, gates = DType::f32, state = DType::f32;
    Mask mask = Mask::none;
    int64_t packed = 0;  // sequences, 0: not packed
    int64_t pool = 0;  // extra rows of a state pool, 0: no pool
    int64_t Ks = 0;
    bool scattered = false;  // snapshots go to rows of the pool, and rows that are read may repeat
    bool in_place = true, no_state_in = false, no_state_out = false, strided = false;
    double g_low = -1, g_high = -0.001, key_size = 1, beta_high = 1, state_size = 1;
    bool initialised = false;  // raw gates as models begin with: A in U(0.01, 16), dt_bias 1
    uint64_t seed = 0;

    std::string text() const {
        static const char* const masks[] = {"none", "left", "random", "all", "single", "tail"};
        static const char* const decays[] = {"log", "linear", "raw"};
        char s[500];
        std::snprintf(s, sizeof s,
                      "B %" PRId64 " T %" PRId64 " H %" PRId64 " HV %" PRId64 " K %" PRId64 " V %" PRId64
                      " %s %s %s decay=%s%s%s%s%s dtype=%s gates=%s state=%s mask=%s packed=%" PRId64 " pool=%" PRId64
                      " Ks=%" PRId64 "%s %s%s%s%s g=[%g, %g]%s key=%g beta<%g state=%g seed=%" PRIu64,
                      B, T, H, HV, K, V, kda ? "kda" : "gda", tiled ? "tiled" : "interleaved", vk ? "vk" : "kv",
                      decays[static_cast<int>(decay)], lower_bound ? " lower_bound" : "", dt_bias ? "" : " no-dt_bias",
                      logit ? " logit" : "", l2norm ? " l2norm" : "", name_of(dtype), name_of(gates), name_of(state),
                      masks[static_cast<int>(mask)], packed, pool, Ks, scattered ? " scattered" : "",
                      in_place ? "in place" : "functional", no_state_in ? " no-state-in" : "",
                      no_state_out ? " no-state-out" : "", strided ? " strided" : "", g_low, g_high,
                      initialised ? " initialised" : "", key_size, beta_high, state_size, seed);
        return s;
    }
};

struct Call {
    Case c;
    Problem p{};
    Array q, k, v, g, beta, o, A_log, dt_bias, state_in, state_out, snapshots;
    std::vector<uint8_t> mask_bytes;
    std::unique_ptr<Memory> mask, cu, indices, into;
    std::vector<int64_t> starts;  // [N + 1], when packed
    std::vector<int64_t> rows;  // [N]
    std::vector<int64_t> snapshot_rows;  // [Ks, N], when scattered
    int64_t N = 0;
    int64_t history = 0;  // tokens of earlier calls that the results depend on

    // Row i of snapshot `slot` of sequence n and value head h, where it is to be.
    char* snapshot_at(int64_t slot, int64_t n, int64_t h, int64_t i, int64_t j) const {
        if (!c.scattered) return snapshots.at(slot, n, h, i, j);
        return state_in.at(snapshot_rows[static_cast<size_t>(slot * N + n)], h, i, j);
    }
    Array& result_state() { return c.in_place ? state_in : state_out; }
    std::vector<Array*> inputs() {
        std::vector<Array*> all{&q, &k, &v, &g, &beta, &A_log, &dt_bias};
        if (!c.in_place) all.push_back(&state_in);
        return all;
    }
    std::vector<Array*> arrays() {
        return {&q, &k, &v, &g, &beta, &A_log, &dt_bias, &o, &state_in, &state_out, &snapshots};
    }
    // The tokens of sequence n.
    int64_t start(int64_t n) const { return c.packed ? starts[static_cast<size_t>(n)] : 0; }
    int64_t end(int64_t n) const { return c.packed ? starts[static_cast<size_t>(n) + 1] : c.T; }
    bool live(int64_t b, int64_t t) const { return !p.mask || mask->data()[b * p.mask_b + t * p.mask_t]; }
    void keep() {
        for (Array* a : arrays()) a->keep();
    }
    void restore() {
        for (Array* a : arrays()) a->restore();
    }
};

Tokens tokens_of(const Array& a) {
    Tokens t;
    t.data = a.data();
    t.dtype = a.dtype;
    t.b = a.strides[0];
    t.t = a.strides[1];
    t.h = a.strides[2];
    return t;
}
States states_of(const Array& a) {  // [slot,] n, h, row, column
    States s;
    s.data = a.data();
    const size_t first = a.dims.size() == 5 ? 1 : 0;
    s.slot = first ? a.strides[0] : 0;
    s.n = a.strides[first];
    s.h = a.strides[first + 1];
    s.row = a.strides[first + 2];
    return s;
}

std::unique_ptr<Memory> exact_copy(const std::vector<int64_t>& values) {
    auto m = std::make_unique<Memory>(values.size() * 8);
    if (!values.empty()) {  // a copy of 0 bytes from null is undefined too
        std::memcpy(m->data(), values.data(), values.size() * 8);
    }
    return m;
}

std::unique_ptr<Call> make_call(const Case& c) {
    auto call = std::make_unique<Call>();
    Call& x = *call;
    Random r{c.seed * 7919 + 17};
    x.c = c;
    Problem& p = x.p;
    const int64_t N = x.N = c.packed ? c.packed : c.B;
    p.B = c.B, p.T = c.T, p.H = c.H, p.HV = c.HV, p.K = c.K, p.V = c.V, p.N = N;
    p.kda = c.kda, p.tiled = c.tiled, p.vk = c.vk, p.beta_is_logit = c.logit, p.qk_l2norm = c.l2norm;
    p.has_lower_bound = c.lower_bound, p.decay = c.decay;
    p.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(c.K)));
    p.qk_l2norm_eps = r.chance(0.5) ? 1e-6f : 0.05f;
    p.lower_bound = -5;

    x.q = Array({c.B, c.T, c.H, c.K}, c.dtype, c.strided, 1, r);
    x.k = Array({c.B, c.T, c.H, c.K}, c.dtype, c.strided, 1, r);
    x.v = Array({c.B, c.T, c.HV, c.V}, c.dtype, c.strided, 1, r);
    x.o = Array({c.B, c.T, c.HV, c.V}, c.dtype, c.strided, 1, r);
    x.g = c.kda ? Array({c.B, c.T, c.HV, c.K}, c.gates, c.strided, 1, r)
                : Array({c.B, c.T, c.HV}, c.gates, c.strided, 0, r);
    x.beta = Array({c.B, c.T, c.HV}, c.gates, c.strided, 0, r);
    for (int64_t b = 0; b < c.B; ++b)
        for (int64_t t = 0; t < c.T; ++t) {
            for (int64_t h = 0; h < c.H; ++h) {
                // Keys near unit length, as after a norm: the rule is then stable for beta <= 2.
                const double size = c.l2norm ? 1 : 1 / std::sqrt(static_cast<double>(c.K));
                std::vector<double> key(static_cast<size_t>(c.K));
                double norm = 0;
                for (double& e : key) {
                    e = r.normal();
                    norm += e * e;
                }
                for (int64_t i = 0; i < c.K; ++i) {
                    const double unit = key[static_cast<size_t>(i)] / std::sqrt(norm);
                    x.k.set(c.key_size * (c.l2norm ? key[static_cast<size_t>(i)] : 0.99 * unit), b, t, h, i);
                    x.q.set(r.normal() * size, b, t, h, i);
                }
            }
            for (int64_t h = 0; h < c.HV; ++h) {
                for (int64_t i = 0; i < c.V; ++i) x.v.set(r.normal(), b, t, h, i);
                x.beta.set(c.logit ? r.normal() : r.uniform(0, c.beta_high / (c.l2norm ? 1 : c.key_size * c.key_size)),
                           b, t, h);
                for (int64_t i = 0; i < (c.kda ? c.K : 1); ++i) {
                    double g = r.uniform(c.g_low, c.g_high);
                    if (c.decay == Decay::linear) g = std::exp(g);
                    if (c.decay == Decay::raw) g = r.normal() * 2;
                    x.g.set(g, b, t, h, i);
                }
            }
        }
    if (c.decay == Decay::raw) {
        x.A_log = Array({c.HV}, c.gates, false, 1, r);
        for (int64_t h = 0; h < c.HV; ++h)
            x.A_log.set(c.initialised ? std::log(r.uniform(0.01, 16)) : r.uniform(-3, 0.5), h);
        if (c.dt_bias) {
            const int64_t n = c.kda ? c.HV * c.K : c.HV;
            x.dt_bias = Array({n}, c.gates, false, 1, r);
            for (int64_t i = 0; i < n; ++i) x.dt_bias.set(c.initialised ? 1 : r.normal(), i);
        }
        p.A_log = x.A_log.data();
        p.dt_bias = x.dt_bias.data();
        p.A_log_dtype = p.dt_bias_dtype = c.gates;
    }

    if (c.packed) {
        for (int64_t n = 0; n < N - 1; ++n) x.starts.push_back(r.chance(0.3) ? 0 : r.below(c.T + 1));  // some empty
        x.starts.push_back(0);
        x.starts.push_back(c.T);
        std::sort(x.starts.begin(), x.starts.end());
        x.cu = exact_copy(x.starts);
        p.cu_seqlens = reinterpret_cast<const int64_t*>(x.cu->data());
    }
    for (int64_t n = 0; n < N; ++n) x.rows.push_back(n);
    const int64_t P = N + c.pool + (c.scattered ? c.Ks * N : 0);
    if (c.pool) {
        std::vector<int64_t> all;
        for (int64_t n = 0; n < P; ++n) all.push_back(n);
        for (int64_t n = 0; n < N; ++n) {
            std::swap(all[static_cast<size_t>(n)], all[static_cast<size_t>(n + r.below(P - n))]);
            x.rows[static_cast<size_t>(n)] = r.chance(0.3) ? -1 : all[static_cast<size_t>(n)];
            if (c.scattered && n > 0 && r.chance(0.3)) x.rows[static_cast<size_t>(n)] = x.rows[0];
        }
        for (int64_t i = 0; c.scattered && i < c.Ks * N; ++i) {  // rows that nobody reads, or only this sequence
            const int64_t own = x.rows[static_cast<size_t>(i % N)];
            const bool alone = std::count(x.rows.begin(), x.rows.end(), own) == 1;
            const bool free = std::count(x.snapshot_rows.begin(), x.snapshot_rows.end(), own) == 0;
            x.snapshot_rows.push_back(own >= 0 && alone && free && r.chance(0.3) ? own
                                                                                 : all[static_cast<size_t>(N + i)]);
        }
        x.indices = exact_copy(x.rows);
        p.state_indices = reinterpret_cast<const int64_t*>(x.indices->data());
        if (c.scattered) {
            x.into = exact_copy(x.snapshot_rows);
            p.snapshot_indices = reinterpret_cast<const int64_t*>(x.into->data());
        }
    }
    if (c.mask != Mask::none) {
        const bool transposed = c.strided;
        p.mask_b = transposed ? 1 : c.T;
        p.mask_t = transposed ? c.B + 1 : 1;
        x.mask =
            std::make_unique<Memory>(static_cast<size_t>(c.T ? (c.B - 1) * p.mask_b + (c.T - 1) * p.mask_t + 1 : 0));
        p.mask = reinterpret_cast<const uint8_t*>(x.mask->data());
        for (int64_t b = 0; b < c.B; ++b) {
            const int64_t cut = r.below(c.T + 1);
            for (int64_t t = 0; t < c.T; ++t) {
                bool live = true;
                if (c.mask == Mask::left) live = t >= cut;
                if (c.mask == Mask::tail) live = t < cut;
                if (c.mask == Mask::random) live = r.chance(0.6);
                if (c.mask == Mask::all) live = false;
                if (c.mask == Mask::single) live = t == cut;
                x.mask->data()[b * p.mask_b + t * p.mask_t] = live;
                if (live) continue;
                // nobody may look at a masked token
                for (int64_t h = 0; h < c.H; ++h)
                    for (int64_t i = 0; i < c.K; ++i) x.k.set(NAN, b, t, h, i), x.q.set(NAN, b, t, h, i);
                for (int64_t h = 0; h < c.HV; ++h) {
                    for (int64_t i = 0; i < c.V; ++i) x.v.set(NAN, b, t, h, i);
                    for (int64_t i = 0; i < (c.kda ? c.K : 1); ++i) x.g.set(NAN, b, t, h, i);
                    x.beta.set(NAN, b, t, h);
                }
            }
        }
    }

    p.state_dtype = c.state;
    const int64_t rows = c.vk ? c.V : c.K, columns = c.vk ? c.K : c.V;
    if (!c.no_state_in) {
        x.state_in = Array({P, c.HV, rows, columns}, c.state, c.strided, 2, r);
        for (int64_t n : x.rows)
            if (n >= 0)  // the pool's other rows stay NaN
                for (int64_t h = 0; h < c.HV; ++h)
                    for (int64_t i = 0; i < rows; ++i)
                        for (int64_t j = 0; j < columns; ++j) x.state_in.set(r.normal() * c.state_size, n, h, i, j);
        p.in = states_of(x.state_in);
    }
    if (c.in_place) {
        p.out = p.in;
    } else if (!c.no_state_out) {
        x.state_out = Array({N, c.HV, rows, columns}, c.state, c.strided, 2, r);
        p.out = states_of(x.state_out);
    }
    p.out_dense = !c.in_place;
    p.Ks = c.Ks;
    if (c.scattered) {
        p.snapshots = p.in;
        p.out.data = nullptr;
    } else if (c.Ks) {
        x.snapshots = Array({c.Ks, N, c.HV, rows, columns}, c.state, c.strided, 2, r);
        p.snapshots = states_of(x.snapshots);
    }
    p.q = tokens_of(x.q), p.k = tokens_of(x.k), p.v = tokens_of(x.v), p.o = tokens_of(x.o);
    p.g = tokens_of(x.g), p.beta = tokens_of(x.beta);
    x.keep();
    return call;
}

// ---------------------------------------------------------------------------------------------------------------
// the recurrence in float64, token by token

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double softplus(double x) { return std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x))); }

// A number with what its error in float32 is measured against: the sum of the magnitudes of all that was added up for it.
// FLOOR: what becomes of subnormal numbers and their products is not judged. MOST: beyond it float32 is near its end, and
// nothing is known of what comes of it, not even times zero.
struct Bounded {
    static constexpr double FLOOR = 1e-20, MOST = 1e30;
    double x = 0, m = 0;

    Bounded(double value = 0) : Bounded(value, std::fabs(value)) {}
    Bounded(double value, double magnitude)
        : x(value),
          m(magnitude > MOST                      ? HUGE_VAL
            : magnitude != 0 && magnitude < FLOOR ? FLOOR
                                                  : magnitude) {}
    Bounded operator*(const Bounded& b) const { return {x * b.x, m * b.m}; }
    Bounded operator+(const Bounded& b) const { return {x + b.x, m + b.m}; }
    Bounded operator-(const Bounded& b) const { return {x - b.x, m + b.m}; }
};
double value_of(double x) { return x; }
double value_of(const Bounded& x) { return x.x; }
// A function's value, whose relative error is `times` that of one operation.
void assign(double& x, double value, double) { x = value; }
void assign(Bounded& x, double value, double times) { x = {value, std::fabs(value) * times}; }

// q, k and v of the rule, dense: [B, T, H, K] twice, [B, T, HV, V].
template <class X>
struct Channels {
    std::vector<X> q, k, v;
};

template <class X>
std::vector<X> dense(const Array& a) {
    std::vector<X> x;
    for (int64_t b = 0; b < a.dims[0]; ++b)
        for (int64_t t = 0; t < a.dims[1]; ++t)
            for (int64_t h = 0; h < a.dims[2]; ++h)
                for (int64_t i = 0; i < a.dims[3]; ++i) x.push_back(X(a.get(b, t, h, i)));
    return x;
}

// What token t of row b brings to value head hv.
template <class X>
struct Step {
    std::vector<X> a, k, q, v;  // [K] thrice, [V]
    X beta;

    Step(const Call& x, const Channels<X>& in, int64_t b, int64_t t, int64_t hv) {
        const Case& c = x.c;
        const Problem& p = x.p;
        const int64_t token = b * c.T + t, h = c.tiled ? hv % c.H : hv / (c.HV / c.H);
        const auto row = [](const std::vector<X>& from, int64_t i, int64_t n) {
            return std::vector<X>(from.begin() + i * n, from.begin() + (i + 1) * n);
        };
        k = row(in.k, token * c.H + h, c.K);
        q = row(in.q, token * c.H + h, c.K);
        v = row(in.v, token * c.HV + hv, c.V);
        a.resize(k.size());
        for (int64_t i = 0; i < c.K; ++i) {
            const double g = c.kda ? x.g.get(b, t, hv, i) : x.g.get(b, t, hv);
            X& to = a[static_cast<size_t>(i)];
            if (c.decay == Decay::linear) {
                to = X(g);
            } else if (c.decay == Decay::log) {
                assign(to, std::exp(g), 4);
            } else {  // the exponent's error is relative to the largest number on its way
                const double A = x.A_log ? std::exp(x.A_log.get(hv)) : 1;
                const double bias = c.dt_bias ? x.dt_bias.get(c.kda ? hv * c.K + i : hv) : 0, z = g + bias;
                const double most = A * (std::fabs(g) + std::fabs(bias) + 1);
                if (c.lower_bound)
                    assign(to, std::exp(static_cast<double>(p.lower_bound) * sigmoid(A * z)),
                           8 + 8 * std::fabs(static_cast<double>(p.lower_bound)) * (1 + most));
                else
                    assign(to, std::exp(-A * softplus(z)), 8 + 8 * most);
            }
        }
        if (c.l2norm)
            for (auto* y : {&k, &q}) {
                double s = static_cast<double>(p.qk_l2norm_eps);
                for (const X& z : *y) s += value_of(z) * value_of(z);
                for (X& z : *y) z = z * X(1 / std::sqrt(s));
            }
        const double strength = x.beta.get(b, t, hv);
        assign(beta, (c.logit ? sigmoid(strength) : strength) * static_cast<double>(p.beta_scale), 8);
    }

    // Advance S [K, V]; o [V] = scale S^T q.
    void run(const Case& c, double scale, X* S, X* o) const {
        // S = diag(a) S;  d = beta (v - S^T k)
        std::vector<X> d = v;
        for (int64_t i = 0; i < c.K; ++i)
            for (int64_t j = 0; j < c.V; ++j) {
                X& s = S[i * c.V + j];
                s = s * a[static_cast<size_t>(i)];
                d[static_cast<size_t>(j)] = d[static_cast<size_t>(j)] - s * k[static_cast<size_t>(i)];
            }
        for (X& y : d) y = y * beta;
        // S = S + k d^T;  o = scale S^T q
        std::fill(o, o + c.V, X(0));
        for (int64_t i = 0; i < c.K; ++i) {
            const X qi = q[static_cast<size_t>(i)] * X(scale);
            for (int64_t j = 0; j < c.V; ++j) {
                X& s = S[i * c.V + j];
                s = s + k[static_cast<size_t>(i)] * d[static_cast<size_t>(j)];
                o[j] = o[j] + qi * s;
            }
        }
    }
};

struct Written {
    std::vector<char> snapshots;  // [Ks, N]
    std::vector<char> touched;  // [N]: not skipped
};

template <class X>
struct Expected : Written {
    std::vector<X> o;  // [B, T, HV, V]
    std::vector<X> state;  // [N, HV, K, V]
    std::vector<X> snapshot_values;  // [Ks, N, HV, K, V]
};

// S [K, V] of a row of the states and a value head.
template <class X>
void read_state(const Call& x, int64_t row, int64_t hv, X* S) {
    const Case& c = x.c;
    for (int64_t i = 0; i < c.K; ++i)
        for (int64_t j = 0; j < c.V; ++j)
            S[i * c.V + j] = X(c.vk ? x.state_in.get(row, hv, j, i) : x.state_in.get(row, hv, i, j));
}

template <class X>
Expected<X> expect(const Call& x, const Channels<X>& in) {
    const Case& c = x.c;
    Expected<X> e;
    const int64_t KV = c.K * c.V;
    e.o.resize(static_cast<size_t>(c.B * c.T * c.HV * c.V));
    e.state.resize(static_cast<size_t>(x.N * c.HV * KV));
    e.snapshot_values.resize(static_cast<size_t>(c.Ks * x.N * c.HV * KV));
    e.snapshots.assign(static_cast<size_t>(c.Ks * x.N), 0);
    e.touched.assign(static_cast<size_t>(x.N), 0);
    for (int64_t n = 0; n < x.N; ++n) {
        const int64_t row = x.rows[static_cast<size_t>(n)];
        if (row < 0) continue;
        e.touched[static_cast<size_t>(n)] = 1;
        const int64_t b = c.packed ? 0 : n, start = x.start(n), end = x.end(n);
        for (int64_t hv = 0; hv < c.HV; ++hv) {
            X* S = e.state.data() + (n * c.HV + hv) * KV;
            if (x.state_in) read_state(x, row, hv, S);
            for (int64_t t = start; t < end; ++t) {
                if (x.live(b, t))
                    Step<X>(x, in, b, t, hv)
                        .run(c, static_cast<double>(x.p.scale), S, e.o.data() + ((b * c.T + t) * c.HV + hv) * c.V);
                const int64_t slot = end - 1 - t;
                if (slot < c.Ks) {
                    e.snapshots[static_cast<size_t>(slot * x.N + n)] = 1;
                    std::copy(S, S + KV, e.snapshot_values.data() + ((slot * x.N + n) * c.HV + hv) * KV);
                }
            }
        }
    }
    return e;
}

template <class X = double>
Expected<X> expect(const Call& x) {
    return expect<X>(x, Channels<X>{dense<X>(x.q), dense<X>(x.k), dense<X>(x.v)});
}

// ---------------------------------------------------------------------------------------------------------------
// comparing

constexpr double CONTRACT = 1e-7;  // of the NMSE in float32
// What the kernels reach on these well-behaved cases with room to spare: an error that hides below the contract,
// such as a forgotten eps, still shows.
constexpr double TIGHT = 1e-10;
// Numbers of 16 bits go into a matrix unit, of float32's 24.
constexpr double TIGHT_PARTS = 1e-9;
inline double tight() { return last_isa().rfind("amx", 0) == 0 ? TIGHT_PARTS : TIGHT; }
double worst_nmse = 0, worst_half = 0;

// The error of a whole array, for numbers as models have them.
struct Error {
    const Call& call;
    const char* part;
    DType t;
    double squared = 0, rounding = 0, total = 0;
    int64_t bad = 0;
    void add(double got, double exact) {
        if (!std::isfinite(got)) ++bad;
        squared += (got - exact) * (got - exact);
        if (t != DType::f32) rounding += (rounded(exact, t) - exact) * (rounded(exact, t) - exact);
        total += exact * exact;
    }
    void judge() const {
        if (!check(bad == 0, "%s: %" PRId64 " elements are NaN or infinite", part, bad)) return;
        if (total == 0) {
            check(squared == 0, "%s: must be zero", part);
            return;
        }
        const double nmse = squared / total;
        if (t == DType::f32) {
            worst_nmse = std::max(worst_nmse, nmse);
            check(nmse <= CONTRACT && nmse <= tight(), "%s: NMSE %.3g > %.3g", part, nmse, tight());
        } else {
            const double ratio = std::sqrt(squared / std::max(rounding, 1e-30 * total));
            if (nmse > tight()) worst_half = std::max(worst_half, ratio);
            check(nmse <= tight() || ratio <= 2, "%s: error is %.3g times the rounding to %s", part, ratio, name_of(t));
        }
    }
};

// The error of each number, for any finite values: at most one rounding of all that was added up for it per operation
// on its way. Numbers that come near float32's largest on theirs are not judged.
struct BoundedError {
    const Call& call;
    const char* part;
    DType t;
    static constexpr double LARGEST = 1e12;
    void add(double got, const Bounded& exact) const {
        if (!(exact.m < LARGEST)) return;
        const Case& c = call.c;
        const double steps = static_cast<double>((c.T + call.history + 2) * (c.K + c.V + 32));
        double limit = steps * 0x1p-24 * exact.m;
        if (t == DType::bf16) limit += (std::fabs(exact.x) + limit) * 0x1p-8;
        if (t == DType::f16) limit += (std::fabs(exact.x) + limit) * 0x1p-11 + 0x1p-24;
        const bool overflows = t == DType::f16 && std::fabs(exact.x) + limit >= 65504;
        check(std::fabs(got - exact.x) <= limit || (overflows && !std::isnan(got)),
              "%s: %.9g is not %.9g, error %.3g > %.3g", part, got, exact.x, std::fabs(got - exact.x), limit);
    }
    void judge() const {}
};

struct Allowed {
    std::vector<char> o, state, snapshots;  // which elements a call may write
};

Allowed what_may_be_written(Call& x, const Written& e) {
    const Case& c = x.c;
    Allowed w;
    w.o = x.o.none_allowed();
    for (int64_t b = 0; b < c.B; ++b)
        for (int64_t t = 0; t < c.T; ++t)
            for (int64_t h = 0; h < c.HV; ++h)
                for (int64_t j = 0; j < c.V; ++j) x.o.allow(w.o, x.o.at(b, t, h, j));
    const int64_t rows = c.vk ? c.V : c.K, columns = c.vk ? c.K : c.V;
    if (Array& s = x.result_state()) {
        w.state = s.none_allowed();
        for (int64_t n = 0; n < x.N && !c.scattered; ++n) {
            if (c.in_place && !e.touched[static_cast<size_t>(n)]) continue;
            const int64_t row = c.in_place ? x.rows[static_cast<size_t>(n)] : n;
            for (int64_t h = 0; h < c.HV; ++h)
                for (int64_t i = 0; i < rows; ++i)
                    for (int64_t j = 0; j < columns; ++j) s.allow(w.state, s.at(row, h, i, j));
        }
    }
    if (c.Ks) {
        Array& into = c.scattered ? x.state_in : x.snapshots;
        std::vector<char>& allowed = c.scattered ? w.state : w.snapshots;
        if (!c.scattered) allowed = into.none_allowed();
        for (int64_t s = 0; s < c.Ks; ++s)
            for (int64_t n = 0; n < x.N; ++n)
                if (e.snapshots[static_cast<size_t>(s * x.N + n)])
                    for (int64_t h = 0; h < c.HV; ++h)
                        for (int64_t i = 0; i < rows; ++i)
                            for (int64_t j = 0; j < columns; ++j) into.allow(allowed, x.snapshot_at(s, n, h, i, j));
    }
    return w;
}

void check_strays(Call& x, const Allowed& w) {
    for (Array* a : x.inputs())
        if (*a) check(a->stray({}) == 0, "an input was changed");
    check(x.o.stray(w.o) == 0, "o: bytes between its elements were changed");
    if (Array& s = x.result_state())
        check(s.stray(w.state) == 0, "state: %" PRId64 " bytes changed that must not", s.stray(w.state));
    if (x.snapshots)
        check(x.snapshots.stray(w.snapshots) == 0, "snapshots: %" PRId64 " bytes changed that must not",
              x.snapshots.stray(w.snapshots));
#if !EXACT_HEAP
    for (Array* a : x.arrays())
        if (*a) check(a->memory->guard_intact(), "bytes before an array were changed");
#endif
}

template <class Judge, class X>
void compare_by(Call& x, const Expected<X>& e) {
    const Case& c = x.c;
    const int64_t KV = c.K * c.V;
    Judge o{x, "o", c.dtype};
    for (int64_t b = 0; b < c.B; ++b)
        for (int64_t t = 0; t < c.T; ++t)
            for (int64_t h = 0; h < c.HV; ++h)
                for (int64_t j = 0; j < c.V; ++j) {
                    const double got = x.o.get(b, t, h, j);
                    o.add(got, e.o[static_cast<size_t>(((b * c.T + t) * c.HV + h) * c.V + j)]);
                    if (x.p.mask && !x.live(b, t)) check(got == 0, "o: a masked token's output is %g", got);
                }
    o.judge();
    if (Array& s = x.result_state(); s && !c.scattered) {
        Judge state{x, "state", c.state};
        for (int64_t n = 0; n < x.N; ++n) {
            if (c.in_place && !e.touched[static_cast<size_t>(n)]) continue;
            const int64_t row = c.in_place ? x.rows[static_cast<size_t>(n)] : n;
            for (int64_t h = 0; h < c.HV; ++h)
                for (int64_t i = 0; i < c.K; ++i)
                    for (int64_t j = 0; j < c.V; ++j)
                        state.add(c.vk ? s.get(row, h, j, i) : s.get(row, h, i, j),
                                  e.state[static_cast<size_t>((n * c.HV + h) * KV + i * c.V + j)]);
        }
        state.judge();
    }
    for (int64_t slot = 0; slot < c.Ks; ++slot) {
        char part[40];
        std::snprintf(part, sizeof part, "snapshot %" PRId64, slot);
        Judge snapshot{x, part, c.state};
        for (int64_t n = 0; n < x.N; ++n) {
            if (!e.snapshots[static_cast<size_t>(slot * x.N + n)]) continue;
            for (int64_t h = 0; h < c.HV; ++h)
                for (int64_t i = 0; i < c.K; ++i)
                    for (int64_t j = 0; j < c.V; ++j)
                        snapshot.add(
                            load(c.vk ? x.snapshot_at(slot, n, h, j, i) : x.snapshot_at(slot, n, h, i, j), c.state),
                            e.snapshot_values[static_cast<size_t>(((slot * x.N + n) * c.HV + h) * KV + i * c.V + j)]);
        }
        snapshot.judge();
    }
}

void compare(Call& x, const Expected<double>& e) { compare_by<Error>(x, e); }
void compare(Call& x, const Expected<Bounded>& e) { compare_by<BoundedError>(x, e); }

// Exactly as much workspace as asked for, so that using more of it shows; at most `heads` heads and `panels` panels of
// columns at a time.
// With a `fill`, each task finds its workspace full of that byte.
void run_tasks(const Problem& p, const Kernels& kernels, int64_t heads, int64_t panels, int fill = -1) {
    heads = std::min({heads, MAX_HEADS, p.HV});
    const int64_t width = panels * kernels.panel;
    const Memory workspace(kernels.workspace(p, heads));  // 64-byte aligned: so is its size
    const FlushSubnormals flushed;
    for (int64_t n = 0; n < p.N; ++n)
        for (int64_t hv = 0; hv < p.HV; hv += heads)
            for (int64_t col = 0; col < p.V; col += width) {
                if (fill >= 0) std::memset(workspace.data(), fill, workspace.size());
                kernels.run(p, Task{n, hv, std::min(heads, p.HV - hv), col, std::min(width, p.V - col), nullptr},
                            workspace.data());
            }
}

struct Results {
    std::vector<char> o, state, snapshots;
    bool operator==(const Results& b) const { return o == b.o && state == b.state && snapshots == b.snapshots; }
};
Results results_of(Call& x) { return {x.o.bytes(), x.result_state().bytes(), x.snapshots.bytes()}; }

}  // namespace
}  // namespace anydelta::tests
