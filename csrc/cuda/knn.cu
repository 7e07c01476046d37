// The compiled instances of knn.cuh and their launches; see the head of that file for maths, mapping, memory and order of accumulation.
#include "cuda/knn.cuh"
#include "cuda/knn.h"
#include "cuda/stream_launch.cuh"

namespace modalign::cuda {

namespace {
// f(T{}) with the dtype of a problem that is float or double.
template <class F> auto with_real(Scalar dtype, F f) { return dtype == Scalar::f64 ? f(double{}) : f(float{}); }

// f(Backend*) with the back end that multiplies.
template <class F> auto with_backend(const KnnProblem& problem, F f) {
  if (problem.precision == Precision::high && problem.dtype == Scalar::f32) return f(static_cast<SplitBackend*>(nullptr));
  return with_dtype(problem.dtype, [&](auto element) { return f(static_cast<PairBackend<decltype(element)>*>(nullptr)); });
}
}   // namespace

std::int64_t knn_workspace(const KnnProblem& problem) {
  return with_backend(problem, [&](auto* backend) {
    DeviceArena count(nullptr);
    KnnBuffers<std::remove_pointer_t<decltype(backend)>>(problem, kSelectBytes, count);
    return count.used();
  });
}
int launch_knn(const KnnProblem& problem, const KnnResult& output, void* workspace, void* stream) {
  return with_backend(problem, [&](auto* backend) {
    using Backend = std::remove_pointer_t<decltype(backend)>;
    DeviceArena arena(workspace);
    return run_knn<Backend>(problem, output, KnnBuffers<Backend>(problem, kSelectBytes, arena), StreamLaunch{static_cast<cudaStream_t>(stream)});
  });
}

std::int64_t knn_scores_workspace(const KnnProblem& problem) {
  return with_real(problem.dtype, [&](auto real) {
    DeviceArena count(nullptr);
    PointMeasures<decltype(real)>(problem, count);
    return count.used();
  });
}
int launch_knn_scores(const KnnProblem& problem, const std::int64_t* indices, const KnnResult& output, void* workspace, void* stream) {
  return with_real(problem.dtype, [&](auto real) {
    using T = decltype(real);
    DeviceArena arena(workspace);
    return run_knn_scores<T>(problem, indices, output, PointMeasures<T>(problem, arena), StreamLaunch{static_cast<cudaStream_t>(stream)});
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
