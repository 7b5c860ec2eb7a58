// The kernels built ahead of time, for C++ programs and a compiler with SYCL: icpx -fsycl or AdaptiveCpp.
// CMake target anydelta_sycl (-DANYDELTA_SYCL_LIBRARY=ON). Python uses module.cpp and the run-time compiler instead.
#include "library.hpp"

#include "delta_rule.hpp"

namespace anydelta {
namespace {

// 8 neighbours share 4 columns: at K = 128 that is 64 registers of state each.
template <int KP, bool KDA>
sycl::event launch(sycl::queue& queue, const Params& params) {
    constexpr int LANES = KP < 32 ? 4 : 8, VEC = 4, GROUP = 64;
    const std::int64_t panels = (params.V + VEC - 1) / VEC;
    const std::int64_t items = panels * params.HV * params.N * LANES;
    const std::size_t groups = std::size_t((items + GROUP - 1) / GROUP);
    return queue.submit([&](sycl::handler& h) {
        h.parallel_for(sycl::nd_range<1>(groups * GROUP, GROUP), [=](sycl::nd_item<1> it) {
            const auto sg = it.get_sub_group();
            const std::int64_t slot = it.get_group(0) * GROUP + sg.get_group_linear_id() * sg.get_max_local_range()[0] +
                                      sg.get_local_linear_id();
            Rule<KP, KDA, LANES, VEC, 1>::template run<1>(params, sg, slot);
        });
    });
}

template <int KP>
sycl::event either(sycl::queue& queue, const Params& params, bool kda) {
    return kda ? launch<KP, true>(queue, params) : launch<KP, false>(queue, params);
}

}  // namespace

sycl::event gated_delta_rule(sycl::queue& queue, const Params& params, bool kda) {
    if (params.K <= 16) return either<16>(queue, params, kda);
    if (params.K <= 32) return either<32>(queue, params, kda);
    if (params.K <= 64) return either<64>(queue, params, kda);
    if (params.K <= 128) return either<128>(queue, params, kda);
    if (params.K <= 256) return either<256>(queue, params, kda);
    throw std::invalid_argument("gated_delta_rule requires K <= 256; got " + std::to_string(params.K));
}

}  // namespace anydelta
