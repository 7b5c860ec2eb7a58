// The gated delta rule on one CPU, written once over the primitives of an ISA (isa_*.h) and compiled per ISA.
//
//     S   = diag(a_t) S               decay    a_t in [0, 1]^K (a scalar gate fills the vector)
//     d_t = beta_t (v_t - S^T k_t)    delta
//     S   = S + k_t d_t^T             update
//     o_t = scale * S^T q_t           output                              all in float32
//
// C tokens are taken per pass over the state. With Gamma_t = a_1 .. a_t (products inside the block, never
// quotients, so nothing overflows) and w_s^t = k_s a_(s+1) .. a_t, the block is, in terms of the state S0 before it,
//
//     P_t = S0^T (Gamma_t k_t)     R_t = S0^T (scale Gamma_t q_t)                     2 K V FMAs a token: `dots`
//     d_t = beta_t (v_t - P_t - sum_{s<t} (w_s^t . k_t) d_s)
//     o_t = R_t + sum_{s<=t} (w_s^t . scale q_t) d_s                                  C V FMAs a token: `solve`
//     S_C = Gamma_C S0 + sum_s w_s^C d_s^T                                            K V FMAs a token: `update`
//
// so that a state element is loaded once per C tokens and stored once. What does not depend on the column (the
// decayed keys and queries, w and the C x C products) is prepared once per block and head in `prepare`, GDA and KDA
// alike; the rest runs panel by panel: W columns of the state, which stay in L1 over all prepared blocks.
#pragma once
#include "problem.h"

namespace anydelta::ANYDELTA_ISA {

// C_MAX = 6 tokens x NV = 2 vectors fill 12 accumulators: on 16 registers, 2 more hold the state and 1 the broadcast,
// and 12 >= 2 FMA ports * 4 to 5 cycles latency. With 32 registers one pass takes q and k rows together (24).
constexpr int C_MAX = 6;
constexpr int NV = 2;
constexpr int W = NV * L;                                  // columns of a panel
constexpr int ACCUMULATORS = REGISTERS == 32 ? 24 : 12;
// Channels are handled in segments: a compile-time row stride lets every broadcast address be one register plus a
// constant. 17 cache lines, an odd number, spread the rows over the sets of L1.
constexpr int SEG = 256;
constexpr int LD = SEG + 16;
// 8 blocks of 6 tokens: a panel (8 KiB at K = 128) is brought into L1 once per 48 tokens, while the prepared rows of
// the 8 blocks (75 KiB at K = 128) stay in L2.
constexpr int BLOCKS = 8;
// Rows of a prepared block, each [LD] per segment.
constexpr int ROW_KQ = 0;                  // C rows Gamma_t k_t, then C rows scale Gamma_t q_t
constexpr int ROW_W = 2 * C_MAX;           // C rows w_s^C
constexpr int ROW_GAMMA = 3 * C_MAX;       // Gamma_C
constexpr int ROW_A = 3 * C_MAX + 1;       // C rows a_t, for snapshots
constexpr int ROW_K = 4 * C_MAX + 1;       // C rows k_t, for snapshots
constexpr int ROWS = 5 * C_MAX + 1;

struct Block {
    int C;
    float beta[C_MAX];
    float kk[C_MAX][C_MAX];   // [t][s], s < t: beta_t w_s^t . k_t
    float kq[C_MAX][C_MAX];   // [t][s], s <= t: w_s^t . scale q_t
    bool emits;               // a snapshot is taken inside this block
    int64_t slot[C_MAX];      // snapshot slot after token t, or -1
    float* rows;              // [segments][ROWS][LD]
};

// ---------------------------------------------------------------------------------------------------------------
// elementary functions

// e^x for x <= 88: Cephes' degree 6 polynomial after reduction by ln 2; 0 where the result would be subnormal.
AD_INLINE V vexp(V x0) {
    const V lowest = vset(-87.33f);
    const V x = vmin(vmax(x0, lowest), vset(88.0f));
    const V n = vround(vmul(x, vset(1.44269504088896341f)));
    V r = vfnma(n, vset(0.693359375f), x);
    r = vfnma(n, vset(-2.12194440e-4f), r);
    V p = vset(1.9875691500e-4f);
    p = vfma(p, r, vset(1.3981999507e-3f));
    p = vfma(p, r, vset(8.3334519073e-3f));
    p = vfma(p, r, vset(4.1665795894e-2f));
    p = vfma(p, r, vset(1.6666665459e-1f));
    p = vfma(p, r, vset(5.0000001201e-1f));
    p = vfma(p, vmul(r, r), vadd(r, vset(1.0f)));
    return vzero_below(vmul(p, vpow2(n)), x0, lowest);
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

AD_INLINE int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
AD_INLINE int64_t segments(const Problem& p) { return (p.K + SEG - 1) / SEG; }
AD_INLINE const void* token(const Tokens& x, int64_t b, int64_t t, int64_t h) {
    return element(x.data, x.dtype, b * x.b + t * x.t + h * x.h);
}

// ---------------------------------------------------------------------------------------------------------------
// prepare: what a block needs that does not depend on the column

struct Scratch {  // one token, [segments * SEG] each, zero beyond K
    float* k;
    float* q;
    float* a;
    float* bias;  // dt_bias of this head
};

static float squared_norm(const float* x, int64_t n) {
    V s = vzero();
    for (int64_t i = 0; i < n; i += L) s = vfma(vload(x + i), vload(x + i), s);
    return vsum(s);
}

static void multiply(float* x, float f, int64_t n) {
    for (int64_t i = 0; i < n; i += L) vstore(x + i, vmul(vload(x + i), vset(f)));
}

// k_t, scale * q_t and a_t of one token and value head.
static void read_token(const Problem& p, int64_t b, int64_t t, int64_t hv, float A, const Scratch& s) {
    const int64_t h = p.tiled ? hv % p.H : hv / (p.HV / p.H);
    const int64_t n = round_up(p.K, L);
    read_row(s.k, token(p.k, b, t, h), p.k.dtype, p.K);
    read_row(s.q, token(p.q, b, t, h), p.q.dtype, p.K);
    float k_factor = 1.0f, q_factor = p.scale;
    if (p.l2norm) {
        k_factor = 1.0f / __builtin_sqrtf(squared_norm(s.k, n) + p.l2norm_eps);
        q_factor *= 1.0f / __builtin_sqrtf(squared_norm(s.q, n) + p.l2norm_eps);
        multiply(s.k, k_factor, n);
    }
    multiply(s.q, q_factor, n);

    const void* g = token(p.g, b, t, hv);
    if (p.kda) {
        read_row(s.a, g, p.g.dtype, p.K);
        if (p.dt_bias)
            for (int64_t i = 0; i < n; i += L) vstore(s.a + i, vadd(vload(s.a + i), vload(s.bias + i)));
        for (int64_t i = 0; i < n; i += L) vstore(s.a + i, decay_of(p, vload(s.a + i), vset(A)));
    } else {
        const float x = read_one(g, p.g.dtype) + (p.dt_bias ? s.bias[0] : 0.0f);
        const V a = decay_of(p, vset(x), vset(A));
        for (int64_t i = 0; i < n; i += L) vstore(s.a + i, a);
    }
}

static float read_beta(const Problem& p, int64_t b, int64_t t, int64_t hv) {
    const float x = read_one(token(p.beta, b, t, hv), p.beta.dtype);
    return p.beta_is_logit ? first(vsigmoid(vset(x))) : x;
}

// Append token t of the block: Gamma_t, decayed rows, and its products with all earlier keys of the block.
template <int t>
static void append_token(const Problem& p, const Scratch& s, Block& blk) {
    V kk[t + 1], kq[t + 1];
    AD_UNROLL for (int u = 0; u <= t; ++u) kk[u] = kq[u] = vzero();
    for (int64_t seg = 0; seg < segments(p); ++seg) {
        float* rows = blk.rows + seg * ROWS * LD;
        const int64_t n = p.K - seg * SEG < SEG ? p.K - seg * SEG : SEG;
        const float *k = s.k + seg * SEG, *q = s.q + seg * SEG, *a = s.a + seg * SEG;
        for (int64_t i = 0; i < n; i += L) {
            const V ki = vload(k + i), qi = vload(q + i), ai = vload(a + i);
            const V gamma = t == 0 ? ai : vmul(vload(rows + ROW_GAMMA * LD + i), ai);
            vstore(rows + ROW_GAMMA * LD + i, gamma);
            vstore(rows + (ROW_KQ + t) * LD + i, vmul(gamma, ki));
            vstore(rows + (ROW_KQ + blk.C + t) * LD + i, vmul(gamma, qi));
            AD_UNROLL for (int u = 0; u < t; ++u) {
                const V w = vmul(vload(rows + (ROW_W + u) * LD + i), ai);
                vstore(rows + (ROW_W + u) * LD + i, w);
                kk[u] = vfma(w, ki, kk[u]);
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
    AD_UNROLL for (int u = 0; u < t; ++u) blk.kk[t][u] = blk.beta[t] * vsum(kk[u]);
    AD_UNROLL for (int u = 0; u <= t; ++u) blk.kq[t][u] = vsum(kq[u]);
}

static void append(const Problem& p, const Scratch& s, Block& blk, int t) {
    switch (t) {
        case 0: return append_token<0>(p, s, blk);
        case 1: return append_token<1>(p, s, blk);
        case 2: return append_token<2>(p, s, blk);
        case 3: return append_token<3>(p, s, blk);
        case 4: return append_token<4>(p, s, blk);
        default: return append_token<5>(p, s, blk);
    }
}
static_assert(C_MAX == 6, "append and the step tables below list the block sizes");

// ---------------------------------------------------------------------------------------------------------------
// dots: out[r] = S0^T row_r for R rows and N vectors of columns

template <int R, int N, class Src>
AD_INLINE void dots(const float* rows, const Src* S, int64_t lds, int64_t n, float* out, bool accumulate) {
    V acc[R][N];
    AD_UNROLL for (int r = 0; r < R; ++r)
        AD_UNROLL for (int j = 0; j < N; ++j) acc[r][j] = accumulate ? vload(out + (r * N + j) * L) : vzero();
    for (int64_t i = 0; i < n; ++i, S += lds, ++rows) {
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

// dots for the C key rows and C query rows of a block: PR [2C][N L]
template <int C, int N, class Src>
AD_INLINE void block_dots(const Problem& p, const Block& blk, const Src* S, int64_t lds, float* PR) {
    constexpr int R = 2 * C * N <= ACCUMULATORS ? 2 * C : C;  // rows per pass
    for (int64_t seg = 0; seg < segments(p); ++seg) {
        const float* rows = blk.rows + (seg * ROWS + ROW_KQ) * LD;
        const int64_t n = p.K - seg * SEG < SEG ? p.K - seg * SEG : SEG;
        for (int r = 0; r < 2 * C; r += R)
            dots<R, N>(rows + r * LD, S + seg * SEG * lds, lds, n, PR + r * N * L, seg > 0);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// solve: the triangular part, on [C][N L] columns.  D_t = beta_t (v_t - P_t) - sum kk[t][s] D_s,
// o_t = R_t + sum kq[t][s] D_s

template <int C, int N>
AD_INLINE void solve(const Block& blk, const float* PR, const float* v, float* o, int64_t ldv, float* D) {
    AD_UNROLL for (int j = 0; j < N; ++j) {
        V d[C];
        AD_UNROLL for (int t = 0; t < C; ++t) {
            const V P = vload(PR + (t * N + j) * L), R = vload(PR + ((C + t) * N + j) * L);
            V x = vmul(vset(blk.beta[t]), vsub(vload(v + t * ldv + j * L), P));
            AD_UNROLL for (int s = 0; s < t; ++s) x = vfnma(vset(blk.kk[t][s]), d[s], x);
            d[t] = x;
            V y = R;
            AD_UNROLL for (int s = 0; s <= t; ++s) y = vfma(vset(blk.kq[t][s]), d[s], y);
            vstore(o + t * ldv + j * L, y);
            vstore(D + (t * N + j) * L, x);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// update: S_C = Gamma_C S0 + sum_s w_s d_s^T, from S0 to dst (which may be S0), touching `next` on the way

template <int C, int N, class Src, class Dst>
AD_INLINE void update(const Problem& p, const Block& blk, const Src* S, int64_t lds, Dst* dst, int64_t ldd,
                      const float* D, const char* next, int64_t next_row) {
    V d[C][N];
    AD_UNROLL for (int t = 0; t < C; ++t)
        AD_UNROLL for (int j = 0; j < N; ++j) d[t][j] = vload(D + (t * N + j) * L);
    for (int64_t seg = 0; seg < segments(p); ++seg) {
        const float* rows = blk.rows + (seg * ROWS + ROW_W) * LD;
        const int64_t n = p.K - seg * SEG < SEG ? p.K - seg * SEG : SEG;
        for (int64_t i = 0; i < n; ++i, S += lds, dst += ldd, ++rows, next += next_row) {
            AD_PREFETCH(next);
            if (N * L * sizeof(Src) > 64) AD_PREFETCH(next + 64);
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

// As update, but token by token in registers, so that the state after any token can be written on the way:
// one read of the state, one write per snapshot. `stream` bypasses the caches.
struct Emission {
    float* dst[C_MAX];  // where the state after token t goes, or null
    int64_t ld[C_MAX];
    bool stream;
};

template <int C, int N>
AD_INLINE void update_emitting(const Problem& p, const Block& blk, const float* S, int64_t lds, float* last,
                               int64_t ld_last, const float* D, const Emission& out, const char* next,
                               int64_t next_row) {
    V d[C][N];
    AD_UNROLL for (int t = 0; t < C; ++t)
        AD_UNROLL for (int j = 0; j < N; ++j) d[t][j] = vload(D + (t * N + j) * L);
    for (int64_t seg = 0; seg < segments(p); ++seg) {
        const float* rows = blk.rows + seg * ROWS * LD;
        const int64_t n = p.K - seg * SEG < SEG ? p.K - seg * SEG : SEG;
        for (int64_t i = 0; i < n; ++i, S += lds, ++rows, next += next_row) {
            AD_PREFETCH(next);
            const int64_t row = seg * SEG + i;
            V s[N];
            AD_UNROLL for (int j = 0; j < N; ++j) s[j] = vload(S + j * L);
            AD_UNROLL for (int t = 0; t < C; ++t) {
                const V a = vsplat(rows + (ROW_A + t) * LD), k = vsplat(rows + (ROW_K + t) * LD);
                AD_UNROLL for (int j = 0; j < N; ++j) s[j] = vfma(k, d[t][j], vmul(a, s[j]));
                if (out.dst[t]) {
                    float* to = out.dst[t] + row * out.ld[t];
                    if (out.stream)
                        AD_UNROLL for (int j = 0; j < N; ++j) vstream(to + j * L, s[j]);
                    else
                        AD_UNROLL for (int j = 0; j < N; ++j) vstore(to + j * L, s[j]);
                }
            }
            if (last) AD_UNROLL for (int j = 0; j < N; ++j) vstore(last + row * ld_last + j * L, s[j]);
        }
    }
}

// One block on one panel. dst null: the state is not wanted.
template <int C, int N, class Src, class Dst>
static void step(const Problem& p, const Block& blk, const Src* S, int64_t lds, Dst* dst, int64_t ldd,
                 const float* v, float* o, int64_t ldv, const Emission* out, const char* next, int64_t next_row) {
    alignas(64) float PR[2 * C * N * L];
    alignas(64) float D[C * N * L];
    block_dots<C, N>(p, blk, S, lds, PR);
    solve<C, N>(blk, PR, v, o, ldv, D);
    if constexpr (sizeof(Src) == 4 && sizeof(Dst) == 4)
        if (blk.emits) return update_emitting<C, N>(p, blk, S, lds, dst, ldd, D, *out, next, next_row);
    if (dst) update<C, N>(p, blk, S, lds, dst, ldd, D, next, next_row);
}

template <int N, class St>
static void step_any(const Problem& p, const Block& blk, const St* S, int64_t lds, St* dst, int64_t ldd,
                     const float* v, float* o, int64_t ldv, const Emission* out, const char* next,
                     int64_t next_row) {
    switch (blk.C) {
        case 1: return step<1, N>(p, blk, S, lds, dst, ldd, v, o, ldv, out, next, next_row);
        case 2: return step<2, N>(p, blk, S, lds, dst, ldd, v, o, ldv, out, next, next_row);
        case 3: return step<3, N>(p, blk, S, lds, dst, ldd, v, o, ldv, out, next, next_row);
        case 4: return step<4, N>(p, blk, S, lds, dst, ldd, v, o, ldv, out, next, next_row);
        case 5: return step<5, N>(p, blk, S, lds, dst, ldd, v, o, ldv, out, next, next_row);
        default: return step<6, N>(p, blk, S, lds, dst, ldd, v, o, ldv, out, next, next_row);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// the transposed state [V, K]: one row per column of S, K contiguous. Products are sums along the row.

template <int C, class St>
static void step_vk(const Problem& p, const Block& blk, const St* S, int64_t lds, St* dst, int64_t ldd,
                    const float* v, float* o, int64_t ldv, const char* next) {
    // M rows at once share the loads of the prepared vectors; 8 accumulators hide the latency at C = 1.
    constexpr int M = C == 1 ? 4 : C == 2 ? 2 : 1;
    static_assert(W % M == 0, "a panel is a whole number of row groups");
    alignas(64) float PR[2 * C * W];
    alignas(64) float D[C * W];
    for (int m = 0; m < W; m += M) {
        V acc[2 * C][M];
        AD_UNROLL for (int r = 0; r < 2 * C; ++r)
            AD_UNROLL for (int u = 0; u < M; ++u) acc[r][u] = vzero();
        for (int64_t seg = 0; seg < segments(p); ++seg) {
            const float* rows = blk.rows + (seg * ROWS + ROW_KQ) * LD;
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
    solve<C, NV>(blk, PR, v, o, ldv, D);
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
                AD_PREFETCH(ahead + i * sizeof(St));
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
static void pack_as(const Problem& p, float* panel, const St* S, int64_t ld, int64_t cols) {
    for (int64_t i = 0; i < p.K; ++i)
        for (int64_t c = cols; c < W; ++c) panel[i * W + c] = 0.0f;
    if (p.vk) {
        for (int64_t c = 0; c < cols; ++c)
            for (int64_t i = 0; i < p.K; ++i) panel[i * W + c] = to_float(S[c * ld + i]);
    } else {
        for (int64_t i = 0; i < p.K; ++i) read_as(panel + i * W, S + i * ld, cols);
    }
}
template <class St>
static void unpack_as(const Problem& p, St* S, int64_t ld, const float* panel, int64_t cols) {
    if (p.vk) {
        for (int64_t c = 0; c < cols; ++c)
            for (int64_t i = 0; i < p.K; ++i) S[c * ld + i] = from_float(panel[i * W + c], St{});
    } else {
        for (int64_t i = 0; i < p.K; ++i) write_as(S + i * ld, panel + i * W, cols);
    }
}

// Address of column `col` of the state of row n, head h (and snapshot slot).
static char* state_at(const Problem& p, const States& s, int64_t slot, int64_t n, int64_t h, int64_t col) {
    const int64_t offset = slot * s.slot + n * s.n + h * s.h + col * (p.vk ? s.row : 1);
    return static_cast<char*>(s.data) + offset * dtype_size(p.state_dtype);
}
static void pack(const Problem& p, float* panel, const void* S, int64_t ld, int64_t cols) {
    if (p.state_dtype == DType::f32) return pack_as(p, panel, static_cast<const float*>(S), ld, cols);
    pack_as(p, panel, static_cast<const bf16*>(S), ld, cols);
}
static void unpack(const Problem& p, void* S, int64_t ld, const float* panel, int64_t cols) {
    if (p.state_dtype == DType::f32) return unpack_as(p, static_cast<float*>(S), ld, panel, cols);
    unpack_as(p, static_cast<bf16*>(S), ld, panel, cols);
}

// Copy (or, from null, zero) the task's columns of one state.
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

// ---------------------------------------------------------------------------------------------------------------
// a task: one sequence and head, a range of columns

struct Arena {
    char* at;
    template <class T>
    T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(at);
        at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return p;
    }
};

struct Workspace {
    Block* blocks;  // [BLOCKS]
    float* rows;    // [BLOCKS][segments][ROWS][LD]
    Scratch scratch;
    float* v;       // [BLOCKS * C_MAX][columns]
    float* o;
    float* panels;  // [columns / W][K][W]
    float* emitted; // [C_MAX][K][W]
};

static Workspace carve(const Problem& p, Arena& arena) {
    const int64_t seg = segments(p), columns = round_up(p.V, W);
    Workspace w;
    w.blocks = arena.take<Block>(BLOCKS);
    w.rows = arena.take<float>(BLOCKS * seg * ROWS * LD);
    w.scratch.k = arena.take<float>(seg * SEG);
    w.scratch.q = arena.take<float>(seg * SEG);
    w.scratch.a = arena.take<float>(seg * SEG);
    w.scratch.bias = arena.take<float>(seg * SEG);
    w.v = arena.take<float>(BLOCKS * C_MAX * columns);
    w.o = arena.take<float>(BLOCKS * C_MAX * columns);
    w.panels = arena.take<float>(p.K * columns);
    w.emitted = arena.take<float>(C_MAX * p.K * W);
    return w;
}

static size_t workspace(const Problem& p) {
    char* const origin = reinterpret_cast<char*>(64);  // addresses are only counted, never read
    Arena arena{origin};
    carve(p, arena);
    return static_cast<size_t>(arena.at - origin);
}

struct Sequence {
    int64_t b, start, end;  // tokens of row b
    int64_t row_in, row_out;
    bool live(const Problem& p, int64_t t) const { return !p.mask || p.mask[b * p.mask_b + t * p.mask_t]; }
};

class Runner {
  public:
    Runner(const Problem& problem, const Task& task, char* memory) : p(problem), job(task) {
        Arena arena{memory};
        w = carve(p, arena);
        seq.b = p.cu_seqlens ? 0 : job.n;
        seq.start = p.cu_seqlens ? p.cu_seqlens[job.n] : 0;
        seq.end = p.cu_seqlens ? p.cu_seqlens[job.n + 1] : p.T;
        seq.row_in = p.state_indices ? p.state_indices[job.n] : job.n;
        seq.row_out = p.out_dense ? job.n : seq.row_in;
        ldv = round_up(job.cols, W);
        panels = ldv / W;
        slots = p.snapshots.data ? (p.Ks < seq.end - seq.start ? p.Ks : seq.end - seq.start) : 0;
    }

    void run() {
        const bool skipped = seq.row_in < 0;
        int64_t tokens = 0;
        for (int64_t t = seq.start; t < seq.end; ++t) {
            if (!skipped && seq.live(p, t)) {
                ++tokens;
            } else {
                zero_output(t);
            }
        }
        if (!skipped) snapshot_initial_state();
        if (tokens == 0) {
            pass_state_on(skipped);
        } else {
            read_gate_parameters();
            if (tokens <= C_MAX && direct(tokens)) return;
            blocked(tokens);
        }
        if (!skipped) repeat_snapshots();
    }

  private:
    const Problem& p;
    const Task& job;
    Workspace w;
    Sequence seq;
    int64_t ldv, panels, slots;
    float A = 0.0f;

    int64_t columns(int64_t panel) const { return job.cols - panel * W < W ? job.cols - panel * W : W; }
    char* state_in(int64_t panel) const {
        return p.in.data ? state_at(p, p.in, 0, seq.row_in, job.hv, job.col0 + panel * W) : nullptr;
    }
    char* state_out(int64_t panel) const {
        return p.out.data ? state_at(p, p.out, 0, seq.row_out, job.hv, job.col0 + panel * W) : nullptr;
    }
    char* snapshot(int64_t slot, int64_t panel) const {
        return state_at(p, p.snapshots, slot, job.n, job.hv, job.col0 + panel * W);
    }

    void zero_output(int64_t t) const {
        char* o = static_cast<char*>(const_cast<void*>(token(p.o, seq.b, t, job.hv)));
        const int64_t size = dtype_size(p.o.dtype);
        std::memset(o + job.col0 * size, 0, static_cast<size_t>(job.cols * size));
    }

    // No token changed the state: the functional op still owes a final state.
    void pass_state_on(bool skipped) const {
        if (!p.out.data || (skipped && !p.out_dense)) return;
        const char* from = skipped ? nullptr : state_in(0);
        if (from != state_out(0)) copy_columns(p, state_out(0), p.out.row, from, p.in.row, job.cols);
    }

    void read_gate_parameters() {
        if (p.A_log) A = first(vexp(vset(read_one(element(p.A_log, p.A_log_dtype, job.hv), p.A_log_dtype))));
        if (p.dt_bias) {
            const int64_t n = p.kda ? p.K : 1;
            for (int64_t i = 0; i < round_up(n, L); ++i) w.scratch.bias[i] = 0.0f;
            read_row(w.scratch.bias, element(p.dt_bias, p.dt_bias_dtype, job.hv * n), p.dt_bias_dtype, n);
        }
        for (int64_t i = p.K; i < round_up(p.K, L); ++i) w.scratch.k[i] = w.scratch.q[i] = w.scratch.a[i] = 0.0f;
    }

    // The slot that receives the state after live token t, whose successor is `next` (or the end): masked tokens in
    // between would repeat it, and the oldest slot that the caller asked for gets it first.
    int64_t slot_after(int64_t t, int64_t next) const {
        const int64_t own = seq.end - 1 - t;
        const int64_t slot = own < slots ? own : slots - 1;
        return slot >= seq.end - next ? slot : -1;
    }

    // Slots at masked tokens that no live token precedes hold the initial state: copied before it is overwritten.
    void snapshot_initial_state() const {
        const int64_t first = next_live(seq.start);
        for (int64_t slot = seq.end - first; slot < slots; ++slot)
            copy_columns(p, snapshot(slot, 0), p.snapshots.row, state_in(0), p.in.row, job.cols);
    }

    // Slots at other masked tokens hold the state of the token before; the oldest slot has it already (slot_after).
    void repeat_snapshots() const {
        if (!p.mask) return;
        const int64_t first = next_live(seq.start);
        for (int64_t slot = slots - 2; slot >= 0; --slot) {
            const int64_t t = seq.end - 1 - slot;
            if (t > first && !seq.live(p, t))
                copy_columns(p, snapshot(slot, 0), p.snapshots.row, snapshot(slot + 1, 0), p.snapshots.row, job.cols);
        }
    }

    int64_t next_live(int64_t t) const {
        while (t < seq.end && !seq.live(p, t)) ++t;
        return t;
    }

    // Prepare up to `most` tokens from t on as one block; v rows go to v_rows. Returns the token after it.
    int64_t prepare(Block& blk, float* rows, int64_t t, int most, int64_t* positions, float* v_rows) {
        blk.rows = rows;
        blk.emits = false;
        int n = 0;
        int64_t u = t;
        for (; n < most && u < seq.end; ++n) {
            positions[n] = u;
            const int64_t after = next_live(u + 1);
            blk.slot[n] = slots ? slot_after(u, after) : -1;
            blk.emits |= blk.slot[n] >= 0;
            u = after;
        }
        blk.C = n;
        const int64_t h = p.tiled ? job.hv % p.H : job.hv / (p.HV / p.H);
        for (int c = 0; c < n; ++c) {
            if (positions[c] + 1 < seq.end) {  // the next token's rows: far apart in memory, so no hardware prefetch
                prefetch_row(token(p.k, seq.b, positions[c] + 1, h), p.K * dtype_size(p.k.dtype));
                prefetch_row(token(p.q, seq.b, positions[c] + 1, h), p.K * dtype_size(p.q.dtype));
                prefetch_row(element(token(p.v, seq.b, positions[c] + 1, job.hv), p.v.dtype, job.col0),
                             job.cols * dtype_size(p.v.dtype));
            }
            blk.beta[c] = read_beta(p, seq.b, positions[c], job.hv);
            read_token(p, seq.b, positions[c], job.hv, A, w.scratch);
            append(p, w.scratch, blk, c);
            float* v = v_rows + c * ldv;
            read_row(v, element(token(p.v, seq.b, positions[c], job.hv), p.v.dtype, job.col0), p.v.dtype, job.cols);
            for (int64_t i = job.cols; i < ldv; ++i) v[i] = 0.0f;
        }
        return u;
    }

    static void prefetch_row(const void* row, int64_t bytes) {
        for (int64_t i = 0; i < bytes; i += 64) AD_PREFETCH(static_cast<const char*>(row) + i);
    }

    void write_outputs(const int64_t* positions, int64_t count) const {
        for (int64_t c = 0; c < count; ++c) {
            void* o = const_cast<void*>(token(p.o, seq.b, positions[c], job.hv));
            write_row(const_cast<void*>(element(o, p.o.dtype, job.col0)), p.o.dtype, w.o + c * ldv, job.cols);
        }
    }

    // At most one block, on the caller's own state: read once, written once, no copies. False: not this case.
    bool direct(int64_t tokens) {
        const bool whole = job.cols % W == 0;
        const bool emits = slots > 0;
        if (!whole || !p.in.data || p.mask) return false;
        if (p.vk ? (emits || p.K % L != 0) : (emits && p.state_dtype != DType::f32)) return false;
        int64_t positions[C_MAX];
        Block& blk = w.blocks[0];
        prepare(blk, w.rows, next_live(seq.start), static_cast<int>(tokens), positions, w.v);
        if (p.state_dtype == DType::f32)
            direct_as<float>(blk);
        else
            direct_as<bf16>(blk);
        write_outputs(positions, blk.C);
        return true;
    }

    template <class St>
    void direct_as(const Block& blk) {
        for (int64_t panel = 0; panel < panels;) {
            const St* S = reinterpret_cast<const St*>(state_in(panel));
            St* dst = reinterpret_cast<St*>(state_out(panel));
            float *v = w.v + panel * W, *o = w.o + panel * W;
            // Decode has one accumulator per row and vector: two panels at once keep 8 in flight.
            const int64_t taken = !p.vk && blk.C == 1 && !blk.emits && panel + 2 <= panels ? 2 : 1;
            const char* next = panel + taken < panels ? state_in(panel + taken) : job.next_state;
            if (!next) next = reinterpret_cast<const char*>(S);
            const int64_t next_row = p.in.row * static_cast<int64_t>(sizeof(St));
            if (p.vk) {
                step_vk_any<St>(p, blk, S, p.in.row, dst, p.out.row, v, o, ldv, next);
            } else if (taken == 2) {
                step<1, 2 * NV>(p, blk, S, p.in.row, dst, p.out.row, v, o, ldv, nullptr, next, next_row);
            } else {
                Emission out;
                if (blk.emits) emission_direct(blk, panel, out);
                step_any<NV, St>(p, blk, S, p.in.row, dst, p.out.row, v, o, ldv, &out, next, next_row);
            }
            panel += taken;
        }
    }

    bool streams(const Block& blk, const Emission& out) const {
        if (!p.stream_snapshots) return false;
        for (int t = 0; t < blk.C; ++t)
            if ((reinterpret_cast<uintptr_t>(out.dst[t]) | static_cast<uintptr_t>(out.ld[t] * 4)) % (L * 4)) return false;
        return true;
    }
    void emission_direct(const Block& blk, int64_t panel, Emission& out) const {
        for (int t = 0; t < blk.C; ++t) {
            out.dst[t] = blk.slot[t] < 0 ? nullptr : reinterpret_cast<float*>(snapshot(blk.slot[t], panel));
            out.ld[t] = p.snapshots.row;
        }
        out.stream = streams(blk, out);
    }

    // Any number of tokens: panels are packed once, then taken through all prepared blocks while they are in L1.
    void blocked(int64_t tokens) {
        const int64_t seg = segments(p);
        const bool in_place_rows = !p.vk && p.state_dtype == DType::f32;  // full panels need no packing
        int64_t positions[BLOCKS * C_MAX];
        int64_t t = next_live(seq.start), done = 0;
        while (done < tokens) {
            int count = 0;
            int64_t prepared = 0;
            const int64_t before = done;
            for (; count < BLOCKS && done < tokens; ++count) {
                Block& blk = w.blocks[count];
                t = prepare(blk, w.rows + count * seg * ROWS * LD, t, C_MAX, positions + prepared, w.v + prepared * ldv);
                prepared += blk.C;
                done += blk.C;
            }
            for (int64_t panel = 0; panel < panels; ++panel) {
                const bool easy = in_place_rows && columns(panel) == W;
                float* tile = w.panels + panel * p.K * W;
                const float* S = tile;
                int64_t lds = W;
                if (before == 0) {
                    if (easy && p.in.data) {
                        S = reinterpret_cast<const float*>(state_in(panel));
                        lds = p.in.row;
                    } else if (p.in.data) {
                        pack(p, tile, state_in(panel), p.in.row, columns(panel));
                    } else {
                        std::memset(tile, 0, static_cast<size_t>(p.K * W) * 4);
                    }
                }
                int64_t offset = 0;
                for (int i = 0; i < count; ++i) {
                    const Block& blk = w.blocks[i];
                    const bool last = i + 1 == count && done == tokens;
                    float* dst = tile;
                    int64_t ldd = W;
                    if (last && (!p.out.data || easy)) {
                        dst = p.out.data ? reinterpret_cast<float*>(state_out(panel)) : nullptr;
                        ldd = p.out.row;
                    }
                    Emission out;
                    if (blk.emits) emission_blocked(blk, panel, easy, out);
                    float *v = w.v + offset * ldv + panel * W, *o = w.o + offset * ldv + panel * W;
                    step_any<NV, float>(p, blk, S, lds, dst, ldd, v, o, ldv, &out, reinterpret_cast<const char*>(S), 0);
                    if (blk.emits && !easy) write_emitted(blk, panel);
                    if (last && dst == tile) unpack(p, state_out(panel), p.out.row, tile, columns(panel));
                    S = tile;
                    lds = W;
                    offset += blk.C;
                }
            }
            write_outputs(positions, prepared);
        }
    }

    void emission_blocked(const Block& blk, int64_t panel, bool easy, Emission& out) const {
        if (easy) return emission_direct(blk, panel, out);
        for (int t = 0; t < blk.C; ++t) {
            out.dst[t] = blk.slot[t] < 0 ? nullptr : w.emitted + t * p.K * W;
            out.ld[t] = W;
        }
        out.stream = false;
    }
    void write_emitted(const Block& blk, int64_t panel) const {
        for (int t = 0; t < blk.C; ++t)
            if (blk.slot[t] >= 0)
                unpack(p, snapshot(blk.slot[t], panel), p.snapshots.row, w.emitted + t * p.K * W, columns(panel));
    }
};

static void run_task(const Problem& p, const Task& task, char* memory) { Runner(p, task, memory).run(); }

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
