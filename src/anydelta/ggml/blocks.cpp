#include "blocks.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "threads.h"

namespace anydelta::ggml {

namespace {

// Rows of a matrix that a thread takes at a time: some 20 KB of weights of 4 or 8 bits, 1 to 2 us.
constexpr int64_t ROWS = 32;
// Below this many products of a weight and a number another thread costs more than it saves (measured in host.cpp).
constexpr double MIN_PRODUCTS_PER_THREAD = 300e3;

// Runs task(i) for every i below `tasks`. Each thread begins in its own part, where it reads memory in one stream,
// and helps the others when it is done. Two threads that alternated read 208 MB no faster than one.
template <class F>
void share_out(int64_t tasks, int threads, bool share_openmp, const F& task) {
    constexpr int MOST = 64;
    struct alignas(64) Part {
        std::atomic<int64_t> next;
        int64_t end;
    };
    struct Work {
        const F& task;
        int parts;
        std::atomic<int> come{0};
        Part part[MOST];
    } work{task, static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({threads, tasks, MOST}))), {0}, {}};
    for (int p = 0; p < work.parts; ++p) {
        work.part[p].next = tasks * p / work.parts;
        work.part[p].end = tasks * (p + 1) / work.parts;
    }
    parallel(
        work.parts, share_openmp,
        [](void* context) {
            Work& w = *static_cast<Work*>(context);
            const int mine = w.come.fetch_add(1);
            for (int p = 0; p < w.parts; ++p) {
                Part& part = w.part[(mine + p) % w.parts];
                for (int64_t i; (i = part.next.fetch_add(1)) < part.end;) w.task(i);
            }
        },
        &work);
}

int worthwhile(int threads, double products) {
    return std::max(1, std::min(threads, static_cast<int>(std::min(products / MIN_PRODUCTS_PER_THREAD, 4096.0))));
}

// Growing memory of the calling thread: one buffer for products, one for chains around them.
template <int WHOSE>
uint8_t* scratch(size_t bytes) {
    static thread_local std::vector<uint8_t> memory;
    if (memory.size() < bytes + 64) memory.resize(bytes + 64);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (64 - address % 64) % 64;
}

// x in the blocks that a kind's vec_dot takes.
const uint8_t* blocks_of(const Kind& kind, const float* x, int64_t m, int64_t n, uint8_t* to) {
    if (!kind.from_float) return reinterpret_cast<const uint8_t*>(x);
    const size_t row = kind.x_row(n);
    for (int64_t i = 0; i < m; ++i) kind.from_float(x + i * n, to + static_cast<size_t>(i) * row, n);
    return to;
}

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

float silu(float x) { return x / (1.0f + std::exp(-x)); }

}  // namespace

void multiply(const float* x, int64_t m, int64_t n, const std::vector<Matrix>& matrices, bool gated, int threads,
              bool share_openmp) {
    // Types that multiply with the same blocks share them.
    size_t bytes = 0;
    for (const Matrix& w : matrices) bytes += aligned(static_cast<size_t>(m) * w.kind->x_row(n));
    uint8_t* free = scratch<0>(bytes);
    std::vector<const uint8_t*> xs(matrices.size());
    for (size_t j = 0; j < matrices.size(); ++j) {
        const Kind& kind = *matrices[j].kind;
        for (size_t before = 0; before < j && !xs[j]; ++before)
            if (matrices[before].kind->x_type == kind.x_type) xs[j] = xs[before];
        if (xs[j]) continue;
        xs[j] = blocks_of(kind, x, m, n, free);
        free += aligned(static_cast<size_t>(m) * kind.x_row(n));
    }
    const auto dot = [&](size_t j, int64_t row, int64_t i) {
        const Matrix& w = matrices[j];
        float s = 0;
        w.kind->vec_dot(static_cast<int>(n), &s, 0, w.blocks + static_cast<size_t>(row) * w.kind->row(n), 0,
                        xs[j] + static_cast<size_t>(i) * w.kind->x_row(n), 0, 1);
        return s;
    };
    const size_t count = gated ? 1 : matrices.size();
    std::vector<int64_t> first(count + 1);  // task of each matrix
    double products = 0;
    for (size_t j = 0; j < count; ++j) {
        first[j + 1] = first[j] + (matrices[j].rows + ROWS - 1) / ROWS;
        products += static_cast<double>(matrices[j].rows * n * m) * (gated ? 2 : 1);
    }
    share_out(first[count], worthwhile(threads, products), share_openmp, [&](int64_t task) {
        size_t j = 0;
        while (task >= first[j + 1]) ++j;
        const Matrix& w = matrices[j];
        const int64_t begin = (task - first[j]) * ROWS, end = std::min(begin + ROWS, w.rows);
        for (int64_t row = begin; row < end; ++row)
            for (int64_t i = 0; i < m; ++i)
                w.y[i * w.stride + row] = gated ? silu(dot(0, row, i)) * dot(1, row, i) : dot(j, row, i);
    });
}

void multiply_experts(const Kind& kind, const uint8_t* blocks, int64_t rows, const float* x, int64_t n,
                      const int32_t* ids, int64_t m, int64_t each, float* y, int threads, bool share_openmp) {
    const size_t row = kind.row(n), x_row = kind.x_row(n);
    const uint8_t* xs = blocks_of(kind, x, m / each, n, scratch<0>(static_cast<size_t>(m / each) * x_row));
    const int64_t parts = (rows + ROWS - 1) / ROWS;
    const double products = static_cast<double>(m * rows * n);
    share_out(m * parts, worthwhile(threads, products), share_openmp, [&](int64_t task) {
        const int64_t i = task / parts, begin = task % parts * ROWS, end = std::min(begin + ROWS, rows);
        const uint8_t* w = blocks + static_cast<size_t>(ids[i] * rows) * row;
        for (int64_t r = begin; r < end; ++r)
            kind.vec_dot(static_cast<int>(n), y + i * rows + r, 0, w + static_cast<size_t>(r) * row, 0,
                         xs + static_cast<size_t>(i / each) * x_row, 0, 1);
    });
}

void unpack(const Kind& kind, const uint8_t* blocks, int64_t n, const int64_t* picked, int64_t rows,
            Kind::FromFloat narrow, void* out, int threads, bool share_openmp) {
    constexpr int64_t PIECE = 4096;  // numbers at a time: 16 KiB of float32, still in L1 when they are narrowed
    const size_t row = kind.row(n);
    const int64_t part = std::max<int64_t>(1, 16384 / n), piece = PIECE / kind.values * kind.values;
    share_out((rows + part - 1) / part, worthwhile(threads, static_cast<double>(rows * n)), share_openmp,
              [&](int64_t task) {
                  float wide[PIECE];
                  const int64_t begin = task * part, end = std::min(begin + part, rows);
                  for (int64_t i = begin; i < end; ++i) {
                      const uint8_t* from = blocks + static_cast<size_t>(picked ? picked[i] : i) * row;
                      for (int64_t c = 0; c < n; c += piece) {
                          const int64_t count = std::min(piece, n - c), at = i * n + c;
                          float* to = narrow ? wide : static_cast<float*>(out) + at;
                          if (kind.to_float)
                              kind.to_float(from + kind.row(c), to, count);
                          else
                              std::memcpy(to, from + kind.row(c), static_cast<size_t>(count) * sizeof(float));
                          if (narrow) narrow(to, static_cast<uint16_t*>(out) + at, count);
                      }
                  }
              });
}

// ---- Chains

int Chain::buffer(int64_t width) {
    widths_.push_back(width);
    return static_cast<int>(widths_.size()) - 1;
}

void Chain::norm(int in, int out, const float* weight, float eps, float offset) {
    ops_.push_back({Op::NORM, in, 0, out, weight, eps, offset});
}

void Chain::matrices(int in, std::vector<Matrix> matrices, std::vector<int> outs, bool gated) {
    Op op{Op::MATRICES, in, 0, 0};
    op.gated = gated;
    op.matrices = std::move(matrices);
    op.outs = std::move(outs);
    ops_.push_back(std::move(op));
}

void Chain::add(int a, int b, int out) { ops_.push_back({Op::ADD, a, b, out}); }

void Chain::pick(int in, int out, std::vector<int64_t> order) {
    Op op{Op::PICK, in, 0, out};
    op.order = std::move(order);
    ops_.push_back(std::move(op));
}

void Chain::run(int64_t m, const std::vector<int>& given, const std::vector<float*>& at, int threads,
                bool share_openmp) const {
    std::vector<size_t> place(widths_.size() + 1);
    for (size_t b = 0; b < widths_.size(); ++b)
        place[b + 1] = place[b] + aligned(static_cast<size_t>(widths_[b] * m) * sizeof(float));
    uint8_t* memory = scratch<1>(place.back());
    std::vector<float*> where(widths_.size());
    for (size_t b = 0; b < widths_.size(); ++b) where[b] = reinterpret_cast<float*>(memory + place[b]);
    for (size_t i = 0; i < given.size(); ++i) where[static_cast<size_t>(given[i])] = at[i];
    const auto rows_of = [&](int b) { return where[static_cast<size_t>(b)]; };
    for (const Op& op : ops_) {
        const int64_t n = width(op.in);
        const float* in = rows_of(op.in);
        if (op.what == Op::NORM) {
            float* out = rows_of(op.out);
            for (int64_t i = 0; i < m; ++i, in += n, out += n) {
                double sum = 0;
                for (int64_t c = 0; c < n; ++c) sum += static_cast<double>(in[c]) * in[c];
                const float by = static_cast<float>(1 / std::sqrt(sum / static_cast<double>(n) + op.eps));
                for (int64_t c = 0; c < n; ++c) out[c] = in[c] * by * (op.offset + op.weight[c]);
            }
        } else if (op.what == Op::ADD) {
            const float* b = rows_of(op.other);
            float* out = rows_of(op.out);
            for (int64_t c = 0; c < m * n; ++c) out[c] = in[c] + b[c];
        } else if (op.what == Op::PICK) {
            float* out = rows_of(op.out);
            for (int64_t i = 0; i < m; ++i, in += n, out += n)
                for (int64_t c = 0; c < n; ++c) out[c] = in[op.order[static_cast<size_t>(c)]];
        } else {
            std::vector<Matrix> matrices = op.matrices;
            for (size_t j = 0; j < matrices.size(); ++j) {
                const int out = op.outs[op.gated ? 0 : j];
                matrices[j].y = rows_of(out);
                matrices[j].stride = width(out);
            }
            multiply(in, m, n, matrices, op.gated, threads, share_openmp);
        }
    }
}

}  // namespace anydelta::ggml
