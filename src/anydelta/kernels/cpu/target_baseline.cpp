// The baseline build of rule.inl.h and mixer.inl.h.
#define ANYDELTA_ISA baseline
#include "isa_baseline.h"
#include "mixer.inl.h"

namespace anydelta {
extern const Kernels kernels_baseline;
const Kernels kernels_baseline = {"baseline",
                                  baseline::L,
                                  baseline::W,
                                  baseline::workspace,
                                  baseline::run_task,
                                  baseline::fma_loop,
                                  baseline::mixer_workspace,
                                  baseline::mix_task};
}  // namespace anydelta
