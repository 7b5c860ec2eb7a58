// Rollback by a log: verify drafted tokens without writing a state, and fold accepted ones in later.
//
// S0 is the base state. For a token t, the entries s before it lead from the base to it (a chain, or a branch of a
// tree of drafts). A(s, t) is the product of the decays a after s up to t, and Gamma_t the product of all of them:
//
//     d_t = beta_t (v_t - S0^T (Gamma_t k_t) - sum_s (A(s, t) k_s . k_t) d_s)          verify
//     o_t = S0^T (scale Gamma_t q_t) + sum_{s <= t} (A(s, t) k_s . scale q_t) d_s
//     S_n = Gamma_n S0 + sum_{s <= n} (A(s, n) k_s) d_s^T                              fold, entries 0 to n - 1
//
// This is the block of rule.inl.h with some of its deltas known. Verifying reads the state once and appends (k_t,
// d_t, a_t) to the log: at most 2 K + V numbers; a state is K V. A masked token's entry is k = 0, a = 1. If the log
// is full, its entries go into the state on the way: rows are folded, written back, and multiplied with the new keys
// and queries while they are in L1. So a step reads and writes the state at most once. All in float32.
#pragma once
#include "log.h"
#include "mixer.inl.h"

namespace anydelta::ANYDELTA_ISA {

struct LogSpace {
    Scratch scratch;
    float *bias, *suffix;  // [segments * SEG]
    float* old;  // [C][kp]: keys of the log
    float *keys, *decays;  // [C][kp]: keys and decays of the chain
    float *folded, *gamma;  // [C][kp], [kp]: A(s, n) k_s and Gamma_n of a fold
    float* rows;  // [blocks][segments][2 C_MAX][LD]: C rows Gamma k, then C rows scale Gamma q
    float* PR;  // [blocks][2 C_MAX][ldv]
    float *D, *v;  // [C][ldv]
    float *o, *alpha, *beta;
    float *kk, *kq;  // [C][C]: beta_t A k_s . k_t and A k_s . scale q_t
    float* state;  // a state whose rows are not whole vectors: [K][ldv] or [columns][kp], zero-padded
};

static LogSpace carve(const Log& g, Arena& arena) {
    const Problem& p = g.rule;
    const int64_t C = g.capacity, seg = segments(p), ldv = round_up(p.V, W), kp = round_up(p.K, L);
    const int64_t blocks = (C + C_MAX - 1) / C_MAX;
    LogSpace w;
    w.scratch.carve(arena, seg);
    w.bias = arena.take<float>(seg * SEG);
    w.suffix = arena.take<float>(seg * SEG);
    w.old = arena.take<float>(C * kp);
    w.keys = arena.take<float>(C * kp);
    w.decays = arena.take<float>(p.kda ? C * kp : 0);
    w.folded = arena.take<float>(C * kp);
    w.gamma = arena.take<float>(kp);
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
    char* const origin = reinterpret_cast<char*>(64);  // addresses are only computed, never read
    Arena arena{origin};
    carve(g, arena);
    return static_cast<size_t>(arena.at - origin);
}

// ---------------------------------------------------------------------------------------------------------------
// fold: dst_r = gamma src_r + sum_s f_s[r] x_s for rows r of a state. kv: f = A k_s, x = d_s; vk: f = d_s, x = A k_s.

struct Folding {
    bool active;
    int64_t count;  // entries
    const float* gamma;  // [kp]
    const float* f;  // [count][ldf]
    int64_t ldf;
    const float* x;  // [count][ldx]
    int64_t ldx;
};

template <int G, int N, bool vk, class St>
AD_INLINE void fold_block(const St* src, int64_t lds, St* dst, int64_t ldd, const Folding& z, int64_t r0, int64_t c) {
    V s[G][N];
    AD_UNROLL for (int r = 0; r < G; ++r)
        AD_UNROLL for (int j = 0; j < N; ++j)
            s[r][j] = vmul(vk ? vload(z.gamma + c + j * L) : vsplat(z.gamma + r0 + r), vload(src + r * lds + c + j * L));
    const float *f = z.f + r0, *x = z.x + c;
    for (int64_t e = 0; e < z.count; ++e, f += z.ldf, x += z.ldx) {
        V y[N];
        AD_UNROLL for (int j = 0; j < N; ++j) y[j] = vload(x + j * L);
        AD_UNROLL for (int r = 0; r < G; ++r) {
            const V w = vsplat(f + r);
            AD_UNROLL for (int j = 0; j < N; ++j) s[r][j] = vfma(w, y[j], s[r][j]);
        }
    }
    AD_UNROLL for (int r = 0; r < G; ++r)
        AD_UNROLL for (int j = 0; j < N; ++j) vstore(dst + r * ldd + c + j * L, s[r][j]);
}

// Rows r0 to r0 + G - 1, `width` columns. The same rows of `next`, if not null, are prefetched
// meanwhile in small pieces.
template <int G, bool vk, class St>
AD_INLINE void fold_rows(const St* src, int64_t lds, St* dst, int64_t ldd, int64_t width, const Folding& z, int64_t r0,
                         const char* next) {
    constexpr int64_t size = sizeof(St);
    int64_t c = 0;
    for (; c + 2 * L <= width; c += 2 * L) {
        if (next) fetch_rows(next + c * size, lds * size, r0, r0 + G, 2 * L * size);
        fold_block<G, 2, vk>(src, lds, dst, ldd, z, r0, c);
    }
    for (; c < width; c += L) fold_block<G, 1, vk>(src, lds, dst, ldd, z, r0, c);
}

// ---------------------------------------------------------------------------------------------------------------
// a pass over a state: fold, if any, from S to dst; then PR[r] = dst^T row_r for the C key rows and C query rows of a
// block (C = 0: fold only). The rows of `next` are prefetched meanwhile.

template <int C, int G, class St>
AD_INLINE void pass_rows(const float* rows, int64_t i, const St* S, int64_t lds, St* dst, int64_t ldd, int64_t cols,
                         const Folding& z, float* PR, int64_t ldp, const char* next) {
    if (z.active) fold_rows<G, false>(S, lds, dst, ldd, cols, z, i, C == 0 ? next : nullptr);
    const int64_t next_row = lds * static_cast<int64_t>(sizeof(St));
    if constexpr (C > 0)
        dots_rows<C, G, 1>(rows, i, z.active ? dst : S, z.active ? ldd : lds, cols, PR, ldp, next, next_row);
}

template <int C, class St>
static void pass_kv(const Problem& p, const float* rows, const St* S, int64_t lds, St* dst, int64_t ldd, int64_t cols,
                    const Folding& z, float* PR, int64_t ldp, const char* next) {
    constexpr int G = REGISTERS == 32 ? 8 : 4;
    for (int64_t i = 0; i < p.K;) {
        const float* at = rows + i / SEG * 2 * C_MAX * LD + i % SEG;
        const bool whole = i + G <= p.K;
        if (whole)
            pass_rows<C, G>(at, i, S + i * lds, lds, dst + i * ldd, ldd, cols, z, PR, ldp, next);
        else
            pass_rows<C, 1>(at, i, S + i * lds, lds, dst + i * ldd, ldd, cols, z, PR, ldp, next);
        i += whole ? G : 1;
    }
    for (int64_t r = 0; r < 2 * C; ++r) in_order<St>(PR + r * ldp, cols);  // dots_rows leaves bfloat16 columns split
}

template <int C, int M, class St>
AD_INLINE void dots_vk(const Problem& p, const float* rows, const St* S, int64_t lds, float* PR, int64_t ldp) {
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

template <int C, int G, class St>
AD_INLINE void pass_columns(const Problem& p, const float* rows, int64_t m, const St* S, int64_t lds, St* dst,
                            int64_t ldd, int64_t kp, const Folding& z, float* PR, int64_t ldp, const char* next) {
    fetch_rows(next, lds * static_cast<int64_t>(sizeof(St)), m, m + G, p.K * static_cast<int64_t>(sizeof(St)));
    if (z.active) fold_rows<G, true>(S, lds, dst, ldd, kp, z, m, nullptr);
    if constexpr (C > 0) {
        constexpr int M = C == 1 ? 4 : C == 2 ? 2 : 1;  // 8 accumulators hide the latency of the FMAs
        constexpr int together = M < G ? M : G;
        const St* from = z.active ? dst : S;
        const int64_t ld = z.active ? ldd : lds;
        for (int u = 0; u < G; u += together) dots_vk<C, together>(p, rows, from + u * ld, ld, PR + m + u, ldp);
    }
}

template <int C, class St>
static void pass_vk(const Problem& p, const float* rows, const St* S, int64_t lds, St* dst, int64_t ldd, int64_t cols,
                    const Folding& z, float* PR, int64_t ldp, const char* next) {
    constexpr int G = 4;
    const int64_t kp = round_up(p.K, L);
    int64_t m = 0;
    for (; m + G <= cols; m += G)
        pass_columns<C, G>(p, rows, m, S + m * lds, lds, dst + m * ldd, ldd, kp, z, PR, ldp, next);
    for (; m < cols; ++m) pass_columns<C, 1>(p, rows, m, S + m * lds, lds, dst + m * ldd, ldd, kp, z, PR, ldp, next);
}

template <class St>
static void pass(const Problem& p, int C, const float* rows, const St* S, int64_t lds, St* dst, int64_t ldd,
                 int64_t cols, const Folding& z, float* PR, int64_t ldp, const char* next) {
#define AD_PASS(n)                                                                                  \
    case n:                                                                                         \
        return p.vk ? pass_vk<n>(p, rows, S, lds, dst, ldd, cols, z, PR, ldp, next)                 \
                    : pass_kv<n>(p, rows, S, lds, dst, ldd, cols, z, PR, ldp, next)
    switch (C) {
        AD_PASS(0);
        AD_PASS(1);
        AD_PASS(2);
        AD_PASS(3);
        AD_PASS(4);
        AD_PASS(5);
        AD_PASS(6);
        default: return;
    }
#undef AD_PASS
}

// Prefetch lines that will be read and then written. Always inlined (see fetch).
AD_INLINE void fetch_lines(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) AD_PREFETCH_WRITE(static_cast<const char*>(from) + i);
}

// ---------------------------------------------------------------------------------------------------------------
// a task: the value heads of one q/k head of one sequence, a range of columns

class LogRunner {
  public:
    LogRunner(const Log& log, const Task& task, char* memory) : g(log), p(log.rule), job(task) {
        Arena arena{memory};
        w = carve(g, arena);
        row = g.rows[job.n];
        used = g.used[job.n];
        h = qk_head(p, job.hv0);
        ldv = round_up(job.cols, W);
        kp = round_up(p.K, L);
        // depends on V, not on the task's columns, so that the choice does not depend on the split
        direct = p.vk ? p.K % L == 0 : p.V % W == 0;
    }

    void verify() {
        const int64_t b = p.cu_seqlens ? 0 : job.n;
        const int64_t start = p.cu_seqlens ? p.cu_seqlens[job.n] : 0;
        const int64_t T = p.cu_seqlens ? p.cu_seqlens[job.n + 1] - start : p.T;
        const bool skipped = p.state_indices[job.n] < 0, folding = g.folds && g.folds[job.n];
        if (!skipped && T > 0) load_keys();
        for (int64_t i = 0; i < job.heads; ++i) {
            select(i);
            if (skipped)
                for (int64_t t = 0; t < T; ++t) zero_output(b, start + t);
            else if (T > 0)
                verify_head(b, start, T, folding);
        }
    }

    void fold() {
        if (used == 0 && p.in.data == p.out.data && p.state_indices[job.n] == g.out_rows[job.n]) return;
        load_keys();
        for (int64_t i = 0; i < job.heads; ++i) {
            select(i);
            const Folding z = folding_of_entries();
            char* out = state_at(p, p.out, 0, g.out_rows[job.n], hv, job.col0);
            fold_into(z, state(hv), p.in.row, out, p.out.row);
        }
    }

  private:
    const Log& g;
    const Problem& p;
    const Task& job;
    LogSpace w;
    int64_t row, used, h, ldv, kp;
    int64_t hv = 0;              // the current value head
    const char* next = nullptr;  // what the next one will read
    bool direct;

    void select(int64_t i) {
        hv = job.hv0 + i * job.step;
        next = i + 1 < job.heads ? state(hv + job.step) : job.next_state;
        if (!next || !direct) next = state(hv);
    }

    char* log_key(int64_t e) const {
        return static_cast<char*>(g.keys) + ((row * p.H + h) * g.capacity + e) * p.K * dtype_size(g.key_dtype);
    }
    float* log_factor(int64_t e) const { return g.factors + (row * p.H + h) * g.capacity + e; }
    float* log_delta(int64_t e) const { return g.deltas + ((row * p.HV + hv) * g.capacity + e) * p.V + job.col0; }
    float* log_decay(int64_t e) const {
        return g.decays + ((row * p.HV + hv) * g.capacity + e) * (p.kda ? p.K : 1);
    }
    // the sequence's; null for -1
    char* state(int64_t head) const {
        const int64_t n = p.state_indices[job.n];
        return n < 0 ? nullptr : state_at(p, p.in, 0, n, head, job.col0);
    }

    void zero_output(int64_t b, int64_t t) const {
        char* o = static_cast<char*>(const_cast<void*>(token(p.o, b, t, hv)));
        const int64_t size = dtype_size(p.o.dtype);
        std::memset(o + job.col0 * size, 0, static_cast<size_t>(job.cols * size));
    }

    static void copy_row(float* dst, const float* src, int64_t n, int64_t padded) {
        read_as(dst, src, n);
        for (int64_t i = n; i < padded; ++i) dst[i] = 0.0f;
    }

    void load_keys() const {
        for (int64_t e = 0; e < used; ++e) {
            float* key = w.old + e * kp;
            read_row(key, log_key(e), g.key_dtype, p.K);
            for (int64_t i = p.K; i < kp; ++i) key[i] = 0.0f;
            const V factor = vset(*log_factor(e));
            for (int64_t i = 0; i < kp; i += L) vstore(key + i, vmul(factor, vload(key + i)));
        }
    }

    void load_entries() const {
        for (int64_t e = 0; e < used; ++e) {
            copy_row(w.D + e * ldv, log_delta(e), job.cols, ldv);
            if (p.kda)
                copy_row(w.decays + e * kp, log_decay(e), p.K, kp);
            else
                w.alpha[e] = *log_decay(e);
        }
    }

    // ---- fold

    // Keys become A(s, n) k_s: backwards, with the product of the decays. The final product is Gamma.
    Folding folding_of_entries() const {
        load_entries();
        for (int64_t i = 0; i < kp; i += L) vstore(w.gamma + i, vset(1.0f));
        for (int64_t s = used - 1; s >= 0; --s)
            for (int64_t i = 0; i < kp; i += L) {
                const V f = vload(w.gamma + i);
                vstore(w.folded + s * kp + i, vmul(f, vload(w.old + s * kp + i)));
                vstore(w.gamma + i, vmul(f, p.kda ? vload(w.decays + s * kp + i) : vset(w.alpha[s])));
            }
        if (p.vk) return Folding{true, used, w.gamma, w.D, ldv, w.folded, kp};
        return Folding{true, used, w.gamma, w.folded, kp, w.D, ldv};
    }

    void fold_into(const Folding& z, const char* from, int64_t lds, char* to, int64_t ldd) const {
        in_type_of(static_cast<void*>(to), p.state_dtype, [&](auto* S) {
            fold_as(z, reinterpret_cast<decltype(S)>(const_cast<char*>(from)), lds, S, ldd);
        });
    }

    template <class St>
    void fold_as(const Folding& z, const St* S, int64_t lds, St* out, int64_t ldd) const {
        if (direct) return pass(p, 0, w.rows, S, lds, out, ldd, job.cols, z, w.PR, ldv, next);
        int64_t ld = lds;
        copy_state(S, ld);
        pass(p, 0, w.rows, w.state, ld, w.state, ld, p.vk ? job.cols : ldv, z, w.PR, ldv, whole_rows());
        const int64_t rows = p.vk ? job.cols : p.K, n = p.vk ? p.K : job.cols;
        for (int64_t r = 0; r < rows; ++r) write_as(out + r * ldd, w.state + r * ld, n);
    }

    // A state as float32 rows of whole vectors. Sets ld to their distance.
    template <class St>
    float* copy_state(const St* S, int64_t& ld) const {
        const int64_t rows = p.vk ? job.cols : p.K, n = p.vk ? p.K : job.cols, to = p.vk ? kp : ldv;
        for (int64_t r = 0; r < rows; ++r) {
            read_as(w.state + r * to, S + r * ld, n);
            for (int64_t i = n; i < to; ++i) w.state[r * to + i] = 0.0f;
        }
        ld = to;
        return w.state;
    }
    const char* whole_rows() const { return reinterpret_cast<const char*>(w.state); }

    // ---- verify

    void verify_head(int64_t b, int64_t start, int64_t T, bool folding) {
        float A = 1.0f;
        if (p.A_log) A = first(vexp(vset(read_one(element(p.A_log, p.A_log_dtype, hv), p.A_log_dtype))));
        if (p.dt_bias) {
            const int64_t n = p.kda ? p.K : 1;
            for (int64_t i = 0; i < round_up(n, L); ++i) w.bias[i] = 0.0f;
            read_row(w.bias, element(p.dt_bias, p.dt_bias_dtype, hv * n), p.dt_bias_dtype, n);
        }
        w.scratch.pad(p.K);
        const Folding none{};
        const Folding z = folding ? folding_of_entries() : none;
        const int64_t before = folding ? 0 : used;  // entries of the log after the base state
        if (!folding) {
            load_entries();
            for (int64_t i = 0; i < used * kp; i += L) vstore(w.keys + i, vload(w.old + i));
        }
        // Prefetch what the next value head reads and writes of the log: other pages, unknown to the prefetchers.
        const int64_t count = used > before + T ? used : before + T;
        const int64_t width = p.kda ? p.K : 1, size = dtype_size(g.key_dtype);
        if (hv + job.step < p.HV) {
            fetch_lines(log_delta(0) + job.step * g.capacity * p.V, count * p.V * 4);
            fetch_lines(log_decay(0) + job.step * g.capacity * width, count * width * 4);
        }
        if (h + 1 < p.H) fetch_lines(log_key(0) + g.capacity * p.K * size, count * p.K * size);
        const int64_t block_rows = segments(p) * 2 * C_MAX * LD;
        for (int64_t t = 0; t < T; ++t) {
            const int64_t block = t / C_MAX, C = T - block * C_MAX < C_MAX ? T - block * C_MAX : C_MAX;
            float* rows = w.rows + block * block_rows + t % C_MAX * LD;
            prepare_token(b, start + t, t, before + t, A, rows, rows + C * LD);
        }

        for (int64_t i = 0; i < round_up(T, C_MAX) * 2 * ldv; i += L) vstore(w.PR + i, vzero());
        in_type_of(static_cast<void*>(state(hv)), p.state_dtype, [&](auto* S) { all_dots(T, z, S); });
        solve_tokens(b, start, T, before);
    }

    // The first block's pass folds, and the others read what it wrote.
    template <class St>
    void all_dots(int64_t T, const Folding& z, St* S) const {
        if (direct) return blocks_of_dots(T, z, S, p.in.row, job.cols, next);
        if (z.active) fold_as(z, S, p.in.row, S, p.in.row);
        int64_t ld = p.in.row;
        copy_state(S, ld);
        blocks_of_dots(T, Folding{}, w.state, ld, p.vk ? job.cols : ldv, whole_rows());
    }

    template <class St>
    void blocks_of_dots(int64_t T, const Folding& z, St* S, int64_t lds, int64_t cols, const char* ahead) const {
        const int64_t block_rows = segments(p) * 2 * C_MAX * LD;
        for (int64_t t = 0, i = 0; t < T; t += C_MAX, ++i) {
            const int C = static_cast<int>(T - t < C_MAX ? T - t : C_MAX);
            pass(p, C, w.rows + i * block_rows, S, lds, S, lds, cols, i == 0 ? z : Folding{}, w.PR + t * 2 * ldv, ldv,
                 ahead);
        }
    }

    // Entry e: its key, its products with all entries on the way back to the base, and its rows Gamma k, Gamma q.
    void prepare_token(int64_t b, int64_t position, int64_t t, int64_t e, float A, float* k_row, float* q_row) {
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
            store_entry(e, key, 0.0f);
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

        // back along the parents, with the product of the decays so far
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
        store_entry(e, x.k, x.k_factor);
    }

    void spread(float* to, const float* x) const {
        for (int64_t i = 0; i < kp; i += L) vstore(to + i / SEG * 2 * C_MAX * LD + i % SEG, vload(x + i));
    }

    // Each is written once: the key by the first value head of its q/k head, both by the first range of columns.
    void store_entry(int64_t e, const float* key, float factor) const {
        if (job.col0 != 0) return;
        if (hv == job.hv0) {
            write_row(log_key(e), g.key_dtype, key, p.K);
            *log_factor(e) = factor;
        }
        if (p.kda)
            write_as(log_decay(e), w.decays + e * kp, p.K);
        else
            *log_decay(e) = w.alpha[e];
    }

    void solve_tokens(int64_t b, int64_t start, int64_t T, int64_t before) {
        for (int64_t t = 0; t < T; ++t) {
            const int64_t block = t / C_MAX, C = T - block * C_MAX < C_MAX ? T - block * C_MAX : C_MAX, e = before + t;
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
