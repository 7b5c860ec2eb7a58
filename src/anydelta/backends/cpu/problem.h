// One call of the gated delta rule, as raw pointers and element strides. Shared by the host and every ISA build.
//
// Per sequence n and value head hv, with the state S of shape [K, V], float32 accumulation:
//     S   = diag(a_t) S               decay    a_t = exp(g_t): one number (GDA) or a vector over K (KDA)
//     d_t = beta_t (v_t - S^T k_t)    delta
//     S   = S + k_t d_t^T             update
//     o_t = scale * S^T q_t           output
#pragma once
#include <cstddef>
#include <cstdint>

#include "arguments.h"

namespace anydelta {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Decay : int { log = 0, linear = 1, raw = 2 };

// [B, T, heads, channels]; the channels are contiguous. Strides count elements.
struct Tokens {
    void* data = nullptr;
    DType dtype = DType::f32;
    int64_t b = 0, t = 0, h = 0, heads = 0;
};

// [N or P, HV, rows, columns] (kv: rows = K, columns = V); the columns are contiguous. Strides count elements.
struct States {
    void* data = nullptr;
    int64_t n = 0, h = 0, row = 0, slot = 0;
};

struct Problem {
    int64_t B, T, H, HV, K, V, N;
    bool kda, tiled, vk, has_lower_bound;
    Decay decay;
    float scale, lower_bound;
#define ANYDELTA_MEMBER(type, name) type name;
    ANYDELTA_PLAIN_OPTIONS(ANYDELTA_MEMBER)  // as in rule/arguments.py, like the arrays below
#undef ANYDELTA_MEMBER
    float beta_scale = 1.0f;

#define ANYDELTA_MEMBER(name, ...) Tokens name;
    ANYDELTA_TOKENS(ANYDELTA_MEMBER)
#undef ANYDELTA_MEMBER
    Tokens o;
    const void* A_log = nullptr;    // [HV]
    const void* dt_bias = nullptr;  // [HV] or [HV, K], or null
    DType A_log_dtype = DType::f32, dt_bias_dtype = DType::f32;
    const uint8_t* mask = nullptr;  // [B, T], 0 = leave the state alone
    int64_t mask_b = 0, mask_t = 0;

    DType state_dtype = DType::f32;  // of in, out and snapshots
    States in, out, snapshots;       // in.data null: zeros; out.data null: no final state wanted
    bool out_dense = false;          // out is indexed by n even when `in` is a pool
    int64_t Ks = 0;

    const int64_t* cu_seqlens = nullptr;     // [N + 1] or null: sequence n is row n of the batch
    const int64_t* state_indices = nullptr;  // [N] or null; -1 skips
    // [Ks, N] or null: slot s of sequence n is this row of `snapshots`, which is then the pool `in`. -1: that
    // state is not written.
    const int64_t* snapshot_indices = nullptr;
    // [N] or null: the row of `out` that receives the final state of sequence n, if it has a token; -1: none
    const int64_t* out_rows = nullptr;
};

// Columns [col0, col0 + cols) of `heads` consecutive value heads of one sequence: the unit of parallel work. Column
// ranges are whole panels, so that splitting never changes the arithmetic of a column.
struct Task {
    int64_t n, hv0, heads, col0, cols;
    const char* next_state;  // where the following task will read: prefetched while this one writes
    int64_t step = 1;        // from one value head to the next
};

// The most heads of one task. Their rows of q, k, v and o share pages of memory.
constexpr int64_t MAX_HEADS = 8;

struct Mixer;  // mixer.h
struct Log;    // log.h
struct MixerTask;
struct Backward;  // backward.h
struct BackwardTask;

// What one instruction set provides.
struct Kernels {
    const char* name;
    int lanes;
    int64_t panel;  // columns per panel
    size_t (*workspace)(const Problem&, int64_t heads);
    const char* (*run)(const Problem&, const Task&, char* workspace);  // the name compiled into the build that ran
    double (*fma_loop)(int64_t rounds);  // FLOPs done
    size_t (*mixer_workspace)(const Mixer&, int64_t heads);
    const char* (*mix)(const Mixer&, const MixerTask&, char* workspace);
    size_t (*log_workspace)(const Log&);
    const char* (*verify)(const Log&, const Task&, char* workspace);
    const char* (*fold)(const Log&, const Task&, char* workspace);
    size_t (*backward_workspace)(const Backward&);
    size_t (*kept_bytes)(const Problem&, bool x);
    const char* (*differentiate)(const Backward&, const BackwardTask&, char* workspace);
};

}  // namespace anydelta
