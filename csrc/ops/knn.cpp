// knn and target_rank: schemas, one check, CPU and CUDA entry points. ops/knn.h says what the numbers are.
#include "ops/knn.h"

#include <optional>
#include <tuple>

#include "common/check.h"
#include "common/stable.h"
#include "cpu/knn.h"
#ifdef MODALIGN_WITH_CUDA
#include "cuda/knn.h"
#endif
#include "ops/cuda_call.h"

namespace modalign {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Optional = std::optional<Tensor>;

BatchedRows rows_of(const Tensor& t) { return {t.const_data_ptr(), 0, t.stride(0), t.stride(1)}; }

OptionalVector check_vector(const char* op, const char* argument, const Optional& t, std::int64_t size, const Tensor& like, ScalarType dtype) {
  if (!t) return {};
  check_like(op, argument, *t, like, dtype);
  check_shape(op, argument, *t, {size});
  return {t->const_data_ptr(), t->stride(0)};
}

KnnProblem check(const char* op, const Tensor& queries, const Tensor& points, std::int64_t k, std::int64_t metric, const Optional& bias, const Optional& skip,
                 const Optional& query_labels, const Optional& point_labels) {
  KnnProblem p{};
  p.dtype = check_floating(op, "queries", queries);
  MODALIGN_CHECK(queries.dim() == 2, op, ": queries must have shape [N, D], got ", shape_of(queries));
  check_like(op, "points", points, queries, queries.scalar_type());
  MODALIGN_CHECK(points.dim() == 2 && points.size(1) == queries.size(1), op, ": points must have shape [M, D] with D = ", queries.size(1), ", got ", shape_of(points));
  MODALIGN_CHECK(points.size(0) <= kMaxPoints, op, ": points must be fewer than 2^31, got ", points.size(0));
  MODALIGN_CHECK(metric >= 0 && metric <= 3, op, ": metric must be 0 to 3, got ", metric);
  p.metric = static_cast<Metric>(metric);
  p.N = queries.size(0), p.M = points.size(0), p.D = queries.size(1), p.k = k;
  MODALIGN_CHECK(k >= 1 && k <= p.M, op, ": k must be from 1 to the number of points, ", p.M, ", got ", k);
  p.queries = rows_of(queries), p.points = rows_of(points);
  MODALIGN_CHECK(!(bias && is_distance(p.metric)), op, ": bias must go with a similarity, got a distance");
  MODALIGN_CHECK(query_labels.has_value() == point_labels.has_value(), op, ": query_labels and point_labels must be given together");
  p.bias = check_vector(op, "bias", bias, p.M, queries, accumulation_type(queries.scalar_type()));
  p.skip = check_vector(op, "skip", skip, p.N, queries, ScalarType::Long);
  p.query_labels = check_vector(op, "query_labels", query_labels, p.N, queries, ScalarType::Long);
  p.point_labels = check_vector(op, "point_labels", point_labels, p.M, queries, ScalarType::Long);
  return p;
}

void check_targets(const char* op, const KnnProblem& p) {
  for (std::int64_t i = 0; i < p.N; ++i) {
    const std::int64_t t = static_cast<const std::int64_t*>(p.target.data)[i * p.target.stride];
    MODALIGN_CHECK((t >= -1 || t == -100) && t < p.M, op, ": target must hold indices from 0 to M - 1 = ", p.M - 1, ", -1 or -100, got ", t, " at row ", i);
  }
}

Three knn(const Tensor& queries, const Tensor& points, std::int64_t k, std::int64_t metric, const Optional& bias, const Optional& skip, const Optional& query_labels,
        const Optional& point_labels, std::int64_t precision) {
  KnnProblem p = check("knn", queries, points, k, metric, bias, skip, query_labels, point_labels);
  MODALIGN_CHECK(precision == 0 || precision == 1, "knn: precision must be 0 or 1, got ", precision);
  p.precision = static_cast<Precision>(precision);
  const ScalarType real = accumulation_type(queries.scalar_type());
  Tensor scores = new_tensor(queries, {p.N, p.k}, real), indices = new_tensor(queries, {p.N, p.k}, ScalarType::Long);
  Tensor squares = new_tensor(queries, {p.metric == Metric::dot ? 0 : p.N}, real);
  const KnnResult to{scores.mutable_data_ptr(), static_cast<std::int64_t*>(indices.mutable_data_ptr()), squares.mutable_data_ptr()};
  if (queries.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(queries.get_device_index());
    const Tensor workspace = new_workspace(queries, cuda::knn_workspace(p));
    check_launch("knn", cuda::launch_knn(p, to, workspace.mutable_data_ptr(), current_cuda_stream(queries.get_device_index())));
#endif
  } else {
    const cpu::KnnKernels& kernels = cpu::knn_kernels();
    const Tensor workspace = new_workspace(queries, kernels.workspace(p));
    kernels.knn(p, to, workspace.mutable_data_ptr(), kTorchParallel);
  }
  return {scores, indices, squares};
}

Tensor target_rank(const Tensor& queries, const Tensor& points, const Tensor& target, std::int64_t metric, const Optional& bias, const Optional& skip,
                   const Optional& query_labels, const Optional& point_labels) {
  constexpr const char* op = "target_rank";
  KnnProblem p = check(op, queries, points, 1, metric, bias, skip, query_labels, point_labels);
  p.target = check_vector(op, "target", target, p.N, queries, ScalarType::Long);
  if (!queries.is_cuda()) check_targets(op, p);   // on a GPU that would wait for it
  Tensor rank = new_tensor(queries, {p.N}, ScalarType::Long);
  std::int64_t* to = static_cast<std::int64_t*>(rank.mutable_data_ptr());
  if (queries.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(queries.get_device_index());
    const Tensor workspace = new_workspace(queries, cuda::target_rank_workspace(p));
    check_launch(op, cuda::launch_target_rank(p, to, workspace.mutable_data_ptr(), current_cuda_stream(queries.get_device_index())));
#endif
  } else {
    const cpu::KnnKernels& kernels = cpu::knn_kernels();
    const Tensor workspace = new_workspace(queries, kernels.rank_workspace(p));
    kernels.target_rank(p, to, workspace.mutable_data_ptr(), kTorchParallel);
  }
  return rank;
}

#ifdef MODALIGN_WITH_CUDA
std::tuple<Tensor, Tensor> knn_scores(const Tensor& queries, const Tensor& points, const Tensor& indices, std::int64_t metric, const Optional& bias) {
  constexpr const char* op = "knn_scores";
  MODALIGN_CHECK(indices.dim() == 2, op, ": indices must have shape [N, k], got ", shape_of(indices));
  KnnProblem p = check(op, queries, points, 1, metric, bias, std::nullopt, std::nullopt, std::nullopt);
  MODALIGN_CHECK(p.dtype == Scalar::f32 || p.dtype == Scalar::f64, op, ": queries must be float32 or float64");
  p.k = indices.size(1);
  check_like(op, "indices", indices, queries, ScalarType::Long);
  check_shape(op, "indices", indices, {p.N, p.k});
  MODALIGN_CHECK(indices.is_contiguous(), op, ": indices must be contiguous");
  Tensor scores = new_tensor(queries, {p.N, p.k}, queries.scalar_type()), squares = new_tensor(queries, {p.metric == Metric::dot ? 0 : p.N}, queries.scalar_type());
  const DeviceGuard device(queries.get_device_index());
  const Tensor workspace = new_workspace(queries, cuda::knn_scores_workspace(p));
  const KnnResult to{scores.mutable_data_ptr(), nullptr, squares.mutable_data_ptr()};
  check_launch(op, cuda::launch_knn_scores(p, static_cast<const std::int64_t*>(indices.const_data_ptr()), to, workspace.mutable_data_ptr(),
                                           current_cuda_stream(queries.get_device_index())));
  return {scores, squares};
}
#endif

template <class Library>
void register_all(Library& m) {
  m.impl("knn", TORCH_BOX(&knn));
  m.impl("target_rank", TORCH_BOX(&target_rank));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modalign, m) {
  m.def("knn(Tensor queries, Tensor points, int k, int metric, Tensor? bias, Tensor? skip, Tensor? query_labels, Tensor? point_labels, int precision) -> (Tensor, Tensor, Tensor)");
  m.def("knn_scores(Tensor queries, Tensor points, Tensor indices, int metric, Tensor? bias) -> (Tensor, Tensor)");   // what knn gives these points; CUDA alone, where knn has several precisions
  m.def("target_rank(Tensor queries, Tensor points, Tensor target, int metric, Tensor? bias, Tensor? skip, Tensor? query_labels, Tensor? point_labels) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(modalign, CPU, m) { register_all(m); }
#ifdef MODALIGN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(modalign, CUDA, m) {
  register_all(m);
  m.impl("knn_scores", TORCH_BOX(&knn_scores));
}
#endif

namespace cpu {
namespace portable { extern const KnnKernels kKnnKernels; }
#ifdef MODALIGN_WITH_X86
namespace avx2 { extern const KnnKernels kKnnKernels; }
namespace avx512 { extern const KnnKernels kKnnKernels; }
#endif

const KnnKernels& knn_kernels() {
#ifdef MODALIGN_WITH_X86
  return Variants<KnnKernels>{&portable::kKnnKernels, &avx2::kKnnKernels, &avx512::kKnnKernels}.chosen();
#else
  return portable::kKnnKernels;
#endif
}
}  // namespace cpu

}  // namespace modalign
