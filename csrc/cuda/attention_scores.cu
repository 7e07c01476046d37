// The compiled instances of attention_scores.cuh and their launches; see the head of that file for maths, mapping, memory and order of accumulation.
#include "cuda/attention_scores.cuh"
#include "cuda/attention_scores.h"
#include "cuda/stream_launch.cuh"

namespace modalign::cuda {

// Compiled in masked_attention.cu.
#define MODALIGN_IS_SHARED(key, ...) template <> inline constexpr bool kIsShared<__VA_ARGS__> = true;
MODALIGN_MASK_KERNELS(MODALIGN_IS_SHARED)
#undef MODALIGN_IS_SHARED

namespace {

// run(element of the dtype, what its kernels share)
template <class Run> int with_call(const AttentionProblem& problem, void* workspace, const Run& run) {
  return with_dtype(problem.dtype, [&](auto element) {
    DeviceArena arena(workspace);
    return run(element, attention_call<decltype(element)>(problem, arena));
  });
}

}   // namespace

std::int64_t attention_scores_workspace(const AttentionProblem& problem) {
  return with_dtype(problem.dtype, [&](auto element) {
    DeviceArena count(nullptr);
    attention_call<decltype(element)>(problem, count);
    return count.used();
  });
}
int launch_attention_columns(const AttentionProblem& problem, const AttentionColumns& request, void* workspace, void* stream) {
  return with_call(problem, workspace, [&](auto element, const AttentionCall& call) {
    return run_attention_columns<decltype(element)>(problem, request, call, StreamLaunch{static_cast<cudaStream_t>(stream)});
  });
}
int launch_attention_rows(const AttentionProblem& problem, const AttentionRowStatistics& request, void* workspace, void* stream) {
  return with_call(problem, workspace, [&](auto element, const AttentionCall& call) {
    return run_attention_rows<decltype(element)>(problem, request, call, StreamLaunch{static_cast<cudaStream_t>(stream)});
  });
}

const char* attention_score_kernel_catalogue() {
#define MODALIGN_KEY_LINE(key, ...) key "\n"
  return MODALIGN_ATTENTION_SCORE_KERNELS(MODALIGN_KEY_LINE);
#undef MODALIGN_KEY_LINE
}

}   // namespace modalign::cuda
