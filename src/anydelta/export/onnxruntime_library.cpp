// anydelta_onnxruntime: the operator anydelta::GatedDeltaRule for ONNX Runtime's CPU provider, over the CPU kernels.
// Sessions load it by the name RegisterCustomOps, as any library of custom operators:
//
//     (o, final_state) = GatedDeltaRule(q, k, v, g, beta, initial_state?, A_log?, dt_bias?, mask?, cu_seqlens?,
//                                       state_indices?)
//         q, k [B, T, H, K], v, o [B, T, HV, V]   T: float32, float16 or bfloat16
//         initial_state, final_state              S: float32 or bfloat16; they may be one memory (bound by the caller)
//         g, beta, A_log, dt_bias float32; mask bool; cu_seqlens, state_indices int64
//         attributes: the options
//
// as the functional operator of rule/arguments.py. export/onnx.py writes the calls.
#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "host.h"
#include "onnxruntime_abi.h"
#include "operators.h"
#include "spec.h"
#include "threads.h"

namespace {

using namespace anydelta;
using ort::Api;

constexpr int MAX_DIMS = 8;

void ok(Api* api, ort::Status* status, const char* what) {
    if (!status) return;
    ort::ReleaseStatus(api, status);
    throw std::runtime_error(std::string("gated_delta_rule: ONNX Runtime refused ") + what);
}

// Runs f. Returns its error as ONNX Runtime's, or null.
template <class F>
ort::Status* guarded(Api* api, F f) {
    try {
        f();
        return nullptr;
    } catch (const std::invalid_argument& error) {
        return ort::CreateStatus(api, ort::INVALID_ARGUMENT, error.what());
    } catch (const std::bad_alloc&) {
        return ort::CreateStatus(api, ort::FAIL, OUT_OF_MEMORY);
    } catch (const std::exception& error) {
        return ort::CreateStatus(api, ort::FAIL, error.what());
    }
}

// ---- tensors

struct Sizes {
    int64_t sizes[MAX_DIMS], strides[MAX_DIMS];
};

// A tensor of ONNX Runtime, always contiguous. Borrows `geometry`.
Array read(Api* api, const ort::Value* value, Sizes& geometry) {
    Array x;
    if (!value) return x;
    ort::TensorInfo* raw;
    ok(api, ort::GetTensorTypeAndShape(api, value, &raw), "to show a tensor");
    const auto release = [api](ort::TensorInfo* info) { ort::ReleaseTensorInfo(api, info); };
    const std::unique_ptr<ort::TensorInfo, decltype(release)> info(raw, release);
    size_t dims;
    int type;
    ok(api, ort::GetDimensionsCount(api, raw, &dims), "to show a tensor");
    ok(api, ort::GetTensorElementType(api, raw, &type), "to show a tensor");
    if (dims > MAX_DIMS)
        throw std::invalid_argument("gated_delta_rule: a tensor must have at most 8 dimensions; got " +
                                    std::to_string(dims));
    ok(api, ort::GetDimensions(api, raw, geometry.sizes, dims), "to show a tensor");
    ok(api, ort::GetTensorMutableData(api, const_cast<ort::Value*>(value), &x.data), "to show a tensor");
    uint64_t step = 1;  // may wrap for an empty tensor
    for (size_t i = dims; i-- > 0; step *= static_cast<uint64_t>(geometry.sizes[i]))
        geometry.strides[i] = static_cast<int64_t>(step);
    x.sizes = geometry.sizes, x.strides = geometry.strides, x.dims = static_cast<int>(dims);
    switch (type) {
        case ort::FLOAT: x.type = Type::f32; break;
        case ort::FLOAT16: x.type = Type::f16; break;
        case ort::BFLOAT16: x.type = Type::bf16; break;
        case ort::INT64: x.type = Type::i64; break;
        case ort::BOOL: x.type = Type::boolean; break;
        default: x.type_name = "another type";
    }
    return x;
}

// ---- threads

// ONNX Runtime's own threads are reached through the context of the call that is running here.
thread_local const ort::KernelContext* running = nullptr;
thread_local Api* running_api = nullptr;

void on_onnxruntime_threads(int threads, void (*work)(void*), void* context) {
    struct Job {
        void (*work)(void*);
        void* context;
    } job{work, context};
    const auto once = [](void* job, size_t) { static_cast<Job*>(job)->work(static_cast<Job*>(job)->context); };
    const auto n = static_cast<size_t>(threads);
    if (running && !ort::KernelContext_ParallelFor(running_api, running, once, n, n, &job)) return;
    work(context);  // one thread can do all of the work
}

// ---- the operator

struct Kernel {
    Api* api;
    Options options;

    Kernel(Api* api, const ort::KernelInfo* info) : api(api) {
        options.each([&](const char* name, auto& option) { take(info, name, option); });
    }

    void compute(ort::KernelContext* context) const {
        using Inputs = TensorsOf<const ort::Value*>;
        const auto& order = FUNCTIONAL<const ort::Value*>;
        Inputs inputs{};
        size_t count, outputs;
        ok(api, ort::KernelContext_GetInputCount(api, context, &count), "to count inputs");
        ok(api, ort::KernelContext_GetOutputCount(api, context, &outputs), "to count outputs");
        for (size_t i = 0; i < std::min(count, order.tensors.size()); ++i)
            ok(api, ort::KernelContext_GetInput(api, context, i, &(inputs.*order.tensors[i])), "an input");

        std::array<Sizes, rule_array::COUNT> geometry;
        size_t used = 0;
        Call call = call_of(inputs, [&](const ort::Value* v) { return read(api, v, geometry[used++]); });
        const Spec spec = check(call, options);
        if (call.cu_seqlens.given() || call.state_indices.given()) check_values(call, options, spec);

        const int64_t o[] = {spec.B, spec.T, spec.HV, spec.V};
        call.o = output(context, 0, o);
        const int64_t state[] = {spec.N, spec.HV, spec.vk ? spec.V : spec.K, spec.vk ? spec.K : spec.V};
        if (outputs > 1) call.state_out = output(context, 1, state);
        if (call.state_out && call.state_out == call.state.data && call.state_indices.given())
            throw std::invalid_argument(
                "gated_delta_rule: final_state must not be the memory of initial_state if that is a pool; got one "
                "memory. Bind another output");
        Prepared prepared;
        prepare(call, options, spec, prepared);
        running = context, running_api = api;
        run_chosen(prepared.problem, static_cast<int>(std::max(1u, std::thread::hardware_concurrency())), true);
        running = nullptr;
    }

  private:
    template <size_t N>
    void* output(ort::KernelContext* context, size_t index, const int64_t (&sizes)[N]) const {
        ort::Value* value = nullptr;
        ok(api, ort::KernelContext_GetOutput(api, context, index, sizes, N, &value), "memory for a result");
        void* data = nullptr;
        if (value) ok(api, ort::GetTensorMutableData(api, value, &data), "to show a result");
        return data;
    }
    // A missing attribute leaves the default.
    bool given(ort::Status* status) const {
        if (status) ort::ReleaseStatus(api, status);
        return !status;
    }
    template <class Number>
    void take(const ort::KernelInfo* info, const char* name, Number& out) const {
        float value;
        if (given(ort::KernelInfoGetAttribute_float(api, info, name, &value))) out = static_cast<double>(value);
    }
    void take(const ort::KernelInfo* info, const char* name, bool& out) const {
        int64_t value;
        if (given(ort::KernelInfoGetAttribute_int64(api, info, name, &value))) out = value != 0;
    }
    void take(const ort::KernelInfo* info, const char* name, std::string& out) const {
        size_t size = 0;  // includes the final zero
        if (!given(ort::KernelInfoGetAttribute_string(api, info, name, nullptr, &size)) || size == 0) return;
        std::vector<char> buffer(size);
        if (given(ort::KernelInfoGetAttribute_string(api, info, name, buffer.data(), &size))) out = buffer.data();
    }
};

// ONNX Runtime needs the type of each input and output, so there is one entry per type of q and of the state.
struct Typed : ort::CustomOp {
    int tokens, state;
};

Typed typed(int tokens, int state) {
    Typed op{};
    op.version = ort::VERSION;
    op.tokens = tokens, op.state = state;
    op.GetName = [](const ort::CustomOp*) { return "GatedDeltaRule"; };
    op.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return nullptr; };
    op.GetInputTypeCount = [](const ort::CustomOp*) { return FUNCTIONAL<const ort::Value*>.tensors.size(); };
    op.GetInputType = [](const ort::CustomOp* op, size_t i) {
        const auto* self = static_cast<const Typed*>(op);
        const int token = self->tokens, gate = ort::FLOAT, weight = ort::FLOAT, state = self->state, flag = ort::BOOL,
                  index = ort::INT64;
#define ANYDELTA_TYPE(presence, name, kind) kind,
        const int types[] = {ANYDELTA_ARGUMENTS_gated_delta_rule(ANYDELTA_TYPE)};
#undef ANYDELTA_TYPE
        return types[i];
    };
    op.GetInputCharacteristic = [](const ort::CustomOp*, size_t i) {
        return FUNCTIONAL<const ort::Value*>.optional(i) ? ort::OPTIONAL : ort::REQUIRED;
    };
    op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 2; };
    op.GetOutputType = [](const ort::CustomOp* op, size_t i) {
        const auto* self = static_cast<const Typed*>(op);
        return i == 0 ? self->tokens : self->state;
    };
    op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t i) { return i == 0 ? ort::REQUIRED : ort::OPTIONAL; };
    op.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return ort::MEMORY_DEFAULT; };
    op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const ort::CustomOp*) { return 0; };
    op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 0; };
    op.GetStartVersion = [](const ort::CustomOp*) { return 1; };
    op.GetEndVersion = [](const ort::CustomOp*) { return INT32_MAX; };
    op.CreateKernelV2 = [](const ort::CustomOp*, Api* api, const ort::KernelInfo* info, void** kernel) {
        return guarded(api, [&] { *kernel = new Kernel(api, info); });
    };
    op.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
        const auto* self = static_cast<const Kernel*>(kernel);
        return guarded(self->api, [&] { self->compute(context); });
    };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
}

// Sessions keep pointers to both, so they must live as long as the library.
ort::CustomOpDomain* domain(Api* api) {
    static std::vector<Typed> ops;
    static ort::CustomOpDomain* domain = [api] {
        for (int tokens : {ort::FLOAT, ort::FLOAT16, ort::BFLOAT16})
            for (int state : {ort::FLOAT, ort::BFLOAT16}) ops.push_back(typed(tokens, state));
        ort::CustomOpDomain* made;
        ok(api, ort::CreateCustomOpDomain(api, "anydelta", &made), "a domain");
        for (const Typed& op : ops) ok(api, ort::CustomOpDomain_Add(api, made, &op), "an operator");
        share_threads_of(on_onnxruntime_threads, true);
        return made;
    }();
    return domain;
}

}  // namespace

ANYDELTA_EXPORT anydelta::ort::Status* RegisterCustomOps(anydelta::ort::SessionOptions* options,
                                                         const anydelta::ort::ApiBase* base) {
    Api* api = base->GetApi(ort::VERSION);
    if (!api) {  // the first entry, which reports errors, is in the table of every release
        const std::string text = std::string("anydelta_onnxruntime requires ONNX Runtime 1.17 or newer; got ") +
                                 base->GetVersionString() + ". Install a newer one";
        return ort::CreateStatus(base->GetApi(1), ort::FAIL, text.c_str());
    }
    return guarded(api, [&] { ok(api, ort::AddCustomOpDomain(api, options, domain(api)), "the domain"); });
}
