/// @file knn.cuh
/// @brief Exact nearest neighbours and ranks of targets on CUDA: kernels, launch sequences, and the table of compiled instances.
///
/// Maths      ops/knn.h: z = (q . x) scale + bias, larger first, equal ones by index.
///
/// knn        products    a block per tile of lines: products of line i of one operand with line i of another. Of a matrix with itself these are squared
///                        lengths, with the bits that the tile product of two equal rows has, and become the scale or bias of a point
///            select      tile product queries x points, cuda/select.cuh as its epilogue; rows in panels, so that lists have bounded memory
///            merge       one warp per query: the lists of its walks become one
///            split       precision "high": one warp per row, which becomes two bf16 planes for the kernels above
/// scores     rescore     one warp per query, a lane per point: the scores that `select` gives chosen points, bit by bit
/// rank       gather      one warp per query: its target's row, so that `products` makes the target's score with the bits it has in the tile
///            count       tile product; how many points come before the target
///            finish      one thread per query: sums over the walks; -1 without a target
///
/// Numbers    f32, f64: FmaBackend in the input precision. bf16, f16: one tensor-core product, whose operands are exact, fp32 accumulation.
///            split: f32 in precision "high", three tensor-core products, off by 2^-15 |q| |x| and the rounding of fp32 sums.
/// FLOPs      2 N M D. Bytes: operands once per tile of the other side; 12 N k (f64: 16 N k) written.
/// Memory     2 M numbers (split: also both operands once more); for the rows of a panel lists of 64 to 4 k entries a walk, together at most 256 MB where one tile of rows allows it.
/// Order      sums over D ascending, one for every product. Equal bits from run to run, for every panel and walk.
/// Registers  tiles at most 128 (split: one block a multiprocessor, 180), one-warp kernels at most 168.
#pragma once

#include "cuda/pair_geometry.cuh"
#include "cuda/select.cuh"
#include "ops/knn.h"

namespace modalign::cuda {

// ------------------------------------------------------------------------------------------------------------------------------------------- scores
struct DeviceLabels {
  OptionalVector vector;
  MODALIGN_DEVICE std::int64_t operator[](std::int64_t i) const { return Global<const std::int64_t>(static_cast<const std::int64_t*>(vector.data))[i * vector.stride]; }
};

template <class Real> struct KnnScore {
  const Real* scale;   // [M]; nullptr: 1
  const Real* bias;    // [M]; nullptr: 0
  std::int64_t bias_stride;
  OptionalVector skip, query_labels, point_labels;

  MODALIGN_DEVICE Pack<Real, 2> column(std::int64_t j) const {
    Pack<Real, 2> column;
    column[0] = scale == nullptr ? Real(1) : Real(Global<const Real>(scale)[j]);
    column[1] = bias == nullptr ? Real(0) : Real(Global<const Real>(bias)[j * bias_stride]);
    return column;
  }
  MODALIGN_DEVICE bool allowed(std::int64_t i, std::int64_t j) const {
    if (skip.data != nullptr && DeviceLabels{skip}[i] == j) return false;
    return query_labels.data == nullptr || DeviceLabels{query_labels}[i] != DeviceLabels{point_labels}[j];
  }
};

// ----------------------------------------------------------------------------------------------------------------------------------------- products
enum class Measure { product, inverse_length, minus_half_square };

template <class Backend> struct PairedProducts {
  using T = typename Backend::Source;
  using Real = typename Backend::Real;
  static constexpr int kThreads = kTileThreads;
  static constexpr int kMinBlocks = Backend::kMinBlocks;
  Operand<T> rows, columns;
  std::int64_t count, depth;
  Measure measure;
  Real* out;   // [count]

  LaunchPlan plan(std::int64_t, const char* key) const {
    LaunchPlan plan;
    plan.grid[0] = unsigned(ceil_divide<std::int64_t>(count, Backend::kRows));
    plan.threads = kThreads;
    plan.shared_bytes = Backend::kSharedBytes;
    plan.key = key;
    return plan;
  }

  MODALIGN_DEVICE void operator()() const {
    TileRange range{};
    range.row_begin = range.column_begin = std::int64_t(block_index_x()) * Backend::kRows;
    range.rows = range.columns = int(minimum(count - range.row_begin, std::int64_t(Backend::kRows)));
    const Shared<Real> tile = shared<Real>(0, Backend::kRows * Backend::kPitch);
    {
      typename Backend::Accumulators sum;
      Backend::clear(sum);
      Backend::multiply(sum, rows, Global<const T>(rows.data), columns, Global<const T>(columns.data), range, int(depth));
      Backend::deposit(sum, tile);
    }
    if (!MODALIGN_MUTATION("products: drop the barrier before the diagonal")) barrier();
    const int line = thread_index();
    if (line >= (MODALIGN_MUTATION("products: one line too many") ? range.rows + 1 : range.rows)) return;
    Real value = tile[line * Backend::kPitch + line];
    if (measure == Measure::minus_half_square) value = value / -2;
    if (measure == Measure::inverse_length) value = value == 0 ? Real(0) : 1 / square_root(value);
    global(out)[range.row_begin + line] = value;
  }
};

// -------------------------------------------------------------------------------------------------------------------------------------------- merge
template <class Backend> using SelectKernel = TileWalk<Backend, SelectTile<Backend, KnnScore<typename Backend::Real>>>;

template <class Real> struct MergeNeighbors {
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  RankedLists<Real> lists;
  std::int64_t splits, rows;
  int k;
  Real* scores;   // [rows, k]
  std::int64_t* indices;

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(rows, 1, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t row = warp_item();
    if (row >= (MODALIGN_MUTATION("merge: one row too many") ? rows + 1 : rows)) return;
    const Global<Real> to = global(scores).at(row * k);
    const Global<std::int64_t> to_index = global(indices).at(row * k);
    const int found = merge_lists(lists, splits, row, k, [&](int place, const Ranked<Real>& entry) {
      to[place] = entry.score;
      to_index[place] = entry.index;
    });
    for (int place = found + lane(); place < k; place += kWarpSize) {
      to[place] = -kInfinity<Real>;
      to_index[place] = -1;
    }
  }
};

// ------------------------------------------------------------------------------------------------------------------------------------ lower precision
using SplitBackend = MmaBackend<bf16, 2, Major::depth, Major::depth>;

struct SplitRows {
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  BatchedRows from;
  std::int64_t rows, D, pitch;
  bf16* out;   // [2][rows, pitch]

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(rows, 1, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t row = warp_item();
    if (row >= (MODALIGN_MUTATION("split: one row too many") ? rows + 1 : rows)) return;
    const Global<const float> x = Global<const float>(static_cast<const float*>(from.data)).at(row * from.row_stride);
    const Global<bf16> high = global(out).at(row * pitch), low = global(out).at((rows + row) * pitch);
    for (std::int64_t d = lane(); d < D; d += kWarpSize) {
      const float here = x[d * from.element_stride];
      high[d] = from_float<bf16>(here);
      low[d] = MODALIGN_MUTATION("split: one plane alone") ? from_float<bf16>(0.0f) : low_part(here);
    }
  }
};

// The sums of FmaBackend, ascending in D, of a query and each point that its list names.
template <class Real> struct RescoreNeighbors {
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  KnnScore<Real> score;
  BatchedRows queries, points;
  std::int64_t rows, M, D, k;
  const std::int64_t* indices;   // [rows, k]
  Real* scores;                  // [rows, k]

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(rows, 1, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t row = warp_item();
    if (row >= (MODALIGN_MUTATION("rescore: one row too many") ? rows + 1 : rows)) return;
    const Global<const Real> q = Global<const Real>(static_cast<const Real*>(queries.data)).at(row * queries.row_stride);
    for (std::int64_t place = row * k + lane(); place < (row + 1) * k; place += kWarpSize) {
      const std::int64_t j = Global<const std::int64_t>(indices)[place];
      Real value = -kInfinity<Real>;
      if (j >= 0 && j < M) {
        const Global<const Real> x = Global<const Real>(static_cast<const Real*>(points.data)).at(j * points.row_stride);
        Real product = 0;
        for (std::int64_t d = 0; d < D; ++d) product = fused_multiply_add(Real(q[d * queries.element_stride]), Real(x[d * points.element_stride]), product);
        const Pack<Real, 2> column = score.column(j);
        value = fused_multiply_add(product, column[0], column[1]);
      }
      global(scores)[place] = value;
    }
  }
};

// -------------------------------------------------------------------------------------------------------------------------------------------- ranks
// Targets of the rows of a panel. Values are not checked on a device: what is no index of a point is no target.
struct DeviceTargets {
  OptionalVector target;
  std::int64_t M;
  MODALIGN_DEVICE std::int64_t operator[](std::int64_t i) const {
    const std::int64_t t = DeviceLabels{target}[i];
    return t < 0 || t >= M ? -1 : t;
  }
};

template <class T> struct GatherTargets {
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  DeviceTargets targets;
  BatchedRows points;
  std::int64_t rows, D, pitch;
  T* out;   // [rows, pitch]

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(rows, 1, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t row = warp_item();
    if (row >= rows) return;
    const std::int64_t t = targets[row];
    const Global<const T> from = Global<const T>(static_cast<const T*>(points.data)).at((t < 0 ? 0 : t) * points.row_stride);
    const Global<T> to = global(out).at(row * pitch);
    const std::int64_t end = MODALIGN_MUTATION("gather: leave the last element") ? D - 1 : D;
    for (std::int64_t d = lane(); d < end; d += kWarpSize) to[d] = T(from[d * points.element_stride]);
  }
};

template <class Real> struct TargetScore {
  KnnScore<Real> score;
  DeviceTargets targets;
  const Real* product;   // [rows] query . target

  // What nothing comes before, where there is no target that may be a neighbour.
  MODALIGN_DEVICE Ranked<Real> operator()(std::int64_t i) const {
    const std::int64_t t = targets[i];
    if (t < 0 || !score.allowed(i, t)) return {kInfinity<Real>, -1};
    const Pack<Real, 2> column = score.column(t);
    return {fused_multiply_add(Real(Global<const Real>(product)[i]), column[0], column[1]), int(t)};
  }
};
template <class T>
using CountKernel = TileWalk<PairBackend<T>, CountTile<PairBackend<T>, KnnScore<real_of<T>>, TargetScore<real_of<T>>>>;

template <class Real> struct FinishRanks {
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  TargetScore<Real> target;
  const int* slots;   // [splits][rows]
  std::int64_t splits, rows;
  std::int64_t* rank;

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(ceil_divide<std::int64_t>(rows, kWarpSize), 1, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t row = warp_item() * kWarpSize + lane();
    if (row >= (MODALIGN_MUTATION("finish: one row too many") ? rows + 1 : rows)) return;
    const Ranked<Real> own = target(row);
    std::int64_t before = 0;
    for (std::int64_t split = 0; split < splits; ++split) before += Global<const int>(slots)[split * rows + row];
    global(rank)[row] = own.index >= 0 && own.score > -kInfinity<Real> ? before : -1;   // NaN is no neighbour
  }
};

// ---------------------------------------------------------------------------------------------------------------------------- the compiled instances
#define MODALIGN_KNN_KERNELS_OF(X, dtype, T)              \
  X("knn.products." dtype, PairedProducts<PairBackend<T>>) \
  X("knn.select." dtype, SelectKernel<PairBackend<T>>)     \
  X("target_rank.gather." dtype, GatherTargets<T>) \
  X("target_rank.count." dtype, CountKernel<T>)
#define MODALIGN_KNN_KERNELS(X)                             \
  MODALIGN_KNN_KERNELS_OF(X, "f32", float)                  \
  MODALIGN_KNN_KERNELS_OF(X, "f64", double)                 \
  MODALIGN_KNN_KERNELS_OF(X, "f16", f16)                    \
  MODALIGN_KNN_KERNELS_OF(X, "bf16", bf16)                  \
  X("knn.split.split", SplitRows)                           \
  X("knn.products.split", PairedProducts<SplitBackend>)     \
  X("knn.select.split", SelectKernel<SplitBackend>)         \
  X("knn_scores.rescore.f32", RescoreNeighbors<float>)      \
  X("knn_scores.rescore.f64", RescoreNeighbors<double>)     \
  X("knn.merge.f32", MergeNeighbors<float>)                 \
  X("knn.merge.f64", MergeNeighbors<double>)                \
  X("target_rank.finish.f32", FinishRanks<float>)           \
  X("target_rank.finish.f64", FinishRanks<double>)

MODALIGN_KNN_KERNELS(MODALIGN_KEY_OF)

// ---------------------------------------------------------------------------------------------------------------------------------- launch sequences
// What knn and target_rank share: the scale and the bias of every point, where the metric makes them.
template <class Real> struct PointMeasures {
  Real* values = nullptr;   // [M], of cosine and distances
  template <class Arena> PointMeasures(const KnnProblem& p, Arena& arena) {
    if (p.metric != Metric::dot) values = arena.template take<Real>("point_measures", p.M);
  }
};

template <class T> inline Operand<T> rows_operand(const BatchedRows& rows, std::int64_t first) {
  return make_operand<T>(Major::depth, static_cast<const T*>(rows.data) + first * rows.row_stride, 0, rows.row_stride, rows.element_stride);
}
template <class T> inline Operand<T> shifted(Operand<T> operand, std::int64_t first) {   // whole tiles
  operand.data += first * operand.line_stride;
  return operand;
}
inline OptionalVector shifted(const OptionalVector& v, std::int64_t first) {
  if (v.data == nullptr) return v;
  return {static_cast<const std::int64_t*>(v.data) + first * v.stride, v.stride};
}

template <class Real> inline KnnScore<Real> score_of(const KnnProblem& p, const PointMeasures<Real>& points, std::int64_t first) {
  KnnScore<Real> score{};
  score.scale = p.metric == Metric::cosine ? points.values : nullptr;
  score.bias = is_distance(p.metric) ? points.values : static_cast<const Real*>(p.bias.data);
  score.bias_stride = is_distance(p.metric) ? 1 : p.bias.stride;
  score.skip = shifted(p.skip, first);
  score.query_labels = shifted(p.query_labels, first);
  score.point_labels = p.point_labels;
  return score;
}

template <class Backend, class Launch>
int measure_points(const KnnProblem& p, const Operand<typename Backend::Source>& points, const PointMeasures<typename Backend::Real>& to, const Launch& launch) {
  if (p.metric == Metric::dot) return 0;
  const Measure measure = p.metric == Metric::cosine ? Measure::inverse_length : Measure::minus_half_square;
  return launch_kernel(launch, PairedProducts<Backend>{points, points, p.M, p.D, measure, to.values}, 1);
}
template <class Backend, class Launch>
int measure_queries(const KnnProblem& p, const Operand<typename Backend::Source>& queries, void* squares, const Launch& launch) {
  if (p.metric == Metric::dot) return 0;
  return launch_kernel(launch, PairedProducts<Backend>{queries, queries, p.N, p.D, Measure::product, static_cast<typename Backend::Real*>(squares)}, 1);
}

// Both operands of a search: those of the problem, or the planes that these are split into.
template <class Backend> struct KnnOperands {
  using T = typename Backend::Source;
  static constexpr bool kSplit = std::is_same_v<Backend, SplitBackend>;
  Operand<T> queries, points;
  T *query_planes = nullptr, *point_planes = nullptr;
  std::int64_t pitch;

  template <class Arena> KnnOperands(const KnnProblem& p, Arena& arena) : pitch(operand_pitch<T>(p.D)) {
    if constexpr (kSplit) {
      query_planes = arena.template take<T>("query_planes", 2 * p.N * pitch);
      point_planes = arena.template take<T>("point_planes", 2 * p.M * pitch);
      queries = make_operand<T>(Major::depth, static_cast<const T*>(query_planes), 0, pitch, 1, p.N * pitch);
      points = make_operand<T>(Major::depth, static_cast<const T*>(point_planes), 0, pitch, 1, p.M * pitch);
    } else {
      queries = rows_operand<T>(p.queries, 0);
      points = rows_operand<T>(p.points, 0);
    }
  }
  template <class Launch> int make(const KnnProblem& p, const Launch& launch) const {
    if constexpr (kSplit) {
      if (const int error = launch_kernel(launch, SplitRows{p.queries, p.N, p.D, pitch, query_planes}, 1)) return error;
      if (const int error = launch_kernel(launch, SplitRows{p.points, p.M, p.D, pitch, point_planes}, 1)) return error;
    }
    return 0;
  }
};

template <class Backend> struct KnnBuffers {
  using Real = typename Backend::Real;
  SelectLayout layout;
  KnnOperands<Backend> operands;
  PointMeasures<Real> points;
  RankedLists<Real> lists;
  template <class Arena>
  KnnBuffers(const KnnProblem& p, std::int64_t budget, Arena& arena)
      : layout(select_layout(p.N, p.M, Backend::kRows, Backend::kColumns, list_room(p.k) * std::int64_t(sizeof(Real) + sizeof(int)), 0, budget)),
        operands(p, arena),
        points(p, arena),
        lists{} {
    lists.room = list_room(p.k);
    lists.rows = layout.panel_rows < p.N ? layout.panel_rows : p.N;
    const std::int64_t count = layout.splits * lists.rows;
    lists.scores = arena.template take<Real>("list_scores", count * lists.room);
    lists.indices = arena.template take<int>("list_indices", count * lists.room);
    lists.counts = arena.template take<int>("list_counts", count);
  }
};

template <class Backend, class Launch> int run_knn(const KnnProblem& p, const KnnResult& to, const KnnBuffers<Backend>& buffers, const Launch& launch) {
  using Real = typename Backend::Real;
  const KnnOperands<Backend>& operands = buffers.operands;
  if (const int error = operands.make(p, launch)) return error;
  if (const int error = measure_points<Backend>(p, operands.points, buffers.points, launch)) return error;
  if (const int error = measure_queries<Backend>(p, operands.queries, to.squares, launch)) return error;
  for (std::int64_t first = 0; first == 0 || first < p.N; first += buffers.layout.panel_rows) {
    const std::int64_t rows = p.N - first < buffers.layout.panel_rows ? p.N - first : buffers.layout.panel_rows;
    const TileGrid grid = make_grid(rows, p.M, p.D, Backend::kRows, Backend::kColumns, 0, buffers.layout.splits);
    const SelectKernel<Backend> select{shifted(operands.queries, first), operands.points, grid, {score_of(p, buffers.points, first), buffers.lists, int(p.k)}};
    if (const int error = launch_kernel(launch, select, 1)) return error;
    const MergeNeighbors<Real> merge{buffers.lists, grid.column_walks, rows, int(p.k), static_cast<Real*>(to.scores) + first * p.k, to.indices + first * p.k};
    if (const int error = launch_kernel(launch, merge, 1)) return error;
  }
  return 0;
}

// f32 and f64: what `knn` in the highest precision gives the points of `indices`, into to.scores and to.squares.
template <class T, class Launch>
int run_knn_scores(const KnnProblem& p, const std::int64_t* indices, const KnnResult& to, const PointMeasures<T>& points, const Launch& launch) {
  using Backend = PairBackend<T>;
  if (const int error = measure_points<Backend>(p, rows_operand<T>(p.points, 0), points, launch)) return error;
  if (const int error = measure_queries<Backend>(p, rows_operand<T>(p.queries, 0), to.squares, launch)) return error;
  return launch_kernel(launch, RescoreNeighbors<T>{score_of(p, points, 0), p.queries, p.points, p.N, p.M, p.D, p.k, indices, static_cast<T*>(to.scores)}, 1);
}

template <class T> struct RankBuffers {
  using Real = real_of<T>;
  SelectLayout layout;
  PointMeasures<Real> points;
  std::int64_t pitch;
  T* gathered;      // [panel, pitch]
  Real* product;    // [panel]
  int* slots;       // [splits][panel]
  template <class Arena>
  RankBuffers(const KnnProblem& p, std::int64_t budget, Arena& arena)
      : layout(select_layout(p.N, p.M, PairBackend<T>::kRows, PairBackend<T>::kColumns, sizeof(int), operand_pitch<T>(p.D) * std::int64_t(sizeof(T)) + std::int64_t(sizeof(Real)), budget)),
        points(p, arena),
        pitch(operand_pitch<T>(p.D)) {
    const std::int64_t rows = layout.panel_rows < p.N ? layout.panel_rows : p.N;
    gathered = arena.template take<T>("gathered", rows * pitch);
    product = arena.template take<Real>("target_products", rows);
    slots = arena.template take<int>("slots", layout.splits * rows);
  }
};

template <class T, class Launch> int run_target_rank(const KnnProblem& p, std::int64_t* rank, const RankBuffers<T>& buffers, const Launch& launch) {
  using Backend = PairBackend<T>;
  using Real = real_of<T>;
  if (const int error = measure_points<Backend>(p, rows_operand<T>(p.points, 0), buffers.points, launch)) return error;
  for (std::int64_t first = 0; first == 0 || first < p.N; first += buffers.layout.panel_rows) {
    const std::int64_t rows = p.N - first < buffers.layout.panel_rows ? p.N - first : buffers.layout.panel_rows;
    const KnnScore<Real> score = score_of(p, buffers.points, first);
    const DeviceTargets targets{shifted(p.target, first), p.M};
    const Operand<T> queries = rows_operand<T>(p.queries, first);
    if (const int error = launch_kernel(launch, GatherTargets<T>{targets, p.points, rows, p.D, buffers.pitch, buffers.gathered}, 1)) return error;
    const Operand<T> gathered = make_operand<T>(Major::depth, static_cast<const T*>(buffers.gathered), 0, buffers.pitch, 1);
    if (const int error = launch_kernel(launch, PairedProducts<Backend>{queries, gathered, rows, p.D, Measure::product, buffers.product}, 1)) return error;
    const TileGrid grid = make_grid(rows, p.M, p.D, Backend::kRows, Backend::kColumns, 0, buffers.layout.splits);
    const TargetScore<Real> target{score, targets, buffers.product};
    if (const int error = launch_kernel(launch, CountKernel<T>{queries, rows_operand<T>(p.points, 0), grid, {score, target, buffers.slots, rows}}, 1)) return error;
    if (const int error = launch_kernel(launch, FinishRanks<Real>{target, buffers.slots, grid.column_walks, rows, rank + first}, 1)) return error;
  }
  return 0;
}

}   // namespace modalign::cuda
