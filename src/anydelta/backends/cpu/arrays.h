// Reads addresses and geometry of Python arrays without Python: torch tensors through DLPack's exchange API (torch
// 2.10 and later), NumPy's and MLX's arrays through the buffer protocol. Other arrays take the slower path in Python.
#pragma once
#include <Python.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "key.h"
#include "tensors.h"
#include "torch_symbols.h"

namespace anydelta {

// The start of DLPack's ABI (version 1), declared here because only these fields are used.
namespace dlpack {
struct Tensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t* shape;
    int64_t* strides;  // in elements; may be null for contiguous
    uint64_t byte_offset;
};
struct Api {
    uint32_t major, minor;
    void* previous;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object;
    void* managed_tensor_to_py_object;
    int (*tensor_from_py_object)(void* object, Tensor* out);
    void* current_work_stream;
};
}  // namespace dlpack

class ArrayReader {
  public:
    // What the reader must know about torch, from torch_ops.py.
    struct Torch {
        std::vector<PyObject*> types;  // torch.Tensor first; the types of plain tensors
        uint64_t plain;  // the dispatch keys that plain memory may have
        uint64_t tracked;  // the keys that inference tensors lack
        // Functions that return true if the call is watched: by a tracer, a transform, a dispatch mode or a function
        // mode. The names of the module that counts levels of dual numbers.
        std::vector<PyObject*> questions;
        PyObject* forward_ad;
        PyObject *grad_enabled, *inference_mode, *increment_version, *num_threads;
        std::vector<uint16_t> transform_keys;  // the dispatch keys that are included while a transform is active
    };

    // Read tensors from now on. False: torch has no exchange API, or its words (tensors.h) are not found.
    bool learn(const Torch& torch, const std::vector<TensorWords::Known>& known) {
        PyObject* capsule = PyObject_GetAttrString(torch.types[0], "__dlpack_c_exchange_api__");
        if (!capsule) {
            PyErr_Clear();
            return false;
        }
        const auto* api = static_cast<const dlpack::Api*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
        Py_DECREF(capsule);
        if (!api) PyErr_Clear();
        if (!api || api->major != 1 || !api->tensor_from_py_object) return false;
        if (!requires_grad_.find(torch.types[0], "requires_grad") || !is_leaf_.find(torch.types[0], "is_leaf"))
            return false;
        if (sizeof(void*) != 8 || !words_.learn(known)) return false;
        torch_ = torch;
        api_ = api;
        symbols_.look_up(reinterpret_cast<const void*>(api->tensor_from_py_object));
        return true;
    }
    bool learned() const { return api_; }

    // Whether the call is not watched: no tracer, mode, functorch transform or level of dual numbers.
    bool quiet() const {
        enum { TRACER, TRANSFORM, DISPATCH_MODE, FUNCTION_MODE };
        const Symbols& here = symbols_;
        if (here.tracing_state ? here.tracing_state() != nullptr : ask(torch_.questions[TRACER])) return false;
        if (here.key_included) {
            for (const uint16_t key : torch_.transform_keys)
                if (here.key_included(key)) return false;
        } else if (ask(torch_.questions[TRANSFORM])) {
            return false;
        }
        if (here.dispatch_modes ? here.dispatch_modes() != 0 : ask(torch_.questions[DISPATCH_MODE])) return false;
        if (here.function_modes ? here.function_modes() != 0 : ask(torch_.questions[FUNCTION_MODE])) return false;
        static PyObject* const name = PyUnicode_InternFromString("_current_level");
        PyObject* level = PyDict_GetItemWithError(torch_.forward_ad, name);
        return level && PyLong_Check(level) && PyLong_AsLong(level) < 0;
    }

    // torch's number of threads. -1 with a Python error set: not known.
    int threads() const {
        if (symbols_.threads) return symbols_.threads();
        PyObject* found = PyObject_CallNoArgs(torch_.num_threads);
        const long n = found ? PyLong_AsLong(found) : -1;
        Py_XDECREF(found);
        return static_cast<int>(n);
    }

    // Raise a tensor's version count, as torch's operators do for what they write; nothing for other arrays. False
    // with a Python error set.
    bool count_write(PyObject* x) const {
        if (x == Py_None || !is_tensor(x)) return true;
        if (symbols_.bump_version) {
            const uintptr_t tensor = words_.impl(x);  // an at::Tensor is only this pointer
            symbols_.bump_version(&tensor);
            return true;
        }
        PyObject* one = PyTuple_Pack(1, x);
        PyObject* done = one ? PyObject_CallOneArg(torch_.increment_version, one) : nullptr;
        Py_XDECREF(one);
        Py_XDECREF(done);
        return done != nullptr;
    }

    // Whether only one object holds a tensor, in Python or in C++, and only this tensor its memory.
    bool alone(PyObject* x) const { return api_ && exact(x) && Py_REFCNT(x) == 1 && words_.alone(x); }

    // Whether x is a torch tensor, of a subclass or not.
    bool is_tensor(PyObject* x) const {
        return api_ && (exact(x) || PyType_IsSubtype(Py_TYPE(x), reinterpret_cast<PyTypeObject*>(torch_.types[0])));
    }
    // Whether a tensor is plain memory with a dtype, a shape and strides.
    bool plain(PyObject* x) const { return exact(x) && !(words_.keys(x) & ~torch_.plain); }

    // What the arrays of a call have in common, apart from their geometry.
    struct Seen {
        bool tensors = false, grad = false, inference = false;
    };

    // Append a description of the array to `key`: dtype, device, shape, strides, and everything else that a check
    // reads. False: not readable, or an array that must be checked in full on every call. NumPy: strided innermost
    // dimension, misaligned memory. torch: not plain, or the call is watched.
    bool describe(PyObject* x, Key& key, Seen& seen) const {
        if (x == Py_None) {
            key.push(NONE);
            return true;
        }
        if (is_tensor(x)) {
            uintptr_t address;
            if (!seen.tensors && !quiet()) return false;
            return read(x, key, address, seen);
        }
        Py_buffer b;
        if (PyObject_GetBuffer(x, &b, PyBUF_RECORDS_RO) != 0) {
            PyErr_Clear();
            return false;
        }
        const bool aligned = reinterpret_cast<uintptr_t>(b.buf) % static_cast<uintptr_t>(b.itemsize) == 0;
        const bool plain = b.ndim == 0 || b.shape[b.ndim - 1] <= 1 || b.strides[b.ndim - 1] == b.itemsize;
        if (aligned && plain) {
            const char* format = b.format ? b.format : "B";
            const auto dims = static_cast<size_t>(b.ndim);
            key.push(BUFFER | static_cast<uint64_t>(b.readonly) << 8 | dims << 16);
            key.push(reinterpret_cast<uintptr_t>(Py_TYPE(x)));  // here MLX's arrays look like NumPy's
            key.text(format, std::strlen(format));
            key.push(b.shape, sizeof(Py_ssize_t) * dims);
            key.push(b.strides, sizeof(Py_ssize_t) * dims);
        }
        PyBuffer_Release(&b);
        return aligned && plain;
    }

    // Whether a plan for these arrays may be cached, and what else its key must contain.
    bool settle(const Seen& seen, Key& key) const {
        if (seen.grad && ask(torch_.grad_enabled)) return false;
        if (seen.inference) key.push(ask(torch_.inference_mode));
        return true;
    }

    // Describe a tensor or None, with its address, if the call is not watched; false for any other object.
    bool describe_tensor(PyObject* x, Key& key, uintptr_t& address, Seen& seen) const {
        address = 0;
        if (x == Py_None) {
            key.push(NONE);
            return true;
        }
        return is_tensor(x) && read(x, key, address, seen);
    }

    // The address of an array's first element, 0 for None. False with a Python error set: not readable.
    bool address(PyObject* x, uintptr_t& out) const {
        out = 0;
        if (x == Py_None) return true;
        if (is_tensor(x)) {
            dlpack::Tensor t;
            if (api_->tensor_from_py_object(x, &t) != 0) return false;
            out = reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
            if (out || !elements(t)) return true;
            PyErr_SetString(PyExc_TypeError, "anydelta: requires tensors with memory of their own; got one without");
            return false;
        }
        Py_buffer b;
        if (PyObject_GetBuffer(x, &b, PyBUF_RECORDS_RO) != 0) return false;
        out = reinterpret_cast<uintptr_t>(b.buf);
        PyBuffer_Release(&b);
        return true;
    }

  private:
    // An attribute that torch keeps as a C function: read directly it takes 5 ns, by its name 30.
    struct Attribute {
        PyGetSetDef* def = nullptr;
        bool find(PyObject* type, const char* name) {
            PyObject* found = PyObject_GetAttrString(type, name);
            if (!found) PyErr_Clear();
            const bool known = found && Py_TYPE(found) == &PyGetSetDescr_Type;
            if (known) def = reinterpret_cast<PyGetSetDescrObject*>(found)->d_getset;
            Py_XDECREF(found);
            return known;
        }
        bool of(PyObject* x) const { return truth(def->get(x, def->closure)); }
    };

    // torch's own functions, if they are found: the same answers in 2 ns instead of 60.
    struct Symbols {
        const std::shared_ptr<void>& (*tracing_state)() = nullptr;
        bool (*key_included)(uint16_t) = nullptr;
        int64_t (*dispatch_modes)() = nullptr;
        int64_t (*function_modes)() = nullptr;
        int (*threads)() = nullptr;
        void (*bump_version)(const void* tensor) = nullptr;
        void look_up(const void* torch) {
            const auto find = [torch](auto& f, const char* name) {
                f = torch_symbol<std::decay_t<decltype(f)>>(torch, name);
            };
            find(tracing_state, torch_names::TRACING_STATE);
            find(key_included, torch_names::KEY_INCLUDED);
            find(dispatch_modes, torch_names::DISPATCH_MODES);
            find(function_modes, torch_names::FUNCTION_MODES);
            find(threads, torch_names::THREADS);
            find(bump_version, torch_names::BUMP_VERSION);
        }
    };
    // The first word of an array's part of a key.
    enum Kind : uint64_t { NONE, TENSOR, BUFFER };

    const dlpack::Api* api_ = nullptr;
    Torch torch_{};
    Symbols symbols_;
    TensorWords words_;
    Attribute requires_grad_, is_leaf_;

    // True in case of doubt.
    static bool truth(PyObject* answer) {
        const int yes = answer ? PyObject_IsTrue(answer) : -1;
        Py_XDECREF(answer);
        if (yes < 0) PyErr_Clear();
        return yes != 0;
    }
    static bool ask(PyObject* question) { return truth(PyObject_CallNoArgs(question)); }

    bool exact(PyObject* x) const {
        const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
        for (const PyObject* known : torch_.types)
            if (type == known) return true;
        return false;
    }
    static bool elements(const dlpack::Tensor& t) {
        for (int32_t i = 0; i < t.ndim; ++i)
            if (t.shape[i] == 0) return false;
        return true;
    }
    bool read(PyObject* x, Key& key, uintptr_t& address, Seen& seen) const {
        dlpack::Tensor t;
        if (!plain(x)) return false;
        if (api_->tensor_from_py_object(x, &t) != 0) {
            PyErr_Clear();
            return false;
        }
        address = reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
        uint64_t last = 0;  // element
        int64_t dense = 1;  // the stride of a contiguous tensor
        bool contiguous = true, empty = false;
        for (int32_t i = t.ndim; t.strides && i-- > 0; dense *= t.shape[i]) {
            last += static_cast<uint64_t>(t.shape[i] - 1) * static_cast<uint64_t>(t.strides[i]);
            contiguous = contiguous && t.strides[i] == dense;
            empty = empty || t.shape[i] == 0;
        }
        if (!t.strides && elements(t)) return false;
        if (!empty && !words_.holds(x, address, (last + 1) * (t.bits / 8))) return false;
        seen.tensors = true;
        const bool grad = words_.autograd(x) && requires_grad_.of(x), inference = !(words_.keys(x) & torch_.tracked);
        seen.grad |= grad;
        seen.inference |= inference;
        const auto part = [](auto value, int bits, int at) {
            return (static_cast<uint64_t>(value) & ((uint64_t{1} << bits) - 1)) << at;
        };
        key.push(TENSOR | part(contiguous, 1, 2) | part(grad, 1, 3) | part(grad && is_leaf_.of(x), 1, 4) |
                 part(inference, 1, 5) | part(t.code, 8, 6) | part(t.bits, 8, 14) | part(t.device_type, 10, 22) |
                 part(t.device_id, 16, 32) | part(t.ndim, 16, 48));
        const size_t bytes = sizeof(int64_t) * static_cast<size_t>(t.ndim);
        key.push(t.shape, bytes);
        if (!contiguous) key.push(t.strides, bytes);  // a key is hashed on every call, so keep it short
        return true;
    }
};

}  // namespace anydelta
