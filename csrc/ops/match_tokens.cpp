// match_tokens: schema, one check, CPU and CUDA entry points. ops/match_tokens.h says what the numbers are.
#include "ops/match_tokens.h"

#include <optional>
#include <tuple>

#include "common/check.h"
#include "common/stable.h"
#include "cpu/match_tokens.h"
#ifdef MODALIGN_WITH_CUDA
#include "cuda/match_tokens.h"
#endif
#include "ops/cuda_call.h"

namespace modalign {
namespace {

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr const char* kOp = "match_tokens";

// Values are looked at on the CPU alone: on a GPU that would wait for it.
void check_lengths(const MatchProblem& p) {
  MODALIGN_CHECK(p.cu[0] == 0 && p.cu[p.B] == p.T, kOp, ": cu_seqlens must rise from 0 to the number of tokens ", p.T, ", got ", p.cu[0], " to ", p.cu[p.B]);
  for (std::int64_t b = 0; b < p.B; ++b)
    MODALIGN_CHECK(p.cu[b + 1] >= p.cu[b] && p.cu[b + 1] - p.cu[b] <= p.longest, kOp, ": cu_seqlens must rise by at most longest = ", p.longest, ", got ", p.cu[b + 1] - p.cu[b],
                   " at position ", b);
}

MatchProblem check(const Tensor& features, const std::optional<Tensor>& cu_seqlens, std::int64_t longest, std::int64_t first, std::int64_t split, std::int64_t r, const std::optional<double>& threshold,
                   bool keep_order) {
  MatchProblem p{};
  p.dtype = check_floating(kOp, "features", features);
  MODALIGN_CHECK(features.dim() == 3, kOp, ": features must have shape [B, N, D], got ", shape_of(features));
  MODALIGN_CHECK(first >= 0 && r >= 0, kOp, ": protected and r must be 0 or more, got ", first, " and ", r);
  p.T = features.size(0) * features.size(1), p.D = features.size(2);
  MODALIGN_CHECK(p.T <= kMaxTokens, kOp, ": features must have fewer than 2^31 tokens, got ", p.T);
  p.B = features.size(0), p.longest = features.size(1);
  if (cu_seqlens) {
    check_like(kOp, "cu_seqlens", *cu_seqlens, features, ScalarType::Int);
    MODALIGN_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1 && cu_seqlens->is_contiguous(), kOp, ": cu_seqlens must be contiguous of shape [items + 1], got ", shape_of(*cu_seqlens));
    MODALIGN_CHECK(features.size(0) == 1, kOp, ": features of packed items must have shape [1, T, D], got ", shape_of(features));
    p.B = cu_seqlens->size(0) - 1, p.longest = longest;
    p.cu = static_cast<const std::int32_t*>(cu_seqlens->const_data_ptr());
    if (!features.is_cuda()) check_lengths(p);
  }
  p.features = {features.const_data_ptr(), features.stride(0), features.stride(1), features.stride(2)};
  p.first = first, p.split = split, p.r = r, p.keep_order = keep_order;
  p.has_threshold = threshold.has_value(), p.threshold = threshold.value_or(0);
  return p;
}

Five match_tokens(const Tensor& features, const std::optional<Tensor>& cu_seqlens, std::int64_t longest, std::int64_t first, std::int64_t split, std::int64_t r, const std::optional<double>& threshold,
                  bool keep_order) {
  const MatchProblem p = check(features, cu_seqlens, longest, first, split, r, threshold, keep_order);
  const auto ints = [&](std::int64_t n) { return new_tensor(features, {n}, ScalarType::Int); };
  Tensor score = new_tensor(features, {p.T}, accumulation_type(features.scalar_type())), group = ints(p.T), members = ints(p.T), offsets = ints(p.T + 1), cu = ints(p.B + 1);
  const auto data = [](Tensor& t) { return static_cast<std::int32_t*>(t.mutable_data_ptr()); };
  const MatchResult to{score.mutable_data_ptr(), data(group), data(members), data(offsets), data(cu)};
  if (features.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(features.get_device_index());
    const Tensor workspace = new_workspace(features, cuda::match_tokens_workspace(p));
    check_launch(kOp, cuda::launch_match_tokens(p, to, workspace.mutable_data_ptr(), current_cuda_stream(features.get_device_index())));
#endif
  } else {
    const cpu::MatchKernels& kernels = cpu::match_kernels();
    const Tensor workspace = new_workspace(features, kernels.workspace(p));
    kernels.match(p, to, workspace.mutable_data_ptr(), kTorchParallel);
  }
  return {score, group, members, offsets, cu};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modalign, m) {
  m.def("match_tokens(Tensor features, Tensor? cu_seqlens, int longest, int first, int split, int r, float? threshold, bool keep_order) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(modalign, CPU, m) { m.impl("match_tokens", TORCH_BOX(&match_tokens)); }
#ifdef MODALIGN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(modalign, CUDA, m) { m.impl("match_tokens", TORCH_BOX(&match_tokens)); }
#endif

namespace cpu {
namespace portable { extern const MatchKernels kMatchKernels; }
#ifdef MODALIGN_WITH_X86
namespace avx2 { extern const MatchKernels kMatchKernels; }
namespace avx512 { extern const MatchKernels kMatchKernels; }
#endif

const MatchKernels& match_kernels() {
#ifdef MODALIGN_WITH_X86
  return Variants<MatchKernels>{&portable::kMatchKernels, &avx2::kMatchKernels, &avx512::kMatchKernels}.chosen();
#else
  return portable::kMatchKernels;
#endif
}
}  // namespace cpu

}  // namespace modalign
