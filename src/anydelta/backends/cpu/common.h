// Shared by all ISA builds: inlining, half types as bits, their scalar conversions.
//
// Files that are compiled once per ISA define ANYDELTA_ISA first and put everything into that namespace. They use
// no std:: templates: the linker keeps one copy of an inline function for all builds, and it could be the one
// compiled with AVX-512.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(_MSC_VER) && !defined(__clang__)
#define AD_ALWAYS_INLINE __forceinline
#define AD_INLINED  // a lambda
#define AD_INLINE static __forceinline
#define AD_UNROLL
#else
#define AD_ALWAYS_INLINE inline __attribute__((always_inline))
#define AD_INLINED __attribute__((always_inline))
#define AD_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define AD_UNROLL _Pragma("unroll")
#else
#define AD_UNROLL _Pragma("GCC unroll 32")
#endif
#endif

#if defined(__GNUC__) || defined(__clang__)
#define AD_PREFETCH(p) __builtin_prefetch((p), 0, 3)
#define AD_PREFETCH_L2(p) __builtin_prefetch((p), 0, 2)
#define AD_PREFETCH_WRITE(p) __builtin_prefetch((p), 1, 2)
#else
#define AD_PREFETCH(p) ((void)0)
#define AD_PREFETCH_L2(p) ((void)0)
#define AD_PREFETCH_WRITE(p) ((void)0)
#endif

namespace anydelta::ANYDELTA_ISA {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

AD_INLINE float bits_to_float(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
AD_INLINE uint32_t float_to_bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}

AD_INLINE float root(float x) { return sqrtf(x); }

AD_INLINE float to_float(float x) { return x; }
AD_INLINE float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
AD_INLINE float to_float(f16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    if (magnitude >= 0x400u) return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
    const float f = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // subnormal: units of 2^-24
    return bits_to_float(sign | float_to_bits(f));
}

AD_INLINE float from_float(float x, float) { return x; }
AD_INLINE bf16 from_float(float x, bf16) {
    const uint32_t u = float_to_bits(x);
    if (x != x) return bf16{0x7fc0};
    return bf16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
AD_INLINE f16 from_float(float x, f16) {
    const uint32_t u = float_to_bits(x);
    const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
    const uint32_t a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00u)};
    if (a >= 0x477ff000u) return f16{static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
    if (a < 0x38800000u) {  // subnormal: adding 0.5 shifts the mantissa into place and rounds to nearest even
        return f16{static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000u))};
    }
    return f16{static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13))};
}

}  // namespace anydelta::ANYDELTA_ISA
