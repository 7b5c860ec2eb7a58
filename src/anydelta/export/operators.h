// The order of the operators' arguments (rule/arguments.py), for runtimes that pass them as a list: the tensors in
// this order, then the options, output_final_state (not for the in-place operator), backend
#pragma once
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "spec.h"

// A C function of the library.
#if defined(_WIN32)
#define ANYDELTA_EXPORT extern "C" __declspec(dllexport)
#else
#define ANYDELTA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace anydelta {

// The tensors of one call, in the runtime's own type.
template <class T>
struct TensorsOf {
#define ANYDELTA_MEMBER(name, ...) T name;
    ANYDELTA_ARRAYS(ANYDELTA_MEMBER)
#undef ANYDELTA_MEMBER
};

enum class Presence { required, optional };

template <class T>
struct OperatorOf {
    const char* name;
    bool inplace;
    std::vector<T TensorsOf<T>::*> tensors;
    std::vector<Presence> presence;  // of the tensors

    size_t arguments() const {
#define ANYDELTA_COUNT(...) +1
        return tensors.size() + (0 ANYDELTA_OPTIONS(ANYDELTA_COUNT)) + (inplace ? 1 : 2);
#undef ANYDELTA_COUNT
    }
    bool optional(size_t i) const { return presence[i] == Presence::optional; }
    // The name in error messages: the public function's.
    const char* op() const { return inplace ? "gated_delta_rule_" : "gated_delta_rule"; }
};

#define ANYDELTA_ADDRESS(presence, name, kind) &TensorsOf<T>::name,
#define ANYDELTA_PRESENCE(presence, name, kind) Presence::presence,
#define ANYDELTA_OPERATOR(name, inplace)                                 \
    {                                                                    \
        #name, inplace, {ANYDELTA_ARGUMENTS_##name(ANYDELTA_ADDRESS)}, { \
            ANYDELTA_ARGUMENTS_##name(ANYDELTA_PRESENCE)                 \
        }                                                                \
    }
template <class T>
inline const OperatorOf<T> FUNCTIONAL ANYDELTA_OPERATOR(gated_delta_rule, false);
template <class T>
inline const OperatorOf<T> SNAPSHOTS ANYDELTA_OPERATOR(gated_delta_rule_snapshots, false);
template <class T>
inline const OperatorOf<T> INPLACE ANYDELTA_OPERATOR(gated_delta_rule_, true);

// A program without Python has these kernels and no other backend.
inline void require_cpu(const char* op, const std::string& backend) {
    if (backend != "auto" && backend != "cpu")
        throw std::invalid_argument(
            std::string(op) + ": backend must be 'auto' or 'cpu' in a program without Python; got '" + backend + "'");
}

// Read every tensor of a call by `read(T) -> Array`.
template <class T, class Read>
Call call_of(const TensorsOf<T>& t, Read read) {
    Call call;
#define ANYDELTA_READ(name, ...) call.name = read(t.name);
    ANYDELTA_ARRAYS(ANYDELTA_READ)
#undef ANYDELTA_READ
    return call;
}

}  // namespace anydelta
