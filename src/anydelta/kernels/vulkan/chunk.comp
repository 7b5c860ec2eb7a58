#version 450
// The gated delta rule over chunks of C tokens, for long prompts. The maths, the shapes and the types are at the top of
// rule.glsl. With G_i the sum of the log decays of tokens 1 .. i of the chunk, and S the state before it:
//
//     A_ij = sum_k k_i k_j exp(G_i - G_j)   j < i        d_i = beta_i (v_i - S^T (exp(G_i) k_i) - sum_j A_ij d_j)
//     B_ij = sum_k q_i k_j exp(G_i - G_j)   j <= i       o_i = scale (S^T (exp(G_i) q_i) + sum_j B_ij d_j)
//     S    = exp(G_C) S + sum_j exp(G_C - G_j) k_j d_j^T
//
// (the WY form: the d of a chunk follow from a triangular solve, so that the state is read and written once per chunk
// and not per token). Every exponent is <= 0. A token that is masked, or beyond the end, has k = q = g = beta = 0.
//
// A workgroup owns some columns of one head of one sequence; an invocation owns a column and keeps its K rows in
// registers. k, q, A and B lie in shared memory, computed by all of them together. No subgroup operations.
#extension GL_GOOGLE_include_directive : require
#include "rule.glsl"

const uint KP = 4 * ROWS4;
shared vec4 ks[CHUNK * ROWS4];                  // k_i, then exp(G_i) k_i for KDA
shared vec4 qs[CHUNK * ROWS4];                  // q_i, then exp(G_i) q_i for KDA
shared vec4 gs[KDA ? CHUNK * ROWS4 : 1];        // G_i, then exp(G_C - G_i) k_i
shared vec4 g_last[KDA ? ROWS4 : 1];            // G_C
shared float As[CHUNK * CHUNK], Bs[CHUNK * CHUNK];  // beta_i A_ij; scale B_ij
shared float g1[CHUNK];                         // GDA: G_i
shared float betas[CHUNK];
shared float ds[CHUNK * gl_WorkGroupSize.x];    // d_i of the columns; each is private to its invocation

uint id, size;

bool in_chunk(uint start, uint i, uint last) { return start + i < last && live(base + start + i); }

void load_chunk(uint start, uint last, float A) {
    for (uint e = id; e < CHUNK * ROWS4; e += size) {
        const uint i = e / ROWS4, r = e % ROWS4, token = base + start + i;
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

void normalise() {  // x * rsqrt(sum x^2 + eps); a token of zeros stays zero
    for (uint i = id; i < 2 * CHUNK; i += size) {
        float sum = 0;
        for (uint r = 0; r < ROWS4; ++r) {
            const vec4 x = i < CHUNK ? ks[i * ROWS4 + r] : qs[(i - CHUNK) * ROWS4 + r];
            sum += dot(x, x);
        }
        const float by = sum == 0 ? 0.0 : inversesqrt(sum + call.eps);
        for (uint r = 0; r < ROWS4; ++r)
            if (i < CHUNK) ks[i * ROWS4 + r] *= by;
            else qs[(i - CHUNK) * ROWS4 + r] *= by;
    }
    barrier();
}

void sum_gates() {
    if (KDA) {
        for (uint r = id; r < ROWS4; r += size) {
            vec4 sum = vec4(0);
            for (uint i = 0; i < CHUNK; ++i) {
                sum += gs[i * ROWS4 + r];
                gs[i * ROWS4 + r] = sum;
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
        for (uint r = 0; r < ROWS4; ++r) {
            vec4 k = ks[j * ROWS4 + r];
            if (KDA) k *= exp(gs[i * ROWS4 + r] - gs[j * ROWS4 + r]);
            a += dot(ks[i * ROWS4 + r], k);
            b += dot(qs[i * ROWS4 + r], k);
        }
        const float decay = KDA ? 1.0 : exp(g1[i] - g1[j]);
        As[e] = betas[i] * decay * a;
        Bs[e] = call.scale * decay * b;
    }
    barrier();
    if (KDA) {
        for (uint e = id; e < CHUNK * ROWS4; e += size) {
            const vec4 G = gs[e], k = ks[e];
            gs[e] = exp(g_last[e % ROWS4] - G) * k;
            ks[e] = exp(G) * k;
            qs[e] *= exp(G);
        }
        barrier();
    }
}

void main() {
    find_work();
    id = gl_LocalInvocationIndex;
    size = gl_WorkGroupSize.x;
    const uint col = gl_WorkGroupID.x * size + id;
    const bool mine = col < call.V;
    if (skipped) {
        for (uint t = 0; t < len && mine; ++t) store_o(base + t, col, 0);
        if (has(ZERO_SKIPPED) && mine)
            for (uint row = 0; row < call.K; ++row) store_state(column_of(row_out, col) + row * row_step(), 0);
        return;
    }

    vec4 S[ROWS4];
    const uint step = row_step();  // K may be far below 4 ROWS4 here, unlike in recurrent.comp
    [[unroll]] for (uint r = 0; r < ROWS4; ++r) S[r] = vec4(0);
    if (has(HAS_STATE) && mine) {
        const uint at = column_of(row_in, col);
        [[unroll]] for (uint r = 0; r < ROWS4; ++r)
            [[unroll]] for (uint c = 0; c < 4; ++c) {
                const uint row = 4 * r + c;
                if (row < call.K) S[r][c] = load_state(at + row * step);
            }
    }

    const uint VP = (call.V + 1) & ~1u, last = chunked_tokens();
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
                p += dot(S[r], ks[i * ROWS4 + r]);
                o += dot(S[r], qs[i * ROWS4 + r]);
            }
            const float decay = KDA ? 1.0 : exp(g1[i]);
            const bool on = live(token);
            const float v = mine && on ? load1(call.v, (token * call.HV + hv) * VP + col) : 0.0;
            float d = betas[i] * (v - decay * p);
            o *= call.scale * decay;
            for (uint j = 0; j < i; ++j) {
                d -= As[i * CHUNK + j] * ds[j * size + id];
                o += Bs[i * CHUNK + j] * ds[j * size + id];
            }
            ds[i * size + id] = d;
            o += Bs[i * CHUNK + i] * d;
            if (mine) store_o(token, col, on ? o : 0.0);
        }

        // S = exp(G_C) S + sum_j exp(G_C - G_j) k_j d_j^T
        [[unroll]] for (uint r = 0; r < ROWS4; ++r) S[r] *= KDA ? exp(g_last[r]) : vec4(exp(g1[CHUNK - 1]));
        for (uint j = 0; j < CHUNK && start + j < last; ++j) {
            const float d = ds[j * size + id] * (KDA ? 1.0 : exp(g1[CHUNK - 1] - g1[j]));
            [[unroll]] for (uint r = 0; r < ROWS4; ++r) S[r] += d * (KDA ? gs[j * ROWS4 + r] : ks[j * ROWS4 + r]);
        }
        barrier();  // the next chunk overwrites what others may still read
    }

    if (has(WRITE_STATE) && mine) {
        const uint at = column_of(row_out, col);
        [[unroll]] for (uint r = 0; r < ROWS4; ++r)
            [[unroll]] for (uint c = 0; c < 4; ++c) {
                const uint row = 4 * r + c;
                if (row < call.K) store_state(at + row * step, S[r][c]);
            }
    }
}
