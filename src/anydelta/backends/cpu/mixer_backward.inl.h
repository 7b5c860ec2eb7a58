// Gradients of the mixer's parts around the rule (mixer.inl.h), for the value heads of one q/k head of one sequence.
// backward.inl.h asks it for rows of q, k, v and do, one block of tokens at a time, and passes dq, dk and dv to it.
// With dX the gradient of X, y the convolution before the activation, n = f o, f = 1 / sqrt(mean o^2 + eps):
//
//     dn_t = d_out_t gate(z_t)     dz_t = d_out_t n_t w gate'(z_t)     dw = sum_t dn_t n_t
//     do_t = f (w dn_t - n_t mean(n_t w dn_t))
//     dy_t = dq_t silu'(y_t)      dtaps_j = sum_t dy_t x_(t - W + 1 + j)      dbias = sum_t dy_t
//     dx_t = sum_j taps_(W - 1 - j) dy_(t + j)      a convolution with reversed taps, over this block and what
//                                                   remains of the W - 1 tokens after it
//
// Only the inputs of the forward pass are kept: o and y are computed again, block by block.
#pragma once
#include "backward.h"
#include "mixer.inl.h"

namespace anydelta::ANYDELTA_ISA {

constexpr int BT = 16;  // tokens of a block: a BT x BT matrix has whole rows of vectors in every ISA

// d sigmoid(x) / dx = e / (1 + e)^2 with e = exp(-|x|), which subtracts no nearly equal numbers
AD_INLINE V vsigmoid_slope(V x) {
    const V e = vexp(vneg_abs(x)), t = vdiv(vset(1.0f), vadd(e, vset(1.0f)));
    return vmul(e, vmul(t, t));
}
// d silu(y) / dy = s (1 + y (1 - s)), s = sigmoid(y)
AD_INLINE V vsilu_slope(V y, V s) { return vmul(s, vfma(y, vsub(vset(1.0f), s), vset(1.0f))); }

// d [count][n] = dy silu'(y) of consecutive tokens, from their inputs x [TAPS - 1 + count][n], oldest first. Adds to
// d_taps [TAPS][n] and d_bias [n]. Rows are whole vectors.
template <int TAPS>
static void conv_back(float* d, const float* const* dy, const float* const* x, int64_t count, int64_t n,
                      const float* taps, int64_t ld, const float* bias, int64_t taps_given, bool silu, float* d_taps,
                      float* d_bias) {
    const int64_t W_ = TAPS ? TAPS : taps_given;
    for (int64_t i = 0; i < n; i += L) {
        const V b = bias ? vload(bias + i) : vzero();
        V w[TAPS ? TAPS : 1], in[TAPS ? TAPS : 1], sum[TAPS ? TAPS : 1], more = vzero();
    AD_UNROLL for (int j = 0; j < TAPS; ++j) w[j] = vload(taps + j * ld + i), sum[j] = vzero();
        AD_UNROLL for (int j = 0; j + 1 < TAPS; ++j) in[j] = vload(x[j] + i);
        for (int64_t t = 0; t < count; ++t) {
            V y = b, g = vload(dy[t] + i);
            if (TAPS) {
                in[TAPS ? TAPS - 1 : 0] = vload(x[t + TAPS - 1] + i);
                AD_UNROLL for (int j = 0; j < TAPS; ++j) y = vfma(w[j], in[j], y);
            } else {
                for (int64_t j = 0; j < W_; ++j) y = vfma(vload(taps + j * ld + i), vload(x[t + j] + i), y);
            }
            if (silu) g = vmul(g, vsilu_slope(y, vsigmoid(y)));
            vstore(d + t * n + i, g);
            more = vadd(more, g);
            if (TAPS) {
                AD_UNROLL for (int j = 0; j < TAPS; ++j) sum[j] = vfma(g, in[j], sum[j]);
                AD_UNROLL for (int j = 0; j + 1 < TAPS; ++j) in[j] = in[j + 1];
            } else {
                for (int64_t j = 0; j < W_; ++j)
                    vstore(d_taps + j * n + i, vfma(g, vload(x[t + j] + i), vload(d_taps + j * n + i)));
            }
        }
        AD_UNROLL for (int j = 0; j < TAPS; ++j)
            vstore(d_taps + j * n + i, vadd(vload(d_taps + j * n + i), sum[j]));
        vstore(d_bias + i, vadd(vload(d_bias + i), more));
    }
}

class Around {
  public:
    // `job` and `seq` are the runner's; `positions` of the live tokens, if there is a mask.
    void carve(const AroundBackward& mixer, const BackwardTask& task, Arena& arena) {
        g = &mixer, m = &mixer.m, job = &task;
        conv.carve(mixer.m, task.h, 1, BT, arena);
        taps = m->W;
        rows_ = (BT < taps - 1 ? taps - 1 : BT) + taps - 1;
        Vp = round_up(m->rule.V, L);
        width = Convolution::width_of(*m);
        back = arena.take<float>(taps * conv.ld);
        d = arena.take<float>(rows_ * conv.ld);
        d_taps = arena.take<float>(taps * conv.ld);
        d_bias = arena.take<float>(conv.ld);
        d_window = arena.take<float>(m->S * conv.ld);
        out = arena.take<float>(BT * width);
        norm_weight = arena.take<float>(Vp);
        d_norm = arena.take<float>(conv.r * Vp);
        line = arena.take<float>(4 * Vp);
        inputs = arena.take<int64_t>(BT + taps - 1);
        pointers = arena.take<const void*>(BT + taps - 1);
    }

    void begin(const Sequence& sequence, const int64_t* live, int64_t tokens) {
        seq = &sequence, positions = live, count = tokens;
        const auto clear = [&](float* x, int64_t n) { std::memset(x, 0, static_cast<size_t>(n) * 4); };
        clear(d, rows_ * conv.ld);
        clear(d_taps, taps * conv.ld);
        clear(d_bias, conv.ld);
        clear(d_norm, conv.r * Vp);
        clear(d_window, m->S * conv.ld);
        if (seq->row_in < 0) return;
        conv.load_parameters();
        for (int64_t j = 0; j < taps; ++j)
            std::memcpy(back + j * conv.ld, conv.taps + (taps - 1 - j) * conv.ld, static_cast<size_t>(conv.ld) * 4);
        conv.load_windows(conv.past, m->conv, seq->row_in);
        if (g->d_final.data) conv.load_windows(d_window, g->d_final, job->n);
        if (m->norm) load_norm(*m, norm_weight);
    }

    // Write zero gradients for a token that nothing reads.
    void zero(int64_t t) {
        conv.each_head([&](const Convolved& c, int64_t head, int64_t) {
            zero_row(c.x == &m->q ? g->d_q : c.x == &m->k ? g->d_k : g->d_v, t, head, c.width);
            if (c.x == &m->v && gated()) zero_row(g->d_z, t, head, c.width);
        });
    }

    // Rows of q (which 0), k (1) or value head u (2): `n` live tokens, the `first`-th and later, to `to` [n][ld]
    void rows(int64_t which, int64_t u, int64_t first, int64_t n, float* to, int64_t ld) {
        for (int64_t j = 0; j < n; j += C_MAX) {
            const int64_t some = n - j < C_MAX ? n - j : C_MAX;
            float* dst[C_MAX];
            for (int64_t t = 0; t < some; ++t) dst[t] = to + (j + t) * ld;
            find(first + j, some);
            conv.run(conv.part[which], seq->b, seq->end, inputs, some, head_of(which, u), u, dst);
        }
    }

    // do of value head u, of `n` live tokens from the `first`-th on, and their dz: from o [..][BT][W], to
    // panels [..][rows][W].
    void outputs(int64_t u, int64_t first, int64_t n, const float* o, float* d_o, int64_t rows) {
        float *y = line, *dy = line + Vp, *z = line + 2 * Vp, *dz = line + 3 * Vp;
        const Problem& p = m->rule;
        const int64_t hv = conv.value_head(u), V_ = p.V, columns = round_up(V_, W);
        for (int64_t i = V_; i < Vp; ++i) dy[i] = z[i] = 0.0f;
        for (int64_t t = 0; t < n; ++t) {
            const int64_t at = position(first + t);
            read_row(dy, grouped(g->d_o, seq->b, at, hv, V_), g->d_o.dtype, V_);
            if (gated()) read_row(z, grouped(m->z, seq->b, at, hv, V_), m->z.dtype, V_);
            if (m->norm) normed_back(o + t * W, y, dy, z, dz, d_norm + u * Vp);
            for (int64_t i = 0; i < columns; i += L)
                vstore(d_o + (i / W * rows + t) * W + i % W, i < Vp ? vload(dy + i) : vzero());
            if (gated()) write(g->d_z, at, hv, dz, V_);
        }
        for (int64_t t = n; t < BT; ++t)
            for (int64_t i = 0; i < columns; i += L) vstore(d_o + (i / W * rows + t) * W + i % W, vzero());
    }

    // From the gradients dy of `n` live tokens of q, k or value head u, the `first`-th and later: the gradients
    // of the inputs, and contributions to those of the parameters. Blocks come last to first; all except the
    // last have BT tokens.
    void inputs_back(int64_t which, int64_t u, int64_t first, int64_t n, const float* dy, int64_t ldy) {
        const Convolved& c = conv.part[which];
        const int64_t at = c.at + u * c.padded;
        float* mine = d + at * rows_;
        std::memmove(mine + n * c.padded, mine, static_cast<size_t>((taps - 1) * c.padded) * 4);
        find(first, n);
        gather(c, taps - 1 + n, head_of(which, u), u);
        const float* given[BT];
        for (int64_t t = 0; t < n; ++t) given[t] = dy + t * ldy;
        const float* const* x = reinterpret_cast<const float* const*>(conv.pointers);
        const float *w = conv.taps + at, *bias = m->bias ? conv.bias + at : nullptr;
        float *to_taps = d_taps + at * taps, *to_bias = d_bias + at;
        if (taps == FEW_TAPS)
            conv_back<FEW_TAPS>(mine, given, x, n, c.padded, w, conv.ld, bias, taps, m->silu, to_taps, to_bias);
        else
            conv_back<0>(mine, given, x, n, c.padded, w, conv.ld, bias, taps, m->silu, to_taps, to_bias);
        taps_back(c, u, n);
        const GroupedTokens& to = which == 0 ? g->d_q : which == 1 ? g->d_k : g->d_v;
        for (int64_t t = 0; t < n; ++t) {
            float* row = out + t * width;
            add_window(row, c, at, first + t);
            write(to, position(first + t), head_of(which, u), row, c.width);
        }
    }

    // The remaining gradients, when all tokens are done.
    void end() {
        const int64_t C = 2 * m->rule.H * m->rule.K + m->rule.HV * m->rule.V, S = m->S, past = taps - 1;
        conv.each_head([&](const Convolved& c, int64_t head, int64_t u) {
            const int64_t at = c.at + u * c.padded, channel = job->n * C + c.first + head * c.width;
            for (int64_t j = 0; j < taps; ++j)
                for (int64_t i = 0; i < c.width; ++i)
                    g->d_weight[(channel + i) * taps + j] = d_taps[at * taps + j * c.padded + i];
            if (g->d_bias) std::memcpy(g->d_bias + channel, d_bias + at, static_cast<size_t>(c.width) * 4);
            if (c.x == &m->v && g->d_norm)
                std::memcpy(g->d_norm + (job->n * m->rule.HV + head) * c.width, d_norm + u * Vp,
                            static_cast<size_t>(c.width) * 4);
            if (!g->d_conv) return;
            // the state's last columns are tokens before the first, which have no outputs here
            float* mine = d + at * rows_;
            std::memmove(mine + past * c.padded, mine, static_cast<size_t>(past * c.padded) * 4);
            std::memset(mine, 0, static_cast<size_t>(past * c.padded) * 4);
            for (int64_t s = 0; s < S; ++s) {
                std::memset(out, 0, static_cast<size_t>(c.padded) * 4);
                if (seq->row_in >= 0) {
                    if (s >= S - past) taps_back(c, u, 1, s - (S - past));
                    add_window(out, c, at, s - S);
                }
                for (int64_t i = 0; i < c.width; ++i) g->d_conv[(channel + i) * S + s] = out[i];
            }
        });
    }

  private:
    const AroundBackward* g;
    const Mixer* m;
    const BackwardTask* job;
    const Sequence* seq;
    const int64_t* positions;
    int64_t count, Vp, width, taps, rows_;
    Convolution conv;
    float* back;            // [taps][ld]: the taps of the convolution, reversed
    float* d;               // per head [rows_][padded]: dy of a block, then of the taps - 1 tokens after it
    float* d_taps;          // per head [taps][padded]
    float* d_bias;          // [ld]
    float* d_window;        // [S][ld]: the gradient of the final conv state
    float* out;             // [BT][width]
    float* norm_weight;     // [Vp]
    float* d_norm;          // [value heads][Vp]
    float* line;            // [4][Vp]
    int64_t* inputs;        // [taps - 1 + BT], as Convolution::gather reads them
    const void** pointers;  // [taps - 1 + BT]

    bool gated() const { return m->norm && m->gate != NormGate::none; }
    int64_t position(int64_t i) const { return positions ? positions[i] : seq->start + i; }
    int64_t head_of(int64_t which, int64_t u) const { return which < 2 ? job->h : conv.value_head(u); }

    void zero_row(const GroupedTokens& x, int64_t t, int64_t head, int64_t n) const {
        std::memset(const_cast<void*>(grouped(x, seq->b, t, head, n)), 0, static_cast<size_t>(n * dtype_size(x.dtype)));
    }
    void write(const GroupedTokens& x, int64_t t, int64_t head, const float* from, int64_t n) const {
        write_row(const_cast<void*>(grouped(x, seq->b, t, head, n)), x.dtype, from, n);
    }

    // The inputs of `n` live tokens from the `first`-th on.
    void find(int64_t first, int64_t n) {
        for (int64_t j = 0; j < taps - 1 + n; ++j) {
            const int64_t i = first - (taps - 1) + j;
            inputs[j] = i >= 0 ? position(i) : -1 - (m->S + i);
        }
    }
    // The same as whole float32 vectors, under conv.pointers.
    void gather(const Convolved& c, int64_t rows, int64_t head, int64_t u) {
        const DType dtype = conv.gather(c, seq->b, inputs, rows, head, u);
        if (dtype == DType::f32 && c.width == c.padded) return;
        for (int64_t r = rows - 1; r >= 0; --r) {  // last to first: rows of `steps` move up
            float* row = conv.steps + r * width;
            if (conv.pointers[r] != row) read_row(row, conv.pointers[r], inputs[r] < 0 ? DType::f32 : dtype, c.width);
            for (int64_t i = c.width; i < c.padded; ++i) row[i] = 0.0f;
            conv.pointers[r] = row;
        }
    }

    // out [n][width] = dx of `n` tokens of a head, from row `first` of its d on
    void taps_back(const Convolved& c, int64_t u, int64_t n, int64_t first = 0) {
        const int64_t at = c.at + u * c.padded;
        const float* mine = d + at * rows_ + first * c.padded;
        float* dst[BT];
        for (int64_t t = 0; t < taps - 1 + n; ++t) pointers[t] = mine + t * c.padded;
        for (int64_t t = 0; t < n; ++t) dst[t] = out + t * width;
        conv_rows_as<float>(dst, pointers, n, c.width, back + at, conv.ld, nullptr, taps, false, 0);
    }
    // Add the final conv state's gradient to live token i, or to a column of the state before the call.
    void add_window(float* row, const Convolved& c, int64_t at, int64_t i) const {
        const int64_t column = i - (count - m->S);
        if (!g->d_final.data || column < 0) return;
        for (int64_t j = 0; j < c.width; ++j) row[j] += d_window[column * conv.ld + at + j];
    }

    // In place: dy is d_out, then do. `o` is in panels.
    void normed_back(const float* o, float* y, float* dy, const float* z, float* dz, float* to_weight) const {
        for (int64_t i = 0; i < Vp; i += L) vstore(y + i, vload(o + i / W * BT * W + i % W));
        const float n = static_cast<float>(m->rule.V);
        float unit;
        const float* row = y;
        float f = inverse_length(row, Vp, n, m->norm_eps, y, unit);
        if (f == 0.0f) f = root(n), unit = 1.0f;  // a row of zeros without eps: as if its length were 1
        V dot = vzero();
        for (int64_t i = 0; i < Vp; i += L) {
            const V w = vload(norm_weight + i), x = vmul(vload(y + i), vset(f));
            V dn = vload(dy + i);
            if (gated()) {
                const V at = vload(z + i), s = vsigmoid(at), by_gate = vmul(dn, vmul(x, w));
                const bool silu = m->gate == NormGate::silu;
                vstore(dz + i, vmul(by_gate, silu ? vsilu_slope(at, s) : vsigmoid_slope(at)));
                dn = vmul(dn, silu ? vmul(at, s) : s);
            }
            vstore(to_weight + i, vfma(dn, x, vload(to_weight + i)));
            dn = vmul(dn, w);
            dot = vfma(dn, x, dot);
            vstore(dy + i, dn);
        }
        const V mean = vset(vsum(dot) / n), factor = vset(f);
        for (int64_t i = 0; i < Vp; i += L) {
            const V x = vmul(vload(y + i), factor), u = vfnma(x, mean, vload(dy + i));
            vstore(dy + i, vmul(vmul(u, factor), vset(unit)));
        }
    }
};

}  // namespace anydelta::ANYDELTA_ISA
