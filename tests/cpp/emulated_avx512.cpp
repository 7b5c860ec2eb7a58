// The AVX-512 build of target_avx512.cpp on any CPU with AVX2: simde_avx512/immintrin.h stands in for the compiler's. Its name differs from target_avx512.cpp's, so that a CPU with AVX-512 runs both.
#define ANYDELTA_ISA avx512_emulated
#define PROBE probe_avx512_emulated
#include "isa_avx512.h"
#include "backward.inl.h"
#include "log.inl.h"
#include "probe.inl.h"

namespace anydelta {
extern const Kernels kernels_avx512_emulated;
const Kernels kernels_avx512_emulated = {"avx512 (emulated)",
                                         avx512_emulated::L,
                                         avx512_emulated::W,
                                         avx512_emulated::workspace,
                                         avx512_emulated::run_task,
                                         avx512_emulated::fma_loop,
                                         avx512_emulated::mixer_workspace,
                                         avx512_emulated::mix_task,
                                         avx512_emulated::log_workspace,
                                         avx512_emulated::verify_task,
                                         avx512_emulated::fold_task,
                                         avx512_emulated::backward_workspace,
                                         avx512_emulated::kept_bytes,
                                         avx512_emulated::backward_task};
}  // namespace anydelta
