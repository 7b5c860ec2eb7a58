#version 450
// The gated delta rule token by token, the state in registers over all tokens. The maths, the shapes and the types are
// at the top of rule.glsl.
#extension GL_GOOGLE_include_directive : require
#include "rule.glsl"

// x * rsqrt(sum x^2 + eps), 0 for 0: the factor, from this lane's part of the sum.
float inverse_length(float squares, uint words, uint row) {
    float sum = over_lanes(squares) + call.eps, unit = 1;
    if (!in_range(sum)) {
        unit = unit_for(sum);
        sum = 0;
        [[unroll]] for (uint r = 0; r < ROWS4; ++r) {
            const vec4 x = unit * load4(words, row, r * LANES + lane);
            sum += dot(x, x);
        }
        sum = over_lanes(sum) + call.eps * unit * unit;
    }
    return sum == 0 ? 0.0 : unit * inversesqrt(sum);
}

void main() {
    find_work();
    find_column();
    if (skipped) {
        skip();
        return;
    }
    load_column();
    const float A = A_of_head();
    for (uint t = chunked_tokens(); t < len; ++t) {
        const uint token = base + t;
        if (!live(token)) {
            if (mine && lane == 0) store_o(token, col, 0);
        } else {
            const uint qk = (token * call.H + hq) * KP;
            float kk = 0, qq = 0;  // 1 / |k|, 1 / |q|
            if (has(L2NORM)) {
                [[unroll]] for (uint r = 0; r < ROWS4; ++r) {
                    const vec4 k = load4(call.k, qk, r * LANES + lane), q = load4(call.q, qk, r * LANES + lane);
                    kk += dot(k, k);
                    qq += dot(q, q);
                }
                kk = inverse_length(kk, call.k, qk);
                qq = inverse_length(qq, call.q, qk);
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
            const float d = kk * beta_of(token) * (load_v(token) - predicted);
            float o = 0;
            [[unroll]] for (uint r = 0; r < ROWS4; ++r) {
                S[r] += d * load4(call.k, qk, r * LANES + lane);
                o += dot(S[r], load4(call.q, qk, r * LANES + lane));
            }
            o = call.scale * qq * over_lanes(o);
            if (mine && lane == 0) store_o(token, col, o);
        }
        const uint slot = len - 1 - t;
        if (slot < call.Ks && mine && snapshot_wanted(slot)) {
            const uint at = snapshot_column(slot, col), step = row_step();
            [[unroll]] for (uint r = 0; r < ROWS4; ++r)
                [[unroll]] for (uint c = 0; c < 4; ++c) {
                    const uint row = 4 * (r * LANES + lane) + c;
                    if (row < call.K) store_snapshot(at + row * step, S[r][c]);
                }
        }
    }
    store_column();
}
