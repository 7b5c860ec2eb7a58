// The gated delta rule over chunks of 8 tokens, for long prompts, as products of 8 x 8 matrices.
//
//     S   = diag(exp(g_t)) S            decay    g_t: one number (GDA) or a vector over K (KDA)
//     d_t = beta_t (v_t - S^T k_t)      delta    the prediction reads the decayed state
//     S   = S + k_t d_t^T               update
//     o_t = scale * S^T q_t             output   reads the updated state
//
// Shapes and strides: shared.metal, which the host puts before this text. All sums are in float32. With G_i the sum
// of the log decays of tokens 1 .. i of a chunk, and S the state before it (the WY form of arXiv 2412.06464):
//
//     A_ij = beta_i sum_k k_i k_j exp(G_i - G_j)  j < i     U_i = beta_i (v_i - S^T (exp(G_i) k_i)) - sum_j A_ij U_j
//     B_ij = scale  sum_k q_i k_j exp(G_i - G_j)  j <= i    o_i = scale S^T (exp(G_i) q_i) + sum_j B_ij U_j
//     S    = diag(exp(G_8)) S + sum_j (exp(G_8 - G_j) k_j) U_j^T
//
// Every exponent is <= 0. A token that is masked, or beyond the end, has k = q = v = beta = 0 and no decay.
//
// A threadgroup of 4 simdgroups owns 32 columns of one head of one sequence. Simdgroup s has 8 of them: K / 8
// matrices of the state, in registers for all chunks. k, q and the gates of a chunk are in threadgroup memory (12 KiB
// for K = 128, 20 for KDA, of 32). Why 8 tokens: a simdgroup matrix has 8 rows, and the triangular solve is short
// enough for one lane per column.
#include <metal_simdgroup_matrix>

constant constexpr int C = 8, SIMDGROUPS = 4, TILES = KP / 8;

struct Scratch {
    float k[C * KP], q[C * KP];              // k_i, q_i; for KDA then exp(G_i) k_i, exp(G_i) q_i
    float g[KDA ? C * KP : 1];               // KDA: log decays, then G_i, then exp(G_8 - G_i) k_i
    float decays[KDA ? C * KP : 1];          // KDA: TILES diagonal matrices of exp(G_8)
    float A[C * C], B[C * C];
    float log_decay[C], beta[C];             // GDA; both
    float w[SIMDGROUPS][C * 8], o[SIMDGROUPS][C * 8], u[SIMDGROUPS][C * 8];  // of a simdgroup's 8 columns
};

// One matrix of the state, through 64 floats of threadgroup memory that belong to the simdgroup.
inline void load_tile(thread simdgroup_float8x8& S, threadgroup float* mine, device const uchar* base, long at, long sk, long sv,
                      int row, int c, int V, bool any, int lane) {
    for (int e = lane; e < 64; e += 32) {
        const int r = row + e / 8, v = c + e % 8;
        mine[e] = any && r < K && v < V ? load1(AD_STATE_IN, base, at + r * sk + v * sv) : 0.0f;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_load(S, mine, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
}

inline void store_tile(thread const simdgroup_float8x8& S, threadgroup float* mine, device uchar* base, long at, long sk, long sv,
                       int row, int c, int V, int lane) {
    simdgroup_store(S, mine, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int e = lane; e < 64; e += 32) {
        const int r = row + e / 8, v = c + e % 8;
        if (r < K && v < V) store1(AD_STATE_OUT, base, at + r * sk + v * sv, mine[e]);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
}

// k, q, gates and beta of tokens t .. t + 7 into threadgroup memory; simdgroup s takes tokens s and s + 4.
template <typename Ref>
inline void load_chunk(Ref P, thread const Arrays& a, thread const Work& w, threadgroup Scratch& s, long t, long last, int simdgroup, int lane) {
    for (int i = simdgroup; i < C; i += SIMDGROUPS) {
        const long now = t + i;
        const bool on = now < last && is_live<Ref>(P, a, w, now);
        float kk = 0.0f, qq = 0.0f;
        for (int row = 4 * lane; row < KP; row += 128) {
            float4 k = float4(0.0f), q = float4(0.0f), g = float4(0.0f);
            if (on) {
                k = rows4(AD_QKV, a.k, w.b * P.k[0] + now * P.k[1] + w.hq * P.k[2], row);
                q = rows4(AD_QKV, a.q, w.b * P.q[0] + now * P.q[1] + w.hq * P.q[2], row);
                if (KDA) {
                    g = rows4(AD_GATE, a.g, w.b * P.g[0] + now * P.g[1] + w.h * P.g[2], row);
                    for (int x = 0; x < 4; ++x) g[x] = log_decay_of<Ref>(P, g[x], bias_of<Ref>(P, a, w, row + x), w.A);
                }
            }
            kk += dot(k, k);
            qq += dot(q, q);
            for (int x = 0; x < 4; ++x) {
                s.k[i * KP + row + x] = k[x];
                s.q[i * KP + row + x] = q[x];
                if (KDA) s.g[i * KP + row + x] = g[x];
            }
        }
        if (P.l2norm) {  // x rsqrt(sum x^2 + eps); a token of zeros stays zero
            kk = simd_sum(kk) + P.eps;
            qq = simd_sum(qq) + P.eps;
            float by_k = 1.0f, by_q = 1.0f;
            if (!in_range(kk) || !in_range(qq)) {
                by_k = in_range(kk) ? 1.0f : unit_for(kk);
                by_q = in_range(qq) ? 1.0f : unit_for(qq);
                kk = qq = 0.0f;
                for (int row = 4 * lane; row < KP; row += 128)
                    for (int x = 0; x < 4; ++x) {
                        const float k = by_k * s.k[i * KP + row + x], q = by_q * s.q[i * KP + row + x];
                        kk += k * k;
                        qq += q * q;
                    }
                kk = simd_sum(kk) + P.eps * by_k * by_k;
                qq = simd_sum(qq) + P.eps * by_q * by_q;
            }
            kk = kk == 0.0f ? 0.0f : by_k * rsqrt(kk);
            qq = qq == 0.0f ? 0.0f : by_q * rsqrt(qq);
            for (int row = 4 * lane; row < KP; row += 128)  // what this lane has just written
                for (int x = 0; x < 4; ++x) {
                    s.k[i * KP + row + x] *= kk;
                    s.q[i * KP + row + x] *= qq;
                }
        }
        if (lane == 0) {
            s.beta[i] = on ? beta_of<Ref>(P, a, w, now) : 0.0f;
            float g = 0.0f;
            if (!KDA && on) {
                g = load1(P.g_type, a.g, w.b * P.g[0] + now * P.g[1] + w.h * P.g[2]);
                g = log_decay_of<Ref>(P, g, bias_of<Ref>(P, a, w, 0), w.A);
            }
            s.log_decay[i] = g;
        }
    }
}

// A and B of GDA: sum_k x_i k_j of all pairs is one product. Simdgroup 0 computes A, simdgroup 1 computes B.
template <typename Ref>
inline void pairs_by_product(Ref P, threadgroup Scratch& s, thread const float (&G)[C], int simdgroup, int lane) {
    if (simdgroup > 1) return;
    threadgroup const float* x = simdgroup == 0 ? s.k : s.q;
    threadgroup float* out = simdgroup == 0 ? s.A : s.B;
    simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f), left, right;
    UNROLL
    for (int j = 0; j < TILES; ++j) {
        simdgroup_load(left, x + 8 * j, KP);
        simdgroup_load(right, s.k + 8 * j, KP, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(sum, left, right, sum);
    }
    simdgroup_store(sum, out, C);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int e = lane; e < C * C; e += 32) {
        const int i = e / C, j = e % C;
        const bool used = simdgroup == 0 ? j < i : j <= i;
        out[e] = used ? out[e] * exp(G[i] - G[j]) * (simdgroup == 0 ? s.beta[i] : P.scale) : 0.0f;
    }
}

// A and B of KDA, where every pair has its own decays: 36 pairs, distributed over the simdgroups.
template <typename Ref>
inline void pairs_by_sums(Ref P, threadgroup Scratch& s, int simdgroup, int lane) {
    int number = 0;
    for (int i = 0; i < C; ++i)
        for (int j = 0; j <= i; ++j) {
            if (number++ % SIMDGROUPS != simdgroup) continue;
            float kk = 0.0f, qk = 0.0f;
            for (int row = lane; row < KP; row += 32) {
                const float x = s.k[j * KP + row] * exp(s.g[i * KP + row] - s.g[j * KP + row]);
                kk += s.k[i * KP + row] * x;
                qk += s.q[i * KP + row] * x;
            }
            kk = simd_sum(kk);
            qk = simd_sum(qk);
            if (lane == 0) {
                s.A[i * C + j] = s.beta[i] * kk;
                s.B[i * C + j] = P.scale * qk;
            }
        }
}

template <typename Ref>
inline void run(Ref P, thread const Arrays& a, threadgroup Scratch& s, uint3 group, uint simdgroup_, uint lane_) {
    const int simdgroup = int(simdgroup_), lane = int(lane_), thread_ = 32 * simdgroup + lane;
    const int V = P.V, c = 8 * (int(group.x) * SIMDGROUPS + simdgroup);  // my columns: c .. c + 7
    Work w = find_work<Ref>(P, a, int(group.z), int(group.y));
    const long last = P.flags & HEAD ? max(w.start, w.end - P.Ks) : w.end;
    const long o_base = w.b * P.o[0] + w.h * P.o[2];
    const bool skipped = w.row_in < 0, any = (P.flags & HAS_STATE) && !skipped;
    threadgroup float *mine_w = s.w[simdgroup], *mine_o = s.o[simdgroup], *mine_u = s.u[simdgroup];

    simdgroup_float8x8 S[TILES];
    UNROLL
    for (int j = 0; j < TILES; ++j)
        load_tile(S[j], mine_w, a.state_in, w.row_in * P.state_in[0] + w.h * P.state_in[1], P.state_in[2], P.state_in[3], 8 * j, c, V, any, lane);
    if (KDA)
        for (int e = thread_; e < C * KP; e += 128) s.decays[e] = 0.0f;
    if (skipped)  // zeros out
        for (long t = w.start + lane / 8; t < last; t += 4)
            if (c + lane % 8 < V) store1(AD_QKV, a.o, o_base + t * P.o[1] + c + lane % 8, 0.0f);

    for (long t = w.start; t < last && !skipped; t += C) {
        threadgroup_barrier(mem_flags::mem_threadgroup);  // nobody reads the chunk before any more
        load_chunk<Ref>(P, a, w, s, t, last, simdgroup, lane);
        threadgroup_barrier(mem_flags::mem_threadgroup);

        float G[C];  // GDA; KDA has them in s.g
        if (KDA) {
            for (int row = thread_; row < KP; row += 128)
                for (int i = 1; i < C; ++i) s.g[i * KP + row] += s.g[(i - 1) * KP + row];
            threadgroup_barrier(mem_flags::mem_threadgroup);
            pairs_by_sums<Ref>(P, s, simdgroup, lane);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (int row = thread_; row < KP; row += 128) {
                const float end = s.g[(C - 1) * KP + row];
                UNROLL
                for (int i = 0; i < C; ++i) {
                    const int e = i * KP + row;
                    const float g = s.g[e], k = s.k[e];
                    s.k[e] = exp(g) * k;
                    s.q[e] *= exp(g);
                    s.g[e] = exp(end - g) * k;
                }
                s.decays[row / 8 * 64 + row % 8 * 9] = exp(end);
            }
        } else {
            G[0] = s.log_decay[0];
            UNROLL
            for (int i = 1; i < C; ++i) G[i] = G[i - 1] + s.log_decay[i];
            pairs_by_product<Ref>(P, s, G, simdgroup, lane);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        // w = k S,  o = q S  (of GDA without exp(G_i))
        simdgroup_float8x8 left, product = make_filled_simdgroup_matrix<float, 8, 8>(0.0f), output = product;
        UNROLL
        for (int j = 0; j < TILES; ++j) {
            simdgroup_load(left, s.k + 8 * j, KP);
            simdgroup_multiply_accumulate(product, left, S[j], product);
            simdgroup_load(left, s.q + 8 * j, KP);
            simdgroup_multiply_accumulate(output, left, S[j], output);
        }
        simdgroup_store(product, mine_w, 8);
        simdgroup_store(output, mine_o, 8);
        simdgroup_barrier(mem_flags::mem_threadgroup);

        // U, one lane per column: forward substitution. w then holds U, u holds exp(G_8 - G_i) U.
        if (lane < 8) {
            float u[C];
            UNROLL
            for (int i = 0; i < C; ++i) {
                const bool on = t + i < last && c + lane < V && is_live<Ref>(P, a, w, t + i);
                const float v = on ? load1(AD_QKV, a.v, w.b * P.v[0] + (t + i) * P.v[1] + w.h * P.v[2] + c + lane) : 0.0f;
                u[i] = s.beta[i] * (v - (KDA ? 1.0f : exp(G[i])) * mine_w[8 * i + lane]);
                UNROLL
                for (int j = 0; j < i; ++j) u[i] -= s.A[i * C + j] * u[j];
            }
            UNROLL
            for (int i = 0; i < C; ++i) {
                mine_w[8 * i + lane] = u[i];
                mine_u[8 * i + lane] = KDA ? u[i] : u[i] * exp(G[C - 1] - G[i]);
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);

        // o_i of two columns per lane
        const int i = lane / 4;
        if (t + i < last)
            for (int x = lane % 4 * 2; x < lane % 4 * 2 + 2; ++x) {
                float o = P.scale * (KDA ? 1.0f : exp(G[i])) * mine_o[8 * i + x];
                for (int j = 0; j <= i; ++j) o += s.B[i * C + j] * mine_w[8 * j + x];
                if (c + x < V) store1(AD_QKV, a.o, o_base + (t + i) * P.o[1] + c + x, o);
            }

        // S = diag(exp(G_8)) S + k^T U
        simdgroup_float8x8 U, decay, decayed;
        simdgroup_load(U, mine_u, 8);
        if (!KDA) decay = simdgroup_float8x8(exp(G[C - 1]));
        UNROLL
        for (int j = 0; j < TILES; ++j) {
            if (KDA) simdgroup_load(decay, s.decays + 64 * j, 8);
            simdgroup_load(left, (KDA ? s.g : s.k) + 8 * j, KP, ulong2(0, 0), true);
            simdgroup_multiply(decayed, decay, S[j]);
            simdgroup_multiply_accumulate(S[j], left, U, decayed);
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }

    if ((P.flags & WRITES_STATE) && w.row_out >= 0)
        UNROLL
        for (int j = 0; j < TILES; ++j)
            store_tile(S[j], mine_w, a.state_out, w.row_out * P.state_out[0] + w.h * P.state_out[1], P.state_out[2], P.state_out[3], 8 * j, c, V, lane);
}
