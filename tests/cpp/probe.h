// The elementary functions of one ISA build, over arrays, so that test_core.cpp can compare them with libm.
#pragma once
#include <cstdint>

namespace anydelta {

struct Probe {
    int lanes;
    void (*exp)(const float* x, float* y, int64_t n);  // n: a multiple of lanes, here and below
    void (*sigmoid)(const float* x, float* y, int64_t n);
    void (*softplus)(const float* x, float* y, int64_t n);
    void (*silu)(const float* x, float* y, int64_t n);
    // [0] a vector at a time, [1] one number at a time
    void (*from_bf16[2])(const uint16_t* x, float* y, int64_t n);
    void (*from_f16[2])(const uint16_t* x, float* y, int64_t n);
    void (*to_bf16[2])(const float* x, uint16_t* y, int64_t n);
    void (*to_f16[2])(const float* x, uint16_t* y, int64_t n);
};

extern const Probe probe_baseline, probe_avx2, probe_avx512, probe_avx512_emulated, probe_neon;

}  // namespace anydelta
