#version 450
// The gated delta rule over chunks of C tokens, for long prompts. The maths, the shapes and the types are at the top of
// rule.glsl. With G_i the sum of the log decays of tokens 1 .. i of the chunk, and S the state before it:
//
//     A_ij = sum_k k_i k_j exp(G_i - G_j)   j < i        d_i = beta_i (v_i - S^T (exp(G_i) k_i) - sum_j A_ij d_j)
//     B_ij = sum_k q_i k_j exp(G_i - G_j)   j <= i       o_i = scale (S^T (exp(G_i) q_i) + sum_j B_ij d_j)
//     S    = exp(G_C) S + sum_j exp(G_C - G_j) k_j d_j^T
//
// (the WY form: the d of a chunk follow from a triangular solve, so the state is read and written once per
// chunk instead of once per token). Every exponent is <= 0. A token that is masked, or beyond the end, has k
// = q = g = beta = 0.
//
// The workgroup computes k, q, A and B together, in shared memory. The lanes of a column share its rows, and the
// tokens j: a lane adds its share of sum_j A_ij d_j to its part of S^T k, so one sum over the lanes gives both. Loops
// over all K are not unrolled: lavapipe turns each load into a loop, and compiled K = 128 for minutes.
#extension GL_GOOGLE_include_directive : require
#include "rule.glsl"

const uint GROUPS = KP / 4;                     // of four rows
shared vec4 ks[CHUNK * GROUPS];                 // k_i, then exp(G_i) k_i for KDA
shared vec4 qs[CHUNK * GROUPS];                 // q_i, then exp(G_i) q_i for KDA
shared vec4 gs[KDA ? CHUNK * GROUPS : 1];       // G_i, then exp(G_C - G_i) k_i
shared vec4 g_last[KDA ? GROUPS : 1];           // G_C
shared float As[CHUNK * CHUNK], Bs[CHUNK * CHUNK];  // beta_i A_ij; scale B_ij
shared float g1[CHUNK];                         // GDA: G_i
shared float betas[CHUNK];

const uint size = gl_WorkGroupSize.x, COLUMNS = size / LANES;
shared float ds[CHUNK * COLUMNS];               // d_i

bool in_chunk(uint start, uint i, uint last) { return start + i < last && live(base + start + i); }

void load_chunk(uint start, uint last, float A) {
    for (uint e = id; e < CHUNK * GROUPS; e += size) {
        const uint i = e / GROUPS, r = e % GROUPS, token = base + start + i;
        vec4 k = vec4(0), q = vec4(0), g = vec4(0);
        if (in_chunk(start, i, last)) {
            k = load4(call.k, (token * call.H + hq) * KP, r);
            q = load4(call.q, (token * call.H + hq) * KP, r);
            if (KDA) {
                g = in4[(call.g + (token * call.HV + hv) * KP) / 4 + r];
                [[unroll]] for (uint c = 0; c < 4; ++c) g[c] = log_decay1(g[c], A, hv * KP + 4 * r + c);
            }
        }
        ks[e] = k;
        qs[e] = q;
        if (KDA) gs[e] = g;
    }
    for (uint i = id; i < CHUNK; i += size) {
        const uint token = base + start + i;
        const bool on = in_chunk(start, i, last);
        betas[i] = on ? beta_of(token) : 0;
        if (!KDA) g1[i] = on ? log_decay1(in1[call.g + token * call.HV + hv], A, hv) : 0;
    }
    barrier();
}

float squares(uint i, float unit) {
    float sum = 0;
    [[dont_unroll]] for (uint r = 0; r < GROUPS; ++r) {
        const vec4 x = unit * (i < CHUNK ? ks[i * GROUPS + r] : qs[(i - CHUNK) * GROUPS + r]);
        sum += dot(x, x);
    }
    return sum + call.eps * unit * unit;
}

void normalise() {  // x * rsqrt(sum x^2 + eps); a token of zeros stays zero
    for (uint i = id; i < 2 * CHUNK; i += size) {
        float sum = squares(i, 1), unit = 1;
        if (!in_range(sum)) {
            unit = unit_for(sum);
            sum = squares(i, unit);
        }
        const float by = sum == 0 ? 0.0 : unit * inversesqrt(sum);
        [[dont_unroll]] for (uint r = 0; r < GROUPS; ++r)
            if (i < CHUNK) ks[i * GROUPS + r] *= by;
            else qs[(i - CHUNK) * GROUPS + r] *= by;
    }
    barrier();
}

void sum_gates() {
    if (KDA) {
        for (uint r = id; r < GROUPS; r += size) {
            vec4 sum = vec4(0);
            for (uint i = 0; i < CHUNK; ++i) {
                sum += gs[i * GROUPS + r];
                gs[i * GROUPS + r] = sum;
            }
            g_last[r] = sum;
        }
    } else if (id == 0) {
        float sum = 0;
        for (uint i = 0; i < CHUNK; ++i) {
            sum += g1[i];
            g1[i] = sum;
        }
    }
    barrier();
}

void multiply_keys() {
    for (uint e = id; e < CHUNK * CHUNK; e += size) {
        const uint i = e / CHUNK, j = e % CHUNK;
        if (j > i) continue;
        float a = 0, b = 0;
        [[dont_unroll]] for (uint r = 0; r < GROUPS; ++r) {
            vec4 k = ks[j * GROUPS + r];
            if (KDA) k *= exp(gs[i * GROUPS + r] - gs[j * GROUPS + r]);
            a += dot(ks[i * GROUPS + r], k);
            b += dot(qs[i * GROUPS + r], k);
        }
        const float decay = KDA ? 1.0 : exp(g1[i] - g1[j]);
        As[e] = betas[i] * decay * a;
        Bs[e] = call.scale * decay * b;
    }
    barrier();
    if (KDA) {
        for (uint e = id; e < CHUNK * GROUPS; e += size) {
            const vec4 G = gs[e], k = ks[e];
            gs[e] = exp(g_last[e % GROUPS] - G) * k;
            ks[e] = exp(G) * k;
            qs[e] *= exp(G);
        }
        barrier();
    }
}

void main() {
    find_work();
    find_column();
    if (skipped) {
        skip();
        return;
    }
    load_column();

    const uint last = chunked_tokens(), column = id / LANES;
    const float A = A_of_head();
    for (uint start = 0; start < last; start += CHUNK) {
        load_chunk(start, last, A);
        if (has(L2NORM)) normalise();
        sum_gates();
        multiply_keys();

        for (uint i = 0; i < CHUNK && start + i < last; ++i) {
            const uint token = base + start + i;
            float p = 0, o = 0;  // S^T k, S^T q
            [[unroll]] for (uint r = 0; r < ROWS4; ++r) {
                p += dot(S[r], ks[i * GROUPS + r * LANES + lane]);
                o += dot(S[r], qs[i * GROUPS + r * LANES + lane]);
            }
            const float decay = KDA ? 1.0 : exp(g1[i]);
            p *= betas[i] * decay;
            o *= call.scale * decay;
            for (uint j = lane; j < i; j += LANES) {
                p += As[i * CHUNK + j] * ds[j * COLUMNS + column];
                o += Bs[i * CHUNK + j] * ds[j * COLUMNS + column];
            }
            p = over_lanes(p);
            o = over_lanes(o);
            const bool on = live(token);
            const float d = betas[i] * (on ? load_v(token) : 0.0) - p;
            if (i % LANES == lane) ds[i * COLUMNS + column] = d;
            if (mine && lane == 0) store_o(token, col, on ? o + Bs[i * CHUNK + i] * d : 0.0);
        }

        barrier();

        // S = exp(G_C) S + sum_j exp(G_C - G_j) k_j d_j^T
        [[unroll]] for (uint r = 0; r < ROWS4; ++r)
            S[r] *= KDA ? exp(g_last[r * LANES + lane]) : vec4(exp(g1[CHUNK - 1]));
        for (uint j = 0; j < CHUNK && start + j < last; ++j) {
            const float d = ds[j * COLUMNS + column] * (KDA ? 1.0 : exp(g1[CHUNK - 1] - g1[j]));
            [[unroll]] for (uint r = 0; r < ROWS4; ++r) {
                const uint at = j * GROUPS + r * LANES + lane;
                S[r] += d * (KDA ? gs[at] : ks[at]);
            }
        }
        barrier();  // the next chunk overwrites what others may still read
    }
    store_column();
}
