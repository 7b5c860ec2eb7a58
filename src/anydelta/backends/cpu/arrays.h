// Reading addresses and geometry of Python arrays without Python: torch tensors through DLPack's exchange API (torch 2.10
// and later), NumPy's and MLX's arrays through the buffer protocol. What neither can read is left to the slower path in Python.
#pragma once
#include <Python.h>

#include <cstdint>
#include <string>
#include <vector>

#include "tensors.h"

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
    // What the reader has to know of torch, from torch_op.py.
    struct Torch {
        std::vector<PyObject*> types;  // torch.Tensor first; the types whose objects are tensors and nothing else
        uint64_t plain;  // the dispatch keys that plain memory may have
        uint64_t tracked;  // those that inference tensors lack
        // Functions that say whether somebody looks on (true: yes), and the names of the module that counts levels of
        // dual numbers.
        std::vector<PyObject*> questions;
        PyObject *forward_ad, *grad_enabled, *inference_mode;
    };

    // Read tensors from now on. False: torch has no exchange API, or keeps its words where they are not found.
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
        return true;
    }
    bool learned() const { return api_; }

    // Whether nobody looks on: no tracer, mode, functorch transform or level of dual numbers.
    bool quiet() const {
        for (PyObject* question : torch_.questions)
            if (ask(question)) return false;
        static PyObject* const name = PyUnicode_InternFromString("_current_level");
        PyObject* level = PyDict_GetItemWithError(torch_.forward_ad, name);
        return level && PyLong_Check(level) && PyLong_AsLong(level) < 0;
    }

    // Whether x is a torch tensor, of a subclass or not.
    bool is_tensor(PyObject* x) const {
        return api_ && (exact(x) || PyType_IsSubtype(Py_TYPE(x), reinterpret_cast<PyTypeObject*>(torch_.types[0])));
    }
    // Whether a tensor is nothing but memory with a dtype, a shape and strides.
    bool plain(PyObject* x) const { return exact(x) && !(words_.keys(x) & ~torch_.plain); }

    // What the arrays of a call have in common beside their geometry.
    struct Seen {
        bool tensors = false, grad = false, inference = false;
    };

    // Append a description of the array to `key`: dtype, device, shape, strides, and whatever else a check looks at. False:
    // not readable, or of a kind that must be looked at in full on every call (NumPy: strided innermost dimension,
    // misaligned memory; torch: not plain, or somebody looks on).
    bool describe(PyObject* x, std::string& key, Seen& seen) const {
        if (x == Py_None) {
            key.push_back('-');
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
            const PyTypeObject* type = Py_TYPE(x);  // MLX's arrays look like NumPy's from here
            append(key, &type, sizeof type);
            key += b.format ? b.format : "B";
            key.push_back(b.readonly ? 'r' : 'w');
            append(key, b.shape, sizeof(Py_ssize_t) * static_cast<size_t>(b.ndim));
            append(key, b.strides, sizeof(Py_ssize_t) * static_cast<size_t>(b.ndim));
            key.push_back(static_cast<char>(b.ndim));
        }
        PyBuffer_Release(&b);
        return aligned && plain;
    }

    // Whether a plan may be remembered for what was seen, and what else its key must say.
    bool settle(const Seen& seen, std::string& key) const {
        if (seen.grad && ask(torch_.grad_enabled)) return false;
        if (seen.inference) key.push_back(ask(torch_.inference_mode) ? 'I' : 'i');
        return true;
    }

    // Both for a tensor or None, in one look, where nobody looks on; false for anything else too.
    bool describe_tensor(PyObject* x, std::string& key, uintptr_t& address, Seen& seen) const {
        address = 0;
        if (x == Py_None) {
            key.push_back('-');
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
    // An attribute that torch keeps as a C function: asking it so takes 5 ns, by its name 30.
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

    const dlpack::Api* api_ = nullptr;
    Torch torch_{};
    TensorWords words_;
    Attribute requires_grad_, is_leaf_;

    // Any doubt is a yes.
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
    bool read(PyObject* x, std::string& key, uintptr_t& address, Seen& seen) const {
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
        const int32_t flags = grad << 2 | (grad && is_leaf_.of(x)) << 1 | inference;
        const int32_t head[4] = {t.device_type, t.device_id, t.ndim, t.code << 16 | t.bits << 8 | flags};
        append(key, head, sizeof head);
        append(key, t.shape, sizeof(int64_t) * static_cast<size_t>(t.ndim));
        key.push_back(contiguous ? 'c' : 's');  // a key is hashed on every call: the shorter the better
        if (!contiguous) append(key, t.strides, sizeof(int64_t) * static_cast<size_t>(t.ndim));
        return true;
    }
    static void append(std::string& key, const void* data, size_t bytes) {
        key.append(static_cast<const char*>(data), bytes);
    }
};

}  // namespace anydelta
