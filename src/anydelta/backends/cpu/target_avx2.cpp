// The avx2 build of rule.inl.h, mixer.inl.h, log.inl.h and backward.inl.h.
#define ANYDELTA_ISA avx2
#include "isa_avx2.h"
#include "backward.inl.h"
#include "log.inl.h"

namespace anydelta {
extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = {"avx2",
                              avx2::L,
                              avx2::W,
                              avx2::workspace,
                              avx2::run_task,
                              avx2::fma_loop,
                              avx2::mixer_workspace,
                              avx2::mix_task,
                              avx2::log_workspace,
                              avx2::verify_task,
                              avx2::fold_task,
                              avx2::backward_workspace,
                              avx2::kept_bytes,
                              avx2::backward_task};
}  // namespace anydelta
