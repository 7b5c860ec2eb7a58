// The backward pass of the mixer by every instruction set, on any valid call and any finite numbers: as that of the rule
// (fuzz_backward.cpp), with the gradients of what is around it.
#include "mixer_calls.h"

namespace {
using namespace anydelta;
using namespace anydelta::tests;

size_t bytes_of(DType t) { return t == DType::f32 ? 4 : 2; }

// The gradients of one call, each in memory of its own that is exactly as long.
struct Gradients {
    std::vector<std::vector<char>> memory;
    AroundBackward around;
    Backward g;

    Gradients(const MixerCall& x, const std::vector<char>& final_state, const Windows& final_windows, char fill) {
        const Mixer& m = x.m;
        const Problem& p = m.rule;
        const int64_t tokens = p.B * p.T, K = p.K, V = p.V, N = x.rule->N, C = 2 * p.H * K + p.HV * V;
        memory.reserve(16);
        const auto take = [&](int64_t count, DType t) {
            memory.emplace_back(static_cast<size_t>(count) * bytes_of(t), fill);
            return memory.back().data();
        };
        const auto rows = [&](const GroupedTokens& like, int64_t heads, int64_t size) {
            GroupedTokens t = like;
            t.data = take(tokens * heads * size, like.dtype);
            t.per = heads, t.g = 0, t.t = heads * size, t.b = p.T * heads * size;
            return t;
        };
        const auto scalars = [&](const Tokens& like, int64_t size) {
            Tokens t = like;
            t.data = take(tokens * p.HV * size, like.dtype);
            t.h = size, t.t = p.HV * size, t.b = p.T * p.HV * size;
            return t;
        };
        const auto numbers = [&](bool there, int64_t count) {
            return there ? reinterpret_cast<float*>(take(N * count, DType::f32)) : nullptr;
        };
        around.m = m;
        around.d_o = m.o;  // the forward pass has left numbers there
        around.d_final = final_windows;
        around.d_q = rows(m.q, p.H, K), around.d_k = rows(m.k, p.H, K), around.d_v = rows(m.v, p.HV, V);
        if (m.gate != NormGate::none) around.d_z = rows(m.z, p.HV, V);
        around.d_conv = numbers(true, C * m.S);
        around.d_weight = numbers(true, C * m.W);
        around.d_bias = numbers(m.bias, C);
        around.d_norm = numbers(m.norm_weight, p.HV * V);
        g.rule = p;
        g.mixer = &around;
        g.d_final = {const_cast<char*>(final_state.data()), p.HV * K * V, K * V, p.vk ? K : V, 0};
        g.d_g = scalars(p.g, p.kda ? K : 1), g.d_beta = scalars(p.beta, 1);
        g.d_initial = numbers(true, p.HV * K * V);
        g.d_A_log = numbers(p.A_log, p.HV);
        g.d_dt_bias = numbers(p.dt_bias, p.HV * (p.kda ? K : 1));
    }
};

std::vector<char> run_backward(MixerCall& x, const std::vector<char>& final_state, const Windows& windows,
                               const Kernels& kernels, int threads, char fill) {
    Gradients out(x, final_state, windows, fill);
    differentiate(out.g, kernels, threads, false);
    std::vector<char> all;
    for (const auto& part : out.memory) all.insert(all.end(), part.begin(), part.end());
    return all;
}

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Bytes in(data, size);
    const std::unique_ptr<MixerCall> call = mixer_of(in, false);
    MixerCall& x = *call;
    const Problem& p = x.m.rule;
    run(x.m, *builds()[0], 1, false);  // numbers for the gradient of the outputs
    const auto o = x.rule->o.bytes();
    x.restore();
    std::copy(o.begin(), o.end(), x.rule->o.data());
    x.keep();
    const int64_t N = x.rule->N, C = 2 * p.H * p.K + p.HV * p.V;
    std::vector<char> final_state(static_cast<size_t>(N * p.HV * p.K * p.V) * bytes_of(p.state_dtype));
    for (size_t i = 1; i < final_state.size(); i += 2) final_state[i] = static_cast<char>(i % 5 ? 0x3c : 0xbd);
    std::vector<char> windows_memory(static_cast<size_t>(N * C * x.m.S) * bytes_of(x.m.conv.dtype));
    for (size_t i = 1; i < windows_memory.size(); i += 2) windows_memory[i] = static_cast<char>(i % 3 ? 0x3c : 0xbd);
    Windows windows = x.m.conv;
    windows.data = in.flag() ? windows_memory.data() : nullptr;
    windows.n = C * x.m.S, windows.c = x.m.S, windows.s = 1;
    for (const Kernels* kernels : builds()) {
        std::snprintf(context, sizeof context, "%s: mixer W %" PRId64 " S %" PRId64 " %s", kernels->name, x.m.W, x.m.S,
                      x.rule->c.text().c_str());
        const auto one = run_backward(x, final_state, windows, *kernels, 1, 0x55);
        check(run_backward(x, final_state, windows, *kernels, 1, static_cast<char>(0xff)) == one,
              "what lay there shows");
        check(run_backward(x, final_state, windows, *kernels, 2, 0x55) == one, "2 threads and 1 differ");
        for (Array* a : {&x.z, &x.weight, &x.bias, &x.norm_weight, &x.conv, &x.rule->state_in})
            if (*a) check(a->stray({}) == 0, "an input was changed");
        for (Array* a : x.rule->inputs())
            if (*a) check(a->stray({}) == 0, "an input was changed");
    }
    return verdict();
}
