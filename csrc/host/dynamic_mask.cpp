/// @file dynamic_mask.cpp
/// @brief The choice of dynamic masks in the emulator. Arguments: scores [lines, N], keep.
#include "cuda/dynamic_mask.cuh"

#include "host/pair_arguments.h"

namespace modalign::host {
namespace {

using namespace modalign::cuda;

template <class Real> void ends(Run& run) {
  const auto shape = run.shape("scores");
  const DynamicMaskEnds<Real> kernel{run.input<Real>("scores"), shape[0], shape[1], run.integer("keep"), run.output<std::int32_t>("ends", {shape[0], shape[1]})};
  launch_kernel(launcher(run), kernel, 1);
}

const Registration kFloat({.key = "dynamic_mask.ends.f32", .family = "dynamic_mask_attention", .run = ends<float>, .threads = kWarpKernelThreads, .tags = {{"dtype", "f32"}}});
const Registration kDouble({.key = "dynamic_mask.ends.f64", .family = "dynamic_mask_attention", .run = ends<double>, .threads = kWarpKernelThreads, .tags = {{"dtype", "f64"}}});

}   // namespace
}   // namespace modalign::host
