// masked_attention: schemas, one check, CPU and CUDA entry points. ops/masked_attention.h says what the numbers are.
#include "ops/masked_attention.h"

#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "cpu/masked_attention.h"
#ifdef MODALIGN_WITH_CUDA
#include "cuda/masked_attention.h"
#endif
#include "ops/attention_arguments.h"
#include "ops/cuda_call.h"

namespace modalign {
namespace {

using Optional = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr const char* kOp = "masked_attention";

Two masked_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& bias, const Optional& key_lengths, const Optional& cu_queries,
                     const Optional& cu_keys, std::int64_t max_queries, std::int64_t max_keys, std::int64_t causal, double scale, double cap, std::vector<Tensor> mask_tensors,
                     std::vector<std::int64_t> mask_steps) {
  const AttentionProblem p = check_attention({kOp, query, key, value, bias, key_lengths, cu_queries, cu_keys, max_queries, max_keys, causal, scale, cap, mask_tensors, mask_steps});
  Tensor out = new_tensor(query, {query.size(0), p.H, p.total_queries, p.Dv}, query.scalar_type());
  Tensor lse = new_tensor(query, {query.size(0), p.H, p.total_queries}, accumulation_type(query.scalar_type()));
  const AttentionForward to{out.mutable_data_ptr(), lse.mutable_data_ptr()};
  if (query.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(query.get_device_index());
    const Tensor workspace = new_workspace(query, cuda::masked_attention_workspace(p));
    check_launch(kOp, cuda::launch_masked_attention(p, to, workspace.mutable_data_ptr(), current_cuda_stream(query.get_device_index())));
#endif
  } else {
    const cpu::AttentionKernels& kernels = cpu::attention_kernels();
    const Tensor workspace = new_workspace(query, kernels.workspace(p));
    kernels.forward(p, to, workspace.mutable_data_ptr(), kTorchParallel);
  }
  return {out, lse};
}

Four masked_attention_bwd(const Tensor& grad_out, const Optional& grad_lse, const Tensor& out, const Tensor& lse, const Tensor& query, const Tensor& key, const Tensor& value,
                          const Optional& bias, const Optional& key_lengths, const Optional& cu_queries, const Optional& cu_keys, std::int64_t max_queries,
                          std::int64_t max_keys, std::int64_t causal, double scale, double cap, std::vector<Tensor> mask_tensors, std::vector<std::int64_t> mask_steps, bool need_bias) {
  const AttentionProblem p = check_attention({kOp, query, key, value, bias, key_lengths, cu_queries, cu_keys, max_queries, max_keys, causal, scale, cap, mask_tensors, mask_steps});
  const ScalarType dtype = query.scalar_type(), real = accumulation_type(dtype);
  AttentionBackward to{};
  check_like(kOp, "grad_out", grad_out, query, dtype);
  check_shape(kOp, "grad_out", grad_out, {query.size(0), p.H, p.total_queries, p.Dv});
  check_like(kOp, "out", out, query, dtype);
  check_shape(kOp, "out", out, {query.size(0), p.H, p.total_queries, p.Dv});
  check_like(kOp, "lse", lse, query, real);
  check_shape(kOp, "lse", lse, {query.size(0), p.H, p.total_queries});
  MODALIGN_CHECK(lse.is_contiguous(), kOp, ": lse must be contiguous, got a strided one");
  to.grad_out = rows_of(grad_out), to.out = rows_of(out), to.lse = lse.const_data_ptr();
  if (grad_lse) {
    check_like(kOp, "grad_lse", *grad_lse, query, real);
    check_shape(kOp, "grad_lse", *grad_lse, {query.size(0), p.H, p.total_queries});
    MODALIGN_CHECK(grad_lse->is_contiguous(), kOp, ": grad_lse must be contiguous, got a strided one");
    to.grad_lse = grad_lse->const_data_ptr();
  }
  MODALIGN_CHECK(!need_bias || (bias && bias->size(3) == p.Nk), kOp, ": bias must be given, with as many columns as there are keys, where its gradient is wanted");
  Tensor grad_query = new_tensor(query, {query.size(0), p.H, p.total_queries, p.D}, dtype), grad_key = new_tensor(query, {query.size(0), p.Hkv, p.total_keys, p.D}, dtype);
  Tensor grad_value = new_tensor(query, {query.size(0), p.Hkv, p.total_keys, p.Dv}, dtype), grad_bias = new_tensor(query, {0}, real);
  to.grad_query = grad_query.mutable_data_ptr(), to.grad_key = grad_key.mutable_data_ptr(), to.grad_value = grad_value.mutable_data_ptr();
  if (need_bias) {
    to.bias_gradient = bias->size(2) == 1 ? BiasGradient::columns : BiasGradient::pairs;
    to.bias_batches = bias->size(0);
    grad_bias = new_tensor(query, {to.bias_batches, p.bias.heads, bias->size(2), p.Nk}, real);
    to.grad_bias = grad_bias.mutable_data_ptr();
  }
  if (query.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(query.get_device_index());
    const Tensor workspace = new_workspace(query, cuda::masked_attention_bwd_workspace(p));
    check_launch(kOp, cuda::launch_masked_attention_bwd(p, to, workspace.mutable_data_ptr(), current_cuda_stream(query.get_device_index())));
#endif
  } else {
    const cpu::AttentionKernels& kernels = cpu::attention_kernels();
    const Tensor workspace = new_workspace(query, kernels.bwd_workspace(p, to));
    kernels.backward(p, to, workspace.mutable_data_ptr(), kTorchParallel);
  }
  return {grad_query, grad_key, grad_value, grad_bias};
}

template <class Library>
void register_all(Library& m) {
  m.impl("masked_attention", TORCH_BOX(&masked_attention));
  m.impl("masked_attention_bwd", TORCH_BOX(&masked_attention_bwd));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modalign, m) {
  m.def(
      "masked_attention(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_lengths, Tensor? cu_queries, Tensor? cu_keys, int max_queries, int max_keys, "
      "int causal, float scale, float softcap, Tensor[] mask_tensors, int[] mask_steps) -> (Tensor, Tensor)");
  m.def(
      "masked_attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_lengths, "
      "Tensor? cu_queries, Tensor? cu_keys, int max_queries, int max_keys, int causal, float scale, float softcap, Tensor[] mask_tensors, int[] mask_steps, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(modalign, CPU, m) { register_all(m); }
#ifdef MODALIGN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(modalign, CUDA, m) { register_all(m); }
#endif

namespace cpu {
namespace portable { extern const AttentionKernels kAttentionKernels; }
#ifdef MODALIGN_WITH_X86
namespace avx2 { extern const AttentionKernels kAttentionKernels; }
namespace avx512 { extern const AttentionKernels kAttentionKernels; }
#endif

const AttentionKernels& attention_kernels() {
#ifdef MODALIGN_WITH_X86
  return Variants<AttentionKernels>{&portable::kAttentionKernels, &avx2::kAttentionKernels, &avx512::kAttentionKernels}.chosen();
#else
  return portable::kAttentionKernels;
#endif
}
}  // namespace cpu

}  // namespace modalign
