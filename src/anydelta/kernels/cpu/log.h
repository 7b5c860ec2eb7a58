// The log form of rollback, as raw pointers: a base state S0 per sequence, and for each token since an entry (k, d, a).
// Shared by the host and every ISA build; log.inl.h has the maths.
#pragma once
#include "problem.h"

namespace anydelta {

struct Log {
    // verify: a call whose states are only read. fold: in and out, B = N and T = 0. state_indices [N] name the base rows.
    Problem rule;
    int64_t capacity;  // C, entries per sequence
    float* keys = nullptr;  // [R, C, H, K]: k_t, after the norm
    float* deltas = nullptr;  // [R, C, HV, V]: d_t
    float* decays = nullptr;  // [R, C, HV] or [R, C, HV, K]: a_t in [0, 1]
    const int64_t* parents = nullptr;  // [R, C]: the entry before this one, or -1 for the base state
    const int64_t* rows = nullptr;  // [N]: R of each sequence
    const int64_t* used = nullptr;  // [N]: entries before this block (verify), or to fold, 0 for none (fold)
    const int64_t* out_rows = nullptr;  // [N], fold: the row of the new base state
};

}  // namespace anydelta
