// What a valid call is, for programs without Python: the rules of spec.py, in the same order and with the same
// messages.
// tests/test_torch_library.py gives every wrong call of tests/test_invalid_calls.py to both and compares the texts.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "problem.h"

namespace anydelta {

// The most elements of one array: more than memory holds, and few enough that products of sizes fit 64 bits.
constexpr int64_t MAX_NUMBERS = int64_t{1} << 48;

enum class Type : uint8_t { f32, bf16, f16, f64, i32, i64, boolean, other };

// One of the caller's arrays; strides count elements. `dims` < 0: the argument was not given.
struct Array {
    void* data = nullptr;
    const int64_t* sizes = nullptr;
    const int64_t* strides = nullptr;
    int dims = -1;
    Type type = Type::other;
    const char* type_name = nullptr;  // the name of an unsupported type, for errors

    bool given() const { return dims >= 0; }
    // Whether the kernels can read it as it is: contiguous last dimension, and no float64 gate.
    bool plain() const { return type != Type::f64 && (dims == 0 || strides[dims - 1] == 1 || sizes[dims - 1] <= 1); }
    bool contiguous() const {
        int64_t step = 1;
        for (int i = dims; i-- > 0; step *= sizes[i])
            if (strides[i] != step && sizes[i] > 1) return false;
        return type != Type::f64;
    }
};

// The arrays of one call, by their names in the in-place operator. The host allocates `o` (contiguous like v) and
// `state_out` (contiguous [N, HV, K, V] or [N, HV, V, K], or absent).
struct Call {
#define ANYDELTA_MEMBER(name, ...) Array name;
    ANYDELTA_ARRAYS(ANYDELTA_MEMBER)
#undef ANYDELTA_MEMBER
    void* o = nullptr;
    void* state_out = nullptr;
};

struct Options {
    const char* op = "gated_delta_rule";
    bool inplace = false;

    // As in rule/arguments.py.
    using flag = bool;
    using number = double;
    using maybe = std::optional<double>;
    using choice = std::string;
#define ANYDELTA_MEMBER(kind, name, value, ...) kind name = value;
    ANYDELTA_OPTIONS(ANYDELTA_MEMBER)
#undef ANYDELTA_MEMBER

    // Calls f("name", member) for each, in the order of the operators.
    template <class F>
    void each(F f) {
#define ANYDELTA_EACH(kind, name, ...) f(#name, name);
        ANYDELTA_OPTIONS(ANYDELTA_EACH)
#undef ANYDELTA_EACH
    }
};

// The sizes of a valid call, as in docs/conventions.md.
struct Spec {
    int64_t B, T, H, HV, K, V, N, P;
    Type state_type;
    bool kda, vk;
};

// All checks that need no index data and no gradients.
// Throws std::invalid_argument, "[op]: NAME must be X; got Y", before anything is read or written.
Spec check(const Call& call, const Options& options);
// The checks of index data: cu_seqlens, state_indices and snapshot_indices. Throws likewise.
void check_values(const Call& call, const Options& options, const Spec& spec);

// What the kernels need, and the index arrays as int64. The arrays of the call must be plain(), A_log and
// dt_bias contiguous().
struct Prepared {
    Problem problem{};
    std::vector<int64_t> cu_seqlens, state_indices, snapshot_indices;
};
void prepare(const Call& call, const Options& options, const Spec& spec, Prepared& out);

}  // namespace anydelta
