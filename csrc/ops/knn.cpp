// knn: schema, one check, CPU entry point. ops/knn.h says what the numbers are.
#include "ops/knn.h"

#include <optional>
#include <tuple>

#include "common/check.h"
#include "common/stable.h"
#include "cpu/knn.h"

namespace modalign {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Optional = std::optional<Tensor>;

constexpr const char* kOp = "knn";

BatchedRows rows_of(const Tensor& t) { return {t.const_data_ptr(), 0, t.stride(0), t.stride(1)}; }

OptionalVector check_vector(const char* argument, const Optional& t, std::int64_t size, const Tensor& like, ScalarType dtype) {
  if (!t) return {};
  check_like(kOp, argument, *t, like, dtype);
  check_shape(kOp, argument, *t, {size});
  return {t->const_data_ptr(), t->stride(0)};
}

KnnProblem check(const Tensor& queries, const Tensor& points, std::int64_t k, std::int64_t metric, const Optional& bias, const Optional& skip, const Optional& query_labels,
                 const Optional& point_labels) {
  KnnProblem p{};
  p.dtype = check_floating(kOp, "queries", queries);
  MODALIGN_CHECK(queries.dim() == 2, kOp, ": queries must have shape [N, D], got ", shape_of(queries));
  check_like(kOp, "points", points, queries, queries.scalar_type());
  MODALIGN_CHECK(points.dim() == 2 && points.size(1) == queries.size(1), kOp, ": points must have shape [M, D] with D = ", queries.size(1), ", got ", shape_of(points));
  MODALIGN_CHECK(points.size(0) <= kMaxPoints, kOp, ": points must be fewer than 2^31, got ", points.size(0));
  MODALIGN_CHECK(metric >= 0 && metric <= 3, kOp, ": metric must be 0 to 3, got ", metric);
  p.metric = static_cast<Metric>(metric);
  p.N = queries.size(0), p.M = points.size(0), p.D = queries.size(1), p.k = k;
  MODALIGN_CHECK(k >= 1 && k <= p.M, kOp, ": k must be from 1 to the number of points, ", p.M, ", got ", k);
  p.queries = rows_of(queries), p.points = rows_of(points);
  MODALIGN_CHECK(!(bias && is_distance(p.metric)), kOp, ": bias must go with a similarity, got a distance");
  MODALIGN_CHECK(query_labels.has_value() == point_labels.has_value(), kOp, ": query_labels and point_labels must be given together");
  p.bias = check_vector("bias", bias, p.M, queries, accumulation_type(queries.scalar_type()));
  p.skip = check_vector("skip", skip, p.N, queries, ScalarType::Long);
  p.query_labels = check_vector("query_labels", query_labels, p.N, queries, ScalarType::Long);
  p.point_labels = check_vector("point_labels", point_labels, p.M, queries, ScalarType::Long);
  return p;
}

Two knn(const Tensor& queries, const Tensor& points, std::int64_t k, std::int64_t metric, const Optional& bias, const Optional& skip, const Optional& query_labels,
        const Optional& point_labels) {
  const KnnProblem p = check(queries, points, k, metric, bias, skip, query_labels, point_labels);
  Tensor values = new_tensor(queries, {p.N, p.k}, accumulation_type(queries.scalar_type())), indices = new_tensor(queries, {p.N, p.k}, ScalarType::Long);
  const KnnResult to{values.mutable_data_ptr(), static_cast<std::int64_t*>(indices.mutable_data_ptr())};
  const cpu::KnnKernels& kernels = cpu::knn_kernels();
  const Tensor workspace = new_workspace(queries, kernels.workspace(p));
  kernels.knn(p, to, workspace.mutable_data_ptr(), kTorchParallel);
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modalign, m) {
  m.def("knn(Tensor queries, Tensor points, int k, int metric, Tensor? bias, Tensor? skip, Tensor? query_labels, Tensor? point_labels) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(modalign, CPU, m) { m.impl("knn", TORCH_BOX(&knn)); }

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
