/// @file gram_volume.cpp
/// @brief The volume kernels in the emulator: every key of the compiled table, run through the very launch sequences of cuda/gram_volume.cu.
///
/// Running any key of a sequence runs the whole sequence (a backward key: the whole backward pass), so that each kernel reads what its predecessors
/// wrote. Arguments of the pair ops: N, B, C, D, (m,) squared, eps; anchor [N, B, D] and other0 ... [N, C, D] (triangle: other0 = u, other1 = v),
/// present bool [N, C, m] or missing. `<name>_batch_stride`, `<name>_row_stride`, `<name>_element_stride` replace the strides of a contiguous array,
/// which may then have any shape. Backward: anchor, basis, factor, grad, need_anchor, need_others, workspace_bytes.
#include "cuda/gram_volume.cuh"

#include "host/pair_arguments.h"

namespace modalign::host {
namespace {

using namespace modalign::cuda;

template <class Geometry> PairProblem pair_sizes(Run& run) {
  PairProblem p{};
  p.N = run.integer("N"), p.B = run.integer("B"), p.C = run.integer("C"), p.D = run.integer("D");
  p.m = Geometry::kTriangle ? 2 : static_cast<int>(run.integer("m"));
  p.squared = run.flag("squared");
  p.eps = run.number("eps");
  return p;
}
template <class Geometry> std::vector<std::int64_t> factor_shape(const PairProblem& p) {
  return Geometry::kTriangle ? std::vector<std::int64_t>{p.N, p.C, 3} : std::vector<std::int64_t>{p.N, p.C, p.m, p.m};
}

template <class Geometry, class T> void pair_forward(Run& run) {
  using Real = real_of<T>;
  PairProblem p = pair_sizes<Geometry>(run);
  p.anchor = rows<T>(run, "anchor", p.B, p.D);
  for (int o = 0; o < p.m; ++o) p.others[o] = rows<T>(run, "other" + std::to_string(o), p.C, p.D);
  p.present = presence(run, p.C, p.m);
  const PairForward output{run.output<T>("value", {p.N, p.B, p.C}), run.output<Real>("basis", {p.N, p.C, p.m, p.D}),
                           run.output<Real>("factor", factor_shape<Geometry>(p))};
  HostArena arena(run);
  run_pair_forward<Geometry, T>(p, output, ForwardBuffers<T>(p, arena), launcher(run));
}

template <class Geometry, class T> void pair_backward(Run& run) {
  using Real = real_of<T>;
  PairProblem p = pair_sizes<Geometry>(run);
  p.anchor = rows<T>(run, "anchor", p.B, p.D);
  const BatchedRows grad = rows<T>(run, "grad", p.B, p.C);
  const PairBackward request{grad.data,
                             grad.batch_stride,
                             grad.row_stride,
                             grad.element_stride,
                             run.input<Real>("basis"),
                             run.input<Real>("factor"),
                             run.flag("need_anchor") ? run.output<T>("grad_anchor", {p.N, p.B, p.D}) : nullptr,
                             run.flag("need_others") ? run.output<T>("grad_others", {p.N, p.C, p.m, p.D}) : nullptr};
  // as on the device: the size is asked for first, and the launch finds its plan from the size
  const BackwardPlan plan = choose_backward<Geometry, T>(p, backward_workspace<Geometry, T>(p, run.integer("workspace_bytes")));
  HostArena arena(run);
  run_pair_backward<Geometry, T>(p, request, plan, BackwardBuffers<Geometry, T>(p, plan, arena), launcher(run));
}

template <class T> PairedGramVolumeProblem paired_problem(Run& run) {
  PairedGramVolumeProblem p{};
  p.N = run.integer("N"), p.D = run.integer("D"), p.k = static_cast<int>(run.integer("k"));
  p.squared = run.flag("squared");
  for (int o = 0; o < p.k; ++o) p.vectors[o] = rows<T>(run, "vector" + std::to_string(o), p.N, p.D);
  p.present = presence(run, p.N, p.k);
  return p;
}
template <class T> void paired_forward(Run& run) {
  const PairedGramVolumeProblem p = paired_problem<T>(run);
  HostArena arena(run);
  run_paired_forward<T>(p, run.output<T>("value", {p.N}), PairedBuffers<T>(p, arena), launcher(run));
}
template <class T> void paired_backward(Run& run) {
  const PairedGramVolumeProblem p = paired_problem<T>(run);
  HostArena arena(run);
  const T* grad = run.input<T>("grad");
  run_paired_backward<T>(p, grad, stride(run, "grad", "row", 1), run.output<T>("grad_vectors", {p.N, p.k, p.D}), PairedBuffers<T>(p, arena),
                         launcher(run));
}

// Which sequence a kernel type belongs to.
template <class Kernel> struct Sequence;
template <class G, class T> struct Sequence<PrepareForward<G, T>> {
  static void run(Run& r) { pair_forward<G, T>(r); }
};
template <class G, class T> struct Sequence<PrepareBackward<G, T>> {
  static void run(Run& r) { pair_backward<G, T>(r); }
};
template <class B, class G, class T> struct Sequence<TileWalk<B, CoefficientEpilogue<G, T, MatrixUpstream<T>>>> {
  static void run(Run& r) { pair_backward<G, T>(r); }
};
template <class B, class G, class T> struct Sequence<TileWalk<B, PairForwardEpilogue<G, T>>> {
  static void run(Run& r) { pair_forward<G, T>(r); }
};
template <class G, class T> struct Sequence<RowTerms<G, T, MatrixUpstream<T>>> {
  static void run(Run& r) { pair_backward<G, T>(r); }
};
template <class G, class T> struct Sequence<ColumnTerms<G, T, MatrixUpstream<T>>> {
  static void run(Run& r) { pair_backward<G, T>(r); }
};
template <class G, class T> struct Sequence<GradOthers<G, T>> {
  static void run(Run& r) { pair_backward<G, T>(r); }
};
template <class T> struct Sequence<PairedForward<T>> {
  static void run(Run& r) { paired_forward<T>(r); }
};
template <class T> struct Sequence<PairedBackward<T>> {
  static void run(Run& r) { paired_backward<T>(r); }
};

// The two products are shared by the geometries; the volume runs them here. Their dtype is read off the key.
void product(Run& run) {
  const std::string dtype = run.key().substr(run.key().rfind('.') + 1);
  if (dtype == "f32") pair_backward<VolumeGeometry, float>(run);
  else if (dtype == "f64") pair_backward<VolumeGeometry, double>(run);
  else if (dtype == "f16") pair_backward<VolumeGeometry, f16>(run);
  else pair_backward<VolumeGeometry, bf16>(run);
}
template <class B, class E> struct Sequence<TileWalk<B, E>> {
  static void run(Run& r) { product(r); }
};

template <class Kernel> KernelEntry entry(const std::string& key) {
  const std::string family = key.substr(0, key.find('.'));
  return {
      .key = key, .family = family, .run = &Sequence<Kernel>::run, .threads = Kernel::kThreads, .tags = {{"dtype", key.substr(key.rfind('.') + 1)}}};
}

const std::vector<Registration> kRegistrations = [] {
  std::vector<Registration> all;
#define MODALIGN_REGISTER(key, ...) all.emplace_back(entry<__VA_ARGS__>(key));
  MODALIGN_VOLUME_KERNELS(MODALIGN_REGISTER)
#undef MODALIGN_REGISTER
  return all;
}();

}   // namespace
}   // namespace modalign::host
