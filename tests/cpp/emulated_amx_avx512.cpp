// The amx build of target_amx.cpp with its tiles emulated, and AVX-512 as it is: equal to the real one bit for bit.
#define ANYDELTA_ISA amx_emulated_avx512
#define ANYDELTA_TILES "tiles_amx.h"
#include "isa_avx512.h"
#include "backward.inl.h"
#include "log.inl.h"

namespace anydelta {
extern const Kernels kernels_amx_emulated_avx512;
const Kernels kernels_amx_emulated_avx512 = {"amx (tiles emulated)",
                                             amx_emulated_avx512::L,
                                             amx_emulated_avx512::W,
                                             amx_emulated_avx512::workspace,
                                             amx_emulated_avx512::run_task,
                                             amx_emulated_avx512::fma_loop,
                                             amx_emulated_avx512::mixer_workspace,
                                             amx_emulated_avx512::mix_task,
                                             amx_emulated_avx512::log_workspace,
                                             amx_emulated_avx512::verify_task,
                                             amx_emulated_avx512::fold_task,
                                             amx_emulated_avx512::backward_workspace,
                                             amx_emulated_avx512::kept_bytes,
                                             amx_emulated_avx512::backward_task};
}  // namespace anydelta
