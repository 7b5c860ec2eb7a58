// The avx512 build of rule.inl.h, mixer.inl.h, log.inl.h and backward.inl.h.
#define ANYDELTA_ISA avx512
#include "isa_avx512.h"
#include "backward.inl.h"
#include "log.inl.h"

namespace anydelta {
extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = {"avx512",
                                avx512::L,
                                avx512::W,
                                avx512::workspace,
                                avx512::run_task,
                                avx512::fma_loop,
                                avx512::mixer_workspace,
                                avx512::mix_task,
                                avx512::log_workspace,
                                avx512::verify_task,
                                avx512::fold_task,
                                avx512::backward_workspace,
                                avx512::kept_bytes,
                                avx512::backward_task};
}  // namespace anydelta
