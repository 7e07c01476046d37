/// @file structure_loss.cpp
/// @brief structure_loss in the emulator: every key of the compiled table, run through the very launch sequences of cuda/structure_loss.cu.
///
/// Running any key of a sequence runs the whole sequence. Arguments: B, Dx, Dy; x [B, Dx], y [B, Dy] with strides as in host/gram_volume.cpp; keep, whether
/// products are kept; budget, the bytes of two panels. Backward (coefficients): also grad [B] with grad_element_stride, statistics [4, B], products or
/// None, need_x, need_y.
#include "cuda/structure_loss.cuh"

#include "host/pair_arguments.h"

namespace modalign::host {
namespace {

using namespace modalign::cuda;

template <class Real> StructureProblem problem_of(Run& run, bool released) {
  StructureProblem p{};
  p.B = run.integer("B"), p.Dx = run.integer("Dx"), p.Dy = run.integer("Dy"), p.released = released;
  p.x = rows<Real>(run, "x", p.B, p.Dx);
  p.y = rows<Real>(run, "y", p.B, p.Dy);
  return p;
}
std::int64_t budget(Run& run) { return run.has("budget") ? run.integer("budget") : kStructureBytes; }

template <class Real, bool released> void forward(Run& run) {
  const StructureProblem p = problem_of<Real>(run, released);
  const std::int64_t pitch = structure_products_pitch(p.B);
  // What lies between the matrices is never written, so kept products cannot be an output as a whole.
  const bool keep = run.flag("keep");
  const StructureForward output{run.output<Real>("loss", {p.B}), run.output<double>("statistics", {4, p.B}), keep ? run.workspace<Real>("products", 2 * pitch * pitch) : nullptr};
  HostArena arena(run);
  run_structure_forward<Real, released>(p, output, forward_buffers<Real>(p, keep, budget(run), arena), launcher(run));
}

template <class Real, bool released> void backward(Run& run) {
  const StructureProblem p = problem_of<Real>(run, released);
  const StructureBackward request{run.input<Real>("grad"),
                                  stride(run, "grad", "element", 1),
                                  run.input<double>("statistics"),
                                  run.input<Real>("products"),
                                  run.flag("need_x") ? run.output<Real>("grad_x", {p.B, p.Dx}) : nullptr,
                                  run.flag("need_y") ? run.output<Real>("grad_y", {p.B, p.Dy}) : nullptr};
  HostArena arena(run);
  run_structure_backward<Real, released>(p, request, backward_buffers<Real>(p, request, budget(run), arena), launcher(run));
}

// Which sequence a kernel type belongs to.
template <class Kernel> constexpr auto kSequence = nullptr;
template <class B> constexpr auto kSequence<TileWalk<B, StoreTile<B, typename B::Real>>> = &forward<typename B::Real, false>;
template <class Real, bool released> constexpr auto kSequence<StructureRows<Real, released>> = &forward<Real, released>;
template <class Real, bool released> constexpr auto kSequence<StructureCoefficients<Real, released>> = &backward<Real, released>;

template <class Kernel> KernelEntry entry(const std::string& key) {
  return {.key = key, .family = "structure_loss", .run = kSequence<Kernel>, .threads = Kernel::kThreads, .tags = {{"dtype", key.substr(key.rfind('.') + 1)}}};
}

const std::vector<Registration> kRegistrations = [] {
  std::vector<Registration> all;
#define MODALIGN_REGISTER(key, ...) all.emplace_back(entry<__VA_ARGS__>(key));
  MODALIGN_STRUCTURE_KERNELS(MODALIGN_REGISTER)
#undef MODALIGN_REGISTER
  return all;
}();

}   // namespace
}   // namespace modalign::host
