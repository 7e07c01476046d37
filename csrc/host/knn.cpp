/// @file knn.cpp
/// @brief knn and target_rank in the emulator: every key of the compiled table, run through the very launch sequences of cuda/knn.cu.
///
/// Running any key of a sequence runs the whole sequence. Arguments: N, M, D, metric (its number); queries [N, D], points [M, D] with strides as in
/// host/gram_volume.cpp; bias [M]; skip, query_labels [N], point_labels [M] int64; budget, the bytes for rows in progress. knn also: k. knn_scores: k and
/// indices int64 [N, k]. target_rank: target int64 [N]. Vectors have an _element_stride.
#include "cuda/knn.cuh"

#include "host/pair_arguments.h"

namespace modalign::host {
namespace {

using namespace modalign::cuda;

template <class U> OptionalVector vector(Run& run, const char* name) { return {run.input<U>(name), stride(run, name, "element", 1)}; }

template <class T> KnnProblem problem_of(Run& run) {
  KnnProblem p{};
  p.metric = static_cast<Metric>(run.integer("metric"));
  p.N = run.integer("N"), p.M = run.integer("M"), p.D = run.integer("D"), p.k = run.has("k") ? run.integer("k") : 1;
  p.queries = rows<T>(run, "queries", p.N, p.D);
  p.points = rows<T>(run, "points", p.M, p.D);
  p.bias = vector<real_of<T>>(run, "bias");
  p.skip = vector<std::int64_t>(run, "skip");
  p.query_labels = vector<std::int64_t>(run, "query_labels");
  p.point_labels = vector<std::int64_t>(run, "point_labels");
  p.target = vector<std::int64_t>(run, "target");
  return p;
}
std::int64_t budget(Run& run) { return run.has("budget") ? run.integer("budget") : kSelectBytes; }

template <class Backend> void knn(Run& run) {
  using Real = typename Backend::Real;
  const KnnProblem p = problem_of<std::conditional_t<std::is_same_v<Backend, SplitBackend>, float, typename Backend::Source>>(run);
  const KnnResult output{run.output<Real>("scores", {p.N, p.k}), run.output<std::int64_t>("indices", {p.N, p.k}),
                         p.metric == Metric::dot ? nullptr : run.output<Real>("squares", {p.N})};
  HostArena arena(run);
  run_knn<Backend>(p, output, KnnBuffers<Backend>(p, budget(run), arena), launcher(run));
}

template <class T> void knn_scores(Run& run) {
  const KnnProblem p = problem_of<T>(run);
  const KnnResult output{run.output<T>("scores", {p.N, p.k}), nullptr, p.metric == Metric::dot ? nullptr : run.output<T>("squares", {p.N})};
  HostArena arena(run);
  run_knn_scores<T>(p, run.input<std::int64_t>("indices"), output, PointMeasures<T>(p, arena), launcher(run));
}

template <class T> void target_rank(Run& run) {
  const KnnProblem p = problem_of<T>(run);
  std::int64_t* rank = run.output<std::int64_t>("rank", {p.N});
  HostArena arena(run);
  run_target_rank<T>(p, rank, RankBuffers<T>(p, budget(run), arena), launcher(run));
}

// Which sequence a kernel type belongs to.
template <class Kernel> constexpr auto kSequence = nullptr;
template <class B> constexpr auto kSequence<PairedProducts<B>> = &knn<B>;
template <class B, class S> constexpr auto kSequence<TileWalk<B, SelectTile<B, S>>> = &knn<B>;
template <class Real> constexpr auto kSequence<MergeNeighbors<Real>> = &knn<PairBackend<Real>>;
template <> constexpr auto kSequence<SplitRows> = &knn<SplitBackend>;
template <class Real> constexpr auto kSequence<RescoreNeighbors<Real>> = &knn_scores<Real>;
template <class T> constexpr auto kSequence<GatherTargets<T>> = &target_rank<T>;
template <class B, class S, class G> constexpr auto kSequence<TileWalk<B, CountTile<B, S, G>>> = &target_rank<typename B::Source>;
template <class Real> constexpr auto kSequence<FinishRanks<Real>> = &target_rank<Real>;

template <class Kernel> KernelEntry entry(const std::string& key) {
  return {.key = key, .family = "knn", .run = kSequence<Kernel>, .threads = Kernel::kThreads, .tags = {{"dtype", key.substr(key.rfind('.') + 1)}}};
}

const std::vector<Registration> kRegistrations = [] {
  std::vector<Registration> all;
#define MODALIGN_REGISTER(key, ...) all.emplace_back(entry<__VA_ARGS__>(key));
  MODALIGN_KNN_KERNELS(MODALIGN_REGISTER)
#undef MODALIGN_REGISTER
  return all;
}();

}   // namespace
}   // namespace modalign::host
