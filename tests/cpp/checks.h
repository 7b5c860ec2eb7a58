// Reporting what is wrong, and reproducible random numbers: for the C++ tests and the fuzz targets, one source file each.
#pragma once
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>

namespace anydelta::tests {
namespace {

char context[600] = "start";  // what runs now, for messages and for the crash handler
int failures = 0, failures_here = 0;  // of all tests, and of this one
long checks = 0;

[[gnu::format(printf, 2, 3)]] bool check(bool ok, const char* format, ...) {
    ++checks;
    if (ok) return true;
    ++failures;
    if (++failures_here > 5) return false;  // one bug fails in many ways
    std::va_list args;
    va_start(args, format);
    std::printf("FAIL  ");
    std::vprintf(format, args);
    va_end(args);
    std::printf("\n      in %s\n", context);
    std::fflush(stdout);
    return false;
}

struct Random {
    uint64_t state;
    uint64_t next() {  // splitmix64
        uint64_t z = (state += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
    double uniform(double lo, double hi) { return lo + (hi - lo) * static_cast<double>(next() >> 11) * 0x1p-53; }
    double normal() {
        return std::sqrt(-2 * std::log(uniform(1e-12, 1))) * std::cos(6.283185307179586 * uniform(0, 1));
    }
    bool chance(double p) { return uniform(0, 1) < p; }
};

}  // namespace
}  // namespace anydelta::tests
