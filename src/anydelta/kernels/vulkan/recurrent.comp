#version 450
// The gated delta rule token by token, the state in registers over all tokens. The maths, the shapes and the types are
// at the top of rule.glsl.
//
// A workgroup owns some columns (the axis V) of one head of one sequence. LANES invocations share a column: lane l holds
// the rows 4 (r LANES + l) .. + 3 for r < ROWS4, so that neighbours read neighbouring 16 bytes of k and q. Columns never
// meet; the only sums across invocations are the LANES partial sums of S^T k and S^T q.
#extension GL_GOOGLE_include_directive : require
#include "rule.glsl"

#ifndef SUBGROUP
shared float partial[gl_WorkGroupSize.x];
#endif

uint id;    // of this invocation in the workgroup, so that the lanes of a column lie in one subgroup
uint lane;  // of the column

// The sum of x over the lanes of the column, in every one of them.
float over_lanes(float x) {
    if (LANES == 1) return x;
#ifdef SUBGROUP
    if (LANES == gl_SubgroupSize) return subgroupAdd(x);
    for (uint step = 1; step < LANES; step *= 2) x += subgroupShuffleXor(x, step);
    return x;
#else
    partial[id] = x;
    barrier();
    x = 0;
    for (uint l = 0; l < LANES; ++l) x += partial[id - lane + l];
    barrier();
    return x;
#endif
}

void main() {
    find_work();
#ifdef SUBGROUP
    id = gl_SubgroupID * gl_SubgroupSize + gl_SubgroupInvocationID;
#else
    id = gl_LocalInvocationIndex;
#endif
    lane = id % LANES;
    const uint col = gl_WorkGroupID.x * (gl_WorkGroupSize.x / LANES) + id / LANES;
    const bool mine = col < call.V;  // the last workgroup may have more columns than are left
    const uint KP = 4 * LANES * ROWS4;

    if (skipped) {
        for (uint t = lane; t < len && mine; t += LANES) store_o(base + t, col, 0);
        if (has(ZERO_SKIPPED) && mine)
            for (uint row = lane; row < call.K; row += LANES)
                store_state(column_of(row_out, col) + row * row_step(), 0);
        return;
    }

    vec4 S[ROWS4];
    const uint step = row_step();
    [[unroll]] for (uint r = 0; r < ROWS4; ++r) S[r] = vec4(0);
    if (has(HAS_STATE) && mine) {
        const uint at = column_of(row_in, col);
        [[unroll]] for (uint r = 0; r < ROWS4; ++r)
            [[unroll]] for (uint c = 0; c < 4; ++c) {
                const uint row = 4 * (r * LANES + lane) + c;
                if (exists(r, row)) S[r][c] = load_state(at + row * step);
            }
    }

    const float A = A_of_head();
    for (uint t = chunked_tokens(); t < len; ++t) {
        const uint token = base + t;
        if (!live(token)) {
            if (mine && lane == 0) store_o(token, col, 0);
        } else {
            const uint qk = (token * call.H + hq) * KP;
            float kk = 0, qq = 0;  // 1 / |k|, 1 / |q|: x * rsqrt(sum x^2 + eps)
            if (has(L2NORM)) {
                [[unroll]] for (uint r = 0; r < ROWS4; ++r) {
                    const vec4 k = load4(call.k, qk, r * LANES + lane), q = load4(call.q, qk, r * LANES + lane);
                    kk += dot(k, k);
                    qq += dot(q, q);
                }
                kk = inversesqrt(over_lanes(kk) + call.eps);
                qq = inversesqrt(over_lanes(qq) + call.eps);
            } else {
                kk = qq = 1;
            }

            // S = diag(a) S;  predicted = S^T k
            const uint gate = token * call.HV + hv;
            const float a = KDA ? 0.0 : decay1(in1[call.g + gate], A, hv);
            float predicted = 0;
            [[unroll]] for (uint r = 0; r < ROWS4; ++r) {
                const uint group = r * LANES + lane;
                if (KDA) {
                    const vec4 x = in4[(call.g + gate * KP) / 4 + group];
                    [[unroll]] for (uint c = 0; c < 4; ++c)
                        S[r][c] *= decay1(x[c], A, hv * KP + 4 * group + c);
                } else {
                    S[r] *= a;
                }
                predicted += dot(S[r], load4(call.k, qk, group));
            }
            predicted = kk * over_lanes(predicted);

            // d = beta (v - predicted);  S = S + k d^T;  o = scale S^T q
            const uint VP = (call.V + 1) & ~1u;
            const float v = mine ? load1(call.v, (token * call.HV + hv) * VP + col) : 0.0;
            const float d = kk * beta_of(token) * (v - predicted);
            float o = 0;
            [[unroll]] for (uint r = 0; r < ROWS4; ++r) {
                S[r] += d * load4(call.k, qk, r * LANES + lane);
                o += dot(S[r], load4(call.q, qk, r * LANES + lane));
            }
            o = call.scale * qq * over_lanes(o);
            if (mine && lane == 0) store_o(token, col, o);
        }
        const uint slot = len - 1 - t;
        if (slot < call.Ks && mine) {
            const uint at = snapshot_column(slot, col);
            [[unroll]] for (uint r = 0; r < ROWS4; ++r)
                [[unroll]] for (uint c = 0; c < 4; ++c) {
                    const uint row = 4 * (r * LANES + lane) + c;
                    if (exists(r, row)) store_snapshot(at + row * step, S[r][c]);
                }
        }
    }

    if (has(WRITE_STATE) && mine) {
        const uint at = column_of(row_out, col);
        [[unroll]] for (uint r = 0; r < ROWS4; ++r)
            [[unroll]] for (uint c = 0; c < 4; ++c) {
                const uint row = 4 * (r * LANES + lane) + c;
                if (exists(r, row)) store_state(at + row * step, S[r][c]);
            }
    }
}
