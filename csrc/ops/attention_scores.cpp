// attention_column_sum and attention_row_statistics: schemas, CPU and CUDA entry points. ops/attention_scores.h says what the numbers are.
#include "ops/attention_scores.h"

#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "cpu/attention_scores.h"
#ifdef MODALIGN_WITH_CUDA
#include "cuda/attention_scores.h"
#endif
#include "ops/attention_arguments.h"
#include "ops/cuda_call.h"

namespace modalign {
namespace {

using Optional = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;

AttentionProblem check(const char* op, const Tensor& query, const Tensor& key, const Tensor& lse, const Optional& bias, const Optional& key_lengths, std::int64_t causal, double scale, double cap,
                       const std::vector<Tensor>& mask_tensors, const std::vector<std::int64_t>& mask_steps) {
  const Optional none;
  const AttentionProblem p = check_attention({op, query, key, key, bias, key_lengths, none, none, 0, 0, causal, scale, cap, mask_tensors, mask_steps});
  check_like(op, "lse", lse, query, accumulation_type(query.scalar_type()));
  check_shape(op, "lse", lse, {p.B, p.H, p.Nq});
  MODALIGN_CHECK(lse.is_contiguous(), op, ": lse must be contiguous, got a strided one");
  return p;
}

Tensor attention_column_sum(const Tensor& query, const Tensor& key, const Tensor& lse, const Tensor& weights, const Optional& bias, const Optional& key_lengths, std::int64_t causal, double scale,
                            double cap, std::vector<Tensor> mask_tensors, std::vector<std::int64_t> mask_steps, std::int64_t reduction) {
  constexpr const char* op = "attention_column_sum";
  const AttentionProblem p = check(op, query, key, lse, bias, key_lengths, causal, scale, cap, mask_tensors, mask_steps);
  const ScalarType real = accumulation_type(query.scalar_type());
  check_like(op, "weights", weights, query, real);
  check_shape(op, "weights", weights, {p.B, p.H, p.Nq});
  MODALIGN_CHECK(reduction >= 0 && reduction <= 3, op, ": reduction must be 0 to 3, got ", reduction);
  Tensor out = new_tensor(query, {p.B, p.H, p.Nk}, real);
  const AttentionColumns to{static_cast<ColumnReduction>(reduction), lse.const_data_ptr(), {weights.const_data_ptr(), weights.stride(0), weights.stride(1), weights.stride(2)}, out.mutable_data_ptr()};
  if (query.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(query.get_device_index());
    const Tensor workspace = new_workspace(query, cuda::attention_scores_workspace(p));
    check_launch(op, cuda::launch_attention_columns(p, to, workspace.mutable_data_ptr(), current_cuda_stream(query.get_device_index())));
#endif
  } else {
    const cpu::AttentionScoreKernels& kernels = cpu::attention_score_kernels();
    const Tensor workspace = new_workspace(query, kernels.columns_workspace(p));
    kernels.columns(p, to, workspace.mutable_data_ptr(), kTorchParallel);
  }
  return out;
}

Two attention_row_statistics(const Tensor& query, const Tensor& key, const Tensor& lse, const Optional& bias, const Optional& key_lengths, std::int64_t causal, double scale, double cap,
                             std::vector<Tensor> mask_tensors, std::vector<std::int64_t> mask_steps) {
  constexpr const char* op = "attention_row_statistics";
  const AttentionProblem p = check(op, query, key, lse, bias, key_lengths, causal, scale, cap, mask_tensors, mask_steps);
  const ScalarType real = accumulation_type(query.scalar_type());
  Tensor entropy = new_tensor(query, {p.B, p.H, p.Nq}, real), maximum = new_tensor(query, {p.B, p.H, p.Nq}, real);
  const AttentionRowStatistics to{lse.const_data_ptr(), entropy.mutable_data_ptr(), maximum.mutable_data_ptr()};
  if (query.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(query.get_device_index());
    const Tensor workspace = new_workspace(query, cuda::attention_scores_workspace(p));
    check_launch(op, cuda::launch_attention_rows(p, to, workspace.mutable_data_ptr(), current_cuda_stream(query.get_device_index())));
#endif
  } else {
    const cpu::AttentionScoreKernels& kernels = cpu::attention_score_kernels();
    const Tensor workspace = new_workspace(query, kernels.rows_workspace(p));
    kernels.rows(p, to, workspace.mutable_data_ptr(), kTorchParallel);
  }
  return {entropy, maximum};
}

template <class Library>
void register_all(Library& m) {
  m.impl("attention_column_sum", TORCH_BOX(&attention_column_sum));
  m.impl("attention_row_statistics", TORCH_BOX(&attention_row_statistics));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modalign, m) {
  m.def(
      "attention_column_sum(Tensor query, Tensor key, Tensor lse, Tensor weights, Tensor? bias, Tensor? key_lengths, int causal, float scale, float softcap, Tensor[] mask_tensors, "
      "int[] mask_steps, int reduction) -> Tensor");
  m.def(
      "attention_row_statistics(Tensor query, Tensor key, Tensor lse, Tensor? bias, Tensor? key_lengths, int causal, float scale, float softcap, Tensor[] mask_tensors, int[] mask_steps) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(modalign, CPU, m) { register_all(m); }
#ifdef MODALIGN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(modalign, CUDA, m) { register_all(m); }
#endif

namespace cpu {
namespace portable { extern const AttentionScoreKernels kAttentionScoreKernels; }
#ifdef MODALIGN_WITH_X86
namespace avx2 { extern const AttentionScoreKernels kAttentionScoreKernels; }
namespace avx512 { extern const AttentionScoreKernels kAttentionScoreKernels; }
#endif

const AttentionScoreKernels& attention_score_kernels() {
#ifdef MODALIGN_WITH_X86
  return Variants<AttentionScoreKernels>{&portable::kAttentionScoreKernels, &avx2::kAttentionScoreKernels, &avx512::kAttentionScoreKernels}.chosen();
#else
  return portable::kAttentionScoreKernels;
#endif
}
}  // namespace cpu

}  // namespace modalign
