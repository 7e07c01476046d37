// The compiled instances of dynamic_mask.cuh and their launch; see the head of that file.
#include "cuda/dynamic_mask.cuh"
#include "cuda/dynamic_mask.h"
#include "cuda/stream_launch.cuh"

namespace modalign::cuda {

int launch_dynamic_mask_ends(Scalar dtype, const void* scores, std::int64_t lines, std::int64_t N, std::int64_t keep, std::int32_t* ends, void* stream) {
  const auto run = [&](auto real) {
    using Real = decltype(real);
    return launch_kernel(StreamLaunch{static_cast<cudaStream_t>(stream)}, DynamicMaskEnds<Real>{static_cast<const Real*>(scores), lines, N, keep, ends}, 1);
  };
  return dtype == Scalar::f64 ? run(double()) : run(float());
}

const char* dynamic_mask_kernel_catalogue() {
#define MODALIGN_KEY_LINE(key, ...) key "\n"
  return MODALIGN_DYNAMIC_MASK_KERNELS(MODALIGN_KEY_LINE);
#undef MODALIGN_KEY_LINE
}

}   // namespace modalign::cuda
