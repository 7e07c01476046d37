// dynamic_mask_ends, dynamic_mask_kept: which keys dynamic_mask_attention keeps for which queries; the attention itself is masked_attention. cpu/dynamic_mask.h says what the numbers are.
#include "common/check.h"
#include "common/stable.h"
#include "cpu/dynamic_mask.h"
#include "cpu/parallel.h"
#ifdef MODALIGN_WITH_CUDA
#include "cuda/dynamic_mask.h"
#endif
#include "ops/cuda_call.h"

namespace modalign {
namespace {

constexpr const char* kOp = "dynamic_mask_attention";

Scalar check(const Tensor& scores, std::int64_t dimensions, std::int64_t keep) {
  const Scalar dtype = check_floating(kOp, "bias", scores);
  MODALIGN_CHECK(dtype == Scalar::f32 || dtype == Scalar::f64, kOp, ": bias must be float32 or float64 here, got a half type");
  MODALIGN_CHECK(scores.dim() == dimensions && scores.is_contiguous(), kOp, ": bias must be contiguous with ", dimensions, " dimensions here, got ", shape_of(scores));
  MODALIGN_CHECK(keep >= 1, kOp, ": keep must be 1 or more, got ", keep);
  return dtype;
}

// f(scores of a line, its number) for all lines of N scores, in parallel.
template <class F>
void for_each_line(const Tensor& scores, std::int64_t dimensions, std::int64_t keep, const F& f) {
  const Scalar dtype = check(scores, dimensions, keep);
  const std::int64_t N = scores.size(dimensions - 1), lines = N > 0 ? scores.numel() / N : 0;
  const auto run = [&](auto real) {
    using Real = decltype(real);
    const Real* from = static_cast<const Real*>(scores.const_data_ptr());
    for (std::int64_t n = 0; n < lines * N; ++n) MODALIGN_CHECK(from[n] == from[n], kOp, ": bias must not hold NaN, got one for key ", n % N);
    cpu::parallel_for(kTorchParallel, 0, lines, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t n = begin; n < end; ++n) f(from + n * N, n);
    });
  };
  if (dtype == Scalar::f64) run(double());
  else run(float());
}

Tensor dynamic_mask_ends(const Tensor& scores, std::int64_t keep) {
  [[maybe_unused]] const Scalar dtype = check(scores, 3, keep);
  const std::int64_t N = scores.size(2), most = keep < N ? keep : N;
  Tensor ends = new_tensor(scores, {scores.size(0), scores.size(1), N}, ScalarType::Int);
#ifdef MODALIGN_WITH_CUDA
  if (scores.is_cuda()) {
    const DeviceGuard device(scores.get_device_index());
    check_launch(kOp, cuda::launch_dynamic_mask_ends(dtype, scores.const_data_ptr(), scores.size(0) * scores.size(1), N, keep, static_cast<std::int32_t*>(ends.mutable_data_ptr()),
                                                     current_cuda_stream(scores.get_device_index())));
    return ends;
  }
#endif
  const Tensor heaps = new_tensor(scores, {scores.size(0) * scores.size(1), most}, ScalarType::Int);
  auto *to = static_cast<std::int32_t*>(ends.mutable_data_ptr()), *heap = static_cast<std::int32_t*>(heaps.mutable_data_ptr());
  for_each_line(scores, 3, keep, [&](const auto* line, std::int64_t n) { cpu::dynamic_mask_ends(line, N, most, to + n * N, heap + n * most); });
  return ends;
}

// Every query its own scores [B, H, Nq, Nk]: a matrix of pairs. causal: query i chooses among the keys up to i + Nk - Nq.
Tensor dynamic_mask_kept(const Tensor& scores, std::int64_t keep, bool causal) {
  MODALIGN_CHECK(scores.dim() == 4, kOp, ": bias must have shape [B, H, Nq, Nk], got ", shape_of(scores));
  const std::int64_t Nq = scores.size(2), Nk = scores.size(3), most = keep < Nk ? keep : Nk;
  Tensor kept = new_tensor(scores, {scores.size(0), scores.size(1), Nq, Nk}, ScalarType::Bool);
  const Tensor numbers = new_tensor(scores, {scores.size(0) * scores.size(1) * Nq, Nk + most}, ScalarType::Int);
  auto* to = static_cast<bool*>(kept.mutable_data_ptr());
  auto* ends = static_cast<std::int32_t*>(numbers.mutable_data_ptr());
  for_each_line(scores, 4, keep, [&](const auto* line, std::int64_t n) {
    const std::int64_t seen = causal ? n % Nq + Nk - Nq + 1 : Nk, count = seen < 0 ? 0 : seen;
    std::int32_t* const own = ends + n * (Nk + most);
    cpu::dynamic_mask_ends(line, count, most, own, own + Nk);
    for (std::int64_t j = 0; j < Nk; ++j) to[n * Nk + j] = j < count && own[j] == count;
  });
  return kept;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modalign, m) {
  m.def("dynamic_mask_ends(Tensor scores, int keep) -> Tensor");
  m.def("dynamic_mask_kept(Tensor scores, int keep, bool causal) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(modalign, CPU, m) {
  m.impl("dynamic_mask_ends", TORCH_BOX(&dynamic_mask_ends));
  m.impl("dynamic_mask_kept", TORCH_BOX(&dynamic_mask_kept));
}

#ifdef MODALIGN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(modalign, CUDA, m) { m.impl("dynamic_mask_ends", TORCH_BOX(&dynamic_mask_ends)); }
#endif

}  // namespace modalign
