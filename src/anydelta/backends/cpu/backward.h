// The gradients of a call of the rule or of the mixer, as raw pointers. Shared by the host and every ISA build. The
// maths is in backward.inl.h and mixer_backward.inl.h.
#pragma once
#include "mixer.h"

namespace anydelta {

// What the mixer adds to the rule: rows of q, k and v that are computed, and gradients that pass through it.
struct AroundBackward {
    Mixer m;  // the call; its outputs are not read
    GroupedTokens d_o;  // d loss / d out
    Windows d_final;    // d loss / d final conv state, [N, C, S]; data null: zeros
    GroupedTokens d_q, d_k, d_v, d_z;  // written at every token
    float* d_conv = nullptr;  // [N, C, S]: gradient of the conv state, or null
    float* d_weight = nullptr;  // [N, C, W]: what each sequence adds to it
    float* d_bias = nullptr;  // [N, C]: the same, or null
    float* d_norm = nullptr;  // [N, HV, V]: the same, or null
};

struct Backward {
    Problem rule;  // the call; its results are not read
    Tokens d_o;    // d loss / d o
    States d_final;  // d loss / d final state, in the call's layout and state dtype; data null: zeros
    Tokens d_q, d_k, d_v, d_g, d_beta, d_erase;  // written at every token; data null if the call has no such array
    float* d_initial = nullptr;  // [N, HV, K, V] in the call's layout, or null
    float* d_A_log = nullptr;  // [N, HV]: what each sequence adds, or null; kernels add to [segments, HV]
    float* d_dt_bias = nullptr;  // [N, HV] or [N, HV, K]: the same, or null
    int64_t longest = 0;  // tokens of the longest sequence
    const AroundBackward* mixer =
        nullptr;  // in a call of the mixer; `rule` then has no q, k, v, d_o or their gradients

    static constexpr int64_t SPAN = 64;  // tokens between two kept states
    static int64_t spans(int64_t tokens) { return (tokens + SPAN - 1) / SPAN; }
    static constexpr int64_t SEGMENT =
        8;  // spans per task if there are few heads; spans are also summed in groups of so many
    static int64_t segments(int64_t tokens) { return (spans(tokens) + SEGMENT - 1) / SEGMENT; }
    int64_t tokens(int64_t n) const { return rule.cu_seqlens ? rule.cu_seqlens[n + 1] - rule.cu_seqlens[n] : rule.T; }
};

// What a task does: everything, or, if there are few heads, one of three passes that together give the same result.
enum class BackwardPass : int {
    whole,
    states,  // forward: the state at the beginning of each segment, except the first
    d_states,  // backward: their gradients
    segment,  // everything, of one segment
};

// The value heads of one q/k head of one sequence. Their gradients of q and k are added, always in the same order.
struct BackwardTask {
    int64_t n, h;
    char* kept;  // spans(tokens of the sequence or segment) * kept_bytes, 64-byte aligned
    bool keeps_x;  // keep x of all tokens too: saves a product with the state, same results
    int64_t row = 0;  // row of d_A_log and d_dt_bias of the sequence's first segment
    BackwardPass pass = BackwardPass::whole;
    int64_t segment = 0;
    int64_t panel0 = 0, panel1 = INT64_MAX;  // columns of the state, for `states` and `d_states`
    float *starts = nullptr, *d_starts = nullptr;  // of segments 1, 2, ..: states and their gradients, kept_bytes each
};

}  // namespace anydelta
