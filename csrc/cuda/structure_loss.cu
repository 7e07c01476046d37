// The compiled instances of structure_loss.cuh and their launches; see the head of that file for maths, mapping, memory and order of accumulation.
#include "cuda/structure_loss.cuh"
#include "cuda/stream_launch.cuh"
#include "cuda/structure_loss.h"

namespace modalign::cuda {
namespace {

template <class F> auto with_real(Scalar dtype, const F& f) { return dtype == Scalar::f64 ? f(double()) : f(float()); }

}   // namespace

std::int64_t structure_loss_workspace(const StructureProblem& problem, bool kept) {
  return with_real(problem.dtype, [&](auto real) {
    DeviceArena count(nullptr);
    forward_buffers<decltype(real)>(problem, kept, kStructureBytes, count);
    return count.used();
  });
}
int launch_structure_loss(const StructureProblem& problem, const StructureForward& output, void* workspace, void* stream) {
  return with_real(problem.dtype, [&](auto real) {
    using Real = decltype(real);
    DeviceArena arena(workspace);
    const auto buffers = forward_buffers<Real>(problem, output.products != nullptr, kStructureBytes, arena);
    const StreamLaunch launch{static_cast<cudaStream_t>(stream)};
    return problem.released ? run_structure_forward<Real, true>(problem, output, buffers, launch) : run_structure_forward<Real, false>(problem, output, buffers, launch);
  });
}

std::int64_t structure_loss_bwd_workspace(const StructureProblem& problem, const StructureBackward& request) {
  return with_real(problem.dtype, [&](auto real) {
    DeviceArena count(nullptr);
    backward_buffers<decltype(real)>(problem, request, kStructureBytes, count);
    return count.used();
  });
}
int launch_structure_loss_bwd(const StructureProblem& problem, const StructureBackward& request, void* workspace, void* stream) {
  return with_real(problem.dtype, [&](auto real) {
    using Real = decltype(real);
    DeviceArena arena(workspace);
    const auto buffers = backward_buffers<Real>(problem, request, kStructureBytes, arena);
    const StreamLaunch launch{static_cast<cudaStream_t>(stream)};
    return problem.released ? run_structure_backward<Real, true>(problem, request, buffers, launch) : run_structure_backward<Real, false>(problem, request, buffers, launch);
  });
}

const char* structure_kernel_catalogue() {
#define MODALIGN_KEY_LINE(key, ...) key "\n"
  return MODALIGN_STRUCTURE_KERNELS(MODALIGN_KEY_LINE);
#undef MODALIGN_KEY_LINE
}

}   // namespace modalign::cuda
