// AMX's tile instructions in plain C++, for tests: this folder stands in front of the compiler's headers, so that
// tiles_amx.h runs on a CPU without them. What they compute is written in Intel's manual (Software Developer's Manual,
// volume 2, TDPBF16PS): products of even and of odd channels are summed apart from each other, each sum rounded to
// float32 at every step, subnormal numbers count as zero. Who calls has those flushed (flush.h).
#pragma once
#include_next <immintrin.h>

#include <math.h>
#include <cstdint>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated_amx::load_config(config)
#define _tile_release() emulated_amx::release()
#define _tile_zero(tile) emulated_amx::zero(tile)
#define _tile_loadd(tile, base, stride) emulated_amx::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_amx::store(tile, base, stride)
#define _tile_dpbf16ps(c, a, b) emulated_amx::multiply(c, a, b)

namespace emulated_amx {
namespace {

struct Tile {
    int rows, bytes;
    uint8_t row[16][64];
};
thread_local Tile tiles[8];

inline void release() { std::memset(tiles, 0, sizeof tiles); }
inline void load_config(const void* config) {
    const auto* c = static_cast<const uint8_t*>(config);
    release();
    for (int t = 0; t < 8; ++t) {
        uint16_t bytes;
        std::memcpy(&bytes, c + 16 + 2 * t, 2);
        tiles[t].bytes = bytes;
        tiles[t].rows = c[48 + t];
    }
}
inline void zero(int t) { std::memset(tiles[t].row, 0, sizeof tiles[t].row); }
inline void load(int t, const void* base, int64_t stride) {
    zero(t);
    for (int r = 0; r < tiles[t].rows; ++r)
        std::memcpy(tiles[t].row[r], static_cast<const char*>(base) + r * stride, static_cast<size_t>(tiles[t].bytes));
}
inline void store(int t, void* base, int64_t stride) {
    for (int r = 0; r < tiles[t].rows; ++r)
        std::memcpy(static_cast<char*>(base) + r * stride, tiles[t].row[r], static_cast<size_t>(tiles[t].bytes));
}

// The even (part 0) or odd (part 1) one of a pair of bfloat16, as float32
inline float half_of(const uint8_t* pair, int part) {
    uint32_t bits;
    std::memcpy(&bits, pair, 4);
    bits = part ? bits & 0xffff0000u : bits << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// c [m][n] += a [m][k pairs] b [k][n pairs]
inline void multiply(int c, int a, int b) {
    const int pairs = tiles[a].bytes / 4, columns = tiles[c].bytes / 4;
    float right[2][16][16];
    for (int k = 0; k < pairs; ++k)
        for (int part = 0; part < 2; ++part)
            for (int n = 0; n < columns; ++n) right[part][k][n] = half_of(tiles[b].row[k] + 4 * n, part);
    for (int m = 0; m < tiles[c].rows; ++m) {
        float sums[2][16] = {};
        for (int k = 0; k < pairs; ++k)
            for (int part = 0; part < 2; ++part) {
                const float left = half_of(tiles[a].row[m] + 4 * k, part);
                for (int n = 0; n < columns; ++n) sums[part][n] = fmaf(left, right[part][k][n], sums[part][n]);
            }
        float row[16];
        std::memcpy(row, tiles[c].row[m], sizeof row);
        for (int n = 0; n < columns; ++n) row[n] += sums[0][n] + sums[1][n];
        std::memcpy(tiles[c].row[m], row, sizeof row);
    }
}

}  // namespace
}  // namespace emulated_amx
