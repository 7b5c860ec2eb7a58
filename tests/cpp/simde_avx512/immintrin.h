// Stands in for <immintrin.h> so that isa_avx512.h compiles and runs on a CPU with AVX2 only: every _mm512 name is
// SIMDe's, or one of the few that SIMDe 0.7.4 lacks, made here from two AVX2 halves.
#pragma once
#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
#include <simde/x86/avx512.h>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

namespace anydelta_emulated {

struct Halves {
    __m256 f[2];
};
struct IntegerHalves {
    __m256i i[2];
};

static inline __attribute__((always_inline)) Halves halves(__m512 x) {
    Halves h;
    __builtin_memcpy(&h, &x, sizeof h);
    return h;
}
static inline __attribute__((always_inline)) __m512 whole(Halves h) {
    __m512 x;
    __builtin_memcpy(&x, &h, sizeof x);
    return x;
}
static inline __attribute__((always_inline)) __m512i whole(IntegerHalves h) {
    __m512i x;
    __builtin_memcpy(&x, &h, sizeof x);
    return x;
}

static inline __attribute__((always_inline)) __m512i cvtps_epi32(__m512 x) {
    const Halves h = halves(x);
    return whole(IntegerHalves{{_mm256_cvtps_epi32(h.f[0]), _mm256_cvtps_epi32(h.f[1])}});
}
static inline __attribute__((always_inline)) float reduce_add_ps(__m512 x) {  // in the order GCC's header adds
    const Halves h = halves(x);
    const __m256 s8 = _mm256_add_ps(h.f[1], h.f[0]);
    const __m128 s4 = _mm_add_ps(_mm256_extractf128_ps(s8, 1), _mm256_castps256_ps128(s8));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
static inline __attribute__((always_inline)) __m512i cvtepu16_epi32(__m256i x) {
    return whole(IntegerHalves{
        {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))}});
}
static inline __attribute__((always_inline)) __m256i cvtepi32_epi16(__m512i x) {  // the low 16 bits of each
    IntegerHalves h;
    __builtin_memcpy(&h, &x, sizeof h);
    const __m256i low = _mm256_set1_epi32(0xffff);
    const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(h.i[0], low), _mm256_and_si256(h.i[1], low));
    return _mm256_permute4x64_epi64(packed, 0xd8);
}
static inline __attribute__((always_inline)) __m512 cvtph_ps(__m256i x) {
    return whole(Halves{{_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))}});
}

}  // namespace anydelta_emulated

#undef _mm512_cvtps_ph
#undef _mm512_stream_ps
#define _mm512_stream_ps(p, x) __builtin_memcpy((p), &(x), 64)
#define _mm512_cvtps_epi32(x) anydelta_emulated::cvtps_epi32(x)
#define _mm512_reduce_add_ps(x) anydelta_emulated::reduce_add_ps(x)
#define _mm512_cvtepu16_epi32(x) anydelta_emulated::cvtepu16_epi32(x)
#define _mm512_cvtepi32_epi16(x) anydelta_emulated::cvtepi32_epi16(x)
#define _mm512_cvtph_ps(x) anydelta_emulated::cvtph_ps(x)
#define _mm512_cvtps_ph(x, rounding)                                               \
    _mm256_set_m128i(_mm256_cvtps_ph(anydelta_emulated::halves(x).f[1], rounding), \
                     _mm256_cvtps_ph(anydelta_emulated::halves(x).f[0], rounding))
