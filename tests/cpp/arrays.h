// Arrays for tests: number types that are read and written by a definition of their own, and memory that ends where the
// array ends. Under ASan it is an exact allocation, otherwise an inaccessible page follows, so reading one element too far
// fails on every ISA, the emulated ones too. It is filled with 0xff (NaN in every type), and what a call must not write is
// compared byte by byte.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "checks.h"
#include "problem.h"

#ifndef EXACT_HEAP
#if defined(__SANITIZE_ADDRESS__)
#define EXACT_HEAP 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EXACT_HEAP 1
#endif
#endif
#endif
#ifndef EXACT_HEAP
#define EXACT_HEAP 0
#endif

namespace anydelta::tests {
namespace {

// ---------------------------------------------------------------------------------------------------------------
// number types, by an independent definition of rounding to nearest even

double round_to_bits(double x, int mantissa, int lowest_exponent, double largest) {
    if (x == 0 || std::isnan(x) || std::isinf(x)) return x;
    const int exponent = std::max(std::ilogb(x), lowest_exponent);
    const double unit = std::ldexp(1.0, exponent - mantissa);
    const double y = std::nearbyint(x / unit) * unit;
    return std::fabs(y) > largest ? std::copysign(HUGE_VAL, x) : y;
}
double round_bf16(double x) { return round_to_bits(x, 7, -126, 0x1.fep127); }
double round_f16(double x) { return round_to_bits(x, 10, -14, 65504); }

double decode_half(uint16_t bits, int mantissa, int bias) {
    const int top = (1 << (15 - mantissa)) - 1, exponent = bits >> mantissa & top, m = bits & ((1 << mantissa) - 1);
    double x;
    if (exponent == top)
        x = m ? NAN : HUGE_VAL;
    else if (exponent == 0)
        x = std::ldexp(m, 1 - bias - mantissa);
    else
        x = std::ldexp(m + (1 << mantissa), exponent - bias - mantissa);
    return bits >> 15 ? -x : x;
}
double decode_bf16(uint16_t bits) { return decode_half(bits, 7, 127); }
double decode_f16(uint16_t bits) { return decode_half(bits, 10, 15); }

// Every non-NaN value of a half type, to encode by looking up.
uint16_t encode_half(double x, bool is_bf16) {
    const double y = is_bf16 ? round_bf16(x) : round_f16(x);
    if (std::isnan(y)) return 0x7fff;
    const int mantissa = is_bf16 ? 7 : 10, bias = is_bf16 ? 127 : 15;
    const int sign = std::signbit(y) ? 0x8000 : 0;
    const double a = std::fabs(y);
    if (std::isinf(a)) return static_cast<uint16_t>(sign | (is_bf16 ? 0x7f80 : 0x7c00));
    const int exponent = a == 0 ? 1 - bias : std::max(std::ilogb(a), 1 - bias);
    const auto m = static_cast<int>(std::ldexp(a, mantissa - exponent));  // < 2^mantissa when subnormal
    return static_cast<uint16_t>(sign | (m + ((exponent + bias - 1) << mantissa)));
}

int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }
const char* name_of(DType t) { return t == DType::f32 ? "f32" : t == DType::bf16 ? "bf16" : "f16"; }

double rounded(double x, DType t) {
    return t == DType::f32    ? static_cast<float>(x)
           : t == DType::bf16 ? round_bf16(static_cast<float>(x))
                              : round_f16(static_cast<float>(x));
}
double load(const char* p, DType t) {
    if (t == DType::f32) {
        float x;
        std::memcpy(&x, p, 4);
        return x;
    }
    uint16_t x;
    std::memcpy(&x, p, 2);
    return t == DType::bf16 ? decode_bf16(x) : decode_f16(x);
}
void store(char* p, DType t, double value) {
    if (t == DType::f32) {
        const float x = static_cast<float>(value);
        std::memcpy(p, &x, 4);
        return;
    }
    const uint16_t x = encode_half(value, t == DType::bf16);
    std::memcpy(p, &x, 2);
}

// ---------------------------------------------------------------------------------------------------------------
// memory that ends where the array ends

constexpr unsigned char POISON = 0xff, GUARD = 0xa5;

class Memory {
  public:
    explicit Memory(size_t size) : size_(size) {
#if EXACT_HEAP
        void* raw = nullptr;
        if (posix_memalign(&raw, 64, size ? size : 1)) std::abort();
        base_ = static_cast<char*>(raw);
        data_ = base_;
#else
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const size_t body = (size + page - 1) / page * page + page;  // at least a page of guard in front
        mapped_ = body + page;
        base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED) std::abort();
        mprotect(base_ + body, page, PROT_NONE);
        data_ = base_ + body - size;
        std::memset(base_, GUARD, static_cast<size_t>(data_ - base_));
#endif
        std::memset(data_, POISON, size);
    }
    ~Memory() {
#if EXACT_HEAP
        std::free(base_);
#else
        munmap(base_, mapped_);
#endif
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    char* data() const { return data_; }
    size_t size() const { return size_; }
    bool guard_intact() const {
        for (const char* p = base_; p < data_; ++p)
            if (static_cast<unsigned char>(*p) != GUARD) return false;
        return true;
    }

  private:
    size_t size_;
    [[maybe_unused]] size_t mapped_ = 0;  // where the heap is not exact
    char *base_ = nullptr, *data_ = nullptr;
};

// A tensor with up to 5 dimensions inside such memory. `strided`: dimensions in a random order in memory, with gaps.
struct Array {
    std::vector<int64_t> dims, strides;
    DType dtype = DType::f32;
    std::unique_ptr<Memory> memory;
    std::vector<char> before;

    Array() = default;
    // The last `fixed` dimensions keep their order; the very last one is contiguous.
    Array(std::vector<int64_t> shape, DType type, bool strided, int fixed, Random& random)
        : dims(std::move(shape)), dtype(type) {
        const int rank = static_cast<int>(dims.size());
        std::vector<int> order(dims.size());
        for (int i = 0; i < rank; ++i) order[static_cast<size_t>(i)] = i;
        if (strided)
            for (int i = rank - fixed - 1; i > 0; --i)
                std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>(random.below(i + 1))]);
        strides.assign(dims.size(), 0);
        int64_t step = 1, span = 1;
        for (int i = rank - 1; i >= 0; --i) {
            const auto d = static_cast<size_t>(order[static_cast<size_t>(i)]);
            strides[d] = step;
            span += (dims[d] - 1) * step;
            step = step * dims[d] + (strided ? random.below(6) : 0);
        }
        for (int64_t n : dims)
            if (n == 0) span = 0;
        memory = std::make_unique<Memory>(static_cast<size_t>(span * size_of(dtype)));
    }
    explicit operator bool() const { return memory != nullptr; }
    char* data() const { return memory ? memory->data() : nullptr; }
    char* at(int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0, int64_t e = 0) const {
        const int64_t index[5] = {a, b, c, d, e};
        int64_t offset = 0;
        for (size_t i = 0; i < dims.size(); ++i) offset += index[i] * strides[i];
        return memory->data() + offset * size_of(dtype);
    }
    double get(int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0, int64_t e = 0) const {
        return load(at(a, b, c, d, e), dtype);
    }
    void set(double x, int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0, int64_t e = 0) {
        store(at(a, b, c, d, e), dtype, x);
    }
    void keep() {
        if (memory) before.assign(memory->data(), memory->data() + memory->size());
    }
    void restore() {
        if (memory) std::copy(before.begin(), before.end(), memory->data());
    }
    std::vector<char> bytes() const {
        return memory ? std::vector<char>(memory->data(), memory->data() + memory->size()) : std::vector<char>();
    }
    // Bytes that changed outside the elements marked in `allowed` (one entry per element of memory).
    int64_t stray(const std::vector<char>& allowed) const {
        int64_t count = 0;
        const auto size = static_cast<size_t>(size_of(dtype));
        for (size_t i = 0; i < memory->size(); ++i)
            if (memory->data()[i] != before[i] && (allowed.empty() || !allowed[i / size])) ++count;
        return count;
    }
    std::vector<char> none_allowed() const {
        return std::vector<char>(memory->size() / static_cast<size_t>(size_of(dtype)), 0);
    }
    void allow(std::vector<char>& allowed, const char* element) const {
        allowed[static_cast<size_t>((element - memory->data()) / size_of(dtype))] = 1;
    }
};

}  // namespace
}  // namespace anydelta::tests
