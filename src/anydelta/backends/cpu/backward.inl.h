// Gradients of the rule on one CPU, written once over the primitives of an ISA (isa_*.h) and compiled per ISA.
//
// Take a block of BT tokens with the state S before it, the decays a_t (a vector over K; a scalar gate fills it), q_t
// with the scale included, and r_t the key that is read (k_t, or erase_t with beta_t = 1). With Gamma_t = a_1 .. a_t
// and w_j^t = k_j a_(j+1) .. a_t (products only, no quotients, so any decay is right, even 0):
//
//     N_t = -Gamma_t r_t     E_t = Gamma_t q_t     A_tj = w_j^t . r_t (j < t)     P_tj = w_j^t . q_t (j <= t)
//     x_t = v_t + S^T N_t - sum_{j<t} A_tj d_j     d_t = beta_t x_t               `forward`
//     S_C = Gamma_C S + sum_j w_j^BT d_j^T
//
// Backwards, with dX the gradient of X, given those of the outputs, do_t, and of S_C:
//
//     dd_j = sum_t P_tj do_t + dS_C^T w_j - sum_{t>j} A_tj dx_t     dx_t = beta_t dd_t     dv_t = dx_t     `backward`
//     dbeta_t = dd_t . x_t     dP_tj = do_t . d_j     dA_tj = -dx_t . d_j
//     dE_t = S do_t     dN_t = S dx_t     dw_j = dS_C d_j     dGamma_C = sum over V of S dS_C
//     dS = Gamma_C dS_C + sum_t E_t do_t^T + N_t dx_t^T
//
// The gradients of q, k, r and a follow from these channel by channel, through the products of decays
// (`channels_back`). FMAs per token and value head: K V for each of N S, w d (forward) and w dS, S do, S dx, dS d, E
// do, N dx (backward), then 3 BT (K + V) for the pairs. States are kept once per SPAN tokens. For them the forward
// part runs over the sequence, and again inside each chunk. In a call of the mixer (mixer_backward.inl.h), rows of q,
// k, v and do are made when they are read, do from the block's o = E S + P d, and dq, dk and dv are passed to the
// code before the rule.
#pragma once
#include "mixer_backward.inl.h"

namespace anydelta::ANYDELTA_ISA {

constexpr int SPAN = Backward::SPAN;
constexpr int SPAN_BLOCKS = SPAN / BT;
static_assert(BT % L == 0 && SPAN % BT == 0, "blocks are whole vectors, chunks whole blocks");

// ---------------------------------------------------------------------------------------------------------------
// matrices: rows of a product in registers

constexpr int R = REGISTERS == 32 ? 8 : 4;  // x NV vectors of accumulators

// acc[r] += sum_i a[i step + r AR] b[i ldb ..]
template <int M, int N, int AR>
AD_INLINE void multiply(V (&acc)[M][N], const float* a, int64_t step, const float* b, int64_t ldb, int64_t n) {
    for (int64_t i = 0; i < n; ++i, a += step, b += ldb) {
        V y[N];
    AD_UNROLL for (int j = 0; j < N; ++j) y[j] = vload(b + j * L);
        AD_UNROLL for (int r = 0; r < M; ++r) {
            const V x = vsplat(a + r * AR);
            AD_UNROLL for (int j = 0; j < N; ++j) acc[r][j] = vfma(x, y[j], acc[r][j]);
        }
    }
}
template <int M, int N>
AD_INLINE void set_zero(V (&acc)[M][N]) {
    AD_UNROLL for (int r = 0; r < M; ++r)
        AD_UNROLL for (int j = 0; j < N; ++j) acc[r][j] = vzero();
}
template <int M, int N>
AD_INLINE void load(V (&acc)[M][N], const float* from, int64_t ld) {
    AD_UNROLL for (int r = 0; r < M; ++r)
        AD_UNROLL for (int j = 0; j < N; ++j) acc[r][j] = vload(from + r * ld + j * L);
}
template <int M, int N>
AD_INLINE void load_faded(V (&acc)[M][N], const float* from, int64_t ld, const float* gamma) {
    AD_UNROLL for (int r = 0; r < M; ++r) {
        const V x = vsplat(gamma + r);
        AD_UNROLL for (int j = 0; j < N; ++j) acc[r][j] = vmul(x, vload(from + r * ld + j * L));
    }
}
template <int M, int N>
AD_INLINE void store(const V (&acc)[M][N], float* to, int64_t ld) {
    AD_UNROLL for (int r = 0; r < M; ++r)
        AD_UNROLL for (int j = 0; j < N; ++j) vstore(to + r * ld + j * L, acc[r][j]);
}

// out [rows][cols] = x y, x in panels [..][rows][W] over its columns, y [columns of x][cols]
template <int M, int N, int cols>
static void times(float* out, const float* x, int64_t rows, int64_t panels, const float* y) {
    for (int64_t r = 0; r < rows; r += M)
        for (int64_t c = 0; c < cols; c += N * L) {
            V acc[M][N];
            set_zero(acc);
            for (int64_t panel = 0; panel < panels; ++panel)
                multiply<M, N, W>(acc, x + (panel * rows + r) * W, 1, y + panel * W * cols + c, cols, W);
            store(acc, out + r * cols + c, cols);
        }
}
template <int cols>
static void times(float* out, const float* x, int64_t rows, int64_t panels, const float* y) {
    if constexpr (cols == L)
        times<2 * R, 1, cols>(out, x, rows, panels, y);  // rows are a multiple of BT >= 2 R
    else
        times<R, 2, cols>(out, x, rows, panels, y);
}
static_assert(BT % (2 * R) == 0, "rows of a product are whole tiles");

// to [cols][ldt] = from [rows][ldf] transposed; both are whole vectors
static void transpose(float* to, int64_t ldt, const float* from, int64_t ldf, int64_t rows, int64_t cols) {
    for (int64_t r = 0; r < rows; r += L)
        for (int64_t c = 0; c < cols; c += L) {
            V x[L];
            AD_UNROLL for (int i = 0; i < L; ++i) x[i] = vload(from + (r + i) * ldf + c);
            transpose(x);
            AD_UNROLL for (int i = 0; i < L; ++i) vstore(to + (c + i) * ldt + r, x[i]);
        }
}

// ---------------------------------------------------------------------------------------------------------------
// elementary derivatives

// Turn da, the gradient of the decay a = decay_of(x), into that of x. `to_A` is the contribution to that of A_log.
AD_INLINE V through_decay(const Problem& p, V x, V a, V da, V A, V& to_A) {
    to_A = vzero();
    if (p.decay == Decay::linear) return da;
    const V dl = vmul(a, da);  // gradient of log a
    if (p.decay == Decay::log) return dl;
    // if the decay is 0, x may be infinite
    x = vzero_below(x, vsub(vzero(), vneg_abs(dl)), vset(1.17549435e-38f));
    if (p.has_lower_bound) {
        const V dx = vmul(vmul(dl, vset(p.lower_bound)), vmul(A, vsigmoid_slope(vmul(A, x))));
        to_A = vmul(dx, x);
        return dx;
    }
    const V minus = vsub(vzero(), vmul(A, dl));
    to_A = vmul(minus, vsoftplus(x));
    return vmul(minus, vsigmoid(x));
}

// ---------------------------------------------------------------------------------------------------------------

// Rows that are read or written soon. They are prefetched into L2 panel by panel while a block computes: rows of
// consecutive tokens are HV * V numbers apart, which no hardware prefetcher follows.
struct Ahead {
    const Tokens* x;
    int64_t head, first, rows, n;
};
AD_INLINE void fetch_to_L2(const Ahead& a, int64_t b, int64_t t) {
    const char* row = static_cast<const char*>(token(*a.x, b, t, a.head));
    for (int64_t i = 0; i < a.n * dtype_size(a.x->dtype); i += 64) AD_PREFETCH_L2(row + i);
}
// A macro: GCC takes a function that only prefetches for one without effects and drops the call.
#define AD_FETCH_AHEAD(panel)                                                                              \
    for (int i = 0; i < s.aheads; ++i)                                                                     \
        for (int64_t t = s.ahead[i].rows * panel / panels; t < s.ahead[i].rows * (panel + 1) / panels; ++t)                          \
            if (s.ahead[i].first + t < count) fetch_to_L2(s.ahead[i], seq.b, position(s.ahead[i].first + t));

struct BackBlock {
    float A[BT * BT], P[BT * BT];  // zero outside the pairs
    float beta[BT];
    float *D, *X;     // [panels][BT][W]
    float* scratch;  // X, if it is not kept
};

struct Length {  // of a row, as from inverse_length
    float inverse, unit;
};

struct BackHead {
    int64_t hv;
    float A;
    float* bias;  // [Kp]
    float* kept;  // [spans][panels][Kp][W]: the state before each of them
    float* x;     // [spans][SPAN / BT][panels][BT][W], if it is kept
    float* dS;    // [panels][Kp][W]
};

// Rows of K channels have Kp: whole tiles, zero beyond K. V columns are in panels.
struct BackScratch {
    BackBlock block[SPAN_BLOCKS];
    float* S[SPAN_BLOCKS];       // [panels][Kp][W]: the state before each block except the first
    float *q, *k, *e;            // [SPAN][Kp]
    float *dq, *dk, *de;         // [SPAN][Kp]
    float *a, *da;               // [SPAN][Kp]
    Length q_length[SPAN], k_length[SPAN];
    float* gates;                // [SPAN]: a scalar gate
    float* d_beta;               // [SPAN]
    float* NE;                   // [2 BT][Kp]: N, then E
    float* w;                    // [BT][Kp]
    float *Nt, *wt;              // [Kp][BT]: N and w transposed
    float* gamma;                // [Kp]
    float* pairs;                // [BT][Kp]
    float* rows;                 // [panels][2 BT][W]: dx, then do
    float* rowst;                // [panels W][2 BT]: transposed
    float* Dt;                   // [panels W][BT]
    float* ZQ;                   // [2 BT][BT]: dx D^T, then do D^T
    float* dNEt;                 // [Kp][2 BT]
    float* dwt;                  // [Kp][BT]
    float* d_gamma;              // [Kp]
    float* line;                 // [2][max(Kp, panels W)]
    float *Et, *o;               // for the mixer: E transposed; o in panels, then dv [BT][panels W]
    int64_t* positions;          // of the tokens that are read, if there is a mask
    const char* next_state;  // of the next head, or of the first head in the chunk before
    Ahead ahead[8];
    int aheads;
};

class BackRunner {
  public:
    BackRunner(const Backward& backward, const BackwardTask& task, char* memory)
        : g(backward), p(backward.rule), job(task), seq(sequence(p, task.n)), each(p.HV / p.H) {
        Arena arena{memory};
        carve(arena);
    }

    static size_t workspace(const Backward& g) {
        char* const origin = reinterpret_cast<char*>(64);  // addresses are only computed, never read
        BackRunner r(g, BackwardTask{0, 0, nullptr, false}, origin, 0);
        return static_cast<size_t>(r.end_ - origin);
    }
    // Bytes that a task keeps per span: the state of each of its value heads, and x.
    static size_t kept_bytes(const Problem& p, bool x) {
        const int64_t rows = round_up(p.K, BT) + (x ? SPAN : 0);
        return static_cast<size_t>(p.HV / p.H * rows * round_up(p.V, W)) * 4;
    }

    void run() {
        if (job.pass == BackwardPass::states) return run_states();
        if (job.pass == BackwardPass::d_states) return run_d_states();
        find_tokens();
        const int64_t chunks = Backward::spans(count);
        const bool part = job.pass == BackwardPass::segment;
        first = part ? job.segment * Backward::SEGMENT : 0;
        end = part && first + Backward::SEGMENT < chunks ? first + Backward::SEGMENT : chunks;
        if (part && first > 0 && first >= end) return;
        const bool skipped = seq.row_in < 0;
        if (g.mixer) around.begin(seq, p.mask ? s.positions : nullptr, count);
        for (int64_t u = 0; u < each; ++u) begin_head(u);
        if (first == 0 && count < seq.end - seq.start) zero_rows();
        if (first < end) clear_padding();
        for (int64_t c = first; c + 1 < end; ++c) {
            read_keys(c, false);
            for (int64_t u = 0; u < each; ++u) advance(u, c, state(head(u), c), state(head(u), c + 1));
        }
        for (int64_t c = end - 1; c >= first; --c) {
            read_keys(c, true);
            for (int64_t u = 0; u < each; ++u) chunk_back(u, c);
            write_keys(c);
        }
        if (g.d_initial && first == 0)
            for (int64_t u = 0; u < each; ++u) end_head(head(u), skipped);
        if (g.mixer) around.end();
    }

    // The states at the beginning of each segment except the first; in the memory of dS, which is not used yet.
    void run_states() {
        find_tokens();
        if (Backward::segments(count) < 2) return;
        for (int64_t u = 0; u < each; ++u) begin_head(u);
        clear_padding();
        const int64_t last = (Backward::segments(count) - 1) * Backward::SEGMENT;
        for (int64_t c = 0; c < last; ++c) {
            read_keys(c, false);
            for (int64_t u = 0; u < each; ++u) advance(u, c, head(u).dS, head(u).dS);
            if ((c + 1) % Backward::SEGMENT == 0)
                for (int64_t u = 0; u < each; ++u) copy_panels(start_of(job.starts, c + 1, u), head(u).dS);
        }
    }
    // The gradients of these states.
    void run_d_states() {
        find_tokens();
        if (Backward::segments(count) < 2) return;
        for (int64_t u = 0; u < each; ++u) begin_head(u);
        clear_padding();
        for (int64_t c = Backward::spans(count) - 1; c >= Backward::SEGMENT; --c) {
            read_keys(c, true);
            for (int64_t u = 0; u < each; ++u) {
                const BackHead& h = head(u);
                read_gates(h, c);
                for (int64_t b = (tokens_of(c) - 1) / BT; b >= 0; --b) {
                    operands(b);
                    pairs<true>(b);
                    read_rows(s.rows + BT * W, 2 * BT, g.d_o, h, c, b);
                    transpose(s.wt, BT, s.w, Kp, BT, Kp);
                    for (int64_t panel = panel0(); panel < panel1(); ++panel) {
                        solve_back<false>(s.block[b], panel, h.dS, nullptr);
                        state_back(panel, h.dS);
                    }
                }
                if (c % Backward::SEGMENT == 0) copy_panels(start_of(job.d_starts, c, u), h.dS);
            }
        }
    }

  private:
    const Backward& g;
    const Problem& p;
    const BackwardTask job;
    const Sequence seq;
    const int64_t each;  // value heads
    int64_t Kp = 0, panels = 0, count = 0;
    int64_t first = 0, end = 0;  // the chunks of this task
    BackScratch s{};
    Around around{};
    BackHead* heads_ = nullptr;
    char* end_ = nullptr;
    bool erases() const { return p.erase.data != nullptr; }
    bool erases_per_head() const { return erases() && p.erase.heads == p.HV; }
    int64_t state_size() const { return panels * Kp * W; }
    int64_t panel0() const { return job.panel0; }
    int64_t panel1() const { return job.panel1 < panels ? job.panel1 : panels; }
    // The state before chunk c.
    float* state(const BackHead& h, int64_t c) const { return h.kept + (c - first) * state_size(); }
    // The state of head u before chunk c, where a segment begins.
    float* start_of(float* starts, int64_t c, int64_t u) const {
        return starts + ((c / Backward::SEGMENT - 1) * each + u) * state_size();
    }
    void copy_panels(float* to, const float* from) const {
        const int64_t at = panel0() * Kp * W, n = (panel1() - panel0()) * Kp * W;
        std::memcpy(to + at, from + at, static_cast<size_t>(n) * 4);
    }
    BackHead& head(int64_t u) { return heads_[u]; }

    // Only computes the size of the memory.
    BackRunner(const Backward& backward, const BackwardTask& task, char* memory, int)
        : g(backward), p(backward.rule), job(task), seq{}, each(p.HV / p.H) {
        Arena arena{memory};
        carve(arena, false);
    }

    void carve(Arena& arena, bool fill = true) {
        Kp = round_up(p.K, BT);
        panels = (p.V + W - 1) / W;
        const int64_t columns = panels * W;
        BackHead* heads = arena.take<BackHead>(each);
        heads_ = heads;
        for (int64_t u = 0; u < each; ++u) {
            BackHead h{};
            h.bias = arena.take<float>(Kp);
            h.dS = arena.take<float>(state_size());
            if (fill) heads[u] = h;
        }
        for (BackBlock& b : s.block) {
            b.D = arena.take<float>(panels * BT * W);
            b.scratch = arena.take<float>(panels * BT * W);
        }
        for (int i = 1; i < SPAN_BLOCKS; ++i) s.S[i] = arena.take<float>(state_size());
        float** const rows[] = {&s.q, &s.k, &s.dq, &s.dk, &s.a, &s.da};
        for (float** x : rows) *x = arena.take<float>(SPAN * Kp);
        s.e = erases() ? arena.take<float>(SPAN * Kp) : s.k;
        s.de = erases() ? arena.take<float>(SPAN * Kp) : s.dk;
        s.gates = arena.take<float>(SPAN);
        s.d_beta = arena.take<float>(SPAN);
        s.NE = arena.take<float>(2 * BT * Kp);
        s.w = arena.take<float>(BT * Kp);
        s.Nt = arena.take<float>(BT * Kp);
        s.wt = arena.take<float>(BT * Kp);
        s.gamma = arena.take<float>(Kp);
        s.pairs = arena.take<float>(BT * Kp);
        s.rows = arena.take<float>(2 * BT * columns);
        s.rowst = arena.take<float>(2 * BT * columns);
        s.Dt = arena.take<float>(BT * columns);
        s.ZQ = arena.take<float>(2 * BT * BT);
        s.dNEt = arena.take<float>(2 * BT * Kp);
        s.dwt = arena.take<float>(BT * Kp);
        s.d_gamma = arena.take<float>(Kp);
        s.line = arena.take<float>(2 * (Kp + columns));
        s.positions = arena.take<int64_t>(p.mask ? g.longest : 0);
        if (g.mixer) {
            around.carve(*g.mixer, job, arena);
            s.Et = arena.take<float>(BT * Kp);
            s.o = arena.take<float>(BT * columns);
        }
        end_ = arena.at;
    }

    // ---- tokens ----

    void find_tokens() {
        count = 0;
        if (seq.row_in < 0) return;
        if (!p.mask) {
            count = seq.end - seq.start;
            return;
        }
        for (int64_t t = seq.start; t < seq.end; ++t)
            if (seq.live(p, t)) s.positions[count++] = t;
    }
    int64_t position(int64_t i) const { return p.mask ? s.positions[i] : seq.start + i; }
    int64_t tokens_of(int64_t c) const { return count - c * SPAN < SPAN ? count - c * SPAN : SPAN; }
    int64_t tokens_in(int64_t c, int64_t b) const {
        const int64_t n = tokens_of(c) - b * BT;
        return n < 0 ? 0 : n < BT ? n : BT;
    }

    static void zero_row(const Tokens& x, int64_t b, int64_t t, int64_t h, int64_t n) {
        if (x.data) std::memset(const_cast<void*>(token(x, b, t, h)), 0, static_cast<size_t>(n * dtype_size(x.dtype)));
    }
    static void write(const Tokens& x, int64_t b, int64_t t, int64_t h, const float* from, int64_t n) {
        write_row(const_cast<void*>(token(x, b, t, h)), x.dtype, from, n);
    }

    // Zero gradients for tokens that nothing reads.
    void zero_rows() {
        int64_t next = 0;
        for (int64_t t = seq.start; t < seq.end; ++t) {
            if (next < count && position(next) == t) {
                ++next;
                continue;
            }
            if (g.mixer) around.zero(t);
            zero_row(g.d_q, seq.b, t, job.h, p.K);
            zero_row(g.d_k, seq.b, t, job.h, p.K);
            if (erases() && !erases_per_head()) zero_row(g.d_erase, seq.b, t, job.h, p.K);
            for (int64_t u = 0; u < each; ++u) {
                const int64_t hv = head(u).hv;
                zero_row(g.d_v, seq.b, t, hv, p.V);
                zero_row(g.d_g, seq.b, t, hv, p.kda ? p.K : 1);
                zero_row(g.d_beta, seq.b, t, hv, 1);
                if (erases_per_head()) zero_row(g.d_erase, seq.b, t, hv, p.K);
            }
        }
    }

    // Channels beyond K are never written again.
    void clear_padding() {
        float* const rows[] = {s.q, s.k, s.e, s.a};
        for (float* x : rows) std::memset(x, 0, static_cast<size_t>(SPAN * Kp) * 4);
    }

    // q (with norm and scale) and k (with norm), or erase, of a chunk; zeros after its last token.
    void read_keys(int64_t c, bool queries) {
        const int64_t n = tokens_of(c);
        float *const read[] = {s.q, s.k, s.e}, *const sums[] = {s.dq, s.dk, s.de};
        if (g.mixer) {
            around.rows(1, 0, c * SPAN, n, s.k, Kp);
            if (queries) around.rows(0, 0, c * SPAN, n, s.q, Kp);
        }
        for (int64_t i = 0; i < SPAN; ++i) {
            if (i < n) {
                const int64_t t = position(c * SPAN + i);
                read_unit(p.k, t, 1.0f, s.k + i * Kp, s.k_length[i]);
                if (queries) read_unit(p.q, t, p.scale, s.q + i * Kp, s.q_length[i]);
                if (erases() && !erases_per_head())
                    read_row(s.e + i * Kp, token(p.erase, seq.b, t, job.h), p.erase.dtype, p.K);
            } else {
                for (float* x : read) std::memset(x + i * Kp, 0, static_cast<size_t>(Kp) * 4);
            }
        }
        if (queries)
            for (float* x : sums) std::memset(x, 0, static_cast<size_t>(SPAN * Kp) * 4);
    }
    void read_unit(const Tokens& x, int64_t t, float factor, float* row, Length& length) const {
        if (x.data) read_row(row, token(x, seq.b, t, job.h), x.dtype, p.K);
        if (p.qk_l2norm) {
            const float* from = row;
            length.inverse = inverse_length(from, Kp, 1.0f, p.qk_l2norm_eps, row, length.unit);
            factor *= length.inverse;
        }
        if (factor != 1.0f)
            for (int64_t i = 0; i < Kp; i += L) vstore(row + i, vmul(vset(factor), vload(row + i)));
    }

    void write_keys(int64_t c) {
        const int64_t n = tokens_of(c);
        for (int64_t i = 0; i < n; ++i) {
            const int64_t t = position(c * SPAN + i);
            write_unit(g.d_q, t, p.scale, s.q + i * Kp, s.q_length[i], s.dq + i * Kp);
            write_unit(g.d_k, t, 1.0f, s.k + i * Kp, s.k_length[i], s.dk + i * Kp);
            if (erases() && !erases_per_head()) write(g.d_erase, seq.b, t, job.h, s.de + i * Kp, p.K);
        }
        if (!g.mixer) return;
        for (int64_t i = (n - 1) / BT * BT; i >= 0; i -= BT) {
            const int64_t rows = n - i < BT ? n - i : BT;
            around.inputs_back(0, 0, c * SPAN + i, rows, s.dq + i * Kp, Kp);
            around.inputs_back(1, 0, c * SPAN + i, rows, s.dk + i * Kp, Kp);
        }
    }
    // From dy, the gradient of the row y as it was read, to that of x. y = f r x, r = 1 / sqrt(sum x^2 + eps):
    // dx = f r dy - r y <y, dy> / f.
    void write_unit(const Tokens& dx, int64_t t, float f, const float* y, const Length& length, float* dy) {
        if (p.qk_l2norm) {
            // a row of zeros without eps: as if its length were 1
            const float r = length.inverse == 0.0f ? 1.0f : length.inverse;
            V dot = vzero();
            for (int64_t i = 0; i < Kp; i += L) dot = vfma(vload(y + i), vload(dy + i), dot);
            const V along = vset(f == 0.0f ? 0.0f : vsum(dot) / f);
            for (int64_t i = 0; i < Kp; i += L) {
                const V d = vfnma(along, vload(y + i), vmul(vset(f), vload(dy + i)));
                vstore(dy + i, vmul(vmul(vset(r), d), vset(length.inverse == 0.0f ? 1.0f : length.unit)));
            }
        } else if (f != 1.0f) {
            for (int64_t i = 0; i < Kp; i += L) vstore(dy + i, vmul(vset(f), vload(dy + i)));
        }
        if (dx.data) write(dx, seq.b, t, job.h, dy, p.K);
    }

    // ---- heads ----

    void begin_head(int64_t u) {
        BackHead& h = head(u);
        h.hv = p.tiled ? job.h + u * p.H : job.h * each + u;
        for (int64_t i = 0; i < Kp; ++i) h.bias[i] = 0.0f;
        h.A = gate_parameters(p, h.hv, h.bias);
        if (job.pass == BackwardPass::states) return load_state(h.dS, p.in, seq.row_in, h.hv);
        const int64_t spans = job.pass == BackwardPass::whole ? Backward::spans(seq.end - seq.start) : Backward::SEGMENT;
        float* const kept = reinterpret_cast<float*>(job.kept);
        h.kept = kept + u * spans * state_size();
        h.x = kept + (each * state_size() + u * SPAN * panels * W) * spans;
        const size_t bytes = static_cast<size_t>(state_size()) * 4;
        if (end < Backward::spans(count) && job.pass == BackwardPass::segment)
            std::memcpy(h.dS, start_of(job.d_starts, end, u), bytes);
        else
            load_state(h.dS, g.d_final, job.n, h.hv);
        if (job.pass == BackwardPass::d_states) return;
        if (first > 0)
            std::memcpy(h.kept, start_of(job.starts, first, u), bytes);
        else if (count > 0)
            load_state(h.kept, p.in, seq.row_in, h.hv);
    }
    void load_state(float* to, const States& from, int64_t row, int64_t hv) const {
        pack(p, to, Kp, from.data ? state_at(p, from, 0, row, hv, 0) : nullptr, from.row, p.V);
        for (int64_t panel = 0; panel < panels; ++panel)
            for (int64_t i = p.K * W; i < Kp * W; ++i) to[panel * Kp * W + i] = 0.0f;
    }
    void end_head(const BackHead& h, bool skipped) const {
        float* to = g.d_initial + (job.n * p.HV + h.hv) * p.K * p.V;
        if (skipped) {
            std::memset(to, 0, static_cast<size_t>(p.K * p.V) * 4);
            return;
        }
        for (int64_t panel = 0; panel < panels; ++panel)
            unpack_as(p, to + panel * W * (p.vk ? p.K : 1), p.vk ? p.K : p.V, h.dS + panel * Kp * W, W, columns(panel));
    }
    int64_t columns(int64_t panel) const { return p.V - panel * W < W ? p.V - panel * W : W; }

    // Decays and betas of a chunk for a value head; 1 and 0 after its last token.
    void read_gates(const BackHead& h, int64_t c) {
        const int64_t n = tokens_of(c);
        alignas(64) float beta[SPAN] = {};
        for (int64_t i = 0; i < SPAN; ++i) {
            float* a = s.a + i * Kp;
            s.gates[i] = 0.0f;
            if (i >= n) {
                if (p.kda)
                    for (int64_t j = 0; j < Kp; ++j) a[j] = 1.0f;
                continue;
            }
            const int64_t t = position(c * SPAN + i);
            beta[i] = erases() ? 1.0f : read_one(token(p.beta, seq.b, t, h.hv), p.beta.dtype);
            if (erases_per_head())
                read_row(s.e + i * Kp, token(p.erase, seq.b, t, h.hv), p.erase.dtype, p.K);
            if (!p.kda) {
                s.gates[i] = read_one(token(p.g, seq.b, t, h.hv), p.g.dtype) + (p.dt_bias ? h.bias[0] : 0.0f);
                continue;
            }
            read_gate_row(h, t, a);
            for (int64_t j = 0; j < Kp; j += L) vstore(a + j, decay_of(p, vload(a + j), vset(h.A)));
        }
        if (p.beta_is_logit)
            for (int64_t i = 0; i < SPAN; i += L) vstore(beta + i, vsigmoid(vload(beta + i)));
        for (int64_t i = 0; i < SPAN; ++i) s.block[i / BT].beta[i % BT] = i < n ? p.beta_scale * beta[i] : 0.0f;
        if (p.kda) return;
        for (int64_t i = 0; i < SPAN; i += L) {
            alignas(64) float a[L];
            vstore(a, decay_of(p, vload(s.gates + i), vset(h.A)));
            for (int64_t u = 0; u < L; ++u)
                for (int64_t j = 0; j < Kp; j += L) vstore(s.a + (i + u) * Kp + j, vset(i + u < n ? a[u] : 1.0f));
        }
    }
    // g + dt_bias of a token. Its first K channels are read repeatedly; those beyond stay zero.
    void read_gate_row(const BackHead& h, int64_t t, float* x) const {
        for (int64_t j = p.K; j < Kp; ++j) x[j] = 0.0f;
        read_row(x, token(p.g, seq.b, t, h.hv), p.g.dtype, p.K);
        if (p.dt_bias)
            for (int64_t j = 0; j < Kp; j += L) vstore(x + j, vadd(vload(x + j), vload(h.bias + j)));
    }

    // ---- forward ----

    // N, E, w and Gamma_C of block b.
    void operands(int64_t b) {
        const int64_t first = b * BT * Kp;
        const float *a = s.a + first, *k = s.k + first, *q = s.q + first, *e = s.e + first;
        float *N = s.NE, *E = s.NE + BT * Kp, *w = s.w;
        const int64_t ld = Kp;
        for (int64_t i = 0; i < ld; i += L) {
            V gamma = vset(1.0f), later = vset(1.0f);
            AD_UNROLL for (int t = 0; t < BT; ++t) {
                const int64_t at = t * ld + i;
                gamma = vmul(gamma, vload(a + at));
                vstore(N + at, vsub(vzero(), vmul(gamma, vload(e + at))));
                vstore(E + at, vmul(gamma, vload(q + at)));
            }
            vstore(s.gamma + i, gamma);
            AD_UNROLL for (int t = BT - 1; t >= 0; --t) {
                const int64_t at = t * ld + i;
                vstore(w + at, vmul(later, vload(k + at)));
                later = vmul(later, vload(a + at));
            }
        }
    }

    // A of block b, and P if `queries`.
    template <bool queries>
    void pairs(int64_t b) {
        BackBlock& block = s.block[b];
        const int64_t first = b * BT * Kp;
        std::memset(block.A, 0, sizeof block.A);
        std::memset(block.P, 0, sizeof block.P);
        std::memcpy(s.pairs, s.k + first, static_cast<size_t>(BT * Kp) * 4);
        for (int64_t t = 0; t < BT; ++t) {
            const int64_t at = first + t * Kp;
            int64_t j = 0;
            for (; j + 4 <= t; j += 4) pairs_of<4, queries>(block, t, j, at);
            switch (t - j) {
                case 3: pairs_of<3, queries>(block, t, j, at); break;
                case 2: pairs_of<2, queries>(block, t, j, at); break;
                case 1: pairs_of<1, queries>(block, t, j, at); break;
                default: break;
            }
            if (!queries) continue;
            V dot = vzero();
            for (int64_t i = 0; i < Kp; i += L) dot = vfma(vload(s.k + at + i), vload(s.q + at + i), dot);
            block.P[t * BT + t] = vsum(dot);
        }
    }
    template <int n, bool queries>
    void pairs_of(BackBlock& block, int64_t t, int64_t j, int64_t at) {
        V of_e[n], of_q[n];
        AD_UNROLL for (int u = 0; u < n; ++u) of_e[u] = of_q[u] = vzero();
        for (int64_t i = 0; i < Kp; i += L) {
            const V a = vload(s.a + at + i), e = vload(s.e + at + i);
            AD_UNROLL for (int u = 0; u < n; ++u) {
                float* w = s.pairs + (j + u) * Kp + i;
                const V x = vmul(vload(w), a);
                vstore(w, x);
                of_e[u] = vfma(x, e, of_e[u]);
                if (queries) of_q[u] = vfma(x, vload(s.q + at + i), of_q[u]);
            }
        }
        AD_UNROLL for (int u = 0; u < n; ++u) block.A[t * BT + j + u] = vsum(of_e[u]);
        if (queries)
            AD_UNROLL for (int u = 0; u < n; ++u) block.P[t * BT + j + u] = vsum(of_q[u]);
    }

    // Copy rows of x into panels of `rows` rows; zeros after the last token.
    void read_rows(float* to, int64_t rows, const Tokens& x, const BackHead& h, int64_t c, int64_t b) const {
        const int64_t first = c * SPAN + b * BT;
        for (int64_t t = 0; t < BT; ++t, to += W) {
            if (first + t >= count) {
                for (int64_t i = 0; i < panels * W; i += W)
                    AD_UNROLL for (int j = 0; j < W; j += L) vstore(to + i * rows + j, vzero());
                continue;
            }
            const void* from = token(x, seq.b, position(first + t), h.hv);
            if (x.dtype == DType::f32)
                read_panels(to, rows, static_cast<const float*>(from));
            else if (x.dtype == DType::bf16)
                read_panels(to, rows, static_cast<const bf16*>(from));
            else
                read_panels(to, rows, static_cast<const f16*>(from));
        }
    }
    template <class T>
    void read_panels(float* to, int64_t rows, const T* from) const {
        int64_t i = 0;
        for (; i + W <= p.V; i += W)
            AD_UNROLL for (int j = 0; j < W; j += L) vstore(to + i * rows + j, vload(from + i + j));
        if (i == p.V) return;
        AD_UNROLL for (int j = 0; j < W; j += L) vstore(to + i * rows + j, vzero());
        read_as(to + i * rows, from + i, p.V - i);
    }
    // Copy a row back from panels.
    template <class T>
    void write_panels(T* to, const float* from, int64_t rows) const {
        int64_t i = 0;
        for (; i + W <= p.V; i += W)
            AD_UNROLL for (int j = 0; j < W; j += L) vstore(to + i + j, vload(from + i * rows + j));
        if (i < p.V) write_as(to + i, from + i * rows, p.V - i);
    }

    // v of block b in a call of the mixer.
    void make_values(float* to, const BackHead& h, int64_t c, int64_t b) {
        const int64_t n = tokens_in(c, b);
        around.rows(2, &h - heads_, c * SPAN + b * BT, n, s.o, panels * W);
        for (int64_t t = 0; t < BT; ++t, to += W)
            if (t < n)
                read_panels(to, BT, static_cast<const float*>(s.o + t * panels * W));
            else
                for (int64_t i = 0; i < panels * W; i += W)
                    AD_UNROLL for (int j = 0; j < W; j += L) vstore(to + i * BT + j, vzero());
    }
    // do of block b in a call of the mixer, from its o = E S + P d.
    void make_d_o(const BackHead& h, int64_t c, int64_t b) {
        const BackBlock& block = s.block[b];
        transpose(s.Et, BT, s.NE + BT * Kp, Kp, BT, Kp);
        for (int64_t panel = 0; panel < panels; ++panel)
            for (int64_t t = 0; t < BT; t += R) {
                V acc[R][NV];
                set_zero(acc);
                multiply<R, NV, 1>(acc, s.Et + t, BT, s.S[b] + panel * Kp * W, W, Kp);
                multiply<R, NV, BT>(acc, block.P + t * BT, 1, block.D + panel * BT * W, W, BT);
                store(acc, s.o + (panel * BT + t) * W, W);
            }
        around.outputs(&h - heads_, c * SPAN + b * BT, tokens_in(c, b), s.o, s.rows + BT * W, 2 * BT);
    }

    // Prefetch rows from token `first` on, for the next reader.
    void plan(const Tokens& x, int64_t head, int64_t first, int64_t rows, int64_t n) {
        if (x.data && first >= 0) s.ahead[s.aheads++] = {&x, head, first, rows, n};
    }
    // Prefetch what the next head, or the first head of the next chunk, reads before its first block.
    void plan_next(int64_t u, int64_t c, int64_t step, bool queries) {
        const bool last = u + 1 == each;
        const int64_t first = (last ? c + step : c) * SPAN, hv = head(last ? 0 : u + 1).hv;
        if (p.kda) plan(p.g, hv, first, SPAN, p.K);
        if (!last) return;
        plan(p.k, job.h, first, SPAN, p.K);
        if (queries) plan(p.q, job.h, first, SPAN, p.K);
    }

    // Block b on the state S: x unless it is `known`, d and, if `to` is given, the state after the
    // block. `to` may be S.
    void forward(const BackHead& h, int64_t c, int64_t b, const float* S, float* to, bool known) {
        BackBlock& block = s.block[b];
        block.X = job.keeps_x ? h.x + ((c - first) * SPAN_BLOCKS + b) * panels * BT * W : block.scratch;
        if (!known) {
            if (g.mixer)
                make_values(block.X, h, c, b);
            else
                read_rows(block.X, BT, p.v, h, c, b);
            transpose(s.Nt, BT, s.NE, Kp, BT, Kp);
        }
        for (int64_t panel = panel0(); panel < panel1(); ++panel) {
            const float* from = S + panel * Kp * W;
            float *X = block.X + panel * BT * W, *D = block.D + panel * BT * W;
            AD_FETCH_AHEAD(panel)
            if (known)
                for (int64_t t = 0; t < BT; ++t)
                    AD_UNROLL for (int j = 0; j < W; j += L)
                        vstore(D + t * W + j, vmul(vset(block.beta[t]), vload(X + t * W + j)));
            else
                solve_panel(block, from, X, D);
            if (!to) continue;
            float* dst = to + panel * Kp * W;
            for (int64_t i = 0; i < Kp; i += R) {
                V acc[R][NV];
                load_faded(acc, from + i * W, W, s.gamma + i);
                multiply<R, NV, 1>(acc, s.w + i, Kp, D, W, BT);
                store(acc, dst + i * W, W);
            }
        }
    }
    // X, which holds v on entry, and D of a panel of the state.
    void solve_panel(const BackBlock& block, const float* S, float* X, float* D) const {
        for (int64_t t = 0; t < BT; t += R) {
            V acc[R][NV];
            load(acc, X + t * W, W);
            multiply<R, NV, 1>(acc, s.Nt + t, BT, S, W, Kp);
            store(acc, X + t * W, W);
        }
        for (int64_t j = 0; j < W; j += L) {
            V x[BT];
            AD_UNROLL for (int t = 0; t < BT; ++t) x[t] = vload(X + t * W + j);
            AD_UNROLL for (int u = 0; u < BT; ++u) {
                const V d = vmul(vset(block.beta[u]), x[u]);
                vstore(X + u * W + j, x[u]);
                vstore(D + u * W + j, d);
                AD_UNROLL for (int t = u + 1; t < BT; ++t) x[t] = vfnma(vset(block.A[t * BT + u]), d, x[t]);
            }
        }
    }

    // The state before chunk c + 1 from that before chunk c. `to` may be S.
    void advance(int64_t u, int64_t c, const float* S, float* to) {
        const BackHead& h = head(u);
        read_gates(h, c);
        for (int64_t b = 0; b < SPAN_BLOCKS; ++b) {
            s.aheads = 0;
            plan(p.v, h.hv, c * SPAN + (b + 1) * BT, BT, p.V);
            if (b + 1 == SPAN_BLOCKS) plan_next(u, c, 1, false);
            operands(b);
            pairs<false>(b);
            forward(h, c, b, S, to, false);
            S = to;
        }
    }

    // ---- backward ----

    void chunk_back(int64_t u, int64_t c) {
        const BackHead& h = head(u);
        read_gates(h, c);
        const int64_t blocks = (tokens_of(c) + BT - 1) / BT;
        s.S[0] = state(h, c);
        s.next_state = reinterpret_cast<const char*>(
            u + 1 < each ? state(head(u + 1), c) : state(head(0), c > first ? c - 1 : first));
        const bool known = job.keeps_x && c + 1 < end;
        for (int64_t b = 0; b < blocks; ++b) {
            const bool last = b + 1 == blocks;
            s.aheads = 0;
            plan(last || known ? g.d_o : p.v, h.hv, c * SPAN + (last ? b : b + 1) * BT, BT, p.V);
            operands(b);
            pairs<true>(b);
            forward(h, c, b, s.S[b], last ? nullptr : s.S[b + 1], known);
        }
        for (int64_t b = blocks - 1; b >= 0; --b) {
            const int64_t first = c * SPAN + b * BT;
            s.aheads = 0;
            plan(g.d_v, h.hv, first, BT, p.V);
            if (b > 0) plan(g.d_o, h.hv, first - BT, BT, p.V);
            if (b == 0) {
                if (p.kda) plan(g.d_g, h.hv, first, SPAN, p.K);
                if (u + 1 == each) plan(g.d_q, job.h, first, SPAN, p.K);
                if (u + 1 == each) plan(g.d_k, job.h, first, SPAN, p.K);
                plan_next(u, c, -1, true);
            }
            if (b + 1 < blocks) operands(b);
            backward(h, c, b);
            channels_back(b);
        }
        write_gates(h, c);
    }

    // dx of a panel from its do and the gradient of the state after the block; and, with X, its
    // contribution to d_beta.
    template <bool whole>
    void solve_back(const BackBlock& block, int64_t panel, const float* gradient, V* d_beta) {
        const float* dS = gradient + panel * Kp * W;
        float *dx = s.rows + panel * 2 * BT * W, *d_o = dx + BT * W;
        const float* X = whole ? block.X + panel * BT * W : nullptr;
        for (int64_t t = 0; t < BT; t += R) {
            V acc[R][NV];
            set_zero(acc);
            multiply<R, NV, 1>(acc, block.P + t, BT, d_o, W, BT);
            multiply<R, NV, 1>(acc, s.wt + t, BT, dS, W, Kp);
            store(acc, dx + t * W, W);
        }
        for (int64_t j = 0; j < W; j += L) {
            V d[BT];
            AD_UNROLL for (int t = 0; t < BT; ++t) d[t] = vload(dx + t * W + j);
            AD_UNROLL for (int t = BT - 1; t >= 0; --t) {
                if (whole) d_beta[t] = vfma(d[t], vload(X + t * W + j), d_beta[t]);
                d[t] = vmul(vset(block.beta[t]), d[t]);
                vstore(dx + t * W + j, d[t]);
                AD_UNROLL for (int u = 0; u < t; ++u) d[u] = vfnma(vset(block.A[t * BT + u]), d[t], d[u]);
            }
        }
    }
    // The gradient of a panel of the state before the block from the one after it.
    void state_back(int64_t panel, float* gradient) {
        float* dS = gradient + panel * Kp * W;
        for (int64_t i = 0; i < Kp; i += R) {
            V acc[R][NV];
            load_faded(acc, dS + i * W, W, s.gamma + i);
            multiply<R, NV, 1>(acc, s.NE + i, Kp, s.rows + panel * 2 * BT * W, W, 2 * BT);
            store(acc, dS + i * W, W);
        }
    }

    void backward(const BackHead& h, int64_t c, int64_t b) {
        BackBlock& block = s.block[b];
        const float* S = s.S[b];
        if (g.mixer)
            make_d_o(h, c, b);
        else
            read_rows(s.rows + BT * W, 2 * BT, g.d_o, h, c, b);
        transpose(s.wt, BT, s.w, Kp, BT, Kp);
        V d_beta[BT];
        AD_UNROLL for (int t = 0; t < BT; ++t) d_beta[t] = vzero();
        for (int64_t panel = 0; panel < panels; ++panel) {
            AD_FETCH_AHEAD(panel)
            solve_back<true>(block, panel, h.dS, d_beta);
            transpose(s.rowst + panel * W * 2 * BT, 2 * BT, s.rows + panel * 2 * BT * W, W, 2 * BT, W);
            transpose(s.Dt + panel * W * BT, BT, block.D + panel * BT * W, W, BT, W);
        }
        for (int64_t t = 0; t < BT; ++t) s.d_beta[b * BT + t] = vsum(d_beta[t]);
        times<BT>(s.ZQ, s.rows, 2 * BT, panels, s.Dt);
        times<2 * BT>(s.dNEt, S, Kp, panels, s.rowst);
        times<BT>(s.dwt, h.dS, Kp, panels, s.Dt);
        for (int64_t i = 0; i < Kp; ++i) {
            for (int64_t at = 0; at < panels * W; at += 64)
                AD_PREFETCH_L2(s.next_state + (b * Kp + i) * panels * W + at);
            V dot = vzero();
            for (int64_t panel = 0; panel < panels; ++panel)
                AD_UNROLL for (int j = 0; j < W; j += L) {
                    const int64_t at = (panel * Kp + i) * W + j;
                    dot = vfma(vload(S + at), vload(h.dS + at), dot);
                }
            s.d_gamma[i] = vsum(dot);
        }
        for (int64_t panel = 0; panel < panels; ++panel) state_back(panel, h.dS);
        const int64_t n = tokens_in(c, b);
        if (g.mixer) {
            for (int64_t t = 0; t < n; ++t) write_panels(s.o + t * panels * W, s.rows + t * W, 2 * BT);
            return around.inputs_back(2, &h - heads_, c * SPAN + b * BT, n, s.o, panels * W);
        }
        for (int64_t t = 0; t < n; ++t) {
            void* to = const_cast<void*>(token(g.d_v, seq.b, position(c * SPAN + b * BT + t), h.hv));
            const float* from = s.rows + t * W;
            if (g.d_v.dtype == DType::f32)
                write_panels(static_cast<float*>(to), from, 2 * BT);
            else if (g.d_v.dtype == DType::bf16)
                write_panels(static_cast<bf16*>(to), from, 2 * BT);
            else
                write_panels(static_cast<f16*>(to), from, 2 * BT);
        }
    }

    // From dN, dE, dw, dA = -Z, dP and dGamma_C of block b to da; adds to dq, dk and dr. dw_j^t and dGamma_t are the
    // gradients of these products by everything after token t. From the last token to the first:
    //     dw_j^t += dA_tj r_t + dP_tj q_t     dr_t += sum_j dA_tj w_j^t - Gamma_t dN_t     dk_t += dw_t^t
    //     dGamma_t += q_t dE_t - r_t dN_t     dq_t += sum_j dP_tj w_j^t + Gamma_t dE_t
    //     da_t = sum_{j<t} dw_j^t w_j^(t-1) + dGamma_t Gamma_(t-1)     then both times a_t
    void channels_back(int64_t b) {
        const float *Z = s.ZQ, *dP = s.ZQ + BT * BT;
        const int64_t first = b * BT * Kp;
        for (int64_t i = 0; i < Kp; i += L) {
            V dN[BT], dE[BT], dw[BT], w[BT][BT], gamma[BT];
            columns_of(dN, s.dNEt + i * 2 * BT, 2 * BT);
            columns_of(dE, s.dNEt + i * 2 * BT + BT, 2 * BT);
            columns_of(dw, s.dwt + i * BT, BT);
            const float *a = s.a + first + i, *k = s.k + first + i, *q = s.q + first + i, *e = s.e + first + i;
            for (int t = 0; t < BT; ++t) {
                const V at = vload(a + t * Kp);
                gamma[t] = t ? vmul(gamma[t - 1], at) : at;
                for (int j = 0; j < t; ++j) w[t][j] = vmul(w[t - 1][j], at);
                w[t][t] = vload(k + t * Kp);
            }
            V d_gamma = vload(s.d_gamma + i);
            for (int t = BT - 1; t >= 0; --t) {
                const V at = vload(a + t * Kp), et = vload(e + t * Kp), qt = vload(q + t * Kp);
                V dq = vmul(gamma[t], dE[t]), minus_dr = vmul(gamma[t], dN[t]), da = vzero();
                d_gamma = vfma(qt, dE[t], vfnma(et, dN[t], d_gamma));
                const V own = vsplat(dP + t * BT + t);
                dq = vfma(own, w[t][t], dq);
                const V dk = vfma(own, qt, dw[t]);
                for (int j = 0; j < t; ++j) {
                    const V z = vsplat(Z + t * BT + j), y = vsplat(dP + t * BT + j);
                    const V x = vfnma(z, et, vfma(y, qt, dw[j]));
                    minus_dr = vfma(z, w[t][j], minus_dr);
                    dq = vfma(y, w[t][j], dq);
                    da = vfma(x, w[t - 1][j], da);
                    dw[j] = vmul(x, at);
                }
                da = t ? vfma(d_gamma, gamma[t - 1], da) : vadd(d_gamma, da);
                d_gamma = vmul(d_gamma, at);
                const int64_t row = first + t * Kp + i;
                vstore(s.da + row, da);
                vstore(s.dq + row, vadd(vload(s.dq + row), dq));
                vstore(s.dk + row, vadd(vload(s.dk + row), dk));
                vstore(s.de + row, vsub(vload(s.de + row), minus_dr));
            }
        }
    }
    // x[t] = the t-th elements of L rows
    static void columns_of(V (&x)[BT], const float* rows, int64_t ld) {
        for (int c = 0; c < BT; c += L) {
            V y[L];
            AD_UNROLL for (int i = 0; i < L; ++i) y[i] = vload(rows + i * ld + c);
            transpose(y);
            AD_UNROLL for (int i = 0; i < L; ++i) x[c + i] = y[i];
        }
    }

    // dg, dbeta and the head's own de of a chunk, and its contributions to the gradients of A_log and dt_bias.
    void write_gates(const BackHead& h, int64_t c) {
        const int64_t n = tokens_of(c), wide = p.kda ? p.K : 1;
        const int64_t row = (job.row + c / Backward::SEGMENT) * p.HV + h.hv;
        float* d_bias = g.d_dt_bias ? g.d_dt_bias + row * wide : nullptr;
        alignas(64) float dx[SPAN] = {}, db[SPAN] = {};
        V to_A = vzero(), sum = vzero(), more;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t t = position(c * SPAN + i);
            float *da = s.da + i * Kp, *x = s.line;
            if (erases())
                db[i] = 0.0f;
            else
                db[i] = p.beta_is_logit ? read_one(token(p.beta, seq.b, t, h.hv), p.beta.dtype) : 0.0f;
            if (erases_per_head()) {
                write(g.d_erase, seq.b, t, h.hv, s.de + i * Kp, p.K);
                std::memset(s.de + i * Kp, 0, static_cast<size_t>(Kp) * 4);
            }
            if (!p.kda) {
                V d = vzero();
                for (int64_t j = 0; j < Kp; j += L) d = vadd(d, vload(da + j));
                dx[i] = vsum(d);
                continue;
            }
            if (p.decay == Decay::raw) read_gate_row(h, t, x);  // other forms need only the decay
            for (int64_t j = 0; j < Kp; j += L) {
                const V a = vload(s.a + i * Kp + j);
                vstore(x + j, through_decay(p, vload(x + j), a, vload(da + j), vset(h.A), more));
                to_A = vadd(to_A, more);
            }
            write(g.d_g, seq.b, t, h.hv, x, p.K);
            for (int64_t j = 0; d_bias && j < p.K; ++j) d_bias[j] += x[j];
        }
        for (int64_t i = 0; i < SPAN; i += L) {
            if (!p.kda) {
                alignas(64) float a[L];
                for (int64_t u = 0; u < L; ++u) a[u] = s.a[(i + u) * Kp];
                const V d = through_decay(p, vload(s.gates + i), vload(a), vload(dx + i), vset(h.A), more);
                to_A = vadd(to_A, more);
                sum = vadd(sum, d);
                vstore(dx + i, d);
            }
            const V slope = p.beta_is_logit ? vsigmoid_slope(vload(db + i)) : vset(1.0f);
            vstore(db + i, vmul(vmul(vset(p.beta_scale), slope), vload(s.d_beta + i)));
        }
        for (int64_t i = 0; i < n; ++i) {
            const int64_t t = position(c * SPAN + i);
            if (!p.kda) write(g.d_g, seq.b, t, h.hv, dx + i, 1);
            if (!erases()) write(g.d_beta, seq.b, t, h.hv, db + i, 1);
        }
        if (d_bias && !p.kda) d_bias[0] += vsum(sum);
        if (g.d_A_log) g.d_A_log[row] += vsum(to_A);
    }
};

static size_t backward_workspace(const Backward& g) { return BackRunner::workspace(g); }
static size_t kept_bytes(const Problem& p, bool x) { return BackRunner::kept_bytes(p, x); }

static const char* backward_task(const Backward& g, const BackwardTask& task, char* memory) {
    BackRunner(g, task, memory).run();
    return AD_NAME(ANYDELTA_ISA);
}

}  // namespace anydelta::ANYDELTA_ISA
