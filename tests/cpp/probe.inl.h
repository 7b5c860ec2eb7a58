// Defines PROBE for the ISA in ANYDELTA_ISA, whose isa_*.h the including file has included. Like target_*.cpp these
// files are compiled with that ISA's flags and use no std:: templates.
#pragma once
#include "probe.h"
#include "rule.inl.h"

namespace anydelta::ANYDELTA_ISA {

static void probe_exp(const float* x, float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += L) vstore(y + i, vexp(vload(x + i)));
}
static void probe_sigmoid(const float* x, float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += L) vstore(y + i, vsigmoid(vload(x + i)));
}
static void probe_softplus(const float* x, float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += L) vstore(y + i, vsoftplus(vload(x + i)));
}
static void probe_silu(const float* x, float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += L) {
        V v = vload(x + i);
        silus<1>(&v);
        vstore(y + i, v);
    }
}
template <class Half>
static void probe_from(const uint16_t* x, float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += L) vstore(y + i, vload(reinterpret_cast<const Half*>(x + i)));
}
template <class Half>
static void probe_from_one(const uint16_t* x, float* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] = to_float(Half{x[i]});
}
template <class Half>
static void probe_to(const float* x, uint16_t* y, int64_t n) {
    for (int64_t i = 0; i < n; i += L) vstore(reinterpret_cast<Half*>(y + i), vload(x + i));
}
template <class Half>
static void probe_to_one(const float* x, uint16_t* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] = from_float(x[i], Half{}).bits;
}

}  // namespace anydelta::ANYDELTA_ISA

namespace anydelta {
const Probe PROBE = {
    ANYDELTA_ISA::L,
    ANYDELTA_ISA::probe_exp,
    ANYDELTA_ISA::probe_sigmoid,
    ANYDELTA_ISA::probe_softplus,
    ANYDELTA_ISA::probe_silu,
    {ANYDELTA_ISA::probe_from<ANYDELTA_ISA::bf16>, ANYDELTA_ISA::probe_from_one<ANYDELTA_ISA::bf16>},
    {ANYDELTA_ISA::probe_from<ANYDELTA_ISA::f16>, ANYDELTA_ISA::probe_from_one<ANYDELTA_ISA::f16>},
    {ANYDELTA_ISA::probe_to<ANYDELTA_ISA::bf16>, ANYDELTA_ISA::probe_to_one<ANYDELTA_ISA::bf16>},
    {ANYDELTA_ISA::probe_to<ANYDELTA_ISA::f16>, ANYDELTA_ISA::probe_to_one<ANYDELTA_ISA::f16>},
};
}  // namespace anydelta
