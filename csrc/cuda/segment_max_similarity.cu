// The compiled instances of segment_max_similarity.cuh and their launches; see the head of that file for maths, mapping, memory and order of accumulation.
#include "cuda/segment_max_similarity.cuh"
#include "cuda/segment_max_similarity.h"
#include "cuda/stream_launch.cuh"

namespace modalign::cuda {

std::int64_t segment_max_similarity_workspace(const SegmentMaxProblem& problem) {
  return with_dtype(problem.dtype, [&](auto element) {
    DeviceArena count(nullptr);
    SegmentBuffers<decltype(element)>(problem, count);
    return count.used();
  });
}
int launch_segment_max_similarity(const SegmentMaxProblem& problem, const SegmentMaxForward& output, void* workspace, void* stream) {
  return with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    DeviceArena arena(workspace);
    return run_segment_max<T>(problem, output, SegmentBuffers<T>(problem, arena), StreamLaunch{static_cast<cudaStream_t>(stream)});
  });
}

int launch_segment_max_similarity_bwd(const SegmentMaxProblem& problem, const SegmentMaxBackward& request, void* stream) {
  return with_dtype(problem.dtype, [&](auto element) {
    return run_segment_max_backward<decltype(element)>(problem, request, StreamLaunch{static_cast<cudaStream_t>(stream)});
  });
}

const char* segment_max_kernel_catalogue() {
#define MODALIGN_KEY_LINE(key, ...) key "\n"
  return MODALIGN_SEGMENT_KERNELS(MODALIGN_KEY_LINE);
#undef MODALIGN_KEY_LINE
}

}   // namespace modalign::cuda
