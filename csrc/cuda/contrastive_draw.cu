// The instances of contrastive_loss.cuh that draw, in a file of their own so that the two build side by side.
#include "cuda/contrastive_loss.cuh"
#include "cuda/stream_launch.cuh"

namespace modalign::cuda {

template <class Kernel> int launch_shared(const Kernel& kernel, const LaunchPlan& plan, cudaStream_t stream) {
  return static_cast<int>(launch(kernel, plan, stream));
}
#define MODALIGN_LAUNCH_SHARED(key, ...) template int launch_shared(const __VA_ARGS__&, const LaunchPlan&, cudaStream_t);
MODALIGN_DRAW_KERNELS(MODALIGN_LAUNCH_SHARED)
#undef MODALIGN_LAUNCH_SHARED

}   // namespace modalign::cuda
