// The Python interface of blocks.h, in anydelta._core. library.py and torch_ops.py check addresses and sizes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <stdexcept>
#include <string>

#include "blocks.h"

namespace nb = nanobind;
using namespace anydelta::ggml;

namespace {

constexpr int MAX_TYPES = 256;
std::array<Kind, MAX_TYPES> kinds;  // by ggml's number of the type; matrices point into it

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class F>
F function(uintptr_t address) {
    return reinterpret_cast<F>(address);
}

const Kind& kind_of(int type) {
    if (type < 0 || type >= MAX_TYPES || !kinds[static_cast<size_t>(type)].vec_dot)
        throw std::invalid_argument("ggml: requires a type that learn_kind has learned");
    return kinds[static_cast<size_t>(type)];
}

// (type, to_float, vec_dot, values and bytes of a block; and of the type that it multiplies with: type, from_float,
// values, bytes of a block)
void learn_kind(int type, uintptr_t to_float, uintptr_t vec_dot, int64_t values, int64_t bytes, int x_type,
                uintptr_t from_float, int64_t x_values, int64_t x_bytes) {
    if (type < 0 || type >= MAX_TYPES) throw std::invalid_argument("ggml: requires the number of a type");
    kinds[static_cast<size_t>(type)] = {function<Kind::ToFloat>(to_float),
                                        function<Kind::VecDot>(vec_dot),
                                        values,
                                        bytes,
                                        x_type,
                                        function<Kind::FromFloat>(from_float),
                                        x_values,
                                        x_bytes};
}

// A matrix [rows, n] that the caller keeps alive.
struct Blocks {
    const Kind& kind;
    const uint8_t* blocks;
    int64_t rows, n;

    void multiply(uintptr_t x, int64_t m, uintptr_t y, int threads) const {
        nb::gil_scoped_release unlocked;
        anydelta::ggml::multiply(at<const float>(x), m, n, {{&kind, blocks, rows, at<float>(y), rows}}, false, threads,
                                 true);
    }

    void multiply_experts(int64_t per_expert, uintptr_t x, uintptr_t ids, int64_t m, int64_t each, uintptr_t y,
                          int threads) const {
        const auto* chosen = at<const int32_t>(ids);
        for (int64_t i = 0; i < m; ++i)
            if (chosen[i] < 0 || chosen[i] >= rows / per_expert)
                throw std::out_of_range("mul_mat_id: requires ids from 0 to " + std::to_string(rows / per_expert - 1) +
                                        "; got " + std::to_string(chosen[i]));
        nb::gil_scoped_release unlocked;
        anydelta::ggml::multiply_experts(kind, blocks, per_expert, at<const float>(x), n, chosen, m, each, at<float>(y),
                                         threads, true);
    }

    void unpack(uintptr_t picked, int64_t from, int64_t count, uintptr_t narrow, uintptr_t out, int threads) const {
        const auto* which = at<const int64_t>(picked);
        for (int64_t i = 0; which && i < count; ++i)
            if (which[i] < 0 || which[i] >= rows)
                throw std::out_of_range("get_rows: requires indices from 0 to " + std::to_string(rows - 1) + "; got " +
                                        std::to_string(which[i]));
        nb::gil_scoped_release unlocked;
        anydelta::ggml::unpack(kind, blocks + static_cast<size_t>(from) * kind.row(n), n, which, count,
                               function<Kind::FromFloat>(narrow), at<void>(out), threads, true);
    }
};

void chain_matrices(Chain& chain, int in, const nb::list& matrices, std::vector<int> outs, bool gated) {
    std::vector<Matrix> list;
    for (nb::handle x : matrices) {
        const auto& w = nb::cast<const Blocks&>(x);
        if (w.n != chain.width(in)) throw std::invalid_argument("Chain: requires a matrix as wide as its input");
        list.push_back({&w.kind, w.blocks, w.rows, nullptr, 0});
    }
    chain.matrices(in, std::move(list), std::move(outs), gated);
}

void chain_run(const Chain& chain, int64_t m, const std::vector<int>& given, const std::vector<uintptr_t>& addresses,
               int threads) {
    std::vector<float*> where;
    for (uintptr_t a : addresses) where.push_back(at<float>(a));
    nb::gil_scoped_release unlocked;
    chain.run(m, given, where, threads, true);
}

}  // namespace

void bind_ggml(nb::module_& m) {
    m.def("learn_kind", &learn_kind);
    nb::class_<Blocks>(m, "Blocks")
        .def("__init__", [](Blocks* self, int type, uintptr_t address, int64_t rows,
                            int64_t n) { new (self) Blocks{kind_of(type), at<const uint8_t>(address), rows, n}; })
        .def("multiply", &Blocks::multiply)
        .def("multiply_experts", &Blocks::multiply_experts)
        .def("unpack", &Blocks::unpack);
    nb::class_<Chain>(m, "Chain")
        .def(nb::init<>())
        .def("buffer", &Chain::buffer)
        .def("width", &Chain::width)
        .def("norm", [](Chain& c, int in, int out, uintptr_t weight, float eps,
                        float offset) { c.norm(in, out, at<const float>(weight), eps, offset); })
        .def("matrices", &chain_matrices)
        .def("add", &Chain::add)
        .def("pick", &Chain::pick)
        .def("run", &chain_run);
}
