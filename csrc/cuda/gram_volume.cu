// The compiled instances of gram_volume.cuh and their launches; see the head of that file for maths, mapping, memory and order of accumulation.
#include "cuda/gram_volume.cuh"
#include "cuda/gram_volume.h"
#include "cuda/stream_launch.cuh"

namespace modalign::cuda {

template <class Kernel> int launch_shared(const Kernel& kernel, const LaunchPlan& plan, cudaStream_t stream) {
  return static_cast<int>(launch(kernel, plan, stream));
}
#define MODALIGN_LAUNCH_SHARED(key, ...) template int launch_shared(const __VA_ARGS__&, const LaunchPlan&, cudaStream_t);
MODALIGN_SHARED_KERNELS(MODALIGN_LAUNCH_SHARED)
#undef MODALIGN_LAUNCH_SHARED

namespace {

template <class Geometry, class Problem> std::int64_t forward_workspace(const Problem& problem) {
  return with_dtype(problem.dtype, [&](auto element) {
    DeviceArena count(nullptr);
    ForwardBuffers<decltype(element)>(pair_problem(problem), count);
    return count.used();
  });
}
template <class Geometry, class Problem> int forward(const Problem& problem, const PairForward& output, void* workspace, void* stream) {
  return with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    const PairProblem p = pair_problem(problem);
    DeviceArena arena(workspace);
    return run_pair_forward<Geometry, T>(p, output, ForwardBuffers<T>(p, arena), StreamLaunch{static_cast<cudaStream_t>(stream)});
  });
}
template <class Geometry, class Problem> std::int64_t bwd_workspace(const Problem& problem, std::int64_t workspace_bytes) {
  return with_dtype(problem.dtype,
                    [&](auto element) { return backward_workspace<Geometry, decltype(element)>(pair_problem(problem), workspace_bytes); });
}
template <class Geometry, class Problem>
int backward(const Problem& problem, const PairBackward& request, void* workspace, std::int64_t workspace_size, void* stream) {
  return with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    const PairProblem p = pair_problem(problem);
    const BackwardPlan plan = choose_backward<Geometry, T>(p, workspace_size);
    if (backward_bytes<Geometry, T>(p, plan) > workspace_size) return static_cast<int>(cudaErrorInvalidValue);
    DeviceArena arena(workspace);
    return run_pair_backward<Geometry, T>(p, request, plan, BackwardBuffers<Geometry, T>(p, plan, arena),
                                          StreamLaunch{static_cast<cudaStream_t>(stream)});
  });
}

}   // namespace

std::int64_t gram_volume_workspace(const GramVolumeProblem& problem) { return forward_workspace<VolumeGeometry>(problem); }
int launch_gram_volume(const GramVolumeProblem& problem, const PairForward& output, void* workspace, void* stream) {
  return forward<VolumeGeometry>(problem, output, workspace, stream);
}
std::int64_t gram_volume_bwd_workspace(const GramVolumeProblem& problem, std::int64_t workspace_bytes) {
  return bwd_workspace<VolumeGeometry>(problem, workspace_bytes);
}
int launch_gram_volume_bwd(const GramVolumeProblem& problem, const PairBackward& request, void* workspace, std::int64_t workspace_size,
                           void* stream) {
  return backward<VolumeGeometry>(problem, request, workspace, workspace_size, stream);
}

std::int64_t triangle_area_workspace(const TriangleAreaProblem& problem) { return forward_workspace<TriangleGeometry>(problem); }
int launch_triangle_area(const TriangleAreaProblem& problem, const PairForward& output, void* workspace, void* stream) {
  return forward<TriangleGeometry>(problem, output, workspace, stream);
}
std::int64_t triangle_area_bwd_workspace(const TriangleAreaProblem& problem, std::int64_t workspace_bytes) {
  return bwd_workspace<TriangleGeometry>(problem, workspace_bytes);
}
int launch_triangle_area_bwd(const TriangleAreaProblem& problem, const PairBackward& request, void* workspace, std::int64_t workspace_size,
                             void* stream) {
  return backward<TriangleGeometry>(problem, request, workspace, workspace_size, stream);
}

std::int64_t paired_gram_volume_workspace(const PairedGramVolumeProblem& problem) {
  return with_dtype(problem.dtype, [&](auto element) {
    DeviceArena count(nullptr);
    PairedBuffers<decltype(element)>(problem, count);
    return count.used();
  });
}
int launch_paired_gram_volume(const PairedGramVolumeProblem& problem, void* value, void* workspace, void* stream) {
  return with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    DeviceArena arena(workspace);
    return run_paired_forward<T>(problem, value, PairedBuffers<T>(problem, arena), StreamLaunch{static_cast<cudaStream_t>(stream)});
  });
}
int launch_paired_gram_volume_bwd(const PairedGramVolumeProblem& problem, const void* grad, std::int64_t grad_stride, void* grad_vectors,
                                  void* workspace, void* stream) {
  return with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    DeviceArena arena(workspace);
    return run_paired_backward<T>(problem, grad, grad_stride, grad_vectors, PairedBuffers<T>(problem, arena),
                                  StreamLaunch{static_cast<cudaStream_t>(stream)});
  });
}

const char* error_name(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

const char* kernel_catalogue() {
#define MODALIGN_KEY_LINE(key, ...) key "\n"
  return MODALIGN_VOLUME_KERNELS(MODALIGN_KEY_LINE);
#undef MODALIGN_KEY_LINE
}

}   // namespace modalign::cuda
