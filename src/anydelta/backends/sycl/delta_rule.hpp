// The gated delta rule, GDA and KDA, in SYCL C++. LANES work-items advance VEC * NVEC columns of one state through all
// tokens, C tokens at a time.
//
//     S   = diag(a_t) S                 a_t = exp(g_t): one number (GDA) or a vector over K (KDA)
//     d_t = beta_t (v_t - S^T k_t)
//     S   = S + k_t d_t^T
//     o_t = scale * S^T q_t
//
//     q, k [B, T, H, K]   v, o [B, T, HV, V]   g [B, T, HV] or [B, T, HV, K]   beta [B, T, HV]
//     state [N or P, HV, K, V]   snapshots [Ks, N, HV, K, V]   mask [B, T]   cu_seqlens [N+1]   state_indices [N]
//
// Everything is computed in float32; types are converted where memory is read and written, so this build also serves
// float16. Strides are run-time values, so grouped heads and [V, K] states only have other strides.
//
// C tokens at once. With w_i = a_1 .. a_i, the decay since the tokens' start, and D_ij = a_j+1 .. a_i:
//
//     p_i = S^T (w_i k_i)        r_i = S^T (w_i q_i)                        S is read once for all C tokens
//     d_i = beta_i (v_i - p_i - sum_j<i (k_i . D_ij k_j) d_j)
//     o_i = scale (r_i + sum_j<=i (q_i . D_ij k_j) d_j)
//     S   = w_C S + sum_j (D_Cj k_j) d_j^T                                  and written once
//
// C = 1 is the recurrence itself. Decays appear only as products of numbers in [0, 1], so nothing overflows.
//
// A work-item holds NVEC vectors of VEC columns, and KP / LANES rows of them, from the first token to the last: in
// registers on a GPU, in the L1 cache on a CPU. Rows come in blocks of RB neighbours. Block b of lane l has the rows
// (b LANES + l) RB ..., so k and q are read as float4 (or wider, if a work-item has all rows). The LANES neighbours
// of a sub-group add up by shuffles in the sums over K. There is no local memory and no barrier.
#pragma once

#include <sycl/sycl.hpp>

#include "params.hpp"

namespace anydelta {

template <int N>
using Vec = float __attribute__((ext_vector_type(N)));

using Bytes = unsigned char*;

// Memory access is a call, and loops over rare cases are not unrolled, because the run-time compiler's seconds count.
#define ANYDELTA_CALL __attribute__((noinline))
#define ANYDELTA_LOOP _Pragma("clang loop unroll(disable) vectorize(disable)")

inline bool has(const Params& P, Array x) { return P.at[x] != ~std::uint64_t(0); }
inline Bytes at(const Params& P, Array x) { return reinterpret_cast<Bytes>(P.at[x]); }

ANYDELTA_CALL inline float read(Bytes base, int type, std::int64_t i) {
    if (type == F32) return reinterpret_cast<const float*>(base)[i];
    if (type == F16) return reinterpret_cast<const sycl::half*>(base)[i];
    return sycl::bit_cast<float>(std::uint32_t(reinterpret_cast<const std::uint16_t*>(base)[i]) << 16);
}

inline std::uint16_t to_bf16(float x) {  // to nearest, ties to even
    const std::uint32_t u = sycl::bit_cast<std::uint32_t>(x);
    return x != x ? 0x7FC0 : std::uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

ANYDELTA_CALL inline void write(Bytes base, int type, std::int64_t i, float x) {
    if (type == F32)
        reinterpret_cast<float*>(base)[i] = x;
    else if (type == F16)
        reinterpret_cast<sycl::half*>(base)[i] = x;
    else
        reinterpret_cast<std::uint16_t*>(base)[i] = to_bf16(x);
}

// N elements `stride` apart, of which the first `valid` exist; the others read as 0.
template <int N>
ANYDELTA_CALL inline Vec<N> load(Bytes base, int type, std::int64_t i, std::int64_t stride, int valid) {
    Vec<N> x = 0.0f;
    if (stride == 1 && valid >= N) {
        if (type == F32) {
            __builtin_memcpy(&x, reinterpret_cast<const float*>(base) + i, sizeof(float) * N);
            return x;
        }
        using Halves = std::uint16_t __attribute__((ext_vector_type(N)));
        using Words = std::uint32_t __attribute__((ext_vector_type(N)));
        Halves h;
        __builtin_memcpy(&h, reinterpret_cast<const std::uint16_t*>(base) + i, 2 * N);
        if (type == BF16) {
            const Words w = __builtin_convertvector(h, Words) << 16;
            __builtin_memcpy(&x, &w, sizeof(x));
        } else {
            for (int e = 0; e < N; ++e) x[e] = sycl::bit_cast<sycl::half>(std::uint16_t(h[e]));
        }
        return x;
    }
    float one[N];
    ANYDELTA_LOOP for (int e = 0; e < N; ++e) one[e] = e < valid ? read(base, type, i + e * stride) : 0.0f;
    __builtin_memcpy(&x, one, sizeof x);
    return x;
}

template <int N>
ANYDELTA_CALL inline void store(Vec<N> x, Bytes base, int type, std::int64_t i, std::int64_t stride, int valid) {
    if (type == F32 && stride == 1 && valid >= N) {
        __builtin_memcpy(reinterpret_cast<float*>(base) + i, &x, sizeof(float) * N);
        return;
    }
    float one[N];
    __builtin_memcpy(one, &x, sizeof x);
    ANYDELTA_LOOP for (int e = 0; e < N && e < valid; ++e) write(base, type, i + e * stride, one[e]);
}

template <int N>
inline Vec<N> exp(Vec<N> x) {  // the vector form, which a CPU's compiler has a vector function for
    return sycl::bit_cast<Vec<N>>(sycl::exp(sycl::bit_cast<sycl::vec<float, N>>(x)));
}

template <int N>
inline float total(Vec<N> x) {
    float sum = 0.0f;
    for (int e = 0; e < N; ++e) sum += x[e];
    return sum;
}

inline float sigmoid(float x) {
    const float e = sycl::exp(-sycl::fabs(x));  // <= 1, and no cancellation on either side
    return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

// exp(log decay), in [0, 1].   raw: log decay = -A softplus(g + dt_bias), or lower_bound sigmoid(A (g + dt_bias))
ANYDELTA_CALL inline float raw_decay(const Params& P, float x, float A) {
    if (P.has_lower_bound) return sycl::exp(P.lower_bound * sigmoid(A * x));
    return sycl::exp(-A * (sycl::fmax(x, 0.0f) + sycl::log1p(sycl::exp(-sycl::fabs(x)))));
}

template <int N>
ANYDELTA_CALL inline Vec<N> decay_of(const Params& P, Vec<N> g, Vec<N> dt_bias, float A) {
    if (P.decay == LINEAR) return g;
    if (P.decay == LOG) return exp<N>(g);
    float x[N];
    g += dt_bias;
    __builtin_memcpy(x, &g, sizeof x);
    ANYDELTA_LOOP for (int e = 0; e < N; ++e) x[e] = raw_decay(P, x[e], A);
    __builtin_memcpy(&g, x, sizeof x);
    return g;
}

template <int KP, bool KDA, int LANES, int VEC, int NVEC>
struct Rule {
    static constexpr int RB = LANES == 1 ? 16 : 4;
    static constexpr int BLOCKS = KP / (LANES * RB), ROWS = BLOCKS * RB;
    // Rows per iteration of the loops over the state: all if it must be in registers, one if it is in a cache.
    static constexpr int TURN = LANES == 1 ? 1 : ROWS, BLOCK_TURN = LANES == 1 ? 1 : BLOCKS;
    static constexpr int COLUMNS = VEC * NVEC;
    using F = Vec<VEC>;
    using R = Vec<RB>;

    const Params& P;
    sycl::sub_group sg;
    int lane, first;  // first: my first column
    int h, hq;  // value head, q/k head
    std::int64_t n, b, start, end;
    float A;  // exp(A_log) of my head
    F S[ROWS][NVEC];

    int row_of(int block) const { return (block * LANES + lane) * RB; }
    int row(int i) const { return row_of(i / RB) + i % RB; }

    static float at_row(const R* x, int i) { return reinterpret_cast<const float*>(x)[i]; }

    // The sum over my LANES neighbours, which each of them gets.
    float meet(float x) const {
        for (int mask = 1; mask < LANES; mask *= 2) x += sycl::permute_group_by_xor(sg, x, mask);
        return x;
    }
    F meet_all(F x) const {
        if constexpr (LANES > 1)
            for (int e = 0; e < VEC; ++e) x[e] = meet(x[e]);
        return x;
    }
    static F fma(F x, F y, F z) { return __builtin_elementwise_fma(x, y, z); }
    // 1 / sqrt(sum x^2 + eps), 0 for 0. If a square leaves float32's range, x is first scaled by a power of two.
    float inverse_length(R* x) const {
        float sum = dot(x, x) + P.eps;
        if (sum < 0x1p-90f || sum > 0x1p120f) {
            const float unit = sum < 1.0f ? 0x1p55f : 0x1p-55f;
            for (int m = 0; m < BLOCKS; ++m) x[m] *= unit;
            sum = dot(x, x) + P.eps * unit * unit;
        }
        return sum == 0.0f ? 0.0f : 1.0f / sycl::sqrt(sum);
    }
    // x . y over K
    float dot(const R* x, const R* y) const {
        R sum = 0.0f;
        for (int i = 0; i < BLOCKS; ++i) sum += x[i] * y[i];
        return meet(total<RB>(sum));
    }

    void read_state(Bytes base, std::int64_t from, const std::int64_t* st) {
        const bool whole =
            P.state_type == F32 && st[1] == 1 && first + COLUMNS <= P.V;  // the usual case, without calls
#pragma unroll TURN
        for (int i = 0; i < ROWS; ++i)
            for (int j = 0; j < NVEC; ++j) {
                const int k = row(i), c = first + j * VEC;
                S[i][j] = 0.0f;
                if (k >= P.k_rows || c >= P.V) continue;
                if (whole)
                    __builtin_memcpy(&S[i][j], reinterpret_cast<const float*>(base) + from + k * st[0] + c, sizeof(F));
                else
                    S[i][j] = load<VEC>(base, P.state_type, from + k * st[0] + c * st[1], st[1], P.V - c);
            }
    }
    void write_state(Bytes base, std::int64_t to, const std::int64_t* st) const {
        const bool whole = P.state_type == F32 && st[1] == 1 && first + COLUMNS <= P.V;
#pragma unroll TURN
        for (int i = 0; i < ROWS; ++i)
            for (int j = 0; j < NVEC; ++j) {
                const int k = row(i), c = first + j * VEC;
                if (k >= P.k_rows || c >= P.V) continue;
                if (whole)
                    __builtin_memcpy(reinterpret_cast<float*>(base) + to + k * st[0] + c, &S[i][j], sizeof(F));
                else
                    store<VEC>(S[i][j], base, P.state_type, to + k * st[0] + c * st[1], st[1], P.V - c);
            }
    }
    void write_o(std::int64_t t, const F* x) const {
        if (lane) return;
        for (int j = 0; j < NVEC; ++j)
            if (const int c = first + j * VEC; c < P.V)
                store<VEC>(x[j], at(P, O), P.qkv_type, b * P.o[0] + t * P.o[1] + h * P.o[2] + c * P.o[3], P.o[3],
                           P.V - c);
    }

    // Tokens t0 to t0 + count - 1, count <= C. Masked tokens and those beyond count change nothing: a = 1, k = q = d = 0.
    template <int C>
    void tokens(std::int64_t t0, int count) {
        R kd[C][BLOCKS];  // D_ij k_j for the current token i; D_Cj k_j after the last
        R kw[C][BLOCKS], qw[C][BLOCKS], w[BLOCKS];
        float kk[C][C], qk[C][C], beta[C];
        F x[C][NVEC];  // v
        bool live[C], any = false;
        float wh = 1.0f;  // w of GDA

        for (int i = 0; i < BLOCKS; ++i) w[i] = 1.0f;
        for (int i = 0; i < C; ++i) {
            const std::int64_t t = t0 + i;
            live[i] = i < count && (!has(P, MASK) || at(P, MASK)[b * P.mask[0] + t * P.mask[1]]);
            R k[BLOCKS], q[BLOCKS], a[KDA ? BLOCKS : 1];
            float ah = 1.0f;
            beta[i] = 0.0f;
            for (int m = 0; m < BLOCKS; ++m) k[m] = q[m] = 0.0f;
            for (int m = 0; m < (KDA ? BLOCKS : 1); ++m) a[m] = 1.0f;
            for (int j = 0; j < NVEC; ++j) x[i][j] = 0.0f;
            if (live[i]) {
                any = true;
                const std::int64_t q0 = b * P.q[0] + t * P.q[1] + hq * P.q[2],
                                   k0 = b * P.k[0] + t * P.k[1] + hq * P.k[2];
                const std::int64_t g0 = b * P.g[0] + t * P.g[1] + h * P.g[2];
#pragma unroll BLOCK_TURN
                for (int m = 0; m < BLOCKS; ++m) {
                    const int r = row_of(m);
                    q[m] = load<RB>(at(P, Q), P.qkv_type, q0 + r * P.q[3], P.q[3], P.k_rows - r);
                    k[m] = load<RB>(at(P, K), P.qkv_type, k0 + r * P.k[3], P.k[3], P.k_rows - r);
                    if constexpr (KDA) {
                        R bias = 0.0f;
                        if (has(P, DT_BIAS))
                            bias = load<RB>(at(P, DT_BIAS), P.dt_bias_type, h * P.dt_bias[0] + r * P.dt_bias[1],
                                            P.dt_bias[1], P.k_rows - r);
                        a[m] = decay_of<RB>(P, load<RB>(at(P, G), P.g_type, g0 + r * P.g[3], P.g[3], P.k_rows - r),
                                            bias, A);
                    }
                }
                if constexpr (!KDA) {
                    const float bias = has(P, DT_BIAS) ? read(at(P, DT_BIAS), P.dt_bias_type, h * P.dt_bias[0]) : 0.0f;
                    const float g = read(at(P, G), P.g_type, g0);
                    ah = P.decay == LINEAR ? g : P.decay == LOG ? sycl::exp(g) : raw_decay(P, g + bias, A);
                }
                if (P.l2norm) {
                    const float fk = inverse_length(k), fq = inverse_length(q);
                    for (int m = 0; m < BLOCKS; ++m) k[m] *= fk, q[m] *= fq;
                }
                beta[i] = read(at(P, BETA), P.beta_type, b * P.beta[0] + t * P.beta[1] + h * P.beta[2]);
                if (P.logit) beta[i] = sigmoid(beta[i]);
                for (int j = 0; j < NVEC; ++j)
                    if (const int c = first + j * VEC; c < P.V)
                        x[i][j] = load<VEC>(at(P, V), P.qkv_type, b * P.v[0] + t * P.v[1] + h * P.v[2] + c * P.v[3],
                                            P.v[3], P.V - c);
            }
            wh *= ah;
            for (int m = 0; m < BLOCKS; ++m) {
                if constexpr (KDA) w[m] *= a[m];
                kw[i][m] = (KDA ? w[m] : R(wh)) * k[m];
                qw[i][m] = (KDA ? w[m] : R(wh)) * q[m];
            }
            for (int j = 0; j < i; ++j) {
                for (int m = 0; m < BLOCKS; ++m) kd[j][m] *= KDA ? a[KDA ? m : 0] : R(ah);
                kk[i][j] = dot(k, kd[j]);
                qk[i][j] = dot(q, kd[j]);
            }
            for (int m = 0; m < BLOCKS; ++m) kd[i][m] = k[m];
            qk[i][i] = dot(q, k);
        }

        F out[C][NVEC];
        for (int i = 0; i < C; ++i)
            for (int j = 0; j < NVEC; ++j) out[i][j] = 0.0f;
        if (any) {
            // p_i = S^T kw_i, r_i = S^T qw_i
            F p[C][NVEC], r[C][NVEC];
            for (int i = 0; i < C; ++i)
                for (int j = 0; j < NVEC; ++j) p[i][j] = r[i][j] = 0.0f;
#pragma unroll TURN
            for (int m = 0; m < ROWS; ++m)
#pragma unroll
                for (int i = 0; i < C; ++i)
#pragma unroll
                    for (int j = 0; j < NVEC; ++j) {
                        p[i][j] = fma(S[m][j], F(at_row(kw[i], m)), p[i][j]);
                        r[i][j] = fma(S[m][j], F(at_row(qw[i], m)), r[i][j]);
                    }
            // forward substitution: token i sees the d of those before it
            for (int i = 0; i < C; ++i)
                for (int j = 0; j < NVEC; ++j) {
                    F d = x[i][j] - meet_all(p[i][j]);
                    for (int s = 0; s < i; ++s) d -= F(kk[i][s]) * x[s][j];
                    x[i][j] = F(beta[i]) * d;
                    F o = meet_all(r[i][j]);
                    for (int s = 0; s <= i; ++s) o += F(qk[i][s]) * x[s][j];
                    if (live[i]) out[i][j] = F(P.scale) * o;
                }
            // S = w S + sum_j kd_j d_j
#pragma unroll TURN
            for (int m = 0; m < ROWS; ++m)
#pragma unroll
                for (int j = 0; j < NVEC; ++j) {
                    F s = S[m][j] * F(KDA ? at_row(w, m) : wh);
#pragma unroll
                    for (int i = 0; i < C; ++i) s = fma(F(at_row(kd[i], m)), x[i][j], s);
                    S[m][j] = s;
                }
        }
        for (int i = 0; i < count; ++i) write_o(t0 + i, out[i]);
    }

    // `slot`: my place among all work-items of the call. C tokens at a time if there is no snapshot between them.
    template <int C>
    static void run(const Params& P, sycl::sub_group sg, std::int64_t slot) {
        const std::int64_t panels = (P.V + COLUMNS - 1) / COLUMNS, panel = slot / LANES;
        if (panel >= panels * P.HV * P.N) return;  // whole sub-groups only, or neighbours in the last one
        const int h = int(panel / panels % P.HV);
        Rule me{P,
                sg,
                int(slot % LANES),
                int(panel % panels) * COLUMNS,
                h,
                P.tiled ? h % P.H : h / (P.HV / P.H),
                panel / panels / P.HV};
        me.advance<C>();
    }

    template <int C>
    void advance() {
        b = n, start = 0, end = P.T;
        if (has(P, CU)) {
            const Bytes cu = at(P, CU);
            b = 0;
            start =
                P.cu64 ? reinterpret_cast<std::int64_t*>(cu)[n * P.cu] : reinterpret_cast<std::int32_t*>(cu)[n * P.cu];
            end = P.cu64 ? reinterpret_cast<std::int64_t*>(cu)[(n + 1) * P.cu]
                         : reinterpret_cast<std::int32_t*>(cu)[(n + 1) * P.cu];
        }
        std::int64_t row = n;
        if (has(P, INDICES)) {
            const Bytes indices = at(P, INDICES);
            row = P.indices64 ? reinterpret_cast<std::int64_t*>(indices)[n * P.indices]
                              : reinterpret_cast<std::int32_t*>(indices)[n * P.indices];
        }
        A = has(P, A_LOG) ? sycl::exp(read(at(P, A_LOG), P.a_log_type, h * P.a_log)) : 0.0f;

        if (has(P, STATE_IN) && row >= 0)
            read_state(at(P, STATE_IN), row * P.state_in[0] + h * P.state_in[1], P.state_in + 2);
        else
            for (int i = 0; i < ROWS; ++i)
                for (int j = 0; j < NVEC; ++j) S[i][j] = 0.0f;

        if (row < 0) {  // a skipped sequence: zeros out
            const F zeros[NVEC] = {};
            for (std::int64_t t = start; t < end; ++t) write_o(t, zeros);
        } else {
            std::int64_t t = start;
            if constexpr (C > 1)
                for (; t + 1 < end - P.Ks; t += C) {
                    const std::int64_t left = end - P.Ks - t;
                    tokens<C>(t, left < C ? int(left) : C);
                    if (left < C) t += left - C;
                }
            for (; t < end; ++t) {
                tokens<1>(t, 1);
                // slot s of the snapshots: the state of s tokens before the last
                if (const std::int64_t s = end - 1 - t; s < P.Ks)
                    write_state(at(P, SNAPSHOTS), s * P.snapshots[0] + n * P.snapshots[1] + h * P.snapshots[2],
                                P.snapshots + 3);
            }
        }
        if (const std::int64_t to = P.out_dense ? n : row; has(P, STATE_OUT) && to >= 0)
            write_state(at(P, STATE_OUT), to * P.state_out[0] + h * P.state_out[1], P.state_out + 2);
    }
};

}  // namespace anydelta

#ifdef ANYDELTA_FREE_FUNCTIONS
// Instances that the run-time compiler is asked for by name: rule<KP, KDA, LANES, VEC, NVEC, C, SG>.
namespace ext = sycl::ext::oneapi;
namespace anydelta {

template <int KP, bool KDA, int LANES, int VEC, int NVEC, int C>
SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((ext::experimental::nd_range_kernel<1>))
void rule_alone(Params P) {
    const auto it = ext::this_work_item::get_nd_item<1>();
    Rule<KP, KDA, LANES, VEC, NVEC>::template run<C>(P, it.get_sub_group(), it.get_global_linear_id());
}

template <int KP, bool KDA, int LANES, int VEC, int NVEC, int C, int SG>
SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((ext::experimental::nd_range_kernel<1>))
SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((ext::experimental::sub_group_size<SG>)) void rule_pinned(Params P) {
    const auto it = ext::this_work_item::get_nd_item<1>();
    const auto sg = it.get_sub_group();
    // neighbours in a sub-group own neighbouring slots
    const std::int64_t slot =
        it.get_group(0) * it.get_local_range(0) + sg.get_group_id()[0] * SG + sg.get_local_id()[0];
    Rule<KP, KDA, LANES, VEC, NVEC>::template run<C>(P, sg, slot);
}

}  // namespace anydelta
#endif
