// Primitives for 64-bit Arm NEON: 32 registers of 4 floats.
#pragma once
#include <arm_neon.h>

#include "common.h"

namespace anydelta::ANYDELTA_ISA {

constexpr int L = 4;  // lanes
constexpr int REGISTERS = 32;
using V = float32x4_t;

AD_INLINE V vzero() { return vdupq_n_f32(0.0f); }
AD_INLINE V vset(float x) { return vdupq_n_f32(x); }
AD_INLINE V vsplat(const float* p) { return vld1q_dup_f32(p); }
AD_INLINE V vload(const float* p) { return vld1q_f32(p); }
AD_INLINE void vstore(float* p, V x) { vst1q_f32(p, x); }
constexpr bool STREAMS = false;  // see isa_avx512.h
AD_INLINE void vstream(float* p, V x) { vstore(p, x); }
AD_INLINE void vfence() {}
AD_INLINE V vadd(V a, V b) { return vaddq_f32(a, b); }
AD_INLINE V vsub(V a, V b) { return vsubq_f32(a, b); }
AD_INLINE V vmul(V a, V b) { return vmulq_f32(a, b); }
AD_INLINE V vdiv(V a, V b) { return vdivq_f32(a, b); }
AD_INLINE V vfma(V a, V b, V c) { return vfmaq_f32(c, a, b); }   // a b + c
AD_INLINE V vfnma(V a, V b, V c) { return vfmsq_f32(c, a, b); }  // c - a b
AD_INLINE V vmax(V a, V b) { return vmaxq_f32(a, b); }
AD_INLINE V vmin(V a, V b) { return vminq_f32(a, b); }
AD_INLINE V vround(V x) { return vrndnq_f32(x); }
// p 2^n for integral n in [-126, 127]
AD_INLINE V vscale2(V p, V n) {
    return vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23)));
}
// 0 where x0 < limit, else x (also where x0 is NaN)
AD_INLINE V vzero_below(V x, V x0, V limit) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x), vcltq_f32(x0, limit)));
}
AD_INLINE float vsum(V x) { return vaddvq_f32(x); }
AD_INLINE V vload(const bf16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}
AD_INLINE void vstore(bf16* p, V x) {  // round to nearest even; NaN stays NaN
    const uint32x4_t u = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    uint32x4_t r = vshrq_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    r = vbslq_u32(vceqq_f32(x, x), r, vdupq_n_u32(0x7fc0));
    vst1_u16(reinterpret_cast<uint16_t*>(p), vmovn_u32(r));
}
AD_INLINE V vload(const f16* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
AD_INLINE void vstore(f16* p, V x) { vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(x))); }
constexpr bool SPLITS_BF16 = false;  // see isa_avx512.h
// The halves of a0 b0 a1 b1 ...: the building block of a transposition.
AD_INLINE V vzip_low(V a, V b) { return vzip1q_f32(a, b); }
AD_INLINE V vzip_high(V a, V b) { return vzip2q_f32(a, b); }
// The inverse: the numbers of a and b at even places, and those at odd places.
AD_INLINE V vunzip_even(V a, V b) { return vuzp1q_f32(a, b); }
AD_INLINE V vunzip_odd(V a, V b) { return vuzp2q_f32(a, b); }

}  // namespace anydelta::ANYDELTA_ISA
