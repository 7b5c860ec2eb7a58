// Rollback by a log: verify drafted tokens without writing a state, and fold accepted ones in later.
//
// With the base state S0 and, for a token t, the entries s before it on its way from the base (a chain, or a branch of a
// tree of drafts), A(s, t) = the product of the decays a after s up to t, and Gamma_t that of all of them:
//
//     d_t = beta_t (v_t - S0^T (Gamma_t k_t) - sum_s (A(s, t) k_s . k_t) d_s)          verify
//     o_t = S0^T (scale Gamma_t q_t) + sum_{s <= t} (A(s, t) k_s . scale q_t) d_s
//     S_n = Gamma_n S0 + sum_{s <= n} (A(s, n) k_s) d_s^T                              fold, entries 0 to n - 1
//
// This is the block of rule.inl.h with some of its deltas known. Verifying reads the state once and appends
// (k_t, d_t, a_t) to the log: 2 K + V numbers at most where a state is K V. A masked token's entry is k = 0, a = 1.
// All in float32.
#pragma once
#include "log.h"
#include "mixer.inl.h"

namespace anydelta::ANYDELTA_ISA {

struct LogSpace {
    Scratch scratch;
    float *bias, *suffix;  // [segments * SEG]
    float *keys, *decays;  // [C][kp]
    float* rows;  // [blocks][segments][2 C_MAX][LD]: C rows Gamma k, then C rows scale Gamma q
    float* PR;  // [blocks][2 C_MAX][ldv]
    float *D, *v;  // [C][ldv]
    float *o, *alpha, *beta;
    float *kk, *kq;  // [C][C]: beta_t A k_s . k_t and A k_s . scale q_t
    float* state;  // a state whose rows do not fill vectors: [K][ldv] or [columns][kp], zero beyond
};

static LogSpace carve(const Log& g, Arena& arena) {
    const Problem& p = g.rule;
    const int64_t C = g.capacity, seg = segments(p), ldv = round_up(p.V, W), kp = round_up(p.K, L);
    const int64_t blocks = (C + C_MAX - 1) / C_MAX;
    LogSpace w;
    w.scratch.carve(arena, seg);
    w.bias = arena.take<float>(seg * SEG);
    w.suffix = arena.take<float>(seg * SEG);
    w.keys = arena.take<float>(C * kp);
    w.decays = arena.take<float>(p.kda ? C * kp : 0);
    w.rows = arena.take<float>(blocks * seg * 2 * C_MAX * LD);
    w.PR = arena.take<float>(blocks * 2 * C_MAX * ldv);
    w.D = arena.take<float>(C * ldv);
    w.v = arena.take<float>(C * ldv);
    w.o = arena.take<float>(ldv);
    w.alpha = arena.take<float>(C);
    w.beta = arena.take<float>(C);
    w.kk = arena.take<float>(C * C);
    w.kq = arena.take<float>(C * C);
    w.state = arena.take<float>(p.vk ? ldv * kp : p.K * ldv);
    return w;
}

static size_t log_workspace(const Log& g) {
    char* const origin = reinterpret_cast<char*>(64);  // addresses are only counted, never read
    Arena arena{origin};
    carve(g, arena);
    return static_cast<size_t>(arena.at - origin);
}

// Fetch what the following task reads while this one computes: a state is walked in steps too wide for the hardware's
// prefetchers.
AD_INLINE void prefetch_rows(const char*& next, int64_t bytes) {
    if (!next) return;
    for (int64_t i = 0; i < bytes; i += 64) AD_PREFETCH_L2(next + i);
    next += bytes;
}

// ---------------------------------------------------------------------------------------------------------------
// PR[r] = S0^T row_r for the C key rows and C query rows of a block

template <int C, class St>
static void log_dots_kv(const Problem& p, const float* rows, const St* S, int64_t lds, int64_t cols, float* PR,
                        int64_t ldp, const char* next) {
    constexpr int G = REGISTERS == 32 ? 8 : 4;
    for (int64_t i = 0; i < p.K;) {
        const float* at = rows + i / SEG * 2 * C_MAX * LD + i % SEG;
        const bool whole = i + G <= p.K;
        const char* here = reinterpret_cast<const char*>(S + i * lds);  // all of the next state is fetched below
        prefetch_rows(next, (whole ? G : 1) * lds * static_cast<int64_t>(sizeof(St)));
        if (whole)
            dots_rows<C, G>(at, 0, S + i * lds, lds, cols, PR, ldp, here);
        else
            dots_rows<C, 1>(at, 0, S + i * lds, lds, cols, PR, ldp, here);
        i += whole ? G : 1;
    }
}

template <int C, int M, class St>
AD_INLINE void log_dots_vk_rows(const Problem& p, const float* rows, const St* S, int64_t lds, float* PR, int64_t ldp) {
    V acc[2 * C][M];
    AD_UNROLL for (int r = 0; r < 2 * C; ++r)
        AD_UNROLL for (int u = 0; u < M; ++u) acc[r][u] = vzero();
    for (int64_t seg = 0; seg < segments(p); ++seg, rows += 2 * C_MAX * LD) {
        const int64_t n = p.K - seg * SEG < SEG ? p.K - seg * SEG : SEG;
        for (int64_t i = 0; i < n; i += L) {
            V s[M];
            AD_UNROLL for (int u = 0; u < M; ++u) s[u] = vload(S + u * lds + seg * SEG + i);
            AD_UNROLL for (int r = 0; r < 2 * C; ++r) {
                const V x = vload(rows + r * LD + i);
                AD_UNROLL for (int u = 0; u < M; ++u) acc[r][u] = vfma(x, s[u], acc[r][u]);
            }
        }
    }
    AD_UNROLL for (int r = 0; r < 2 * C; ++r)
        AD_UNROLL for (int u = 0; u < M; ++u) PR[r * ldp + u] = vsum(acc[r][u]);
}

template <int C, class St>
static void log_dots_vk(const Problem& p, const float* rows, const St* S, int64_t lds, int64_t cols, float* PR,
                        int64_t ldp, const char* next) {
    constexpr int M = C == 1 ? 4 : C == 2 ? 2 : 1;  // 8 accumulators hide the latency of the FMAs
    int64_t m = 0;
    for (; m + M <= cols; m += M) {
        prefetch_rows(next, M * lds * static_cast<int64_t>(sizeof(St)));
        log_dots_vk_rows<C, M>(p, rows, S + m * lds, lds, PR + m, ldp);
    }
    for (; m < cols; ++m) log_dots_vk_rows<C, 1>(p, rows, S + m * lds, lds, PR + m, ldp);
}

template <class St>
static void log_dots(const Problem& p, int C, const float* rows, const St* S, int64_t lds, int64_t cols, float* PR,
                     int64_t ldp, const char* next) {
#define AD_LOG_DOTS(n)                                                                     \
    case n:                                                                                \
        return p.vk ? log_dots_vk<n>(p, rows, S, lds, cols, PR, ldp, next)                       \
                    : log_dots_kv<n>(p, rows, S, lds, cols, PR, ldp, next)
    switch (C) {
        AD_LOG_DOTS(1);
        AD_LOG_DOTS(2);
        AD_LOG_DOTS(3);
        AD_LOG_DOTS(4);
        AD_LOG_DOTS(5);
        AD_LOG_DOTS(6);
        default: return;
    }
#undef AD_LOG_DOTS
}

// ---------------------------------------------------------------------------------------------------------------
// dst_r = gamma src_r + sum_s f_s[r] x_s for rows r of a state: kv: f = A k_s, x = d_s; vk: f = d_s, x = A k_s

template <int G, int N, bool vector_gamma, class St>
AD_INLINE void add_entries(const St* src, int64_t lds, St* dst, int64_t ldd, const float* gamma, int64_t count,
                           const float* f, int64_t ldf, const float* x, int64_t ldx) {
    V s[G][N];
    AD_UNROLL for (int r = 0; r < G; ++r)
        AD_UNROLL for (int j = 0; j < N; ++j)
            s[r][j] = vmul(vector_gamma ? vload(gamma + j * L) : vsplat(gamma + r), vload(src + r * lds + j * L));
    for (int64_t e = 0; e < count; ++e, f += ldf, x += ldx) {
        V y[N];
        AD_UNROLL for (int j = 0; j < N; ++j) y[j] = vload(x + j * L);
        AD_UNROLL for (int r = 0; r < G; ++r) {
            const V w = vsplat(f + r);
            AD_UNROLL for (int j = 0; j < N; ++j) s[r][j] = vfma(w, y[j], s[r][j]);
        }
    }
    AD_UNROLL for (int r = 0; r < G; ++r)
        AD_UNROLL for (int j = 0; j < N; ++j) vstore(dst + r * ldd + j * L, s[r][j]);
}

template <int G, bool vk, class St>
AD_INLINE void fold_rows(const St* src, int64_t lds, St* dst, int64_t ldd, int64_t width, const float* gamma,
                         int64_t count, const float* f, int64_t ldf, const float* x, int64_t ldx) {
    int64_t c = 0;
    for (; c + 2 * L <= width; c += 2 * L)
        add_entries<G, 2, vk>(src + c, lds, dst + c, ldd, vk ? gamma + c : gamma, count, f, ldf, x + c, ldx);
    for (; c < width; c += L)
        add_entries<G, 1, vk>(src + c, lds, dst + c, ldd, vk ? gamma + c : gamma, count, f, ldf, x + c, ldx);
}

template <bool vk, class St>
static void fold_state(const St* src, int64_t lds, St* dst, int64_t ldd, int64_t rows, int64_t width,
                       const float* gamma, int64_t count, const float* f, int64_t ldf, const float* x, int64_t ldx,
                       const char* next) {
    constexpr int G = 4;  // rows that share the load of an entry: 8 accumulators
    int64_t r = 0;
    for (; r + G <= rows; r += G) {
        prefetch_rows(next, G * lds * static_cast<int64_t>(sizeof(St)));
        fold_rows<G, vk>(src + r * lds, lds, dst + r * ldd, ldd, width, vk ? gamma : gamma + r, count, f + r, ldf, x,
                         ldx);
    }
    for (; r < rows; ++r)
        fold_rows<1, vk>(src + r * lds, lds, dst + r * ldd, ldd, width, vk ? gamma : gamma + r, count, f + r, ldf, x,
                         ldx);
}

// ---------------------------------------------------------------------------------------------------------------
// a task: some heads of one sequence, a range of columns

class LogRunner {
  public:
    LogRunner(const Log& log, const Task& task, char* memory) : g(log), p(log.rule), job(task) {
        Arena arena{memory};
        w = carve(g, arena);
        row = g.rows[job.n];
        used = g.used[job.n];
        ldv = round_up(job.cols, W);
        kp = round_up(p.K, L);
        // by V and not by the task's columns, so that the choice does not depend on the split
        direct = p.vk ? p.K % L == 0 : p.V % W == 0;
    }

    void verify() {
        const int64_t b = p.cu_seqlens ? 0 : job.n;
        const int64_t start = p.cu_seqlens ? p.cu_seqlens[job.n] : 0;
        const int64_t T = p.cu_seqlens ? p.cu_seqlens[job.n + 1] - start : p.T;
        for (int64_t i = 0; i < job.heads; ++i) {
            hv = job.hv0 + i;
            if (p.state_indices[job.n] < 0)
                for (int64_t t = 0; t < T; ++t) zero_output(b, start + t);
            else if (T > 0)
                verify_head(b, start, T);
        }
    }

    void fold() {
        if (used == 0 && p.in.data == p.out.data && p.state_indices[job.n] == g.out_rows[job.n]) return;
        for (int64_t i = 0; i < job.heads; ++i) {
            hv = job.hv0 + i;
            if (p.state_dtype == DType::f32)
                fold_head<float>();
            else
                fold_head<bf16>();
        }
    }

  private:
    const Log& g;
    const Problem& p;
    const Task& job;
    LogSpace w;
    int64_t row, used, ldv, kp, hv = 0;
    bool direct;

    int64_t qk_head() const { return p.tiled ? hv % p.H : hv / (p.HV / p.H); }
    float* log_key(int64_t e) const { return g.keys + ((row * g.capacity + e) * p.H + qk_head()) * p.K; }
    float* log_delta(int64_t e) const { return g.deltas + ((row * g.capacity + e) * p.HV + hv) * p.V + job.col0; }
    float* log_decay(int64_t e) const { return g.decays + ((row * g.capacity + e) * p.HV + hv) * (p.kda ? p.K : 1); }
    char* state(const States& s, int64_t n) const { return state_at(p, s, 0, n, hv, job.col0); }

    void zero_output(int64_t b, int64_t t) const {
        char* o = static_cast<char*>(const_cast<void*>(token(p.o, b, t, hv)));
        const int64_t size = dtype_size(p.o.dtype);
        std::memset(o + job.col0 * size, 0, static_cast<size_t>(job.cols * size));
    }

    static void copy_row(float* dst, const float* src, int64_t n, int64_t padded) {
        read_as(dst, src, n);
        for (int64_t i = n; i < padded; ++i) dst[i] = 0.0f;
    }

    void load_entries(int64_t count) const {
        for (int64_t e = 0; e < count; ++e) {
            copy_row(w.keys + e * kp, log_key(e), p.K, kp);
            copy_row(w.D + e * ldv, log_delta(e), job.cols, ldv);
            if (p.kda)
                copy_row(w.decays + e * kp, log_decay(e), p.K, kp);
            else
                w.alpha[e] = *log_decay(e);
        }
    }

    // The state in rows that fill vectors: the caller's, or a copy.
    template <class St>
    const St* rows_of(const St* S, int64_t& ld) const {
        if (direct) return S;
        if constexpr (sizeof(St) == 4) {
            const int64_t rows = p.vk ? job.cols : p.K, n = p.vk ? p.K : job.cols, to = p.vk ? kp : ldv;
            for (int64_t r = 0; r < rows; ++r) copy_row(w.state + r * to, S + r * ld, n, to);
            ld = to;
            return w.state;
        }
        return S;
    }
    // bfloat16 rows that do not fill vectors are computed in a float32 copy.
    float* widened(const bf16* S, int64_t ld) const {
        const int64_t rows = p.vk ? job.cols : p.K, n = p.vk ? p.K : job.cols, to = p.vk ? kp : ldv;
        for (int64_t r = 0; r < rows; ++r) {
            read_as(w.state + r * to, S + r * ld, n);
            for (int64_t i = n; i < to; ++i) w.state[r * to + i] = 0.0f;
        }
        return w.state;
    }

    // ---- verify

    void verify_head(int64_t b, int64_t start, int64_t T) {
        float A = 0.0f;
        if (p.A_log) A = first(vexp(vset(read_one(element(p.A_log, p.A_log_dtype, hv), p.A_log_dtype))));
        if (p.dt_bias) {
            const int64_t n = p.kda ? p.K : 1;
            for (int64_t i = 0; i < round_up(n, L); ++i) w.bias[i] = 0.0f;
            read_row(w.bias, element(p.dt_bias, p.dt_bias_dtype, hv * n), p.dt_bias_dtype, n);
        }
        w.scratch.pad(p.K);
        load_entries(used);
        const int64_t block_rows = segments(p) * 2 * C_MAX * LD;
        for (int64_t t = 0; t < T; ++t) {
            const int64_t block = t / C_MAX, C = T - block * C_MAX < C_MAX ? T - block * C_MAX : C_MAX;
            float* rows = w.rows + block * block_rows + t % C_MAX * LD;
            prepare_token(b, start + t, t, A, rows, rows + C * LD);
        }

        for (int64_t i = 0; i < round_up(T, C_MAX) * 2 * ldv; i += L) vstore(w.PR + i, vzero());
        int64_t lds = p.in.row;
        const char* S = state(p.in, p.state_indices[job.n]);
        if (p.state_dtype == DType::f32) {
            const float* rows = rows_of(reinterpret_cast<const float*>(S), lds);  // sets lds
            all_dots(T, rows, lds);
        } else if (direct) {
            all_dots(T, reinterpret_cast<const bf16*>(S), lds);
        } else {
            all_dots(T, const_cast<const float*>(widened(reinterpret_cast<const bf16*>(S), lds)), p.vk ? kp : ldv);
        }
        solve_tokens(b, start, T);
    }

    template <class St>
    void all_dots(int64_t T, const St* S, int64_t lds) const {
        const int64_t block_rows = segments(p) * 2 * C_MAX * LD, cols = p.vk ? job.cols : ldv;
        for (int64_t t = 0, i = 0; t < T; t += C_MAX, ++i) {
            const int C = static_cast<int>(T - t < C_MAX ? T - t : C_MAX);
            const char* next = i == 0 && direct ? job.next_state : nullptr;
            log_dots(p, C, w.rows + i * block_rows, S, lds, cols, w.PR + t * 2 * ldv, ldv, next);
        }
    }

    // Entry used + t: its key, its products with all entries on its way back to the base, and its rows Gamma k, Gamma q.
    void prepare_token(int64_t b, int64_t position, int64_t t, float A, float* k_row, float* q_row) {
        const int64_t e = used + t;
        float* key = w.keys + e * kp;
        float *kk = w.kk + t * g.capacity, *kq = w.kq + t * g.capacity;
        for (int64_t s = 0; s <= e; ++s) kk[s] = kq[s] = 0.0f;
        float* v = w.v + t * ldv;
        if (p.mask && !p.mask[b * p.mask_b + position * p.mask_t]) {
            w.beta[t] = 0.0f;
            w.alpha[e] = 1.0f;
            for (int64_t i = 0; i < kp; ++i) {
                key[i] = 0.0f;
                if (p.kda) w.decays[e * kp + i] = 1.0f;
            }
            for (int64_t i = 0; i < ldv; ++i) v[i] = 0.0f;
            spread(k_row, key);
            spread(q_row, key);
            store_entry(e, key);
            return;
        }
        Token x;
        read_tokens(p, b, &position, 1, hv, A, w.bias, &w.scratch, &x, w.beta + t);
        float* q = w.scratch.q;
        for (int64_t i = 0; i < kp; i += L) {
            vstore(key + i, vmul(vset(x.k_factor), vload(x.k + i)));
            vstore(q + i, vmul(vset(x.q_factor), vload(x.q + i)));
        }
        read_row(v, element(token(p.v, b, position, hv), p.v.dtype, job.col0), p.v.dtype, job.cols);
        for (int64_t i = job.cols; i < ldv; ++i) v[i] = 0.0f;
        V own = vzero();
        for (int64_t i = 0; i < kp; i += L) own = vfma(vload(key + i), vload(q + i), own);
        kq[e] = vsum(own);

        // backwards along the parents, with the product of the decays passed so far
        float alpha = 1.0f;
        if (p.kda) {
            for (int64_t i = 0; i < kp; i += L) {
                vstore(w.decays + e * kp + i, vload(x.a + i));
                vstore(w.suffix + i, vload(x.a + i));
            }
            for (int64_t i = p.K; i < kp; ++i) w.decays[e * kp + i] = w.suffix[i] = 0.0f;  // not decays, but 0 x NaN
        } else {
            w.alpha[e] = alpha = x.alpha;
        }
        const int64_t* parents = g.parents + row * g.capacity;
        for (int64_t s = parents[e]; s >= 0; s = parents[s]) {
            const float *ks = w.keys + s * kp, *as = w.decays + s * kp;
            V dk = vzero(), dq = vzero();
            if (p.kda) {
                for (int64_t i = 0; i < kp; i += L) {
                    const V f = vload(w.suffix + i), k = vmul(f, vload(ks + i));
                    dk = vfma(k, vload(key + i), dk);
                    dq = vfma(k, vload(q + i), dq);
                    vstore(w.suffix + i, vmul(f, vload(as + i)));
                }
                kk[s] = w.beta[t] * vsum(dk);
                kq[s] = vsum(dq);
            } else {
                for (int64_t i = 0; i < kp; i += L) {
                    const V k = vload(ks + i);
                    dk = vfma(k, vload(key + i), dk);
                    dq = vfma(k, vload(q + i), dq);
                }
                kk[s] = w.beta[t] * (alpha * vsum(dk));
                kq[s] = alpha * vsum(dq);
                alpha *= w.alpha[s];
            }
        }
        for (int64_t i = 0; i < kp; i += L) {
            const V gamma = p.kda ? vload(w.suffix + i) : vset(alpha);
            float* at = k_row + i / SEG * 2 * C_MAX * LD + i % SEG;
            vstore(at, vmul(gamma, vload(key + i)));
            vstore(at + (q_row - k_row), vmul(gamma, vload(q + i)));
        }
        store_entry(e, key);
    }

    void spread(float* to, const float* x) const {
        for (int64_t i = 0; i < kp; i += L) vstore(to + i / SEG * 2 * C_MAX * LD + i % SEG, vload(x + i));
    }

    // The key by the first value head of its q/k head, and decays by the first range of columns: written once.
    void store_entry(int64_t e, const float* key) const {
        if (job.col0 != 0) return;
        const bool first_of_group = p.tiled ? hv < p.H : hv % (p.HV / p.H) == 0;
        if (first_of_group) write_as(log_key(e), key, p.K);
        if (p.kda)
            write_as(log_decay(e), w.decays + e * kp, p.K);
        else
            *log_decay(e) = w.alpha[e];
    }

    void solve_tokens(int64_t b, int64_t start, int64_t T) {
        for (int64_t t = 0; t < T; ++t) {
            const int64_t block = t / C_MAX, C = T - block * C_MAX < C_MAX ? T - block * C_MAX : C_MAX, e = used + t;
            const float* P = w.PR + (block * C_MAX * 2 + t % C_MAX) * ldv;
            const float* R = P + C * ldv;
            const float *kk = w.kk + t * g.capacity, *kq = w.kq + t * g.capacity, *v = w.v + t * ldv;
            const V beta = vset(w.beta[t]);
            for (int64_t c = 0; c < ldv; c += W) {
                V d[NV], y[NV];
                AD_UNROLL for (int j = 0; j < NV; ++j) {
                    d[j] = vmul(beta, vsub(vload(v + c + j * L), vload(P + c + j * L)));
                    y[j] = vload(R + c + j * L);
                }
                const float* D = w.D + c;
                for (int64_t s = 0; s < e; ++s, D += ldv) {
                    const V fk = vsplat(kk + s), fq = vsplat(kq + s);
                    AD_UNROLL for (int j = 0; j < NV; ++j) {
                        const V x = vload(D + j * L);
                        d[j] = vfnma(fk, x, d[j]);
                        y[j] = vfma(fq, x, y[j]);
                    }
                }
                const V fq = vsplat(kq + e);
                AD_UNROLL for (int j = 0; j < NV; ++j) {
                    vstore(w.D + e * ldv + c + j * L, d[j]);
                    vstore(w.o + c + j * L, vfma(fq, d[j], y[j]));
                }
            }
            write_as(log_delta(e), w.D + e * ldv, job.cols);
            if (p.mask && !p.mask[b * p.mask_b + (start + t) * p.mask_t]) {
                zero_output(b, start + t);
                continue;
            }
            void* o = const_cast<void*>(token(p.o, b, start + t, hv));
            write_row(const_cast<void*>(element(o, p.o.dtype, job.col0)), p.o.dtype, w.o, job.cols);
        }
    }

    // ---- fold

    template <class St>
    void fold_head() {
        load_entries(used);
        // keys become A(s, n) k_s, backwards with the product of the decays; what is left is Gamma
        for (int64_t i = 0; i < kp; i += L) vstore(w.suffix + i, vset(1.0f));
        for (int64_t s = used - 1; s >= 0; --s)
            for (int64_t i = 0; i < kp; i += L) {
                const V f = vload(w.suffix + i);
                vstore(w.keys + s * kp + i, vmul(f, vload(w.keys + s * kp + i)));
                vstore(w.suffix + i, vmul(f, p.kda ? vload(w.decays + s * kp + i) : vset(w.alpha[s])));
            }
        int64_t lds = p.in.row;
        const St* S = reinterpret_cast<const St*>(state(p.in, p.state_indices[job.n]));
        St* out = reinterpret_cast<St*>(state(p.out, g.out_rows[job.n]));
        if (direct) return fold_as(S, lds, out, p.out.row);
        const int64_t rows = p.vk ? job.cols : p.K, n = p.vk ? p.K : job.cols, ld = p.vk ? kp : ldv;
        if constexpr (sizeof(St) == 4)
            rows_of(S, lds);
        else
            widened(S, lds);
        fold_as(w.state, ld, w.state, ld);
        for (int64_t r = 0; r < rows; ++r) write_as(out + r * p.out.row, w.state + r * ld, n);
    }

    template <class St>
    void fold_as(const St* S, int64_t lds, St* out, int64_t ldd) const {
        const char* next = direct ? job.next_state : nullptr;
        if (p.vk)
            fold_state<true>(S, lds, out, ldd, job.cols, kp, w.suffix, used, w.D, ldv, w.keys, kp, next);
        else
            fold_state<false>(S, lds, out, ldd, p.K, ldv, w.suffix, used, w.keys, kp, w.D, ldv, next);
    }
};

static const char* verify_task(const Log& g, const Task& task, char* memory) {
    LogRunner(g, task, memory).verify();
    return AD_NAME(ANYDELTA_ISA);
}
static const char* fold_task(const Log& g, const Task& task, char* memory) {
    LogRunner(g, task, memory).fold();
    return AD_NAME(ANYDELTA_ISA);
}

}  // namespace anydelta::ANYDELTA_ISA
