// select_diverse: schema, one check, CPU entry point. ops/select_diverse.h says what the numbers are.
#include "ops/select_diverse.h"

#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/stable.h"
#include "cpu/select_diverse.h"

namespace modalign {
namespace {

using Two = std::tuple<Tensor, Tensor>;

constexpr const char* kOp = "select_diverse";

// Values are looked at on the CPU alone: on a GPU that would wait for it.
void check_values(const DiverseProblem& p) {
  std::vector<bool> seen(static_cast<std::size_t>(p.N));
  for (std::int64_t b = 0; b < p.B; ++b) {
    const std::int64_t tokens = p.lengths ? p.lengths[b] : p.N;
    MODALIGN_CHECK(tokens >= p.n && tokens <= p.N, kOp, ": lengths must be from n = ", p.n, " to N = ", p.N, ", got ", tokens, " of item ", b);
    seen.assign(seen.size(), false);
    for (std::int64_t k = 0; k < p.starts; ++k) {
      const std::int64_t token = p.start[b * p.starts + k];
      MODALIGN_CHECK(token >= 0 && token < tokens && !seen[token], kOp, ": start must hold different tokens below ", tokens, ", got ", token, " of item ", b);
      seen[token] = true;
    }
  }
}

DiverseProblem check(const Tensor& features, const std::optional<Tensor>& lengths, const std::optional<Tensor>& start, std::int64_t n) {
  DiverseProblem p{};
  p.dtype = check_floating(kOp, "features", features);
  MODALIGN_CHECK(features.dim() == 3, kOp, ": features must have shape [B, N, D], got ", shape_of(features));
  p.B = features.size(0), p.N = features.size(1), p.D = features.size(2), p.n = n;
  MODALIGN_CHECK(p.N <= kMaxDiverseTokens, kOp, ": features must have fewer than 2^31 tokens an item, got ", p.N);
  MODALIGN_CHECK(n >= 0 && n <= p.N, kOp, ": n must be from 0 to N = ", p.N, ", got ", n);
  p.features = {features.const_data_ptr(), features.stride(0), features.stride(1), features.stride(2)};
  if (lengths) {
    check_like(kOp, "lengths", *lengths, features, ScalarType::Long);
    check_shape(kOp, "lengths", *lengths, {p.B});
    MODALIGN_CHECK(lengths->is_contiguous(), kOp, ": lengths must be contiguous, got a strided one");
    p.lengths = static_cast<const std::int64_t*>(lengths->const_data_ptr());
  }
  if (start) {
    check_like(kOp, "start", *start, features, ScalarType::Long);
    MODALIGN_CHECK(start->dim() == 2 && start->is_contiguous(), kOp, ": start must be contiguous of shape [B, starts], got ", shape_of(*start));
    check_shape(kOp, "start", *start, {p.B, start->size(1)});
    MODALIGN_CHECK(start->size(1) <= n, kOp, ": start must have at most n = ", n, " tokens, got ", start->size(1));
    p.start = static_cast<const std::int64_t*>(start->const_data_ptr()), p.starts = start->size(1);
  }
  if (!features.is_cuda()) check_values(p);
  return p;
}

Two select_diverse(const Tensor& features, const std::optional<Tensor>& lengths, const std::optional<Tensor>& start, std::int64_t n, std::int64_t workspace_bytes) {
  const DiverseProblem p = check(features, lengths, start, n);
  MODALIGN_CHECK(workspace_bytes >= 0, kOp, ": workspace_bytes must be 0 or more, got ", workspace_bytes);
  Tensor indices = new_tensor(features, {p.B, n}, ScalarType::Long), radii = new_tensor(features, {p.B, n}, accumulation_type(features.scalar_type()));
  const DiverseResult to{static_cast<std::int64_t*>(indices.mutable_data_ptr()), radii.mutable_data_ptr()};
  if (n > 0 && p.B > 0) {
    const cpu::DiverseKernels& kernels = cpu::diverse_kernels();
    const cpu::DiverseWorkspace space = kernels.workspace(p, workspace_bytes);
    const Tensor workspace = new_workspace(features, space.bytes), cosines = new_workspace(features, space.cosine_bytes);
    kernels.select(p, to, workspace_bytes, workspace.mutable_data_ptr(), cosines.mutable_data_ptr(), kTorchParallel);
  }
  return {indices, radii};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modalign, m) { m.def("select_diverse(Tensor features, Tensor? lengths, Tensor? start, int n, int workspace_bytes) -> (Tensor, Tensor)"); }

STABLE_TORCH_LIBRARY_IMPL(modalign, CPU, m) { m.impl("select_diverse", TORCH_BOX(&select_diverse)); }

namespace cpu {
namespace portable { extern const DiverseKernels kDiverseKernels; }
#ifdef MODALIGN_WITH_X86
namespace avx2 { extern const DiverseKernels kDiverseKernels; }
namespace avx512 { extern const DiverseKernels kDiverseKernels; }
#endif

const DiverseKernels& diverse_kernels() {
#ifdef MODALIGN_WITH_X86
  return Variants<DiverseKernels>{&portable::kDiverseKernels, &avx2::kDiverseKernels, &avx512::kDiverseKernels}.chosen();
#else
  return portable::kDiverseKernels;
#endif
}
}  // namespace cpu

}  // namespace modalign
