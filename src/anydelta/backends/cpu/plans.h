// The cache of plans, by the key of a call's arrays and by its other arguments.
#pragma once
#include <Python.h>
#include <nanobind/nanobind.h>

#include <unordered_map>
#include <utility>
#include <vector>

#include "key.h"

namespace anydelta {

class Plans {
  public:
    // The plan, or null.
    PyObject* find(const Key& key, PyObject* rest) const {
        const auto bucket = plans_.find(key.hash());
        if (bucket == plans_.end()) return nullptr;
        for (const Entry& e : bucket->second)
            if (same(e.rest.ptr(), rest) && e.key == key) return e.plan.ptr();
        return nullptr;
    }
    void keep(const Key& key, nanobind::tuple rest, nanobind::object plan) {
        if (count_ >= MOST) forget();
        plans_[key.hash()].push_back({key, std::move(rest), std::move(plan)});
        ++count_;
    }
    // Destroying a plan may run its own code.
    void forget() {
        count_ = 0;
        auto gone = std::exchange(plans_, {});
    }
    size_t count() const { return count_; }

  private:
    static constexpr size_t MOST = 4096;
    struct Entry {
        Key key;
        nanobind::tuple rest;
        nanobind::object plan;
    };
    std::unordered_map<uint64_t, std::vector<Entry>> plans_;
    size_t count_ = 0;

    // Whether two tuples hold the same texts and numbers of the same types; runs none of their code. Any other object
    // equals only itself: a check must say what is wrong with it.
    static bool same(PyObject* a, PyObject* b) {
        const Py_ssize_t n = PyTuple_GET_SIZE(a);
        if (PyTuple_GET_SIZE(b) != n) return false;
        for (Py_ssize_t i = 0; i < n; ++i) {
            PyObject *x = PyTuple_GET_ITEM(a, i), *y = PyTuple_GET_ITEM(b, i);
            if (x == y) continue;
            if (Py_TYPE(x) != Py_TYPE(y)) return false;
            if (PyFloat_Check(x)) {
                if (PyFloat_AS_DOUBLE(x) != PyFloat_AS_DOUBLE(y)) return false;
            } else if (PyUnicode_Check(x)) {
                if (PyUnicode_Compare(x, y) != 0) return false;
            } else if (PyLong_Check(x)) {
                PyObject* equal = PyLong_Type.tp_richcompare(x, y, Py_EQ);
                Py_XDECREF(equal);
                if (equal != Py_True) return false;
            } else {
                return false;
            }
        }
        return true;
    }
};

}  // namespace anydelta
