// The gated delta rule on one CPU, written once over the primitives of an ISA (isa_*.h) and compiled per ISA.
//
//     S   = diag(a_t) S               decay    a_t in [0, 1]^K (a scalar gate fills the vector)
//     d_t = beta_t (v_t - S^T e_t)    delta    e_t = k_t, or the call's erase_t with beta_t = 1
//     S   = S + k_t d_t^T             update
//     o_t = scale * S^T q_t           output                              all in float32
//
// One pass over the state takes C tokens. With Gamma_t = a_1 .. a_t (products inside the block, never quotients, so
// nothing overflows), w_s^t = k_s a_(s+1) .. a_t and the state S0 before the block:
//
//     P_t = S0^T (Gamma_t e_t)     R_t = S0^T (scale Gamma_t q_t)                     2 K V FMAs per token: `dots`
//     d_t = beta_t (v_t - P_t - sum_{s<t} (w_s^t . e_t) d_s)
//     o_t = R_t + sum_{s<=t} (w_s^t . scale q_t) d_s                                  C V FMAs per token: `solve`
//     S_C = Gamma_C S0 + sum_s w_s^C d_s^T                                            K V FMAs per token: `update`
//
// So a state element is loaded and stored once per C tokens. `prepare` computes once per block and head what does not
// depend on the column: the decayed keys and queries, w and the C x C products, the same for GDA and KDA. The rest
// runs panel by panel: W columns of the state, which stay in L1 over all prepared blocks.
#pragma once
#include "problem.h"

namespace anydelta::ANYDELTA_ISA {

// C_MAX = 6 tokens x NV = 2 vectors fill 12 accumulators. On 16 registers, 2 more hold the state and 1 the broadcast, and
// 12 >= 2 FMA ports * 4 to 5 cycles latency. With 32 registers one pass takes q and k rows together (24).
constexpr int C_MAX = 6;
constexpr int NV = 2;
constexpr int W = NV * L;                                  // columns of a panel
constexpr int ACCUMULATORS = REGISTERS == 32 ? 24 : 12;
// Channels are handled in segments. Their row stride is known at compile time, so every broadcast address is one
// register plus a constant. 9 cache lines, an odd number, spread the rows over the sets of L1.
constexpr int SEG = 128;
constexpr int LD = SEG + 16;
// 8 blocks of 6 tokens: a panel (8 KiB at K = 128) enters L1 once per 48 tokens, while the prepared rows of the 8
// blocks (90 KiB at K = 128) stay in L2.
constexpr int BLOCKS = 8;
// While one token is prepared, the rows of the token two further on are prefetched. Rows of consecutive tokens are
// HV * K * 4 bytes apart, which no hardware prefetcher follows. Fetching a whole batch ahead is too much: at such a
// stride its rows fill the same few sets of L1 and L2.
constexpr int AHEAD = 2;
// From this size on, a call's snapshots bypass the caches if the ISA can do so: a model's layers together then exceed
// the caches anyway, and no line is read only to be overwritten. Measured with AVX-512: 1.15 to 1.4 times as fast
// with states in memory, but half as fast if the same 8 MiB, which would have stayed in L3, are written repeatedly.
constexpr int64_t STREAM_BYTES = int64_t{4} << 20;
// Rows of a prepared block, each [LD] per segment.
constexpr int ROW_EQ = 0;                  // C rows Gamma_t e_t, then C rows scale Gamma_t q_t
constexpr int ROW_W = 2 * C_MAX;           // C rows w_s^C
constexpr int ROW_GAMMA = 3 * C_MAX;       // Gamma_C
constexpr int ROW_A = 3 * C_MAX + 1;       // C rows a_t, for snapshots
constexpr int ROW_K = 4 * C_MAX + 1;       // C rows k_t, for snapshots
constexpr int ROWS = 5 * C_MAX + 1;

struct Block {
    int C;
    float beta[C_MAX];
    float ke[C_MAX][C_MAX];   // [t][s], s < t: beta_t w_s^t . e_t
    float kq[C_MAX][C_MAX];   // [t][s], s <= t: w_s^t . scale q_t
    bool emits;               // a snapshot is taken inside this block
    int64_t slot[C_MAX];      // snapshot slot after token t, or -1
    float* rows;              // [segments][ROWS][LD]
};

// ---------------------------------------------------------------------------------------------------------------
// elementary functions

// x[i] = e^x[i], or e^-x[i] with `negate`, if that is a normal number: 2^n p(r), n = round(x / ln 2), r = x - n ln 2
// in two steps. p is the polynomial of degree 6 with p(0) = 1 and the smallest relative error on |r| <= ln(2) / 2
// (2e-9). N at once, step by step: a single one would wait 4 cycles for each of its ten steps.
template <int N, bool negate>
AD_INLINE void exps(V* x) {
    V n[N], r[N];
    AD_UNROLL for (int i = 0; i < N; ++i)
        n[i] = vround(vmul(x[i], vset(negate ? -1.44269504088896341f : 1.44269504088896341f)));
    // `negate` changes the sign, and so the odd coefficients of p too
    AD_UNROLL for (int i = 0; i < N; ++i)
        r[i] = negate ? vfma(n[i], vset(0.693359375f), x[i]) : vfnma(n[i], vset(0.693359375f), x[i]);
    AD_UNROLL for (int i = 0; i < N; ++i)
        r[i] = negate ? vfma(n[i], vset(-2.12194440e-4f), r[i]) : vfnma(n[i], vset(-2.12194440e-4f), r[i]);
    AD_UNROLL for (int i = 0; i < N; ++i) x[i] = vfma(vset(0.00138473819f), r[i], vset(negate ? -0.00837417493f : 0.00837417493f));
    AD_UNROLL for (int i = 0; i < N; ++i) x[i] = vfma(x[i], r[i], vset(0.0416679407f));
    AD_UNROLL for (int i = 0; i < N; ++i) x[i] = vfma(x[i], r[i], vset(negate ? -0.166664309f : 0.166664309f));
    AD_UNROLL for (int i = 0; i < N; ++i) x[i] = vfma(x[i], r[i], vset(0.499999944f));
    AD_UNROLL for (int i = 0; i < N; ++i) x[i] = vfma(x[i], r[i], vset(negate ? -1.00000003f : 1.00000003f));
    AD_UNROLL for (int i = 0; i < N; ++i) x[i] = vfma(x[i], r[i], vset(1.0f));
    AD_UNROLL for (int i = 0; i < N; ++i) x[i] = vscale2(x[i], n[i]);
}

// e^x, limited to e^88; 0 if the result would be subnormal, NaN for NaN.
AD_INLINE V vexp(V x) {
    const V lowest = vset(-87.33f);
    V e = vmin(vset(88.0f), vmax(lowest, x));
    exps<1, false>(&e);
    return vzero_below(e, x, lowest);
}

// y[i] = y[i] / (1 + e^-y[i])
template <int N>
AD_INLINE void silus(V* y) {
    V e[N];
    AD_UNROLL for (int i = 0; i < N; ++i) e[i] = vmin(vset(87.33f), vmax(vset(-87.33f), y[i]));
    exps<N, true>(e);
    AD_UNROLL for (int i = 0; i < N; ++i) y[i] = vdiv(y[i], vadd(e[i], vset(1.0f)));
}

// log(1 + e) for e in [0, 1]: 2 atanh(e / (2 + e)), whose series ends below float32's rounding at z^15 (z <= 1/3).
AD_INLINE V vlog1p01(V e) {
    const V z = vdiv(e, vadd(e, vset(2.0f)));
    const V z2 = vmul(z, z);
    V p = vset(2.0f / 13);
    p = vfma(p, z2, vset(2.0f / 11));
    p = vfma(p, z2, vset(2.0f / 9));
    p = vfma(p, z2, vset(2.0f / 7));
    p = vfma(p, z2, vset(2.0f / 5));
    p = vfma(p, z2, vset(2.0f / 3));
    p = vfma(p, z2, vset(2.0f));
    return vmul(p, z);
}

AD_INLINE V vneg_abs(V x) { return vmin(x, vsub(vzero(), x)); }
AD_INLINE V vsoftplus(V x) { return vadd(vmax(x, vzero()), vlog1p01(vexp(vneg_abs(x)))); }
AD_INLINE V vsigmoid(V x) {
    const V e = vexp(vneg_abs(x));  // <= 1: no overflow on either side
    const V below = vdiv(e, vadd(e, vset(1.0f)));
    // sigmoid(x) = 1 - sigmoid(-x) for x >= 0
    return vadd(below, vzero_below(vsub(vset(1.0f), vadd(below, below)), x, vzero()));
}

// One lane of the vector functions, so that scalar gates round exactly as vector gates do.
AD_INLINE float first(V x) {
    float lanes[L];
    vstore(lanes, x);
    return lanes[0];
}

// a = the decay in [0, 1] from gate value x, in the form the caller gave it
AD_INLINE V decay_of(const Problem& p, V x, V A) {
    if (p.decay == Decay::linear) return x;
    if (p.decay == Decay::log) return vexp(x);
    if (p.has_lower_bound) return vexp(vmul(vset(p.lower_bound), vsigmoid(vmul(A, x))));
    return vexp(vsub(vzero(), vmul(A, vsoftplus(x))));
}

// ---------------------------------------------------------------------------------------------------------------
// rows in and out

template <class T>
AD_INLINE void read_as(float* dst, const T* src, int64_t n) {
        int64_t i = 0;
    for (; i + L <= n; i += L) vstore(dst + i, vload(src + i));
    for (; i < n; ++i) dst[i] = to_float(src[i]);
}
template <class T>
AD_INLINE void write_as(T* dst, const float* src, int64_t n) {
        int64_t i = 0;
    for (; i + L <= n; i += L) vstore(dst + i, vload(src + i));
    for (; i < n; ++i) dst[i] = from_float(src[i], T{});
}

AD_INLINE int64_t dtype_size(DType t) { return t == DType::f32 ? 4 : 2; }

static const void* element(const void* base, DType dtype, int64_t offset) {
    return static_cast<const char*>(base) + offset * dtype_size(dtype);
}
static void read_row(float* dst, const void* src, DType dtype, int64_t n) {
    if (dtype == DType::f32) return read_as(dst, static_cast<const float*>(src), n);
    if (dtype == DType::bf16) return read_as(dst, static_cast<const bf16*>(src), n);
    read_as(dst, static_cast<const f16*>(src), n);
}
static void write_row(void* dst, DType dtype, const float* src, int64_t n) {
    if (dtype == DType::f32) return write_as(static_cast<float*>(dst), src, n);
    if (dtype == DType::bf16) return write_as(static_cast<bf16*>(dst), src, n);
    write_as(static_cast<f16*>(dst), src, n);
}
static float read_one(const void* src, DType dtype) {
    float x;
    read_row(&x, src, dtype, 1);
    return x;
}

// x[i] becomes the i-th elements of all x
AD_INLINE void transpose(V (&x)[L]) {
    AD_UNROLL for (int stage = 1; stage < L; stage *= 2) {
        V y[L];
        AD_UNROLL for (int i = 0; i < L / 2; ++i) {
            y[2 * i] = vzip_low(x[i], x[i + L / 2]);
            y[2 * i + 1] = vzip_high(x[i], x[i + L / 2]);
    }
        AD_UNROLL for (int i = 0; i < L; ++i) x[i] = y[i];
    }
}

// f(data), with data as a pointer to numbers of that type.
template <class F>
AD_INLINE void in_type_of(const void* data, DType dtype, F f) {
    if (dtype == DType::f32) return f(static_cast<const float*>(data));
    if (dtype == DType::bf16) return f(static_cast<const bf16*>(data));
    f(static_cast<const f16*>(data));
}
template <class F>
AD_INLINE void in_type_of(void* data, DType dtype, F f) {
    if (dtype == DType::f32) return f(static_cast<float*>(data));
    if (dtype == DType::bf16) return f(static_cast<bf16*>(data));
    f(static_cast<f16*>(data));
}

AD_INLINE int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
AD_INLINE int64_t segments(const Problem& p) { return (p.K + SEG - 1) / SEG; }
AD_INLINE const void* token(const Tokens& x, int64_t b, int64_t t, int64_t h) {
    return element(x.data, x.dtype, b * x.b + t * x.t + h * x.h);
}

AD_INLINE int64_t qk_head(const Problem& p, int64_t hv) { return p.tiled ? hv % p.H : hv / (p.HV / p.H); }

AD_INLINE int64_t erase_head(const Problem& p, int64_t hv) { return p.erase.heads == p.HV ? hv : qk_head(p, hv); }

// exp(A_log) of a value head, and its dt_bias as a row of channels (scalar gate: one), readable to
// the next whole vector.
static float gate_parameters(const Problem& p, int64_t hv, float* bias) {
    if (p.dt_bias) {
        const int64_t n = p.kda ? p.K : 1;
        for (int64_t i = 0; i < round_up(n, L); ++i) bias[i] = 0.0f;
        read_row(bias, element(p.dt_bias, p.dt_bias_dtype, hv * n), p.dt_bias_dtype, n);
    }
    if (!p.A_log) return 1.0f;
    return first(vexp(vset(read_one(element(p.A_log, p.A_log_dtype, hv), p.A_log_dtype))));
}

// Prefetch n channels of a row. Always inlined, as every function that only prefetches: GCC takes such a function for
// one without effects and drops the call.
template <bool write>
AD_INLINE void fetch(const Tokens& x, int64_t b, int64_t t, int64_t h, int64_t first, int64_t n) {
    const char* row = static_cast<const char*>(token(x, b, t, h)) + first * dtype_size(x.dtype);
    for (int64_t i = 0; i < n * dtype_size(x.dtype); i += 64)
        if (write)
            AD_PREFETCH_WRITE(row + i);
            else
            AD_PREFETCH(row + i);
}
AD_INLINE void fetch_l2(const Tokens& x, int64_t b, int64_t t, int64_t h, int64_t first, int64_t n) {
    const char* row = static_cast<const char*>(token(x, b, t, h)) + first * dtype_size(x.dtype);
    for (int64_t i = 0; i < n * dtype_size(x.dtype); i += 64) AD_PREFETCH_L2(row + i);
}

// ---------------------------------------------------------------------------------------------------------------
// prepare: the part of a block that does not depend on the column

struct Arena {
    char* at;
    template <class T>
    T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(at);
        at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return p;
    }
};

struct Scratch {  // one token, [segments * SEG] each
    float *k, *q, *a, *e;
    void carve(Arena& arena, int64_t segments) {
        k = arena.take<float>(segments * SEG);
        q = arena.take<float>(segments * SEG);
        a = arena.take<float>(segments * SEG);
        e = arena.take<float>(segments * SEG);
    }
    void pad(int64_t K) const {
        for (int64_t i = K; i < round_up(K, L); ++i) k[i] = q[i] = a[i] = e[i] = 0.0f;
    }
};

struct Token {
    const float *k, *q;        // k_t / k_factor, scale q_t / q_factor: the caller's memory, or scratch
    const float* e;            // erase_t, if the call has it
    const float* a;            // a_t (KDA)
    float k_factor, q_factor;  // from the L2 norm and the scale
    float alpha;               // a_t (GDA)
};

static float squared_norm(const float* x, int64_t n) {
    V s = vzero();
    for (int64_t i = 0; i < n; i += L) s = vfma(vload(x + i), vload(x + i), s);
    return vsum(s);
}

// 1 / sqrt(sum x^2 / count + eps), 0 for 0. If a square leaves float32's range, x becomes a copy in `scratch`, scaled
// by a power of two (`unit`), and the result is the factor of that copy.
AD_INLINE float inverse_length(const float*& x, int64_t n, float count, float eps, float* scratch, float& unit) {
    const float s = squared_norm(x, n) / count + eps;
    // below 2^-90 the lost squares, each less than 2^-126, may matter
    unit = 1.0f;
    if (s >= 0x1p-90f && s <= 3.402823466e38f) return 1.0f / root(s);
    unit = s < 1.0f ? 0x1p100f : 0x1p-100f;
    for (int64_t i = 0; i < n; i += L) vstore(scratch + i, vmul(vload(x + i), vset(unit)));
    x = scratch;
    const float scaled = squared_norm(x, n) / count + eps * unit * unit;
    return scaled == 0.0f ? 0.0f : 1.0f / root(scaled);
}
AD_INLINE float inverse_length(const float*& x, int64_t n, float count, float eps, float* scratch) {
    float unit;
    return inverse_length(x, n, count, eps, scratch, unit);
}

// K channels as float32, readable to the next whole vector.
static const float* channels(const Problem& p, const void* src, DType dtype, float* scratch) {
    if (dtype == DType::f32 && p.K % L == 0) return static_cast<const float*>(src);
    read_row(scratch, src, dtype, p.K);
    return scratch;
}

// k_t and q_t of the tokens t[0 .. count) of a block, each with its own scratch memory.
static void read_keys(const Problem& p, int64_t b, const int64_t* t, int count, int64_t hv, const Scratch* scratch,
                      Token* tokens) {
    const int64_t h = qk_head(p, hv), n = round_up(p.K, L);
        for (int c = 0; c < count; ++c) {
        Token& x = tokens[c];
        const Scratch& s = scratch[c];
        x.k = channels(p, token(p.k, b, t[c], h), p.k.dtype, s.k);
        x.q = channels(p, token(p.q, b, t[c], h), p.q.dtype, s.q);
        x.k_factor = 1.0f;
        x.q_factor = p.scale;
        if (p.qk_l2norm) {
            x.k_factor = inverse_length(x.k, n, 1.0f, p.qk_l2norm_eps, s.k);
            x.q_factor *= inverse_length(x.q, n, 1.0f, p.qk_l2norm_eps, s.q);
    }
    }
}

// Their decays and betas, all at once: the roots and exponentials of one token alone would wait for each other, and a
// gate would fill only one lane of a vector.
static void read_gates(const Problem& p, int64_t b, const int64_t* t, int count, int64_t hv, float A, const float* bias,
                       const Scratch* scratch, Token* tokens, float* beta) {
    constexpr int LANES = (C_MAX + L - 1) / L * L;
    const int64_t n = round_up(p.K, L);
    alignas(64) float gates[LANES] = {}, betas[LANES] = {};
        for (int c = 0; c < count; ++c) {
        Token& x = tokens[c];
        const Scratch& s = scratch[c];
        betas[c] = p.erase.data ? 1.0f : read_one(token(p.beta, b, t[c], hv), p.beta.dtype);
        const void* g = token(p.g, b, t[c], hv);
        x.a = s.a;
        if (p.kda) {
            read_row(s.a, g, p.g.dtype, p.K);
            if (p.dt_bias)
                for (int64_t i = 0; i < n; i += L) vstore(s.a + i, vadd(vload(s.a + i), vload(bias + i)));
            for (int64_t i = 0; i < n; i += L) vstore(s.a + i, decay_of(p, vload(s.a + i), vset(A)));
        } else {
            gates[c] = read_one(g, p.g.dtype) + (p.dt_bias ? bias[0] : 0.0f);
    }
    }
    for (int i = 0; i < LANES; i += L) {
        if (!p.kda) vstore(gates + i, decay_of(p, vload(gates + i), vset(A)));
        if (p.beta_is_logit) vstore(betas + i, vsigmoid(vload(betas + i)));
    }
        for (int c = 0; c < count; ++c) {
        tokens[c].alpha = gates[c];
        beta[c] = p.beta_scale * betas[c];
    }
}

// Results that are known before a token is read: its rows, from the previous value head of the same q/k head, and its
// gates, which several heads compute in one vector.
struct Known {
    bool rows = false, gates = false;
    float alpha = 0.0f, beta = 0.0f;
};

// The scalar gates of one token and up to MAX_HEADS value heads, hv0 + i * step.
static void read_gates_of_heads(const Problem& p, int64_t b, int64_t t, int64_t hv0, int64_t step, int64_t count,
                                const float* A, const float* const* bias, Known* known) {
    constexpr int LANES = static_cast<int>((MAX_HEADS + L - 1) / L * L);
    alignas(64) float gates[LANES] = {}, betas[LANES] = {}, factors[LANES] = {};
    for (int64_t i = 0; i < count; ++i) {
        const int64_t hv = hv0 + i * step;
        gates[i] = read_one(token(p.g, b, t, hv), p.g.dtype) + (p.dt_bias ? bias[i][0] : 0.0f);
        betas[i] = p.erase.data ? 1.0f : read_one(token(p.beta, b, t, hv), p.beta.dtype);
        factors[i] = A[i];
    }
    for (int i = 0; i < LANES; i += L) {
        vstore(gates + i, decay_of(p, vload(gates + i), vload(factors + i)));
        if (p.beta_is_logit) vstore(betas + i, vsigmoid(vload(betas + i)));
    }
    for (int64_t i = 0; i < count; ++i) known[i] = Known{false, true, gates[i], p.beta_scale * betas[i]};
}

static void read_tokens(const Problem& p, int64_t b, const int64_t* t, int count, int64_t hv, float A, const float* bias,
                        const Scratch* scratch, Token* tokens, float* beta, const Known& known = {}) {
    if (!known.rows) read_keys(p, b, t, count, hv, scratch, tokens);
    if (p.erase.data)
        for (int c = 0; c < count; ++c)
            tokens[c].e = channels(p, token(p.erase, b, t[c], erase_head(p, hv)), p.erase.dtype, scratch[c].e);
    if (!known.gates) return read_gates(p, b, t, count, hv, A, bias, scratch, tokens, beta);
    for (int c = 0; c < count; ++c) tokens[c].alpha = known.alpha, beta[c] = known.beta;
}

// Append token t of the block: Gamma_t, decayed rows, and its products with all earlier keys of the block.
template <int t, bool kda, bool erase>
static void append_token(const Problem& p, const Token& x, Block& blk) {
    V ke[t + 1], kq[t + 1];
    AD_UNROLL for (int u = 0; u <= t; ++u) ke[u] = kq[u] = vzero();
    const V k_factor = vset(x.k_factor), q_factor = vset(x.q_factor), alpha = vset(kda ? 0.0f : x.alpha);
        for (int64_t seg = 0; seg < segments(p); ++seg) {
        float* rows = blk.rows + seg * ROWS * LD;
            const int64_t n = p.K - seg * SEG < SEG ? p.K - seg * SEG : SEG;
        const float *k = x.k + seg * SEG, *q = x.q + seg * SEG, *a = x.a + seg * SEG;
        const float* e = erase ? x.e + seg * SEG : nullptr;
            for (int64_t i = 0; i < n; i += L) {
            const V ki = vmul(k_factor, vload(k + i)), qi = vmul(q_factor, vload(q + i));
            const V ai = kda ? vload(a + i) : alpha, ei = erase ? vload(e + i) : ki;
            const V gamma = t == 0 ? ai : vmul(vload(rows + ROW_GAMMA * LD + i), ai);
            vstore(rows + ROW_GAMMA * LD + i, gamma);
            vstore(rows + (ROW_EQ + t) * LD + i, vmul(gamma, ei));
            vstore(rows + (ROW_EQ + blk.C + t) * LD + i, vmul(gamma, qi));
            AD_UNROLL for (int u = 0; u < t; ++u) {
                const V w = vmul(vload(rows + (ROW_W + u) * LD + i), ai);
                vstore(rows + (ROW_W + u) * LD + i, w);
                ke[u] = vfma(w, ei, ke[u]);
                kq[u] = vfma(w, qi, kq[u]);
    }
            vstore(rows + (ROW_W + t) * LD + i, ki);
            kq[t] = vfma(ki, qi, kq[t]);
            if (blk.emits) {
                vstore(rows + (ROW_A + t) * LD + i, ai);
                vstore(rows + (ROW_K + t) * LD + i, ki);
    }
    }
    }
    AD_UNROLL for (int u = 0; u < t; ++u) blk.ke[t][u] = blk.beta[t] * vsum(ke[u]);
    AD_UNROLL for (int u = 0; u <= t; ++u) blk.kq[t][u] = vsum(kq[u]);
}

template <bool kda, bool erase>
static void append_as(const Problem& p, const Token& x, Block& blk, int t) {
    switch (t) {
        case 0: return append_token<0, kda, erase>(p, x, blk);
        case 1: return append_token<1, kda, erase>(p, x, blk);
        case 2: return append_token<2, kda, erase>(p, x, blk);
        case 3: return append_token<3, kda, erase>(p, x, blk);
        case 4: return append_token<4, kda, erase>(p, x, blk);
        default: return append_token<5, kda, erase>(p, x, blk);
    }
}
static void append(const Problem& p, const Token& x, Block& blk, int t) {
    if (p.erase.data) return p.kda ? append_as<true, true>(p, x, blk, t) : append_as<false, true>(p, x, blk, t);
    return p.kda ? append_as<true, false>(p, x, blk, t) : append_as<false, false>(p, x, blk, t);
}
static_assert(C_MAX == 6, "append and the step tables below list the block sizes");

// ---------------------------------------------------------------------------------------------------------------
// dots: out[r] = S0^T row_r for R rows and N vectors of columns. Per channel, one line of `next`, the rows that are
// read after these, is fetched from L2: all rows cross into their next lines at once, more misses than the core can
// hide.

template <int R, int N>
AD_INLINE void dots(const float* rows, const float* S, int64_t n, float* out, bool accumulate, const float* next) {
    V acc[R][N];
    AD_UNROLL for (int r = 0; r < R; ++r)
        AD_UNROLL for (int j = 0; j < N; ++j) acc[r][j] = accumulate ? vload(out + (r * N + j) * L) : vzero();
    for (int64_t i = 0; i < n; ++i, S += W, ++rows, next += 16) {
            AD_PREFETCH(next);
        V s[N];
        AD_UNROLL for (int j = 0; j < N; ++j) s[j] = vload(S + j * L);
        AD_UNROLL for (int r = 0; r < R; ++r) {
            const V x = vsplat(rows + r * LD);
            AD_UNROLL for (int j = 0; j < N; ++j) acc[r][j] = vfma(x, s[j], acc[r][j]);
    }
    }
    AD_UNROLL for (int r = 0; r < R; ++r)
        AD_UNROLL for (int j = 0; j < N; ++j) vstore(out + (r * N + j) * L, acc[r][j]);
}

// dots for the C rows e and C query rows of a block: PR [2C][N L]
template <int C, int N>
AD_INLINE void block_dots(const Problem& p, const Block& blk, const float* tile, float* PR) {
    constexpr int R = 2 * C * N <= ACCUMULATORS ? 2 * C : C;  // rows per pass
        for (int64_t seg = 0; seg < segments(p); ++seg) {
            const float* rows = blk.rows + (seg * ROWS + ROW_EQ) * LD;
            const int64_t n = p.K - seg * SEG < SEG ? p.K - seg * SEG : SEG;
        for (int r = 0; r < 2 * C; r += R)
            dots<R, N>(rows + r * LD, tile + seg * SEG * W, n, PR + r * N * L, seg > 0, rows + (r + R) * LD);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// solve: the triangular part, on L columns.  D_t = beta_t (v_t - P_t) - sum ke[t][s] D_s,  o_t = R_t + sum kq[t][s]
// D_s.
// P, R [C] each with row stride ldp; D may be P. As soon as D_s is known it is subtracted from all later tokens, so the
// chain has C FMAs instead of C^2 / 2.

template <int C>
AD_INLINE void solve(const Block& blk, const float* P, const float* R, int64_t ldp, const float* v,
                     int64_t ldv, float* o, int64_t ldo, float* D, int64_t ldd) {
        V d[C];
    AD_UNROLL for (int t = 0; t < C; ++t)
        d[t] = vmul(vset(blk.beta[t]), vsub(vload(v + t * ldv), vload(P + t * ldp)));
    AD_UNROLL for (int s = 0; s < C; ++s)
        AD_UNROLL for (int t = s + 1; t < C; ++t) d[t] = vfnma(vset(blk.ke[t][s]), d[s], d[t]);
        AD_UNROLL for (int t = 0; t < C; ++t) {
        V y = vload(R + t * ldp);
        AD_UNROLL for (int s = 0; s <= t; ++s) y = vfma(vset(blk.kq[t][s]), d[s], y);
        vstore(o + t * ldo, y);
    }
    AD_UNROLL for (int t = 0; t < C; ++t) vstore(D + t * ldd, d[t]);
}

// ---------------------------------------------------------------------------------------------------------------
// update: S_C = Gamma_C S0 + sum_s w_s d_s^T, from the tile to dst (which may be the tile). Per channel, a line of
// `next` is fetched: the rows of the following block, or at the end the state of the following task.

template <int C, int N>
AD_INLINE void update(const Problem& p, const Block& blk, const float* S, float* dst, int64_t ldd, const float* D,
                          const char* next) {
    V d[C][N];
    AD_UNROLL for (int t = 0; t < C; ++t)
        AD_UNROLL for (int j = 0; j < N; ++j) d[t][j] = vload(D + (t * N + j) * L);
        for (int64_t seg = 0; seg < segments(p); ++seg) {
            const float* rows = blk.rows + (seg * ROWS + ROW_W) * LD;
            const int64_t n = p.K - seg * SEG < SEG ? p.K - seg * SEG : SEG;
        for (int64_t i = 0; i < n; ++i, S += W, dst += ldd, ++rows, next += 64) {
            AD_PREFETCH(next);
        V s[N];
        const V gamma = vsplat(rows + (ROW_GAMMA - ROW_W) * LD);
            AD_UNROLL for (int j = 0; j < N; ++j) s[j] = vmul(gamma, vload(S + j * L));
        AD_UNROLL for (int t = 0; t < C; ++t) {
            const V w = vsplat(rows + t * LD);
            AD_UNROLL for (int j = 0; j < N; ++j) s[j] = vfma(w, d[t][j], s[j]);
    }
            AD_UNROLL for (int j = 0; j < N; ++j) vstore(dst + j * L, s[j]);
    }
    }
}

// One block on one panel. dst null: the state is not wanted.
template <int C>
static void step(const Problem& p, const Block& blk, float* tile, float* dst, int64_t ldd, const float* v, int64_t ldv,
                 float* o, const char* next) {
    alignas(64) float PR[2 * C * W];
    alignas(64) float D[C * W];
    block_dots<C, NV>(p, blk, tile, PR);
                AD_UNROLL for (int j = 0; j < W; j += L)
        solve<C>(blk, PR + j, PR + C * W + j, W, v + j, ldv, o + j, ldv, D + j, W);
    if (dst) update<C, NV>(p, blk, tile, dst, ldd, D, next);
}

static void step_any(const Problem& p, const Block& blk, float* tile, float* dst, int64_t ldd, const float* v,
                     int64_t ldv, float* o, const char* next) {
    switch (blk.C) {
        case 1: return step<1>(p, blk, tile, dst, ldd, v, ldv, o, next);
        case 2: return step<2>(p, blk, tile, dst, ldd, v, ldv, o, next);
        case 3: return step<3>(p, blk, tile, dst, ldd, v, ldv, o, next);
        case 4: return step<4>(p, blk, tile, dst, ldd, v, ldv, o, next);
        case 5: return step<5>(p, blk, tile, dst, ldd, v, ldv, o, next);
        default: return step<6>(p, blk, tile, dst, ldd, v, ldv, o, next);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// The same block on a state in the caller's memory, row by row in address order. A panel of such a state is a 64-byte
// piece every V * 4 bytes, bad for the prefetchers and for the sets of L1. Here the accumulators (2 C rows of V floats)
// are in L1 instead of registers, and the state streams.

// Prefetch rows [from, to) of the following state, `bytes` wide, into L2. Each of the two passes over a state
// fetches half of the next one: memory then works during the first pass too, and L1 is left alone (two states of K
// = V = 128 fill it).
AD_INLINE void fetch_rows(const char* next, int64_t row, int64_t from, int64_t to, int64_t bytes) {
    for (int64_t r = from; r < to; ++r)
        for (int64_t c = 0; c < bytes; c += 64) AD_PREFETCH_L2(next + r * row + c);
}

// Prefetch the i-th of the 2 K half rows of the next state; rows are `bytes` wide.
template <int64_t bytes>
AD_INLINE void fetch_half(const char* next, int64_t row, int64_t i) {
    if (bytes < 128 && i % 2) return;
    const char* at = next + i / 2 * row + (bytes < 128 ? 0 : i % 2 * (bytes / 2));
    AD_UNROLL for (int64_t c = 0; c < (bytes < 128 ? bytes : bytes / 2); c += 64) AD_PREFETCH_L2(at + c);
}

// Two vectors of columns of a state. bfloat16 states are split into even and odd columns (`SPLITS_BF16`). The sums
// over them are split too, until `in_order` reorders them, and `apart` splits the deltas.
template <class St>
constexpr bool SPLIT = false;
template <>
constexpr bool SPLIT<bf16> = SPLITS_BF16;
template <class St>
AD_INLINE void load_pair(const St* S, V& x, V& y) {
    if constexpr (SPLIT<St>) {
        vload_split(S, x, y);
        } else {
        x = vload(S);
        y = vload(S + L);
    }
}
template <class St>
AD_INLINE void store_pair(St* S, V x, V y) {
    if constexpr (SPLIT<St>) {
        vstore_split(S, x, y);
        } else {
        vstore(S, x);
        vstore(S + L, y);
    }
}
template <class St>
AD_INLINE void in_order(float* PR, int64_t n) {
    if (!SPLIT<St>) return;
    for (int64_t i = 0; i < n; i += 2 * L) {
        const V x = vload(PR + i), y = vload(PR + i + L);
        vstore(PR + i, vzip_low(x, y));
        vstore(PR + i + L, vzip_high(x, y));
    }
}
template <class St>
AD_INLINE void apart(float* D, int64_t n) {
    if (!SPLIT<St>) return;
    for (int64_t i = 0; i < n; i += 2 * L) {
        const V x = vload(D + i), y = vload(D + i + L);
        vstore(D + i, vunzip_even(x, y));
        vstore(D + i + L, vunzip_odd(x, y));
    }
}

// dots of one token on N vectors of columns, with its sums in registers: a row of 2 KiB at most, in address order.
template <int N, class St>
AD_INLINE void dots_columns(const Problem& p, const Block& blk, const St* S, int64_t lds, float* PR, int64_t ldp,
                         const char* next, int64_t next_row) {
    V P[N], R[N];
    AD_UNROLL for (int j = 0; j < N; ++j) P[j] = R[j] = vzero();
    for (int64_t i = 0; i < p.K; ++i, S += lds) {
        fetch_half<N * L * static_cast<int64_t>(sizeof(St))>(next, next_row, i);
        const float* rows = blk.rows + (i / SEG * ROWS + ROW_EQ) * LD + i % SEG;
        V s[N];
        AD_UNROLL for (int j = 0; j < N; j += 2) load_pair(S + j * L, s[j], s[j + 1]);
        const V e = vsplat(rows), q = vsplat(rows + LD);
    AD_UNROLL for (int j = 0; j < N; ++j) {
            P[j] = vfma(e, s[j], P[j]);
            R[j] = vfma(q, s[j], R[j]);
    }
    }
    AD_UNROLL for (int j = 0; j < N; ++j) {
        vstore(PR + j * L, P[j]);
        vstore(PR + ldp + j * L, R[j]);
    }
}

// Each of the PASSES passes over a state fetches its share of the next state's rows.
template <int C, int G, int PASSES, class St>
AD_INLINE void dots_rows(const float* rows, int64_t i0, const St* S, int64_t lds, int64_t cols, float* PR, int64_t ldp,
                         const char* next, int64_t next_row) {
    // G rows of the state at once: each accumulator is loaded and stored once per G FMAs
        for (int64_t c = 0; c < cols; c += 2 * L) {
        // in small pieces if there is much to compute, else row by row (below)
        if (C > 1)
            fetch_rows(next + c * sizeof(St), next_row, i0 / PASSES, (i0 + G) / PASSES,
                       2 * L * static_cast<int64_t>(sizeof(St)));
        V s[G][2];
        AD_UNROLL for (int i = 0; i < G; ++i) load_pair(S + i * lds + c, s[i][0], s[i][1]);
                AD_UNROLL for (int r = 0; r < 2 * C; ++r) {
            float* acc = PR + r * ldp + c;
            V x = vload(acc), y = vload(acc + L);
            AD_UNROLL for (int i = 0; i < G; ++i) {
                const V f = vsplat(rows + r * LD + i);
                x = vfma(f, s[i][0], x);
                y = vfma(f, s[i][1], y);
    }
            vstore(acc, x);
            vstore(acc + L, y);
    }
    }
    if (C == 1)
        fetch_rows(next, next_row, i0 / PASSES, (i0 + G) / PASSES, cols * static_cast<int64_t>(sizeof(St)));
}

// Where the state after each token of a block goes, or null. With it the update runs token by token in registers: one
// read of the state, and one write per snapshot.
struct Emission {
    float* dst[C_MAX];
    int64_t ld;
    bool streams;  // stores bypass the caches
};

template <bool streams>
AD_INLINE void emit(float* dst, V x) {
    if (streams)
        vstream(dst, x);
            else
        vstore(dst, x);
}

template <int C, bool streams>
static void emit_rows(const Problem& p, const Block& blk, const float* S, int64_t lds, float* dst, int64_t ldd,
                      int64_t cols, const float* D, int64_t ldp, const Emission& out, const char* next) {
    for (int64_t i = 0; i < p.K; ++i, S += lds) {
        fetch_rows(next, lds * 4, (p.K + i) / 2, (p.K + i + 1) / 2, cols * 4);
        const float* rows = blk.rows + i / SEG * ROWS * LD + i % SEG;
        for (int64_t c = 0; c < cols; c += 2 * L) {
            V x = vload(S + c), y = vload(S + c + L);
        AD_UNROLL for (int t = 0; t < C; ++t) {
                const V a = vsplat(rows + (ROW_A + t) * LD), k = vsplat(rows + (ROW_K + t) * LD);
                x = vfma(k, vload(D + t * ldp + c), vmul(a, x));
                y = vfma(k, vload(D + t * ldp + c + L), vmul(a, y));
                if (!out.dst[t]) continue;
                emit<streams>(out.dst[t] + i * out.ld + c, x);
                emit<streams>(out.dst[t] + i * out.ld + c + L, y);
    }
            if (dst) {
                vstore(dst + i * ldd + c, x);
                vstore(dst + i * ldd + c + L, y);
    }
    }
    }
    if (streams) vfence();
}

// S_C = Gamma_C S0 + sum_s w_s d_s^T row by row, for blocks that memory limits. The last rows come first: the dots
// have left them in L1.
template <int C, class St>
AD_INLINE void update_rows(const Problem& p, const Block& blk, const St* S, int64_t lds, St* dst, int64_t ldd,
                           int64_t cols, const float* D, int64_t ldp, const char* next, int64_t next_row) {
    S += (p.K - 1) * lds;
    dst += (p.K - 1) * ldd;
    for (int64_t i = p.K - 1, done = 0; i >= 0; --i, ++done, S -= lds, dst -= ldd) {
        fetch_rows(next, next_row, (p.K + done) / 2, (p.K + done + 1) / 2, cols * static_cast<int64_t>(sizeof(St)));
        const float* rows = blk.rows + (i / SEG * ROWS + ROW_W) * LD + i % SEG;
        V w[C];
        const V gamma = vsplat(rows + (ROW_GAMMA - ROW_W) * LD);
        AD_UNROLL for (int t = 0; t < C; ++t) w[t] = vsplat(rows + t * LD);
        for (int64_t c = 0; c < cols; c += 2 * L) {
            V x, y;
            load_pair(S + c, x, y);
            x = vmul(gamma, x);
            y = vmul(gamma, y);
        AD_UNROLL for (int t = 0; t < C; ++t) {
                x = vfma(w[t], vload(D + t * ldp + c), x);
                y = vfma(w[t], vload(D + t * ldp + c + L), y);
    }
            store_pair(dst + c, x, y);
    }
    }
}

// The same on N L columns. Their deltas stay in registers over all rows.
template <int C, int N, class St>
AD_INLINE void update_columns(const Problem& p, const Block& blk, const St* S, int64_t lds, St* dst, int64_t ldd,
                              const float* D, int64_t ldp, const char* next, int64_t next_row) {
    V d[C][N];
    AD_UNROLL for (int t = 0; t < C; ++t)
        AD_UNROLL for (int j = 0; j < N; ++j) d[t][j] = vload(D + t * ldp + j * L);
    S += (p.K - 1) * lds;
    dst += (p.K - 1) * ldd;
    for (int64_t i = p.K - 1, done = 0; i >= 0; --i, ++done, S -= lds, dst -= ldd) {
        fetch_half<N * L * static_cast<int64_t>(sizeof(St))>(next, next_row, p.K + done);
        const float* rows = blk.rows + (i / SEG * ROWS + ROW_W) * LD + i % SEG;
        const V gamma = vsplat(rows + (ROW_GAMMA - ROW_W) * LD);
        V s[N];
        AD_UNROLL for (int j = 0; j < N; j += 2) load_pair(S + j * L, s[j], s[j + 1]);
        AD_UNROLL for (int j = 0; j < N; ++j) s[j] = vmul(gamma, s[j]);
        AD_UNROLL for (int t = 0; t < C; ++t) {
            const V w = vsplat(rows + t * LD);
            AD_UNROLL for (int j = 0; j < N; ++j) s[j] = vfma(w, d[t][j], s[j]);
    }
        AD_UNROLL for (int j = 0; j < N; j += 2) store_pair(dst + j * L, s[j], s[j + 1]);
    }
}

template <int C, class St>
static void step_rows(const Problem& p, const Block& blk, const St* S, int64_t lds, St* dst, int64_t ldd, int64_t cols,
                      const float* v, float* o, int64_t ldv, float* PR, const Emission& out, const char* next) {
    const int64_t ldp = cols, next_row = lds * static_cast<int64_t>(sizeof(St));
    constexpr int WIDE = 8;  // vectors whose two sums fit in registers
    const int64_t wide = C == 1 && REGISTERS == 32 ? cols / (WIDE * L) * (WIDE * L) : 0;
    if constexpr (C == 1 && REGISTERS == 32) {
        for (int64_t c = 0; c < wide; c += WIDE * L)
            dots_columns<WIDE>(p, blk, S + c, lds, PR + c, ldp, next + c * static_cast<int64_t>(sizeof(St)), next_row);
    }
    for (int64_t r = 0; r < 2 * C; ++r)
        for (int64_t c = wide; c < ldp; c += L) vstore(PR + r * ldp + c, vzero());
    constexpr int G = REGISTERS == 32 ? 8 : 4;
    for (int64_t i = 0; i < p.K && wide < cols;) {
        const float* rows = blk.rows + (i / SEG * ROWS + ROW_EQ) * LD + i % SEG;
        if (i + G <= p.K) {
            dots_rows<C, G, 2>(rows, i, S + i * lds + wide, lds, cols - wide, PR + wide, ldp, next + wide * sizeof(St), next_row);
            i += G;
        } else {
            dots_rows<C, 1, 2>(rows, i, S + i * lds + wide, lds, cols - wide, PR + wide, ldp, next + wide * sizeof(St), next_row);
            i += 1;
    }
    }
    in_order<St>(PR, 2 * C * ldp);
    for (int64_t c = 0; c < cols; c += L) solve<C>(blk, PR + c, PR + C * ldp + c, ldp, v + c, ldv, o + c, ldv, PR + c, ldp);
    const float* D = PR;  // rows 0 to C-1 now hold the deltas
    if constexpr (sizeof(St) == 4) {
        if (blk.emits)
            return out.streams ? emit_rows<C, STREAMS>(p, blk, S, lds, dst, ldd, cols, D, ldp, out, next)
                               : emit_rows<C, false>(p, blk, S, lds, dst, ldd, cols, D, ldp, out, next);
    }
    if (!dst) return;
    apart<St>(PR, C * ldp);
    constexpr int N = 4;  // vectors
    int64_t c = 0;
    if constexpr (C == 1 && REGISTERS == 32)
        for (; c < wide; c += WIDE * L)
            update_columns<C, WIDE>(p, blk, S + c, lds, dst + c, ldd, D + c, ldp,
                                    next + c * static_cast<int64_t>(sizeof(St)), next_row);
    if (C <= 2 && c < cols)
        return update_rows<C>(p, blk, S + c, lds, dst + c, ldd, cols - c, D + c, ldp, next + c * sizeof(St), next_row);
    for (; c + N * L <= cols; c += N * L)
        update_columns<C, N>(p, blk, S + c, lds, dst + c, ldd, D + c, ldp, next + c * sizeof(St), next_row);
    for (; c < cols; c += 2 * L)
        update_columns<C, 2>(p, blk, S + c, lds, dst + c, ldd, D + c, ldp, next + c * sizeof(St), next_row);
}

template <class St>
static void step_rows_any(const Problem& p, const Block& blk, const St* S, int64_t lds, St* dst, int64_t ldd,
                          int64_t cols, const float* v, float* o, int64_t ldv, float* PR, const Emission& out,
                          const char* next) {
    switch (blk.C) {
        case 1: return step_rows<1>(p, blk, S, lds, dst, ldd, cols, v, o, ldv, PR, out, next);
        case 2: return step_rows<2>(p, blk, S, lds, dst, ldd, cols, v, o, ldv, PR, out, next);
        case 3: return step_rows<3>(p, blk, S, lds, dst, ldd, cols, v, o, ldv, PR, out, next);
        case 4: return step_rows<4>(p, blk, S, lds, dst, ldd, cols, v, o, ldv, PR, out, next);
        case 5: return step_rows<5>(p, blk, S, lds, dst, ldd, cols, v, o, ldv, PR, out, next);
        default: return step_rows<6>(p, blk, S, lds, dst, ldd, cols, v, o, ldv, PR, out, next);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// the transposed state [V, K]: one row per column of S, K contiguous. A product is a sum along the row.

template <int C, class St>
static void step_vk(const Problem& p, const Block& blk, const St* S, int64_t lds, St* dst, int64_t ldd,
                        const float* v, float* o, int64_t ldv, const char* next) {
    // M rows at once share the loads of the prepared vectors. 8 accumulators hide the latency at C = 1.
    constexpr int M = C == 1 ? 4 : C == 2 ? 2 : 1;
    static_assert(W % M == 0, "a panel is a whole number of row groups");
    alignas(64) float PR[2 * C * W];
    alignas(64) float D[C * W];
    for (int m = 0; m < W; m += M) {
        V acc[2 * C][M];
        AD_UNROLL for (int r = 0; r < 2 * C; ++r)
            AD_UNROLL for (int u = 0; u < M; ++u) acc[r][u] = vzero();
        for (int64_t seg = 0; seg < segments(p); ++seg) {
            const float* rows = blk.rows + (seg * ROWS + ROW_EQ) * LD;
            const St* s0 = S + m * lds + seg * SEG;
            const int64_t n = p.K - seg * SEG < SEG ? p.K - seg * SEG : SEG;
            for (int64_t i = 0; i < n; i += L) {
                V s[M];
                AD_UNROLL for (int u = 0; u < M; ++u) s[u] = vload(s0 + u * lds + i);
                AD_UNROLL for (int r = 0; r < 2 * C; ++r) {
                    const V x = vload(rows + r * LD + i);
                    AD_UNROLL for (int u = 0; u < M; ++u) acc[r][u] = vfma(x, s[u], acc[r][u]);
    }
    }
    }
        AD_UNROLL for (int r = 0; r < 2 * C; ++r)
            AD_UNROLL for (int u = 0; u < M; ++u) PR[r * W + m + u] = vsum(acc[r][u]);
    }
                AD_UNROLL for (int j = 0; j < W; j += L)
        solve<C>(blk, PR + j, PR + C * W + j, W, v + j, ldv, o + j, ldv, D + j, W);
    if (!dst) return;
    for (int m = 0; m < W; ++m) {
        V d[C];
        AD_UNROLL for (int t = 0; t < C; ++t) d[t] = vset(D[t * W + m]);
        for (int64_t seg = 0; seg < segments(p); ++seg) {
            const float* rows = blk.rows + (seg * ROWS + ROW_W) * LD;
            const St* s0 = S + m * lds + seg * SEG;
            St* to = dst + m * ldd + seg * SEG;
            const char* ahead = next + (m * lds + seg * SEG) * static_cast<int64_t>(sizeof(St));
            const int64_t n = p.K - seg * SEG < SEG ? p.K - seg * SEG : SEG;
            for (int64_t i = 0; i < n; i += L) {
                AD_PREFETCH_L2(ahead + i * sizeof(St));
                V s = vmul(vload(rows + (ROW_GAMMA - ROW_W) * LD + i), vload(s0 + i));
                AD_UNROLL for (int t = 0; t < C; ++t) s = vfma(vload(rows + t * LD + i), d[t], s);
                vstore(to + i, s);
    }
    }
    }
}

template <class St>
static void step_vk_any(const Problem& p, const Block& blk, const St* S, int64_t lds, St* dst, int64_t ldd,
                        const float* v, float* o, int64_t ldv, const char* next) {
    switch (blk.C) {
        case 1: return step_vk<1>(p, blk, S, lds, dst, ldd, v, o, ldv, next);
        case 2: return step_vk<2>(p, blk, S, lds, dst, ldd, v, o, ldv, next);
        case 3: return step_vk<3>(p, blk, S, lds, dst, ldd, v, o, ldv, next);
        case 4: return step_vk<4>(p, blk, S, lds, dst, ldd, v, o, ldv, next);
        case 5: return step_vk<5>(p, blk, S, lds, dst, ldd, v, o, ldv, next);
        default: return step_vk<6>(p, blk, S, lds, dst, ldd, v, o, ldv, next);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// panels: [K][W] float32 copies of W columns of a state, zero beyond its last column

template <class St>
static void pack_as(const Problem& p, float* panels, int64_t rows, const St* S, int64_t ld, int64_t cols) {
    // in the order of the caller's memory, which is read only once
    const int64_t whole = cols / W * W;
    if (p.vk) {
        for (int64_t c = 0; c < cols; ++c) {
            float* column = panels + c / W * rows * W + c % W;
            for (int64_t i = 0; i < p.K; ++i) column[i * W] = to_float(S[c * ld + i]);
    }
        } else {
        for (int64_t i = 0; i < p.K; ++i) {
            for (int64_t c = 0; c < whole; c += W)
                AD_UNROLL for (int j = 0; j < NV; ++j)
                    vstore(panels + c * rows + i * W + j * L, vload(S + i * ld + c + j * L));
            if (whole < cols) read_as(panels + whole * rows + i * W, S + i * ld + whole, cols - whole);
    }
    }
    if (whole < cols)
            for (int64_t i = 0; i < p.K; ++i)
            for (int64_t c = cols - whole; c < W; ++c) panels[whole * rows + i * W + c] = 0.0f;
}
// From a float32 matrix [K][lds] to `cols` columns of a state.
template <class St>
static void unpack_as(const Problem& p, St* S, int64_t ld, const float* from, int64_t lds, int64_t cols) {
    if (p.vk) {
        for (int64_t c = 0; c < cols; ++c)
            for (int64_t i = 0; i < p.K; ++i) S[c * ld + i] = from_float(from[i * lds + c], St{});
        } else {
        for (int64_t i = 0; i < p.K; ++i) write_as(S + i * ld, from + i * lds, cols);
    }
}

// Address of column `col` of the state of row n, head h (and snapshot slot).
static char* state_at(const Problem& p, const States& s, int64_t slot, int64_t n, int64_t h, int64_t col) {
    const int64_t offset = slot * s.slot + n * s.n + h * s.h + col * (p.vk ? s.row : 1);
    return static_cast<char*>(s.data) + offset * dtype_size(p.state_dtype);
}
// `rows`: the distance between panels; rows beyond K are not touched.
static void pack(const Problem& p, float* panels, int64_t rows, const void* S, int64_t ld, int64_t cols) {
    if (!S) {
        std::memset(panels, 0, static_cast<size_t>(round_up(cols, W) * rows) * 4);
        return;
    }
    in_type_of(S, p.state_dtype, [&](auto* from) { pack_as(p, panels, rows, from, ld, cols); });
}
static void unpack(const Problem& p, void* S, int64_t ld, const float* from, int64_t lds, int64_t cols) {
    in_type_of(S, p.state_dtype, [&](auto* to) { unpack_as(p, to, ld, from, lds, cols); });
}

// Copy the task's columns of one state, or zero them if it is null.
static void copy_columns(const Problem& p, char* dst, int64_t ldd, const char* src, int64_t lds, int64_t cols) {
    const int64_t size = dtype_size(p.state_dtype);
    const int64_t rows = p.vk ? cols : p.K, bytes = (p.vk ? p.K : cols) * size;
    for (int64_t i = 0; i < rows; ++i) {
        if (src)
            std::memmove(dst + i * ldd * size, src + i * lds * size, static_cast<size_t>(bytes));
            else
            std::memset(dst + i * ldd * size, 0, static_cast<size_t>(bytes));
    }
}

}  // namespace anydelta::ANYDELTA_ISA

#if defined(ANYDELTA_TILES)
#include ANYDELTA_TILES
#include "matrix.inl.h"
#endif

namespace anydelta::ANYDELTA_ISA {

#if defined(ANYDELTA_TILES)
constexpr bool MATRIX = true;
#else
constexpr bool MATRIX = false;
constexpr int MATRIX_TOKENS = 0, MATRIX_LEAST = 0;
struct MatrixUnit {};
struct Chunk {  // never called
    static int worthwhile(const Problem&, int) { return 0; }
    struct Rows {
        DType dtype;
        char* at[1];
    };
    void carve(const Problem&, Arena&) {}
    bool prepare(const Problem&, int64_t, const int64_t*, int, int64_t, float, const float*, const Scratch*, int64_t) { return false; }
    template <class F>
    void take(const Problem&, float*, int64_t, Rows&, const Rows&, F&&) {}
};
#endif

// ---------------------------------------------------------------------------------------------------------------
// a task: one sequence and head, a range of columns

// Tokens that run before the next head does: their rows of v and o stay in the caches.
constexpr int BATCH = MATRIX_TOKENS > BLOCKS * C_MAX ? MATRIX_TOKENS : BLOCKS * C_MAX;
static_assert(BATCH >= BLOCKS * C_MAX, "a batch has room for all blocks");
// KDA: see matrix.inl.h. Not float32: with parts of 16 bits, outputs would differ by 1e-5 from the blocks', for only
// 1.24 times the speed.
AD_INLINE bool may_use_matrix(const Problem& p) {
    return MATRIX && !p.kda && !p.erase.data && p.o.dtype != DType::f32 && p.T >= MATRIX_LEAST;
}

// States that the kernels can read and write without conversion.
static bool plain(const Problem& p) { return !p.vk && p.state_dtype == DType::f32; }

struct Workspace {
    Block* blocks;  // [BLOCKS]
    float* rows;    // [BLOCKS][segments][ROWS][LD]
    Scratch scratch[C_MAX];
    float* v;        // [BATCH][columns]
    float* o;
    float* PR;       // [2 C_MAX][columns]
    float* emitted;  // [C_MAX][K][columns], if snapshots are not plain float32 [K, V]
    Chunk chunk;
};

// One head of a task. Its state is in panels, or row by row once snapshots are taken.
enum class Where { caller, panels, rows };
struct Head {
    int64_t hv;
    float A;        // exp(A_log)
    float* bias;    // [segments * SEG] dt_bias
    float* panels;  // [columns / W][K][W]
    float* rows;    // [K][columns]
    Where where;
};

static Workspace carve(const Problem& p, Arena& arena, Head* heads, int64_t count) {
    const int64_t seg = segments(p), columns = round_up(p.V, W);
    const bool emits = p.snapshots.data != nullptr;
    Workspace w;
    w.blocks = arena.take<Block>(BLOCKS);
    w.rows = arena.take<float>(BLOCKS * seg * ROWS * LD);
    for (Scratch& s : w.scratch) s.carve(arena, seg);
    w.v = arena.take<float>(BATCH * columns);
    w.o = arena.take<float>(BATCH * columns);
    w.PR = arena.take<float>(2 * C_MAX * columns);
    w.emitted = arena.take<float>(emits && !(plain(p) && p.V % W == 0) ? C_MAX * p.K * columns : 0);
    if (may_use_matrix(p)) w.chunk.carve(p, arena);
    for (int64_t i = 0; i < count; ++i) {
        heads[i].bias = arena.take<float>(seg * SEG);
        heads[i].panels = arena.take<float>(p.K * columns);
        heads[i].rows = arena.take<float>(emits ? p.K * columns : 0);
        heads[i].where = Where::caller;
    }
    return w;
}

static size_t workspace(const Problem& p, int64_t count) {
    char* const origin = reinterpret_cast<char*>(64);  // addresses are only computed, never read
    Arena arena{origin};
    Head heads[MAX_HEADS];
    carve(p, arena, heads, count);
    return static_cast<size_t>(arena.at - origin);
}

struct Sequence {
    int64_t b, start, end;  // tokens of row b
    int64_t row_in, row_out;
    bool live(const Problem& p, int64_t t) const { return !p.mask || p.mask[b * p.mask_b + t * p.mask_t]; }
};

static Sequence sequence(const Problem& p, int64_t n) {
    Sequence seq;
    seq.b = p.cu_seqlens ? 0 : n;
    seq.start = p.cu_seqlens ? p.cu_seqlens[n] : 0;
    seq.end = p.cu_seqlens ? p.cu_seqlens[n + 1] : p.T;
    seq.row_in = p.state_indices ? p.state_indices[n] : n;
    seq.row_out = p.out_dense ? n : seq.row_in;
    if (p.out_rows && seq.row_in >= 0) seq.row_out = seq.start < seq.end ? p.out_rows[n] : -1;
    return seq;
}

// Makes rows for the rule and takes its outputs (mixer.inl.h), instead of the caller's memory.
struct RowMaker {
    // Make q and k of the tokens from `from` on, under Problem::q and k. Returns the token before which it stopped.
    virtual int64_t prepare(int64_t from) = 0;
    // v of up to C_MAX consecutive live tokens: v [count][V]
    virtual void values(const int64_t* t, int64_t count, int64_t hv, float* v, int64_t ldv) = 0;
    virtual void outputs(const int64_t* t, int64_t count, int64_t hv, float* o, int64_t ldo) = 0;  // may change o [count][V]
};

class Runner {
  public:
    Runner(const Problem& problem, const Task& task, char* memory, RowMaker* maker = nullptr)
        : p(problem), job(task), seq(sequence(problem, task.n)), made(maker), stop(seq.end) {
        Arena arena{memory};
        w = carve(p, arena, heads, job.heads);
        ldv = round_up(job.cols, W);
        panels = ldv / W;
        streams = p.N * p.HV * p.Ks * p.K * p.V * 4 >= STREAM_BYTES;
        slots = p.snapshots.data ? (p.Ks < seq.end - seq.start ? p.Ks : seq.end - seq.start) : 0;
    }

    void run() {
        const bool skipped = seq.row_in < 0;
        int64_t tokens = 0;
        if (!skipped)
            for (int64_t t = seq.start; t < seq.end; ++t) tokens += seq.live(p, t);
            for (int64_t i = 0; i < job.heads; ++i) {
                h = &heads[i];
            h->hv = job.hv0 + i * job.step;
            if (tokens < seq.end - seq.start && !made)
                for (int64_t t = seq.start; t < seq.end; ++t)
                    if (skipped || !seq.live(p, t)) zero_output(t);
            if (!skipped) snapshot_initial_state();
            if (tokens == 0)
                pass_state_on(skipped);
            else
                read_gate_parameters();
    }
        if (tokens > 0) {
            if (tokens <= C_MAX && can_run_directly())
                direct(tokens);
            else
                blocked(tokens);
    }
        if (skipped || !p.mask) return;
            for (int64_t i = 0; i < job.heads; ++i) {
                h = &heads[i];
            repeat_snapshots();
    }
    }

  private:
    const Problem& p;
    const Task& job;
    Workspace w;
    Sequence seq;
    RowMaker* made;  // null: rows are in the caller's memory
    int64_t stop;    // the token before which a batch ends
    int64_t ldv, panels, slots;
    bool streams;
    Head heads[MAX_HEADS];
    Head* h = nullptr;  // the current one
    Token read[C_MAX];  // the tokens of the last prepared block

    int64_t columns(int64_t panel) const { return job.cols - panel * W < W ? job.cols - panel * W : W; }
    char* state_in(int64_t panel) const {
        return p.in.data ? state_at(p, p.in, 0, seq.row_in, h->hv, job.col0 + panel * W) : nullptr;
    }
    char* state_out(int64_t panel) const {
        return writes_state() ? state_at(p, p.out, 0, seq.row_out, h->hv, job.col0 + panel * W) : nullptr;
    }
    bool writes_state() const { return p.out.data && seq.row_out >= 0; }
    // Whether the state of a slot is wanted.
    bool wanted(int64_t slot) const { return !p.snapshot_indices || p.snapshot_indices[slot * p.N + job.n] >= 0; }
    char* snapshot(int64_t slot, int64_t panel) const {
        const int64_t n = p.snapshot_indices ? p.snapshot_indices[slot * p.N + job.n] : job.n;
        return state_at(p, p.snapshots, p.snapshot_indices ? 0 : slot, n, h->hv, job.col0 + panel * W);
    }

    void zero_output(int64_t t) const {
        char* o = static_cast<char*>(const_cast<void*>(token(p.o, seq.b, t, h->hv)));
        const int64_t size = dtype_size(p.o.dtype);
        std::memset(o + job.col0 * size, 0, static_cast<size_t>(job.cols * size));
    }

    // No token changed the state: write the final state, which the functional op must return.
    void pass_state_on(bool skipped) const {
        if (!writes_state()) return;
        const char* from = skipped ? nullptr : state_in(0);
        if (from != state_out(0)) copy_columns(p, state_out(0), p.out.row, from, p.in.row, job.cols);
    }

    void read_gate_parameters() {
        h->A = gate_parameters(p, h->hv, h->bias);
        for (Scratch& s : w.scratch) s.pad(p.K);
    }

    // The slot that receives the state after live token t, whose successor is `next` (or the end). Masked tokens in
    // between would repeat that state. The oldest slot that the caller wants gets it first.
    int64_t slot_after(int64_t t, int64_t next) const {
        const int64_t own = seq.end - 1 - t;
        const int64_t slot = own < slots ? own : slots - 1;
        return slot >= seq.end - next ? slot : -1;
    }

    // Slots at masked tokens before the first live token hold the initial state. Copy it before it is overwritten.
    void snapshot_initial_state() const {
        const int64_t first = next_live(seq.start);
        for (int64_t slot = seq.end - first; slot < slots; ++slot)
            if (wanted(slot)) copy_columns(p, snapshot(slot, 0), p.snapshots.row, state_in(0), p.in.row, job.cols);
    }

    // Slots at other masked tokens hold the state of the token before. The oldest slot has it already (slot_after).
    void repeat_snapshots() const {
        const int64_t first = next_live(seq.start);
        int64_t from = -1;  // the slot with the state after the last live token, if there is one
        for (int64_t slot = slots - 1; slot >= 0; --slot) {
            const int64_t t = seq.end - 1 - slot;
            if (t <= first || seq.live(p, t)) from = -1;
            if (t < first || !wanted(slot)) continue;
            if (from >= 0) copy_columns(p, snapshot(slot, 0), p.snapshots.row, snapshot(from, 0), p.snapshots.row, job.cols);
            from = slot;
    }
    }

    int64_t next_live(int64_t t) const {
        while (t < seq.end && !seq.live(p, t)) ++t;
        return t;
    }

    // Prepare up to `most` tokens from t on as one block; v rows go to v_rows. Returns the next token.
    int64_t prepare(Block& blk, float* prepared, int64_t t, int most, int64_t* positions, float* v_rows,
                    const Known& known = {}) {
        blk.rows = prepared;
        blk.emits = false;
        int n = 0;
        int64_t u = t;
        for (; n < most && u < stop; ++n) {
            positions[n] = u;
            const int64_t after = next_live(u + 1);
            int64_t slot = slots ? slot_after(u, after) : -1;
            blk.emits |= slot >= 0;  // even if no such slot is wanted: blocks that emit are the last ones
            while (slot >= seq.end - after && !wanted(slot)) --slot;
            blk.slot[n] = slot >= seq.end - after ? slot : -1;
            u = after;
    }
        blk.C = n;
        for (int c = 0; c < n; ++c) {
            const int64_t ahead = positions[c] + AHEAD;
            if (ahead < seq.end && !made) {
                fetch<false>(p.k, seq.b, ahead, qk_head(p, h->hv), 0, p.K);
                fetch<false>(p.q, seq.b, ahead, qk_head(p, h->hv), 0, p.K);
                fetch<false>(p.v, seq.b, ahead, h->hv, job.col0, job.cols);
    }
            if (ahead < seq.end && p.kda) fetch<false>(p.g, seq.b, ahead, h->hv, 0, p.K);
            if (ahead < seq.end && p.erase.data) fetch<false>(p.erase, seq.b, ahead, erase_head(p, h->hv), 0, p.K);
    }
        read_tokens(p, seq.b, positions, n, h->hv, h->A, h->bias, w.scratch, read, blk.beta, known);
        for (int c = 0; c < n; ++c) append(p, read[c], blk, c);
        read_values(positions, n, v_rows);
        return u;
    }

    void write_outputs(const int64_t* positions, int64_t count) const {
        if (made) return made->outputs(positions, count, h->hv, w.o, ldv);
        for (int64_t c = 0; c < count; ++c) {
            void* o = const_cast<void*>(token(p.o, seq.b, positions[c], h->hv));
            write_row(const_cast<void*>(element(o, p.o.dtype, job.col0)), p.o.dtype, w.o + c * ldv, job.cols);
    }
    }

    // Whether a single block can run on the caller's own state: one read, one write, no copies.
    bool can_run_directly() const {
        // for vk this depends on V, not on the task's columns: its sums differ, so the choice must ignore the split
        if ((p.vk ? p.V : job.cols) % W != 0 || !p.in.data || p.mask) return false;
        return p.vk ? slots == 0 && p.K % L == 0 : slots == 0 || plain(p);
    }

    void direct(int64_t tokens) {
        if (made) made->prepare(seq.start);
        const bool one = tokens == 1;
        Known known[MAX_HEADS];
        if (one && !p.kda) {
            float A[MAX_HEADS];
            const float* bias[MAX_HEADS];
            for (int64_t i = 0; i < job.heads; ++i) A[i] = heads[i].A, bias[i] = heads[i].bias;
            read_gates_of_heads(p, seq.b, next_live(seq.start), heads[0].hv, job.step, job.heads, A, bias, known);
    }
            for (int64_t i = 0; i < job.heads; ++i) {
            known[i].rows = one && i > 0 && qk_head(p, heads[i].hv) == qk_head(p, heads[i - 1].hv);
            const char* next = job.next_state;
            if (i + 1 < job.heads) {
                h = &heads[i + 1];
                next = state_in(0);
    }
                h = &heads[i];
            int64_t positions[C_MAX];
            Block& blk = w.blocks[0];
            prepare(blk, w.rows, next_live(seq.start), static_cast<int>(tokens), positions, w.v, known[i]);
            if (!next) next = state_in(0);
            in_type_of(static_cast<const void*>(state_in(0)), p.state_dtype, [&](auto* S) { direct_as(blk, S, next); });
            write_outputs(positions, blk.C);
    }
    }

    template <class St>
    void direct_as(const Block& blk, const St* S, const char* next_head) {
        St* dst = reinterpret_cast<St*>(state_out(0));
        if (!p.vk) {
        Emission out;
            if (blk.emits) emission(blk, out);
            return step_rows_any<St>(p, blk, S, p.in.row, dst, p.out.row, job.cols, w.v, w.o, ldv, w.PR, out, next_head);
    }
        for (int64_t panel = 0; panel < panels; ++panel) {
            const char* next = panel + 1 < panels ? state_in(panel + 1) : next_head;
            step_vk_any<St>(p, blk, S, p.in.row, dst, p.out.row, w.v + panel * W, w.o + panel * W, ldv, next);
            S += W * p.in.row;
            if (dst) dst += W * p.out.row;
    }
    }

    bool snapshots_are_plain() const { return plain(p) && job.cols == ldv; }

    void emission(const Block& blk, Emission& out) const {
        const bool there = snapshots_are_plain();
        out.ld = there ? p.snapshots.row : ldv;
        out.streams = STREAMS && there && streams;
        for (int t = 0; t < blk.C; ++t) {
            out.dst[t] = nullptr;
            if (blk.slot[t] < 0) continue;
            out.dst[t] = there ? reinterpret_cast<float*>(snapshot(blk.slot[t], 0)) : w.emitted + t * p.K * ldv;
            if (reinterpret_cast<uintptr_t>(out.dst[t]) % 64 != 0 || out.ld * 4 % 64 != 0) out.streams = false;
    }
    }

    // Any number of tokens: a batch at a time, for each head of the task.
    void blocked(int64_t tokens) {
        if (may_use_matrix(p) && tokens >= MATRIX_LEAST) {
            [[maybe_unused]] const MatrixUnit unit;
            batches<MATRIX>(tokens);
        } else {
            batches<false>(tokens);
    }
    }

    template <bool matrix>
    void batches(int64_t tokens) {
        int64_t t = next_live(seq.start), done = 0;
        while (done < tokens) {
            const int64_t from = t, before = done;
            stop = made ? made->prepare(from) : end_of_batch(from);
            for (int64_t i = 0; i < job.heads; ++i) {
                h = &heads[i];
                t = from;
                done = before;
                while (t < stop && done < tokens)
                    if (!matrix || !take_chunk(t, done, tokens)) batch(t, done, tokens, i + 1 == job.heads);
    }
    }
    }

    // The first live token after a batch from `t` on, or the end.
    int64_t end_of_batch(int64_t t) const {
        for (int n = 0; n < BATCH && t < seq.end; ++n) t = next_live(t + 1);
        return t;
    }

    // Run the next tokens on the matrix unit, if there are enough of them and none of them has a snapshot.
    bool take_chunk(int64_t& t, int64_t& done, int64_t tokens) {
        int64_t positions[BATCH];
        int count = 0;
        int64_t u = t;
        while (count < MATRIX_TOKENS && u < stop) {
            const int64_t after = next_live(u + 1);
            if (slots && slot_after(u, after) >= 0) break;
            positions[count++] = u;
            u = after;
    }
        const int taken = Chunk::worthwhile(p, count);
        if (taken == 0) return false;
        if (taken < count) u = positions[taken];
        count = taken;
        if (!w.chunk.prepare(p, seq.b, positions, count, h->hv, h->A, h->bias, w.scratch, t)) return false;
        // v and o in place, or copies if that is not possible
        const bool whole = !made && job.cols % W == 0;
        Chunk::Rows v{whole ? p.v.dtype : DType::f32, {}}, o{whole ? p.o.dtype : DType::f32, {}};
        for (int c = 0; c < count; ++c) {
            v.at[c] = whole ? row(p.v, positions[c]) : reinterpret_cast<char*>(w.v + c * ldv);
            o.at[c] = whole ? row(p.o, positions[c]) : reinterpret_cast<char*>(w.o + c * ldv);
    }
        for (int c = 0; c < count && !whole; c += C_MAX)
            read_values(positions + c, count - c < C_MAX ? count - c : C_MAX, w.v + c * ldv);
        bool finite = true;  // checked in every column of the head, so that the result does not depend on the split
        for (int c = 0; c < count && finite; ++c)
            in_type_of(made ? w.v + c * ldv : token(p.v, seq.b, positions[c], h->hv), made ? DType::f32 : p.v.dtype,
                       [&](const auto* x) { finite = all_finite(x, p.V); });
        if (!finite) return false;  // see Chunk::prepare
        done += count;
        t = u;
            if (h->where == Where::caller) pack(p, h->panels, p.K, state_in(0), p.in.row, job.cols);
            h->where = Where::panels;
        const bool more = h - heads + 1 < job.heads;
        const int64_t from = more ? positions[0] : u, next = more ? h[1].hv : heads[0].hv;
        const bool keys = !more || qk_head(p, next) != qk_head(p, h->hv);
        w.chunk.take(p, h->panels, panels, v, o, [&](int64_t i) AD_INLINED {
            if (from + i < seq.end) fetch_token(from + i, next, keys);
            if (whole && i < count) fetch<true>(p.o, seq.b, positions[i], h->hv, job.col0, job.cols);
        });
        if (done == tokens && writes_state())
        for (int64_t panel = 0; panel < panels; ++panel)
                unpack(p, state_out(panel), p.out.row, h->panels + panel * p.K * W, W, columns(panel));
        if (!whole) write_outputs(positions, count);
        return true;
    }

    char* row(const Tokens& x, int64_t t) const {
        return static_cast<char*>(const_cast<void*>(element(token(x, seq.b, t, h->hv), x.dtype, job.col0)));
    }
    template <class T>
    static bool all_finite(const T* x, int64_t n) {
        V seen = vzero();
        int64_t i = 0;
        for (; i + L <= n; i += L) seen = vfma(vload(x + i), vzero(), seen);
        float rest = vsum(seen);
        for (; i < n; ++i) rest += to_float(x[i]) * 0.0f;
        return rest == 0.0f;
    }

    // Prefetch the rows of a token into L2. Those of consecutive tokens are 4 KiB or more apart, where no hardware
    // prefetcher follows, and a chunk of them fills the same few sets of L1.
    AD_ALWAYS_INLINE void fetch_token(int64_t t, int64_t hv, bool keys) const {
        if (keys && !made) {
            fetch_l2(p.k, seq.b, t, qk_head(p, hv), 0, p.K);
            fetch_l2(p.q, seq.b, t, qk_head(p, hv), 0, p.K);
    }
        if (!made) fetch_l2(p.v, seq.b, t, hv, job.col0, job.cols);
        fetch_l2(p.g, seq.b, t, hv, 0, p.kda ? p.K : 1);
        fetch_l2(p.beta, seq.b, t, hv, 0, 1);
    }

    // v of `count` tokens, zero beyond the task's columns
    void read_values(const int64_t* positions, int count, float* v) {
        if (made) made->values(positions, count, h->hv, v, ldv);
        for (int c = 0; c < count; ++c, v += ldv) {
            if (!made)
                read_row(v, element(token(p.v, seq.b, positions[c], h->hv), p.v.dtype, job.col0), p.v.dtype, job.cols);
            for (int64_t i = job.cols; i < ldv; ++i) v[i] = 0.0f;
    }
    }

    // Blocks without snapshots run panel by panel. Blocks with snapshots are always the last ones. They run on a
    // row-major copy of the state, so that snapshots are written in order.
    void batch(int64_t& t, int64_t& done, int64_t tokens, bool last_head) {
        const int64_t seg = segments(p);
        int64_t positions[BLOCKS * C_MAX];
        int count = 0, quiet = 0;
        int64_t prepared = 0;
        for (; count < BLOCKS && done < tokens && t < stop; ++count) {
            Block& blk = w.blocks[count];
            t = prepare(blk, w.rows + count * seg * ROWS * LD, t, C_MAX, positions + prepared, w.v + prepared * ldv);
            prepared += blk.C;
            done += blk.C;
            if (!blk.emits) ++quiet;
    }
        const bool last = done == tokens;
        const char* next_state = last && last_head ? job.next_state : nullptr;
        if (quiet > 0) {
            if (h->where == Where::caller) pack(p, h->panels, p.K, state_in(0), p.in.row, job.cols);
            h->where = Where::panels;
            take_panels(quiet, last && quiet == count, next_state, positions);
    }
        if (quiet < count) {
            if (h->where == Where::caller) pack(p, h->panels, p.K, state_in(0), p.in.row, job.cols);
            if (h->where != Where::rows) rows_from_panels();
            h->where = Where::rows;
            int64_t offset = 0;
            for (int i = 0; i < quiet; ++i) offset += w.blocks[i].C;
            for (int i = quiet; i < count; offset += w.blocks[i].C, ++i)
                take_rows(w.blocks[i], offset, last && i + 1 == count, next_state);
    }
        write_outputs(positions, prepared);
    }

    // The first `count` prepared blocks on all panels. Each panel stays in L1 meanwhile. The last block of the call
    // writes straight to the state's destination if it can.
    void take_panels(int count, bool last_batch, const char* next_state, const int64_t* positions) {
        for (int64_t panel = 0; panel < panels; ++panel) {
            const bool there = plain(p) && columns(panel) == W;
            float* tile = h->panels + panel * p.K * W;
            float *v = w.v + panel * W, *o = w.o + panel * W;
            for (int i = 0; i < count; ++i) {
                const Block& blk = w.blocks[i];
                const bool last = last_batch && i + 1 == count;
                const char* next = reinterpret_cast<const char*>(w.blocks[i + 1 < count ? i + 1 : 0].rows);
                if (last && next_state) next = next_state + panel * p.K * 64;
                float* dst = tile;
                int64_t ldd = W;
                if (last && (!writes_state() || there)) {
                    dst = reinterpret_cast<float*>(state_out(panel));
            ldd = p.out.row;
    }
                // Prefetch output rows just before they are written, or each store would wait for its line.
                if (panel + 1 == panels && !made)
            for (int c = 0; c < blk.C; ++c)
                        fetch<true>(p.o, seq.b, positions[i * C_MAX + c], h->hv, job.col0, job.cols);
                step_any(p, blk, tile, dst, ldd, v, ldv, o, next);
                if (last && dst == tile) unpack(p, state_out(panel), p.out.row, tile, W, columns(panel));
                v += blk.C * ldv;
                o += blk.C * ldv;
    }
    }
    }

    void take_rows(const Block& blk, int64_t offset, bool last, const char* next_state) {
        Emission out;
        emission(blk, out);
        float* dst = h->rows;
        int64_t ldd = ldv;
        if (last && (!writes_state() || snapshots_are_plain())) {
            dst = reinterpret_cast<float*>(state_out(0));
            ldd = p.out.row;
    }
        const char* next = last && next_state ? next_state : reinterpret_cast<const char*>(h->rows);
        step_rows_any<float>(p, blk, h->rows, ldv, dst, ldd, ldv, w.v + offset * ldv, w.o + offset * ldv, ldv, w.PR, out, next);
        if (!snapshots_are_plain())
            for (int c = 0; c < blk.C; ++c)
                if (out.dst[c]) unpack(p, snapshot(blk.slot[c], 0), p.snapshots.row, out.dst[c], ldv, job.cols);
        if (last && dst == h->rows) unpack(p, state_out(0), p.out.row, h->rows, ldv, job.cols);
    }

    void rows_from_panels() {
        for (int64_t panel = 0; panel < panels; ++panel)
            for (int64_t i = 0; i < p.K; ++i)
                AD_UNROLL for (int j = 0; j < W; j += L)
                    vstore(h->rows + i * ldv + panel * W + j, vload(h->panels + (panel * p.K + i) * W + j));
    }
};

#define AD_NAME_OF(x) #x
#define AD_NAME(x) AD_NAME_OF(x)
static const char* run_task(const Problem& p, const Task& task, char* memory) {
    Runner(p, task, memory).run();
    return AD_NAME(ANYDELTA_ISA);
}

// FLOPs of register-only FMAs: the limit that prefill is measured against.
static double fma_loop(int64_t rounds) {
    V acc[ACCUMULATORS];
    AD_UNROLL for (int i = 0; i < ACCUMULATORS; ++i) acc[i] = vset(static_cast<float>(i));
    volatile float seed = 0.999f;
    const V a = vset(seed), b = vset(1.0f - seed);
    for (int64_t r = 0; r < rounds; ++r)
        AD_UNROLL for (int i = 0; i < ACCUMULATORS; ++i) acc[i] = vfma(acc[i], a, b);
    V sum = vzero();
    AD_UNROLL for (int i = 0; i < ACCUMULATORS; ++i) sum = vadd(sum, acc[i]);
    volatile float sink = vsum(sum);
    (void)sink;
    return 2.0 * L * ACCUMULATORS * static_cast<double>(rounds);
}

}  // namespace anydelta::ANYDELTA_ISA
