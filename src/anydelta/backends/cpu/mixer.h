// One call of the gated delta mixer, as raw pointers and element strides: everything between the projections of a
// linear attention layer. Shared by the host and every ISA build.
//
//     y_t     = silu(sum_j w[c, j] x_(t - W + 1 + j) + bias[c])     causal convolution of every channel c of q, k, v
//     o_t     = gated delta rule (problem.h) of q, k, v = split(y)
//     out_t   = o_t / sqrt(mean o_t^2 + eps) * norm_weight * gate(z_t)
#pragma once
#include "problem.h"

namespace anydelta {

// [B, T, groups, per * width]: a group has `per` heads of `width` channels side by side; the channels are contiguous.
struct GroupedTokens {
    const void* data = nullptr;
    DType dtype = DType::f32;
    int64_t b = 0, t = 0, g = 0, per = 1;
};

// [N or P, C, S]: the last S inputs of each channel, the newest last.
struct Windows {
    void* data = nullptr;
    DType dtype = DType::f32;
    int64_t n = 0, c = 0, s = 0, slot = 0;
};

enum class NormGate : int { none = 0, silu = 1, sigmoid = 2 };

constexpr int64_t MAX_TAPS = 32;

struct Mixer {
    Problem rule;  // everything except q, k, v and o, which are made and taken in batches of tokens
    GroupedTokens q, k, v, z, o;
    int64_t W, S;  // taps of the convolution, columns of its state
    const void* weight = nullptr;
    DType weight_dtype = DType::f32;
    int64_t weight_c = 0, weight_w = 0;  // strides of [C, W]
    const void* bias = nullptr;          // [C] or null
    DType bias_dtype = DType::f32;
    bool silu = true;
    Windows conv, conv_snapshots;
    const void* norm_weight = nullptr;  // [V] or null: ones
    DType norm_dtype = DType::f32;
    bool norm = false;
    NormGate gate = NormGate::none;
    float norm_eps = 0.0f;
};

// `heads` consecutive heads of q and k of one sequence with all their value heads: the unit of parallel work. No
// other task reads or writes the states of a task.
struct MixerTask {
    int64_t n, h0, heads;
};

}  // namespace anydelta
