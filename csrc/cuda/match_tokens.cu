// The compiled instances of match_tokens.cuh and their launches; see the head of that file for maths, mapping, memory and order.
#include "cuda/match_tokens.cuh"
#include "cuda/match_tokens.h"
#include "cuda/stream_launch.cuh"

namespace modalign::cuda {

std::int64_t match_tokens_workspace(const MatchProblem& problem) {
  return with_dtype(problem.dtype, [&](auto element) {
    DeviceArena count(nullptr);
    MatchBuffers<decltype(element)>(problem, kMatchBlocks, count);
    return count.used();
  });
}
int launch_match_tokens(const MatchProblem& problem, const MatchResult& output, void* workspace, void* stream) {
  return with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    DeviceArena arena(workspace);
    return run_match_tokens<T>(output, MatchBuffers<T>(problem, kMatchBlocks, arena), StreamLaunch{static_cast<cudaStream_t>(stream)});
  });
}

const char* match_tokens_kernel_catalogue() {
#define MODALIGN_KEY_LINE(key, ...) key "\n"
  return MODALIGN_MATCH_KERNELS(MODALIGN_KEY_LINE);
#undef MODALIGN_KEY_LINE
}

}   // namespace modalign::cuda
