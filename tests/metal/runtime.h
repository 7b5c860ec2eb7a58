// What the emulated Metal code (metal_stdlib) asks of the machine that runs it (runtime.cpp).
#pragma once

namespace emu {

// The lane that runs. One at a time: a threadgroup is a set of fibers that take turns.
struct Lane {
    unsigned lane, simdgroup;   // [[thread_index_in_simdgroup]], [[simdgroup_index_in_threadgroup]]
    unsigned group[3];          // [[threadgroup_position_in_grid]]
    unsigned in_group[3];       // [[thread_position_in_threadgroup]]
    unsigned in_grid[3];        // [[thread_position_in_grid]]
};
extern Lane* me;

enum Op { SHUFFLE, SUM, MATRIX_LOAD, MATRIX_STORE, MATRIX_MULTIPLY, SIMD_BARRIER, OPS };

// All 32 lanes of a simdgroup must arrive, at the same kind of operation. Returns the 32 slots of `size` bytes that the
// lanes brought; they stay as they are until the lane arrives at its next operation.
const unsigned char (*meet(Op op, const void* mine, unsigned size))[64];

void barrier();        // threadgroup_barrier: all lanes of the threadgroup must arrive
// A threadgroup variable: poisoned when a threadgroup first comes to it, and watched for races.
void threadgroup_memory(void* at, unsigned long size);

using Kernel = void (*)(void* const* arguments);

}  // namespace emu
