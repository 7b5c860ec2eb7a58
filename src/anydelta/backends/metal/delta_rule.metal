// The gated delta rule token by token, the state in registers from the first token to the last. Decode is T = 1.
//
//     S   = diag(exp(g_t)) S            decay    g_t: one number (GDA) or a vector over K (KDA)
//     d_t = beta_t (v_t - S^T k_t)      delta    the prediction reads the decayed state
//     S   = S + k_t d_t^T               update
//     o_t = scale * S^T q_t             output   reads the updated state
//
// Shapes and strides: see shared.metal, which the host puts before this text. All sums are in float32.
//
// A simdgroup of 32 lanes owns WIDTH columns of S (the axis V) of one head of one sequence. Columns are independent.
// LANES neighbouring lanes share a pair of columns: lane r has the rows 4 (j LANES + r) .. + 3 for j < GROUPS. So
// neighbours read neighbouring 16 bytes of k and q, and a loaded row of k serves two columns.
//
// K = 128: 64 of S and 32 of k, of the 128 registers that a lane has. More lanes per column would mean more shuffles
// and more loads of k and q per column. Fewer lanes would not have enough registers.
constant constexpr int LANES = KP <= 128 ? 4 : 8;
constant constexpr int GROUPS = KP / (4 * LANES);
constant constexpr int WIDTH = 32 / LANES * 2;

// Sum over the LANES lanes of a pair. Each step halves the number of values to add: first a lane passes on the column
// that its neighbour will finish. Lane r ends with the sum of column r % 2.      y_c = sum_r x_c(r)
inline float finish(float2 x, int r) {
    const bool odd = r & 1;
    float mine = (odd ? x.y : x.x) + simd_shuffle_xor(odd ? x.x : x.y, ushort(1));
    for (ushort step = 2; step < LANES; step *= 2) mine += simd_shuffle_xor(mine, step);
    return mine;
}

// Sum of one number over the lanes of a pair, in all of them.
inline float over_lanes(float x) {
    for (ushort step = 1; step < LANES; step *= 2) x += simd_shuffle_xor(x, step);
    return x;
}

// My rows of two columns of a state [K, V] whose strides are st[0], st[1]; c, c + 1: the columns.
template <int TYPE>
inline void read_state(thread float2 (&S)[GROUPS][4], device const uchar* base, long at, long sk, long sv, int r, int c, int V) {
    const bool both = c + 1 < V;
    at += c * sv;
    UNROLL
    for (int j = 0; j < GROUPS; ++j) {
        const int row = 4 * (j * LANES + r);
        if (sk == 1 && both && K == KP) {  // [V, K]: 16 bytes of each column
            const float4 x = load4(TYPE, base, at + row), y = load4(TYPE, base, at + sv + row);
            UNROLL
            for (int i = 0; i < 4; ++i) S[j][i] = float2(x[i], y[i]);
        } else {
            UNROLL
            for (int i = 0; i < 4; ++i) {
                S[j][i] = float2(0.0f);
                if (row + i >= K || c >= V) continue;
                const long to = at + (row + i) * sk;
                if (sv == 1 && both)  // [K, V]: the pair
                    S[j][i] = load2(TYPE, base, to);
                else
                    S[j][i] = float2(load1(TYPE, base, to), both ? load1(TYPE, base, to + sv) : 0.0f);
            }
        }
    }
}

template <int TYPE>
inline void write_state(thread const float2 (&S)[GROUPS][4], device uchar* base, long at, long sk, long sv, int r, int c, int V) {
    const bool both = c + 1 < V;
    at += c * sv;
    UNROLL
    for (int j = 0; j < GROUPS; ++j) {
        const int row = 4 * (j * LANES + r);
        if (sk == 1 && both && K == KP) {
            store4(TYPE, base, at + row, float4(S[j][0].x, S[j][1].x, S[j][2].x, S[j][3].x));
            store4(TYPE, base, at + sv + row, float4(S[j][0].y, S[j][1].y, S[j][2].y, S[j][3].y));
        } else {
            UNROLL
            for (int i = 0; i < 4; ++i) {
                if (row + i >= K || c >= V) continue;
                const long to = at + (row + i) * sk;
                if (sv == 1 && both) {
                    store2(TYPE, base, to, S[j][i]);
                } else {
                    store1(TYPE, base, to, S[j][i].x);
                    if (both) store1(TYPE, base, to + sv, S[j][i].y);
                }
            }
        }
    }
}

// Ref: a reference to Params in the host's address space. panel: the number of the WIDTH columns.
template <typename Ref>
inline void advance(Ref P, thread const Arrays& a, int panel, int h, int n, int lane) {
    const int V = P.V;
    if (panel * WIDTH >= V) return;
    const int r = lane % LANES, c = panel * WIDTH + lane / LANES * 2;
    const int mine = c + (r & 1);              // the column whose sums this lane finishes
    const bool gives = r < 2 && mine < V;      // and writes
    Work w = find_work<Ref>(P, a, n, h);

    const long o_base = w.b * P.o[0] + w.h * P.o[2] + mine;
    float2 S[GROUPS][4];
    if ((P.flags & HAS_STATE) && w.row_in >= 0)
        read_state<AD_STATE_IN>(S, a.state_in, w.row_in * P.state_in[0] + h * P.state_in[1], P.state_in[2], P.state_in[3], r, c, V);
    else
        UNROLL
        for (int j = 0; j < GROUPS; ++j)
            UNROLL
            for (int i = 0; i < 4; ++i) S[j][i] = float2(0.0f);
    if (w.row_in < 0) {  // a skipped sequence: zeros out
        if (gives)
            for (long t = w.start; t < w.end; ++t) store1(AD_QKV, a.o, o_base + t * P.o[1], 0.0f);
        w.start = w.end;
    }
    if (P.flags & TAIL) w.start = max(w.start, w.end - P.Ks);

    for (long t = w.start; t < w.end; ++t) {
        float out = 0.0f;
        if (is_live<Ref>(P, a, w, t)) {
            const long at_k = w.b * P.k[0] + t * P.k[1] + w.hq * P.k[2];
            const long at_q = w.b * P.q[0] + t * P.q[1] + w.hq * P.q[2];
            const long at_g = w.b * P.g[0] + t * P.g[1] + w.h * P.g[2];
            const float gate = KDA ? 0.0f : decay_of<Ref>(P, load1(P.g_type, a.g, at_g), bias_of<Ref>(P, a, w, 0), w.A);
            float4 k[GROUPS];
            float2 p = float2(0.0f);
            float kk = 0.0f, qq = 0.0f;
            // S = diag(a) S,  p = S^T k
            UNROLL
            for (int j = 0; j < GROUPS; ++j) {
                const int row = 4 * (j * LANES + r);
                k[j] = rows4(AD_QKV, a.k, at_k, row);
                float4 decay = float4(gate);
                if (KDA) {
                    const float4 x = rows4(AD_GATE, a.g, at_g, row);
                    UNROLL
                    for (int i = 0; i < 4; ++i) decay[i] = decay_of<Ref>(P, x[i], bias_of<Ref>(P, a, w, row + i), w.A);
                }
                UNROLL
                for (int i = 0; i < 4; ++i) {
                    S[j][i] *= decay[i];
                    p += S[j][i] * k[j][i];
                }
                if (P.l2norm) kk += dot(k[j], k[j]);
            }
            // d = beta (v - p); with the norm, k / |k| where k stands
            float length = 1.0f;
            if (P.l2norm) {
                kk = over_lanes(kk) + P.eps;
                if (!in_range(kk)) {
                    length = unit_for(kk);
                    kk = 0.0f;
                    for (int j = 0; j < GROUPS; ++j) kk += dot(k[j] * length, k[j] * length);
                    kk = over_lanes(kk) + P.eps * length * length;
                }
                length = kk == 0.0f ? 0.0f : length * rsqrt(kk);
            }
            const float v = mine < V ? load1(AD_QKV, a.v, w.b * P.v[0] + t * P.v[1] + w.h * P.v[2] + mine) : 0.0f;
            const float delta = length * beta_of<Ref>(P, a, w, t) * (v - length * finish(p, r));
            const float other = simd_shuffle_xor(delta, ushort(1));
            const float2 d = r & 1 ? float2(other, delta) : float2(delta, other);
            // S = S + k d^T,  o = scale S^T q
            float2 y = float2(0.0f);
            UNROLL
            for (int j = 0; j < GROUPS; ++j) {
                const float4 q = rows4(AD_QKV, a.q, at_q, 4 * (j * LANES + r));
                UNROLL
                for (int i = 0; i < 4; ++i) {
                    S[j][i] += k[j][i] * d;
                    y += S[j][i] * q[i];
                }
                if (P.l2norm) qq += dot(q, q);
            }
            out = P.scale * finish(y, r);
            if (P.l2norm) {
                float unit = 1.0f;
                qq = over_lanes(qq) + P.eps;
                if (!in_range(qq)) {
                    unit = unit_for(qq);
                    qq = 0.0f;
                    for (int j = 0; j < GROUPS; ++j) {
                        const float4 q = unit * rows4(AD_QKV, a.q, at_q, 4 * (j * LANES + r));
                        qq += dot(q, q);
                    }
                    qq = over_lanes(qq) + P.eps * unit * unit;
                }
                out *= qq == 0.0f ? 0.0f : unit * rsqrt(qq);
            }
        }
        if (gives) store1(AD_QKV, a.o, o_base + t * P.o[1], out);
        const long slot = w.end - 1 - t;  // slot s: the state of s tokens before the last
        if (slot < P.Ks) {
            long at = slot * P.snapshots[0] + n * P.snapshots[1];
            if (P.flags & ROWS) at = index_at(a.rows, P.rows64, slot * P.rows[0] + n * P.rows[1]) * P.snapshots[1];
            if (at >= 0)  // a row of -1 is not written
                write_state<AD_STATE_OUT>(S, a.snapshots, at + h * P.snapshots[2], P.snapshots[3], P.snapshots[4], r, c, V);
        }
    }
    if ((P.flags & WRITES_STATE) && w.row_out >= 0)
        write_state<AD_STATE_OUT>(S, a.state_out, w.row_out * P.state_out[0] + h * P.state_out[1], P.state_out[2], P.state_out[3], r, c, V);
}

struct Scratch {  // nothing is shared between simdgroups, and nobody waits
    char unused;
};
constant constexpr int SIMDGROUPS = 4;  // of a threadgroup; they read the same k and q, which then lie in the L1 cache

template <typename Ref>
inline void run(Ref P, thread const Arrays& a, threadgroup Scratch&, uint3 group, uint simdgroup, uint lane) {
    advance<Ref>(P, a, int(group.x * SIMDGROUPS + simdgroup), int(group.y), int(group.z), int(lane));
}
