// segment_max_similarity: schema, one check, CPU and CUDA entry points. ops/segment_max_similarity.h says what the numbers are.
#include "ops/segment_max_similarity.h"

#include <tuple>

#include "common/check.h"
#include "common/stable.h"
#include "cpu/segment_max_similarity.h"
#ifdef MODALIGN_WITH_CUDA
#include "cuda/segment_max_similarity.h"
#endif
#include "ops/cuda_call.h"

namespace modalign {
namespace {

using Two = std::tuple<Tensor, Tensor>;

constexpr const char* kOp = "segment_max_similarity";

BatchedRows rows_of(const Tensor& t) { return {t.const_data_ptr(), 0, t.stride(0), t.stride(1)}; }

// Values are looked at on the CPU alone: on a GPU that would wait for it.
void check_offsets(const SegmentMaxProblem& p) {
  std::int64_t before = 0;
  for (std::int64_t s = 0; s <= p.S; ++s) {
    const std::int64_t here = p.offsets.data[s * p.offsets.stride];
    MODALIGN_CHECK(here >= before && here <= p.R && (s > 0 || here == 0) && (s < p.S || here == p.R), kOp, ": offsets must rise from 0 to R = ", p.R, ", got ", here,
                   " at position ", s);
    before = here;
  }
}

void check_indices(const SegmentMaxProblem& p, const std::int64_t* indices) {
  for (std::int64_t s = 0; s < p.S; ++s) {
    const std::int64_t first = p.offsets.data[s * p.offsets.stride], last = p.offsets.data[(s + 1) * p.offsets.stride];
    for (std::int64_t a = 0; a < p.A; ++a) {
      const std::int64_t r = indices[s * p.A + a];
      MODALIGN_CHECK(r == -1 || (r >= first && r < last), kOp, ": indices must be rows of their segment or -1, got ", r, " in segment ", s);
    }
  }
}

SegmentMaxProblem check(const Tensor& x, const Tensor& offsets, const Tensor& y) {
  SegmentMaxProblem p{};
  p.dtype = check_floating(kOp, "x", x);
  MODALIGN_CHECK(x.dim() == 2, kOp, ": x must have shape [R, D], got ", shape_of(x));
  MODALIGN_CHECK(x.size(0) <= kMaxSegmentRows, kOp, ": x must have fewer than 2^31 rows, got ", x.size(0));
  check_like(kOp, "y", y, x, x.scalar_type());
  MODALIGN_CHECK(y.dim() == 2, kOp, ": y must have shape [A, D], got ", shape_of(y));
  check_shape(kOp, "y", y, {y.size(0), x.size(1)});
  check_like(kOp, "offsets", offsets, x, ScalarType::Long);
  MODALIGN_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, kOp, ": offsets must have shape [S + 1], got ", shape_of(offsets));
  MODALIGN_CHECK(offsets.size(0) <= kMaxSegmentRows, kOp, ": offsets must have fewer than 2^31 entries, got ", offsets.size(0));
  p.R = x.size(0), p.D = x.size(1), p.A = y.size(0), p.S = offsets.size(0) - 1;
  p.x = rows_of(x), p.y = rows_of(y);
  p.offsets = {static_cast<const std::int64_t*>(offsets.const_data_ptr()), offsets.stride(0)};
  if (!x.is_cuda()) check_offsets(p);
  return p;
}

Two segment_max_similarity(const Tensor& x, const Tensor& offsets, const Tensor& y) {
  const SegmentMaxProblem p = check(x, offsets, y);
  Tensor values = new_tensor(x, {p.S, p.A}, x.scalar_type()), indices = new_tensor(x, {p.S, p.A}, ScalarType::Long);
  const SegmentMaxForward to{values.mutable_data_ptr(), static_cast<std::int64_t*>(indices.mutable_data_ptr())};
  if (x.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(x.get_device_index());
    const Tensor workspace = new_workspace(x, cuda::segment_max_similarity_workspace(p));
    check_launch(kOp, cuda::launch_segment_max_similarity(p, to, workspace.mutable_data_ptr(), current_cuda_stream(x.get_device_index())));
#endif
  } else {
    const cpu::SegmentMaxKernels& kernels = cpu::segment_max_kernels();
    const Tensor workspace = new_workspace(x, kernels.workspace(p));
    kernels.forward(p, to, workspace.mutable_data_ptr(), kTorchParallel);
  }
  return {values, indices};
}

Two segment_max_similarity_bwd(const Tensor& grad, const Tensor& indices, const Tensor& x, const Tensor& offsets, const Tensor& y, bool need_x, bool need_y) {
  const SegmentMaxProblem p = check(x, offsets, y);
  check_like(kOp, "grad", grad, x, x.scalar_type());
  check_shape(kOp, "grad", grad, {p.S, p.A});
  check_like(kOp, "indices", indices, x, ScalarType::Long);
  check_shape(kOp, "indices", indices, {p.S, p.A});
  MODALIGN_CHECK(indices.is_contiguous(), kOp, ": indices must be contiguous, got a strided one");
  Tensor grad_x = need_x ? new_tensor(x, {p.R, p.D}, x.scalar_type()) : new_tensor(x, {0}, x.scalar_type());
  Tensor grad_y = need_y ? new_tensor(x, {p.A, p.D}, x.scalar_type()) : new_tensor(x, {0}, x.scalar_type());
  const SegmentMaxBackward to{grad.const_data_ptr(),
                              grad.stride(0),
                              grad.stride(1),
                              static_cast<const std::int64_t*>(indices.const_data_ptr()),
                              need_x ? grad_x.mutable_data_ptr() : nullptr,
                              need_y ? grad_y.mutable_data_ptr() : nullptr};
  if (x.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(x.get_device_index());
    check_launch(kOp, cuda::launch_segment_max_similarity_bwd(p, to, current_cuda_stream(x.get_device_index())));
#endif
  } else {
    check_indices(p, to.indices);
    const cpu::SegmentMaxKernels& kernels = cpu::segment_max_kernels();
    const Tensor workspace = new_workspace(x, kernels.bwd_workspace(p, need_x, need_y));
    kernels.backward(p, to, workspace.mutable_data_ptr(), kTorchParallel);
  }
  return {grad_x, grad_y};
}

template <class Library>
void register_all(Library& m) {
  m.impl("segment_max_similarity", TORCH_BOX(&segment_max_similarity));
  m.impl("segment_max_similarity_bwd", TORCH_BOX(&segment_max_similarity_bwd));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modalign, m) {
  m.def("segment_max_similarity(Tensor x, Tensor offsets, Tensor y) -> (Tensor, Tensor)");
  m.def("segment_max_similarity_bwd(Tensor grad, Tensor indices, Tensor x, Tensor offsets, Tensor y, bool need_x, bool need_y) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(modalign, CPU, m) { register_all(m); }
#ifdef MODALIGN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(modalign, CUDA, m) { register_all(m); }
#endif

namespace cpu {
namespace portable { extern const SegmentMaxKernels kSegmentMaxKernels; }
#ifdef MODALIGN_WITH_X86
namespace avx2 { extern const SegmentMaxKernels kSegmentMaxKernels; }
namespace avx512 { extern const SegmentMaxKernels kSegmentMaxKernels; }
#endif

const SegmentMaxKernels& segment_max_kernels() {
#ifdef MODALIGN_WITH_X86
  return Variants<SegmentMaxKernels>{&portable::kSegmentMaxKernels, &avx2::kSegmentMaxKernels, &avx512::kSegmentMaxKernels}.chosen();
#else
  return portable::kSegmentMaxKernels;
#endif
}
}  // namespace cpu

}  // namespace modalign
