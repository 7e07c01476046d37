/// @file contrastive_loss.cpp
/// @brief The contrastive losses in the emulator: every key of the compiled table, run through the very launch sequences of cuda/contrastive_loss.cu.
///
/// Running any key of a sequence runs the whole sequence. Keys that the forms share (`contrastive_loss.*`) take `form`: "volume", "triangle" or
/// "product", and in the tables of float and double `dtype`. Arguments: B, C, D, (m,) sigmoid, label_smoothing, row_part, column_part, eps;
/// anchor [B, D] and other0 ... [C, D] (triangle: u, v; product: y), present bool [C, m] or missing, scale [1], bias [1] or missing, target int64 or
/// missing, with strides as in host/gram_volume.cpp. Backward: also row_weight [B], column_weight [C] and what forward returned, need_anchor,
/// need_others, workspace_bytes.
#include "cuda/contrastive_loss.cuh"

#include "host/pair_arguments.h"

namespace modalign::host {
namespace {

using namespace modalign::cuda;

template <class Geometry> struct FormOf;
template <> struct FormOf<VolumeGeometry> {
  static constexpr PairForm value = PairForm::volume;
};
template <> struct FormOf<TriangleGeometry> {
  static constexpr PairForm value = PairForm::triangle;
};
template <> struct FormOf<ProductGeometry> {
  static constexpr PairForm value = PairForm::product;
};

template <class Geometry, class T> ContrastiveProblem problem_of(Run& run) {
  using Real = real_of<T>;
  ContrastiveProblem p{};
  GramVolumeProblem& q = p.pairs;
  p.form = FormOf<Geometry>::value;
  p.loss = run.flag("sigmoid") ? PairLoss::sigmoid : PairLoss::softmax;
  q.N = 1, q.B = run.integer("B"), q.C = run.integer("C"), q.D = run.integer("D");
  q.m = Geometry::kTriangle ? 2 : kIsProduct<Geometry> ? 1 : static_cast<int>(run.integer("m"));
  q.eps = run.number("eps");
  q.anchor = rows<T>(run, "anchor", q.B, q.D);
  for (int o = 0; o < q.m; ++o) q.others[o] = rows<T>(run, "other" + std::to_string(o), q.C, q.D);
  q.present = presence(run, q.C, q.m);
  p.scale = run.input<Real>("scale");
  p.bias = run.input<Real>("bias");
  p.target = run.input<std::int64_t>("target");
  p.target_stride = stride(run, "target", "row", 1);
  p.label_smoothing = run.number("label_smoothing");
  p.row_part = run.number("row_part");
  p.column_part = run.number("column_part");
  p.seed = run.input<std::int64_t>("seed");
  return p;
}

template <class Geometry, class T> void forward(Run& run) {
  using Real = real_of<T>;
  const ContrastiveProblem p = problem_of<Geometry, T>(run);
  const std::int64_t B = p.pairs.B, C = p.pairs.C, m = p.pairs.m;
  const bool product = kIsProduct<Geometry>;
  const ContrastiveForward output{run.output<Real>("loss", {B}),
                                  run.output<double>("row_lse", {B}),
                                  run.output<double>("column_lse", {C}),
                                  run.output<Real>("row_sum", {B}),
                                  run.output<Real>("column_sum", {C}),
                                  run.output<Real>("label", {B}),
                                  run.output<std::int64_t>("row_best", {B}),
                                  run.output<std::int64_t>("column_best", {C}),
                                  run.output<Real>("classes", {4}),
                                  run.output<Real>("basis", {product ? 0 : C, m, p.pairs.D}),
                                  run.output<Real>("factor", {product ? 0 : C, Geometry::kTriangle ? 3 : m * m}),
                                  nullptr};
  HostArena arena(run);
  run_contrastive_forward<Geometry, T>(p, output, LossForwardBuffers<Geometry, T>(p, arena), launcher(run));
}

template <class Geometry, class T> void backward(Run& run) {
  using Real = real_of<T>;
  const ContrastiveProblem p = problem_of<Geometry, T>(run);
  const ContrastiveBackward request{run.input<Real>("row_weight"),
                                    run.input<Real>("column_weight"),
                                    run.input<double>("row_lse"),
                                    run.input<double>("column_lse"),
                                    run.input<Real>("classes"),
                                    run.input<Real>("basis"),
                                    run.input<Real>("factor"),
                                    nullptr,
                                    run.flag("need_anchor") ? run.output<T>("grad_anchor", {p.pairs.B, p.pairs.D}) : nullptr,
                                    run.flag("need_others") ? run.output<T>("grad_others", {p.pairs.C, p.pairs.m, p.pairs.D}) : nullptr,
                                    run.output<Real>("grad_scale", {2})};
  // as on the device: the size is asked for first, and the launch finds its plan from the size
  const BackwardPlan plan = choose_loss_backward<Geometry, T>(p, loss_backward_workspace<Geometry, T>(p, run.integer("workspace_bytes")));
  HostArena arena(run);
  run_contrastive_backward<Geometry, T>(p, request, plan, LossBackwardBuffers<Geometry, T>(pair_problem(p.pairs), plan, arena), launcher(run));
}

// Which sequence a kernel type belongs to.
template <class Geometry, class T> struct ForwardOf {
  static void run(Run& r) { forward<Geometry, T>(r); }
};
template <class Geometry, class T> struct BackwardOf {
  static void run(Run& r) { backward<Geometry, T>(r); }
};
template <template <class, class> class Pass, class T> struct AnyForm {
  static void run(Run& r) {
    const std::string form = r.text("form");
    if (form == "volume") Pass<VolumeGeometry, T>::run(r);
    else if (form == "triangle") Pass<TriangleGeometry, T>::run(r);
    else Pass<ProductGeometry, T>::run(r);
  }
};
// Tables of float and double: half types accumulate in float.
template <template <class, class> class Pass, class Real> struct AnyDtype {
  static void run(Run& r) {
    const std::string dtype = r.text("dtype");
    if constexpr (sizeof(Real) == 4) {
      if (dtype == "f16") return AnyForm<Pass, f16>::run(r);
      if (dtype == "bf16") return AnyForm<Pass, bf16>::run(r);
    }
    AnyForm<Pass, Real>::run(r);
  }
};

template <class Kernel> struct Sequence;
template <class G, class T> struct Sequence<RowLabels<G, T>> : ForwardOf<G, T> {};
template <class B, class G, class T, bool draw> struct Sequence<TileWalk<B, LogitsEpilogue<G, T, draw>>> : ForwardOf<G, T> {};
template <class B, class G, class T, class U> struct Sequence<TileWalk<B, CoefficientEpilogue<G, T, U>>> : BackwardOf<G, T> {};
template <class G, class T, class U> struct Sequence<RowTerms<G, T, U>> : BackwardOf<G, T> {};
template <class G, class T, class U> struct Sequence<ColumnTerms<G, T, U>> : BackwardOf<G, T> {};
template <class B, class T> struct Sequence<TileWalk<B, ProductCoefficientEpilogue<T>>> : BackwardOf<ProductGeometry, T> {};
template <class T> struct Sequence<NarrowRows<T>> : BackwardOf<ProductGeometry, T> {};
template <class T> struct Sequence<LossRows<T>> : AnyForm<BackwardOf, T> {};
template <class Real> struct Sequence<ColumnLabels<Real>> : AnyDtype<ForwardOf, Real> {};
template <class Real> struct Sequence<CountClasses<Real>> : AnyDtype<ForwardOf, Real> {};
template <class Real> struct Sequence<FoldColumns<Real>> : AnyDtype<ForwardOf, Real> {};
template <class Real> struct Sequence<FoldRows<Real>> : AnyDtype<ForwardOf, Real> {};
template <class Real> struct Sequence<SumLogits<Real>> : AnyDtype<BackwardOf, Real> {};

template <class Kernel> KernelEntry entry(const std::string& key) {
  const std::string family = key.substr(0, key.find('.'));
  return {
      .key = key, .family = family, .run = &Sequence<Kernel>::run, .threads = Kernel::kThreads, .tags = {{"dtype", key.substr(key.rfind('.') + 1)}}};
}

const std::vector<Registration> kRegistrations = [] {
  std::vector<Registration> all;
#define MODALIGN_REGISTER(key, ...) all.emplace_back(entry<__VA_ARGS__>(key));
  MODALIGN_LOSS_KERNELS(MODALIGN_REGISTER)
  MODALIGN_DRAW_KERNELS(MODALIGN_REGISTER)
#undef MODALIGN_REGISTER
  return all;
}();

}   // namespace
}   // namespace modalign::host
