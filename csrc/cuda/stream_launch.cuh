/// @file stream_launch.cuh
/// @brief What the .cu files of the pair families share: from a dtype to its type, and from a kernel to the stream.
#pragma once

#include <cuda_runtime.h>

#include "cuda/pair_gradient.cuh"

namespace modalign::cuda {

// The kernels of the shared table are compiled once, in gram_volume.cu, and launched from everywhere.
template <class Kernel> inline constexpr bool kIsShared = false;
#define MODALIGN_IS_SHARED(key, ...) template <> inline constexpr bool kIsShared<__VA_ARGS__> = true;
MODALIGN_SHARED_KERNELS(MODALIGN_IS_SHARED)
#undef MODALIGN_IS_SHARED

template <class Kernel> int launch_shared(const Kernel& kernel, const LaunchPlan& plan, cudaStream_t stream);

struct StreamLaunch {
  cudaStream_t stream;
  template <class Kernel> int operator()(const Kernel& kernel, const LaunchPlan& plan) const {
    if constexpr (kIsShared<Kernel>) return launch_shared(kernel, plan, stream);
    else return static_cast<int>(launch(kernel, plan, stream));
  }
};

template <class F> auto with_dtype(Scalar dtype, const F& f) {
  switch (dtype) {
    case Scalar::f64:
      return f(double());
    case Scalar::f16:
      return f(f16());
    case Scalar::bf16:
      return f(bf16());
    default:
      return f(float());
  }
}

}   // namespace modalign::cuda
