// C++ interface of the kernels that are built ahead of time; see library.cpp.
#pragma once

#include <stdexcept>
#include <string>
#include <sycl/sycl.hpp>

#include "params.hpp"

namespace anydelta {

// Enqueue one call. Addresses in `params` are memory that the device reaches (USM). `kda`: g is [B, T, HV, K]. Throws
// std::invalid_argument for K > 256, sycl::exception for calls that the driver refuses.
sycl::event gated_delta_rule(sycl::queue& queue, const Params& params, bool kda);

}  // namespace anydelta
