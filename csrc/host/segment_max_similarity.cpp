/// @file segment_max_similarity.cpp
/// @brief segment_max_similarity in the emulator: every key of the compiled table, run through the very launch sequences of
/// cuda/segment_max_similarity.cu.
///
/// Running any key of a sequence runs the whole sequence. Arguments: R, S, A, D; x [R, D], offsets int64 [S + 1], y [A, D]; strides as in
/// host/gram_volume.cpp, offsets_element_stride. Backward (gather_x, gather_y): also grad [S, A] with grad_row_stride and grad_element_stride, indices
/// [S, A], need_x, need_y.
#include "cuda/segment_max_similarity.cuh"

#include "host/pair_arguments.h"

namespace modalign::host {
namespace {

using namespace modalign::cuda;

template <class T> SegmentMaxProblem problem_of(Run& run) {
  SegmentMaxProblem p{};
  p.R = run.integer("R"), p.S = run.integer("S"), p.A = run.integer("A"), p.D = run.integer("D");
  p.x = rows<T>(run, "x", p.R, p.D);
  p.y = rows<T>(run, "y", p.A, p.D);
  p.offsets = {run.input<std::int64_t>("offsets"), stride(run, "offsets", "element", 1)};
  return p;
}

template <class T> void forward(Run& run) {
  const SegmentMaxProblem p = problem_of<T>(run);
  const SegmentMaxForward output{run.output<T>("values", {p.S, p.A}), run.output<std::int64_t>("indices", {p.S, p.A})};
  HostArena arena(run);
  run_segment_max<T>(p, output, SegmentBuffers<T>(p, arena), launcher(run));
}

template <class T> void backward(Run& run) {
  const SegmentMaxProblem p = problem_of<T>(run);
  const SegmentMaxBackward request{run.input<T>("grad"),
                                   stride(run, "grad", "row", p.A),
                                   stride(run, "grad", "element", 1),
                                   run.input<std::int64_t>("indices"),
                                   run.flag("need_x") ? run.output<T>("grad_x", {p.R, p.D}) : nullptr,
                                   run.flag("need_y") ? run.output<T>("grad_y", {p.A, p.D}) : nullptr};
  run_segment_max_backward<T>(p, request, launcher(run));
}

// Which sequence a kernel type belongs to.
template <class Kernel> constexpr auto kSequence = nullptr;
template <class T> constexpr auto kSequence<PrepareSegments<T>> = &forward<T>;
template <class B, class T> constexpr auto kSequence<TileWalk<B, SegmentMaxEpilogue<T>>> = &forward<T>;
template <class T> constexpr auto kSequence<MergeSegments<T>> = &forward<T>;
template <class T, bool kRows> constexpr auto kSequence<GatherGradient<T, kRows>> = &backward<T>;

template <class Kernel> KernelEntry entry(const std::string& key) {
  return {.key = key,
          .family = "segment_max_similarity",
          .run = kSequence<Kernel>,
          .threads = Kernel::kThreads,
          .tags = {{"dtype", key.substr(key.rfind('.') + 1)}}};
}

const std::vector<Registration> kRegistrations = [] {
  std::vector<Registration> all;
#define MODALIGN_REGISTER(key, ...) all.emplace_back(entry<__VA_ARGS__>(key));
  MODALIGN_SEGMENT_KERNELS(MODALIGN_REGISTER)
#undef MODALIGN_REGISTER
  return all;
}();

}   // namespace
}   // namespace modalign::host
