// The amx build of rule.inl.h, mixer.inl.h, log.inl.h and backward.inl.h: AVX-512, and products on AMX tiles.
#define ANYDELTA_ISA amx
#define ANYDELTA_TILES "tiles_amx.h"
#include "isa_avx512.h"
#include "backward.inl.h"
#include "log.inl.h"

namespace anydelta {
extern const Kernels kernels_amx;
const Kernels kernels_amx = {"amx",
                             amx::L,
                             amx::W,
                             amx::workspace,
                             amx::run_task,
                             amx::fma_loop,
                             amx::mixer_workspace,
                             amx::mix_task,
                             amx::log_workspace,
                             amx::verify_task,
                             amx::fold_task,
                             amx::backward_workspace,
                             amx::kept_bytes,
                             amx::backward_task};
}  // namespace anydelta
