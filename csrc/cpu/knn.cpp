// Exact nearest neighbours on the CPU; compiled once per instruction set.
//
// Maths      ops/knn.h. One product serves all metrics: a scale and a bias per point make it a score.
// Mapping    cpu/select.h: groups of rows are tasks, their tiles are compared with each row's k-th best while they are in cache.
// Cost       2 N M D FLOPs; reads (N + M) D, writes N k. Memory beyond in- and outputs: the packed operands, (N + M) D, and the lists of the rows in progress.
// Precision  products and norms are sums in float (double for double) in the order of the elements, one chain each: equal rows have equal bits wherever they stand.

#include "cpu/knn.h"

#include <cmath>

#include "cpu/pack_rows.h"
#include "cpu/select.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {
namespace {

template <class T> constexpr std::int64_t kTileColumns = 8 * kLanes<T>;

// Sum of squares of the rows in a panel [depth][width], each the chain that a product of the row with itself is.
template <class T, int width>
void panel_squares(const T* panel, std::int64_t depth, T* squares) {
  T sum[width] = {};
  for (std::int64_t k = 0; k < depth; ++k)
    for (int r = 0; r < width; ++r) sum[r] += panel[k * width + r] * panel[k * width + r];
  for (int r = 0; r < width; ++r) squares[r] = sum[r];
}

template <class T>
struct Buffers {
  std::int64_t columns;   // with their padding
  SelectionPlan plan;
  T* row_panels;
  T* column_panels;
  T* row_square;   // |q_i|^2, with room for whole panels
  T* scale;        // of every packed column
  T* bias;
  SelectionBuffers<T> lists;

  Buffers(const KnnProblem& p, Arena& arena)
      : columns(round_up(p.M, kPanelColumns<T>)),
        plan(p.N, (columns + kTileColumns<T> - 1) / kTileColumns<T>, p.k, sizeof(Key<T>)),
        row_panels(arena.take<T>(packed_rows_size(p.N, p.D))),
        column_panels(arena.take<T>(packed_columns_size<T>(p.M, p.D))),
        row_square(arena.take<T>(round_up(p.N, kRegisterRows))),
        scale(arena.take<T>(columns)),
        bias(arena.take<T>(columns)),
        lists(plan, p.N, p.k, arena) {}
};

template <class T>
void pack_operands(const KnnProblem& p, const Buffers<T>& to, const Parallel& parallel) {
  pack_rows<kRegisterRows>(p.dtype, p.queries, p.N, p.D, to.row_panels, parallel, [&](const T* panel, std::int64_t first) {
    if (p.metric != Metric::dot) panel_squares<T, kRegisterRows>(panel, p.D, to.row_square + first);
  });
  constexpr int P = kPanelColumns<T>;
  pack_rows<P>(p.dtype, p.points, p.M, p.D, to.column_panels, parallel, [&](const T* panel, std::int64_t first) {
    T square[P];
    if (p.metric != Metric::dot) panel_squares<T, P>(panel, p.D, square);
    for (int c = 0; c < P; ++c) {
      const std::int64_t j = first + c;
      T given = 0;
      if (j < p.M && p.bias.data) given = static_cast<const T*>(p.bias.data)[j * p.bias.stride];
      to.scale[j] = p.metric == Metric::cosine ? (square[c] == 0 ? T(0) : 1 / std::sqrt(square[c])) : T(1);
      to.bias[j] = is_distance(p.metric) ? square[c] / -2 : given;
      if (j >= p.M) to.scale[j] = 0, to.bias[j] = -std::numeric_limits<T>::infinity();
    }
  });
}

std::int64_t at(const OptionalVector& v, std::int64_t i) { return static_cast<const std::int64_t*>(v.data)[i * v.stride]; }

bool allowed(const KnnProblem& p, std::int64_t i, std::int64_t j) {
  if (p.skip.data && at(p.skip, i) == j) return false;
  return !p.query_labels.data || at(p.query_labels, i) != at(p.point_labels, j);
}

// Products become scores, in place.
template <class T>
void score(const Buffers<T>& buffers, const Tile<T>& tile) {
  constexpr int L = kVectorLanes<T>;
  for (std::int64_t i = 0; i < tile.rows; ++i)
    for (std::int64_t c = 0; c < tile.columns; c += L) {
      T* z = tile.data + i * tile.ld + c;
      store(z, load(z) * load(buffers.scale + tile.column + c) + load(buffers.bias + tile.column + c));
    }
}

template <class T>
PackedPair<T> pair_of(const KnnProblem& p, const Buffers<T>& buffers) {
  return {buffers.row_panels, p.N, buffers.column_panels, buffers.columns, p.D, kTileColumns<T>};
}

template <class T>
void run(const KnnProblem& p, const KnnResult& to, const Buffers<T>& buffers, const Parallel& parallel) {
  pack_operands(p, buffers, parallel);
  const auto finish = [&](std::int64_t i, const Key<T>* keys, std::int64_t count) {
    T* scores = static_cast<T*>(to.scores) + i * p.k;
    for (std::int64_t n = 0; n < count; ++n) scores[n] = score_of<T>(keys[n]), to.indices[i * p.k + n] = index_of(keys[n]);
    for (std::int64_t n = count; n < p.k; ++n) scores[n] = -std::numeric_limits<T>::infinity(), to.indices[i * p.k + n] = -1;
    if (p.metric != Metric::dot) static_cast<T*>(to.squares)[i] = buffers.row_square[i];
  };
  select_best<T>(pair_of(p, buffers), p.k, buffers.plan, buffers.lists, parallel, [&](const Tile<T>& tile) { score(buffers, tile); },
                 [&](std::int64_t i, std::int64_t j) { return allowed(p, i, j); }, finish);
}

// ---- ranks --------------------------------------------------------------------------------------------------------------------------------------------

template <class T>
struct RankBuffers {
  Buffers<T> operands;
  T* target_score;         // with room for whole panels
  std::int64_t* target;    // [N]
  std::int64_t* count;     // [splits][N]
  RankBuffers(const KnnProblem& p, Arena& arena)
      : operands(p, arena),
        target_score(arena.take<T>(round_up(p.N, kRegisterRows))),
        target(arena.take<std::int64_t>(p.N)),
        count(arena.take<std::int64_t>(operands.plan.splits * p.N)) {}
};

// The score of every row's target, in the order of sums that the tiles have; NaN without one.
template <class T>
void score_targets(const KnnProblem& p, const RankBuffers<T>& to, const Parallel& parallel) {
  constexpr int R = kRegisterRows;
  parallel_for(parallel, 0, (p.N + R - 1) / R, 4, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> rows(R * p.D), panel(R * p.D);
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t first = block * R;
      const int here = static_cast<int>(minimum(R, p.N - first));
      for (int r = 0; r < here; ++r) {
        const std::int64_t t = to.target[first + r];
        if (t >= 0) load_row<T>(p.dtype, p.points.data, t * p.points.row_stride, p.points.element_stride, p.D, rows + r * p.D);
      }
      pack_panel(R, here, p.D, [&](int r) -> const T* { return to.target[first + r] >= 0 ? rows + r * p.D : nullptr; }, static_cast<T*>(panel));
      T sum[R] = {};
      const T* q = to.operands.row_panels + first * p.D;
      for (std::int64_t k = 0; k < p.D; ++k)
        for (int r = 0; r < R; ++r) sum[r] += q[k * R + r] * panel[k * R + r];
      for (int r = 0; r < here; ++r) {
        const std::int64_t t = to.target[first + r];
        to.target_score[first + r] = t < 0 ? std::numeric_limits<T>::quiet_NaN() : sum[r] * to.operands.scale[t] + to.operands.bias[t];
      }
    }
  });
}

template <class T>
void run_rank(const KnnProblem& p, std::int64_t* rank, const RankBuffers<T>& buffers, const Parallel& parallel) {
  pack_operands(p, buffers.operands, parallel);
  for (std::int64_t i = 0; i < p.N; ++i) {
    const std::int64_t t = at(p.target, i);
    buffers.target[i] = t >= 0 && allowed(p, i, t) ? t : -1;
  }
  score_targets(p, buffers, parallel);
  const SelectionPlan& plan = buffers.operands.plan;
  count_before<T>(pair_of(p, buffers.operands), buffers.target_score, buffers.target, plan, buffers.count, parallel, [&](const Tile<T>& tile) { score(buffers.operands, tile); },
                  [&](std::int64_t i, std::int64_t j) { return allowed(p, i, j); });
  for (std::int64_t i = 0; i < p.N; ++i) {
    rank[i] = buffers.target_score[i] > -std::numeric_limits<T>::infinity() ? 0 : -1;   // NaN and -inf are no neighbours
    if (rank[i] == 0)
      for (std::int64_t split = 0; split < plan.splits; ++split) rank[i] += buffers.count[split * p.N + i];
  }
}

std::int64_t rank_workspace_bytes(const KnnProblem& p) {
  return with_real(p.dtype, [&](auto real) {
    Arena arena(nullptr);
    RankBuffers<decltype(real)>(p, arena);
    return arena.used();
  });
}

void target_rank(const KnnProblem& p, std::int64_t* rank, void* workspace, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) {
    Arena arena(workspace);
    run_rank(p, rank, RankBuffers<decltype(real)>(p, arena), parallel);
  });
}

std::int64_t workspace_bytes(const KnnProblem& p) {
  return with_real(p.dtype, [&](auto real) {
    Arena arena(nullptr);
    Buffers<decltype(real)>(p, arena);
    return arena.used();
  });
}

void knn(const KnnProblem& p, const KnnResult& to, void* workspace, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) {
    Arena arena(workspace);
    run(p, to, Buffers<decltype(real)>(p, arena), parallel);
  });
}

}  // namespace

extern const KnnKernels kKnnKernels;
const KnnKernels kKnnKernels = {workspace_bytes, knn, rank_workspace_bytes, target_rank};

}  // inline namespace
}  // namespace modalign::cpu
