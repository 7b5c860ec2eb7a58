// The gated delta rule on a matrix unit. A chunk has up to 64 tokens. All large products are products of bfloat16
// parts (tiles_*.h), accumulated in float32. Included by rule.inl.h, which explains a token's symbols.
//
// With Gamma_t = a_1 .. a_t, w_s^t = k_s a_(s+1) .. a_t and the state S0 before the chunk, as in rule.inl.h:
//
//     P_t = S0^T (Gamma_t k_t)     R_t = S0^T (scale Gamma_t q_t)      2 K V products per token
//     L_ts = beta_t w_s^t . k_t  (s < t)     A_ts = w_s^t . scale q_t  (s <= t)     C K, half of them needed
//     d_t = beta_t (v_t - P_t) - sum_s L_ts d_s      16 rows at a time: sums over earlier rows are a product,
//                                                    the rest of the triangle is solved in registers
//     o_t = R_t + sum_s A_ts d_s                                       C V
//     S_C = Gamma_C S0 + sum_s w_s^C d_s^T                             K V
//
// Decays are products of a_t, never quotients. A scalar decay stays out of the factors: these are then the caller's k
// and q, exact in one part if they are bfloat16, and the value heads of a q/k head share them. Decays per channel
// (KDA) would enter the factors, and pairs of near tokens would need sums channel by channel. That took as long as
// rule.inl.h's blocks.
#pragma once

namespace anydelta::ANYDELTA_ISA {

constexpr int MATRIX_TOKENS = 64;  // per chunk
// The tokens after the last whole product are padded, or run in the blocks of rule.inl.h if they are fewer than
// this. Time of the blocks / time of a chunk, H 16, HV 32, D 128: one part 0.97 at 20 tokens, 1.07 at 24; two parts
// 0.96 at 28, 1.11 at 32.
constexpr int MATRIX_LEAST = 22, MATRIX_LEAST_TWO_PARTS = 30;
static_assert(MATRIX_TOKENS % DEPTH == 0 && MATRIX_TOKENS % W == 0, "chunks are whole products");

AD_INLINE Parts take_parts(Arena& arena, int64_t count) {
    bf16* const high = arena.take<bf16>(count);
    return {high, arena.take<bf16>(count)};
}

// 0 while every x seen is finite, else NaN. It watches sums instead of terms: at worst it rejects a
// chunk of huge terms.
AD_INLINE V watch(V seen, V x) { return vfma(x, vzero(), seen); }

class Chunk {
  public:
    static constexpr int C = MATRIX_TOKENS;

    void carve(const Problem& p, Arena& arena) {
        Kp = round_up(p.K, DEPTH);
        k = arena.take<float>(C * Kp);
        rows = take_parts(arena, 2 * C * Kp);
        written = take_parts(arena, Kp * C);
        columns = take_parts(arena, C * Kp);
        kk = arena.take<float>(2 * C * C);
        lower = take_parts(arena, C * C);
        attention = take_parts(arena, C * C);
        diagonal = arena.take<float>(C * DEPTH);
        solved = arena.take<float>(TILE * W);
        // S0 is used up before the first d is computed, so both share memory
        state = take_parts(arena, Kp > 2 * C ? Kp * W : 2 * C * W);
        deltas = state;
        faded = state.at(C * W);
        sums = arena.take<float>(2 * C * W);
        more = arena.take<float>(DEPTH * W);
        zeros = arena.take<float>(round_up(p.V, W));
        head = -1;
    }

    // Prepare everything that does not depend on the column. False if a number is not finite: a product would carry
    // it to earlier tokens. `of`: the number of this chunk; a q/k head's rows are kept for its next value head.
    bool prepare(const Problem& p, int64_t b, const int64_t* t, int tokens, int64_t hv, float A, const float* bias,
                 const Scratch* scratch, int64_t of) {
        count = tokens;
        depth = static_cast<int>(round_up(count, DEPTH));
        exact = one_part(p);
        const bool again = head == qk_head(p, hv) && chunk == of;
        V seen = vzero();
        head = -1;
        for (int i = 0; i < count; i += C_MAX) {
            const int n = count - i < C_MAX ? count - i : C_MAX;
            Token x[C_MAX];
            if (!again) read_keys(p, b, t + i, n, hv, scratch, x);
            read_gates(p, b, t + i, n, hv, A, bias, scratch, x, beta + i);
            for (int c = 0; c < n; ++c) {
                alpha[i + c] = x[c].alpha;
                seen = watch(seen, vset(beta[i + c] + x[c].alpha));
                if (!again) seen = add_row(p, x[c], i + c, seen);
            }
        }
        if (!(vsum(seen) == 0.0f)) return false;
        if (!again) finish_rows();
        fade();
        head = qk_head(p, hv);
        chunk = of;
        return true;
    }

    // How many of these tokens a chunk should have.
    static int worthwhile(const Problem& p, int tokens) {
        const int rest = tokens % DEPTH;
        return rest < (one_part(p) ? MATRIX_LEAST : MATRIX_LEAST_TWO_PARTS) ? tokens - rest : tokens;
    }

    // Rows of `count` tokens, by the task's first column.
    struct Rows {
        DType dtype;
        char* at[C];
    };

    // Advance the panels S [panels][K][W] of the state over rows of v and o, in whole panels. `fetch` is called for
    // each of the next C tokens while this core multiplies.
    template <class F>
    void take(const Problem& p, float* S, int64_t panels, Rows& v, const Rows& o, F&& fetch) {
        if (count < depth)
            for (int64_t i = 0; i < panels * W; i += L) vstore(zeros + i, vzero());
        for (int t = count; t < depth; ++t) v.at[t] = reinterpret_cast<char*>(zeros);
        if (exact)
            take_as<1>(p, S, panels, v, o, fetch);
        else
            take_as<2>(p, S, panels, v, o, fetch);
    }

  private:
    static bool one_part(const Problem& p) { return p.k.dtype == DType::bf16 && p.q.dtype == DType::bf16; }

    int64_t Kp;  // channels, padded to whole products
    float* k;  // [C][Kp]: k_t
    Parts rows;  // [2 depth][Kp]: k_t, then q_t
    Parts written;  // [Kp][depth]: k transposed
    Parts columns;  // [depth / W][Kp / 2][W][2]: k transposed, as a right factor
    float* kk;  // [2][C][C]: k_t . k_s, q_t . k_s
    Parts lower;  // [C][C]: L
    Parts attention;  // [C][C]: A
    float* diagonal;  // [C][DEPTH]: L inside each block
    float* solved;  // [TILE][W]: d of the upper half of a block
    Parts state;  // [Kp / 2][W][2]: S0
    Parts deltas;  // [C / 2][W][2]: d
    Parts faded;  // the same, each times `fading`
    float* sums;  // [2 depth][W]: S0^T k_t, S0^T q_t
    float* more;  // [DEPTH][W]: one product
    float* zeros;  // [panels W]
    float beta[C + C_MAX], alpha[C + C_MAX];
    float k_factor[C], q_factor[C];  // from the L2 norm and the scale
    float read_factor[C], out_factor[C], fading[C], faded_by;
    int count, depth;  // tokens, and the same padded to whole products
    bool exact;
    int64_t head = -1, chunk = -1;  // the head and chunk whose rows are kept

    // x, n numbers in whole vectors, zero beyond n
    AD_INLINE V load_to(const float* x, int64_t i, int64_t n) { return i < n ? vload(x + i) : vzero(); }

    V add_row(const Problem& p, const Token& x, int t, V seen) {
        const int64_t n = round_up(p.K, L);
        const Parts k_row = rows.at(t * Kp), q_row = rows.at((depth + t) * Kp);
        for (int64_t i = 0; i < Kp; i += 2 * L) {
            const V k0 = load_to(x.k, i, n), k1 = load_to(x.k, i + L, n);
            const V q0 = load_to(x.q, i, n), q1 = load_to(x.q, i + L, n);
            seen = watch(seen, vadd(vadd(k0, k1), vadd(q0, q1)));
            vstore(k + t * Kp + i, k0);
            vstore(k + t * Kp + i + L, k1);
            store_row(k_row.at(i), k0, k1);
            store_row(q_row.at(i), q0, q1);
        }
        k_factor[t] = x.k_factor;
        q_factor[t] = x.q_factor;
        return watch(watch(seen, vset(x.k_factor)), vset(x.q_factor));
    }
    void store_row(Parts to, V a, V b) const {
        if (exact)
            store_parts<false, 1>(to, a, b);
        else
            store_parts<false, 2>(to, a, b);
    }

    void clear_rows(Parts x, int64_t from, int64_t to) const {
        for (int64_t i = from * Kp; i < to * Kp; ++i) x.high[i] = x.low[i] = bf16{0};
    }

    void finish_rows() {
        clear_rows(rows, count, depth);
        clear_rows(rows, depth + count, 2 * depth);
        for (int64_t i = count * Kp; i < depth * Kp; i += L) vstore(k + i, vzero());
        for (int s = count; s < depth; ++s) k_factor[s] = 0.0f;
        if (exact)
            transpose_keys<1>(), multiply_keys<1>();
        else
            transpose_keys<2>(), multiply_keys<2>();
    }

    template <int PARTS>
    void transpose_keys() {
        transpose_columns<PARTS>();
        transpose_written<PARTS>();
    }

    // columns: per token a row of pairs of channels, L of them transposed
    template <int PARTS>
    void transpose_columns() {
        for (int64_t s = 0; s < depth; s += L)
            for (int64_t i = 0; i < Kp; i += 2 * L) {
                V high[L], low[L];
        AD_UNROLL for (int r = 0; r < L; ++r) {
                    const float* x = k + (s + r) * Kp + i;
                    row_parts<false, PARTS>(high[r], low[r], vload(x), vload(x + L));
                }
                const Parts to = columns.at((s / W * Kp + i) * W + s % W * 2);
                store_transposed(to.high, high, 2 * W);
                if (PARTS == 2) store_transposed(to.low, low, 2 * W);
            }
    }
    // written: per two tokens a row of pairs, one pair for each channel
    template <int PARTS>
    void transpose_written() {
        for (int64_t s = 0; s < depth; s += 2 * L)
            for (int64_t i = 0; i < Kp; i += L) {
                V high[L], low[L];
                AD_UNROLL for (int r = 0; r < L; ++r) {
                    const float* x = k + (s + 2 * r) * Kp + i;
                    row_parts<true, PARTS>(high[r], low[r], vload(x), vload(x + Kp));
                }
                store_transposed(written.high + i * depth + s, high, depth);
                if (PARTS == 2) store_transposed(written.low + i * depth + s, low, depth);
            }
    }
    template <bool pairs, int PARTS>
    AD_INLINE void row_parts(V& high, V& low, V a, V b) {
        alignas(64) bf16 x[2][2 * L];
        store_parts<pairs, PARTS>({x[0], x[1]}, a, b);
        high = vload(reinterpret_cast<const float*>(x[0]));
        if (PARTS == 2) low = vload(reinterpret_cast<const float*>(x[1]));
    }
    AD_INLINE void store_transposed(bf16* to, V (&x)[L], int64_t ld) {
        transpose(x);
        AD_UNROLL for (int r = 0; r < L; ++r) vstore(reinterpret_cast<float*>(to + r * ld), x[r]);
    }

    // kk: blocks by panels of tokens, only those in the triangle
    template <int PARTS>
    void multiply_keys() {
        for (int which = 0; which < 2; ++which)
            for (int64_t r = 0; r < depth; r += DEPTH)
                for (int64_t s = 0; s < r + DEPTH; s += W)
                    product<PARTS, PARTS>(kk + (which * C + r) * C + s, C, rows.at((which * depth + r) * Kp), Kp,
                                             columns.at(s * Kp), Kp);
    }

    // L, A and the factors of rows, from the products of decays m_s = a_(s+1) .. a_t
    void fade() {
        alignas(64) float m[C] = {}, l[C] = {}, a[C] = {}, one[2 * L] = {};
        one[L] = 1.0f;  // read from L - t on, it is the t-th unit vector
        float all = 1.0f;
        for (int t = 0; t < count; ++t) {
            const V decay = vset(alpha[t]);
            all *= alpha[t];
            const int first = t / L * L, whole = first + L;
            for (int s = 0; s < first; s += L) vstore(m + s, vmul(decay, vload(m + s)));
            vstore(m + first, vfma(decay, vload(m + first), vload(one + L - (t - first))));
            read_factor[t] = all * k_factor[t];
            out_factor[t] = all * q_factor[t];
            const V l_factor = vset(beta[t] * k_factor[t]), a_factor = vset(q_factor[t]);
            const float *kk_row = kk + t * C, *qk_row = kk + (C + t) * C;
            for (int s = 0; s < whole; s += L) {
                const V mk = vmul(vload(m + s), vload(k_factor + s));
                // one factor at a time: the product of two factors of long keys may underflow float32
                vstore(l + s, vmul(vmul(l_factor, vload(kk_row + s)), mk));
                vstore(a + s, vmul(vmul(a_factor, vload(qk_row + s)), mk));
            }
            store_triangle(t, l, a);
        }
        for (int s = 0; s < count; ++s) fading[s] = m[s] * k_factor[s];
        faded_by = all;
        clear_triangle();
    }

    // Row t of L and A, zero after its last vector
    void store_triangle(int t, const float* l, const float* a) {
        for (int s = 0; s < depth; s += 2 * L) {
            store_parts<false, 2>(lower.at(t * C + s), vload(l + s), vload(l + s + L));
            store_parts<false, 2>(attention.at(t * C + s), vload(a + s), vload(a + s + L));
        }
        const int first = t / DEPTH * DEPTH;
        for (int s = 0; s < DEPTH; s += L) vstore(diagonal + t * DEPTH + s, vload(l + first + s));
    }
    void clear_triangle() {
        for (int t = count; t < depth; ++t) {
            beta[t] = read_factor[t] = out_factor[t] = 0.0f;
            for (int s = 0; s < C; ++s)
                lower.high[t * C + s] = lower.low[t * C + s] = attention.high[t * C + s] = attention.low[t * C + s] = bf16{0};
            for (int s = 0; s < DEPTH; s += L) vstore(diagonal + t * DEPTH + s, vzero());
        }
        for (int s = count; s < depth; ++s) fading[s] = 0.0f;
    }

    // The time of a panel depends on the memory that it moves through L1 (48 KiB on CPUs with AMX). So buffers are
    // small, are reused while they are in L1, and are read once.
    template <int PARTS, class F>
    void take_as(const Problem& p, float* S, int64_t panels, const Rows& v, const Rows& o, F&& fetch) {
        Pieces fetched{C, panels * (2 * depth / (2 * TILE)) * (Kp / DEPTH)};
        const auto meanwhile = [&] { fetched.next(fetch); };
        for (int64_t panel = 0; panel < panels; ++panel, S += p.K * W) {
            split_state(p, S);
            for (int64_t r = 0; r < 2 * depth; r += 2 * TILE)
                product<PARTS, 2>(sums + r * W, W, rows.at(r * Kp), Kp, state, Kp, meanwhile);
            if (v.dtype == DType::f32)
                solve<float>(p, v, panel);
            else if (v.dtype == DType::bf16)
                solve<bf16>(p, v, panel);
            else
                solve<f16>(p, v, panel);
            if (o.dtype == DType::f32)
                write_outputs<float>(o, panel);
            else if (o.dtype == DType::bf16)
                write_outputs<bf16>(o, panel);
            else
                write_outputs<f16>(o, panel);
            advance_state<PARTS>(p, S);
        }
    }

    // Work in `count` pieces, spread over `steps` calls of next.
    struct Pieces {
        int64_t count, steps, step = 0, done = 0;
        template <class F>
        AD_ALWAYS_INLINE void next(F&& f) {
            for (const int64_t due = count * ++step / steps; done < due; ++done) f(done);
        }
    };

    // S0 as parts
    void split_state(const Problem& p, const float* S) {
        for (int64_t i = 0; i < Kp; i += 2) {
            if (i % DEPTH == 0) stay_awake();
            AD_UNROLL for (int j = 0; j < W; j += L)
                store_parts<true, 2>(state.at(i * W + 2 * j), i < p.K ? vload(S + i * W + j) : vzero(),
                                     i + 1 < p.K ? vload(S + (i + 1) * W + j) : vzero());
        }
    }

    template <class T>
    void solve(const Problem& p, const Rows& v, int64_t panel) {
        for (int r = 0; r < depth; r += DEPTH) {
            if (r > 0) product<2, 2>(more, W, lower.at(r * C), C, deltas, r);
            for (int j = 0; j < W; j += L) {
                const int64_t column = panel * W + j;
                solve_tile<T, false>(r, v, column, j);
                solve_tile<T, true>(r + TILE, v, column, j);
            }
        }
    }

    // o = R + sum A_ts d_s
    template <class T>
    void write_outputs(const Rows& o, int64_t panel) {
        for (int r = 0; r < depth; r += DEPTH) {
            product<2, 2>(more, W, attention.at(r * C), C, deltas, r + DEPTH);
            const int end = r + DEPTH < count ? r + DEPTH : count;
            for (int t = r; t < end; ++t) {
                const float *R = sums + (depth + t) * W, *inside = more + (t - r) * W;
                T* to = reinterpret_cast<T*>(o.at[t]) + panel * W;
                AD_UNROLL for (int j = 0; j < W; j += L) vstore(to + j, vfma(vset(out_factor[t]), vload(R + j), vload(inside + j)));
            }
        }
    }

    // S_C = Gamma_C S0 + sum w_s d_s^T
    template <int PARTS>
    void advance_state(const Problem& p, float* S) {
        const V gamma = vset(faded_by);
        for (int64_t r = 0; r < p.K; r += 2 * TILE) {
            product<PARTS, 2>(more, W, written.at(r * depth), depth, faded, depth);
            const int64_t n = p.K - r < 2 * TILE ? p.K - r : 2 * TILE;
            for (int64_t i = 0; i < n * W; i += L) vstore(S + r * W + i, vfma(gamma, vload(S + r * W + i), vload(more + i)));
        }
    }

    // d of TILE tokens from r on (the upper or lower half of a block), L columns from j on. Each d is subtracted from
    // all later tokens as soon as it is known.
    template <class T, bool lower_half>
    void solve_tile(int r, const Rows& v, int64_t column, int j) {
        constexpr int above = lower_half ? TILE : 0;
        stay_awake();
        V d[TILE];
        AD_UNROLL for (int t = 0; t < TILE; ++t) {
            const V predicted = vmul(vset(read_factor[r + t]), vload(sums + (r + t) * W + j));
            d[t] = vmul(vset(beta[r + t]), vsub(vload(reinterpret_cast<const T*>(v.at[r + t]) + column), predicted));
            if (r >= DEPTH) d[t] = vsub(d[t], vload(more + (above + t) * W + j));
        }
        const float* coefficients = diagonal + r * DEPTH;
        if (lower_half)
            for (int s = 0; s < TILE; ++s) {
                const V x = vload(solved + s * W + j);
                AD_UNROLL for (int t = 0; t < TILE; ++t) d[t] = vfnma(vset(coefficients[t * DEPTH + s]), x, d[t]);
            }
        AD_UNROLL for (int s = 0; s < TILE; ++s)
            AD_UNROLL for (int t = s + 1; t < TILE; ++t)
                d[t] = vfnma(vset(coefficients[t * DEPTH + above + s]), d[s], d[t]);
        if (!lower_half) AD_UNROLL for (int t = 0; t < TILE; ++t) vstore(solved + t * W + j, d[t]);
        AD_UNROLL for (int t = 0; t < TILE; t += 2) {
            const Parts to = deltas.at((r + t) * W + 2 * j);
            store_parts<true, 2>(to, d[t], d[t + 1]);
            store_parts<true, 2>(faded.at((r + t) * W + 2 * j), vmul(vset(fading[r + t]), d[t]),
                                 vmul(vset(fading[r + t + 1]), d[t + 1]));
        }
    }
};

}  // namespace anydelta::ANYDELTA_ISA
