// What the host tells the kernel about a call. Python packs these bytes (backends/params.py), field by field.
#pragma once

#include <cstdint>

namespace anydelta {

enum Array { Q, K, V, G, BETA, STATE_IN, A_LOG, DT_BIAS, MASK, CU, INDICES, O, STATE_OUT, SNAPSHOTS, ARRAYS };
enum Type : int { F32, BF16, F16 };
enum Decay : int { LOG, LINEAR, RAW };

// Strides in elements, outermost axis first.
struct Params {
    std::uint64_t at[ARRAYS];                                              // addresses; ~0 for an absent array
    std::int64_t q[4], k[4], v[4], g[4], beta[3], o[4];  // q, k [B, T, H, K]  v, o [B, T, HV, V]  ...
    std::int64_t state_in[4], state_out[4], snapshots[5];  // [.., h, K, V] whatever the layout
    std::int64_t mask[2], a_log, dt_bias[2], cu, indices;
    std::int64_t T;
    int H, HV, K, V, N, Ks;
    int qkv_type, g_type, beta_type, a_log_type, dt_bias_type, state_type;
    int tiled, decay, has_lower_bound, beta_is_logit, l2norm, cu64, indices64, out_dense;
    float scale, eps, lower_bound;
    int padding;
};
static_assert(sizeof(Params) == 560, "as _PARAMS in backends/params.py");

}  // namespace anydelta
