// The baseline build of rule.inl.h, mixer.inl.h, log.inl.h and backward.inl.h.
#define ANYDELTA_ISA baseline
#include "isa_baseline.h"
#include "backward.inl.h"
#include "log.inl.h"

namespace anydelta {
extern const Kernels kernels_baseline;
const Kernels kernels_baseline = {"baseline",
                                  baseline::L,
                                  baseline::W,
                                  baseline::workspace,
                                  baseline::run_task,
                                  baseline::fma_loop,
                                  baseline::mixer_workspace,
                                  baseline::mix_task,
                                  baseline::log_workspace,
                                  baseline::verify_task,
                                  baseline::fold_task,
                                  baseline::backward_workspace,
                                  baseline::kept_bytes,
                                  baseline::backward_task};
}  // namespace anydelta
