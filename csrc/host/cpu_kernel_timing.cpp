/// @file cpu_kernel_timing.cpp
/// @brief One CPU kernel many times over on the same numpy arrays, on one thread: what a call costs without torch's dispatch, checks and allocation.
///
/// A kernel takes its op's inputs, contiguous and without leading dimensions; a backward takes the upstream gradient after them. Outputs and workspaces
/// are allocated before the clock starts, and a backward's saved tensors are made by the forward before it.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>

#include "cpu/attention_scores.h"
#include "cpu/contrastive_loss.h"
#include "cpu/gram_volume.h"
#include "cpu/knn.h"
#include "cpu/masked_attention.h"
#include "cpu/segment_max_similarity.h"
#include "cpu/tile_forms.h"
#include "host/on_instruction_set.h"
#include "host/registry.h"

namespace modalign::cpu {
#define MODALIGN_TABLES(set)                                    \
    namespace set {                                             \
    extern const GramVolumeKernels kGramVolumeKernels;          \
    extern const ContrastiveKernels kContrastiveKernels;        \
    extern const SegmentMaxKernels kSegmentMaxKernels;          \
    extern const KnnKernels kKnnKernels;                        \
    extern const AttentionKernels kAttentionKernels;            \
    extern const AttentionScoreKernels kAttentionScoreKernels;  \
    }
MODALIGN_TABLES(portable)
#ifdef MODALIGN_WITH_X86
MODALIGN_TABLES(avx2)
MODALIGN_TABLES(avx512)
#define MODALIGN_CHOSEN(Kernels, table) Variants<Kernels>{&portable::table, &avx2::table, &avx512::table}.chosen()
#else
#define MODALIGN_CHOSEN(Kernels, table) portable::table
#endif

const GramVolumeKernels& gram_volume_kernels() { return MODALIGN_CHOSEN(GramVolumeKernels, kGramVolumeKernels); }
const ContrastiveKernels& contrastive_kernels() { return MODALIGN_CHOSEN(ContrastiveKernels, kContrastiveKernels); }
const SegmentMaxKernels& segment_max_kernels() { return MODALIGN_CHOSEN(SegmentMaxKernels, kSegmentMaxKernels); }
const KnnKernels& knn_kernels() { return MODALIGN_CHOSEN(KnnKernels, kKnnKernels); }
const AttentionScoreKernels& attention_score_kernels() { return MODALIGN_CHOSEN(AttentionScoreKernels, kAttentionScoreKernels); }
const AttentionKernels& attention_kernels() { return MODALIGN_CHOSEN(AttentionKernels, kAttentionKernels); }
}  // namespace modalign::cpu

namespace modalign::host {
namespace {

using Arrays = std::vector<py::array>;
using Shape = std::vector<py::ssize_t>;

void demand(bool holds, const std::string& kernel, const std::string& what) {
    if (!holds) throw py::value_error(kernel + ": " + what);
}

std::string text_of(const py::handle& value) { return py::str(value).cast<std::string>(); }

Scalar scalar_of(const std::string& kernel, const py::array& array) {
    const std::string name = text_of(array.dtype());
    if (name == "float32") return Scalar::f32;
    if (name == "float64") return Scalar::f64;
    if (name == "float16") return Scalar::f16;
    if (name == "uint16") return Scalar::bf16;
    throw py::type_error(kernel + ": inputs must be float32, float64, float16 or uint16 (the bits of bfloat16), got " + name);
}

py::array new_array(Scalar dtype, Shape shape) {
    switch (dtype) {
        case Scalar::f32: return py::array(py::dtype("float32"), std::move(shape));
        case Scalar::f64: return py::array(py::dtype("float64"), std::move(shape));
        case Scalar::f16: return py::array(py::dtype("float16"), std::move(shape));
        default: return py::array(py::dtype("uint16"), std::move(shape));
    }
}

/// The smallest error that a gradient divides by, as the public ops choose it.
double default_eps(Scalar dtype) { return dtype == Scalar::f64 ? 1e-24 : 1e-12; }

/// A kernel tied to its arrays.
struct Call {
    std::function<void()> run;
    Arrays outputs;
    Arrays inputs;                              // kept alive, as are the saved tensors and the workspaces of the kernel
    std::vector<std::shared_ptr<void>> memory;

    void* workspace(std::int64_t bytes) {
        memory.emplace_back(std::aligned_alloc(64, static_cast<std::size_t>((bytes + 64) / 64 * 64)), std::free);
        return memory.back().get();
    }
};

struct Request {
    std::string kernel;
    Arrays inputs;
    int group;   // tile_square_sum: how many neighbouring products make one sum; segment_max_similarity: rows of a segment
    Scalar dtype;

    const py::array& input(std::size_t index, Shape shape) const {
        const py::array& array = inputs.at(index);
        demand(Shape(array.shape(), array.shape() + array.ndim()) == shape, kernel,
               "input " + std::to_string(index) + " must have shape " + text_of(py::cast(shape)) + ", got " + text_of(array.attr("shape")));
        return array;
    }
    std::int64_t size(std::size_t index, int dimension) const {
        const py::array& array = inputs.at(index);
        demand(array.ndim() > dimension, kernel, "input " + std::to_string(index) + " must have at least " + std::to_string(dimension + 1) + " dimensions");
        return array.shape(dimension);
    }
    BatchedRows rows(std::size_t index, std::int64_t count, std::int64_t D) const {
        return {input(index, {count, D}).data(), 0, D, 1};
    }
};

using Kernels = cpu::GramVolumeKernels;

struct GramVolume {
    using Problem = GramVolumeProblem;
    static std::int64_t vectors(const Problem& p) { return p.m; }
    static Shape factor_shape(const Problem& p) { return {p.C, p.m, p.m}; }
    static constexpr auto workspace = &Kernels::gram_volume_workspace;
    static constexpr auto forward = &Kernels::gram_volume;
    static constexpr auto bwd_workspace = &Kernels::gram_volume_bwd_workspace;
    static constexpr auto backward = &Kernels::gram_volume_bwd;

    static Problem problem(const Request& request, std::size_t vectors) {
        demand(vectors >= 2 && vectors <= kMaxOthers + 1, request.kernel, "inputs must be an anchor and 1 to 7 others");
        Problem p{};
        p.m = static_cast<int>(vectors) - 1;
        p.B = request.size(0, 0), p.C = request.size(1, 0), p.D = request.size(0, 1);
        p.anchor = request.rows(0, p.B, p.D);
        for (int o = 0; o < p.m; ++o) p.others[o] = request.rows(static_cast<std::size_t>(o) + 1, p.C, p.D);
        return p;
    }
};

struct TriangleArea {
    using Problem = TriangleAreaProblem;
    static std::int64_t vectors(const Problem&) { return 2; }
    static Shape factor_shape(const Problem& p) { return {p.C, 3}; }
    static constexpr auto workspace = &Kernels::triangle_area_workspace;
    static constexpr auto forward = &Kernels::triangle_area;
    static constexpr auto bwd_workspace = &Kernels::triangle_area_bwd_workspace;
    static constexpr auto backward = &Kernels::triangle_area_bwd;

    static Problem problem(const Request& request, std::size_t vectors) {
        demand(vectors == 3, request.kernel, "inputs must be anchor, u and v");
        Problem p{};
        p.B = request.size(0, 0), p.C = request.size(1, 0), p.D = request.size(0, 1);
        p.anchor = request.rows(0, p.B, p.D), p.u = request.rows(1, p.C, p.D), p.v = request.rows(2, p.C, p.D);
        return p;
    }
};

template <class Op, bool kBackward>
Call pair_call(const Request& request) {
    const std::size_t vectors = request.inputs.size() - (kBackward && !request.inputs.empty() ? 1 : 0);
    typename Op::Problem p = Op::problem(request, vectors);
    p.N = 1, p.dtype = request.dtype, p.eps = default_eps(request.dtype);
    const Kernels& kernels = cpu::gram_volume_kernels();
    const Scalar real = p.dtype == Scalar::f64 ? Scalar::f64 : Scalar::f32;
    py::array value = new_array(p.dtype, {p.B, p.C}), basis = new_array(real, {p.C, Op::vectors(p), p.D}), factor = new_array(real, Op::factor_shape(p));
    Call call{{}, {}, request.inputs, {}};
    const PairForward to{value.mutable_data(), basis.mutable_data(), factor.mutable_data()};
    void* workspace = call.workspace((kernels.*Op::workspace)(p));
    call.run = [p, to, workspace, &kernels] { (kernels.*Op::forward)(p, to, workspace, cpu::kSerial); };
    call.inputs.insert(call.inputs.end(), {basis, factor});
    if constexpr (!kBackward) {
        call.outputs = {value};
    } else {
        call.run();
        py::array grad_anchor = new_array(p.dtype, {p.B, p.D}), grad_others = new_array(p.dtype, {p.C, Op::vectors(p), p.D});
        const PairBackward back{request.input(vectors, {p.B, p.C}).data(), 0, p.C, 1, basis.data(), factor.data(), grad_anchor.mutable_data(), grad_others.mutable_data()};
        void* back_workspace = call.workspace((kernels.*Op::bwd_workspace)(p));
        call.run = [p, back, back_workspace, &kernels] { (kernels.*Op::backward)(p, back, back_workspace, cpu::kSerial); };
        call.outputs = {grad_anchor, grad_others};
    }
    return call;
}

template <bool kBackward>
Call paired_call(const Request& request) {
    demand(request.inputs.size() == (kBackward ? 2 : 1), request.kernel, "inputs must be vectors [N, k, D]" + std::string(kBackward ? " and grad [N]" : ""));
    PairedGramVolumeProblem p{};
    p.dtype = request.dtype, p.eps = default_eps(request.dtype);
    p.N = request.size(0, 0), p.k = static_cast<int>(request.size(0, 1)), p.D = request.size(0, 2);
    demand(p.k >= 1 && p.k <= kMaxOthers + 1, request.kernel, "inputs must hold 1 to 8 vectors per row, got " + std::to_string(p.k));
    const char* data = static_cast<const char*>(request.input(0, {p.N, p.k, p.D}).data());
    for (int o = 0; o < p.k; ++o) p.vectors[o] = {data + o * p.D * size_of(p.dtype), 0, p.k * p.D, 1};
    const Kernels& kernels = cpu::gram_volume_kernels();
    Call call{{}, {new_array(p.dtype, kBackward ? Shape{p.N, p.k, p.D} : Shape{p.N})}, request.inputs, {}};
    void* out = call.outputs[0].mutable_data();
    if constexpr (kBackward) {
        const void* grad = request.input(1, {p.N}).data();
        call.run = [p, grad, out, &kernels] { kernels.paired_gram_volume_bwd(p, grad, 1, out, cpu::kSerial); };
    } else {
        call.run = [p, out, &kernels] { kernels.paired_gram_volume(p, out, cpu::kSerial); };
    }
    return call;
}

/// Row i has label i and no smoothing; logits are value / -0.07, products / 0.07. Outputs: the loss of every row; backward, whose last input is the gradient
/// of each row's loss: grad_anchor and grad_others.
template <PairForm form, PairLoss loss, bool kBackward>
Call loss_call(const Request& request) {
    const std::size_t vectors = request.inputs.size() - (kBackward && !request.inputs.empty() ? 1 : 0);
    const bool product = form == PairForm::product;
    demand(form == PairForm::volume ? vectors >= 2 && vectors <= kMaxOthers + 1 : vectors == (product ? 2 : 3), request.kernel,
           product ? "inputs must be x and y" : form == PairForm::triangle ? "inputs must be anchor, u and v" : "inputs must be an anchor and 1 to 7 others");
    ContrastiveProblem p{};
    GramVolumeProblem& q = p.pairs;
    p.form = form, p.loss = loss, p.row_part = p.column_part = 0.5;
    q.N = 1, q.dtype = request.dtype, q.eps = product ? 0 : default_eps(request.dtype), q.m = static_cast<int>(vectors) - 1;
    q.B = request.size(0, 0), q.C = q.B, q.D = request.size(0, 1);
    q.anchor = request.rows(0, q.B, q.D);
    for (int o = 0; o < q.m; ++o) q.others[o] = request.rows(static_cast<std::size_t>(o) + 1, q.C, q.D);
    const Scalar real = q.dtype == Scalar::f64 ? Scalar::f64 : Scalar::f32;
    Call call{{}, {}, request.inputs, {}};
    const auto keep = [&](Scalar dtype, Shape shape) {
        call.inputs.push_back(new_array(dtype, std::move(shape)));
        return call.inputs.back().mutable_data();
    };
    const auto number = [&](double value) {
        void* data = keep(real, {1});
        if (real == Scalar::f64) *static_cast<double*>(data) = value;
        else *static_cast<float*>(data) = static_cast<float>(value);
        return data;
    };
    const auto indices = [&](std::int64_t count) { return static_cast<std::int64_t*>(keep(Scalar::f64, {count})); };   // as wide
    p.scale = number(product ? 1 / 0.07 : -1 / 0.07);
    const auto doubles = [&](std::int64_t count) { return static_cast<double*>(keep(Scalar::f64, {count})); };
    const cpu::ContrastiveKernels& kernels = cpu::contrastive_kernels();
    py::array rows = new_array(real, {q.B});
    const ContrastiveForward to{rows.mutable_data(), doubles(q.B), doubles(q.C), keep(real, {q.B}), keep(real, {q.C}), keep(real, {q.B}), indices(q.B), indices(q.C),
                                keep(real, {4}), keep(real, {product ? 0 : q.C, q.m, q.D}),
                                keep(real, {product ? 0 : q.C, form == PairForm::triangle ? 3 : q.m * q.m}), nullptr};
    void* workspace = call.workspace(kernels.workspace(p));
    call.run = [p, to, workspace, &kernels] { kernels.forward(p, to, workspace, cpu::kSerial); };
    call.outputs = {rows};
    demand(request.dtype == real, request.kernel, "inputs must be float32 or float64, as the gradient of the loss is");
    if constexpr (kBackward) {
        call.run();
        py::array grad_anchor = new_array(q.dtype, {q.B, q.D}), grad_others = new_array(q.dtype, product ? Shape{q.C, q.D} : Shape{q.C, q.m, q.D});
        const py::array& weight = request.input(vectors, {q.B});
        const ContrastiveBackward back{weight.data(), weight.data(), to.row_lse, to.column_lse, to.classes, to.basis, to.factor, nullptr,
                                       grad_anchor.mutable_data(), grad_others.mutable_data(), keep(real, {2})};
        void* back_workspace = call.workspace(kernels.bwd_workspace(p));
        call.run = [p, back, back_workspace, &kernels] { kernels.backward(p, back, back_workspace, cpu::kSerial); };
        call.outputs = {grad_anchor, grad_others};
    }
    return call;
}

/// Segments of `group` rows each. Outputs: values; backward: grad_x and grad_y.
template <bool kBackward>
Call segment_call(const Request& request) {
    demand(request.inputs.size() == (kBackward ? 3 : 2), request.kernel, "inputs must be x [R, D] and y [A, D]" + std::string(kBackward ? " and grad [S, A]" : ""));
    SegmentMaxProblem p{};
    p.dtype = request.dtype, p.R = request.size(0, 0), p.A = request.size(1, 0), p.D = request.size(0, 1);
    demand(request.group >= 1 && p.R % request.group == 0, request.kernel, "group must divide the rows of x, got " + std::to_string(request.group));
    p.S = p.R / request.group;
    p.x = request.rows(0, p.R, p.D), p.y = request.rows(1, p.A, p.D);
    Call call{{}, {}, request.inputs, {}};
    const auto offsets = static_cast<std::int64_t*>(call.workspace((p.S + 1) * 8));
    for (std::int64_t s = 0; s <= p.S; ++s) offsets[s] = s * request.group;
    p.offsets = {offsets, 1};
    const cpu::SegmentMaxKernels& kernels = cpu::segment_max_kernels();
    py::array values = new_array(p.dtype, {p.S, p.A}), indices = py::array(py::dtype("int64"), Shape{p.S, p.A});
    const SegmentMaxForward to{values.mutable_data(), static_cast<std::int64_t*>(indices.mutable_data())};
    void* workspace = call.workspace(kernels.workspace(p));
    call.run = [p, to, workspace, &kernels] { kernels.forward(p, to, workspace, cpu::kSerial); };
    call.inputs.push_back(indices);
    call.outputs = {values};
    if constexpr (kBackward) {
        call.run();
        py::array grad_x = new_array(p.dtype, {p.R, p.D}), grad_y = new_array(p.dtype, {p.A, p.D});
        const SegmentMaxBackward back{request.input(2, {p.S, p.A}).data(), p.A, 1, to.indices, grad_x.mutable_data(), grad_y.mutable_data()};
        void* back_workspace = call.workspace(kernels.bwd_workspace(p, true, true));
        call.run = [p, back, back_workspace, &kernels] { kernels.backward(p, back, back_workspace, cpu::kSerial); };
        call.outputs = {grad_x, grad_y};
    }
    return call;
}

/// The ten nearest points by inner product, all where there are fewer. Output: these products.
Call knn_call(const Request& request) {
    demand(request.inputs.size() == 2, request.kernel, "inputs must be queries [N, D] and points [M, D]");
    KnnProblem p{};
    p.dtype = request.dtype, p.metric = Metric::dot, p.N = request.size(0, 0), p.M = request.size(1, 0), p.D = request.size(0, 1);
    p.k = std::min<std::int64_t>(10, p.M);
    demand(p.k >= 1, request.kernel, "inputs must hold at least one point");
    p.queries = request.rows(0, p.N, p.D), p.points = request.rows(1, p.M, p.D);
    const cpu::KnnKernels& kernels = cpu::knn_kernels();
    py::array values = new_array(p.dtype == Scalar::f64 ? Scalar::f64 : Scalar::f32, {p.N, p.k}), indices = py::array(py::dtype("int64"), Shape{p.N, p.k});
    Call call{{}, {values}, request.inputs, {}};
    const KnnResult to{values.mutable_data(), static_cast<std::int64_t*>(indices.mutable_data()), nullptr};
    void* workspace = call.workspace(kernels.workspace(p));
    call.run = [p, to, workspace, &kernels] { kernels.knn(p, to, workspace, cpu::kSerial); };
    call.inputs.push_back(indices);
    return call;
}

enum class Attention { forward, backward, column_sum, row_statistics };

/// Causal attention, one item. Outputs: the output; backward: the three gradients; column sums; entropies and largest probabilities.
template <Attention kKernel>
Call attention_call(const Request& request) {
    constexpr bool kBackward = kKernel == Attention::backward;
    demand(request.inputs.size() == (kBackward ? 4 : 3), request.kernel, "inputs must be query [H, N, D], key [Hkv, M, D] and value [Hkv, M, Dv]" + std::string(kBackward ? " and grad [H, N, Dv]" : ""));
    AttentionProblem p{};
    p.dtype = request.dtype, p.B = 1, p.H = request.size(0, 0), p.Hkv = request.size(1, 0), p.D = request.size(0, 2), p.Dv = request.size(2, 2);
    p.Nq = p.total_queries = request.size(0, 1), p.Nk = p.total_keys = request.size(1, 1);
    demand(p.Hkv > 0 && p.H % p.Hkv == 0, request.kernel, "key must have heads that divide the query's");
    const auto rows = [&](std::size_t index, std::int64_t heads, std::int64_t count, std::int64_t width) {
        return AttentionRows{request.input(index, {heads, count, width}).data(), heads * count * width, count * width, width, 1};
    };
    p.query = rows(0, p.H, p.Nq, p.D), p.key = rows(1, p.Hkv, p.Nk, p.D), p.value = rows(2, p.Hkv, p.Nk, p.Dv);
    p.causal = Causal::bottom_right, p.scale = 1 / std::sqrt(double(p.D));
    const cpu::AttentionKernels& kernels = cpu::attention_kernels();
    const Scalar real = p.dtype == Scalar::f64 ? Scalar::f64 : Scalar::f32;
    py::array out = new_array(p.dtype, {p.H, p.Nq, p.Dv}), lse = new_array(real, {p.H, p.Nq});
    Call call{{}, {out}, request.inputs, {}};
    const AttentionForward to{out.mutable_data(), lse.mutable_data()};
    void* workspace = call.workspace(kernels.workspace(p));
    call.run = [p, to, workspace, &kernels] { kernels.forward(p, to, workspace, cpu::kSerial); };
    call.inputs.insert(call.inputs.end(), {out, lse});
    if constexpr (kBackward) {
        call.run();
        call.outputs = {new_array(p.dtype, {p.H, p.Nq, p.D}), new_array(p.dtype, {p.Hkv, p.Nk, p.D}), new_array(p.dtype, {p.Hkv, p.Nk, p.Dv})};
        AttentionBackward back{};
        back.grad_out = rows(3, p.H, p.Nq, p.Dv), back.out = {out.data(), p.H * p.Nq * p.Dv, p.Nq * p.Dv, p.Dv, 1}, back.lse = lse.data();
        back.grad_query = call.outputs[0].mutable_data(), back.grad_key = call.outputs[1].mutable_data(), back.grad_value = call.outputs[2].mutable_data();
        void* back_workspace = call.workspace(kernels.bwd_workspace(p, back));
        call.run = [p, back, back_workspace, &kernels] { kernels.backward(p, back, back_workspace, cpu::kSerial); };
    }
    const cpu::AttentionScoreKernels& scores = cpu::attention_score_kernels();
    if constexpr (kKernel == Attention::column_sum) {
        call.run();
        call.outputs = {new_array(real, {p.H, p.Nk})};
        const AttentionColumns columns{ColumnReduction::sum, lse.data(), {lse.data(), 0, p.Nq, 1}, call.outputs[0].mutable_data()};   // any numbers do for weights
        void* score_workspace = call.workspace(scores.columns_workspace(p));
        call.run = [p, columns, score_workspace, &scores] { scores.columns(p, columns, score_workspace, cpu::kSerial); };
    }
    if constexpr (kKernel == Attention::row_statistics) {
        call.run();
        call.outputs = {new_array(real, {p.H, p.Nq}), new_array(real, {p.H, p.Nq})};
        const AttentionRowStatistics statistics{lse.data(), call.outputs[0].mutable_data(), call.outputs[1].mutable_data()};
        void* score_workspace = call.workspace(scores.rows_workspace(p));
        call.run = [p, statistics, score_workspace, &scores] { scores.rows(p, statistics, score_workspace, cpu::kSerial); };
    }
    return call;
}

enum class Form { product, square_sum, log_sum_exp, weighted_values };

template <class T, Form form>
Call tile_call_of(const Request& request, const cpu::TileForms<T>& forms) {
    demand(request.inputs.size() == (form == Form::weighted_values ? 3 : 2), request.kernel,
           "inputs must be a [rows, depth] and b [columns, depth]" + std::string(form == Form::weighted_values ? " and values [columns, width]" : ""));
    const std::int64_t rows = request.size(0, 0), columns = request.size(1, 0), depth = request.size(0, 1);
    const T* a = static_cast<const T*>(request.input(0, {rows, depth}).data());
    const T* b = static_cast<const T*>(request.input(1, {columns, depth}).data());
    Call call{{}, {}, request.inputs, {}};
    const auto output = [&](Shape shape) {
        call.outputs.push_back(new_array(request.dtype, std::move(shape)));
        return static_cast<T*>(call.outputs.back().mutable_data());
    };
    if constexpr (form == Form::product) {
        call.run = [=, &forms, out = output({rows, columns})] { forms.product(a, b, rows, columns, depth, out, cpu::kSerial); };
    } else if constexpr (form == Form::square_sum) {
        const int group = request.group;
        demand(group >= 1 && columns % group == 0, request.kernel, "group must divide the rows of b, got " + std::to_string(group));
        call.run = [=, &forms, out = output({rows, columns / group})] { forms.square_sum(a, b, rows, columns, depth, group, out, cpu::kSerial); };
    } else if constexpr (form == Form::log_sum_exp) {
        call.run = [=, &forms, row = output({rows}), column = output({columns})] { forms.log_sum_exp(a, b, rows, columns, depth, T(1), row, column, cpu::kSerial); };
    } else {
        const std::int64_t width = request.size(2, 1);
        const T* values = static_cast<const T*>(request.input(2, {columns, width}).data());
        call.run = [=, &forms, out = output({rows, width})] { forms.weighted_values(a, b, values, rows, columns, depth, width, out, cpu::kSerial); };
    }
    return call;
}

template <Form form>
Call tile_call(const Request& request) {
    if (request.dtype == Scalar::f32) return tile_call_of<float, form>(request, cpu::tile_forms().f32);
    if (request.dtype == Scalar::f64) return tile_call_of<double, form>(request, cpu::tile_forms().f64);
    throw py::type_error(request.kernel + ": inputs must be float32 or float64, got a 16-bit type");
}

const std::map<std::string, Call (*)(const Request&)>& cpu_kernels() {
    static const std::map<std::string, Call (*)(const Request&)> all = {
        {"gram_volume", pair_call<GramVolume, false>},
        {"gram_volume_bwd", pair_call<GramVolume, true>},
        {"triangle_area", pair_call<TriangleArea, false>},
        {"triangle_area_bwd", pair_call<TriangleArea, true>},
        {"paired_gram_volume", paired_call<false>},
        {"paired_gram_volume_bwd", paired_call<true>},
        {"gram_contrastive_loss", loss_call<PairForm::volume, PairLoss::softmax, false>},
        {"gram_contrastive_loss_bwd", loss_call<PairForm::volume, PairLoss::softmax, true>},
        {"triangle_contrastive_loss", loss_call<PairForm::triangle, PairLoss::softmax, false>},
        {"triangle_contrastive_loss_bwd", loss_call<PairForm::triangle, PairLoss::softmax, true>},
        {"clip_loss", loss_call<PairForm::product, PairLoss::softmax, false>},
        {"clip_loss_bwd", loss_call<PairForm::product, PairLoss::softmax, true>},
        {"siglip_loss", loss_call<PairForm::product, PairLoss::sigmoid, false>},
        {"siglip_loss_bwd", loss_call<PairForm::product, PairLoss::sigmoid, true>},
        {"segment_max_similarity", segment_call<false>},
        {"segment_max_similarity_bwd", segment_call<true>},
        {"knn", knn_call},
        {"masked_attention", attention_call<Attention::forward>},
        {"masked_attention_bwd", attention_call<Attention::backward>},
        {"attention_column_sum", attention_call<Attention::column_sum>},
        {"attention_row_statistics", attention_call<Attention::row_statistics>},
        {"tile_product", tile_call<Form::product>},
        {"tile_square_sum", tile_call<Form::square_sum>},
        {"tile_log_sum_exp", tile_call<Form::log_sum_exp>},
        {"tile_weighted_values", tile_call<Form::weighted_values>},
    };
    return all;
}

py::tuple time_cpu_kernel(const std::string& kernel, const Arrays& inputs, std::int64_t repeats, int group, const std::string& instruction_set) {
    const auto found = cpu_kernels().find(kernel);
    if (found == cpu_kernels().end()) throw py::key_error("time_cpu_kernel: kernel must be one of cpu_kernels(), got " + kernel);
    demand(repeats >= 1, kernel, "repeats must be at least 1, got " + std::to_string(repeats));
    demand(!inputs.empty(), kernel, "inputs must hold at least one array");
    for (const py::array& input : inputs) {
        demand(input.flags() & py::array::c_style, kernel, "inputs must be contiguous, got strided ones");
        demand(input.dtype().equal(inputs[0].dtype()), kernel, "inputs must have one dtype, got others");
    }
    const OnInstructionSet scope(instruction_set);
    const Call call = found->second({kernel, inputs, group, scalar_of(kernel, inputs[0])});
    double seconds = 0;
    {
        const py::gil_scoped_release release;
        const auto begin = std::chrono::steady_clock::now();
        for (std::int64_t repeat = 0; repeat < repeats; ++repeat) call.run();
        seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    }
    return py::make_tuple(seconds / static_cast<double>(repeats), call.outputs);
}

const Bindings kTiming([](py::module_& module) {
    module.def("cpu_kernels", [] {
        std::vector<std::string> names;
        for (const auto& entry : cpu_kernels()) names.push_back(entry.first);
        return names;
    }, "Names that time_cpu_kernel takes.");
    module.def("time_cpu_kernel", &time_cpu_kernel, py::arg("kernel"), py::arg("inputs"), py::arg("repeats") = 1, py::kw_only(), py::arg("group") = 2,
               py::arg("instruction_set") = "auto", "Runs a CPU kernel `repeats` times on one thread; seconds of one call, and its outputs.");
});

}  // namespace
}  // namespace modalign::host
