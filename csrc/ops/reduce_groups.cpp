// reduce_groups and spread_groups: schemas, one check, CPU and CUDA entry points. ops/reduce_groups.h says what the numbers are.
#include "ops/reduce_groups.h"

#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/stable.h"
#include "cpu/reduce_groups.h"
#ifdef MODALIGN_WITH_CUDA
#include "cuda/reduce_groups.h"
#endif
#include "ops/cuda_call.h"

namespace modalign {
namespace {

using Two = std::tuple<Tensor, Tensor>;

// Values are looked at on the CPU alone: on a GPU that would wait for it.
void check_values(const char* op, const Groups& groups) {
  for (std::int64_t g = 0; g <= groups.M; ++g)
    MODALIGN_CHECK(groups.offsets[g] >= (g ? groups.offsets[g - 1] : 0) && (g > 0 || groups.offsets[0] == 0) && (g < groups.M || groups.offsets[g] == groups.R), op,
                   ": offsets must rise from 0 to the number of rows ", groups.R, ", got ", groups.offsets[g], " at position ", g);
  std::vector<bool> seen(static_cast<std::size_t>(groups.R), false);
  for (std::int64_t k = 0; k < groups.R; ++k) {
    const std::int64_t row = groups.members[k];
    MODALIGN_CHECK(row >= 0 && row < groups.R && !seen[row], op, ": members must hold every row once, got ", row, " at position ", k);
    seen[row] = true;
  }
}

GroupsProblem check(const char* op, const Tensor& from, std::int64_t rows, const Tensor& members, const Tensor& offsets, const std::optional<Tensor>& weight, std::int64_t mode, bool spread) {
  GroupsProblem p{};
  p.dtype = check_floating(op, spread ? "y" : "x", from);
  MODALIGN_CHECK(from.dim() == 2, op, ": the rows must have shape [rows, C], got ", shape_of(from));
  MODALIGN_CHECK(mode >= 0 && mode <= (spread ? 1 : 2), op, ": mode must be 0", spread ? " or 1" : ", 1 or 2", ", got ", mode);
  check_like(op, "members", members, from, ScalarType::Int);
  check_like(op, "offsets", offsets, from, ScalarType::Int);
  check_shape(op, "members", members, {rows});
  MODALIGN_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, op, ": offsets must have shape [groups + 1], got ", shape_of(offsets));
  MODALIGN_CHECK(members.is_contiguous() && offsets.is_contiguous(), op, ": members and offsets must be contiguous, got strided ones");
  if (spread) check_shape(op, "y", from, {offsets.size(0) - 1, from.size(1)});
  if (weight) {
    check_like(op, "weight", *weight, from, accumulation_type(from.scalar_type()));
    check_shape(op, "weight", *weight, {rows});
    MODALIGN_CHECK(weight->is_contiguous(), op, ": weight must be contiguous, got a strided one");
  }
  p.C = from.size(1), p.mode = static_cast<GroupMode>(mode);
  p.from = {from.const_data_ptr(), 0, from.stride(0), from.stride(1)};
  p.groups = {rows, offsets.size(0) - 1, static_cast<const std::int32_t*>(members.const_data_ptr()), static_cast<const std::int32_t*>(offsets.const_data_ptr()),
              weight ? weight->const_data_ptr() : nullptr};
  if (!from.is_cuda()) check_values(op, p.groups);
  return p;
}

Two reduce_groups(const Tensor& x, const Tensor& members, const Tensor& offsets, const std::optional<Tensor>& weight, std::int64_t mode) {
  constexpr const char* op = "reduce_groups";
  const GroupsProblem p = check(op, x, x.dim() ? x.size(0) : 0, members, offsets, weight, mode, false);
  Tensor out = new_tensor(x, {p.groups.M, p.C}, x.scalar_type()), total = new_tensor(x, {p.groups.M}, accumulation_type(x.scalar_type()));
  const GroupsResult to{out.mutable_data_ptr(), total.mutable_data_ptr()};
  if (x.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(x.get_device_index());
    check_launch(op, cuda::launch_reduce_groups(p, to, current_cuda_stream(x.get_device_index())));
#endif
  } else {
    cpu::group_kernels().reduce(p, to, kTorchParallel);
  }
  return {out, total};
}

Tensor spread_groups(const Tensor& y, const Tensor& members, const Tensor& offsets, const std::optional<Tensor>& weight, std::int64_t mode) {
  constexpr const char* op = "spread_groups";
  const GroupsProblem p = check(op, y, members.dim() ? members.size(0) : 0, members, offsets, weight, mode, true);
  Tensor out = new_tensor(y, {p.groups.R, p.C}, y.scalar_type());
  const GroupsResult to{out.mutable_data_ptr(), nullptr};
  if (y.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(y.get_device_index());
    check_launch(op, cuda::launch_spread_groups(p, to, current_cuda_stream(y.get_device_index())));
#endif
  } else {
    cpu::group_kernels().spread(p, to, kTorchParallel);
  }
  return out;
}

template <class Library>
void register_all(Library& m) {
  m.impl("reduce_groups", TORCH_BOX(&reduce_groups));
  m.impl("spread_groups", TORCH_BOX(&spread_groups));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modalign, m) {
  m.def("reduce_groups(Tensor x, Tensor members, Tensor offsets, Tensor? weight, int mode) -> (Tensor, Tensor)");
  m.def("spread_groups(Tensor y, Tensor members, Tensor offsets, Tensor? weight, int mode) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(modalign, CPU, m) { register_all(m); }
#ifdef MODALIGN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(modalign, CUDA, m) { register_all(m); }
#endif

namespace cpu {
namespace portable { extern const GroupKernels kGroupKernels; }
#ifdef MODALIGN_WITH_X86
namespace avx2 { extern const GroupKernels kGroupKernels; }
namespace avx512 { extern const GroupKernels kGroupKernels; }
#endif

const GroupKernels& group_kernels() {
#ifdef MODALIGN_WITH_X86
  return Variants<GroupKernels>{&portable::kGroupKernels, &avx2::kGroupKernels, &avx512::kGroupKernels}.chosen();
#else
  return portable::kGroupKernels;
#endif
}
}  // namespace cpu

}  // namespace modalign
