// anydelta_executorch: the operators for ExecuTorch's runtime, as anydelta::gated_delta_rule.out and its siblings, over the
// CPU kernels. Loading the library registers them; linking it does too.
//
// The in-place operator is called gated_delta_rule_inplace here: ExecuTorch's exporter reads a trailing underscore
// as "has an argument self". Its schemas are derived in export/executorch.py: those of rule/arguments.py, then the results
// as out arguments. Tensors must be contiguous and results as large as planned; nothing else is allocated.
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <array>
#include <cstring>
#include <exception>
#include <new>
#include <optional>
#include <string>

#include "host.h"
#include "operators.h"
#include "spec.h"
#include "threads.h"

namespace {

using namespace anydelta;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;

[[noreturn]] void fail(const char* op, const std::string& text) {
    throw std::invalid_argument(std::string(op) + ": " + text);
}

Type type_of(ScalarType t) {
    switch (t) {
        case ScalarType::Float: return Type::f32;
        case ScalarType::BFloat16: return Type::bf16;
        case ScalarType::Half: return Type::f16;
        case ScalarType::Double: return Type::f64;
        case ScalarType::Int: return Type::i32;
        case ScalarType::Long: return Type::i64;
        case ScalarType::Bool: return Type::boolean;
        default: return Type::other;
    }
}

ScalarType scalar_type(Type t) {
    return t == Type::f32 ? ScalarType::Float : t == Type::bf16 ? ScalarType::BFloat16 : ScalarType::Half;
}

// A tensor's geometry, in the core's integer type.
constexpr int MAX_DIMS = 8;
struct Sizes {
    int64_t sizes[MAX_DIMS], strides[MAX_DIMS];
};

// The values of one call. Every accessor checks the tag first, because EValue's own accessors abort the process.
class Values {
  public:
    Values(const char* op, Span<EValue*> values) : op_(op), values_(values) {}

    // Null for None.
    const Tensor* tensor(size_t i, bool optional) const {
        const EValue& v = *values_[i];
        if (v.isTensor()) return &v.toTensor();
        if (!optional || !v.isNone()) wrong(i, optional ? "a tensor or None" : "a tensor");
        return nullptr;
    }
    // For None a number keeps its default.
    template <class Number>
    void take(size_t i, Number& out) const {
        const EValue& v = *values_[i];
        if (v.isDouble())
            out = v.toDouble();
        else if (v.isInt())
            out = static_cast<double>(v.toInt());
        else if (!v.isNone())
            wrong(i, "a number or None");
    }
    void take(size_t i, bool& out) const { out = flag(i); }
    void take(size_t i, std::string& out) const { out = text(i); }
    bool flag(size_t i) const {
        if (!values_[i]->isBool()) wrong(i, "a bool");
        return values_[i]->toBool();
    }
    std::string text(size_t i) const {
        if (!values_[i]->isString()) wrong(i, "a text");
        return std::string(values_[i]->toString());
    }

  private:
    const char* op_;
    Span<EValue*> values_;

    [[noreturn]] void wrong(size_t i, const char* what) const {
        fail(op_, "argument " + std::to_string(i) + " must be " + what +
                      "; got another kind. Export the program again with this version of anydelta");
    }
};

// A result must have the planned type, and gets its true size.
void fit(const char* op, const char* name, const Tensor& out, ScalarType type, std::initializer_list<int64_t> sizes) {
    if (out.scalar_type() != type)
        fail(op, std::string(name) + " was planned with another dtype. Export the program again");
    executorch::aten::SizesType want[MAX_DIMS];
    size_t n = 0;
    for (int64_t size : sizes) want[n++] = static_cast<executorch::aten::SizesType>(size);
    if (executorch::runtime::resize_tensor(out, {want, n}) != Error::Ok)
        fail(op, std::string(name) + " is larger than was planned. Export the program with larger dynamic shapes");
}

void compute(const OperatorOf<const Tensor*>& op, Span<EValue*> stack) {
    const size_t results = op.inplace ? 1 : 2;
    if (stack.size() < op.arguments() + results)
        fail(op.op(), "must have " + std::to_string(op.arguments() + results) + " arguments; got " +
                          std::to_string(stack.size()) + ". Export the program again with this version of anydelta");
    const Values values(op.op(), stack);
    TensorsOf<const Tensor*> tensors{};
    for (size_t i = 0; i < op.tensors.size(); ++i) tensors.*op.tensors[i] = values.tensor(i, op.optional(i));

    Options opt;
    opt.op = op.op();
    opt.inplace = op.inplace;
    size_t i = op.tensors.size();
    opt.each([&](const char*, auto& option) { values.take(i++, option); });
    const bool final_state = !op.inplace && values.flag(i);
    require_cpu(op.op(), values.text(op.arguments() - 1));
    const Tensor* out = values.tensor(op.arguments(), false);
    const Tensor* state_out = op.inplace ? nullptr : values.tensor(op.arguments() + 1, false);

    std::array<Sizes, rule_array::COUNT> geometry;
    size_t used = 0;
    Call call = call_of(tensors, [&](const Tensor* t) {
        Array x;
        if (!t) return x;
        if (t->dim() > MAX_DIMS)
            fail(op.op(), "a tensor must have at most 8 dimensions; got " + std::to_string(t->dim()));
        Sizes& s = geometry[used++];
        for (ssize_t i = 0; i < t->dim(); ++i)
            s.sizes[i] = t->size(i), s.strides[i] = t->strides()[static_cast<size_t>(i)];
        x.data = t->mutable_data_ptr();
        x.sizes = s.sizes, x.strides = s.strides;
        x.dims = static_cast<int>(t->dim());
        x.type = type_of(t->scalar_type());
        if (x.type == Type::other) x.type_name = executorch::runtime::toString(t->scalar_type());
        return x;
    });
    const Spec spec = check(call, opt);
    if (call.cu_seqlens.given() || call.state_indices.given()) check_values(call, opt, spec);
#define ANYDELTA_ADDRESS_OF(name, ...) &call.name,
    for (const Array* x : {ANYDELTA_TRACKED(ANYDELTA_ADDRESS_OF) & call.mask, &call.snapshots})
#undef ANYDELTA_ADDRESS_OF
        if (x->given() && !x->contiguous())
            fail(op.op(),
                 "ExecuTorch tensors must be contiguous, and gates not float64. Convert them in the exported program");
    if (call.q.type == Type::f64)
        fail(op.op(), "the CPU kernels require float32, bfloat16 or float16; got float64. Convert q, k and v");

    fit(op.op(), "out", *out, tensors.q->scalar_type(), {spec.B, spec.T, spec.HV, spec.V});
    call.o = out->mutable_data_ptr();
    if (final_state) {
        const int64_t rows = spec.vk ? spec.V : spec.K, columns = spec.vk ? spec.K : spec.V;
        fit(op.op(), "final_state", *state_out, scalar_type(spec.state_type), {spec.N, spec.HV, rows, columns});
        call.state_out = state_out->mutable_data_ptr();
    } else if (state_out) {
        fit(op.op(), "final_state", *state_out, tensors.q->scalar_type(), {0});
    }
    Prepared prepared;
    prepare(call, opt, spec, prepared);
    run_chosen(prepared.problem, static_cast<int>(executorch::extension::get_thread_count()), true);
}

template <const OperatorOf<const Tensor*>& op>
void boxed(KernelRuntimeContext& context, Span<EValue*> stack) {
    try {
        compute(op, stack);
    } catch (const std::invalid_argument& error) {
        ET_LOG(Error, "%s", error.what());
        context.fail(Error::InvalidArgument);
    } catch (const std::bad_alloc&) {
        ET_LOG(Error, "%s", OUT_OF_MEMORY);
        context.fail(Error::MemoryAllocationFailed);
    } catch (const std::exception& error) {
        ET_LOG(Error, "%s", error.what());
        context.fail(Error::Internal);
    }
}

// ExecuTorch's own threads: its workers are awake between two kernels of a program.
void on_executorch_threads(int threads, void (*work)(void*), void* context) {
    executorch::extension::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(context); });
}

// Registering twice aborts the process, so a second copy of the library does not register.
bool register_operators() {
    using executorch::runtime::Kernel;
    static const Kernel kernels[] = {
        Kernel("anydelta::gated_delta_rule.out", boxed<FUNCTIONAL<const Tensor*>>),
        Kernel("anydelta::gated_delta_rule_snapshots.out", boxed<SNAPSHOTS<const Tensor*>>),
        Kernel("anydelta::gated_delta_rule_inplace.out", boxed<INPLACE<const Tensor*>>),
    };
    share_threads_of(on_executorch_threads, true);
    for (const Kernel& known : executorch::runtime::get_registered_kernels())
        if (std::strcmp(known.name_, kernels[0].name_) == 0) return false;
    return executorch::runtime::register_kernels({kernels, 3}) == Error::Ok;
}
[[maybe_unused]] const bool registered = register_operators();

}  // namespace

// The ExecuTorch that the library was built for: its C++ interface is not stable.
ANYDELTA_EXPORT const char* anydelta_executorch_version() { return ANYDELTA_EXECUTORCH_VERSION; }
// The instruction set that ran the latest call.
ANYDELTA_EXPORT const char* anydelta_executorch_isa() {
    static std::string name;
    name = last_isa();
    return name.c_str();
}
