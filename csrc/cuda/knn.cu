// The compiled instances of knn.cuh and their launches; see the head of that file for maths, mapping, memory and order of accumulation.
#include "cuda/knn.cuh"
#include "cuda/knn.h"
#include "cuda/stream_launch.cuh"

namespace modalign::cuda {

std::int64_t knn_workspace(const KnnProblem& problem) {
  return with_dtype(problem.dtype, [&](auto element) {
    DeviceArena count(nullptr);
    KnnBuffers<decltype(element)>(problem, kSelectBytes, count);
    return count.used();
  });
}
int launch_knn(const KnnProblem& problem, const KnnResult& output, void* workspace, void* stream) {
  return with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    DeviceArena arena(workspace);
    return run_knn<T>(problem, output, KnnBuffers<T>(problem, kSelectBytes, arena), StreamLaunch{static_cast<cudaStream_t>(stream)});
  });
}

std::int64_t target_rank_workspace(const KnnProblem& problem) {
  return with_dtype(problem.dtype, [&](auto element) {
    DeviceArena count(nullptr);
    RankBuffers<decltype(element)>(problem, kSelectBytes, count);
    return count.used();
  });
}
int launch_target_rank(const KnnProblem& problem, std::int64_t* rank, void* workspace, void* stream) {
  return with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    DeviceArena arena(workspace);
    return run_target_rank<T>(problem, rank, RankBuffers<T>(problem, kSelectBytes, arena), StreamLaunch{static_cast<cudaStream_t>(stream)});
  });
}

const char* knn_kernel_catalogue() {
#define MODALIGN_KEY_LINE(key, ...) key "\n"
  return MODALIGN_KNN_KERNELS(MODALIGN_KEY_LINE);
#undef MODALIGN_KEY_LINE
}

}   // namespace modalign::cuda
