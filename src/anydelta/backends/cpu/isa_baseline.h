// Primitives for any CPU: 4 floats in a plain array, which every compiler maps to SSE2 or the like.
#pragma once
#include <cmath>

#include "common.h"

namespace anydelta::ANYDELTA_ISA {

constexpr int L = 4;  // lanes
constexpr int REGISTERS = 16;
#if defined(__GNUC__)
typedef float V __attribute__((vector_size(16)));
AD_INLINE V vset(float x) { return V{x, x, x, x}; }
AD_INLINE V vadd(V a, V b) { return a + b; }
AD_INLINE V vsub(V a, V b) { return a - b; }
AD_INLINE V vmul(V a, V b) { return a * b; }
AD_INLINE V vdiv(V a, V b) { return a / b; }
AD_INLINE V vmax(V a, V b) { return a > b ? a : b; }
AD_INLINE V vmin(V a, V b) { return a < b ? a : b; }
#else
struct V {
    float x[4];
    float& operator[](int i) { return x[i]; }
    float operator[](int i) const { return x[i]; }
};
AD_INLINE V vset(float x) { return V{{x, x, x, x}}; }
#define AD_LANEWISE(name, expr)                  \
    AD_INLINE V name(V a, V b) {                 \
        V c;                                     \
        for (int i = 0; i < L; ++i) c[i] = expr; \
        return c;                                \
    }
AD_LANEWISE(vadd, a[i] + b[i])
AD_LANEWISE(vsub, a[i] - b[i])
AD_LANEWISE(vmul, a[i] * b[i])
AD_LANEWISE(vdiv, a[i] / b[i])
AD_LANEWISE(vmax, a[i] > b[i] ? a[i] : b[i])
AD_LANEWISE(vmin, a[i] < b[i] ? a[i] : b[i])
#undef AD_LANEWISE
#endif
AD_INLINE V vzero() { return vset(0.0f); }
AD_INLINE V vsplat(const float* p) { return vset(*p); }
AD_INLINE V vload(const float* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
AD_INLINE void vstore(float* p, V x) { std::memcpy(p, &x, sizeof x); }
constexpr bool STREAMS = false;  // see isa_avx512.h
AD_INLINE void vstream(float* p, V x) { vstore(p, x); }
AD_INLINE void vfence() {}
AD_INLINE V vfma(V a, V b, V c) { return vadd(vmul(a, b), c); }   // a b + c
AD_INLINE V vfnma(V a, V b, V c) { return vsub(c, vmul(a, b)); }  // c - a b
AD_INLINE V vround(V x) {
    for (int i = 0; i < L; ++i) x[i] = std::nearbyintf(x[i]);
    return x;
}
// p 2^n for integral n in [-126, 127]
AD_INLINE V vscale2(V p, V n) {
    for (int i = 0; i < L; ++i) {
        const uint32_t u = float_to_bits(n[i] + 12583039.0f) << 23;
        float f;
        std::memcpy(&f, &u, 4);
        p[i] *= f;
    }
    return p;
}
// 0 where x0 < limit, else x (also where x0 is NaN)
AD_INLINE V vzero_below(V x, V x0, V limit) {
    for (int i = 0; i < L; ++i) x[i] = x0[i] < limit[i] ? 0.0f : x[i];
    return x;
}
AD_INLINE float vsum(V x) { return (x[0] + x[2]) + (x[1] + x[3]); }
template <class H>
AD_INLINE V vload_half(const H* p) {
    V x = vzero();
    for (int i = 0; i < L; ++i) x[i] = to_float(p[i]);
    return x;
}
template <class H>
AD_INLINE void vstore_half(H* p, V x) {
    for (int i = 0; i < L; ++i) p[i] = from_float(x[i], H{});
}
AD_INLINE V vload(const bf16* p) { return vload_half(p); }
AD_INLINE void vstore(bf16* p, V x) { vstore_half(p, x); }
AD_INLINE V vload(const f16* p) { return vload_half(p); }
AD_INLINE void vstore(f16* p, V x) { vstore_half(p, x); }
constexpr bool SPLITS_BF16 = false;  // see isa_avx512.h
// The halves of a0 b0 a1 b1 ...: the building block of a transposition.
AD_INLINE V vzip_low(V a, V b) {
    V x = vzero();
    for (int i = 0; i < L / 2; ++i) x[2 * i] = a[i], x[2 * i + 1] = b[i];
    return x;
}
AD_INLINE V vzip_high(V a, V b) {
    V x = vzero();
    for (int i = 0; i < L / 2; ++i) x[2 * i] = a[L / 2 + i], x[2 * i + 1] = b[L / 2 + i];
    return x;
}
// The inverse: the numbers of a and b at even places, and those at odd places.
AD_INLINE V vunzip_even(V a, V b) {
    V x = vzero();
    for (int i = 0; i < L / 2; ++i) x[i] = a[2 * i], x[L / 2 + i] = b[2 * i];
    return x;
}
AD_INLINE V vunzip_odd(V a, V b) {
    V x = vzero();
    for (int i = 0; i < L / 2; ++i) x[i] = a[2 * i + 1], x[L / 2 + i] = b[2 * i + 1];
    return x;
}

}  // namespace anydelta::ANYDELTA_ISA
