// The order of the operators' arguments (rule/arguments.py), for runtimes that hand them over as a list: the tensors in
// this order (the first `required` of them always there), then the flags
//     scale, decay, lower_bound, beta_is_logit, heads, qk_l2norm, qk_l2norm_eps, state_layout,
//     output_final_state (not of the in-place operator), backend
#pragma once
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "spec.h"

namespace anydelta {

// The tensors of one call in the runtime's own type.
template <class T>
struct TensorsOf {
    T q, k, v, g, beta, state, A_log, dt_bias, mask, cu_seqlens, state_indices, snapshots, snapshot_indices;
};

template <class T>
struct OperatorOf {
    const char* name;
    bool inplace;
    std::vector<T TensorsOf<T>::*> tensors;
    size_t required;

    size_t flags() const { return inplace ? 9 : 10; }
    size_t arguments() const { return tensors.size() + flags(); }
    // The name in error messages: that of the public function.
    const char* op() const { return inplace ? "gated_delta_rule_" : "gated_delta_rule"; }
};

template <class T, class S = TensorsOf<T>>
inline const OperatorOf<T> FUNCTIONAL{"gated_delta_rule",
                                      false,
                                      {&S::q, &S::k, &S::v, &S::g, &S::beta, &S::state, &S::A_log, &S::dt_bias,
                                       &S::mask, &S::cu_seqlens, &S::state_indices},
                                      5};
template <class T, class S = TensorsOf<T>>
inline const OperatorOf<T> SNAPSHOTS{"gated_delta_rule_snapshots",
                                     false,
                                     {&S::q, &S::k, &S::v, &S::g, &S::beta, &S::snapshots, &S::state, &S::A_log,
                                      &S::dt_bias, &S::mask, &S::cu_seqlens, &S::state_indices},
                                     6};
template <class T, class S = TensorsOf<T>>
inline const OperatorOf<T> INPLACE{"gated_delta_rule_",
                                   true,
                                   {&S::q, &S::k, &S::v, &S::g, &S::beta, &S::state, &S::snapshots, &S::A_log,
                                    &S::dt_bias, &S::mask, &S::cu_seqlens, &S::state_indices, &S::snapshot_indices},
                                   6};

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
    call.q = read(t.q), call.k = read(t.k), call.v = read(t.v), call.g = read(t.g), call.beta = read(t.beta);
    call.state = read(t.state), call.A_log = read(t.A_log), call.dt_bias = read(t.dt_bias), call.mask = read(t.mask);
    call.cu_seqlens = read(t.cu_seqlens), call.state_indices = read(t.state_indices);
    call.snapshots = read(t.snapshots), call.snapshot_indices = read(t.snapshot_indices);
    return call;
}

}  // namespace anydelta
