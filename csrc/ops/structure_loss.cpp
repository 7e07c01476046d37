// structure_loss: schema, one check, CPU and CUDA entry points. ops/structure_loss.h says what the numbers are.
#include "ops/structure_loss.h"

#include <tuple>

#include "common/check.h"
#include "common/stable.h"
#include "cpu/structure_loss.h"
#ifdef MODALIGN_WITH_CUDA
#include "cuda/structure_loss.h"
#endif
#include "ops/cuda_call.h"

namespace modalign {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

constexpr const char* kOp = "structure_loss";

BatchedRows rows_of(const Tensor& t) { return {t.const_data_ptr(), 0, t.stride(0), t.stride(1)}; }

StructureProblem check(const Tensor& x, const Tensor& y, bool released) {
  StructureProblem p{};
  p.dtype = check_floating(kOp, "x", x);
  MODALIGN_CHECK(p.dtype == Scalar::f32 || p.dtype == Scalar::f64, kOp, ": x must be float32 or float64, got a half type");
  MODALIGN_CHECK(x.dim() == 2, kOp, ": x must have shape [B, D], got ", shape_of(x));
  check_like(kOp, "y", y, x, x.scalar_type());
  MODALIGN_CHECK(y.dim() == 2, kOp, ": y must have shape [B, D], got ", shape_of(y));
  check_shape(kOp, "y", y, {x.size(0), y.size(1)});
  p.B = x.size(0), p.Dx = x.size(1), p.Dy = y.size(1);
  p.x = rows_of(x), p.y = rows_of(y);
  p.released = released;
  return p;
}

Three structure_loss(const Tensor& x, const Tensor& y, bool released, std::int64_t workspace_bytes) {
  const StructureProblem p = check(x, y, released);
  const std::int64_t size = structure_products_size(p.B), keep = size * size_of(p.dtype) <= workspace_bytes ? size : 0;
  Tensor loss = new_tensor(x, {p.B}, x.scalar_type()), statistics = new_tensor(x, {4, p.B}, ScalarType::Double), products = new_tensor(x, {keep}, x.scalar_type());
  const StructureForward to{loss.mutable_data_ptr(), static_cast<double*>(statistics.mutable_data_ptr()), keep ? products.mutable_data_ptr() : nullptr};
  if (x.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(x.get_device_index());
    const Tensor workspace = new_workspace(x, cuda::structure_loss_workspace(p, keep != 0));
    check_launch(kOp, cuda::launch_structure_loss(p, to, workspace.mutable_data_ptr(), current_cuda_stream(x.get_device_index())));
#endif
  } else {
    const cpu::StructureKernels& kernels = cpu::structure_kernels();
    const Tensor workspace = new_workspace(x, kernels.workspace(p));
    kernels.forward(p, to, workspace.mutable_data_ptr(), kTorchParallel);
  }
  return {loss, statistics, products};
}

Two structure_loss_bwd(const Tensor& grad, const Tensor& statistics, const Tensor& products, const Tensor& x, const Tensor& y, bool released, bool need_x, bool need_y) {
  const StructureProblem p = check(x, y, released);
  check_like(kOp, "grad", grad, x, x.scalar_type());
  check_shape(kOp, "grad", grad, {p.B});
  check_like(kOp, "statistics", statistics, x, ScalarType::Double);
  check_shape(kOp, "statistics", statistics, {4, p.B});
  check_like(kOp, "products", products, x, x.scalar_type());
  if (products.numel()) check_shape(kOp, "products", products, {structure_products_size(p.B)});
  MODALIGN_CHECK(statistics.is_contiguous() && products.is_contiguous(), kOp, ": statistics and products must be contiguous, got a strided one");
  Tensor grad_x = need_x ? new_tensor(x, {p.B, p.Dx}, x.scalar_type()) : new_tensor(x, {0}, x.scalar_type());
  Tensor grad_y = need_y ? new_tensor(x, {p.B, p.Dy}, x.scalar_type()) : new_tensor(x, {0}, x.scalar_type());
  const StructureBackward to{grad.const_data_ptr(),
                             grad.stride(0),
                             static_cast<const double*>(statistics.const_data_ptr()),
                             products.numel() ? products.const_data_ptr() : nullptr,
                             need_x ? grad_x.mutable_data_ptr() : nullptr,
                             need_y ? grad_y.mutable_data_ptr() : nullptr};
  if (x.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(x.get_device_index());
    const Tensor workspace = new_workspace(x, cuda::structure_loss_bwd_workspace(p, to));
    check_launch(kOp, cuda::launch_structure_loss_bwd(p, to, workspace.mutable_data_ptr(), current_cuda_stream(x.get_device_index())));
#endif
  } else {
    const cpu::StructureKernels& kernels = cpu::structure_kernels();
    const Tensor workspace = new_workspace(x, kernels.bwd_workspace(p, to));
    kernels.backward(p, to, workspace.mutable_data_ptr(), kTorchParallel);
  }
  return {grad_x, grad_y};
}

template <class Library>
void register_all(Library& m) {
  m.impl("structure_loss", TORCH_BOX(&structure_loss));
  m.impl("structure_loss_bwd", TORCH_BOX(&structure_loss_bwd));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modalign, m) {
  m.def("structure_loss(Tensor x, Tensor y, bool released, int workspace_bytes) -> (Tensor, Tensor, Tensor)");
  m.def("structure_loss_bwd(Tensor grad, Tensor statistics, Tensor products, Tensor x, Tensor y, bool released, bool need_x, bool need_y) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(modalign, CPU, m) { register_all(m); }
#ifdef MODALIGN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(modalign, CUDA, m) { register_all(m); }
#endif

namespace cpu {
namespace portable { extern const StructureKernels kStructureKernels; }
#ifdef MODALIGN_WITH_X86
namespace avx2 { extern const StructureKernels kStructureKernels; }
namespace avx512 { extern const StructureKernels kStructureKernels; }
#endif

const StructureKernels& structure_kernels() {
#ifdef MODALIGN_WITH_X86
  return Variants<StructureKernels>{&portable::kStructureKernels, &avx2::kStructureKernels, &avx512::kStructureKernels}.chosen();
#else
  return portable::kStructureKernels;
#endif
}
}  // namespace cpu

}  // namespace modalign
