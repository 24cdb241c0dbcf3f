// AMX's instructions in plain C++, so that the kernels that use them run where no processor has them. Force-included in front
// of the kernels' sources by test_emulated_tiles.py. As in Intel's Architecture Instruction Set Extensions Programming
// Reference, TDPBF16PS: the products of even and of odd k are summed apart, fused and without subnormals, then together.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <limits>
#include <sys/syscall.h>
#include <unistd.h>

namespace emulated_amx {

constexpr int TILES = 8, ROWS = 16, WORDS = 16;  // every tile is whole: see WHOLE_TILES in tiles.h

inline thread_local std::uint32_t tiles[TILES][ROWS][WORDS];

inline void zero(int tile) { std::memset(tiles[tile], 0, sizeof tiles[tile]); }

inline void load(int tile, const void *from, long stride) {
    for (int r = 0; r < ROWS; r++) std::memcpy(tiles[tile][r], static_cast<const char *>(from) + r * stride, sizeof tiles[tile][r]);
}

inline void store(int tile, void *to, long stride) {
    for (int r = 0; r < ROWS; r++) std::memcpy(static_cast<char *>(to) + r * stride, tiles[tile][r], sizeof tiles[tile][r]);
}

inline float flushed(float value) {
    return std::fabs(value) < std::numeric_limits<float>::min() ? std::copysign(0.0f, value) : value;
}

inline float as_float(std::uint32_t word) {
    float value;
    std::memcpy(&value, &word, sizeof value);
    return flushed(value);
}

inline float low(std::uint32_t word) { return as_float(word << 16); }
inline float high(std::uint32_t word) { return as_float(word & 0xffff0000u); }

inline void multiply(int sums, int left, int right) {
    for (int r = 0; r < ROWS; r++) {
        for (int c = 0; c < WORDS; c++) {
            float even = 0, odd = 0;
            for (int k = 0; k < ROWS; k++) {
                even = flushed(std::fma(low(tiles[left][r][k]), low(tiles[right][k][c]), even));
                odd = flushed(std::fma(high(tiles[left][r][k]), high(tiles[right][k][c]), odd));
            }
            const float sum = flushed(as_float(tiles[sums][r][c]) + flushed(even + odd));
            std::memcpy(&tiles[sums][r][c], &sum, sizeof sum);
        }
    }
}

}  // namespace emulated_amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) static_cast<void>(config)
#define _tile_release() static_cast<void>(0)
#define _tile_zero(tile) emulated_amx::zero(tile)
#define _tile_loadd(tile, from, stride) emulated_amx::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated_amx::store(tile, to, stride)
#define _tile_dpbf16ps(sums, left, right) emulated_amx::multiply(sums, left, right)
#define syscall(...) 0  // the kernels' only call asks Linux for the tiles
