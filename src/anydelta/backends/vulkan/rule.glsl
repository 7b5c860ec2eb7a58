// Shared by the shaders of the gated delta rule: the call, its buffers, and the gates.
//
//     S   = diag(exp(g_t)) S            decay    g_t: one number (GDA) or a vector over K (KDA)
//     d_t = beta_t (v_t - S^T k_t)      delta    the prediction reads the decayed state
//     S   = S + k_t d_t^T               update
//     o_t = scale * S^T q_t             output   reads the updated state
//
// Shapes: q, k [tokens, H, KP]; v, o [tokens, HV, V]; g [tokens, HV] or [tokens, HV, KP]; beta [tokens, HV];
// S [rows, HV, K, V] or [rows, HV, V, K]; snapshots [Ks, N, HV, ...]. The host lays the inputs out densely, with K
// zero-padded to KP, so that a padded row of S stays zero. All sums are in float32.
//
// Compiled with SUBGROUP for drivers with subgroup shuffles, with HALF for those with 16-bit storage buffers.

#extension GL_EXT_control_flow_attributes : require
#ifdef HALF
#extension GL_EXT_shader_16bit_storage : require
#endif
#ifdef SUBGROUP
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_arithmetic : require
#extension GL_KHR_shader_subgroup_shuffle : require
#endif

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint LANES = 1;      // invocations that share one column of S
layout(constant_id = 2) const uint ROWS4 = 16;     // rows of S per invocation, in groups of four
layout(constant_id = 3) const bool KDA = false;
layout(constant_id = 4) const uint DTYPE = 0;      // type of q, k, v, o: one of the three below
layout(constant_id = 6) const uint STATES = 0;     // bit 0: the state read is bfloat16; bit 1: those written are
layout(constant_id = 5) const uint CHUNK = 16;     // tokens per chunk, for chunk.comp

const uint FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2;

// One buffer holds all inputs; offsets are in words of 4 bytes and multiples of 4.
layout(std430, binding = 0) readonly buffer Words4 { vec4 in4[]; };
layout(std430, binding = 0) readonly buffer Pairs { uvec2 in2[]; };
layout(std430, binding = 0) readonly buffer Words { float in1[]; };
layout(std430, binding = 0) readonly buffer Ints { int ints[]; };
layout(std430, binding = 0) readonly buffer Bits { uint bits[]; };
layout(std430, binding = 1) writeonly buffer Out32 { float o32[]; };
layout(std430, binding = 2) buffer In32 { float s32_in[]; };  // a state may be read and written in one buffer
layout(std430, binding = 3) buffer State32 { float s32_out[]; };
layout(std430, binding = 4) buffer Snapshots32 { float snap32[]; };
#ifdef HALF
layout(std430, binding = 1) writeonly buffer Out16 { uint16_t o16[]; };
layout(std430, binding = 2) buffer In16 { uint16_t s16_in[]; };
layout(std430, binding = 3) buffer State16 { uint16_t s16_out[]; };
layout(std430, binding = 4) buffer Snapshots16 { uint16_t snap16[]; };
#endif

// Flags and the members of Call, from backends/devices/structs.py.
#include "flags.glsl"

layout(push_constant) uniform Call {
#include "call.glsl"
} call;

bool has(uint flag) { return (call.flags & flag) != 0; }

// The work of one workgroup, the same for all of its invocations.
uint n;      // sequence
uint hv;     // value head
uint hq;     // its query/key head: hv / (HV/H), or hv % H if tiled
uint base;   // first token of the sequence among all tokens
uint len;    // its number of tokens
uint row_in, row_out;  // its rows of the states
bool skipped;          // the sequence's index is -1

void find_work() {
    n = gl_WorkGroupID.z;
    hv = gl_WorkGroupID.y;
    hq = has(TILED) ? hv % call.H : hv / (call.HV / call.H);
    base = n * call.T;
    len = call.T;
    if (has(PACKED)) {
        base = uint(ints[call.cu + n]);
        len = uint(ints[call.cu + n + 1]) - base;
    }
    row_in = row_out = n;
    skipped = false;
    if (has(SKIPS)) {
        const int index = ints[call.indices + n];
        skipped = index < 0;
        if (has(IN_INDEXED)) row_in = uint(index);
        if (has(OUT_INDEXED)) row_out = uint(index);
    }
}

// In a long prompt chunk.comp takes all tokens except those whose states are wanted, recurrent.comp the rest.
uint chunked_tokens() { return has(CHUNKED) ? len - min(len, call.Ks) : 0; }

bool live(uint token) { return !has(MASKED) || bits[call.mask + token] != 0; }

// ---- the three float types -----------------------------------------------------------------------------------------

float from_bf16(uint x) { return uintBitsToFloat(x << 16); }

uint to_bf16(float x) {  // to nearest, ties to even
    const uint b = floatBitsToUint(x);
    if ((b & 0x7fffffff) > 0x7f800000) return (b >> 16) | 0x40;  // NaN stays NaN
    return (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}

uint to_f16(float x) {  // packHalf2x16 may round in any direction; this rounds to nearest, ties to even
    uint b = floatBitsToUint(x);
    const uint sign = (b >> 16) & 0x8000;
    b &= 0x7fffffff;
    if (b > 0x7f800000) return sign | 0x7e00;
    if (b >= 0x477ff000) return sign | 0x7c00;  // 65520 and above are infinite
    if (b < 0x38800000) return sign | (floatBitsToUint(uintBitsToFloat(b) + 0.5) - 0x3f000000);  // below 2^-14
    return sign | ((b - 0x38000000 + 0xfff + ((b >> 13) & 1)) >> 13);
}

// Four values from group `group` of a row that begins at word offset `words`; element offset `row`.
vec4 load4(uint words, uint row, uint group) {
    if (DTYPE == FLOAT32) return in4[(words + row) / 4 + group];
    const uvec2 h = in2[(words + row / 2) / 2 + group];
    if (DTYPE == FLOAT16) return vec4(unpackHalf2x16(h.x), unpackHalf2x16(h.y));
    return vec4(from_bf16(h.x), uintBitsToFloat(h.x & 0xffff0000), from_bf16(h.y), uintBitsToFloat(h.y & 0xffff0000));
}

float load1(uint words, uint element) {
    if (DTYPE == FLOAT32) return in1[words + element];
    const uint h = (bits[words + element / 2] >> (16 * (element & 1))) & 0xffff;
    return DTYPE == FLOAT16 ? unpackHalf2x16(h).x : from_bf16(h);
}

void store_o(uint token, uint col, float x) {  // o [tokens, HV, V]
    const uint at = (token * call.HV + hv) * call.V + col;
#ifdef HALF
    if (DTYPE == BFLOAT16) o16[at] = uint16_t(to_bf16(x));
    if (DTYPE == FLOAT16) o16[at] = uint16_t(to_f16(x));
#endif
    if (DTYPE == FLOAT32) o32[at] = x;
}

// ---- the state -----------------------------------------------------------------------------------------------------

// S [rows, HV, K, V], or [rows, HV, V, K]: a column begins here, and its rows are this far apart
uint column_of(uint row, uint col) {
    return (row * call.HV + hv) * call.K * call.V + (has(VK) ? col * call.K : col);
}
uint row_step() { return has(VK) ? 1 : call.V; }

float load_state(uint at) {
#ifdef HALF
    if ((STATES & 1) != 0) return from_bf16(uint(s16_in[call.s_in + at]));
#endif
    return s32_in[call.s_in + at];
}

void store_state(uint at, float x) {
#ifdef HALF
    if ((STATES & 2) != 0) {
        s16_out[call.s_out + at] = uint16_t(to_bf16(x));
        return;
    }
#endif
    s32_out[call.s_out + at] = x;
}

bool snapshot_wanted(uint slot) {  // a row of -1 is not written
    return !has(SNAPSHOT_ROWS) || int(ints[call.rows + slot * call.N + n]) >= 0;
}

uint snapshot_column(uint slot, uint col) {  // [Ks, N, HV, ...], or a row of the pool
    const uint row = slot * call.N + n;
    return column_of(has(SNAPSHOT_ROWS) ? uint(ints[call.rows + row]) : row, col);
}

void store_snapshot(uint at, float x) {
#ifdef HALF
    if ((STATES & 2) != 0) {
        snap16[call.snap + at] = uint16_t(to_bf16(x));
        return;
    }
#endif
    snap32[call.snap + at] = x;
}

// ---- the gates -----------------------------------------------------------------------------------------------------

float sigmoid(float x) {  // exp only of numbers <= 0
    const float e = exp(-abs(x));
    return (x >= 0 ? 1.0 : e) / (1.0 + e);
}

float softplus(float x) {  // log(1 + exp(x)); below 1e-4 a logarithm in float32 would lose e
    const float e = exp(-abs(x));
    return max(x, 0.0) + (e < 1e-4 ? e - 0.5 * e * e : log(1.0 + e));
}

float activated(float x, float A, uint bias) {  // the log decay of a raw gate
    if (has(DT_BIAS)) x += in1[call.dt_bias + bias];
    return has(LOWER) ? call.lower_bound * sigmoid(A * x) : -A * softplus(x);
}

// exp(-100) is below the smallest float32; comparing first keeps NaN and is exact for -inf
float decay_of(float log_decay) { return log_decay < -100 ? 0.0 : exp(log_decay); }

float A_of_head() { return has(RAW) ? exp(in1[call.A_log + hv]) : 0.0; }

float decay1(float x, float A, uint bias) {
    if (has(LINEAR)) return x;
    return decay_of(has(RAW) ? activated(x, A, bias) : x);
}

float log_decay1(float x, float A, uint bias) {
    if (has(LINEAR)) x = log(x);
    if (has(RAW)) x = activated(x, A, bias);
    return x < -100 ? -100.0 : x;
}

float beta_of(uint token) {
    const float x = in1[call.beta + token * call.HV + hv];
    return has(LOGIT) ? sigmoid(x) : x;
}

// ---- the column of an invocation -----------------------------------------------------------------------------------

// A workgroup owns some columns (the axis V) of one head of one sequence. LANES invocations share a column: lane l
// has the rows 4 (r LANES + l) .. + 3 for r < ROWS4, so neighbours read neighbouring 16 bytes of k and q. Columns are
// independent. The only sums across invocations are the LANES partial sums of S^T k and S^T q.
const uint KP = 4 * LANES * ROWS4;

uint id;      // of this invocation in the workgroup; the lanes of a column are in one subgroup
uint lane;    // of the column
uint col;
bool mine;    // the last workgroup may have unused columns
vec4 S[ROWS4];

#ifndef SUBGROUP
shared float partial[gl_WorkGroupSize.x];
#endif

// The bounds of a sum of squares (with eps) inside float32's range, and the factor of x before
// squaring outside of it.
bool in_range(float sum) { return !(sum < exp2(-90.0) || sum > exp2(120.0)); }
float unit_for(float sum) { return exp2(sum < 1.0 ? 55.0 : -55.0); }

// The sum of x over the lanes of the column, which each of them gets.
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

void find_column() {
#ifdef SUBGROUP
    id = gl_SubgroupID * gl_SubgroupSize + gl_SubgroupInvocationID;
#else
    id = gl_LocalInvocationIndex;
#endif
    lane = id % LANES;
    col = gl_WorkGroupID.x * (gl_WorkGroupSize.x / LANES) + id / LANES;
    mine = col < call.V;
}

float load_v(uint token) {
    return mine ? load1(call.v, (token * call.HV + hv) * ((call.V + 1) & ~1u) + col) : 0.0;
}

// The output of a sequence without a state: zeros.
void skip() {
    for (uint t = lane; t < len && mine; t += LANES) store_o(base + t, col, 0);
    if (has(ZERO_SKIPPED) && mine)
        for (uint row = lane; row < call.K; row += LANES) store_state(column_of(row_out, col) + row * row_step(), 0);
}

void load_column() {
    const uint step = row_step();
    [[unroll]] for (uint r = 0; r < ROWS4; ++r) S[r] = vec4(0);
    if (!has(HAS_STATE) || !mine) return;
    const uint at = column_of(row_in, col);
    [[unroll]] for (uint r = 0; r < ROWS4; ++r)
        [[unroll]] for (uint c = 0; c < 4; ++c) {
            const uint row = 4 * (r * LANES + lane) + c;
            if (row < call.K) S[r][c] = load_state(at + row * step);
        }
}

void store_column() {
    if (!has(WRITE_STATE) || !mine) return;
    const uint at = column_of(row_out, col), step = row_step();
    [[unroll]] for (uint r = 0; r < ROWS4; ++r)
        [[unroll]] for (uint c = 0; c < 4; ++c) {
            const uint row = 4 * (r * LANES + lane) + c;
            if (row < call.K) store_state(at + row * step, S[r][c]);
        }
}
