/// @file module.cpp
/// @brief `_host`: what was built, the kernel catalogue, and the kernels run by the emulator on numpy arrays.
#include <pybind11/stl.h>

#include "host/fiber.h"
#include "host/registry.h"

namespace modalign::host {

using simt::LaunchPlan;
using simt::LaunchRecord;
using simt::Mutation;
using simt::Options;
using simt::Order;
using simt::Report;

// ============================================================================================================== catalogue
std::map<std::string, KernelEntry>& catalogue() {
    static std::map<std::string, KernelEntry> entries;
    return entries;
}

Registration::Registration(KernelEntry entry) {
    const std::string key = entry.key;
    if (!catalogue().emplace(key, std::move(entry)).second) throw std::logic_error("kernel key registered twice: " + key);
}

namespace {
std::vector<void (*)(py::module_&)>& bindings() {
    static std::vector<void (*)(py::module_&)> all;
    return all;
}
}  // namespace

Bindings::Bindings(void (*add)(py::module_&)) { bindings().push_back(add); }

// ==================================================================================================================== Run
void Run::demand(bool holds, const char* name, const std::string& what) const {
    if (!holds) throw py::type_error(key_ + ": " + name + " " + what);
}

py::object Run::argument(const char* name) const {
    if (!arguments_.contains(name)) throw py::key_error(key_ + ": argument " + name + " is missing");
    return arguments_[name];
}

simt::Allocation& Run::allocate(const char* name, std::size_t bytes, int element_bytes) {
    const std::size_t offset = offsets_.contains(name) ? offsets_[name].cast<std::size_t>() * static_cast<std::size_t>(element_bytes) : 0;
    return memory_.allocate(name, bytes, element_bytes, offset);
}

void Run::announce(const LaunchPlan& plan) {
    if (catalogue().count(plan.key) == 0) throw std::logic_error(key_ + ": launches " + plan.key + ", which is not in the catalogue");
}

namespace {
/// Launches with at least one block, by key, since the module was loaded: what a test suite has exercised.
std::map<std::string, std::uint64_t>& launch_counts() {
    static std::map<std::string, std::uint64_t> counts;
    return counts;
}

std::uint64_t block_count(const LaunchPlan& plan) { return std::uint64_t{plan.grid[0]} * plan.grid[1] * plan.grid[2]; }
}  // namespace

void Run::finished(LaunchRecord record) {
    if (block_count(record.plan) > 0) ++launch_counts()[record.plan.key];
    if (record.plan.key == key_ && record.mutations.count(options_.mutation) != 0) mutation_reached_ = true;
    launches_.push_back(std::move(record));
}

py::dict Run::outputs() const {
    py::dict result;
    for (const Output& output : outputs_) {
        const simt::Allocation& array = *output.array;
        for (std::size_t g = 0; g < array.shadow.size(); ++g)
            if (array.shadow[g].state == simt::Shadow::uninitialised) {
                const std::string address = array.address(g << array.granule_shift);
                throw Report("unwritten_output", key_, {0, 0, 0}, 0, address,
                             "the run is over and " + address + " has not been written by any block");
            }
        py::array copy(output.dtype, output.shape);
        std::memcpy(copy.mutable_data(), array.data, array.bytes);
        result[py::str(array.name)] = std::move(copy);
    }
    return result;
}

namespace {

// ================================================================================================================= Python
struct RunResult {
    py::dict outputs;
    py::list launches;
    bool mutation_reached;
};

py::dict describe(const LaunchRecord& record) {
    const LaunchPlan& plan = record.plan;
    py::dict launch;
    launch["key"] = plan.key;
    launch["grid"] = py::make_tuple(plan.grid[0], plan.grid[1], plan.grid[2]);
    launch["threads"] = plan.threads;
    launch["shared_bytes"] = plan.shared_bytes;
    launch["barriers"] = record.barriers;
    launch["warp_barriers"] = record.warp_barriers;
    launch["shuffles"] = record.shuffles;
    launch["matrix_products"] = record.matrix_products;
    launch["global_bytes_read"] = record.global_bytes_read;
    launch["global_bytes_written"] = record.global_bytes_written;
    return launch;
}

Order order(const std::string& name, const char* argument) {
    if (name == "forward") return Order::forward;
    if (name == "reverse") return Order::reverse;
    if (name == "random") return Order::random;
    throw py::value_error(std::string("run: ") + argument + " must be 'forward', 'reverse' or 'random', got '" + name + "'");
}

RunResult run(const std::string& key, py::dict arguments, std::uint64_t seed, const std::string& thread_order, const std::string& block_order,
              double yield_probability, const std::optional<std::string>& mutation, py::dict offsets) {
    const auto entry = catalogue().find(key);
    if (entry == catalogue().end()) throw py::key_error("run: no kernel is called '" + key + "'");
    if (!(yield_probability >= 0.0 && yield_probability <= 1.0))
        throw py::value_error("run: yield_probability must be between 0 and 1, got " + std::to_string(yield_probability));
    Options options;
    options.seed = seed;
    options.thread_order = order(thread_order, "thread_order");
    options.block_order = order(block_order, "block_order");
    options.yield_probability = yield_probability;
    options.mutated_kernel = key;
    options.mutation = mutation.value_or("");
    Run one(key, std::move(arguments), std::move(offsets), options);
    entry->second.run(one);
    bool launched = false;
    py::list launches;
    for (const LaunchRecord& record : one.launches()) {
        launched = launched || record.plan.key == key;
        launches.append(describe(record));
    }
    if (mutation && !Mutation::exists_anywhere(*mutation))
        throw py::value_error("run: mutation must be a place of some kernel, got '" + *mutation + "'");
    if (!launched) throw std::logic_error("run: the entry '" + key + "' launched no kernel of that key");
    return {one.outputs(), std::move(launches), one.mutation_reached()};
}

std::vector<std::string> mutations(const std::string& key) {
    if (catalogue().count(key) == 0) throw py::key_error("mutations: no kernel is called '" + key + "'");
    const auto& passed = simt::emulator.passed_mutations();
    const auto found = passed.find(key);
    if (found == passed.end()) return {};
    return {found->second.begin(), found->second.end()};
}

py::dict kernels() {
    py::dict result;
    for (const auto& [key, entry] : catalogue()) {
        py::dict one;
        one["family"] = entry.family;
        one["threads"] = entry.threads;
        one["tags"] = py::cast(entry.tags);
        result[py::str(key)] = std::move(one);
    }
    return result;
}

std::string use_context_switch(const std::string& name) {
    const std::string before = simt::Fiber::fast_switch ? "x86-64" : "ucontext";
    if (name != "ucontext" && !(name == "x86-64" && simt::kHasFastSwitch))
        throw py::value_error("use_context_switch: name must be 'ucontext' or, on such a machine, 'x86-64', got '" + name + "'");
    simt::Fiber::fast_switch = name == "x86-64";
    return before;
}

py::dict build_info() {
#if defined(MODALIGN_BUILD_INFO)
    py::dict info = py::module_::import("json").attr("loads")(MODALIGN_BUILD_INFO);   // the facts that the build also leaves in _build.json
#else
    py::dict info;
#endif
    info["cplusplus"] = __cplusplus;
    info["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
    info["context_switch"] = simt::kHasFastSwitch ? "x86-64" : "ucontext";
#if defined(MODALIGN_ADDRESS_SANITIZER)
    info["address_sanitizer"] = true;
#else
    info["address_sanitizer"] = false;
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
    module.doc() = "Build facts, the kernel catalogue, and the CUDA kernels run on the CPU by an emulator that reports races and bad addresses.";

    static py::object report_type = py::exception<Report>(module, "KernelReport", PyExc_RuntimeError);
    report_type.doc() = "A kernel broke a rule of the device. Attributes: kind, kernel, block, thread, address.";
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const Report& report) {
            py::object error = report_type(report.what());
            error.attr("kind") = report.kind;
            error.attr("kernel") = report.kernel;
            error.attr("block") = py::make_tuple(report.block[0], report.block[1], report.block[2]);
            error.attr("thread") = report.thread;
            error.attr("address") = report.address;
            PyErr_SetObject(report_type.ptr(), error.ptr());
        }
    });

    py::class_<RunResult>(module, "RunResult", "What a run gives back.")
        .def_readonly("outputs", &RunResult::outputs, "numpy arrays by name; bf16 as its bits in uint16")
        .def_readonly("launches", &RunResult::launches, "one dict per launch: key, grid, threads, shared_bytes and counts of what it did")
        .def_readonly("mutation_reached", &RunResult::mutation_reached, "whether the kernel passed the place of the mutation that was switched on");

    module.def("build_info", &build_info, "Facts about how this module was built.");
    module.def("kernels", &kernels, "The catalogue: key -> {family, threads, tags}.");
    module.def(
        "launch_counts", [] { return launch_counts(); }, "How often each key has been launched with at least one block since the module was loaded.");
    module.def("mutations", &mutations, py::arg("key"), "Places of this kernel's seeded mutations that runs have passed so far.");
    module.def("use_context_switch", &use_context_switch, py::arg("name"),
               "Chooses how runs switch between threads, 'x86-64' or 'ucontext', and says what was chosen before. Results do not depend on it.");
    module.def("run", &run, py::arg("key"), py::arg("arguments"), py::kw_only(), py::arg("seed") = 0, py::arg("thread_order") = "forward",
               py::arg("block_order") = "forward", py::arg("yield_probability") = 0.0, py::arg("mutation") = py::none(),
               py::arg("offsets") = py::dict(),
               "Runs a kernel of the catalogue in the emulator. `offsets` moves named arrays by so many elements off their 256-byte alignment; "
               "`mutation` breaks the kernel at a named place.");
    for (const auto add : bindings()) add(module);
}

}  // namespace modalign::host
