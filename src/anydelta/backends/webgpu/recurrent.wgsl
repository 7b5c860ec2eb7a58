// The gated delta rule token by token, the state in registers over all tokens.
//
//     S   = diag(exp(g_t)) S            decay    g_t: one number (GDA) or a vector over K (KDA)
//     d_t = beta_t (v_t - S^T k_t)      delta    the prediction reads the decayed state
//     S   = S + k_t d_t^T               update
//     o_t = scale * S^T q_t             output   reads the updated state
//
// Shapes: q, k [tokens, H, KP]; v [tokens, HV, VP]; o [tokens, HV, V]; g [tokens, HV] or [tokens, HV, KP];
// beta [tokens, HV]; S [rows, HV, K, V] or [rows, HV, V, K]; snapshots [Ks, N, HV, ...]. The host lays the inputs out
// densely, with K padded to KP by zeros. All sums, S and o are float32; q, k and v may be pairs of 16-bit floats.
//
// A workgroup owns some columns (the axis V) of one head of one sequence. LANES invocations share a column: lane
// l has the rows 4 (r LANES + l) .. + 3 for r < ROWS4. The host puts these constants before the text, because in
// WGSL the size of an array in registers cannot be an override: WORKGROUP, LANES, ROWS4, KDA, DTYPE. It also
// adds the function over_lanes(x), the sum of x over the lanes of a column (lanes_subgroup.wgsl,
// lanes_shared.wgsl or lanes_one.wgsl).

const FLOAT32 = 0u;
const BFLOAT16 = 1u;
const FLOAT16 = 2u;

// The host puts struct Call and the constants of its flags in front, from backends/devices/structs.py.
@group(0) @binding(0) var<storage, read> words4: array<vec4<u32>>;  // all inputs
@group(0) @binding(1) var<storage, read> words: array<u32>;         // the same buffer
@group(0) @binding(2) var<storage, read_write> outputs: array<f32>;
@group(0) @binding(3) var<storage, read_write> states: array<f32>;
@group(0) @binding(4) var<storage, read_write> snapshots: array<f32>;
@group(0) @binding(5) var<uniform> call: Call;

fn has(flag: u32) -> bool { return (call.flags & flag) != 0u; }
fn number(word: u32) -> f32 { return bitcast<f32>(words[word]); }

// Four values of a row: element offset `row` (a multiple of 4) from word `first`, group `group`.
fn load4(first: u32, row: u32, group: u32) -> vec4<f32> {
    if (DTYPE == FLOAT32) { return bitcast<vec4<f32>>(words4[(first + row) / 4u + group]); }
    let at = first + row / 2u + 2u * group;
    let h = vec2<u32>(words[at], words[at + 1u]);
    if (DTYPE == FLOAT16) { return vec4<f32>(unpack2x16float(h.x), unpack2x16float(h.y)); }
    return bitcast<vec4<f32>>(vec4<u32>(h.x << 16u, h.x & 0xffff0000u, h.y << 16u, h.y & 0xffff0000u));
}

fn load1(first: u32, element: u32) -> f32 {
    if (DTYPE == FLOAT32) { return number(first + element); }
    let h = (words[first + element / 2u] >> (16u * (element & 1u))) & 0xffffu;
    if (DTYPE == FLOAT16) { return unpack2x16float(h).x; }
    return bitcast<f32>(h << 16u);
}

fn sigmoid(x: f32) -> f32 {  // exp only of numbers <= 0
    let e = exp(-abs(x));
    return select(e, 1.0, x >= 0.0) / (1.0 + e);
}

fn softplus(x: f32) -> f32 {  // log(1 + exp(x)); below 1e-4 a logarithm in float32 would lose e
    let e = exp(-abs(x));
    return max(x, 0.0) + select(log(1.0 + e), e - 0.5 * e * e, e < 1e-4);
}

// The factor of a gate; exp(-100) is below the smallest float32, and comparing first keeps NaN and is exact for -inf.
fn decay(gate: f32, A: f32, bias: u32) -> f32 {
    if (has(LINEAR)) { return gate; }
    var x = gate;
    if (has(RAW)) {
        if (has(DT_BIAS)) { x += number(call.dt_bias + bias); }
        x = select(-A * softplus(x), call.lower_bound * sigmoid(A * x), has(LOWER));
    }
    if (x < -100.0) { return 0.0; }
    return exp(x);
}

fn state_at(row: u32, hv: u32, k: u32, col: u32) -> u32 {
    return (row * call.HV + hv) * call.K * call.V + select(k * call.V + col, col * call.K + k, has(VK));
}

// Squares are summed in two units, 2^-55 and 2^55: one of the sums is inside float32's range. (A branch on the sum
// would not be uniform control flow in WGSL, and a second sum over the lanes must not be inside such a branch.)
const SMALL = 0x1p-55f;
const LARGE = 0x1p55f;

fn squares(x: vec4<f32>) -> f32 { return dot(x, x); }

// x * rsqrt(sum x^2 + eps), 0 for 0: the factor.
fn inverse_length(small: f32, large: f32) -> f32 {
    let s = small + call.eps * SMALL * SMALL;
    if (s > 0x1p-98f) { return SMALL * inverseSqrt(s); }
    let l = large + call.eps * LARGE * LARGE;
    return select(LARGE * inverseSqrt(l), 0.0, l == 0.0);
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) group_id: vec3<u32>, @builtin(local_invocation_index) local: u32 SUBGROUP_BUILTINS
) {
    let id = INVOCATION;
    let lane = id % LANES;
    let col = group_id.x * (WORKGROUP / LANES) + id / LANES;
    let mine = col < call.V;  // the last workgroup may have unused columns
    let hv = group_id.y;
    let n = group_id.z;
    let hq = select(hv / (call.HV / call.H), hv % call.H, has(TILED));
    let KP = 4u * LANES * ROWS4;
    let VP = (call.V + 1u) / 2u * 2u;
    var base = n * call.T;
    var len = call.T;
    if (has(PACKED)) {
        base = words[call.cu + n];
        len = words[call.cu + n + 1u] - base;
    }
    var row = n;
    var skipped = false;
    if (has(SKIPS)) {
        let index = words[call.indices + n];
        skipped = (index >> 31u) != 0u;
        if (has(INDEXED)) { row = index; }
    }
    if (skipped) {
        if (mine) {
            for (var t = lane; t < len; t += LANES) { outputs[((base + t) * call.HV + hv) * call.V + col] = 0.0; }
        }
        return;
    }

    var S: array<vec4<f32>, ROWS4>;
    for (var r = 0u; r < ROWS4; r++) {
        for (var c = 0u; c < 4u; c++) {
            let k = 4u * (r * LANES + lane) + c;
            var x = 0.0;
            if (has(HAS_STATE) && mine && k < call.K) { x = states[call.s_in + state_at(row, hv, k, col)]; }
            S[r][c] = x;
        }
    }

    var A = 0.0;
    if (has(RAW)) { A = exp(number(call.A_log + hv)); }
    for (var t = 0u; t < len; t++) {
        let token = base + t;
        let gate = token * call.HV + hv;
        var live = true;
        if (has(MASKED)) { live = words[call.mask + token] != 0u; }
        var o = 0.0;
        if (live) {
            let qk = (token * call.H + hq) * KP;
            var kk = 1.0;  // 1 / |k|, 1 / |q|
            var qq = 1.0;
            if (has(L2NORM)) {
                var norms = vec4<f32>(0.0);
                for (var r = 0u; r < ROWS4; r++) {
                    let k = load4(call.k, qk, r * LANES + lane);
                    let q = load4(call.q, qk, r * LANES + lane);
                    norms += vec4<f32>(squares(k * SMALL), squares(k * LARGE), squares(q * SMALL), squares(q * LARGE));
                }
                kk = inverse_length(over_lanes(norms.x, id), over_lanes(norms.y, id));
                qq = inverse_length(over_lanes(norms.z, id), over_lanes(norms.w, id));
            }
            // S = diag(a) S;  predicted = S^T k
            var a = 1.0;
            if (!KDA) { a = decay(number(call.g + gate), A, hv); }
            var predicted = 0.0;
            for (var r = 0u; r < ROWS4; r++) {
                let at = r * LANES + lane;
                if (KDA) {
                    let x = bitcast<vec4<f32>>(words4[(call.g + gate * KP) / 4u + at]);
                    let bias = hv * KP + 4u * at;
                    S[r] *= vec4<f32>(decay(x.x, A, bias), decay(x.y, A, bias + 1u), decay(x.z, A, bias + 2u),
                                      decay(x.w, A, bias + 3u));
                } else {
                    S[r] *= a;
                }
                predicted += dot(S[r], load4(call.k, qk, at));
            }
            predicted = kk * over_lanes(predicted, id);
            // d = beta (v - predicted);  S = S + k d^T;  o = scale S^T q
            var v = 0.0;
            if (mine) { v = load1(call.v, (token * call.HV + hv) * VP + col); }
            var beta = number(call.beta + gate);
            if (has(LOGIT)) { beta = sigmoid(beta); }
            let d = kk * beta * (v - predicted);
            for (var r = 0u; r < ROWS4; r++) {
                S[r] += d * load4(call.k, qk, r * LANES + lane);
                o += dot(S[r], load4(call.q, qk, r * LANES + lane));
            }
            o = call.scale * qq * over_lanes(o, id);
        }
        if (mine && lane == 0u) { outputs[gate * call.V + col] = o; }
        let slot = len - 1u - t;
        if (slot < call.Ks && mine) {
            for (var r = 0u; r < ROWS4; r++) {
                for (var c = 0u; c < 4u; c++) {
                    let k = 4u * (r * LANES + lane) + c;
                    if (k >= call.K) { continue; }
                    if (has(SNAPSHOT_ROWS)) {
                        let to = words[call.rows + slot * call.N + n];  // -1: not written
                        if ((to >> 31u) == 0u) { states[call.s_in + state_at(to, hv, k, col)] = S[r][c]; }
                    } else {
                        snapshots[call.snap + slot * call.N * call.HV * call.K * call.V + state_at(n, hv, k, col)] = S[r][c];
                    }
                }
            }
        }
    }

    if (mine && !has(SNAPSHOT_ROWS)) {
        for (var r = 0u; r < ROWS4; r++) {
            for (var c = 0u; c < 4u; c++) {
                let k = 4u * (r * LANES + lane) + c;
                if (k < call.K) { states[call.s_in + state_at(row, hv, k, col)] = S[r][c]; }
            }
        }
    }
}
