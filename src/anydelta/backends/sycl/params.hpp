// The host's description of a call: addresses, then the members that backends/devices/structs.py lists.
#pragma once

#include <cstdint>

namespace anydelta {

enum Array { Q, K, V, G, BETA, STATE_IN, A_LOG, DT_BIAS, MASK, CU, INDICES, O, STATE_OUT, SNAPSHOTS, ARRAYS };
enum Type : int { F32, BF16, F16 };
enum Decay : int { LOG, LINEAR, RAW };

// Strides in elements, outermost axis first.
struct Params {
    std::uint64_t at[ARRAYS];  // addresses; ~0 for an absent array
#include "params_members.hpp"
};

}  // namespace anydelta
