// The compiled instances of masked_attention.cuh and their launches; see the head of that file for maths, mapping, memory and order of accumulation.
#include "cuda/masked_attention.cuh"
#include "cuda/masked_attention.h"
#include "cuda/stream_launch.cuh"

namespace modalign::cuda {

// What reads masks is launched by attention_scores.cu too.
template <class Kernel> int launch_shared(const Kernel& kernel, const LaunchPlan& plan, cudaStream_t stream) {
  return static_cast<int>(launch(kernel, plan, stream));
}
#define MODALIGN_LAUNCH_SHARED(key, ...) template int launch_shared(const __VA_ARGS__&, const LaunchPlan&, cudaStream_t);
MODALIGN_MASK_KERNELS(MODALIGN_LAUNCH_SHARED)
#undef MODALIGN_LAUNCH_SHARED

std::int64_t masked_attention_workspace(const AttentionProblem& problem) {
  return with_dtype(problem.dtype, [&](auto element) {
    DeviceArena count(nullptr);
    AttentionForwardBuffers<decltype(element)>(problem, count);
    return count.used();
  });
}
int launch_masked_attention(const AttentionProblem& problem, const AttentionForward& output, void* workspace, void* stream) {
  return with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    DeviceArena arena(workspace);
    return run_attention_forward<T>(problem, output, AttentionForwardBuffers<T>(problem, arena), StreamLaunch{static_cast<cudaStream_t>(stream)});
  });
}

std::int64_t masked_attention_bwd_workspace(const AttentionProblem& problem) {
  return with_dtype(problem.dtype, [&](auto element) {
    DeviceArena count(nullptr);
    AttentionBackwardBuffers<decltype(element)>(problem, count);
    return count.used();
  });
}
int launch_masked_attention_bwd(const AttentionProblem& problem, const AttentionBackward& request, void* workspace, void* stream) {
  return with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    DeviceArena arena(workspace);
    return run_attention_backward<T>(problem, request, AttentionBackwardBuffers<T>(problem, arena), StreamLaunch{static_cast<cudaStream_t>(stream)});
  });
}

const char* attention_kernel_catalogue() {
#define MODALIGN_KEY_LINE(key, ...) key "\n"
  return MODALIGN_MASK_KERNELS(MODALIGN_KEY_LINE) MODALIGN_ATTENTION_KERNELS(MODALIGN_KEY_LINE);
#undef MODALIGN_KEY_LINE
}

}   // namespace modalign::cuda
