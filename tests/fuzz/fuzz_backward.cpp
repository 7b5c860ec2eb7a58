// The backward pass of every instruction set, on any valid call and any finite numbers: every gradient is written whole and
// nothing else is, whatever lay in it before, with the same bits by two threads.
#include "fuzz.h"

namespace {
using namespace anydelta;
using namespace anydelta::tests;

size_t bytes_of(DType t) { return t == DType::f32 ? 4 : 2; }

// The gradients of one call, each in memory of its own that is exactly as long.
struct Gradients {
    std::vector<std::vector<char>> memory;
    Backward g;

    Gradients(const Call& x, const std::vector<char>& final_state, char fill) {
        const Problem& p = x.p;
        const int64_t tokens = x.c.B * x.c.T, K = p.K, V = p.V;
        memory.reserve(8);
        const auto take = [&](size_t bytes) {
            memory.emplace_back(bytes, fill);
            return memory.back().data();
        };
        const auto rows = [&](const Tokens& like, int64_t heads, int64_t size) {
            Tokens t = like;
            t.data = take(static_cast<size_t>(tokens * heads * size) * bytes_of(like.dtype));
            t.h = size, t.t = heads * size, t.b = x.c.T * heads * size;
            return t;
        };
        g.rule = p;
        g.d_o = p.o;
        g.d_final = {const_cast<char*>(final_state.data()), p.HV * K * V, K * V, p.vk ? K : V, 0};
        g.d_q = rows(p.q, p.H, K), g.d_k = rows(p.k, p.H, K), g.d_v = rows(p.v, p.HV, V);
        g.d_g = rows(p.g, p.HV, p.kda ? K : 1), g.d_beta = rows(p.beta, p.HV, 1);
        const auto numbers = [&](bool there, int64_t each) {
            return there ? reinterpret_cast<float*>(take(static_cast<size_t>(x.N * p.HV * each) * 4)) : nullptr;
        };
        g.d_initial = numbers(p.in.data, K * V);
        g.d_A_log = numbers(p.A_log, 1);
        g.d_dt_bias = numbers(p.dt_bias, p.kda ? K : 1);
    }
};

std::vector<char> run_backward(Call& x, const std::vector<char>& final_state, const Kernels& kernels, int threads,
                               char fill) {
    Gradients out(x, final_state, fill);
    differentiate(out.g, kernels, threads, false);
    std::vector<char> all;
    for (const auto& part : out.memory) all.insert(all.end(), part.begin(), part.end());
    return all;
}

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Bytes in(data, size);
    const int64_t most = in.pick({2000, 20000, 200000});
    Case c = case_of(in, most);
    c.Ks = 0, c.scattered = false;
    const std::unique_ptr<Call> call = make_call(c);
    Call& x = *call;
    spoil(x, in);
    run(x.p, *builds()[0], 1, false);  // numbers for the gradient of the outputs
    std::vector<char> final_state(static_cast<size_t>(x.N * c.HV * c.K * c.V) * bytes_of(c.state));
    for (size_t i = 1; i < final_state.size(); i += 2) final_state[i] = static_cast<char>(i % 5 ? 0x3c : 0xbd);
    const std::vector<char> state = x.result_state().bytes();
    for (const Kernels* kernels : builds()) {
        std::snprintf(context, sizeof context, "%s: %s", kernels->name, c.text().c_str());
        const auto one = run_backward(x, final_state, *kernels, 1, 0x55);
        check(run_backward(x, final_state, *kernels, 1, static_cast<char>(0xff)) == one, "what lay there shows");
        check(run_backward(x, final_state, *kernels, 2, 0x55) == one, "2 threads and 1 differ");
        for (Array* a : x.inputs())
            if (*a) check(a->stray({}) == 0, "an input was changed");
        check(x.result_state().bytes() == state, "the state was changed");
    }
    return verdict();
}
