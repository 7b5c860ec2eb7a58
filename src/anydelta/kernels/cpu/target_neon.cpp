// The neon build of rule.inl.h and mixer.inl.h.
#define ANYDELTA_ISA neon
#include "isa_neon.h"
#include "mixer.inl.h"

namespace anydelta {
extern const Kernels kernels_neon;
const Kernels kernels_neon = {
    "neon", neon::L, neon::W, neon::workspace, neon::run_task, neon::fma_loop, neon::mixer_workspace, neon::mix_task};
}  // namespace anydelta
