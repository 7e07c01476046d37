/// @file attention_scores.cpp
/// @brief attention_column_sum and attention_row_statistics in the emulator: every key of the compiled table, run through the very launch sequences of cuda/attention_scores.cu.
///
/// Arguments: those of host/attention_arguments.h, lse [B, H, Nq]; columns: weights [1 or B, 1 or H, 1 or Nq, 1], reduction (0 ... 3).
#include "cuda/attention_scores.cuh"

#include "host/attention_arguments.h"

namespace modalign::host {
namespace {

using namespace modalign::cuda;

template <class T> void columns(Run& run) {
  using Real = real_of<T>;
  const AttentionProblem p = attention_problem<T>(run);
  const auto shape = run.shape("weights");
  const AttentionWeights weights{run.input<Real>("weights"), broadcast(shape, 0), broadcast(shape, 1), broadcast(shape, 2)};
  const AttentionColumns to{static_cast<ColumnReduction>(run.integer("reduction")), run.input<Real>("lse"), weights, run.output<Real>("out", {p.B, p.H, p.Nk})};
  HostArena arena(run);
  run_attention_columns<T>(p, to, attention_call<T>(p, arena), launcher(run));
}

template <class T> void rows(Run& run) {
  using Real = real_of<T>;
  const AttentionProblem p = attention_problem<T>(run);
  const AttentionRowStatistics to{run.input<Real>("lse"), run.output<Real>("entropy", {p.B, p.H, p.Nq}), run.output<Real>("maximum", {p.B, p.H, p.Nq})};
  HostArena arena(run);
  run_attention_rows<T>(p, to, attention_call<T>(p, arena), launcher(run));
}

template <class Kernel> constexpr auto kSequence = nullptr;
template <class T> constexpr auto kSequence<AttentionColumnTiles<T>> = &columns<T>;
template <class T> constexpr auto kSequence<AttentionRowTiles<T>> = &rows<T>;

template <class Kernel> KernelEntry entry(const std::string& key) {
  return {.key = key, .family = "attention_scores", .run = kSequence<Kernel>, .threads = Kernel::kThreads, .tags = {{"dtype", key.substr(key.rfind('.') + 1)}}};
}

const std::vector<Registration> kRegistrations = [] {
  std::vector<Registration> all;
#define MODALIGN_REGISTER(key, ...) all.emplace_back(entry<__VA_ARGS__>(key));
  MODALIGN_ATTENTION_SCORE_KERNELS(MODALIGN_REGISTER)
#undef MODALIGN_REGISTER
  return all;
}();

}   // namespace
}   // namespace modalign::host
