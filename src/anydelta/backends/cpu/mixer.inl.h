// The gated delta mixer on one CPU: causal convolution, gated delta rule and gated norm in one pass. The rule is that
// of rule.inl.h. This file makes its rows of q, k and v, and takes its outputs.
//
//     y_t   = silu(sum_j w[c, j] x_(t - W + 1 + j) + bias[c])     x_t: tokens, before them the columns of the conv state
//     o_t   = rule(q, k, v = split(y))                            rule.inl.h
//     out_t = o_t / sqrt(mean o_t^2 + eps) * norm_weight * gate(z_t)                           all in float32
//
// A task is a few heads of q and k of one sequence with all their value heads, so nothing is convolved twice (except
// q and k if a head of theirs serves more than MAX_HEADS value heads). q and k of 48 tokens are in scratch memory (24
// KiB per head at K = 128), v and o of a head in the rule's own: no row passes through memory on its way.
#pragma once
#include "mixer.h"
#include "rule.inl.h"

namespace anydelta::ANYDELTA_ISA {

constexpr int CHUNK = BATCH;  // tokens that the rule takes at once
constexpr int FEW_TAPS = 4;  // the convolution of every model family; others take the general loop
// Rows of consecutive tokens are 8 to 24 KiB apart, where no hardware prefetcher follows. A row is prefetched 6
// tokens before it is read, some 1000 cycles in the convolution.
constexpr int64_t TOKENS_AHEAD = 6;
static_assert(TOKENS_AHEAD == C_MAX, "a call of conv_rows fetches the rows of the next");

// Vectors that go through SiLU together, each hiding the latency of the others.
constexpr int TOGETHER = REGISTERS == 32 ? 3 : 2;
static_assert(C_MAX % TOGETHER == 0, "a full call of conv_rows has no remainder");

static const void* grouped(const GroupedTokens& x, int64_t b, int64_t t, int64_t head, int64_t width) {
    return element(x.data, x.dtype, b * x.b + t * x.t + head / x.per * x.g + head % x.per * width);
}

// As rule.inl.h's fetch: always inlined.
template <bool write>
AD_INLINE void fetch_row(const void* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64)
        if (write)
            AD_PREFETCH_WRITE(static_cast<const char*>(row) + i);
        else
            AD_PREFETCH(static_cast<const char*>(row) + i);
}

// ---------------------------------------------------------------------------------------------------------------
// columns of [channels, S] and [channels, W] arrays to rows, one per column, and back

template <class T>
static void rows_from(float* rows, int64_t ld, const T* x, int64_t stride_c, int64_t stride_s, int64_t n,
                      int64_t count) {
    if (stride_c == 1) {
        for (int64_t j = 0; j < count; ++j) read_as(rows + j * ld, x + j * stride_s, n);
    } else if (stride_s == 1 && stride_c == 4 && count == 4) {  // constants let the compiler use shuffles
        float *r0 = rows, *r1 = rows + ld, *r2 = r1 + ld, *r3 = r2 + ld;
        for (int64_t c = 0; c < n; ++c) {
            r0[c] = to_float(x[4 * c]);
            r1[c] = to_float(x[4 * c + 1]);
            r2[c] = to_float(x[4 * c + 2]);
            r3[c] = to_float(x[4 * c + 3]);
        }
    } else {
        for (int64_t c = 0; c < n; ++c)
            for (int64_t j = 0; j < count; ++j) rows[j * ld + c] = to_float(x[c * stride_c + j * stride_s]);
    }
}
template <class T>
static void rows_to(T* x, int64_t stride_c, int64_t stride_s, const float* rows, int64_t ld, int64_t n, int64_t count) {
    if (stride_c == 1) {
        for (int64_t j = 0; j < count; ++j) write_as(x + j * stride_s, rows + j * ld, n);
    } else if (stride_s == 1 && stride_c == 4 && count == 4) {
        const float *r0 = rows, *r1 = rows + ld, *r2 = r1 + ld, *r3 = r2 + ld;
        for (int64_t c = 0; c < n; ++c) {
            x[4 * c] = from_float(r0[c], T{});
            x[4 * c + 1] = from_float(r1[c], T{});
            x[4 * c + 2] = from_float(r2[c], T{});
            x[4 * c + 3] = from_float(r3[c], T{});
        }
    } else {
        for (int64_t c = 0; c < n; ++c)
            for (int64_t j = 0; j < count; ++j) x[c * stride_c + j * stride_s] = from_float(rows[j * ld + c], T{});
    }
}
static void read_rows(float* rows, int64_t ld, const void* x, DType dtype, int64_t stride_c, int64_t stride_s,
                      int64_t n, int64_t count) {
    if (dtype == DType::f32) return rows_from(rows, ld, static_cast<const float*>(x), stride_c, stride_s, n, count);
    if (dtype == DType::bf16) return rows_from(rows, ld, static_cast<const bf16*>(x), stride_c, stride_s, n, count);
    rows_from(rows, ld, static_cast<const f16*>(x), stride_c, stride_s, n, count);
}
static void write_rows(void* x, DType dtype, int64_t stride_c, int64_t stride_s, const float* rows, int64_t ld,
                       int64_t n, int64_t count) {
    if (dtype == DType::f32) return rows_to(static_cast<float*>(x), stride_c, stride_s, rows, ld, n, count);
    if (dtype == DType::bf16) return rows_to(static_cast<bf16*>(x), stride_c, stride_s, rows, ld, n, count);
    rows_to(static_cast<f16*>(x), stride_c, stride_s, rows, ld, n, count);
}

// ---------------------------------------------------------------------------------------------------------------
// the convolution of `count` <= C_MAX consecutive tokens: dst[t] [n] from the rows x[t] .. x[t + W - 1] [n], oldest
// first.
// taps [W][ld], bias [n] or null. The channels of a vector pass through all tokens in registers, so a row is read once.
// If n is not a whole number of vectors, the last one is read element by element; dst has room for it.

template <class T, int TAPS, int N>
AD_INLINE void conv_tokens(float* const* dst, const T* const* x, int64_t i, V* in, const V* w, const float* taps,
                           int64_t ld, int64_t taps_given, V bias, bool silu, int64_t ahead) {
    V y[N];
    AD_UNROLL for (int t = 0; t < N; ++t) {
        const T* row = x[t + taps_given - 1] + i;
        AD_PREFETCH(row + ahead);
        y[t] = bias;
        if (TAPS) {
            in[TAPS - 1] = vload(row);
            AD_UNROLL for (int j = 0; j < TAPS; ++j) y[t] = vfma(w[j], in[j], y[t]);
            AD_UNROLL for (int j = 0; j + 1 < TAPS; ++j) in[j] = in[j + 1];
        } else {
            for (int64_t j = 0; j < taps_given; ++j) y[t] = vfma(vload(taps + j * ld + i), vload(x[t + j] + i), y[t]);
        }
    }
    if (silu) silus<N>(y);
    AD_UNROLL for (int t = 0; t < N; ++t) vstore(dst[t] + i, y[t]);
}

template <class T, int TAPS>
static void conv_rows(float* const* dst, const T* const* x, int64_t count, int64_t n, const float* taps, int64_t ld,
                      const float* bias, int64_t taps_given, bool silu, int64_t ahead) {
    const int64_t W_ = TAPS ? TAPS : taps_given, whole = n / L * L;
    for (int64_t i = 0; i < whole; i += L) {
        const V b = bias ? vload(bias + i) : vzero();
        V w[TAPS ? TAPS : 1], in[TAPS ? TAPS : 1];
        AD_UNROLL for (int j = 0; j < TAPS; ++j) w[j] = vload(taps + j * ld + i);
        AD_UNROLL for (int j = 0; j + 1 < TAPS; ++j) in[j] = vload(x[j] + i);
        int64_t t = 0;
        for (; t + TOGETHER <= count; t += TOGETHER)
            conv_tokens<T, TAPS, TOGETHER>(dst + t, x + t, i, in, w, taps, ld, W_, b, silu, ahead);
        for (; t < count; ++t) conv_tokens<T, TAPS, 1>(dst + t, x + t, i, in, w, taps, ld, W_, b, silu, ahead);
    }
    if (whole == n) return;
    for (int64_t t = 0; t < count; ++t) {
        alignas(64) float y[L], sum[L] = {};
        for (int64_t c = whole; c < n; ++c) {
            sum[c - whole] = bias ? bias[c] : 0.0f;
            for (int64_t j = 0; j < W_; ++j) sum[c - whole] += taps[j * ld + c] * to_float(x[t + j][c]);
        }
        V v = vload(sum);
        if (silu) silus<1>(&v);
        vstore(y, v);
        for (int64_t c = whole; c < n; ++c) dst[t][c] = y[c - whole];
    }
}

template <class T>
static void conv_rows_as(float* const* dst, const void* const* rows, int64_t count, int64_t n, const float* taps,
                         int64_t ld, const float* bias, int64_t taps_given, bool silu, int64_t ahead) {
    const T* const* x = reinterpret_cast<const T* const*>(rows);
    if (taps_given == FEW_TAPS)
        return conv_rows<T, FEW_TAPS>(dst, x, count, n, taps, ld, bias, taps_given, silu, ahead);
    conv_rows<T, 0>(dst, x, count, n, taps, ld, bias, taps_given, silu, ahead);
}

// ---------------------------------------------------------------------------------------------------------------
// a task

struct Convolved {  // q, k or v: where its channels begin in the arrays and in a task's scratch rows
    const GroupedTokens* x;
    int64_t first, width, padded, at;
};

// The channels of `heads` heads of q and k of one sequence, from head h0 on, and of their value heads.
struct Convolution {
    const Mixer* m;
    int64_t h0, heads, r;   // r value heads per q/k head
    int64_t ld;             // length of the rows below: all channels
    Convolved part[3];
    float *taps, *bias;     // [W][ld], [ld]
    float* past;            // [S][ld]: the conv state before the call
    float* steps;           // [W - 1 + most][width]: tokens to convolve with float32 columns of the state
    const void** pointers;  // [W - 1 + most]

    static int64_t width_of(const Mixer& m) { return round_up(m.rule.K < m.rule.V ? m.rule.V : m.rule.K, L); }

    // A call convolves up to `most` tokens.
    void carve(const Mixer& mixer, int64_t first, int64_t count, int64_t most, Arena& arena) {
        m = &mixer, h0 = first, heads = count;
        const Problem& p = mixer.rule;
        r = p.HV / p.H;
        const int64_t Kp = round_up(p.K, L), Vp = round_up(p.V, L);
        part[0] = {&mixer.q, 0, p.K, Kp, 0};
        part[1] = {&mixer.k, p.H * p.K, p.K, Kp, heads * Kp};
        part[2] = {&mixer.v, 2 * p.H * p.K, p.V, Vp, 2 * heads * Kp};
        ld = heads * (2 * Kp + r * Vp);
        taps = arena.take<float>(m->W * ld);
        bias = arena.take<float>(ld);
        past = arena.take<float>(m->S * ld);
        steps = arena.take<float>((m->W - 1 + most) * width_of(mixer));
        pointers = arena.take<const void*>(m->W - 1 + most);
    }

    // The place of value head hv among these.
    int64_t local(int64_t hv) const {
        const Problem& p = m->rule;
        return p.tiled ? (hv % p.H - h0) * r + hv / p.H : hv - h0 * r;
    }
    // The value head at a place among these.
    int64_t value_head(int64_t i) const { return m->rule.tiled ? h0 + i / r + i % r * m->rule.H : h0 * r + i; }

    template <class F>
    void each_head(F&& f) const {
        for (int64_t i = 0; i < heads; ++i) f(part[0], h0 + i, i), f(part[1], h0 + i, i);
        for (int64_t i = 0; i < heads * r; ++i) f(part[2], value_head(i), i);
    }

    char* window_at(const Windows& x, int64_t slot, int64_t n, int64_t channel) const {
        return static_cast<char*>(x.data) + (slot * x.slot + n * x.n + channel * x.c) * dtype_size(x.dtype);
    }
    // Copy the columns of a row of conv states to [S][ld].
    void load_windows(float* to, const Windows& x, int64_t row) const {
        each_head([&](const Convolved& c, int64_t head, int64_t i) {
            const int64_t channel = c.first + head * c.width, at = c.at + i * c.padded;
            read_rows(to + at, ld, window_at(x, 0, row, channel), x.dtype, x.c, x.s, c.width, m->S);
        });
    }
    void load_parameters() const {
        each_head([&](const Convolved& c, int64_t head, int64_t i) {
            const int64_t channel = c.first + head * c.width, at = c.at + i * c.padded;
            read_rows(taps + at, ld, element(m->weight, m->weight_dtype, channel * m->weight_c), m->weight_dtype,
                      m->weight_c, m->weight_w, c.width, m->W);
            if (m->bias) read_row(bias + at, element(m->bias, m->bias_dtype, channel), m->bias_dtype, c.width);
        });
    }

    // Set `pointers` to the inputs of one head of q, k or v. `in` names them: a token >= 0, or -1 - column of the
    // conv state. Returns their type.
    DType gather(const Convolved& c, int64_t b, const int64_t* in, int64_t rows, int64_t head, int64_t i) const {
        const int64_t at = c.at + i * c.padded;
        const DType dtype = c.x->dtype;
        const bool widened = in[0] < 0 && dtype != DType::f32;  // half tokens after float32 columns of the state
        const char* base = static_cast<const char*>(grouped(*c.x, b, 0, head, c.width));
        const int64_t stride = c.x->t * dtype_size(dtype);
        for (int64_t r = 0, step = 0; r < rows; ++r) {
            pointers[r] = in[r] >= 0 ? static_cast<const void*>(base + in[r] * stride) : past + at + (-1 - in[r]) * ld;
            if (!widened || in[r] < 0) continue;
            float* row = steps + step++ * width_of(*m);
            read_row(row, pointers[r], dtype, c.width);
            pointers[r] = row;
        }
        return widened ? DType::f32 : dtype;
    }

    // y_t of one head of q, k or v, for `count` tokens of row b with the inputs `in` [W - 1 + count]. Tokens before
    // `end` are prefetched.
    void run(const Convolved& c, int64_t b, int64_t end, const int64_t* in, int64_t count, int64_t head, int64_t i,
             float* const* dst) const {
        const int64_t at = c.at + i * c.padded, rows = m->W - 1 + count;
        const DType dtype = gather(c, b, in, rows, head, i);
        const int64_t last = in[rows - 1] + TOKENS_AHEAD;
        const int64_t ahead = dtype != c.x->dtype || last >= end ? 0 : TOKENS_AHEAD * c.x->t;
        const float *w = taps + at, *offset = m->bias ? bias + at : nullptr;
        if (dtype == DType::f32)
            return conv_rows_as<float>(dst, pointers, count, c.width, w, ld, offset, m->W, m->silu, ahead);
        if (dtype == DType::bf16)
            return conv_rows_as<bf16>(dst, pointers, count, c.width, w, ld, offset, m->W, m->silu, ahead);
        conv_rows_as<f16>(dst, pointers, count, c.width, w, ld, offset, m->W, m->silu, ahead);
    }
};

struct MixerScratch {
    float* window;        // [S][width]: a conv state to be written
    float *q, *k;         // [CHUNK][heads][K]
    float* norm_weight;   // [V]
    int64_t* inputs;      // [W - 1 + CHUNK] before and in the chunk: live token t >= 0, or -1 - column of the conv state;
                          // at the end [S]: the last live tokens, the latest first
    int64_t* order;       // [CHUNK]: the number of a live token among the chunk's live tokens
    char* rule;           // the rule's scratch memory
};

// The norm's weight, or ones without a weight, readable to the next whole vector.
static void load_norm(const Mixer& m, float* weight) {
    for (int64_t i = 0; i < round_up(m.rule.V, L); ++i) weight[i] = 1.0f;
    if (m.norm_weight) read_row(weight, m.norm_weight, m.norm_dtype, m.rule.V);
}

class MixerRunner final : public RowMaker {
  public:
    MixerRunner(const Mixer& mixer, const MixerTask& task, char* memory)
        : m(mixer), p(rule_of(mixer)), job(task), seq(sequence(mixer.rule, task.n)), r(p.HV / p.H) {
        Arena arena{memory};
        carve_mixer(m, job.h0, job.heads, arena, s, conv);
    }

    static size_t workspace(const Mixer& m, int64_t heads) {
        Arena arena{reinterpret_cast<char*>(64)};  // addresses are only computed, never read
        MixerScratch s;
        Convolution conv;
        carve_mixer(m, 0, heads, arena, s, conv);
        const int64_t values = heads * (m.rule.HV / m.rule.H);
        return reinterpret_cast<size_t>(s.rule) - 64 +
               ANYDELTA_ISA::workspace(rule_of(m), values < MAX_HEADS ? values : MAX_HEADS);
    }
    // The type of the outputs decides how the rule may compute them.
    static Problem rule_of(const Mixer& m) {
        Problem p = m.rule;
        p.o.dtype = m.o.dtype;
        return p;
    }

    void run() {
        int64_t tokens = 0;
        for (int64_t t = seq.start; t < seq.end; ++t) {
            const bool live = seq.row_in >= 0 && seq.live(p, t);
            tokens += live;
            if (!live) zero_outputs(t);
        }
        if (seq.row_in < 0) return;
        conv.load_parameters();
        conv.load_windows(conv.past, m.conv, seq.row_in);
        if (m.norm) load_norm(m, s.norm_weight);
        if (tokens > 0) {
            p.q = scratch_rows(s.q);
            p.k = scratch_rows(s.k);
        }
        // Tiled: the value heads of a q/k head are H apart, so each q/k head is a separate run.
        const int64_t runs = p.tiled ? job.heads : 1;
        for (int64_t i = 0; i < runs; ++i) {
            const int64_t values = p.tiled ? r : job.heads * r;
            const int64_t first = p.tiled ? job.h0 + i : job.h0 * r, step = p.tiled ? p.H : 1;
            for (int64_t j = 0; j < values; j += MAX_HEADS) {
                const int64_t count = values - j < MAX_HEADS ? values - j : MAX_HEADS;
                from_head = p.tiled ? i : j / r;
                to_head = p.tiled ? i + 1 : (j + count - 1) / r + 1;
                live = 0;
                for (int64_t w = 0; w < m.W - 1; ++w) s.inputs[w] = -1 - (m.S - (m.W - 1) + w);
                Runner(p, Task{job.n, first + j * step, count, 0, p.V, nullptr, step}, s.rule, this).run();
            }
        }
        write_windows();
    }

    // q and k of the live tokens in [from, from + CHUNK).
    int64_t prepare(int64_t from) override {
        const int64_t end = from + CHUNK < seq.end ? from + CHUNK : seq.end;
        begin = from;
        for (int64_t w = 0; w < m.W - 1; ++w) s.inputs[w] = s.inputs[live + w];  // the previous chunk's
        live = 0;
        for (int64_t t = from; t < end; ++t) {
            if (!seq.live(p, t)) continue;
            s.order[t - from] = live;
            s.inputs[m.W - 1 + live++] = t;
        }
        // One head after another: rows of one head, of several tokens, share few sets of L1.
        for (int64_t i = from_head; i < to_head; ++i)
            for (int64_t which = 0; which < 2; ++which)
                for (int64_t j = 0; j < live; j += C_MAX) {
                    const int64_t count = live - j < C_MAX ? live - j : C_MAX;
                    float* dst[C_MAX];
                    for (int64_t c = 0; c < count; ++c)
                        dst[c] = (which ? s.k : s.q) + ((s.inputs[m.W - 1 + j + c] - from) * job.heads + i) * p.K;
                    convolve(conv.part[which], j, count, job.h0 + i, i, dst);
                }
        // read_tokens adds t * stride and head * K: subtract them, so that the chunk's first row is the
        // first of the scratch
        const int64_t back = (from * job.heads + job.h0) * p.K * 4;
        p.q.data = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(s.q) - static_cast<uintptr_t>(back));
        p.k.data = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(s.k) - static_cast<uintptr_t>(back));
        return end;
    }

    void values(const int64_t* t, int64_t count, int64_t hv, float* v, int64_t ldv) override {
        float* dst[C_MAX];
        for (int64_t c = 0; c < count; ++c) dst[c] = v + c * ldv;
        convolve(conv.part[2], s.order[t[0] - begin], count, hv, conv.local(hv), dst);
    }

    void outputs(const int64_t* t, int64_t count, int64_t hv, float* o, int64_t ldo) override {
        if (m.o.dtype == DType::f32) return outputs_as<float>(t, count, hv, o, ldo);
        if (m.o.dtype == DType::bf16) return outputs_as<bf16>(t, count, hv, o, ldo);
        outputs_as<f16>(t, count, hv, o, ldo);
    }

  private:
    const Mixer& m;
    Problem p;  // the rule's problem; its q and k point to scratch
    const MixerTask job;
    const Sequence seq;
    const int64_t r;  // value heads per q/k head
    MixerScratch s;
    Convolution conv;
    int64_t from_head = 0, to_head = 0;  // heads of q and k, from h0 on, in this run of the rule
    int64_t begin = 0;                   // first token of the chunk
    int64_t live = 0;                    // unmasked tokens of the chunk

    static void carve_mixer(const Mixer& m, int64_t h0, int64_t heads, Arena& arena, MixerScratch& s,
                            Convolution& conv) {
        const Problem& p = m.rule;
        conv.carve(m, h0, heads, C_MAX, arena);
        s.window = arena.take<float>((m.S ? m.S : 1) * Convolution::width_of(m));
        s.q = arena.take<float>(CHUNK * heads * p.K);
        s.k = arena.take<float>(CHUNK * heads * p.K);
        s.norm_weight = arena.take<float>(round_up(p.V, L));
        s.inputs = arena.take<int64_t>(m.W - 1 + CHUNK > m.S ? m.W - 1 + CHUNK : m.S);
        s.order = arena.take<int64_t>(CHUNK);
        s.rule = arena.at;
    }

    Tokens scratch_rows(float* rows) const {
        Tokens x;
        x.data = rows;
        x.t = job.heads * p.K;
        x.h = p.K;
        return x;
    }

    // y_t of one head of q, k or v, for `count` live tokens of the chunk, the `first`-th and later
    void convolve(const Convolved& c, int64_t first, int64_t count, int64_t head, int64_t i, float* const* dst) {
        conv.run(c, seq.b, seq.end, s.inputs + first, count, head, i, dst);
    }

    // out = o * rsqrt(mean o^2 + eps) * norm_weight * gate(z)
    template <class T>
    void outputs_as(const int64_t* t, int64_t count, int64_t hv, float* o, int64_t ldo) {
        const int64_t padded = round_up(p.V, L), whole = p.V / L * L, tail = p.V - whole;
        const bool gated = m.norm && m.gate != NormGate::none;
        T* out = static_cast<T*>(const_cast<void*>(grouped(m.o, seq.b, 0, hv, p.V)));
        const T* z = gated ? static_cast<const T*>(grouped(m.z, seq.b, 0, hv, p.V)) : nullptr;
        float factor[CHUNK];  // all rows first: one by one, each would wait for its sum, root and quotient
        for (int64_t c = 0; c < count; ++c) {
            const float* row = o + c * ldo;
            factor[c] = m.norm ? inverse_length(row, padded, static_cast<float>(p.V), m.norm_eps, o + c * ldo) : 1.0f;
        }
        alignas(64) float rest[L] = {};
        for (int64_t c = 0; c < count; ++c, o += ldo) {
            const int64_t later = t[c + TOKENS_AHEAD < count ? c + TOKENS_AHEAD : c];
            fetch_row<true>(out + later * m.o.t, p.V * sizeof(T));
            if (gated) fetch_row<false>(z + later * m.z.t, p.V * sizeof(T));
            T* to = out + t[c] * m.o.t;
            const T* gate = gated ? z + t[c] * m.z.t : nullptr;
            int64_t i = 0;
            for (; i + 4 * L <= whole; i += 4 * L) normed<4>(to + i, o + i, factor[c], i, gate + i);
            for (; i < whole; i += L) normed<1>(to + i, o + i, factor[c], i, gate + i);
            if (tail == 0) continue;
            if (gated) read_as(rest, gate + whole, tail);
            normed<1>(rest, o + whole, factor[c], whole, static_cast<const float*>(rest));
            write_as(to + whole, rest, tail);
        }
    }

    template <int N, class T>
    void normed(T* to, const float* o, float factor, int64_t i, const T* z) const {
        V y[N], g[N];
        AD_UNROLL for (int j = 0; j < N; ++j) y[j] = vload(o + j * L);
        if (m.norm) {
            AD_UNROLL for (int j = 0; j < N; ++j)
                y[j] = vmul(vmul(y[j], vset(factor)), vload(s.norm_weight + i + j * L));
            if (m.gate != NormGate::none) AD_UNROLL for (int j = 0; j < N; ++j) g[j] = vload(z + j * L);
            if (m.gate == NormGate::silu) silus<N>(g);
            if (m.gate == NormGate::sigmoid) AD_UNROLL for (int j = 0; j < N; ++j) g[j] = vsigmoid(g[j]);
            if (m.gate != NormGate::none) AD_UNROLL for (int j = 0; j < N; ++j) y[j] = vmul(y[j], g[j]);
        }
        AD_UNROLL for (int j = 0; j < N; ++j) vstore(to + j * L, y[j]);
    }

    void zero_outputs(int64_t t) {
        for (int64_t i = 0; i < job.heads * r; ++i)
            std::memset(const_cast<void*>(grouped(m.o, seq.b, t, conv.value_head(i), p.V)), 0,
                        static_cast<size_t>(p.V * dtype_size(m.o.dtype)));
    }

    // The conv state after the last token, and its snapshots: the last S live inputs up to a token.
    void write_windows() {
        const int64_t length = seq.end - seq.start;
        const bool rows = p.snapshot_indices != nullptr;  // rows of the pool: no other row is written
        const int64_t slots = rows || m.conv_snapshots.data ? (p.Ks < length ? p.Ks : length) : 0;
        for (int64_t slot = 0; slot < slots; ++slot) {
            const int64_t live = last_inputs(seq.end - slot), row = rows ? p.snapshot_indices[slot * p.N + job.n] : 0;
            if (!rows)
                write_window(m.conv_snapshots, slot, job.n, live);
            else if (row >= 0)
                write_window(m.conv, 0, row, live);
        }
        if (rows || seq.row_out < 0) return;
        const int64_t live = last_inputs(seq.end);
        if (live > 0 || seq.row_out != seq.row_in) write_window(m.conv, 0, seq.row_out, live);
    }

    // Write the last live tokens before `end`, at most S, to s.inputs. Returns their number.
    int64_t last_inputs(int64_t end) const {
        int64_t live = 0;
        for (int64_t t = end - 1; t >= seq.start && live < m.S; --t)
            if (seq.live(p, t)) s.inputs[live++] = t;
        return live;
    }

    void write_window(const Windows& to, int64_t slot, int64_t n, int64_t live) {
        const int64_t width = Convolution::width_of(m);
        conv.each_head([&](const Convolved& c, int64_t head, int64_t i) {
            const int64_t at = c.at + i * c.padded;
            for (int64_t j = 0; j < m.S; ++j) {  // column S - 1 - j
                float* row = s.window + (m.S - 1 - j) * width;
                if (j < live)
                    read_row(row, grouped(*c.x, seq.b, s.inputs[j], head, c.width), c.x->dtype, c.width);
                else
                    std::memcpy(row, conv.past + at + (m.S - 1 - (j - live)) * conv.ld, static_cast<size_t>(c.width) * 4);
            }
            write_rows(conv.window_at(to, slot, n, c.first + head * c.width), to.dtype, to.c, to.s, s.window, width, c.width,
                       m.S);
        });
    }
};

static size_t mixer_workspace(const Mixer& m, int64_t heads) { return MixerRunner::workspace(m, heads); }
static const char* mix_task(const Mixer& m, const MixerTask& task, char* memory) {
    MixerRunner(m, task, memory).run();
    return AD_NAME(ANYDELTA_ISA);
}

}  // namespace anydelta::ANYDELTA_ISA
