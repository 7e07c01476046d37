/// @file registry.h
/// @brief How a kernel family enters the catalogue of `_host`, and how its kernels are run on numpy arrays.
///
/// A family's file registers one entry per compiled instance. The function of an entry takes its arguments from a Run, asks the family's own `plan`
/// for the launch, and runs it; the very same .cuh and plan that the .cu file compiles:
///
///     void run_scale(Run& run) {
///         const std::int64_t n = run.shape("x")[0];
///         ScaleKernel<float> kernel{run.input<float>("x"), run.output<float>("y", {n}), n};
///         run.launch(kernel, plan_scale(n));
///     }
///     const Registration kScale({.key = "scale_f32", .family = "scale", .run = run_scale});
///
/// From Python: `_host.run("scale_f32", {"x": x}).outputs["y"]`.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <map>
#include <string>
#include <vector>

#include "common/simt.h"

namespace modalign::host {

namespace py = pybind11;

/// One call of `_host.run`: the arguments from Python, the emulated global memory, the launches done.
class Run {
public:
    Run(std::string key, py::dict arguments, py::dict offsets, simt::Options options)
        : key_(std::move(key)), arguments_(std::move(arguments)), offsets_(std::move(offsets)), options_(std::move(options)) {}

    /// Key of the entry that was asked for.
    const std::string& key() const { return key_; }

    bool has(const char* name) const { return arguments_.contains(name) && !arguments_[name].is_none(); }
    std::int64_t integer(const char* name) const { return argument(name).cast<std::int64_t>(); }
    std::vector<std::int64_t> integers(const char* name) const { return argument(name).cast<std::vector<std::int64_t>>(); }
    double number(const char* name) const { return argument(name).cast<double>(); }
    bool flag(const char* name) const { return argument(name).cast<bool>(); }
    std::string text(const char* name) const { return argument(name).cast<std::string>(); }
    std::vector<std::int64_t> shape(const char* name) const {
        const auto array = argument(name).cast<py::array>();
        return {array.shape(), array.shape() + array.ndim()};
    }

    /// A copy of a C-contiguous numpy array in device memory; nullptr when the argument is missing or None.
    template <class T>
    const T* input(const char* name) {
        if (!has(name)) return nullptr;
        const auto array = argument(name).cast<py::array>();
        demand(array.dtype().is(dtype<T>()), name, "must be " + describe(dtype<T>()) + ", got " + describe(array.dtype()));
        demand((array.flags() & py::array::c_style) != 0, name, "must be C-contiguous, got strides for another order");
        simt::Allocation& copy = allocate(name, static_cast<std::size_t>(array.nbytes()), sizeof(T));
        std::memcpy(copy.data, array.data(), copy.bytes);
        simt::DeviceMemory::written_by_host(copy);
        return reinterpret_cast<const T*>(copy.data);
    }

    /// An uninitialised array that Python gets back under this name. Every element must have been written when the run ends.
    template <class T>
    T* output(const char* name, std::vector<std::int64_t> shape) {
        std::int64_t count = 1;
        for (const std::int64_t n : shape) count *= n;
        simt::Allocation& array = allocate(name, static_cast<std::size_t>(count) * sizeof(T), sizeof(T));
        outputs_.push_back({&array, std::move(shape), dtype<T>()});
        return reinterpret_cast<T*>(array.data);
    }

    /// Uninitialised device memory that stays inside the run, between two launches.
    template <class T>
    T* workspace(const char* name, std::int64_t count) {
        return reinterpret_cast<T*>(allocate(name, static_cast<std::size_t>(count) * sizeof(T), sizeof(T)).data);
    }

    template <class Kernel>
    void launch(const Kernel& kernel, const simt::LaunchPlan& plan) {
        announce(plan);
        finished(simt::emulator.run(kernel, plan, options_));
    }

    // --------------------------------------------------------------------------------------------------- used by module.cpp
    py::dict outputs() const;   ///< reports elements that were never written
    const std::vector<simt::LaunchRecord>& launches() const { return launches_; }
    bool mutation_reached() const { return mutation_reached_; }

private:
    struct Output {
        simt::Allocation* array;
        std::vector<std::int64_t> shape;
        py::dtype dtype;
    };

    /// The numpy type in which Python passes elements of a kernel's type; bf16, which numpy lacks, travels as its bits.
    template <class T>
    static py::dtype dtype() {
        if constexpr (std::is_same_v<T, simt::f16>) return py::dtype("float16");
        else if constexpr (std::is_same_v<T, simt::bf16>) return py::dtype("uint16");
        else return py::dtype::of<T>();
    }
    static std::string describe(const py::dtype& dtype) { return py::str(dtype); }
    void demand(bool holds, const char* name, const std::string& what) const;
    py::object argument(const char* name) const;
    simt::Allocation& allocate(const char* name, std::size_t bytes, int element_bytes);
    void announce(const simt::LaunchPlan& plan);
    void finished(simt::LaunchRecord record);

    std::string key_;
    py::dict arguments_;
    py::dict offsets_;
    simt::Options options_;
    simt::DeviceMemory memory_;
    std::vector<Output> outputs_;
    std::vector<simt::LaunchRecord> launches_;
    bool mutation_reached_ = false;
};

struct KernelEntry {
    std::string key;                          ///< the plan's key of the launch that this entry is about
    std::string family;
    std::function<void(Run&)> run;            ///< must launch a plan with this key (other kernels of the family may go before or after)
    int threads = 0;
    std::map<std::string, std::string> tags;  ///< "dtype", "tile", "modalities": what tells this instance from its sisters
};

/// All entries by key; filled by Registration objects while the module loads.
std::map<std::string, KernelEntry>& catalogue();

/// Puts an entry into the catalogue; a static object of the family's file.
struct Registration {
    explicit Registration(KernelEntry entry);
};

/// Further functions of `_host`, added by the file that defines them; a static object there.
struct Bindings {
    explicit Bindings(void (*add)(py::module_&));
};

}  // namespace modalign::host
