// Primitives for AVX-512 (F, BW, DQ, VL): 32 registers of 16 floats.
#pragma once
#include <immintrin.h>

#include "common.h"

namespace anydelta::ANYDELTA_ISA {

constexpr int L = 16;  // lanes
constexpr int REGISTERS = 32;
using V = __m512;

AD_INLINE V vzero() { return _mm512_setzero_ps(); }
AD_INLINE V vset(float x) { return _mm512_set1_ps(x); }
AD_INLINE V vsplat(const float* p) { return _mm512_set1_ps(*p); }
AD_INLINE V vload(const float* p) { return _mm512_loadu_ps(p); }
AD_INLINE void vstore(float* p, V x) { _mm512_storeu_ps(p, x); }
// Stores that bypass the caches, to a multiple of 64 bytes: one store fills a line. (AVX2's fill half a line. On Zen
// 3 with 16 snapshots they were 2.5 times slower than plain stores, so only this ISA has them.)
constexpr bool STREAMS = true;
AD_INLINE void vstream(float* p, V x) { _mm512_stream_ps(p, x); }
AD_INLINE void vfence() { _mm_sfence(); }
AD_INLINE V vadd(V a, V b) { return _mm512_add_ps(a, b); }
AD_INLINE V vsub(V a, V b) { return _mm512_sub_ps(a, b); }
AD_INLINE V vmul(V a, V b) { return _mm512_mul_ps(a, b); }
AD_INLINE V vdiv(V a, V b) { return _mm512_div_ps(a, b); }
AD_INLINE V vfma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
AD_INLINE V vfnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
AD_INLINE V vmax(V a, V b) { return _mm512_max_ps(a, b); }
AD_INLINE V vmin(V a, V b) { return _mm512_min_ps(a, b); }
AD_INLINE V vround(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// p 2^n for integral n in [-126, 127]
AD_INLINE V vscale2(V p, V n) { return _mm512_scalef_ps(p, n); }
// 0 where x0 < limit, else x (also where x0 is NaN)
AD_INLINE V vzero_below(V x, V x0, V limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x0, limit, _CMP_NLT_UQ), x);
}
AD_INLINE float vsum(V x) { return _mm512_reduce_add_ps(x); }
AD_INLINE V vload(const bf16* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
AD_INLINE void vstore(bf16* p, V x) {  // round to nearest even; NaN stays NaN
    const __m512i u = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}
// Load 2 L numbers as those at even places and those at odd ones: one operation each, instead of two.
constexpr bool SPLITS_BF16 = true;
AD_INLINE void vload_split(const bf16* p, V& even, V& odd) {
    const __m512i u = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
#if defined(__AVX512BF16__)
AD_INLINE void vstore_split(bf16* p, V even, V odd) {
    alignas(64) static const uint16_t zipped[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(zipped), both));
}
#else
AD_INLINE __m512i bf16_above(V x) {  // in the upper halves; the lower halves are not cleared
    const __m512i u = _mm512_castps_si512(x);
    const __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    const __mmask16 last = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
    const __m512i r = _mm512_mask_add_epi32(_mm512_set1_epi32(0x7fc00000), number, u, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(r, last, r, _mm512_set1_epi32(1));
}
AD_INLINE void vstore_split(bf16* p, V even, V odd) {
    const __m512i low = _mm512_srli_epi32(bf16_above(even), 16);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, low, bf16_above(odd)));
}
#endif
AD_INLINE V vload(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
AD_INLINE void vstore(f16* p, V x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
// The halves of a0 b0 a1 b1 ...: the building block of a transposition.
AD_INLINE V vzip_low(V a, V b) {
    const __m512i at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_ps(a, at, b);
}
AD_INLINE V vzip_high(V a, V b) {
    const __m512i at = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return _mm512_permutex2var_ps(a, at, b);
}
// The inverse: the numbers of a and b at even places, and those at odd places.
AD_INLINE V vunzip_even(V a, V b) {
    const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(a, at, b);
}
AD_INLINE V vunzip_odd(V a, V b) {
    const __m512i at = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_permutex2var_ps(a, at, b);
}

}  // namespace anydelta::ANYDELTA_ISA
