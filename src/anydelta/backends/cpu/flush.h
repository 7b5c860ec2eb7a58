// Treats subnormal numbers as zero in this thread while the object lives. Intel's CPUs compute them in microcode,
// some hundred cycles per operation, and products of strong decays produce many.
//
// x86-64: MXCSR, flush-to-zero (results) and denormals-are-zero (operands). 64-bit Arm: FPCR.FZ, which does both.
// Other CPUs: no effect. The register is restored, its exception flags included.
#pragma once
#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#elif defined(_M_ARM64) && !defined(__clang__)
#include <intrin.h>
#endif

namespace anydelta {

#if defined(__x86_64__) || defined(_M_X64)
constexpr uint64_t FLUSH_BITS = 0x8040;  // FTZ: bit 15, DAZ: bit 6
inline uint64_t float_control() { return _mm_getcsr(); }
inline void set_float_control(uint64_t bits) { _mm_setcsr(static_cast<unsigned>(bits)); }
#elif defined(_M_ARM64) && !defined(__clang__)
constexpr uint64_t FLUSH_BITS = uint64_t{1} << 24;  // FZ
inline uint64_t float_control() { return static_cast<uint64_t>(_ReadStatusReg(ARM64_FPCR)); }
inline void set_float_control(uint64_t bits) { _WriteStatusReg(ARM64_FPCR, static_cast<__int64>(bits)); }
#elif defined(__aarch64__) || defined(_M_ARM64)
constexpr uint64_t FLUSH_BITS = uint64_t{1} << 24;  // FZ
inline uint64_t float_control() {
    uint64_t bits;
    __asm__ volatile("mrs %0, fpcr" : "=r"(bits));
    return bits;
}
inline void set_float_control(uint64_t bits) { __asm__ volatile("msr fpcr, %0" : : "r"(bits)); }
#else
constexpr uint64_t FLUSH_BITS = 0;
inline uint64_t float_control() { return 0; }
inline void set_float_control(uint64_t) {}
#endif

class FlushSubnormals {
  public:
    FlushSubnormals() : before_(float_control()) { set_float_control(before_ | FLUSH_BITS); }
    ~FlushSubnormals() { set_float_control(before_); }
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;

  private:
    const uint64_t before_;
};

}  // namespace anydelta
