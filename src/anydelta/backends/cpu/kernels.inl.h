// All kernels of one instruction set, and their table kernels_ISA. A target_*.cpp defines ANYDELTA_ISA, includes its
// isa_*.h, and then this file.
#pragma once
#include "backward.inl.h"
#include "log.inl.h"

#define AD_TABLE_OF(isa) kernels_##isa
#define AD_TABLE(isa) AD_TABLE_OF(isa)

namespace anydelta {
extern const Kernels AD_TABLE(ANYDELTA_ISA);
const Kernels AD_TABLE(ANYDELTA_ISA) = {AD_NAME(ANYDELTA_ISA),
                                        ANYDELTA_ISA::L,
                                        ANYDELTA_ISA::W,
                                        ANYDELTA_ISA::workspace,
                                        ANYDELTA_ISA::run_task,
                                        ANYDELTA_ISA::fma_loop,
                                        ANYDELTA_ISA::mixer_workspace,
                                        ANYDELTA_ISA::mix_task,
                                        ANYDELTA_ISA::log_workspace,
                                        ANYDELTA_ISA::verify_task,
                                        ANYDELTA_ISA::fold_task,
                                        ANYDELTA_ISA::backward_workspace,
                                        ANYDELTA_ISA::kept_bytes,
                                        ANYDELTA_ISA::backward_task};
}  // namespace anydelta
