// Functions of libtorch that are neither in its stable ABI nor in headers that serve every release. They are looked
// up by name. Code that does not find one takes a slower path.
#pragma once
#include <cstdint>
#include <memory>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace anydelta {

// A function of the library that contains `inside`, or of one that it was linked with; null if there is none.
template <class F>
F torch_symbol(const void* inside, const char* name) {
#if defined(_WIN32)
    (void)inside, (void)name;
    return nullptr;
#else
    Dl_info here;  // through that library: Python may have loaded it privately
    if (!inside || !dladdr(inside, &here)) return nullptr;
    void* const library = dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<F>(dlsym(library, name)) : nullptr;
#endif
}

namespace torch_names {
// void bump_version(const at::Tensor&) of torch/csrc/autograd/variable.h
constexpr const char* BUMP_VERSION = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE";
// std::shared_ptr<ForwardADLevel> ForwardADLevel::try_get_by_idx(uint64_t) of forward_grad.h
#if defined(__APPLE__)
constexpr const char* DUAL_LEVEL = "_ZN5torch8autograd14ForwardADLevel14try_get_by_idxEy";
#else
constexpr const char* DUAL_LEVEL = "_ZN5torch8autograd14ForwardADLevel14try_get_by_idxEm";
#endif
// int at::get_num_threads()
constexpr const char* THREADS = "_ZN2at15get_num_threadsEv";
// const std::shared_ptr<TracingState>& getTracingState() of torch/csrc/jit/frontend/tracer.h
constexpr const char* TRACING_STATE = "_ZN5torch3jit6tracer15getTracingStateEv";
// bool tls_is_dispatch_key_included(DispatchKey) of c10/core/impl/LocalDispatchKeySet.h
constexpr const char* KEY_INCLUDED = "_ZN3c104impl28tls_is_dispatch_key_includedENS_11DispatchKeyE";
// int64_t stack_len() of both kinds of mode
constexpr const char* DISPATCH_MODES = "_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv";
constexpr const char* FUNCTION_MODES = "_ZN2at4impl22PythonTorchFunctionTLS9stack_lenEv";
}  // namespace torch_names

}  // namespace anydelta
