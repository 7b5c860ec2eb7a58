// Primitives for AVX2 + FMA + F16C: 16 registers of 8 floats.
#pragma once
#include <immintrin.h>

#include "common.h"

namespace anydelta::ANYDELTA_ISA {

constexpr int L = 8;              // lanes
constexpr int REGISTERS = 16;
using V = __m256;

AD_INLINE V vzero() { return _mm256_setzero_ps(); }
AD_INLINE V vset(float x) { return _mm256_set1_ps(x); }
AD_INLINE V vsplat(const float* p) { return _mm256_broadcast_ss(p); }
AD_INLINE V vload(const float* p) { return _mm256_loadu_ps(p); }
AD_INLINE void vstore(float* p, V x) { _mm256_storeu_ps(p, x); }
constexpr bool STREAMS = false;  // see isa_avx512.h
AD_INLINE void vstream(float* p, V x) { vstore(p, x); }
AD_INLINE void vfence() {}
AD_INLINE V vadd(V a, V b) { return _mm256_add_ps(a, b); }
AD_INLINE V vsub(V a, V b) { return _mm256_sub_ps(a, b); }
AD_INLINE V vmul(V a, V b) { return _mm256_mul_ps(a, b); }
AD_INLINE V vdiv(V a, V b) { return _mm256_div_ps(a, b); }
AD_INLINE V vfma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }    // a b + c
AD_INLINE V vfnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
AD_INLINE V vmax(V a, V b) { return _mm256_max_ps(a, b); }
AD_INLINE V vmin(V a, V b) { return _mm256_min_ps(a, b); }
AD_INLINE V vround(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// p 2^n for integral n in [-126, 127]
AD_INLINE V vscale2(V p, V n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
// 0 where x0 < limit, else x (also where x0 is NaN)
AD_INLINE V vzero_below(V x, V x0, V limit) { return _mm256_and_ps(x, _mm256_cmp_ps(x0, limit, _CMP_NLT_UQ)); }
AD_INLINE float vsum(V x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
AD_INLINE V vload(const bf16* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
AD_INLINE void vstore(bf16* p, V x) {  // round to nearest even; NaN stays NaN
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
constexpr bool SPLITS_BF16 = true;  // see isa_avx512.h
AD_INLINE void vload_split(const bf16* p, V& even, V& odd) {
    const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
AD_INLINE __m256i bf16_above(V x) {  // in the upper halves; the lower halves are not cleared
    const __m256i u = _mm256_castps_si256(x);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), nan);
}
AD_INLINE void vstore_split(bf16* p, V even, V odd) {
    const __m256i low = _mm256_srli_epi32(bf16_above(even), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(low, bf16_above(odd), 0xaa));
}
AD_INLINE V vload(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
AD_INLINE void vstore(f16* p, V x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
// The halves of a0 b0 a1 b1 ...: the building block of a transposition.
AD_INLINE V vzip_low(V a, V b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
AD_INLINE V vzip_high(V a, V b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}
// The inverse: the numbers of a and b at even places, and those at odd places.
AD_INLINE V vunzip_even(V a, V b) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88)), 0xd8));
}
AD_INLINE V vunzip_odd(V a, V b) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8));
}

}  // namespace anydelta::ANYDELTA_ISA
