// Products with matrices that stay packed in the blocks of a GGUF file, on this package's threads.
//
//     y[i, r] = sum_c x[i, c] w[r, c]        x float32 [m, n]; w [rows, n] in blocks of ggml
//
// The arithmetic is ggml's. `from_float` converts a row of x to the blocks that `vec_dot` takes (8 bits for most
// types), once for all matrices that read it. Each row of w is then one call of `vec_dot`.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace anydelta::ggml {

// A type of ggml, with its functions in the library that this process has loaded (ggml.h, ggml-cpu.h).
struct Kind {
    using ToFloat = void (*)(const void* blocks, float* x, int64_t n);
    using FromFloat = void (*)(const float* x, void* blocks, int64_t n);
    using VecDot = void (*)(int n, float* s, size_t bs, const void* w, size_t bw, const void* x, size_t bx, int count);

    ToFloat to_float = nullptr;  // null: the blocks are float32
    VecDot vec_dot = nullptr;
    int64_t values = 1, bytes = 0;  // in a block of w
    int x_type = 0;  // the type that vec_dot multiplies with, and its conversion; from_float null: float32
    FromFloat from_float = nullptr;
    int64_t x_values = 1, x_bytes = 0;

    size_t row(int64_t n) const { return static_cast<size_t>(n / values * bytes); }
    size_t x_row(int64_t n) const { return static_cast<size_t>(n / x_values * x_bytes); }
};

struct Matrix {
    const Kind* kind;
    const uint8_t* blocks;  // [rows, row(n)]
    int64_t rows;
    float* y;  // [m, stride]
    int64_t stride;
};

// y of every matrix, from x [m, n]. `gated`: of two matrices of equal size, silu(y of the first) times y of the
// second goes to the first's y. Results do not depend on the number of threads.
void multiply(const float* x, int64_t m, int64_t n, const std::vector<Matrix>& matrices, bool gated, int threads,
              bool share_openmp);

// Row i of y is row i / each of x [m / each, n] times matrix ids[i] of `blocks` [experts, rows, row(n)].
// Every id must be from 0 to experts - 1.
void multiply_experts(const Kind& kind, const uint8_t* blocks, int64_t rows, const float* x, int64_t n,
                      const int32_t* ids, int64_t m, int64_t each, float* y, int threads, bool share_openmp);

// Unpacked rows, as float32 or, with `narrow`, rounded from it to bfloat16 or float16. `picked`: which rows;
// without it the first ones.
void unpack(const Kind& kind, const uint8_t* blocks, int64_t n, const int64_t* picked, int64_t rows,
            Kind::FromFloat narrow, void* out, int threads, bool share_openmp);

// ---- The part of a decode step between two mixers, as one call

// A list of operations on rows of numbers. Buffers have numbers.
class Chain {
  public:
    // out = in / sqrt(mean(in^2) + eps) * (offset + weight[n])
    void norm(int in, int out, const float* weight, float eps, float offset);
    // out of each matrix from one input; `gated` as above, with one output.
    void matrices(int in, std::vector<Matrix> matrices, std::vector<int> outs, bool gated);
    void add(int a, int b, int out);
    // out[c] = in[order[c]]
    void pick(int in, int out, std::vector<int64_t> order);

    // The number of a new buffer of this width.
    int buffer(int64_t width);
    int64_t width(int buffer) const { return widths_[static_cast<size_t>(buffer)]; }

    // `given`: the caller's buffers and their addresses [m, width]; the others are scratch memory.
    void run(int64_t m, const std::vector<int>& given, const std::vector<float*>& at, int threads,
             bool share_openmp) const;

  private:
    struct Op {
        enum { NORM, MATRICES, ADD, PICK } what;
        int in, other, out;
        const float* weight = nullptr;
        float eps = 0, offset = 0;
        bool gated = false;
        std::vector<Matrix> matrices{};  // without their y
        std::vector<int> outs{};
        std::vector<int64_t> order{};
    };
    std::vector<int64_t> widths_;
    std::vector<Op> ops_;
};

}  // namespace anydelta::ggml
