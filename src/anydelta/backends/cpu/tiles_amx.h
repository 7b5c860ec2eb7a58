// Products on AMX: 16 rows of 16 float32 += (16 rows of 32 bfloat16) x (32 rows of 16), one instruction of 16 cycles.
//
// A number with more than bfloat16's 8 bits is two parts, high + low, which together have 16. High is the number cut
// off, so the rest is exact; low is the rest, rounded. A product of two such pairs is three products of parts: low
// times low is below the rounding of the others.
//
// The left factor is row-major. The right one is in panels of W columns, pairs of rows interleaved: [rows / 2][W][2].
#pragma once
#include <immintrin.h>

#if defined(__GNUC__) || defined(__clang__)
#define AD_MEMORY_BARRIER() __asm__ volatile("" ::: "memory")
#else
#define AD_MEMORY_BARRIER() ((void)0)
#endif

namespace anydelta::ANYDELTA_ISA {

constexpr int TILE = 16;  // rows of a product, and columns of one tile of it
constexpr int DEPTH = 32;  // channels of one instruction
static_assert(W % TILE == 0 && W / TILE <= 2, "a panel is one or two tiles wide");

struct Parts {
    bf16 *high, *low;
    Parts at(int64_t i) const { return {high + i, low + i}; }
};

// Configures the tile registers, all with 16 rows of 64 bytes, while the object lives.
class MatrixUnit {
  public:
    MatrixUnit() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = TILE;
        AD_MEMORY_BARRIER();  // GCC 12 believes that only 8 of these 64 bytes are read
        _tile_loadconfig(&config);
    }
    ~MatrixUnit() { _tile_release(); }
    MatrixUnit(const MatrixUnit&) = delete;
    MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// c [2 TILE][W] = a b over `depth` channels. a [2 TILE][lda] and b [depth / 2][W][2] have one part or both.
// Four products run at once, each waiting 52 cycles for the one before; 3 in 4 of them load a tile. `meanwhile` is
// called once per DEPTH channels: vector work for the core while the unit multiplies.
template <int A_PARTS, int B_PARTS, class F>
AD_INLINE void product(float* c, int64_t ldc, Parts a, int64_t lda, Parts b, int64_t depth, F&& meanwhile) {
    constexpr bool wide = W == 2 * TILE;
    const int64_t a_row = lda * 2, b_row = W * 4, c_row = ldc * 4;
    const auto load_left = [&](const bf16* x) AD_INLINED {
        _tile_loadd(4, x, a_row);
        _tile_loadd(5, x + TILE * lda, a_row);
    };
    const auto load_right = [&](const bf16* x) AD_INLINED {
        _tile_loadd(6, x, b_row);
        if (wide) _tile_loadd(7, x + 2 * TILE, b_row);
    };
    const auto multiply = [&]() AD_INLINED {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (wide) _tile_dpbf16ps(2, 4, 7);
        if (wide) _tile_dpbf16ps(3, 5, 7);
    };
    AD_MEMORY_BARRIER();  // GCC does not know that tile loads read memory
    _tile_zero(0);
    _tile_zero(1);
    if (wide) _tile_zero(2);
    if (wide) _tile_zero(3);
    for (int64_t i = 0; i < depth; i += DEPTH) {
        load_left(a.high + i);
        load_right(b.high + i * W);
        multiply();
        if (A_PARTS == 2) {
            load_left(a.low + i);
            multiply();
            if (B_PARTS == 2) load_left(a.high + i);
        }
        if (B_PARTS == 2) {
            load_right(b.low + i * W);
            multiply();
        }
        meanwhile();
    }
    _tile_stored(0, c, c_row);
    _tile_stored(1, c + TILE * ldc, c_row);
    if (wide) _tile_stored(2, c + TILE, c_row);
    if (wide) _tile_stored(3, c + TILE * ldc + TILE, c_row);
    AD_MEMORY_BARRIER();
}
template <int A_PARTS, int B_PARTS>
AD_INLINE void product(float* c, int64_t ldc, Parts a, int64_t lda, Parts b, int64_t depth) {
    product<A_PARTS, B_PARTS>(c, ldc, a, lda, b, depth, [] {});
}

// The unit goes to sleep after less than a microsecond, and takes as long to reach full speed again. A product
// without use keeps it awake between others: a whole prefill is 1.04 to 1.05 times as fast.
AD_INLINE void stay_awake() { _tile_dpbf16ps(0, 4, 6); }

// The two parts of 2 L numbers, interleaved: a0 b0 a1 b1 ... with `pairs`, else a0 a1 .. b0 b1 ..
#if defined(__AVX512BW__)
template <bool pairs>
AD_INLINE __m512i upper_halves(__m512i a, __m512i b) {
    if (pairs) return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
    const __m512i mixed = _mm512_packus_epi32(_mm512_srli_epi32(a, 16), _mm512_srli_epi32(b, 16));  // by fours
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), mixed);
}
template <bool pairs, int PARTS>
AD_INLINE void store_parts(Parts to, V a, V b) {
    const __m512i cut = _mm512_set1_epi32(static_cast<int>(0xffff0000u)), half = _mm512_set1_epi32(0x8000);
    const __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
    _mm512_storeu_si512(to.high, upper_halves<pairs>(x, y));
    if (PARTS == 1) return;
    const __m512 p = _mm512_sub_ps(a, _mm512_castsi512_ps(_mm512_and_si512(x, cut)));
    const __m512 q = _mm512_sub_ps(b, _mm512_castsi512_ps(_mm512_and_si512(y, cut)));
    _mm512_storeu_si512(to.low, upper_halves<pairs>(_mm512_add_epi32(_mm512_castps_si512(p), half),
                                                    _mm512_add_epi32(_mm512_castps_si512(q), half)));
}
#else
template <bool pairs, int PARTS>
AD_INLINE void store_parts(Parts to, V a, V b) {
    float x[2][L];
    vstore(x[0], a);
    vstore(x[1], b);
    for (int r = 0; r < 2; ++r)
        for (int i = 0; i < L; ++i) {
            const int at = pairs ? 2 * i + r : r * L + i;
            const uint32_t high = float_to_bits(x[r][i]) & 0xffff0000u;
            to.high[at].bits = static_cast<uint16_t>(high >> 16);
            if (PARTS == 2)
                to.low[at].bits = static_cast<uint16_t>((float_to_bits(x[r][i] - bits_to_float(high)) + 0x8000u) >> 16);
        }
}
#endif

}  // namespace anydelta::ANYDELTA_ISA
