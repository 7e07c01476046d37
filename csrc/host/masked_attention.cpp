/// @file masked_attention.cpp
/// @brief masked_attention in the emulator: every key of the compiled table, run through the very launch sequences of cuda/masked_attention.cu.
///
/// Running any key of a sequence runs the whole sequence. Arguments: those of host/attention_arguments.h. Backward: also grad_out, out, lse, grad_lse or None, bias_gradient (0, 1, 2). Keys of
/// the mask's summaries run the forward in float.
#include "cuda/masked_attention.cuh"

#include "host/attention_arguments.h"

namespace modalign::host {
namespace {

using namespace modalign::cuda;

template <class T> void forward(Run& run) {
  const AttentionProblem p = attention_problem<T>(run);
  const std::int64_t items = attention_items(p);
  const AttentionForward to{run.output<T>("out", {items, p.H, p.total_queries, p.Dv}), run.output<real_of<T>>("lse", {items, p.H, p.total_queries})};
  HostArena arena(run);
  run_attention_forward<T>(p, to, AttentionForwardBuffers<T>(p, arena), launcher(run));
}

template <class T> void backward(Run& run) {
  using Real = real_of<T>;
  const AttentionProblem p = attention_problem<T>(run);
  const std::int64_t items = attention_items(p);
  AttentionBackward to{};
  to.grad_out = attention_rows<T>(run, "grad_out"), to.out = attention_rows<T>(run, "out"), to.lse = run.input<Real>("lse"), to.grad_lse = run.input<Real>("grad_lse");
  to.grad_query = run.output<T>("grad_query", {items, p.H, p.total_queries, p.D});
  to.grad_key = run.output<T>("grad_key", {items, p.Hkv, p.total_keys, p.D});
  to.grad_value = run.output<T>("grad_value", {items, p.Hkv, p.total_keys, p.Dv});
  to.bias_gradient = static_cast<BiasGradient>(run.integer("bias_gradient"));
  if (to.bias_gradient != BiasGradient::none) {
    to.bias_batches = run.shape("bias")[0];
    to.grad_bias = run.output<Real>("grad_bias", {to.bias_batches, p.bias.heads, to.bias_gradient == BiasGradient::pairs ? p.Nq : 1, p.Nk});
  }
  HostArena arena(run);
  run_attention_backward<T>(p, to, AttentionBackwardBuffers<T>(p, arena), launcher(run));
}

// Which sequence a kernel belongs to; summaries and copies are made by both.
template <class Kernel> constexpr auto kSequence = nullptr;
template <class T> constexpr auto kSequence<CleanRows<T>> = &forward<T>;
template <class T> constexpr auto kSequence<AttentionForwardTiles<T>> = &forward<T>;
template <class T> constexpr auto kSequence<AttentionMend<T>> = &forward<T>;
template <class T> constexpr auto kSequence<AttentionDelta<T>> = &backward<T>;
template <class T, AttentionGradient of> constexpr auto kSequence<AttentionGradientTiles<T, of>> = &backward<T>;
template <class T> constexpr auto kSequence<AttentionBiasTiles<T>> = &backward<T>;
template <> constexpr auto kSequence<SummarizeTokens> = &forward<float>;
template <> constexpr auto kSequence<SummarizeIntervals> = &forward<float>;
template <> constexpr auto kSequence<SummarizePairs> = &forward<float>;

template <class Kernel> KernelEntry entry(const std::string& key) {
  return {.key = key, .family = "masked_attention", .run = kSequence<Kernel>, .threads = Kernel::kThreads, .tags = {{"dtype", key.substr(key.rfind('.') + 1)}}};
}

const std::vector<Registration> kRegistrations = [] {
  std::vector<Registration> all;
#define MODALIGN_REGISTER(key, ...) all.emplace_back(entry<__VA_ARGS__>(key));
  MODALIGN_MASK_KERNELS(MODALIGN_REGISTER)
  MODALIGN_ATTENTION_KERNELS(MODALIGN_REGISTER)
#undef MODALIGN_REGISTER
  return all;
}();

}   // namespace
}   // namespace modalign::host
