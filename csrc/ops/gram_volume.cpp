// gram_volume, triangle_area, paired_gram_volume: schemas, one check per op, CPU and CUDA entry points. ops/gram_volume.h says what the numbers are.
#include "ops/gram_volume.h"

#include <limits>
#include <tuple>

#include "common/check.h"
#include "common/stable.h"
#include "cpu/gram_volume.h"
#include "ops/cuda_call.h"

namespace modalign {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Two = std::tuple<Tensor, Tensor>;

BatchedRows batched_rows(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

void check_eps(const char* op, double eps) { MODALIGN_CHECK(eps >= 0 && eps < std::numeric_limits<double>::infinity(), op, ": eps must be finite and at least 0, got ", eps); }

// [N, rows, D] beside an anchor [N, B, D]
BatchedRows check_rows(const char* op, const char* argument, const Tensor& t, const Tensor& anchor, std::int64_t rows) {
  check_like(op, argument, t, anchor, anchor.scalar_type());
  check_shape(op, argument, t, {anchor.size(0), rows, anchor.size(2)});
  return batched_rows(t);
}

GramVolumeProblem check_gram_volume(const Tensor& anchor, const std::vector<Tensor>& others, const std::optional<Tensor>& present, bool squared, double eps) {
  constexpr const char* op = "gram_volume";
  GramVolumeProblem p{};
  p.dtype = check_floating(op, "anchor", anchor);
  MODALIGN_CHECK(anchor.dim() == 3, op, ": anchor must have shape [N, B, D], got ", shape_of(anchor));
  MODALIGN_CHECK(!others.empty() && others.size() <= kMaxOthers, op, ": others must hold 1 to ", kMaxOthers, " tensors, got ", others.size());
  check_eps(op, eps);
  p.N = anchor.size(0), p.B = anchor.size(1), p.D = anchor.size(2);
  p.m = static_cast<int>(others.size());
  MODALIGN_CHECK(others[0].dim() == 3, op, ": others must have shape [N, C, D], got ", shape_of(others[0]));
  p.C = others[0].size(1);
  p.squared = squared, p.eps = eps;
  p.anchor = batched_rows(anchor);
  for (int o = 0; o < p.m; ++o) p.others[o] = check_rows(op, "others", others[o], anchor, p.C);
  if (present) {
    check_like(op, "present", *present, anchor, ScalarType::Bool);
    check_shape(op, "present", *present, {p.N, p.C, p.m});
    p.present = {static_cast<const bool*>(present->const_data_ptr()), present->stride(0), present->stride(1), present->stride(2)};
  }
  return p;
}

TriangleAreaProblem check_triangle_area(const Tensor& anchor, const Tensor& u, const Tensor& v, bool squared, double eps) {
  constexpr const char* op = "triangle_area";
  TriangleAreaProblem p{};
  p.dtype = check_floating(op, "anchor", anchor);
  MODALIGN_CHECK(anchor.dim() == 3, op, ": anchor must have shape [N, B, D], got ", shape_of(anchor));
  MODALIGN_CHECK(u.dim() == 3, op, ": u must have shape [N, C, D], got ", shape_of(u));
  check_eps(op, eps);
  p.N = anchor.size(0), p.B = anchor.size(1), p.D = anchor.size(2), p.C = u.size(1);
  p.squared = squared, p.eps = eps;
  p.anchor = batched_rows(anchor);
  p.u = check_rows(op, "u", u, anchor, p.C);
  p.v = check_rows(op, "v", v, anchor, p.C);
  return p;
}

PairedGramVolumeProblem check_paired_gram_volume(const std::vector<Tensor>& vectors, const std::optional<Tensor>& present, bool squared, double eps) {
  constexpr const char* op = "paired_gram_volume";
  PairedGramVolumeProblem p{};
  MODALIGN_CHECK(!vectors.empty() && vectors.size() <= kMaxOthers + 1, op, ": vectors must hold 1 to ", kMaxOthers + 1, " tensors, got ", vectors.size());
  check_eps(op, eps);
  const Tensor& first = vectors[0];
  p.dtype = check_floating(op, "vectors", first);
  MODALIGN_CHECK(first.dim() == 2, op, ": vectors must have shape [N, D], got ", shape_of(first));
  p.N = first.size(0), p.D = first.size(1), p.k = static_cast<int>(vectors.size());
  p.squared = squared, p.eps = eps;
  for (int o = 0; o < p.k; ++o) {
    check_like(op, "vectors", vectors[o], first, first.scalar_type());
    check_shape(op, "vectors", vectors[o], {p.N, p.D});
    p.vectors[o] = {vectors[o].const_data_ptr(), 0, vectors[o].stride(0), vectors[o].stride(1)};
  }
  if (present) {
    check_like(op, "present", *present, first, ScalarType::Bool);
    check_shape(op, "present", *present, {p.N, p.k});
    p.present = {static_cast<const bool*>(present->const_data_ptr()), 0, present->stride(0), present->stride(1)};
  }
  return p;
}

// ---- gram_volume and triangle_area: the same steps for both --------------------------------------------------------------------------------------------

struct GramVolumeOp {
  using Problem = GramVolumeProblem;
  static constexpr const char* name = "gram_volume";
  static std::int64_t vectors(const Problem& p) { return p.m; }
  static std::vector<std::int64_t> factor_shape(const Problem& p) { return {p.N, p.C, p.m, p.m}; }
  static constexpr auto cpu_workspace = &cpu::GramVolumeKernels::gram_volume_workspace;
  static constexpr auto cpu_forward = &cpu::GramVolumeKernels::gram_volume;
  static constexpr auto cpu_bwd_workspace = &cpu::GramVolumeKernels::gram_volume_bwd_workspace;
  static constexpr auto cpu_backward = &cpu::GramVolumeKernels::gram_volume_bwd;
#ifdef MODALIGN_WITH_CUDA
  static constexpr auto cuda_workspace = &cuda::gram_volume_workspace;
  static constexpr auto cuda_forward = &cuda::launch_gram_volume;
  static constexpr auto cuda_bwd_workspace = &cuda::gram_volume_bwd_workspace;
  static constexpr auto cuda_backward = &cuda::launch_gram_volume_bwd;
#endif
};

struct TriangleAreaOp {
  using Problem = TriangleAreaProblem;
  static constexpr const char* name = "triangle_area";
  static std::int64_t vectors(const Problem&) { return 2; }
  static std::vector<std::int64_t> factor_shape(const Problem& p) { return {p.N, p.C, 3}; }
  static constexpr auto cpu_workspace = &cpu::GramVolumeKernels::triangle_area_workspace;
  static constexpr auto cpu_forward = &cpu::GramVolumeKernels::triangle_area;
  static constexpr auto cpu_bwd_workspace = &cpu::GramVolumeKernels::triangle_area_bwd_workspace;
  static constexpr auto cpu_backward = &cpu::GramVolumeKernels::triangle_area_bwd;
#ifdef MODALIGN_WITH_CUDA
  static constexpr auto cuda_workspace = &cuda::triangle_area_workspace;
  static constexpr auto cuda_forward = &cuda::launch_triangle_area;
  static constexpr auto cuda_bwd_workspace = &cuda::triangle_area_bwd_workspace;
  static constexpr auto cuda_backward = &cuda::launch_triangle_area_bwd;
#endif
};

template <class Op>
Three run_forward(const typename Op::Problem& p, const Tensor& anchor) {
  const ScalarType real = accumulation_type(anchor.scalar_type());
  Tensor value = new_tensor(anchor, {p.N, p.B, p.C}, anchor.scalar_type());
  Tensor basis = new_tensor(anchor, {p.N, p.C, Op::vectors(p), p.D}, real), factor = new_tensor(anchor, Op::factor_shape(p), real);
  const PairForward to{value.mutable_data_ptr(), basis.mutable_data_ptr(), factor.mutable_data_ptr()};
  if (anchor.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(anchor.get_device_index());
    const Tensor workspace = new_workspace(anchor, Op::cuda_workspace(p));
    check_launch(Op::name, Op::cuda_forward(p, to, workspace.mutable_data_ptr(), current_cuda_stream(anchor.get_device_index())));
#endif
  } else {
    const cpu::GramVolumeKernels& kernels = cpu::gram_volume_kernels();
    const Tensor workspace = new_workspace(anchor, (kernels.*Op::cpu_workspace)(p));
    (kernels.*Op::cpu_forward)(p, to, workspace.mutable_data_ptr(), kTorchParallel);
  }
  return {value, basis, factor};
}

template <class Op>
Two run_backward(const typename Op::Problem& p, const Tensor& grad, const Tensor& anchor, const Tensor& basis, const Tensor& factor, bool need_anchor, bool need_others) {
  const ScalarType real = accumulation_type(anchor.scalar_type());
  const std::int64_t m = Op::vectors(p);
  check_like(Op::name, "grad", grad, anchor, anchor.scalar_type());
  check_shape(Op::name, "grad", grad, {p.N, p.B, p.C});
  check_like(Op::name, "basis", basis, anchor, real);
  check_shape(Op::name, "basis", basis, {p.N, p.C, m, p.D});
  check_like(Op::name, "factor", factor, anchor, real);
  MODALIGN_CHECK(basis.is_contiguous() && factor.is_contiguous(), Op::name, ": basis and factor must be contiguous, got strided ones");
  Tensor grad_anchor = need_anchor ? new_tensor(anchor, {p.N, p.B, p.D}, anchor.scalar_type()) : new_tensor(anchor, {0}, anchor.scalar_type());
  Tensor grad_others = need_others ? new_tensor(anchor, {p.N, p.C, m, p.D}, anchor.scalar_type()) : new_tensor(anchor, {0}, anchor.scalar_type());
  const PairBackward to{grad.const_data_ptr(),   grad.stride(0),           grad.stride(1), grad.stride(2), basis.const_data_ptr(), factor.const_data_ptr(),
                        need_anchor ? grad_anchor.mutable_data_ptr() : nullptr, need_others ? grad_others.mutable_data_ptr() : nullptr};
  if (anchor.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(anchor.get_device_index());
    const std::int64_t bytes = Op::cuda_bwd_workspace(p, kWorkspaceBytes);
    const Tensor workspace = new_workspace(anchor, bytes);
    check_launch(Op::name, Op::cuda_backward(p, to, workspace.mutable_data_ptr(), bytes, current_cuda_stream(anchor.get_device_index())));
#endif
  } else {
    const cpu::GramVolumeKernels& kernels = cpu::gram_volume_kernels();
    const Tensor workspace = new_workspace(anchor, (kernels.*Op::cpu_bwd_workspace)(p));
    (kernels.*Op::cpu_backward)(p, to, workspace.mutable_data_ptr(), kTorchParallel);
  }
  return {grad_anchor, grad_others};
}

Three gram_volume(const Tensor& anchor, std::vector<Tensor> others, std::optional<Tensor> present, bool squared, double eps) {
  return run_forward<GramVolumeOp>(check_gram_volume(anchor, others, present, squared, eps), anchor);
}

Two gram_volume_bwd(const Tensor& grad, const Tensor& anchor, const Tensor& basis, const Tensor& factor, bool squared, double eps, bool need_anchor, bool need_others) {
  constexpr const char* op = "gram_volume";
  GramVolumeProblem p{};
  p.dtype = check_floating(op, "anchor", anchor);
  MODALIGN_CHECK(anchor.dim() == 3, op, ": anchor must have shape [N, B, D], got ", shape_of(anchor));
  MODALIGN_CHECK(basis.dim() == 4 && basis.size(2) >= 1 && basis.size(2) <= kMaxOthers, op, ": basis must have shape [N, C, m, D], got ", shape_of(basis));
  check_eps(op, eps);
  p.N = anchor.size(0), p.B = anchor.size(1), p.D = anchor.size(2), p.C = basis.size(1), p.m = static_cast<int>(basis.size(2));
  p.squared = squared, p.eps = eps;
  p.anchor = batched_rows(anchor);
  check_shape(op, "factor", factor, {p.N, p.C, p.m, p.m});
  return run_backward<GramVolumeOp>(p, grad, anchor, basis, factor, need_anchor, need_others);
}

Three triangle_area(const Tensor& anchor, const Tensor& u, const Tensor& v, bool squared, double eps) {
  return run_forward<TriangleAreaOp>(check_triangle_area(anchor, u, v, squared, eps), anchor);
}

Two triangle_area_bwd(const Tensor& grad, const Tensor& anchor, const Tensor& basis, const Tensor& factor, bool squared, double eps, bool need_anchor, bool need_others) {
  constexpr const char* op = "triangle_area";
  TriangleAreaProblem p{};
  p.dtype = check_floating(op, "anchor", anchor);
  MODALIGN_CHECK(anchor.dim() == 3, op, ": anchor must have shape [N, B, D], got ", shape_of(anchor));
  MODALIGN_CHECK(basis.dim() == 4, op, ": basis must have shape [N, C, 2, D], got ", shape_of(basis));
  check_eps(op, eps);
  p.N = anchor.size(0), p.B = anchor.size(1), p.D = anchor.size(2), p.C = basis.size(1);
  p.squared = squared, p.eps = eps;
  p.anchor = batched_rows(anchor);
  check_shape(op, "factor", factor, {p.N, p.C, 3});
  return run_backward<TriangleAreaOp>(p, grad, anchor, basis, factor, need_anchor, need_others);
}

// ---- paired_gram_volume --------------------------------------------------------------------------------------------------------------------------------

Tensor paired_gram_volume(std::vector<Tensor> vectors, std::optional<Tensor> present, bool squared, double eps) {
  const PairedGramVolumeProblem p = check_paired_gram_volume(vectors, present, squared, eps);
  const Tensor& first = vectors[0];
  Tensor value = new_tensor(first, {p.N}, first.scalar_type());
  if (first.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(first.get_device_index());
    const Tensor workspace = new_workspace(first, cuda::paired_gram_volume_workspace(p));
    check_launch("paired_gram_volume", cuda::launch_paired_gram_volume(p, value.mutable_data_ptr(), workspace.mutable_data_ptr(),
                                                                      current_cuda_stream(first.get_device_index())));
#endif
  } else {
    cpu::gram_volume_kernels().paired_gram_volume(p, value.mutable_data_ptr(), kTorchParallel);
  }
  return value;
}

Tensor paired_gram_volume_bwd(const Tensor& grad, std::vector<Tensor> vectors, std::optional<Tensor> present, bool squared, double eps) {
  const PairedGramVolumeProblem p = check_paired_gram_volume(vectors, present, squared, eps);
  const Tensor& first = vectors[0];
  check_like("paired_gram_volume", "grad", grad, first, first.scalar_type());
  check_shape("paired_gram_volume", "grad", grad, {p.N});
  Tensor grad_vectors = new_tensor(first, {p.N, p.k, p.D}, first.scalar_type());
  if (first.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(first.get_device_index());
    const Tensor workspace = new_workspace(first, cuda::paired_gram_volume_workspace(p));
    check_launch("paired_gram_volume", cuda::launch_paired_gram_volume_bwd(p, grad.const_data_ptr(), grad.stride(0), grad_vectors.mutable_data_ptr(),
                                                                          workspace.mutable_data_ptr(), current_cuda_stream(first.get_device_index())));
#endif
  } else {
    cpu::gram_volume_kernels().paired_gram_volume_bwd(p, grad.const_data_ptr(), grad.stride(0), grad_vectors.mutable_data_ptr(), kTorchParallel);
  }
  return grad_vectors;
}

template <class Library>
void register_all(Library& m) {
  m.impl("gram_volume", TORCH_BOX(&gram_volume));
  m.impl("gram_volume_bwd", TORCH_BOX(&gram_volume_bwd));
  m.impl("triangle_area", TORCH_BOX(&triangle_area));
  m.impl("triangle_area_bwd", TORCH_BOX(&triangle_area_bwd));
  m.impl("paired_gram_volume", TORCH_BOX(&paired_gram_volume));
  m.impl("paired_gram_volume_bwd", TORCH_BOX(&paired_gram_volume_bwd));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modalign, m) {
  m.def("gram_volume(Tensor anchor, Tensor[] others, Tensor? present, bool squared, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("gram_volume_bwd(Tensor grad, Tensor anchor, Tensor basis, Tensor factor, bool squared, float eps, bool need_anchor, bool need_others) -> (Tensor, Tensor)");
  m.def("triangle_area(Tensor anchor, Tensor u, Tensor v, bool squared, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("triangle_area_bwd(Tensor grad, Tensor anchor, Tensor basis, Tensor factor, bool squared, float eps, bool need_anchor, bool need_others) -> (Tensor, Tensor)");
  m.def("paired_gram_volume(Tensor[] vectors, Tensor? present, bool squared, float eps) -> Tensor");
  m.def("paired_gram_volume_bwd(Tensor grad, Tensor[] vectors, Tensor? present, bool squared, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(modalign, CPU, m) { register_all(m); }
#ifdef MODALIGN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(modalign, CUDA, m) { register_all(m); }
#endif

namespace cpu {
namespace portable { extern const GramVolumeKernels kGramVolumeKernels; }
#ifdef MODALIGN_WITH_X86
namespace avx2 { extern const GramVolumeKernels kGramVolumeKernels; }
namespace avx512 { extern const GramVolumeKernels kGramVolumeKernels; }
#endif

const GramVolumeKernels& gram_volume_kernels() {
#ifdef MODALIGN_WITH_X86
  return Variants<GramVolumeKernels>{&portable::kGramVolumeKernels, &avx2::kGramVolumeKernels, &avx512::kGramVolumeKernels}.chosen();
#else
  return portable::kGramVolumeKernels;
#endif
}
}  // namespace cpu

}  // namespace modalign
