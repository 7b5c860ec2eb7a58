// anydelta_torch: torch.ops.anydelta for CPU tensors, in C++ on libtorch's stable ABI (torch/csrc/stable). So one
// build serves every torch from 2.10 on, and programs without Python. The schemas come from rule/arguments.py.
// Fake kernels, gradients and all calls that the CPU kernels do not take stay in Python (torch_ops.py), which
// registers itself below.
//
// Each operator exists twice: boxed, for the dispatcher, and as a C function with the name that AOTInductor's
// generated code calls directly (aoti_torch_cpu_...; declared in export/aoti.py).
#include <torch/csrc/stable/library.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <iostream>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "host.h"
#include "operators.h"
#include "spec.h"
#include "threads.h"
#include "torch_schemas.h"
#include "torch_symbols.h"

namespace {

using namespace anydelta;
using torch::stable::detail::to;

void ok(AOTITorchError error, const char* what) {
    if (error) throw std::runtime_error(std::string("anydelta: torch refused ") + what);
}

// ---- tensors

// The tensors of a call, borrowed; null if not given.
using Tensors = TensorsOf<AtenTensorHandle>;
using Op = OperatorOf<AtenTensorHandle>;

struct Deleter {
    void operator()(AtenTensorHandle t) const { aoti_torch_delete_tensor_object(t); }
};
using Owned = std::unique_ptr<AtenTensorOpaque, Deleter>;

struct Types {
    int32_t code[7] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16(),
                       aoti_torch_dtype_float64(), aoti_torch_dtype_int32(),    aoti_torch_dtype_int64(),
                       aoti_torch_dtype_bool()};
    const int32_t cpu = aoti_torch_device_type_cpu();

    Type of(int32_t dtype) const {
        for (int i = 0; i < 7; ++i)
            if (code[i] == dtype) return static_cast<Type>(i);
        return Type::other;
    }
    const char* name(int32_t dtype) const {
        const std::pair<int32_t, const char*> others[] = {
            {aoti_torch_dtype_uint8(), "uint8"},           {aoti_torch_dtype_int8(), "int8"},
            {aoti_torch_dtype_int16(), "int16"},           {aoti_torch_dtype_uint16(), "uint16"},
            {aoti_torch_dtype_uint32(), "uint32"},         {aoti_torch_dtype_uint64(), "uint64"},
            {aoti_torch_dtype_complex32(), "complex32"},   {aoti_torch_dtype_complex64(), "complex64"},
            {aoti_torch_dtype_complex128(), "complex128"},
        };
        for (const auto& [code, name] : others)
            if (code == dtype) return name;
        return "another type";
    }
    static int64_t bytes(Type type) {
        const int64_t sizes[7] = {4, 2, 2, 8, 4, 8, 1};
        return type == Type::other ? 1 : sizes[static_cast<int>(type)];
    }
    static const Types& get() {
        static const Types types;
        return types;
    }
};

// Borrows the tensor's sizes and strides. Null data despite elements: the storage does not hold them.
Array read(AtenTensorHandle t) {
    Array x;
    bool defined = false;  // None for a required tensor arrives as an undefined one
    if (!t || aoti_torch_is_defined(t, &defined) || !defined) return x;
    int64_t dims, *sizes, *strides;
    int32_t dtype;
    const void* data;
    ok(aoti_torch_get_dim(t, &dims) || aoti_torch_get_sizes(t, &sizes) || aoti_torch_get_strides(t, &strides) ||
           aoti_torch_get_dtype(t, &dtype) || torch_get_const_data_ptr(t, &data),
       "to show a tensor");
    x.data = const_cast<void*>(data);
    x.sizes = sizes;
    x.strides = strides;
    x.dims = static_cast<int>(dims);
    x.type = Types::get().of(dtype);
    if (x.type == Type::other) x.type_name = Types::get().name(dtype);
    int64_t bytes, first, last = 0;
    ok(aoti_torch_get_storage_size(t, &bytes) || aoti_torch_get_storage_offset(t, &first), "to show a tensor's memory");
    for (int64_t i = 0; i < dims; ++i) last += (sizes[i] - 1) * strides[i];
    if (bytes / Types::get().bytes(x.type) <= first + last) x.data = nullptr;
    return x;
}

Owned empty(const int64_t* sizes, size_t dims, int32_t dtype) {
    AtenTensorHandle t;
    std::array<int64_t, 8> few;
    std::vector<int64_t> many(dims > few.size() ? dims : 0);
    int64_t *strides = many.empty() ? few.data() : many.data(), step = 1;
    for (size_t i = dims; i-- > 0; step *= std::max<int64_t>(sizes[i], 1)) strides[i] = step;
    ok(aoti_torch_empty_strided(static_cast<int64_t>(dims), sizes, strides, dtype, Types::get().cpu, 0, &t),
       "memory for a result");
    return Owned(t);
}

Owned empty(std::initializer_list<int64_t> sizes, int32_t dtype) { return empty(sizes.begin(), sizes.size(), dtype); }

void* data_of(AtenTensorHandle t) {
    void* data;
    ok(aoti_torch_get_data_ptr(t, &data), "to show a tensor's memory");
    return data;
}

int32_t dtype_of(AtenTensorHandle t) {
    int32_t dtype;
    ok(aoti_torch_get_dtype(t, &dtype), "to show a tensor");
    return dtype;
}

Type type_of(AtenTensorHandle t) {
    bool defined = false;
    return !t || aoti_torch_is_defined(t, &defined) || !defined ? Type::other : Types::get().of(dtype_of(t));
}

// A contiguous copy; float64 gates become float32, the type they are computed in.
Owned contiguous(AtenTensorHandle t, const Array& x) {
    const Type type = x.type == Type::f64 ? Type::f32 : x.type;
    Owned copy = empty(x.sizes, static_cast<size_t>(x.dims), Types::get().code[static_cast<int>(type)]);
    ok(aoti_torch_copy_(copy.get(), t, 0), "to copy a tensor");
    return copy;
}

// ---- gradients

bool is_leaf(AtenTensorHandle t) {
    AtenTensorHandle same;
    ok(aoti_torch_new_tensor_handle(t, &same), "to look at a tensor");
    StableIValue stack[1] = {torch::stable::detail::from(same)};
    ok(torch_call_dispatcher("aten::is_leaf", "", stack, TORCH_ABI_VERSION), "to look at a tensor");
    return to<bool>(stack[0]);
}

// Whether a result that depends on t would require grad. The stable ABI cannot say, so a view of t is asked
// whether it has a history.
bool requires_grad(AtenTensorHandle t) {
    bool defined = false;
    if (!t || aoti_torch_is_defined(t, &defined) || !defined) return false;
    StableIValue stack[1];
    AtenTensorHandle same;
    ok(aoti_torch_new_tensor_handle(t, &same), "to look at a tensor");
    stack[0] = torch::stable::detail::from(same);
    ok(torch_call_dispatcher("aten::alias", "", stack, TORCH_ABI_VERSION), "to view a tensor");
    const Owned view(to<AtenTensorHandle>(stack[0]));
    return !is_leaf(view.get());
}

// Whether dual numbers carry a tangent for t. There is one level at most.
bool has_tangent(AtenTensorHandle t) {
    bool defined = false;
    if (!t || aoti_torch_is_defined(t, &defined) || !defined) return false;
    AtenTensorHandle same;
    ok(aoti_torch_new_tensor_handle(t, &same), "to look at a tensor");
    StableIValue stack[2] = {torch::stable::detail::from(same), torch::stable::detail::from(int64_t{0})};
    ok(torch_call_dispatcher("aten::_unpack_dual", "", stack, TORCH_ABI_VERSION), "to look at a tensor");
    bool both = true;  // the primal and the tangent
    for (StableIValue value : stack) {
        const Owned part(to<AtenTensorHandle>(value));
        bool there = false;
        if (part) ok(aoti_torch_is_defined(part.get(), &there), "to look at a tensor");
        both = both && there;
    }
    return both;
}

// Without these, calls that write fall back to Python.
const void* const torch_library = reinterpret_cast<const void*>(&aoti_torch_is_defined);
const auto bump_version =  // a handle points to an at::Tensor, taken by reference
    torch_symbol<void (*)(AtenTensorHandle)>(torch_library, torch_names::BUMP_VERSION);
const auto dual_level = torch_symbol<std::shared_ptr<void> (*)(uint64_t)>(torch_library, torch_names::DUAL_LEVEL);

bool in_dual_level() { return dual_level && dual_level(0); }

// Refuse gradients of operators that write to an argument, instead of returning a constant.
void refuse_gradients(const Tensors& t, const Options& opt) {
    const bool grads = aoti_torch_grad_mode_is_enabled(), duals = in_dual_level();
    if (!grads && !duals) return;
    std::string names;
#define ANYDELTA_NAMED(member, place, functional, in_place) {opt.inplace ? in_place : functional, t.member},
    const std::pair<const char*, AtenTensorHandle> all[] = {ANYDELTA_TRACKED(ANYDELTA_NAMED)};
#undef ANYDELTA_NAMED
    for (const auto& [name, tensor] : all)
        if ((grads && requires_grad(tensor)) || (duals && has_tangent(tensor)))
            names += (names.empty() ? "" : ", ") + std::string(name);
    if (grads && requires_grad(t.snapshots) && is_leaf(t.snapshots))
        throw std::invalid_argument(std::string(opt.op) +
                                    ": snapshots is written in place and must not require grad; got a leaf that does. "
                                    "Detach it first");
    if (names.empty()) return;
    const std::string has = names + (grads ? " requires grad" : " carries a tangent");
    throw std::invalid_argument(
        std::string(opt.op) +
        (opt.inplace ? ": the in-place op has no gradient, but " + has + ". Use gated_delta_rule, or torch.no_grad()"
                     : ": snapshots have no gradient, but " + has + ". Use torch.no_grad(), or leave snapshots out"));
}

// Raise the version of a tensor that is written. Throws for an inference tensor outside of inference mode.
void count_write(AtenTensorHandle t) {
    bool defined = false;
    if (!t || aoti_torch_is_defined(t, &defined) || !defined) return;
    if (bump_version) bump_version(t);
}

// A tensor with freed storage is neither absent nor readable.
void require_memory(const Call& c, const Options& opt) {
#define ANYDELTA_NAMED(member, place, functional, in_place) {opt.inplace ? in_place : functional, &c.member},
    const std::pair<const char*, const Array*> all[] = {ANYDELTA_ARRAYS(ANYDELTA_NAMED)};
#undef ANYDELTA_NAMED
    for (const auto& [name, x] : all) {
        bool elements = x->given() && !x->data;
        for (int64_t i = 0; elements && i < x->dims; ++i) elements = x->sizes[i] > 0;
        if (elements)
            throw std::invalid_argument(std::string(opt.op) + ": " + name +
                                        " must have memory; got a tensor whose storage does not hold it, as after "
                                        "resize_(0). Allocate it again first");
    }
}

// ---- the call

void run_here(const Problem& p, int threads) { run_chosen(p, threads, true); }
// If the Python extension is in the process too, its copy of the kernels runs: one thread pool,
// one choice of the ISA.
std::atomic<void (*)(const Problem&, int)> runner{run_here};
std::atomic<bool> python_attached{false};

struct Results {
    Owned o, state;  // state: null if not wanted
};

// Validate and run. Throws std::invalid_argument before anything is written. Generated code has no gradients.
Results compute(const Tensors& t, const Options& opt, bool final_state, bool ask_gradients) try {
    Call call = call_of(t, read);
    require_memory(call, opt);
    const Spec spec = check(call, opt);
    if (call.cu_seqlens.given() || call.state_indices.given()) check_values(call, opt, spec);
    if (ask_gradients && (opt.inplace || call.snapshots.given())) refuse_gradients(t, opt);
    if (ask_gradients) {  // raise autograd's version counts, as torch's own operators do
        if (opt.inplace) count_write(t.state);
        count_write(t.snapshots);
    }
    if (call.q.type == Type::f64)
        throw std::runtime_error(std::string(opt.op) +
                                 ": the CPU kernels require float32, bfloat16 or float16; got float64, which only "
                                 "the reference in Python takes. Convert q, k and v");

    std::vector<Owned> copies;  // of arrays that the kernels cannot read as they are
    const auto plain = [&](Array& x, AtenTensorHandle from, bool whole) -> AtenTensorHandle {
        if (!x.given() || (whole ? x.contiguous() : x.plain())) return nullptr;
        copies.push_back(contiguous(from, x));
        x = read(copies.back().get());
        return copies.back().get();
    };
#define ANYDELTA_PLAIN(name, ...) plain(call.name, t.name, false);
    ANYDELTA_TOKENS(ANYDELTA_PLAIN)
#undef ANYDELTA_PLAIN
    plain(call.A_log, t.A_log, true), plain(call.dt_bias, t.dt_bias, true);
    const AtenTensorHandle state_copy = plain(call.state, t.state, false);
    const AtenTensorHandle snapshots_copy = plain(call.snapshots, t.snapshots, false);

    Results r;
    r.o = empty({spec.B, spec.T, spec.HV, spec.V}, dtype_of(t.q));
    call.o = data_of(r.o.get());
    if (final_state) {
        const int64_t rows = spec.vk ? spec.V : spec.K, columns = spec.vk ? spec.K : spec.V;
        r.state = empty({spec.N, spec.HV, rows, columns}, Types::get().code[static_cast<int>(spec.state_type)]);
        call.state_out = data_of(r.state.get());
    }
    Prepared prepared;
    prepare(call, opt, spec, prepared);
    uint32_t threads;
    ok(torch_get_num_threads(&threads), "to count threads");
    runner.load(std::memory_order_relaxed)(prepared.problem, static_cast<int>(threads));
    if (state_copy && opt.inplace) ok(aoti_torch_copy_(t.state, state_copy, 0), "to copy the state back");
    if (snapshots_copy) ok(aoti_torch_copy_(t.snapshots, snapshots_copy, 0), "to copy the snapshots back");
    return r;
} catch (const std::bad_alloc&) {
    throw std::runtime_error(OUT_OF_MEMORY);
}

// ---- for the dispatcher

// The arguments of one boxed call. This function must free them, unless it passes them on.
class Stack {
  public:
    Stack(const Op& op, StableIValue* stack, uint64_t arguments) : op_(op), stack_(stack) {
        if (arguments != op.arguments())
            throw std::runtime_error(std::string("anydelta: the schema of ") + op.name +
                                     " is not the one that anydelta_torch was built for. Build anydelta again");
        for (size_t i = 0; i < op.tensors.size(); ++i) {
            StableIValue value = stack[i];
            if (op.optional(i)) {
                if (!value) continue;
                value = *to<StableIValue*>(value);
            }
            tensors.*op.tensors[i] = to<AtenTensorHandle>(value);
        }
        options.op = op.op();
        options.inplace = op.inplace;
        size_t i = op.tensors.size();
        options.each([&](const char*, auto& option) { take(stack[i++], option); });
        if (!op.inplace) take(stack[i++], final_state);
        take(stack[i], backend);
    }
    ~Stack() {
        if (!stack_) return;
        for (size_t i = 0; i < op_.tensors.size(); ++i) {
            const auto t = op_.optional(i) ? to<std::optional<AtenTensorHandle>>(stack_[i])
                                           : std::optional(to<AtenTensorHandle>(stack_[i]));
            if (t) aoti_torch_delete_tensor_object(*t);
        }
        size_t i = op_.tensors.size();
        options.each([&](const char*, auto& option) { release(stack_[i++], option); });
        release(stack_[op_.arguments() - 1], backend);
    }
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;
    // The new owner of the arguments frees them.
    StableIValue* release() { return std::exchange(stack_, nullptr); }

    Tensors tensors{};
    Options options;
    std::string backend;
    bool final_state = false;

  private:
    const Op& op_;
    StableIValue* stack_;

    // One value of the stack by its C++ type; `release` frees what it holds.
    template <class T>
    static void take(StableIValue value, T& out) {
        out = to<T>(value);
    }
    static void take(StableIValue value, std::string& out) {
        const auto handle = to<StringHandle>(value);
        size_t length;
        const char* data;
        ok(torch_string_length(handle, &length) || torch_string_c_str(handle, &data), "to show a text");
        out.assign(data, length);
    }
    static void take(StableIValue value, std::optional<double>& out) {
        if (value) out = to<double>(*to<StableIValue*>(value));
    }
    template <class T>
    static void release(StableIValue, const T&) {}
    static void release(StableIValue value, const std::string&) { torch_delete_string(to<StringHandle>(value)); }
    static void release(StableIValue value, const std::optional<double>&) { (void)to<std::optional<double>>(value); }
};

// Calls that the CPU kernels do not take, or for another backend: Python chooses the backend, or says why none runs.
bool for_python(const Stack& s) {
    const bool writes = s.options.inplace || s.tensors.snapshots;
    const bool unknown = type_of(s.tensors.q) == Type::f64 || (writes && !(bump_version && dual_level));
    if (unknown && python_attached.load(std::memory_order_relaxed)) return true;
    if (s.backend == "cpu") return false;
    if (s.backend != "auto") return true;
    const char* forced = std::getenv("ANYDELTA_BACKEND");
    if (forced && *forced && std::strcmp(forced, "cpu") != 0) return true;
    return false;
}

// The operator's twin in Python takes the same arguments and returns one tensor more: an error's text as bytes. An
// exception cannot pass through the stable ABI, and neither can a text among tensors (torch_call_dispatcher takes the
// types of results in reverse). "ValueError: ..." becomes that error, anything else a RuntimeError.
void call_python(const Op& op, Stack& s, StableIValue* stack, uint64_t outputs) {
    if (!python_attached.load())
        require_cpu(s.options.op, s.backend == "auto" ? std::getenv("ANYDELTA_BACKEND") : s.backend);
    StableIValue* arguments = s.release();
    const std::string twin = std::string("anydelta::python_") + op.name;
    ok(torch_call_dispatcher(twin.c_str(), "", arguments, TORCH_ABI_VERSION), twin.c_str());
    const Owned bytes(to<AtenTensorHandle>(stack[outputs]));
    const Array text = read(bytes.get());
    const std::string error(static_cast<const char*>(text.data), static_cast<size_t>(text.sizes[0]));
    if (error.empty()) return;
    for (uint64_t i = 0; i < outputs; ++i) aoti_torch_delete_tensor_object(to<AtenTensorHandle>(stack[i]));
    const std::string invalid = "ValueError: ";
    if (error.compare(0, invalid.size(), invalid) == 0) throw std::invalid_argument(error.substr(invalid.size()));
    throw std::runtime_error(error.substr(error.find(": ") + 2));
}

template <const Op& op>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t outputs) {
    Results r;
    {
        Stack s(op, stack, arguments);
        if (for_python(s)) return call_python(op, s, stack, outputs);
        r = compute(s.tensors, s.options, s.final_state, true);
        if (!op.inplace && !r.state) r.state = empty({0}, dtype_of(s.tensors.q));
    }
    stack[0] = torch::stable::detail::from(r.o.release());
    if (!op.inplace) stack[1] = torch::stable::detail::from(r.state.release());
}

STABLE_TORCH_LIBRARY(anydelta, m) {
    for (const char* schema : SCHEMAS) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(anydelta, CPU, m) {
    m.impl("gated_delta_rule", boxed<FUNCTIONAL<AtenTensorHandle>>);
    m.impl("gated_delta_rule_snapshots", boxed<SNAPSHOTS<AtenTensorHandle>>);
    m.impl("gated_delta_rule_", boxed<INPLACE<AtenTensorHandle>>);
}

// torch's own threads, if threads.cpp finds no OpenMP runtime by itself (macOS, Windows).
void on_torch_threads(int threads, void (*work)(void*), void* context) {
    struct Job {
        void (*work)(void*);
        void* context;
    } job{work, context};
    const auto once = [](int64_t, int64_t, void* job) {
        static_cast<Job*>(job)->work(static_cast<Job*>(job)->context);
    };
    torch_parallel_for(0, threads, 1, once, &job);
}
[[maybe_unused]] const bool threads_shared = (share_threads_of(on_torch_threads), true);

}  // namespace

// ---- for the code that AOTInductor generates. The schemas, with tensors as handles, optional ones as pointers to handles,
// results last. aoti.py derives the declarations from the schemas.

namespace {

// An option as the generated code passes it.
using C_flag = int32_t;
using C_number = double;
using C_maybe = const double*;
using C_choice = const char*;

AOTITorchError shim(bool inplace, const Tensors& t, Options opt, bool final_state, const char* backend,
                    AtenTensorHandle* o, AtenTensorHandle* state) {
    try {
        opt.op = inplace ? "gated_delta_rule_" : "gated_delta_rule";
        opt.inplace = inplace;
        require_cpu(opt.op, backend);
        Results r = compute(t, opt, final_state, false);
        if (o) *o = r.o.release();
        if (state) *state = r.state ? r.state.release() : empty({0}, dtype_of(t.q)).release();
        return 0;
    } catch (const std::exception& error) {  // the generated code's own error names only this function
        std::cerr << error.what() << std::endl;
        return 1;
    }
}

AtenTensorHandle given(AtenTensorHandle t) { return t; }
AtenTensorHandle given(const AtenTensorHandle* t) { return t ? *t : nullptr; }
template <class T, class C>
void set(T& option, C value) {
    option = static_cast<T>(value);
}
void set(std::optional<double>& option, const double* value) {
    if (value) option = *value;
}

}  // namespace

using Handle = AtenTensorHandle;

// A function for each operator; `...` is what follows its options.
#define ANYDELTA_PARAMETER_required Handle
#define ANYDELTA_PARAMETER_optional Handle*
#define ANYDELTA_PARAMETER(presence, name, kind) ANYDELTA_PARAMETER_##presence name,
#define ANYDELTA_SET(presence, name, kind) t.name = given(name);
#define ANYDELTA_OPTION(kind, name, ...) C_##kind name,
#define ANYDELTA_SET_OPTION(kind, name, ...) set(options.name, name);
#define ANYDELTA_SHIM(name, inplace, final_state, results, ...)                                               \
    ANYDELTA_EXPORT AOTITorchError aoti_torch_cpu_##name(ANYDELTA_ARGUMENTS_##name(ANYDELTA_PARAMETER)        \
                                                             ANYDELTA_OPTIONS(ANYDELTA_OPTION) __VA_ARGS__) { \
        Tensors t{};                                                                                          \
        Options options;                                                                                      \
        ANYDELTA_ARGUMENTS_##name(ANYDELTA_SET) ANYDELTA_OPTIONS(ANYDELTA_SET_OPTION) return shim(            \
            inplace, t, std::move(options), final_state, backend, o, results);                                \
    }
ANYDELTA_SHIM(gated_delta_rule, false, final_state, state_out, int32_t final_state, const char* backend, Handle* o,
              Handle* state_out)
ANYDELTA_SHIM(gated_delta_rule_snapshots, false, final_state, state_out, int32_t final_state, const char* backend,
              Handle* o, Handle* state_out)
ANYDELTA_SHIM(gated_delta_rule_, true, false, nullptr, const char* backend, Handle* o)

// ---- for Python

// Called once by torch_ops.py: the kernels of the Python extension (0: none), and that Python is
// there as the fallback.
ANYDELTA_EXPORT void anydelta_torch_attach(void* run) {
    if (run) runner.store(reinterpret_cast<void (*)(const anydelta::Problem&, int)>(run));
    python_attached.store(true);
}
// For the Python extension's kernels: torch's threads.
ANYDELTA_EXPORT void* anydelta_torch_threads() { return reinterpret_cast<void*>(on_torch_threads); }
