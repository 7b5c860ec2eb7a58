// The amx build of target_amx.cpp on any CPU with AVX2, its tiles emulated: emulated_amx/immintrin.h stands in.
#define ANYDELTA_ISA amx_emulated
#define ANYDELTA_TILES "tiles_amx.h"
#include "isa_avx2.h"
#include "backward.inl.h"
#include "log.inl.h"

namespace anydelta {
extern const Kernels kernels_amx_emulated;
const Kernels kernels_amx_emulated = {"amx_emulated",
                                      amx_emulated::L,
                                      amx_emulated::W,
                                      amx_emulated::workspace,
                                      amx_emulated::run_task,
                                      amx_emulated::fma_loop,
                                      amx_emulated::mixer_workspace,
                                      amx_emulated::mix_task,
                                      amx_emulated::log_workspace,
                                      amx_emulated::verify_task,
                                      amx_emulated::fold_task,
                                      amx_emulated::backward_workspace,
                                      amx_emulated::kept_bytes,
                                      amx_emulated::backward_task};
}  // namespace anydelta
