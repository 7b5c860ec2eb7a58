// anydelta._sycl: SYCL devices, memory and queues for Python, and the run-time compiler (libsycl-jit).
// Built if CMake finds the headers of intel-sycl-rt. Kernels are compiled from source when they are first needed.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <memory>
#include <stdexcept>
#include <sycl/sycl.hpp>

#include "params.hpp"

namespace nb = nanobind;
namespace ext = sycl::ext::oneapi::experimental;
using anydelta::Params;

namespace {

std::vector<sycl::device> devices() {
    std::vector<sycl::device> out;
    for (const auto& platform : sycl::platform::get_platforms())
        for (const auto& device : platform.get_devices()) out.push_back(device);
    return out;
}

nb::dict describe(sycl::device d) {
    namespace info = sycl::info::device;
    nb::dict out;
    out["name"] = d.get_info<info::name>();
    out["platform"] = d.get_platform().get_info<sycl::info::platform::name>();
    out["driver"] = d.get_info<info::driver_version>();
    out["cpu"] = d.is_cpu();
    out["gpu"] = d.is_gpu();
    out["compiles"] = d.ext_oneapi_can_build(ext::source_language::sycl);
    out["units"] = d.get_info<info::max_compute_units>();
    out["group"] = d.get_info<info::max_work_group_size>();
    out["memory"] = d.get_info<info::global_mem_size>();
    out["allocation"] = d.get_info<info::max_mem_alloc_size>();
    out["vector"] = d.get_info<info::native_vector_width_float>();
    out["unified"] = d.get_info<info::host_unified_memory>();
    out["system_usm"] = d.is_cpu() || d.has(sycl::aspect::usm_system_allocations);
    std::vector<std::size_t> sizes = d.get_info<info::sub_group_sizes>();
    out["subgroups"] = sizes;
    return out;
}

// An in-order queue on one device, and the kernels that were compiled for it.
class Queue {
  public:
    explicit Queue(std::size_t index)
        : device_(devices().at(index)), queue_(device_, sycl::property::queue::in_order()) {}

    // Compile kernels, given by their C++ names, from `source`, which may include `headers` (name, text).
    void build(const std::string& source, const std::vector<std::pair<std::string, std::string>>& headers,
               const std::vector<std::string>& names, const std::vector<std::string>& options) {
        std::string log;
        nb::gil_scoped_release release;
        ext::include_files files;
        for (const auto& [name, text] : headers) files.add(name, text);
        try {
            auto bundle = ext::create_kernel_bundle_from_source(queue_.get_context(), ext::source_language::sycl,
                                                                source, ext::properties{files});
            auto built = ext::build(
                bundle, {device_},
                ext::properties{ext::build_options{options}, ext::save_log{&log}, ext::registered_names{names}});
            for (const auto& name : names) kernels_.insert_or_assign(name, built.ext_oneapi_get_kernel(name));
        } catch (const sycl::exception& error) {
            throw std::runtime_error(std::string(error.what()) + "\n" + log);
        }
    }

    void run(const std::string& name, nb::bytes params, std::size_t groups, std::size_t size) {
        if (params.size() != sizeof(Params)) throw std::invalid_argument("run: params has a wrong size");
        Params p;
        std::memcpy(&p, params.c_str(), sizeof p);
        auto& kernel = kernels_.at(name);
        queue_.submit([&](sycl::handler& h) {
            h.set_arg(0, p);
            h.parallel_for(sycl::nd_range<1>(groups * size, size), kernel);
        });
    }

    void wait() {
        nb::gil_scoped_release release;
        queue_.wait_and_throw();
    }

    // USM: "device" memory, or "host" memory that the device reaches. 0 if there is none left.
    std::uintptr_t allocate(std::size_t bytes, bool host) {
        return reinterpret_cast<std::uintptr_t>(host ? sycl::aligned_alloc_host(64, bytes, queue_)
                                                     : sycl::aligned_alloc_device(64, bytes, queue_));
    }
    void release(std::uintptr_t address) {
        queue_.wait();
        sycl::free(reinterpret_cast<void*>(address), queue_);
    }
    void copy(std::uintptr_t to, std::uintptr_t from, std::size_t bytes) {
        queue_.memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    }
    void fill(std::uintptr_t to, std::size_t bytes) { queue_.memset(reinterpret_cast<void*>(to), 0, bytes); }
    nb::dict describe() const { return ::describe(device_); }

    // The queue in the form that other libraries take (dpctl's convention for "syclobj").
    nb::capsule capsule() const {
        return nb::capsule(new sycl::queue(queue_), "SyclQueueRef",
                           [](void* queue) noexcept { delete static_cast<sycl::queue*>(queue); });
    }

  private:
    sycl::device device_;
    sycl::queue queue_;
    std::map<std::string, sycl::kernel> kernels_;
};

}  // namespace

NB_MODULE(_sycl, m) {
    m.def("devices", [] {
        nb::list out;
        for (const auto& d : devices()) out.append(describe(d));
        return out;
    });
    nb::class_<Queue>(m, "Queue")
        .def(nb::init<std::size_t>())
        .def("build", &Queue::build)
        .def("run", &Queue::run)
        .def("wait", &Queue::wait)
        .def("allocate", &Queue::allocate)
        .def("release", &Queue::release)
        .def("copy", &Queue::copy)
        .def("fill", &Queue::fill)
        .def("capsule", &Queue::capsule)
        .def("describe", &Queue::describe);
}
