/// @file contrastive_loss.cuh
/// @brief Contrastive losses over all pairs on CUDA, forward and backward, with no matrix of similarities: kernels, launch plans, and the table of
/// compiled instances.
///
/// Maths      ops/contrastive_loss.h. The values of a tile become logits in place and are folded at once into log-sum-exps and sums of rows and
///            columns, beside them the largest (form (c) of tile.cuh). Backward makes each tile again, forms dL/dz from the saved log-sum-exps and goes
///            on as pair_gradient.cuh does. (GRAM, ICLR 2025; CLIP 2021; SigLIP 2023; TRIANGLE, NeurIPS 2025; recomputation as in FlashAttention and
///            Inf-CL.)
///
/// Forward    prepare        of the volume family: basis, factor, scale_j, |a_i|^2 (form product: nothing to prepare)
///            labels         one warp per row: its label, and the logit of the labelled pair from the vectors. Sums of exponentials leave it out in
///                           their tiles and take it in at the end, in double: a nearly solved batch keeps its digits, no loss is below 0 by rounding
///            column_labels  one warp per 32 columns: whether they take part, whether they are a row's label, and the sum of exponentials of those
///                           rows' logits; walks all labels
///            forward        tile product; a thread owns a candidate of the tile and its rows in turn: values, then logits and the statistics of the
///                           column; then a thread owns a part of a row: statistics of the row in shared memory along the walk. The largest are
///                           found before the label takes its exact value, so that equal vectors have equal logits and the lowest index wins
///            draw           forward, with noise added where the largest are found (ops/contrastive_loss.h)
///            fold_columns   one thread per column: the slots in order
///            classes        one block: how many rows and columns take part, and the center
///            fold_rows      one thread per row: the slots in order, then the loss
/// Backward   rows           one warp per row: its label again, and a copy of the anchor that is zero where the row takes no part, so that nothing
///                           in it (a NaN) can matter; form product: the labelled pair's value, f16 operands as two bf16 planes
///   volume, triangle        the sequence of pair_gradient.cuh with LossUpstream; the labelled pair counts as near zero
///   product, for each panel of rows:
///            coefficients   tile product -> T = dL/dvalue in the workspace
///            grad_anchor    product: dA_I = T Y;   grad_basis: dY += T^t A_I;   and at the end narrow: dY to its dtype
///            scale          one block: the sums of dz (v - center) and dz over the slots
///
/// Scalars    scale and bias are read from device memory by every thread that needs them: no synchronisation, a new value compiles nothing.
/// Numbers    as the volume family: f32, f64 in their precision, bf16 and f16 rounded operands with fp32 accumulation; logits, exponentials and all
///            statistics in fp32 (fp64 for f64). exp, log and log1p of the CUDA library, no fast variants.
/// FLOPs      forward 2 B C m D, backward 6 B C m D; two exponentials per pair each (sigmoid: one). Bytes forward: operands once per tile of the
///            other side, 20 per row and column walk and per column and row walk (f64: 36); backward as pair_gradient.cuh.
/// Memory     workspace: 20 (B + C) bytes times at most kLossWalks = 32 statistics slots (f64: 36), 16 C; half inputs C m D halves; backward: the copy of
///            the anchors (B D), what pair_gradient.cuh takes (product: the panel of T; half inputs dY [C, D] in fp32, f16 2 (B + C) D bf16), and 8 bytes
///            per row tile and column walk.
/// Order      every sum has one order fixed by the sizes: rows of a tile by thread and phase, tiles of a walk in turn, slots ascending; no atomics.
///            Equal bits from run to run.
/// Registers  tiles at most 128 (coefficients of volume and triangle in f64: one block of up to 255), one-warp kernels at most 168.
#pragma once

#include <limits>
#include <type_traits>

#include "common/philox.h"
#include "cuda/pair_gradient.cuh"
#include "ops/contrastive_loss.h"

namespace modalign::cuda {

constexpr int kLossWalks = 32;                          // slots of statistics along either side
constexpr std::int64_t kNoLabel = kNoTarget, kNoPart = -2;   // a row without a label; a row that takes no part
constexpr std::uint32_t kTakesPart = 1, kIsLabel = 2;        // of a column
constexpr int kThreadKernelThreads = 256;               // one thread per item
template <class Real> inline constexpr Real kBelowOne = 1 - std::numeric_limits<Real>::epsilon() / 2;

// The plain product x . y as a third geometry: m = 1, no basis.
struct ProductGeometry {
  static constexpr bool kTriangle = false;
};
template <class Geometry> inline constexpr bool kIsProduct = std::is_same_v<Geometry, ProductGeometry>;

// ---------------------------------------------------------------------------------------------------------------------------------- logits and labels
template <class Real> struct Logit {
  Real scale, bias;
  MODALIGN_DEVICE Real operator()(Real value) const { return fused_multiply_add(scale, value, bias); }
};
template <class Real> struct LogitScalars {
  const Real* scale;
  const Real* bias;   // or nullptr: 0
  MODALIGN_DEVICE Logit<Real> load() const { return {Global<const Real>(scale)[0], bias != nullptr ? Real(Global<const Real>(bias)[0]) : Real(0)}; }
};

// log(1 + exp(z)) and 1 / (1 + exp(-z)), no overflow for any z
template <class Real> MODALIGN_DEVICE Real softplus(Real z) { return maximum(z, Real(0)) + logarithm_1p(exponential(-absolute(z))); }
template <class Real> MODALIGN_DEVICE Real sigmoid(Real z) {
  const Real e = exponential(-absolute(z));
  return (z > 0 ? Real(1) : e) / (1 + e);
}

struct Targets {
  const std::int64_t* target;   // or nullptr: row i has label i
  std::int64_t stride;
  MODALIGN_DEVICE std::int64_t of(std::int64_t i) const { return target != nullptr ? std::int64_t(global(target)[i * stride]) : i; }
};

MODALIGN_DEVICE bool any_present(const PresenceMask& present, std::int64_t j, int m) {
  if (present.data == nullptr) return true;
  bool any = false;
  for (int p = 0; p < m; ++p) any = any || bool(Global<const bool>(present.data)[j * present.row_stride + p * present.element_stride]);
  return any;
}

// x . y of two rows by the lanes of a warp.
template <class T>
MODALIGN_DEVICE real_of<T> warp_dot(Global<const T> x, std::int64_t x_stride, Global<const T> y, std::int64_t y_stride, std::int64_t D) {
  real_of<T> sum = 0;
  for (std::int64_t d = lane(); d < D; d += kWarpSize) sum = fused_multiply_add(widen(T(x[d * x_stride])), widen(T(y[d * y_stride])), sum);
  return warp_sum(sum);
}

template <class T> MODALIGN_DEVICE Global<const T> row_of(const BatchedRows& rows, std::int64_t i) {
  return Global<const T>(static_cast<const T*>(rows.data)).at(i * rows.row_stride);
}

// One warp per row.
template <class Geometry, class T> struct RowLabels {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  std::int64_t B;
  PairView<Geometry, T> view;
  BatchedRows columns;   // form product: y
  PresenceMask present;
  Targets targets;
  LogitScalars<Real> scalars;
  std::int64_t* label;   // [B] column, kNoLabel or kNoPart
  Real* logit;           // [B] of the labelled pair; 0 without one

  LaunchPlan plan(std::int64_t batches, const char* key) const { return plan_warps(B, batches, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t i = warp_item();
    if (i >= (MODALIGN_MUTATION("labels: one row too many") ? B + 1 : B)) return;
    const std::int64_t t = targets.of(i);
    const std::int64_t mine = t == kIgnoredTarget ? kNoPart : t >= 0 && t < view.C && any_present(present, t, view.m) ? t : kNoLabel;
    Real z = 0;
    if (mine >= 0) {
      Real value;
      if constexpr (kIsProduct<Geometry>) {
        value = warp_dot<T>(view.anchor_row(0, i), view.anchor_element_stride, row_of<T>(columns, mine), columns.element_stride, view.D);
      } else {
        const DirectPair<Geometry, T> pair(view, 0, i, mine);
        value = view.column(0, mine).scale * square_root(pair.square);
      }
      z = scalars.load()(value);
    }
    if (lane() == 0) {
      global(label)[i] = mine;
      global(logit)[i] = z;
    }
  }
};

// One warp per 32 columns: each lane looks for the rows whose label is its own, and sums them in their order.
template <class Real> struct ColumnLabels {
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  static constexpr int kAhead = 8;   // pieces of 32 labels on their way at once
  std::int64_t B, C;
  int m;
  bool diagonal;   // row i can have label i alone
  PresenceMask present;
  const std::int64_t* label;
  const Real* logit;      // [B] of the labelled pairs
  std::uint32_t* flags;   // [C] kTakesPart, kIsLabel
  double* sum;            // [C][2] (max, sum of exp(z - max)) over the labelled pairs of the column

  LaunchPlan plan(std::int64_t batches, const char* key) const { return plan_warps(ceil_divide<std::int64_t>(C, kWarpSize), batches, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t first = warp_item() * kWarpSize, j = first + lane();
    if (first >= C) return;
    const std::int64_t begin = diagonal ? first : 0, stop = diagonal ? minimum(first + kWarpSize, B) : B;
    MaxSum<double> labelled{0, 0};
    for (std::int64_t ahead = begin; ahead < stop; ahead += kAhead * kWarpSize) {
      int owner[kAhead];   // the lane that owns the label's column, or -1
      MODALIGN_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        const std::int64_t i = ahead + a * kWarpSize + lane();
        const std::int64_t from_first = i < stop ? global(label)[i] - first : -1;
        owner[a] = from_first >= 0 && from_first < kWarpSize ? int(from_first) : -1;
      }
      MODALIGN_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        std::uint32_t found = warp_ballot(owner[a] >= 0);
        for (int other = 0; found != 0; ++other, found >>= 1)
          if ((found & 1) != 0 && shuffle(owner[a], other) == lane()) labelled = join(labelled, {double(global(logit)[ahead + a * kWarpSize + other]), 1});
      }
    }
    if (j >= (MODALIGN_MUTATION("column labels: one column too many") ? C + 1 : C)) return;
    global(flags)[j] = (any_present(present, j, m) ? kTakesPart : 0u) | (labelled.sum > 0 ? kIsLabel : 0u);
    Pack<double, 2> pair;
    pair[0] = labelled.max;
    pair[1] = labelled.sum;
    store_pack(global(sum), 2 * j, pair);
  }
};

// classes = columns and rows that take part, rows with a label, and the center: the mean over columns of (lse - log rows - bias) / scale, what all
// values have in common; 0 for sigmoid and where that is not finite. One block.
template <class Real> struct CountClasses {
  static constexpr int kThreads = kThreadKernelThreads;
  static constexpr int kWarps = kThreads / kWarpSize;
  std::int64_t B, C;
  bool sigmoid;
  LogitScalars<Real> scalars;
  const std::int64_t* label;
  const std::uint32_t* flags;
  const double* column_lse;
  Real* classes;   // [4]

  LaunchPlan plan(std::int64_t, const char* key) const {
    LaunchPlan plan;
    plan.threads = kThreads;
    plan.shared_bytes = 4 * kWarps * int(sizeof(double));
    plan.key = key;
    return plan;
  }

  MODALIGN_DEVICE void operator()() const {
    const Shared<double> warps = shared<double>(0, 4 * kWarps);
    int columns = 0, rows = 0, labelled = 0;
    double lse = 0;
    for (std::int64_t j = thread_index(); j < C; j += kThreads)
      if ((global(flags)[j] & kTakesPart) != 0) {
        ++columns;
        lse += global(column_lse)[j];
      }
    for (std::int64_t i = thread_index(); i < B; i += kThreads) {
      const std::int64_t t = global(label)[i];
      rows += t != kNoPart;
      labelled += t >= 0;
    }
    const double sums[4] = {double(warp_sum(columns)), double(warp_sum(rows)), double(warp_sum(labelled)), warp_sum(lse)};
    if (lane() == 0) {
      MODALIGN_UNROLL
      for (int k = 0; k < 4; ++k) warps[k * kWarps + warp()] = sums[k];
    }
    if (!MODALIGN_MUTATION("classes: drop the barrier before the warps are added")) barrier();
    if (thread_index() > 0) return;
    double total[4];
    MODALIGN_UNROLL
    for (int k = 0; k < 4; ++k) {
      total[k] = 0;
      for (int w = 0; w < kWarps; ++w) total[k] += warps[k * kWarps + w];
    }
    const Logit<Real> logit = scalars.load();
    const double center = sigmoid ? 0.0 : (total[3] / total[0] - logarithm(total[1]) - logit.bias) / logit.scale;
    for (int k = 0; k < 3; ++k) global(classes)[k] = Real(total[k]);
    global(classes)[3] = is_finite(Real(center)) ? Real(center) : Real(0);
  }
};

// -------------------------------------------------------------------------------------------------------------------------------------------- forward
// What a row or a column keeps: a running log-sum-exp (max, sum of exp(z - max)), the sum of logits (sigmoid: of softplus), and the largest logit
// with its place (-1: none yet; a NaN is never the largest).
template <class Real> struct Statistics {
  MaxSum<Real> lse{0, 0};
  Real total = 0, top = -kInfinity<Real>;
  int best = -1;

  MODALIGN_DEVICE void see(Real z, int place) {   // ties go to the lowest place
    if (z > top || (z == top && place < best)) {
      top = z;
      best = place;
    }
  }
};
template <class Real> MODALIGN_DEVICE Statistics<Real> join(const Statistics<Real>& a, const Statistics<Real>& b) {
  Statistics<Real> both = a;
  both.lse = join(a.lse, b.lse);
  both.total = a.total + b.total;
  both.see(b.top, b.best);
  return both;
}

// Arrays of statistics, global or shared: two pairs of reals and a place each.
template <class Real> struct StatisticsArray {
  Real* reals;
  int* best;
  template <class Arena> static StatisticsArray take(Arena& arena, const char* reals_name, const char* best_name, std::int64_t count) {
    return {arena.template take<Real>(reals_name, 4 * count), arena.template take<int>(best_name, count)};
  }
};
template <class Reals, class Places> struct StatisticsView {
  Reals reals;
  Places best;
};
template <class Real> MODALIGN_DEVICE auto shared_statistics(int offset) {
  return StatisticsView<Shared<Real>, Shared<int>>{shared<Real>(offset, 4 * kTileThreads),
                                                   shared<int>(offset + 4 * kTileThreads * int(sizeof(Real)), kTileThreads)};
}
template <class Real> MODALIGN_DEVICE auto global_statistics(const StatisticsArray<Real>& array, std::int64_t first) {
  return StatisticsView<Global<Real>, Global<int>>{Global<Real>(array.reals).at(4 * first), Global<int>(array.best).at(first)};
}
template <class View, class Index> MODALIGN_DEVICE auto read_statistics(const View& view, Index i) {
  const auto lse = load_pack<2>(view.reals, 4 * i), sums = load_pack<2>(view.reals, 4 * i + 2);
  Statistics<std::remove_cvref_t<decltype(lse[0])>> x;
  x.lse = {lse[0], lse[1]};
  x.total = sums[0];
  x.top = sums[1];
  x.best = view.best[i];
  return x;
}
template <class View, class Index, class Real> MODALIGN_DEVICE void write_statistics(const View& view, Index i, const Statistics<Real>& x) {
  Pack<Real, 2> lse, sums;
  lse[0] = x.lse.max;
  lse[1] = x.lse.sum;
  sums[0] = x.total;
  sums[1] = x.top;
  store_pack(view.reals, 4 * i, lse);
  store_pack(view.reals, 4 * i + 2, sums);
  view.best[i] = x.best;
}

// Slots: rows [column walk][B], columns [row walk][C].
// draw: the largest of logit + noise, without the label.
template <class Geometry, class T, bool draw> struct LogitsEpilogue {
  using Backend = PairBackend<T>;
  using Real = real_of<T>;
  static constexpr int kParts = kTileThreads / Backend::kRows;   // threads along a row
  static constexpr int kPiece = 4;                               // columns that a part takes at a time
  static constexpr int kRowBytes = Backend::kRows * int(sizeof(Real)), kStatisticsBytes = kTileThreads * (4 * int(sizeof(Real)) + 4);
  static constexpr int kLabelOffset = 2 * kRowBytes, kRowOffset = kLabelOffset + Backend::kRows * 4, kColumnOffset = kRowOffset + kStatisticsBytes;
  static constexpr int kSharedBytes = kColumnOffset + kStatisticsBytes;
  static constexpr int kMinBlocks = 2;
  struct State {};
  PairView<Geometry, T> view;
  LogitScalars<Real> scalars;
  bool sigmoid;
  std::int64_t B;
  const std::int64_t* label;
  const Real* row_logit;
  const std::uint32_t* flags;
  const std::int64_t* seed;   // draws alone
  StatisticsArray<Real> row_slots, column_slots;
  std::int64_t row_tiles_per_walk;
  int tile_candidates, lanes_log2;   // of a column tile; threads along them are a power of two

  // The candidate of a tile that a thread owns, and its rows: phase, phase + phases, ... No division: the walk has no registers for its parts.
  MODALIGN_DEVICE int slot_of(int thread) const { return thread & ((1 << lanes_log2) - 1); }
  MODALIGN_DEVICE int phase_of(int thread) const { return thread >> lanes_log2; }
  MODALIGN_DEVICE int phases() const { return kTileThreads >> lanes_log2; }

  // Where the logit of a candidate stands in its row: a warp packs the candidates of its lanes into columns that it alone has read.
  static MODALIGN_DEVICE int place(int slot, int m) { return slot / kWarpSize * kWarpSize * m + slot % kWarpSize; }

  MODALIGN_DEVICE void begin(State&, const TileRange& range, std::int64_t, const WalkPosition&, int shared_offset) const {
    const Shared<Real> squares = shared<Real>(shared_offset, Backend::kRows), marks = shared<Real>(shared_offset + kRowBytes, Backend::kRows);
    const Shared<int> labels = shared<int>(shared_offset + kLabelOffset, Backend::kRows);   // there are fewer than 2^31 columns
    for (int row = opaque(thread_index()); row < range.rows; row += kTileThreads) {
      if constexpr (!kIsProduct<Geometry>) squares[row] = view.square_of_row(0, range.row_begin + row);
      labels[row] = int(global(label)[range.row_begin + row]);
      marks[row] = global(row_logit)[range.row_begin + row];
    }
    write_statistics(shared_statistics<Real>(shared_offset + kRowOffset), opaque(thread_index()), Statistics<Real>());
  }

  MODALIGN_DEVICE void consume(State&, Shared<Real> tile, const TileRange& range, std::int64_t, const WalkPosition& walk, int shared_offset) const {
    const Shared<Real> squares = shared<Real>(shared_offset, Backend::kRows), marks = shared<Real>(shared_offset + kRowBytes, Backend::kRows);
    const Shared<int> labels = shared<int>(shared_offset + kLabelOffset, Backend::kRows);
    const auto row_statistics = shared_statistics<Real>(shared_offset + kRowOffset);
    const auto column_statistics = shared_statistics<Real>(shared_offset + kColumnOffset);
    const int thread = opaque(thread_index()), m = opaque(view.m);   // or what follows from them is carried through the product
    const int slot = slot_of(thread), phase = phase_of(thread);
    const int first = int(range.column_tile) * tile_candidates, candidates = minimum(int(view.C) - first, tile_candidates);
    if constexpr (!kIsProduct<Geometry>) make_values(thread, m, tile, range, first, candidates, squares, labels);
    Statistics<Real> mine;
    if (slot < candidates) mine = fold_column(thread, m, tile, range, first, marks, labels);
    write_statistics(column_statistics, thread, mine);
    if (!MODALIGN_MUTATION("logits: drop the barrier before columns and rows are folded")) barrier();
    if (phase == 0 && slot < candidates) {
      for (int p = 1; p < phases(); ++p) mine = join(mine, read_statistics(column_statistics, (p << lanes_log2) + slot));
      const auto slots = global_statistics(column_slots, walk.row * view.C + first);
      if (range.row_tile != walk.row * row_tiles_per_walk) mine = join(read_statistics(slots, std::int64_t(slot)), mine);
      write_statistics(slots, std::int64_t(slot), mine);
    }
    fold_row(thread, m, tile, range, first, candidates, marks, labels, row_statistics);
  }

  // Standard Gumbel noise of a pair for the draw of its row (0) or column (1), as in cpu/gumbel.h.
  MODALIGN_DEVICE Real noise(int i, int j, int side) const {
    const std::uint64_t key = std::uint64_t(std::int64_t(global(seed)[0]));
    const std::uint32_t bits = philox<std::uint32_t>({std::uint32_t(j), std::uint32_t(i), 0, 0}, key, ScalarProduct()).word[side];
    const Real uniform = (Real(bits >> 1) + Real(0.5)) * Real(0x1p-31);
    return -logarithm(-logarithm_1p(-minimum(uniform, kBelowOne<Real>)));
  }

  // Products become values, each row packed.
  MODALIGN_DEVICE void make_values(int thread, int m, Shared<Real> tile, const TileRange& range, int first, int candidates, Shared<Real> squares,
                                   Shared<int> labels) const {
    const int slot = slot_of(thread), row_step = phases();
    const bool exists = slot < candidates;
    const std::int64_t j = first + slot;
    ColumnData<Real> column{0, 0, 0};
    bool counts = false;
    if (exists) {
      column = view.column(0, j);
      counts = (global(flags)[j] & kTakesPart) != 0;
    }
    MODALIGN_NO_UNROLL
    for (int row = phase_of(thread); row < range.rows; row += row_step) {
      if (labels[row] == kNoPart) continue;   // the whole warp
      Real s[kMaxOthers], r = 0, trust = 0;
      if (exists) {
        load_candidate(s, tile, row * Backend::kPitch + slot * m, m);
        r = Geometry::residual(s, m, Real(squares[row]), column, trust);
      }
      const bool near = counts && trust > 0 && is_finite(trust) && column.scale != 0 && r <= view.near * trust;
      std::uint32_t pending = warp_ballot(near);
      for (int other = 0; pending != 0; ++other, pending >>= 1) {
        if ((pending & 1) == 0) continue;
        const DirectPair<Geometry, T> pair(view, 0, range.row_begin + row,
                                           j - lane() + (MODALIGN_MUTATION("logits: the neighbour's pair") ? other ^ 1 : other));
        if (lane() == other) r = pair.square;
      }
      // the ballot orders no memory: what the lanes have read, others now write over
      if (!MODALIGN_MUTATION("logits: drop the barrier before values are packed")) warp_barrier();
      if (exists) tile[row * Backend::kPitch + place(slot, m)] = column.scale * square_root(r < 0 ? Real(0) : r);   // keeps NaN
    }
  }

  // This thread's rows of its candidate: values become logits. The label's exact value is put in its place wherever it is added up.
  MODALIGN_DEVICE Statistics<Real> fold_column(int thread, int m, Shared<Real> tile, const TileRange& range, int first, Shared<Real> marks,
                                               Shared<int> labels) const {
    const int slot = slot_of(thread), begin = phase_of(thread), step = phases(), j = first + slot, row_begin = int(range.row_begin);
    const Shared<Real> mine_of_rows = tile.at(place(slot, m));
    const Logit<Real> logit = scalars.load();
    const bool counts = (global(flags)[j] & kTakesPart) != 0;
    Statistics<Real> mine;
    Real largest = -kInfinity<Real>;
    MODALIGN_NO_UNROLL
    for (int row = begin; row < range.rows; row += step) {
      const int target = labels[row];
      if (target == kNoPart) continue;
      Real z = counts ? logit(mine_of_rows[row * Backend::kPitch]) : -kInfinity<Real>;
      mine_of_rows[row * Backend::kPitch] = z;
      if (!counts) continue;
      if constexpr (draw) {
        if (j != target || MODALIGN_MUTATION("draws: the own item of a column")) mine.see(z + noise(row_begin + row, j, 1), row_begin + row);
      } else {
        mine.see(z, row_begin + row);
      }
      if (j == target) z = marks[row];
      else largest = maximum(largest, z);
      mine.total += sigmoid ? softplus(z) : z;
    }
    if (!sigmoid && largest != -kInfinity<Real>) {
      mine.lse.max = largest;
      MODALIGN_NO_UNROLL
      for (int row = begin; row < range.rows; row += step) {
        const int target = labels[row];
        if (target == kNoPart || (j == target && !MODALIGN_MUTATION("logits: the label twice in its column"))) continue;
        mine.lse.sum += exponential(mine_of_rows[row * Backend::kPitch] - largest);
      }
    }
    return mine;
  }

  // This thread's part of a row: pieces of four columns, each begun at another one in every fourth row, so that the lanes of a warp meet different
  // banks.
  MODALIGN_DEVICE void fold_row(int thread, int m, Shared<Real> tile, const TileRange& range, int first, int candidates, Shared<Real> marks,
                                Shared<int> labels, const StatisticsView<Shared<Real>, Shared<int>>& row_statistics) const {
    const int row = thread / kParts, begin = thread % kParts * kPiece, turn = row / kPiece % kPiece;
    if (row >= (MODALIGN_MUTATION("logits: one row too many") ? range.rows + 1 : range.rows)) return;
    const int target = labels[row];
    if (target == kNoPart) return;
    const Shared<Real> line = tile.at(row * Backend::kPitch);
    const auto each = [&](const auto& visit) {
      MODALIGN_NO_UNROLL
      for (int piece = begin; piece < candidates; piece += kPiece * kParts) {
        MODALIGN_UNROLL
        for (int i = 0; i < kPiece; ++i) {
          const int slot = piece + (turn + i) % kPiece;
          if (slot < candidates) visit(slot, Real(line[place(slot, m)]));
        }
      }
    };
    const Real mark = marks[row];
    const int label_slot = target - first;   // outside the tile where the label stands in another one or nowhere
    Statistics<Real> mine;
    Real largest = -kInfinity<Real>;
    each([&](int slot, Real z) {
      if constexpr (draw) {
        if (slot != label_slot || MODALIGN_MUTATION("draws: the own item of a row")) mine.see(z + noise(int(range.row_begin) + row, first + slot, 0), first + slot);
      } else {
        mine.see(z, first + slot);
      }
      if (slot == label_slot) z = mark;
      else largest = maximum(largest, z);
      if (z != -kInfinity<Real>) mine.total += sigmoid ? softplus(z) : z;   // columns that take no part stand as -infinity
    });
    if (!sigmoid && largest != -kInfinity<Real>) {
      mine.lse.max = largest;
      each([&](int slot, Real z) {
        if (slot != label_slot || MODALIGN_MUTATION("logits: the label twice in its row")) mine.lse.sum += exponential(z - largest);
      });
    }
    write_statistics(row_statistics, thread, join(read_statistics(row_statistics, thread), mine));
  }

  MODALIGN_DEVICE void end(State&, const TileRange& range, std::int64_t, const WalkPosition& walk, int shared_offset) const {
    const auto row_statistics = shared_statistics<Real>(shared_offset + kRowOffset);
    const auto slots = global_statistics(row_slots, walk.column * B + range.row_begin);
    for (int row = opaque(thread_index()); row < range.rows; row += kTileThreads) {
      Statistics<Real> mine = read_statistics(row_statistics, row * kParts);
      for (int p = 1; p < kParts; ++p) mine = join(mine, read_statistics(row_statistics, row * kParts + p));
      write_statistics(slots, std::int64_t(row), mine);
    }
    if (!MODALIGN_MUTATION("logits: drop the barrier before the next row tile")) barrier();
  }
};
template <class Geometry, class T, bool draw = false> using LogitsKernel = TileWalk<PairBackend<T>, LogitsEpilogue<Geometry, T, draw>>;

inline LaunchPlan plan_threads(std::int64_t items, const char* key) {
  LaunchPlan plan;
  plan.grid[0] = unsigned(ceil_divide<std::int64_t>(items, kThreadKernelThreads));
  plan.threads = kThreadKernelThreads;
  plan.key = key;
  return plan;
}
MODALIGN_DEVICE std::int64_t thread_item() { return std::int64_t(block_index_x()) * kThreadKernelThreads + thread_index(); }

// The slots of item i, ascending.
template <class Real>
MODALIGN_DEVICE Statistics<Real> fold_slots(const StatisticsArray<Real>& slots, std::int64_t slot_count, std::int64_t count, std::int64_t i) {
  Statistics<Real> all;
  for (std::int64_t slot = 0; slot < slot_count; ++slot) all = join(all, read_statistics(global_statistics(slots, slot * count), i));
  return all;
}
// of all that was summed in the tiles and of the labelled pairs
template <class Real> MODALIGN_DEVICE double log_sum(const MaxSum<Real>& others, const MaxSum<double>& labelled) {
  const MaxSum<double> all = join(MaxSum<double>{double(others.max), double(others.sum)}, labelled);
  return all.sum == 0 ? -kInfinity<double> : all.max + logarithm(all.sum);
}

template <class Real> struct FoldColumns {
  static constexpr int kThreads = kThreadKernelThreads;
  std::int64_t B, C;
  bool sigmoid, draw;
  StatisticsArray<Real> slots;   // [slot][C]
  std::int64_t slot_count;
  const std::uint32_t* flags;
  const double* label_sum;
  double* lse;
  Real* sum;
  std::int64_t* best;

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_threads(C, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t j = thread_item();
    if (j >= (MODALIGN_MUTATION("fold columns: one column too many") ? C + 1 : C)) return;
    const Statistics<Real> all = fold_slots(slots, slot_count, C, j);
    const std::uint32_t here = global(flags)[j];
    const Pack<double, 2> labelled = load_pack<2>(global(label_sum), 2 * j);
    global(lse)[j] = !sigmoid ? log_sum(all.lse, {labelled[0], labelled[1]}) : (here & kTakesPart) != 0 ? 0.0 : -kInfinity<double>;
    global(sum)[j] = all.total;
    global(best)[j] = draw ? all.best : (here & kIsLabel) == 0 ? -1 : all.best < 0 ? B : all.best;
  }
};

template <class Real> struct FoldRows {
  static constexpr int kThreads = kThreadKernelThreads;
  std::int64_t B, C;
  bool sigmoid, draw;
  Real smoothing, row_part, column_part;
  StatisticsArray<Real> slots;   // [slot][B]
  std::int64_t slot_count;
  const std::int64_t* label;
  const Real* logit;
  const double* column_lse;
  const Real *column_sum, *classes;
  double* lse;
  Real *loss, *sum, *label_logit;
  std::int64_t* best;

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_threads(B, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t i = thread_item();
    if (i >= (MODALIGN_MUTATION("fold rows: one row too many") ? B + 1 : B)) return;
    const Statistics<Real> all = fold_slots(slots, slot_count, B, i);
    const std::int64_t t = global(label)[i];
    const Real z = global(logit)[i];
    const double row_lse = !sigmoid ? log_sum(all.lse, {double(z), t >= 0 ? 1.0 : 0.0}) : t == kNoPart ? -kInfinity<double> : 0.0;
    Real result = 0;
    if (sigmoid) {
      result = all.total - z;
    } else if (t >= 0) {
      const Real row_mean = all.total / global(classes)[0], column_mean = global(column_sum)[t] / global(classes)[1];
      const Real from_row = Real(row_lse - z), from_column = Real(global(column_lse)[t] - z);
      result = row_part * (from_row + smoothing * (z - row_mean)) + column_part * (from_column + smoothing * (z - column_mean));
    }
    global(loss)[i] = result;
    global(lse)[i] = row_lse;
    global(sum)[i] = all.total;
    global(label_logit)[i] = z;
    global(best)[i] = draw ? all.best : t < 0 ? -1 : all.best < 0 ? C : all.best;
  }
};

// ------------------------------------------------------------------------------------------------------------------------------------------- backward
// dL/dvalue from the value and the saved statistics; an Upstream of pair_gradient.cuh. Rows count from the first of the panel.
template <class Real> struct LossUpstream {
  static constexpr bool kLogits = true;
  struct Row {
    std::int64_t label;
    Real weight;
    LogSum<Real> lse;
  };
  struct Column {
    bool part;
    Real weight;
    LogSum<Real> lse;
    Logit<Real> logit;
    Real row_share, column_share;   // lambda / columns, lambda / rows
    Real center;
  };
  bool sigmoid;
  Real smoothing, row_part, column_part;
  LogitScalars<Real> scalars;
  const std::int64_t* label;
  const Real *row_weight, *column_weight, *classes;
  const double *row_lse, *column_lse;
  Pack<Real, 2>* tile_sums;   // of dz (v - center) and dz: [row tile][column walk]
  Pack<Real, 2>* row_sums;    // [rows], of the near pairs

  MODALIGN_DEVICE Row row(std::int64_t, std::int64_t i) const {
    return {global(label)[i], global(row_weight)[i], LogSum<Real>(global(row_lse)[i])};
  }
  MODALIGN_DEVICE Column column(std::int64_t, std::int64_t j) const {
    const double lse = global(column_lse)[j];
    Column here{lse != -kInfinity<double>, global(column_weight)[j], LogSum<Real>(lse), scalars.load(), 0, 0, global(classes)[3]};
    if (smoothing != 0) {
      here.row_share = smoothing / global(classes)[0];
      here.column_share = smoothing / global(classes)[1];
    }
    return here;
  }
  MODALIGN_DEVICE bool counts(const Row& line, const Column& here) const { return line.label != kNoPart && here.part; }
  MODALIGN_DEVICE bool labelled(const Row& line, std::int64_t j) const { return line.label == j; }
  // The labelled pair's, with exp(z - lse) - 1 in one piece: in a nearly solved batch little is left of their difference.
  MODALIGN_DEVICE Real of_label(const Row& line, const Column& here, Real z) const {
    const Real along_row = exponential_minus_1(z - line.lse.high - line.lse.low), along_column = exponential_minus_1(z - here.lse.high - here.lse.low);
    return row_part * line.weight * (along_row + (smoothing - here.row_share)) +
           column_part * (here.weight * (along_column + (smoothing - here.column_share)) + (Real(1) - smoothing) * (here.weight - line.weight));
  }
  MODALIGN_DEVICE PairUpstream<Real> at(const Row& line, const Column& here, std::int64_t, std::int64_t, std::int64_t j, Real value) const {
    if (!counts(line, here)) return {0, 0, 0};
    const Real z = here.logit(value);
    Real dz;
    if (sigmoid) {
      dz = line.weight * cuda::sigmoid(z);
    } else if (line.label == j) {
      dz = of_label(line, here, z);
    } else {
      const Real along_row = row_part * line.weight * (exponential(z - line.lse.high - line.lse.low) - here.row_share);
      dz = along_row + column_part * here.weight * (exponential(z - here.lse.high - here.lse.low) - here.column_share);
    }
    if (sigmoid && line.label == j) dz -= line.weight;
    return {here.logit.scale * dz, dz, dz * (value - here.center)};
  }
};

// One warp per row, then (form product in f16) one per column.
template <class T> struct LossRows {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  std::int64_t B, C, D;
  BatchedRows anchor, columns;   // columns: form product alone, else null
  Targets targets;
  const double *row_lse, *column_lse;
  std::int64_t* label;
  Real* label_value;   // form product: [B]
  T* clean;            // [B, pitch]
  std::int64_t pitch;
  bf16* anchor_planes;   // form product in f16: [2][B, pitch], [2][C, pitch]; else nullptr
  bf16* column_planes;

  MODALIGN_HOST_DEVICE std::int64_t items() const { return column_planes != nullptr ? B + C : B; }
  LaunchPlan plan(std::int64_t batches, const char* key) const { return plan_warps(items(), batches, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t item = warp_item();
    if (item >= (MODALIGN_MUTATION("rows: one row too many") ? items() + 1 : items())) return;
    if constexpr (Arithmetic<T>::kPlanes == 2) {
      if (item >= B) {
        const std::int64_t j = item - B;
        const Global<const T> y = row_of<T>(columns, j);
        for (std::int64_t d = lane(); d < D; d += kWarpSize) write_planes(column_planes, C, j, d, widen(T(y[d * columns.element_stride])));
        return;
      }
    }
    const std::int64_t i = item, t = targets.of(i);
    std::int64_t mine = kNoPart;
    if (t != kIgnoredTarget && global(row_lse)[i] != -kInfinity<double>) {
      mine = kNoLabel;
      if (t >= 0 && t < C && global(column_lse)[t] != -kInfinity<double>) mine = t;
    }
    const Global<const T> a = row_of<T>(anchor, i);
    for (std::int64_t d = lane(); d < D; d += kWarpSize) {
      T x = narrow<T>(Real(0));
      if (mine != kNoPart) x = a[d * anchor.element_stride];
      global(clean)[i * pitch + d] = x;
      if constexpr (Arithmetic<T>::kPlanes == 2) {
        if (anchor_planes != nullptr) write_planes(anchor_planes, B, i, d, widen(x));
      }
    }
    if (label_value != nullptr) {
      Real value = 0;
      if (mine >= 0) value = warp_dot<T>(a, anchor.element_stride, row_of<T>(columns, mine), columns.element_stride, D);
      if (lane() == 0) global(label_value)[i] = value;
    }
    if (lane() == 0) global(label)[i] = mine;
  }
  MODALIGN_DEVICE void write_planes(bf16* planes, std::int64_t lines, std::int64_t line, std::int64_t d, float x) const {
    global(planes)[line * pitch + d] = from_float<bf16>(x);
    global(planes)[(lines + line) * pitch + d] = low_part(x);
  }
};

// Form product: the coefficient of a pair is dL/dvalue itself.
template <class T> struct ProductCoefficientEpilogue {
  using Backend = PairBackend<T>;
  using Real = real_of<T>;
  using Coefficient = typename Arithmetic<T>::Coefficient;
  static constexpr int kSharedBytes = 2 * kTileWarps * int(sizeof(Real));
  static constexpr int kMinBlocks = 2;
  struct State {};
  LossUpstream<Real> upstream;
  const Real* label_value;     // [panel rows]
  Coefficient* coefficients;   // T [plane][panel rows, pitch]
  std::int64_t pitch, plane_stride, column_walks;

  MODALIGN_DEVICE void begin(State&, const TileRange&, std::int64_t, const WalkPosition&, int shared_offset) const {
    const Shared<Real> sums = shared<Real>(shared_offset, 2 * kTileWarps);
    if (lane() == 0) sums[2 * warp()] = sums[2 * warp() + 1] = 0;
  }
  MODALIGN_DEVICE void consume(State&, Shared<Real> tile, const TileRange& range, std::int64_t, const WalkPosition&, int shared_offset) const {
    const Shared<Real> sums = shared<Real>(shared_offset, 2 * kTileWarps);
    const int column = thread_index() % Backend::kColumns;
    const std::int64_t j = range.column_begin + column;
    Real scale_sum = 0, logit_sum = 0;
    if (column < range.columns) {
      const typename LossUpstream<Real>::Column here = upstream.column(0, j);
      const Global<Coefficient> target = Global<Coefficient>(coefficients).at(range.row_begin * pitch + j);
      const int rows = MODALIGN_MUTATION("product coefficients: forget the last row") ? range.rows - 1 : range.rows;
      for (int row = thread_index() / Backend::kColumns; row < rows; row += kTileThreads / Backend::kColumns) {
        const std::int64_t i = range.row_begin + row;
        const typename LossUpstream<Real>::Row line = upstream.row(0, i);
        Real value = tile[row * Backend::kPitch + column];
        if (line.label == j) value = global(label_value)[i];
        const PairUpstream<Real> up = upstream.at(line, here, 0, i, j, value);
        scale_sum += up.scale;
        logit_sum += up.logit;
        target[row * pitch] = narrow<Coefficient>(up.value);
        if constexpr (Arithmetic<T>::kPlanes == 2) target[plane_stride + row * pitch] = low_part(up.value);
      }
    }
    scale_sum = warp_sum(scale_sum);
    logit_sum = warp_sum(logit_sum);
    if (lane() == 0) {
      sums[2 * warp()] += scale_sum;
      sums[2 * warp() + 1] += logit_sum;
    }
  }
  MODALIGN_DEVICE void end(State&, const TileRange& range, std::int64_t, const WalkPosition& walk, int shared_offset) const {
    write_logit_sums<Real>(upstream.tile_sums, range.row_tile * column_walks + walk.column, shared_offset);
    barrier();   // before the next row tile begins
  }
};
template <class T> using ProductCoefficientKernel = TileWalk<PairBackend<T>, ProductCoefficientEpilogue<T>>;

// Half dtypes: the gradient of the columns from fp32.
template <class T> struct NarrowRows {
  static constexpr int kThreads = kThreadKernelThreads;
  std::int64_t count;
  const real_of<T>* from;
  T* to;

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_threads(count, key); }
  MODALIGN_DEVICE void operator()() const {
    const std::int64_t i = thread_item();
    if (i >= (MODALIGN_MUTATION("narrow: one element too many") ? count + 1 : count)) return;
    global(to)[i] = narrow<T>(global(from)[i]);
  }
};

// grad_scale = the sums of dz (v - center) and dz over all slots, in double: one block.
template <class Real> struct SumLogits {
  static constexpr int kThreads = kThreadKernelThreads;
  static constexpr int kWarps = kThreads / kWarpSize;
  const Pack<Real, 2>* tile_sums;
  const Pack<Real, 2>* row_sums;
  std::int64_t tiles, rows;
  Real* out;   // [2]

  LaunchPlan plan(std::int64_t, const char* key) const {
    LaunchPlan plan;
    plan.threads = kThreads;
    plan.shared_bytes = 2 * kWarps * int(sizeof(double));
    plan.key = key;
    return plan;
  }
  MODALIGN_DEVICE void operator()() const {
    const Shared<double> sums = shared<double>(0, 2 * kWarps);
    double scale = 0, bias = 0;
    const auto add = [&](const Pack<Real, 2>* slots, std::int64_t count) {
      for (std::int64_t slot = thread_index(); slot < count; slot += kThreads) {
        const Pack<Real, 2> sum = global(slots)[slot];
        scale += sum[0];
        bias += sum[1];
      }
    };
    add(tile_sums, tiles);
    add(row_sums, rows);
    scale = warp_sum(scale);
    bias = warp_sum(bias);
    if (lane() == 0) {
      sums[warp()] = scale;
      sums[kWarps + warp()] = bias;
    }
    if (!MODALIGN_MUTATION("scale: drop the barrier before the warps are added")) barrier();
    if (thread_index() >= 2) return;
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += sums[thread_index() * kWarps + w];
    global(out)[thread_index()] = Real(sum);
  }
};

// ---------------------------------------------------------------------------------------------------------------------------- the compiled instances
// X(key, kernel type ...): the one table behind the .cu file, the emulator's catalogue and the tests. Beside it the losses launch shared kernels.
#define MODALIGN_LOSS_PAIR_KERNELS(X, name, Geometry, dtype, T)                              \
  X(name ".labels." dtype, RowLabels<Geometry, T>)                                           \
  X(name ".forward." dtype, LogitsKernel<Geometry, T>)                                       \
  X(name ".coefficients." dtype, CoefficientKernel<Geometry, T, LossUpstream<real_of<T>>>)   \
  X(name ".row_terms." dtype, RowTerms<Geometry, T, LossUpstream<real_of<T>>>)               \
  X(name ".column_terms." dtype, ColumnTerms<Geometry, T, LossUpstream<real_of<T>>>)
#define MODALIGN_LOSS_KERNELS_OF(X, dtype, T)                                     \
  MODALIGN_LOSS_PAIR_KERNELS(X, "contrastive_volume", VolumeGeometry, dtype, T)     \
  MODALIGN_LOSS_PAIR_KERNELS(X, "contrastive_triangle", TriangleGeometry, dtype, T) \
  X("contrastive_product.labels." dtype, RowLabels<ProductGeometry, T>)             \
  X("contrastive_product.forward." dtype, LogitsKernel<ProductGeometry, T>)         \
  X("contrastive_product.coefficients." dtype, ProductCoefficientKernel<T>)         \
  X("contrastive_loss.rows." dtype, LossRows<T>)
#define MODALIGN_LOSS_STATISTICS_KERNELS(X, dtype, Real)         \
  X("contrastive_loss.column_labels." dtype, ColumnLabels<Real>) \
  X("contrastive_loss.classes." dtype, CountClasses<Real>)       \
  X("contrastive_loss.fold_columns." dtype, FoldColumns<Real>)   \
  X("contrastive_loss.fold_rows." dtype, FoldRows<Real>)         \
  X("contrastive_loss.scale." dtype, SumLogits<Real>)
#define MODALIGN_LOSS_KERNELS(X)                       \
  MODALIGN_LOSS_KERNELS_OF(X, "f32", float)            \
  MODALIGN_LOSS_KERNELS_OF(X, "f64", double)           \
  MODALIGN_LOSS_KERNELS_OF(X, "f16", f16)              \
  MODALIGN_LOSS_KERNELS_OF(X, "bf16", bf16)            \
  MODALIGN_LOSS_STATISTICS_KERNELS(X, "f32", float)    \
  MODALIGN_LOSS_STATISTICS_KERNELS(X, "f64", double)   \
  X("contrastive_loss.narrow.f16", NarrowRows<f16>)    \
  X("contrastive_loss.narrow.bf16", NarrowRows<bf16>)

// With a seed; compiled in contrastive_draw.cu.
#define MODALIGN_DRAW_KERNELS_OF(X, dtype, T)                                           \
  X("contrastive_volume.draw." dtype, LogitsKernel<VolumeGeometry, T, true>)             \
  X("contrastive_triangle.draw." dtype, LogitsKernel<TriangleGeometry, T, true>)         \
  X("contrastive_product.draw." dtype, LogitsKernel<ProductGeometry, T, true>)
#define MODALIGN_DRAW_KERNELS(X)           \
  MODALIGN_DRAW_KERNELS_OF(X, "f32", float)  \
  MODALIGN_DRAW_KERNELS_OF(X, "f64", double) \
  MODALIGN_DRAW_KERNELS_OF(X, "f16", f16)    \
  MODALIGN_DRAW_KERNELS_OF(X, "bf16", bf16)

MODALIGN_LOSS_KERNELS(MODALIGN_KEY_OF)
MODALIGN_DRAW_KERNELS(MODALIGN_KEY_OF)

// ---------------------------------------------------------------------------------------------------------------------------------- launch sequences
template <class Geometry, class T> struct LossForwardBuffers {
  using Real = real_of<T>;
  using Backend = PairBackend<T>;
  Real* scale = nullptr;
  Real* row_square = nullptr;
  T* operand = nullptr;
  std::int64_t* label;
  Real* logit;
  std::uint32_t* flags;
  double* label_sum;
  StatisticsArray<Real> row_slots, column_slots;

  static TileGrid grid(const PairProblem& p) {
    return make_grid(p.B, p.C * p.m, p.D, Backend::kRows, Backend::kColumns / p.m * p.m, kLossWalks, kLossWalks);
  }
  template <class Arena> LossForwardBuffers(const ContrastiveProblem& problem, Arena& arena) {
    const PairProblem p = pair_problem(problem.pairs);
    if constexpr (!kIsProduct<Geometry>) {
      scale = arena.template take<Real>("scale", p.C);
      row_square = arena.template take<Real>("row_square", p.B);
      if constexpr (Arithmetic<T>::kRounded) operand = arena.template take<T>("operand", p.C * p.m * operand_pitch<T>(p.D));
    }
    label = arena.template take<std::int64_t>("label", p.B);
    logit = arena.template take<Real>("logit", p.B);
    flags = arena.template take<std::uint32_t>("flags", p.C);
    label_sum = arena.template take<double>("label_sum", 2 * p.C);
    row_slots = StatisticsArray<Real>::take(arena, "row_slots", "row_best_slots", grid(p).column_walks * p.B);
    column_slots = StatisticsArray<Real>::take(arena, "column_slots", "column_best_slots", grid(p).row_walks * p.C);
  }
};

template <class Real> inline LogitScalars<Real> logit_scalars(const ContrastiveProblem& p) {
  return {static_cast<const Real*>(p.scale), static_cast<const Real*>(p.bias)};
}
template <class T> inline Operand<T> column_operand(Major major, const BatchedRows& rows) {
  const bool by_depth = major == Major::depth;
  return make_operand<T>(major, static_cast<const T*>(rows.data), 0, by_depth ? rows.row_stride : rows.element_stride,
                         by_depth ? rows.element_stride : rows.row_stride);
}

template <class Geometry, class T, class Launch>
int run_contrastive_forward(const ContrastiveProblem& problem, const ContrastiveForward& output, const LossForwardBuffers<Geometry, T>& buffers,
                            const Launch& launch) {
  using Real = real_of<T>;
  const PairProblem p = pair_problem(problem.pairs);
  const Targets targets{problem.target, problem.target_stride};
  const LogitScalars<Real> scalars = logit_scalars<Real>(problem);
  const bool sigmoid = problem.loss == PairLoss::sigmoid, draw = problem.seed != nullptr;
  Real *basis = static_cast<Real*>(output.basis), *factor = static_cast<Real*>(output.factor);
  const PairView<Geometry, T> view = pair_view<Geometry, T>(p, basis, factor, buffers.scale, buffers.row_square);
  Operand<T> candidates;
  if constexpr (kIsProduct<Geometry>) {
    candidates = column_operand<T>(Major::depth, p.others[0]);
  } else {
    PrepareForward<Geometry, T> prepare{
        p.B, p.C, p.D, p.m, p.anchor, {}, p.present, basis, factor, buffers.scale, buffers.row_square, buffers.operand, operand_pitch<T>(p.D)};
    for (int o = 0; o < p.m; ++o) prepare.others[o] = p.others[o];
    if (const int error = launch_kernel(launch, prepare, 1)) return error;
    candidates = basis_operand<T>(p, basis, buffers.operand);
  }
  const RowLabels<Geometry, T> labels{p.B, view, p.others[0], p.present, targets, scalars, buffers.label, buffers.logit};
  if (const int error = launch_kernel(launch, labels, 1)) return error;
  const ColumnLabels<Real> columns{p.B, p.C, p.m, problem.target == nullptr, p.present, buffers.label, buffers.logit, buffers.flags, buffers.label_sum};
  if (const int error = launch_kernel(launch, columns, 1)) return error;

  const TileGrid grid = LossForwardBuffers<Geometry, T>::grid(p);
  const auto launch_logits = [&](auto draws) {
    const LogitsKernel<Geometry, T, decltype(draws)::value> logits{
        anchor_operand<T>(p),
        candidates,
        grid,
        {view, scalars, sigmoid, p.B, buffers.label, buffers.logit, buffers.flags, problem.seed, buffers.row_slots, buffers.column_slots,
         grid.row_tiles_per_walk, PairBackend<T>::kColumns / p.m, view.lanes == 128 ? 7 : view.lanes == 64 ? 6 : 5}};
    return launch_kernel(launch, logits, 1);
  };
  if (const int error = draw ? launch_logits(std::true_type()) : launch_logits(std::false_type())) return error;

  double* column_lse = output.column_lse;
  Real* column_sum = static_cast<Real*>(output.column_sum);
  const FoldColumns<Real> fold_columns{p.B, p.C, sigmoid, draw, buffers.column_slots, grid.row_walks,
                                       buffers.flags, buffers.label_sum, column_lse, column_sum, output.column_best};
  if (const int error = launch_kernel(launch, fold_columns, 1)) return error;
  const CountClasses<Real> classes{p.B, p.C, sigmoid, scalars, buffers.label, buffers.flags, column_lse, static_cast<Real*>(output.classes)};
  if (const int error = launch_kernel(launch, classes, 1)) return error;
  const FoldRows<Real> fold_rows{p.B,
                                 p.C,
                                 sigmoid,
                                 draw,
                                 Real(problem.label_smoothing),
                                 Real(problem.row_part),
                                 Real(problem.column_part),
                                 buffers.row_slots,
                                 grid.column_walks,
                                 buffers.label,
                                 buffers.logit,
                                 column_lse,
                                 column_sum,
                                 static_cast<const Real*>(output.classes),
                                 output.row_lse,
                                 static_cast<Real*>(output.loss),
                                 static_cast<Real*>(output.row_sum),
                                 static_cast<Real*>(output.label),
                                 output.row_best};
  return launch_kernel(launch, fold_rows, 1);
}

// The panel of the product form: T alone.
template <class T> struct ProductBuffers {
  using Real = real_of<T>;
  using Coefficient = typename Arithmetic<T>::Coefficient;
  static constexpr int kPlanes = Arithmetic<T>::kPlanes;
  Real* gradient = nullptr;   // half dtypes: dY [C, D]
  bf16* anchor_planes = nullptr;
  bf16* column_planes = nullptr;
  Real* label_value;
  Coefficient* coefficients;
  std::int64_t pitch;
  template <class Arena> ProductBuffers(const PairProblem& p, const BackwardPlan& plan, Arena& arena) {
    pitch = round_up<std::int64_t>(p.C, 8);
    if constexpr (kPlanes == 2) {
      anchor_planes = arena.template take<bf16>("anchor_planes", 2 * p.B * operand_pitch<T>(p.D));
      column_planes = arena.template take<bf16>("column_planes", 2 * p.C * operand_pitch<T>(p.D));
    }
    if constexpr (sizeof(T) != sizeof(Real)) gradient = arena.template take<Real>("gradient", p.C * p.D);
    label_value = arena.template take<Real>("label_value", p.B);
    coefficients = arena.template take<Coefficient>("coefficients", kPlanes * plan.rows * pitch);
  }
};

template <class Geometry, class T> struct LossBackwardBuffers {
  using Real = real_of<T>;
  using Backend = PairBackend<T>;
  using Pairs = std::conditional_t<kIsProduct<Geometry>, ProductBuffers<T>, BackwardBuffers<Geometry, T>>;
  std::int64_t* label;
  T* clean;   // the anchors, zero where a row takes no part
  Pack<Real, 2>* tile_sums;
  Pack<Real, 2>* row_sums = nullptr;
  std::int64_t tiles, rows;   // how many of each
  Pairs pairs;

  static TileGrid grid(const PairProblem& p) {
    return make_grid(p.B, p.C * p.m, p.D, Backend::kRows, Backend::kColumns / p.m * p.m, 0, kMaxSlots);
  }
  template <class Arena>
  LossBackwardBuffers(const PairProblem& p, const BackwardPlan& plan, Arena& arena)
      : label(arena.template take<std::int64_t>("label", p.B)),
        clean(arena.template take<T>("clean", p.B * operand_pitch<T>(p.D))),
        tile_sums(arena.template take<Pack<Real, 2>>("tile_sums", grid(p).row_tiles * grid(p).column_walks)),
        row_sums(kIsProduct<Geometry> ? nullptr : arena.template take<Pack<Real, 2>>("row_sums", p.B)),
        tiles(grid(p).row_tiles * grid(p).column_walks),
        rows(kIsProduct<Geometry> ? 0 : p.B),
        pairs(p, plan, arena) {}
};
template <class Geometry, class T> inline std::int64_t loss_backward_bytes(const PairProblem& p, const BackwardPlan& plan) {
  DeviceArena count(nullptr);
  LossBackwardBuffers<Geometry, T>(p, plan, count);
  return count.used();
}
template <class Geometry, class T> inline std::int64_t loss_backward_workspace(const ContrastiveProblem& problem, std::int64_t panel_bytes) {
  const PairProblem p = pair_problem(problem.pairs);
  return plan_workspace(p, PairBackend<T>::kRows, panel_bytes, [&](const BackwardPlan& plan) { return loss_backward_bytes<Geometry, T>(p, plan); });
}
template <class Geometry, class T> inline BackwardPlan choose_loss_backward(const ContrastiveProblem& problem, std::int64_t bytes) {
  const PairProblem p = pair_problem(problem.pairs);
  return choose_plan(p, PairBackend<T>::kRows, bytes, [&](const BackwardPlan& plan) { return loss_backward_bytes<Geometry, T>(p, plan); });
}

// dA = T Y and dY = T^t A, a panel of rows at a time.
template <class T, class UpstreamOf, class Launch>
int run_product_gradient(const PairProblem& p, const ContrastiveBackward& request, const BackwardPlan& plan, const T* clean,
                         const ProductBuffers<T>& buffers, const UpstreamOf& upstream_of, const Launch& launch) {
  using Real = real_of<T>;
  using Backend = PairBackend<T>;
  using Coefficient = typename Arithmetic<T>::Coefficient;
  constexpr bool kTwoPlanes = Arithmetic<T>::kPlanes == 2;
  T *grad_anchor = static_cast<T*>(request.grad_anchor), *grad_others = static_cast<T*>(request.grad_others);
  Real* gradient = buffers.gradient;
  if constexpr (sizeof(T) == sizeof(Real)) gradient = grad_others;
  const std::int64_t wide = operand_pitch<T>(p.D);
  for (std::int64_t row = 0; row == 0 || row < p.B; row += larger(int(plan.rows), 1)) {
    PairProblem panel = p;
    panel.B = p.B - row < plan.rows ? p.B - row : plan.rows;
    panel.anchor.data = clean + row * wide;
    const TileGrid grid = make_grid(panel.B, p.C, p.D, Backend::kRows, Backend::kColumns, 0, kMaxSlots);
    const std::int64_t plane_stride = panel.B * buffers.pitch;
    const ProductCoefficientKernel<T> coefficients{
        anchor_operand<T>(panel),
        column_operand<T>(Major::depth, p.others[0]),
        grid,
        {upstream_of(0, row), buffers.label_value + row, buffers.coefficients, buffers.pitch, plane_stride, grid.column_walks}};
    if (const int error = launch_kernel(launch, coefficients, 1)) return error;
    if (grad_anchor != nullptr) {
      using Product = GradAnchorBackend<T>;
      Operand<Coefficient> values;
      if constexpr (kTwoPlanes) values = make_operand<bf16>(Major::line, buffers.column_planes, 0, 1, wide, p.C * wide);
      else values = column_operand<T>(Major::line, p.others[0]);
      const GradAnchorKernel<T> product{make_operand<Coefficient>(Major::depth, buffers.coefficients, 0, buffers.pitch, 1, plane_stride),
                                        values,
                                        make_grid(panel.B, p.D, p.C, Product::kRows, Product::kColumns),
                                        {grad_anchor + row * p.D, nullptr, 0, p.D, 0, 0, Real(1)}};
      if (const int error = launch_kernel(launch, product, 1)) return error;
    }
    if (grad_others != nullptr) {
      using Product = GradBasisBackend<T>;
      Operand<Coefficient> values;
      if constexpr (kTwoPlanes) values = make_operand<bf16>(Major::line, buffers.anchor_planes + row * wide, 0, 1, wide, p.B * wide);
      else values = make_operand<T>(Major::line, clean + row * wide, 0, 1, wide);
      const GradBasisKernel<T> product{make_operand<Coefficient>(Major::line, buffers.coefficients, 0, 1, buffers.pitch, plane_stride),
                                       values,
                                       make_grid(p.C, p.D, panel.B, Product::kRows, Product::kColumns),
                                       {gradient, row == 0 ? nullptr : gradient, 0, p.D, 0, p.D, Real(1)}};
      if (const int error = launch_kernel(launch, product, 1)) return error;
    }
  }
  if constexpr (sizeof(T) != sizeof(Real)) {
    if (grad_others != nullptr) return launch_kernel(launch, NarrowRows<T>{p.C * p.D, gradient, grad_others}, 1);
  }
  return 0;
}

template <class Geometry, class T, class Launch>
int run_contrastive_backward(const ContrastiveProblem& problem, const ContrastiveBackward& request, const BackwardPlan& plan,
                             const LossBackwardBuffers<Geometry, T>& buffers, const Launch& launch) {
  using Real = real_of<T>;
  PairProblem p = pair_problem(problem.pairs);
  LossRows<T> rows{p.B,
                   p.C,
                   p.D,
                   p.anchor,
                   {},
                   {problem.target, problem.target_stride},
                   request.row_lse,
                   request.column_lse,
                   buffers.label,
                   nullptr,
                   buffers.clean,
                   operand_pitch<T>(p.D),
                   nullptr,
                   nullptr};
  if constexpr (kIsProduct<Geometry>) {
    rows.columns = p.others[0];
    rows.label_value = buffers.pairs.label_value;
    rows.anchor_planes = buffers.pairs.anchor_planes;
    rows.column_planes = buffers.pairs.column_planes;
  }
  if (const int error = launch_kernel(launch, rows, 1)) return error;
  p.anchor = {buffers.clean, 0, operand_pitch<T>(p.D), 1};

  const bool sigmoid = problem.loss == PairLoss::sigmoid;
  const LossUpstream<Real> upstream{sigmoid,
                                    Real(problem.label_smoothing),
                                    Real(problem.row_part),
                                    Real(problem.column_part),
                                    logit_scalars<Real>(problem),
                                    buffers.label,
                                    static_cast<const Real*>(request.row_weight),
                                    static_cast<const Real*>(request.column_weight),
                                    static_cast<const Real*>(request.classes),
                                    request.row_lse,
                                    request.column_lse,
                                    buffers.tile_sums,
                                    buffers.row_sums};
  const std::int64_t column_walks = LossBackwardBuffers<Geometry, T>::grid(p).column_walks;
  const auto upstream_of = [&](std::int64_t, std::int64_t row) {
    LossUpstream<Real> panel = upstream;
    panel.label += row;
    panel.row_weight += row;
    panel.row_lse += row;
    panel.row_sums = shifted(panel.row_sums, row);
    panel.tile_sums += row / PairBackend<T>::kRows * column_walks;
    return panel;
  };
  int error;
  if constexpr (kIsProduct<Geometry>)
    error = run_product_gradient<T>(p, request, plan, buffers.clean, buffers.pairs, upstream_of, launch);
  else
    error = run_pair_gradient<Geometry, T, LossUpstream<Real>>(p, {request.basis, request.factor, request.grad_anchor, request.grad_others}, plan,
                                                               buffers.pairs, upstream_of, launch);
  if (error) return error;
  const SumLogits<Real> sum{buffers.tile_sums, buffers.row_sums, buffers.tiles, buffers.rows, static_cast<Real*>(request.grad_scale)};
  return launch_kernel(launch, sum, 1);
}

}   // namespace modalign::cuda
