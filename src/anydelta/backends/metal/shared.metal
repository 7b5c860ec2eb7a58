// Shared by the Metal kernels of the gated delta rule: the call, its arrays, the float types, the gates, the states.
//
//     S   = diag(exp(g_t)) S            decay    g_t: one number (GDA) or a vector over K (KDA)
//     d_t = beta_t (v_t - S^T k_t)      delta    the prediction reads the decayed state
//     S   = S + k_t d_t^T               update
//     o_t = scale * S^T q_t             output   reads the updated state
//
// Shapes: q, k [B, T, H, K]; v, o [B, T, HV, V]; g [B, T, HV] or [B, T, HV, K]; beta [B, T, HV]; states [.., HV, K, V] or
// [.., HV, V, K]; snapshots [Ks, N, HV, ..]; mask [B, T]; cu_seqlens [N+1]; state_indices [N]; snapshot_indices [Ks, N].
// All strides are run-time numbers, in elements; the last axis of q, k, v, o and a KDA gate is dense. Everything is
// computed and summed in float32; types are converted where memory is read and written.
//
// One text for torch.mps.compile_shader and mx.fast.metal_kernel. The host puts these macros before it (launch.py):
//     AD_K      rows of a state           AD_KDA    0 or 1            AD_QKV     type of q, k, v, o
//     AD_GATE   type of a KDA gate        AD_STATE_IN, AD_STATE_OUT   types of the state read, of those written
#include <metal_stdlib>
using namespace metal;

// Arrays that are indexed by a loop stay in registers only if the loop is unrolled.
#define UNROLL _Pragma("clang loop unroll(full)")

constant constexpr int F32 = 0, BF16 = 1, F16 = 2;  // types, as in backends/devices/params.py
constant constexpr int K = AD_K;
constant constexpr int KP = (K + 31) / 32 * 32;  // rows in registers: those between K and KP hold zeros
constant constexpr bool KDA = AD_KDA;

// AD_PARAMS: the members that backends/devices/structs.py lists.
struct Params {
    AD_PARAMS
};
constant constexpr int DECAY_LINEAR = 1, DECAY_RAW = 2;  // Params.decay; 0: the log of the decay
// AD_FLAGS, bits of Params.flags: which arrays exist. head, tail: the first of a call's two launches, which takes all
// except the last Ks tokens, and the second, which takes those. in_dense: there is no pool to read.
AD_FLAGS

struct Arrays {
    device const uchar *q, *k, *v, *g, *beta, *state_in, *a_log, *dt_bias, *mask, *cu, *indices, *rows;
    device uchar *o, *state_out, *snapshots;
};

// ---- the three float types -----------------------------------------------------------------------------------------

inline float from_bits(int type, ushort x) {
    return type == BF16 ? as_type<float>(uint(x) << 16) : float(as_type<half>(x));
}

// to nearest, ties to even
inline ushort to_bits(int type, float x) {
    if (type == F16) return as_type<ushort>(half(x));
    const uint u = as_type<uint>(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return ushort((u >> 16) | 0x40u);  // NaN stays NaN
    return ushort((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float load1(int type, device const uchar* base, long at) {
    if (type == F32) return ((device const float*)base)[at];
    return from_bits(type, ((device const ushort*)base)[at]);
}

inline void store1(int type, device uchar* base, long at, float x) {
    if (type == F32)
        ((device float*)base)[at] = x;
    else
        ((device ushort*)base)[at] = to_bits(type, x);
}

// Four neighbours. packed_: the address is a multiple of the element's size only.
inline float4 load4(int type, device const uchar* base, long at) {
    if (type == F32) return float4(*(device const packed_float4*)((device const float*)base + at));
    const ushort4 x = ushort4(*(device const packed_ushort4*)((device const ushort*)base + at));
    return type == BF16 ? as_type<float4>(uint4(x) << 16) : float4(as_type<half4>(x));
}

inline void store4(int type, device uchar* base, long at, float4 x) {
    if (type == F32)
        *(device packed_float4*)((device float*)base + at) = packed_float4(x);
    else
        *(device packed_ushort4*)((device ushort*)base + at) = packed_ushort4(
            ushort4(to_bits(type, x.x), to_bits(type, x.y), to_bits(type, x.z), to_bits(type, x.w)));
}

inline float2 load2(int type, device const uchar* base, long at) {
    if (type == F32) return float2(*(device const packed_float2*)((device const float*)base + at));
    const ushort2 x = ushort2(*(device const packed_ushort2*)((device const ushort*)base + at));
    return type == BF16 ? as_type<float2>(uint2(x) << 16) : float2(as_type<half2>(x));
}

inline void store2(int type, device uchar* base, long at, float2 x) {
    if (type == F32)
        *(device packed_float2*)((device float*)base + at) = packed_float2(x);
    else
        *(device packed_ushort2*)((device ushort*)base + at) =
            packed_ushort2(ushort2(to_bits(type, x.x), to_bits(type, x.y)));
}

// Rows row .. row + 3 of a vector over K; those from K on are zeros. The bounds of a sum of squares (with eps)
// inside float32's range, and the factor of x before squaring outside of it. The bounds are finite, because fast
// math has no infinity.
inline bool in_range(float sum) { return !(sum < 0x1p-90f || sum > 0x1p120f); }
inline float unit_for(float sum) { return sum < 1.0f ? 0x1p55f : 0x1p-55f; }

inline float4 rows4(int type, device const uchar* base, long at, int row) {
    if (K % 4 == 0) return K == KP || row < K ? load4(type, base, at + row) : float4(0.0f);
    float4 x = float4(0.0f);
    for (int i = 0; i < 4; ++i)
        if (row + i < K) x[i] = load1(type, base, at + row + i);
    return x;
}

inline long index_at(device const uchar* base, bool wide, long at) {
    return wide ? ((device const long*)base)[at] : long(((device const int*)base)[at]);
}

// ---- the gates -----------------------------------------------------------------------------------------------------
// exp is only taken of numbers <= 0, and nothing computes with infinities: with PYTORCH_MPS_FAST_MATH=1 torch compiles with fast math.

inline float sigmoid(float x) {
    const float e = exp(-abs(x));
    return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

inline float softplus(float x) {  // log(1 + e^x); below 1e-4 the sum would lose e
    const float e = exp(-abs(x));
    return max(x, 0.0f) + (e < 1e-4f ? e - 0.5f * e * e : log(1.0f + e));
}

// The log of the decay of a raw gate: -exp(A_log) softplus(x + bias), or lower_bound sigmoid(exp(A_log) (x + bias)).
template <typename Ref>
inline float activated(Ref P, float x, float bias, float A) {
    x += bias;
    return P.has_lower_bound ? P.lower_bound * sigmoid(A * x) : -A * softplus(x);
}

// exp(-100) is below the smallest float32. Compared as integers, which for negative numbers grow with the magnitude:
// fast math may treat an infinite float in any way.
inline bool vanishes(float log_decay) { return as_type<uint>(log_decay) > as_type<uint>(-100.0f); }

// In [0, 1].
template <typename Ref>
inline float decay_of(Ref P, float x, float bias, float A) {
    if (P.decay == DECAY_LINEAR) return x;
    if (P.decay == DECAY_RAW) x = activated<Ref>(P, x, bias, A);
    return vanishes(x) ? 0.0f : exp(x);
}

// The smallest normal number. Below it there are only zeros on Apple's GPUs, literals included.
constant constexpr float SMALLEST = 1.17549435e-38f;

// In [-100, 0]: sums of these stay precise enough for their differences.
template <typename Ref>
inline float log_decay_of(Ref P, float x, float bias, float A) {
    if (P.decay == DECAY_LINEAR) return x < SMALLEST ? -100.0f : log(x);
    if (P.decay == DECAY_RAW) x = activated<Ref>(P, x, bias, A);
    return vanishes(x) ? -100.0f : x;
}

// ---- what a threadgroup works on -----------------------------------------------------------------------------------

struct Work {
    int n, h, hq;          // sequence, value head, its q/k head: h / (HV/H), or h % H if tiled
    long b, start, end;    // row of the batch; tokens start .. end - 1 of it are the sequence's
    long row_in, row_out;  // of the states; < 0: the sequence is skipped
    float A;               // exp(A_log)
};

template <typename Ref>
inline Work find_work(Ref P, thread const Arrays& a, int n, int h) {
    Work w;
    w.n = n;
    w.h = h;
    w.hq = P.tiled ? h % P.H : h / (P.HV / P.H);
    w.b = n;
    w.start = 0;
    w.end = P.T;
    if (P.flags & PACKED) {
        w.b = 0;
        w.start = index_at(a.cu, P.cu64, n * P.cu);
        w.end = index_at(a.cu, P.cu64, (n + 1) * P.cu);
    }
    w.row_in = w.row_out = n;
    if (P.flags & POOLED) {
        const long row = index_at(a.indices, P.indices64, n * P.indices);
        w.row_in = row >= 0 && (P.flags & IN_DENSE) ? n : row;
        w.row_out = P.out_dense ? n : row;
    }
    w.A = P.decay == DECAY_RAW ? exp(load1(P.a_log_type, a.a_log, h * P.a_log)) : 0.0f;
    return w;
}

template <typename Ref>
inline bool is_live(Ref P, thread const Arrays& a, thread const Work& w, long t) {
    return !(P.flags & MASKED) || a.mask[w.b * P.mask[0] + t * P.mask[1]];
}

template <typename Ref>
inline float beta_of(Ref P, thread const Arrays& a, thread const Work& w, long t) {
    const float x = load1(P.beta_type, a.beta, w.b * P.beta[0] + t * P.beta[1] + w.h * P.beta[2]);
    return P.logit ? sigmoid(x) : x;
}

// The bias of row `row` of a raw gate.
template <typename Ref>
inline float bias_of(Ref P, thread const Arrays& a, thread const Work& w, int row) {
    if (!(P.flags & HAS_DT_BIAS) || row >= K) return 0.0f;
    return load1(P.dt_bias_type, a.dt_bias, w.h * P.dt_bias[0] + row * P.dt_bias[1]);
}
