// The gradients of a call of the rule or of the mixer, as raw pointers. Shared by the host and every ISA build;
// backward.inl.h and mixer_backward.inl.h have the maths.
#pragma once
#include "mixer.h"

namespace anydelta {

// What the mixer has around the rule: rows of q, k and v that are made, and gradients that go further.
struct AroundBackward {
    Mixer m;  // the call; its outputs are not read
    GroupedTokens d_o;  // d loss / d out
    Windows d_final;    // d loss / d final conv state, [N, C, S]; data null: zeros
    GroupedTokens d_q, d_k, d_v, d_z;  // written in every token
    float* d_conv = nullptr;  // [N, C, S]: of the conv state, or null
    float* d_weight = nullptr;  // [N, C, W]: what each sequence adds
    float* d_bias = nullptr;  // [N, C]: the same, or null
    float* d_norm = nullptr;  // [N, HV, V]: the same, or null
};

struct Backward {
    Problem rule;  // the call; its results are not read
    Tokens d_o;    // d loss / d o
    States d_final;  // d loss / d final state, in the call's layout and state dtype; data null: zeros
    Tokens d_q, d_k, d_v, d_g, d_beta, d_erase;  // written in every token; data null where the call has no such array
    float* d_initial = nullptr;  // [N, HV, K, V] in the call's layout, or null
    float* d_A_log = nullptr;  // [N, HV]: what each sequence adds, or null; a kernel adds to [segments, HV] instead
    float* d_dt_bias = nullptr;  // [N, HV] or [N, HV, K]: the same, or null
    int64_t longest = 0;  // tokens of the longest sequence
    const AroundBackward* mixer =
        nullptr;  // of a call of the mixer, whose rule `rule` is: without q, k, v, d_o and theirs

    static constexpr int64_t SPAN = 64;  // tokens between the states that are kept
    static int64_t spans(int64_t tokens) { return (tokens + SPAN - 1) / SPAN; }
    static constexpr int64_t SEGMENT =
        8;  // spans that are summed before they are added up, and a task where heads are few
    static int64_t segments(int64_t tokens) { return (spans(tokens) + SEGMENT - 1) / SEGMENT; }
    int64_t tokens(int64_t n) const { return rule.cu_seqlens ? rule.cu_seqlens[n + 1] - rule.cu_seqlens[n] : rule.T; }
};

// What a task does: everything; or where heads are few, one of the three passes that give the same together.
enum class BackwardPass : int {
    whole,
    states,  // forward: the states at the beginning of each segment but the first
    d_states,  // backward: their gradients
    segment,  // everything, of one segment
};

// The value heads of one q/k head of one sequence: whose gradients of q and k are added up, always in the same order.
struct BackwardTask {
    int64_t n, h;
    char* kept;  // spans(tokens), or of a segment, times kept_bytes, at a multiple of 64
    bool keeps_x;  // x of all tokens too, which saves a product with the state; the results are the same
    int64_t row = 0;  // of d_A_log and d_dt_bias: that of the sequence's first segment
    BackwardPass pass = BackwardPass::whole;
    int64_t segment = 0;
    int64_t panel0 = 0, panel1 = INT64_MAX;  // columns of the state, of `states` and `d_states`
    float *starts = nullptr, *d_starts = nullptr;  // of segments 1, 2, ..: states and their gradients, kept_bytes each
};

}  // namespace anydelta
