/// @file cpu_kernels.cpp
/// @brief The forms of the CPU tile engine on numpy arrays, on one thread and with no torch in the way: for tests of the engine.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "cpu/tile_forms.h"
#include "host/on_instruction_set.h"
#include "host/registry.h"

namespace modalign::cpu {
namespace portable { extern const AllTileForms kTileForms; }
#ifdef MODALIGN_WITH_X86
namespace avx2 { extern const AllTileForms kTileForms; }
namespace avx512 { extern const AllTileForms kTileForms; }
#endif

const AllTileForms& tile_forms() {
#ifdef MODALIGN_WITH_X86
    return Variants<AllTileForms>{&portable::kTileForms, &avx2::kTileForms, &avx512::kTileForms}.chosen();
#else
    return portable::kTileForms;
#endif
}

template <class T> const TileForms<T>& tile_forms_of();
template <> const TileForms<float>& tile_forms_of<float>() { return tile_forms().f32; }
template <> const TileForms<double>& tile_forms_of<double>() { return tile_forms().f64; }
}  // namespace modalign::cpu

namespace modalign::host {
namespace {

template <class T> using Matrix = py::array_t<T, py::array::c_style>;

template <class T>
void demand_matrices(const Matrix<T>& a, const Matrix<T>& b) {
    if (a.ndim() != 2 || b.ndim() != 2 || a.shape(1) != b.shape(1)) throw py::value_error("tile: a and b must be matrices of one width, got others");
}

template <class T>
void bind(py::module_& module) {
    module.def("tile_product", [](const Matrix<T>& a, const Matrix<T>& b, const std::string& set) {
        demand_matrices(a, b);
        Matrix<T> out({a.shape(0), b.shape(0)});
        const OnInstructionSet scope(set);
        cpu::tile_forms_of<T>().product(a.data(), b.data(), a.shape(0), b.shape(0), a.shape(1), out.mutable_data(), cpu::kSerial);
        return out;
    }, py::arg("a").noconvert(), py::arg("b").noconvert(), py::arg("instruction_set") = "auto", "Form a: a b^t.");
    module.def("tile_square_sum", [](const Matrix<T>& a, const Matrix<T>& b, int group, const std::string& set) {
        demand_matrices(a, b);
        if (group < 1 || b.shape(0) % group) throw py::value_error("tile: group must divide the rows of b, got " + std::to_string(group));
        Matrix<T> out({a.shape(0), b.shape(0) / group});
        const OnInstructionSet scope(set);
        cpu::tile_forms_of<T>().square_sum(a.data(), b.data(), a.shape(0), b.shape(0), a.shape(1), group, out.mutable_data(), cpu::kSerial);
        return out;
    }, py::arg("a").noconvert(), py::arg("b").noconvert(), py::arg("group"), py::arg("instruction_set") = "auto", "Form b: sums of squares of neighbouring products.");
    module.def("tile_log_sum_exp", [](const Matrix<T>& a, const Matrix<T>& b, double scale, const std::string& set) {
        demand_matrices(a, b);
        py::array_t<T> row(a.shape(0)), column(b.shape(0));
        const OnInstructionSet scope(set);
        cpu::tile_forms_of<T>().log_sum_exp(a.data(), b.data(), a.shape(0), b.shape(0), a.shape(1), static_cast<T>(scale), row.mutable_data(), column.mutable_data(), cpu::kSerial);
        return py::make_tuple(row, column);
    }, py::arg("a").noconvert(), py::arg("b").noconvert(), py::arg("scale"), py::arg("instruction_set") = "auto", "Form c: log-sum-exp of the rows and of the columns of scale a b^t.");
    module.def("tile_weighted_values", [](const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& values, const std::string& set) {
        demand_matrices(a, b);
        if (values.ndim() != 2 || values.shape(0) != b.shape(0)) throw py::value_error("tile: values must have a row for every row of b, got others");
        Matrix<T> out({a.shape(0), values.shape(1)});
        const OnInstructionSet scope(set);
        cpu::tile_forms_of<T>().weighted_values(a.data(), b.data(), values.data(), a.shape(0), b.shape(0), a.shape(1), values.shape(1), out.mutable_data(), cpu::kSerial);
        return out;
    }, py::arg("a").noconvert(), py::arg("b").noconvert(), py::arg("values").noconvert(), py::arg("instruction_set") = "auto", "Form d: (a b^t) values.");
}

const Bindings kCpuKernels([](py::module_& module) {
    bind<float>(module);
    bind<double>(module);
});

}  // namespace
}  // namespace modalign::host
