// The log form of rollback, as raw pointers: a base state S0 per sequence, and for each token since an entry (k, d, a).
// Shared by the host and every ISA build; log.inl.h has the maths.
#pragma once
#include "problem.h"

namespace anydelta {

struct Log {
    // verify: a call that reads its states, and writes them only if folds[n]. fold: in and out, B = N and T = 0.
    // state_indices [N] name the rows of the base states.
    Problem rule;
    int64_t capacity;  // C, entries per sequence
    DType key_dtype = DType::f32;
    void* keys = nullptr;  // [R, H, C, K], as the caller gave them: k_t = factor * key
    float* factors = nullptr;  // [R, H, C]: factor of the norm; 0 if the token was masked
    float* deltas = nullptr;  // [R, HV, C, V]: d_t
    float* decays = nullptr;  // [R, HV, C] or [R, HV, C, K]: a_t in [0, 1]
    const int64_t* parents = nullptr;  // [R, C]: the entry before this one, or -1 for the base state
    const int64_t* rows = nullptr;  // [N]: the row R of each sequence
    const int64_t* used = nullptr;  // [N]: entries before this block (verify), or entries to fold, 0 for none (fold)
    const int64_t* folds = nullptr;  // [N] or null, verify: 1: fold all entries into the state now and start a new log
    const int64_t* out_rows = nullptr;  // [N], fold: the row that receives the new base state
};

}  // namespace anydelta
