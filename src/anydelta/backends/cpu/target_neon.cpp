// The neon build of rule.inl.h, mixer.inl.h, log.inl.h and backward.inl.h.
#define ANYDELTA_ISA neon
#include "isa_neon.h"
#include "backward.inl.h"
#include "log.inl.h"

namespace anydelta {
extern const Kernels kernels_neon;
const Kernels kernels_neon = {"neon",
                              neon::L,
                              neon::W,
                              neon::workspace,
                              neon::run_task,
                              neon::fma_loop,
                              neon::mixer_workspace,
                              neon::mix_task,
                              neon::log_workspace,
                              neon::verify_task,
                              neon::fold_task,
                              neon::backward_workspace,
                              neon::kept_bytes,
                              neon::backward_task};
}  // namespace anydelta
