// The compiled instances of contrastive_loss.cuh and their launches; see the head of that file for maths, mapping, memory and order of accumulation.
#include "cuda/contrastive_loss.cuh"
#include "cuda/contrastive_loss.h"
#include "cuda/stream_launch.cuh"

namespace modalign::cuda {

// Compiled in contrastive_draw.cu: the two files build side by side.
#define MODALIGN_IS_SHARED(key, ...) template <> inline constexpr bool kIsShared<__VA_ARGS__> = true;
MODALIGN_DRAW_KERNELS(MODALIGN_IS_SHARED)
#undef MODALIGN_IS_SHARED

namespace {

// f(geometry, element) for the problem's form and dtype
template <class F> auto with_form(const ContrastiveProblem& problem, const F& f) {
  return with_dtype(problem.pairs.dtype, [&](auto element) {
    switch (problem.form) {
      case PairForm::volume:
        return f(VolumeGeometry(), element);
      case PairForm::triangle:
        return f(TriangleGeometry(), element);
      default:
        return f(ProductGeometry(), element);
    }
  });
}

}   // namespace

std::int64_t contrastive_loss_workspace(const ContrastiveProblem& problem) {
  return with_form(problem, [&](auto geometry, auto element) {
    DeviceArena count(nullptr);
    LossForwardBuffers<decltype(geometry), decltype(element)>(problem, count);
    return count.used();
  });
}
int launch_contrastive_loss(const ContrastiveProblem& problem, const ContrastiveForward& output, void* workspace, void* stream) {
  return with_form(problem, [&](auto geometry, auto element) {
    using Geometry = decltype(geometry);
    using T = decltype(element);
    DeviceArena arena(workspace);
    return run_contrastive_forward<Geometry, T>(problem, output, LossForwardBuffers<Geometry, T>(problem, arena),
                                                StreamLaunch{static_cast<cudaStream_t>(stream)});
  });
}

std::int64_t contrastive_loss_bwd_workspace(const ContrastiveProblem& problem, std::int64_t workspace_bytes) {
  return with_form(problem, [&](auto geometry, auto element) {
    return loss_backward_workspace<decltype(geometry), decltype(element)>(problem, workspace_bytes);
  });
}
int launch_contrastive_loss_bwd(const ContrastiveProblem& problem, const ContrastiveBackward& request, void* workspace,
                                std::int64_t workspace_size, void* stream) {
  return with_form(problem, [&](auto geometry, auto element) {
    using Geometry = decltype(geometry);
    using T = decltype(element);
    const PairProblem p = pair_problem(problem.pairs);
    const BackwardPlan plan = choose_loss_backward<Geometry, T>(problem, workspace_size);
    if (loss_backward_bytes<Geometry, T>(p, plan) > workspace_size) return static_cast<int>(cudaErrorInvalidValue);
    DeviceArena arena(workspace);
    return run_contrastive_backward<Geometry, T>(problem, request, plan, LossBackwardBuffers<Geometry, T>(p, plan, arena),
                                                 StreamLaunch{static_cast<cudaStream_t>(stream)});
  });
}

const char* contrastive_kernel_catalogue() {
#define MODALIGN_KEY_LINE(key, ...) key "\n"
  return MODALIGN_LOSS_KERNELS(MODALIGN_KEY_LINE) MODALIGN_DRAW_KERNELS(MODALIGN_KEY_LINE);
#undef MODALIGN_KEY_LINE
}

}   // namespace modalign::cuda
