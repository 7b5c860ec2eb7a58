// Reading addresses and geometry of Python arrays without Python: torch tensors through DLPack's exchange API (torch 2.10
// and later), NumPy's and MLX's arrays through the buffer protocol. What neither can read is left to the slower path in Python.
#pragma once
#include <Python.h>

#include <cstdint>
#include <string>

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
    // Remember the exchange API of a tensor type. False: the type has none.
    bool learn(PyObject* type) {
        PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
        if (!capsule) {
            PyErr_Clear();
            return false;
        }
        const auto* api = static_cast<const dlpack::Api*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
        Py_DECREF(capsule);
        if (!api) PyErr_Clear();
        if (!api || api->major != 1 || !api->tensor_from_py_object) return false;
        api_ = api;
        tensor_ = type;
        return true;
    }

    // Append a description of the array to `key`: dtype, device, shape, strides. False: not readable, or of a kind
    // that must be looked at in full on every call (strided innermost dimension, misaligned memory).
    bool describe(PyObject* x, std::string& key) const {
        if (x == Py_None) {
            key.push_back('-');
            return true;
        }
        if (is_tensor(x)) {
            dlpack::Tensor t;
            uintptr_t address;
            return read(x, t, key, address);
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

    // Both for a tensor or None, in one look; false for anything else too.
    bool describe_tensor(PyObject* x, std::string& key, uintptr_t& address) const {
        address = 0;
        if (x == Py_None) {
            key.push_back('-');
            return true;
        }
        dlpack::Tensor t;
        return is_tensor(x) && read(x, t, key, address);
    }

    // The address of an array's first element, 0 for None. False with a Python error set: not readable.
    bool address(PyObject* x, uintptr_t& out) const {
        out = 0;
        if (x == Py_None) return true;
        if (is_tensor(x)) {
            dlpack::Tensor t;
            if (api_->tensor_from_py_object(x, &t) != 0) return false;
            out = reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
            return true;
        }
        Py_buffer b;
        if (PyObject_GetBuffer(x, &b, PyBUF_RECORDS_RO) != 0) return false;
        out = reinterpret_cast<uintptr_t>(b.buf);
        PyBuffer_Release(&b);
        return true;
    }

  private:
    const dlpack::Api* api_ = nullptr;
    PyObject* tensor_ = nullptr;

    bool is_tensor(PyObject* x) const {
        if (!api_) return false;
        PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
        return type == tensor_ || PyType_IsSubtype(Py_TYPE(x), reinterpret_cast<PyTypeObject*>(tensor_));
    }
    bool read(PyObject* x, dlpack::Tensor& t, std::string& key, uintptr_t& address) const {
        if (api_->tensor_from_py_object(x, &t) != 0) {
            PyErr_Clear();
            return false;
        }
        if (t.ndim > 0 && t.strides && t.strides[t.ndim - 1] != 1 && t.shape[t.ndim - 1] > 1) return false;
        const int32_t head[4] = {t.device_type, t.device_id, t.ndim, t.code << 16 | t.bits << 8};
        append(key, head, sizeof head);
        append(key, t.shape, sizeof(int64_t) * static_cast<size_t>(t.ndim));
        if (t.strides) append(key, t.strides, sizeof(int64_t) * static_cast<size_t>(t.ndim));
        address = reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
        return true;
    }
    static void append(std::string& key, const void* data, size_t bytes) {
        key.append(static_cast<const char*>(data), bytes);
    }
};

}  // namespace anydelta
