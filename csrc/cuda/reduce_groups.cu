// The compiled instances of reduce_groups.cuh and their launches; see the head of that file for maths, mapping, memory and order.
#include "cuda/reduce_groups.cuh"
#include "cuda/reduce_groups.h"
#include "cuda/stream_launch.cuh"

namespace modalign::cuda {

int launch_reduce_groups(const GroupsProblem& problem, const GroupsResult& output, void* stream) {
  return with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    return launch_kernel(StreamLaunch{static_cast<cudaStream_t>(stream)}, ReduceGroups<T>{{problem, output}}, 1);
  });
}
int launch_spread_groups(const GroupsProblem& problem, const GroupsResult& output, void* stream) {
  return with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    return launch_kernel(StreamLaunch{static_cast<cudaStream_t>(stream)}, SpreadGroups<T>{{problem, output}}, 1);
  });
}

const char* group_kernel_catalogue() {
#define MODALIGN_KEY_LINE(key, ...) key "\n"
  return MODALIGN_GROUP_KERNELS(MODALIGN_KEY_LINE);
#undef MODALIGN_KEY_LINE
}

}   // namespace modalign::cuda
