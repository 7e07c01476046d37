/// @file pair_gradient.cuh
/// @brief The gradient of a value per pair, whatever its upstream gradient is made of: a matrix (gram_volume.cuh) or the statistics of a loss
/// (contrastive_loss.cuh). The twin of cpu/pair_gradient.h; formulas in ops/gram_volume.h.
///
/// Sequence   prepare_bwd   scale_j from factor, |a_i|^2, the operand copies
///   then for each panel of rows (as many as the workspace holds, at most 64 tiles):
///            coefficients  the tile product of the forward pass again; T = w kappa (T[panel rows, C m] in the workspace); sums of w per row and
///                          (column walk), of alpha and S = w kappa kappa^T per candidate and (row tile). Pairs near zero, and the labelled pair of
///                          a row, get T = 0, no weight, and a bit in a mask [panel rows, column tiles, words].
///            row_terms     one warp per row: E_i = (sum_j w_ij) a_i + sum over the row's near pairs of w e, candidates ascending
///            grad_anchor   product: dA_I = E - T X
///            grad_basis    product: G += T^t A_I
///            column_terms  one warp per candidate: adds the row tiles' sums in order, then the column's near pairs (w kappa e to G, alpha), rows
///                          ascending
///   and last grad_others   one warp per candidate: S X is taken off G, then dR_j = L^-T (alpha Q - G), or du, dv
///            A near pair is recomputed by its row and by its column, each the only writer of what it adds to: no atomics, no list, no unbounded
///            memory.
///
/// An Upstream says what the gradient of a pair's value is, and which pair of a row always counts as near:
///
///   struct Upstream {
///     static constexpr bool kLogits;   // values become logits, whose gradient is summed too: tile_sums, row_sums
///     struct Row;                      // what the pairs of a row share; of registers: little
///     struct Column;                   // what the pairs of a column share
///     Row row(batch, i) const;
///     Column column(batch, j) const;
///     bool counts(row, column) const;  // false: the gradient is exactly zero, whatever the value is
///     bool labelled(row, j) const;     // recomputed from its vectors although it may be far from zero
///     PairUpstream<Real> at(row, column, batch, i, j, value) const;
///   };
///
/// Numbers    f32, f64: FmaBackend in the input precision. Products behind T: bf16 rounds T to bf16; f16 splits T, X and A into two bf16 planes
///            (three products), for T falls below the range of f16.
/// FLOPs      6 B C m D (+ 2 m D times a few for each near pair). Bytes: T once written and twice read, operands once per tile of the other side.
/// Order      every sum has one order fixed by the sizes (K ascending, slots ascending, near pairs ascending, warp sums by butterfly): equal bits
///            from run to run.
#pragma once

#include "cuda/pair_geometry.cuh"

namespace modalign::cuda {

constexpr int kStatisticsMax = 1 + kMaxOthers * (kMaxOthers + 1) / 2;   // alpha, then S_pq for p >= q
MODALIGN_HOST_DEVICE constexpr int statistics_count(int m) { return 1 + m * (m + 1) / 2; }

// w_ij and the pair's share of alpha_j; r = 0 (or rounding) gives 0, NaN stays.
template <class Real> struct PairWeight {
  Real weight, alpha;
};
template <class Real> MODALIGN_DEVICE PairWeight<Real> pair_weight(bool squared, Real upstream, Real scale, Real r, Real floor) {
  if (r <= 0) return {0, 0};
  if (squared) {
    const Real w = 2 * upstream * scale * scale;
    return {w, w * r};
  }
  const Real root = square_root(r), share = upstream * scale;
  return {share / (root < floor ? floor : root), share * root};
}

template <class Geometry, class T> struct PrepareBackward {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  std::int64_t B, C, D;
  int m;
  BatchedRows anchor;
  const Real* basis;
  const Real* factor;
  Real* scale;
  Real* row_square;
  T* operand;            // half dtypes: the basis rounded, for the tile product
  bf16* basis_planes;    // f16: the basis as two planes [2][batch, C, m, pitch]
  bf16* anchor_planes;   // f16: the anchors as two planes [2][batch, B, pitch]
  std::int64_t operand_pitch, basis_plane_stride, anchor_plane_stride;

  LaunchPlan plan(std::int64_t batches, const char* key) const { return plan_warps(C + B, batches, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t item = warp_item(), batch = block_index_z();
    if (item >= (MODALIGN_MUTATION("prepare: one item too many") ? C + B + 1 : C + B)) return;
    if (item >= C) {
      const std::int64_t i = item - C;
      const Global<const T> a = Global<const T>(static_cast<const T*>(anchor.data)).at(batch * anchor.batch_stride + i * anchor.row_stride);
      Real square = 0;
      for (std::int64_t d = lane(); d < D; d += kWarpSize) {
        const Real x = widen(T(a[d * anchor.element_stride]));
        square = fused_multiply_add(x, x, square);
        if constexpr (Arithmetic<T>::kPlanes == 2) {
          const Global<bf16> planes = Global<bf16>(anchor_planes).at((batch * B + i) * operand_pitch);
          planes[d] = from_float<bf16>(x);
          planes[anchor_plane_stride + d] = low_part(x);
        }
      }
      square = warp_sum(square);
      if (lane() == 0) global(row_square)[batch * B + i] = square;
      return;
    }
    const std::int64_t j = item, column = batch * C + j;
    const Global<const Real> q = Global<const Real>(basis).at(column * m * D), f = Global<const Real>(factor).at(column * Geometry::factor_size(m));
    Real size = 1;
    if constexpr (Geometry::kTriangle) {
      size = f[0] / 2;
    } else {
      for (int p = 0; p < m; ++p) size *= f[p * m + p];
      if (m + 1 > D) {
        int count = 1;
        for (int p = 0; p < m; ++p) {
          bool row = false;   // an absent vector has a zero row
          for (int d = 0; d < D; ++d) row = row || q[p * D + d] != 0;
          count += row;
        }
        if (count > D) size *= 0;
      }
    }
    if (lane() == 0) global(scale)[column] = size;
    if constexpr (Arithmetic<T>::kRounded) {
      for (int p = 0; p < m; ++p)
        for (std::int64_t d = lane(); d < D; d += kWarpSize) {
          const Real x = q[p * D + d];
          const std::int64_t at = (column * m + p) * operand_pitch + d;
          global(operand)[at] = narrow<T>(x);
          if constexpr (Arithmetic<T>::kPlanes == 2) {
            global(basis_planes)[at] = from_float<bf16>(x);
            global(basis_planes)[basis_plane_stride + at] = low_part(x);
          }
        }
    }
  }
};

// ------------------------------------------------------------------------------------------------------------------------------------------ upstream
template <class Real> struct PairUpstream {
  Real value, logit, scale;   // dL/dvalue; where the upstream has logits: dL/dlogit and the share in dL/dscale
};

// A matrix of gradients.
template <class T> struct MatrixUpstream {
  using Real = real_of<T>;
  static constexpr bool kLogits = false;
  struct Row {};
  struct Column {};
  const T* data;
  std::int64_t batch_stride, row_stride, column_stride;

  MODALIGN_DEVICE Row row(std::int64_t, std::int64_t) const { return {}; }
  MODALIGN_DEVICE Column column(std::int64_t, std::int64_t) const { return {}; }
  MODALIGN_DEVICE bool counts(const Row&, const Column&) const { return true; }
  MODALIGN_DEVICE bool labelled(const Row&, std::int64_t) const { return false; }
  MODALIGN_DEVICE PairUpstream<Real> at(const Row&, const Column&, std::int64_t batch, std::int64_t i, std::int64_t j, Real) const {
    return {widen(T(Global<const T>(data)[batch * batch_stride + i * row_stride + j * column_stride])), 0, 0};
  }
};

// ------------------------------------------------------------------------------------------------------------------------------------- coefficients
// Which pairs of a panel are near zero (or labelled): a bit per pair, and a word per tile that says whether there is any.
struct NearPairs {
  std::uint32_t* bits;   // [batch, panel rows, column tiles, words]: bit b of word w of tile t is candidate t * candidates_per_tile + 32 w + b
  std::uint32_t* any;    // [batch, row tiles, column tiles]
  std::int64_t rows, row_tiles, column_tiles;
  int words, rows_per_tile, candidates_per_tile;
};

// The warps' sums (of dL/dscale, of dL/dlogit) of a row tile, added in order by one thread.
template <class Real> MODALIGN_DEVICE void write_logit_sums(Pack<Real, 2>* slots, std::int64_t slot, int shared_offset) {
  if (thread_index() != 0) return;
  const Shared<Real> sums = shared<Real>(shared_offset, 2 * kTileWarps);
  Pack<Real, 2> total;
  total[0] = total[1] = 0;
  for (int w = 0; w < kTileWarps; ++w) {
    total[0] += sums[2 * w];
    total[1] += sums[2 * w + 1];
  }
  global(slots)[slot] = total;
}

template <class Geometry, class T, class Upstream> struct CoefficientEpilogue {
  using Backend = PairBackend<T>;
  using Real = real_of<T>;
  using Coefficient = typename Arithmetic<T>::Coefficient;
  static constexpr int kWords = Backend::kColumns / kWarpSize;
  static constexpr int kRowBytes = Backend::kRows * int(sizeof(Real));
  static constexpr int kAnyOffset = (1 + kWords) * kRowBytes, kLogitOffset = kAnyOffset + kTileWarps * 4;
  static constexpr int kSharedBytes = kLogitOffset + (Upstream::kLogits ? 2 * kTileWarps * int(sizeof(Real)) : 0);
  static constexpr int kMinBlocks = sizeof(Real) == 8 && Upstream::kLogits ? 1 : 2;   // doubles beside exponentials do not fit into 128 registers
  struct State {};
  PairView<Geometry, T> view;
  Upstream upstream;
  Coefficient* coefficients;   // T [plane][batch, panel rows, pitch]
  std::int64_t pitch, plane_stride, rows;
  Real* row_slots;   // sums of w [batch, column walk, panel rows], or nullptr
  std::int64_t column_walks;
  Real* column_slots;   // alpha and S [batch, row tile, C, statistics], or nullptr
  std::int64_t row_tiles;
  NearPairs near_pairs;

  // With the registers of a loss the main loop has none left for what could be computed before it.
  static MODALIGN_DEVICE int own_thread() { return Upstream::kLogits ? opaque(thread_index()) : thread_index(); }

  MODALIGN_DEVICE void begin(State&, const TileRange& range, std::int64_t batch, const WalkPosition&, int shared_offset) const {
    const Shared<Real> squares = shared<Real>(shared_offset, Backend::kRows);
    const Shared<Real> sums = shared<Real>(shared_offset + kRowBytes, kWords * Backend::kRows);
    for (int row = own_thread(); row < range.rows; row += kTileThreads) squares[row] = view.square_of_row(batch, range.row_begin + row);
    for (int i = own_thread(); i < kWords * Backend::kRows; i += kTileThreads) sums[i] = 0;
    if constexpr (Upstream::kLogits) {
      const Shared<Real> logit_sums = shared<Real>(shared_offset + kLogitOffset, 2 * kTileWarps);
      if (lane() == 0) logit_sums[2 * warp()] = logit_sums[2 * warp() + 1] = 0;
    }
  }

  MODALIGN_DEVICE void consume(State&, Shared<Real> tile, const TileRange& range, std::int64_t batch, const WalkPosition&, int shared_offset) const {
    const Shared<Real> squares = shared<Real>(shared_offset, Backend::kRows);
    const Shared<Real> sums = shared<Real>(shared_offset + kRowBytes, kWords * Backend::kRows);
    const Shared<std::uint32_t> warps_any = shared<std::uint32_t>(shared_offset + kAnyOffset, kTileWarps);
    const int thread = own_thread(), m = view.m, slot = thread % view.lanes, phase = thread / view.lanes, phases = kTileThreads / view.lanes;
    const int candidates = range.columns / m, word = slot / kWarpSize;
    const std::int64_t j = range.column_begin / m + slot;
    const bool exists = slot < candidates;
    const ColumnData<Real> column = exists ? view.column(batch, j) : ColumnData<Real>{0, 0, 0};
    const Global<std::uint32_t> bits =
        Global<std::uint32_t>(near_pairs.bits).at((batch * rows + range.row_begin) * near_pairs.column_tiles * near_pairs.words);
    Real statistics[kStatisticsMax];
    MODALIGN_UNROLL
    for (int i = 0; i < kStatisticsMax; ++i) statistics[i] = 0;
    std::uint32_t any = 0;
    typename Upstream::Column column_part{};
    if (exists) column_part = upstream.column(batch, j);
    Real scale_sum = 0, logit_sum = 0;   // of dL/dscale and of dL/dlogit
    for (int row = phase; row < range.rows; row += phases) {
      Real s[kMaxOthers], w = 0;
      bool near = false;
      if (exists) {
        load_candidate(s, tile, row * Backend::kPitch + slot * m, m);
        Real trust;
        const Real r = Geometry::residual(s, m, Real(squares[row]), column, trust);
        const typename Upstream::Row row_part = upstream.row(batch, range.row_begin + row);
        near = trust > 0 && is_finite(trust) && column.scale != 0 && (r <= view.near * trust || upstream.labelled(row_part, j)) &&
               upstream.counts(row_part, column_part);
        if (!near) {
          Real value = 0;
          if constexpr (Upstream::kLogits) value = column.scale * square_root(r < 0 ? Real(0) : r);   // keeps NaN
          const PairUpstream<Real> up = upstream.at(row_part, column_part, batch, range.row_begin + row, j, value);
          const PairWeight<Real> pair = pair_weight(view.squared, up.value, column.scale, r, Real(0));
          w = pair.weight;
          statistics[0] += pair.alpha;
          if constexpr (Upstream::kLogits) {
            scale_sum += up.scale;
            logit_sum += up.logit;
          }
        }
        Real t[kMaxOthers];
        MODALIGN_UNROLL
        for (int p = 0; p < kMaxOthers; ++p)
          if (p < m) {
            t[p] = near ? Real(0) : w * s[p];
            if (!near) {
              MODALIGN_UNROLL
              for (int q = 0; q <= p; ++q) statistics[1 + p * (p + 1) / 2 + q] = fused_multiply_add(t[p], s[q], statistics[1 + p * (p + 1) / 2 + q]);
            }
          }
        store_candidate(t, tile, row * Backend::kPitch + slot * m, m);
      }
      const std::uint32_t found = warp_ballot(near);
      any |= found;
      const Real weights = warp_sum(w);
      if (lane() == 0) {
        if (word < near_pairs.words) bits[(row * near_pairs.column_tiles + range.column_tile) * near_pairs.words + word] = found;
        sums[word * Backend::kRows + row] += weights;
      }
    }
    if (lane() == 0) warps_any[warp()] = any;
    if constexpr (Upstream::kLogits) {
      const Shared<Real> logit_sums = shared<Real>(shared_offset + kLogitOffset, 2 * kTileWarps);
      scale_sum = warp_sum(scale_sum);
      logit_sum = warp_sum(logit_sum);
      if (lane() == 0) {
        logit_sums[2 * warp()] += scale_sum;
        logit_sums[2 * warp() + 1] += logit_sum;
      }
    }
    if (!MODALIGN_MUTATION("coefficients: drop the barrier before the tile is copied out")) barrier();
    if (thread_index() == 0) {
      std::uint32_t all = 0;
      for (int w = 0; w < kTileWarps; ++w) all |= warps_any[w];
      global(near_pairs.any)[(batch * near_pairs.row_tiles + range.row_tile) * near_pairs.column_tiles + range.column_tile] = all;
    }
    const Global<Coefficient> target = Global<Coefficient>(coefficients).at((batch * rows + range.row_begin) * pitch + range.column_begin);
    const int column_index = thread % Backend::kColumns;
    if (column_index < range.columns)
      for (int row = thread / Backend::kColumns; row < range.rows; row += kTileThreads / Backend::kColumns) {
        const Real t = tile[row * Backend::kPitch + column_index];
        target[row * pitch + column_index] = narrow<Coefficient>(t);
        if constexpr (Arithmetic<T>::kPlanes == 2) target[plane_stride + row * pitch + column_index] = low_part(t);
      }
    if (column_slots != nullptr) {
      const int count = statistics_count(m);
      if (!MODALIGN_MUTATION("coefficients: drop the barrier before the tile is used again")) barrier();
      if (exists) {
        MODALIGN_UNROLL
        for (int i = 0; i < kStatisticsMax; ++i)
          if (i < count) tile[(phase * count + i) * candidates + slot] = statistics[i];
      }
      barrier();
      const Global<Real> out = Global<Real>(column_slots).at(((batch * row_tiles + range.row_tile) * view.C + range.column_begin / m) * count);
      for (int item = thread; item < candidates * count; item += kTileThreads) {
        const int candidate = item / count, i = item % count;
        Real sum = 0;
        for (int f = 0; f < phases; ++f) sum += tile[(f * count + i) * candidates + candidate];
        out[item] = sum;
      }
    }
  }

  MODALIGN_DEVICE void end(State&, const TileRange& range, std::int64_t batch, const WalkPosition& walk, int shared_offset) const {
    const Shared<Real> sums = shared<Real>(shared_offset + kRowBytes, kWords * Backend::kRows);
    if (row_slots != nullptr) {
      const Global<Real> out = Global<Real>(row_slots).at((batch * column_walks + walk.column) * rows + range.row_begin);
      for (int row = own_thread(); row < range.rows; row += kTileThreads) {
        Real sum = 0;
        for (int word = 0; word < kWords; ++word) sum += sums[word * Backend::kRows + row];
        out[row] = sum;
      }
    }
    if constexpr (Upstream::kLogits)
      write_logit_sums<Real>(upstream.tile_sums, range.row_tile * column_walks + walk.column, shared_offset + kLogitOffset);
    barrier();   // before the next row tile begins
  }
};

template <class Geometry, class T, class Upstream> using CoefficientKernel = TileWalk<PairBackend<T>, CoefficientEpilogue<Geometry, T, Upstream>>;
template <class T> using GradAnchorKernel = TileWalk<GradAnchorBackend<T>, StoreTile<GradAnchorBackend<T>, T>>;
template <class T> using GradBasisKernel = TileWalk<GradBasisBackend<T>, StoreTile<GradBasisBackend<T>, real_of<T>>>;

// E_i = (sum_j w_ij) a_i + sum over near pairs of w e: one warp per row of the panel.
template <class Geometry, class T, class Upstream> struct RowTerms {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  PairView<Geometry, T> view;
  Upstream upstream;
  NearPairs near_pairs;
  const Real* row_slots;   // [batch, slot, panel rows]
  std::int64_t slots;
  Real* addend;   // E [batch, panel rows, D]; with logits: or nullptr, the sums alone are wanted
  std::int64_t addend_batch_stride, addend_row_stride;

  LaunchPlan plan(std::int64_t batches, const char* key) const { return plan_warps(near_pairs.rows, batches, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t i = warp_item(), batch = block_index_z();
    if (i >= (MODALIGN_MUTATION("row terms: one row too many") ? near_pairs.rows + 1 : near_pairs.rows)) return;
    const bool wanted = !Upstream::kLogits || addend != nullptr;
    const Global<Real> e = wanted ? Global<Real>(addend).at(batch * addend_batch_stride + i * addend_row_stride) : Global<Real>(addend);
    if (wanted) {
      Real weights = 0;
      for (std::int64_t slot = 0; slot < slots; ++slot) weights += Global<const Real>(row_slots)[(batch * slots + slot) * near_pairs.rows + i];
      const Global<const T> a = view.anchor_row(batch, i);
      // without candidates the gradient is zero, also of a NaN anchor
      for (std::int64_t d = lane(); d < view.D; d += kWarpSize) e[d] = slots > 0 ? weights * widen(T(a[d * view.anchor_element_stride])) : Real(0);
    }
    const typename Upstream::Row row_part = upstream.row(batch, i);
    Real scale_sum = 0, logit_sum = 0;
    const Global<const std::uint32_t> any =
        Global<const std::uint32_t>(near_pairs.any).at((batch * near_pairs.row_tiles + i / near_pairs.rows_per_tile) * near_pairs.column_tiles);
    const Global<const std::uint32_t> bits =
        Global<const std::uint32_t>(near_pairs.bits).at((batch * near_pairs.rows + i) * near_pairs.column_tiles * near_pairs.words);
    for (std::int64_t begin = 0; begin < near_pairs.column_tiles; begin += kWarpSize) {
      std::uint32_t tiles = warp_ballot(begin + lane() < near_pairs.column_tiles && any[begin + lane()] != 0);
      for (std::int64_t tile = begin; tiles != 0; ++tile, tiles >>= 1) {
        if ((tiles & 1) == 0) continue;
        for (int word = 0; word < near_pairs.words; ++word) {
          std::uint32_t found = bits[tile * near_pairs.words + word];
          for (std::int64_t j = tile * near_pairs.candidates_per_tile + word * kWarpSize; found != 0; ++j, found >>= 1) {
            if ((found & 1) == 0) continue;
            const DirectPair<Geometry, T> pair(view, batch, i, j);
            const Real scale = view.column(batch, j).scale, value = scale * square_root(pair.square);
            const PairUpstream<Real> up = upstream.at(row_part, upstream.column(batch, j), batch, i, j, value);
            if constexpr (Upstream::kLogits) {
              scale_sum += up.scale;
              logit_sum += up.logit;
            }
            if (!wanted) continue;
            const PairWeight<Real> w = pair_weight(view.squared, up.value, scale, pair.square, view.root_eps * square_root(pair.reference));
            for (std::int64_t d = lane(); d < view.D; d += kWarpSize) e[d] += w.weight * pair(d);
          }
        }
      }
    }
    if constexpr (Upstream::kLogits) {
      Pack<Real, 2> sums;
      sums[0] = scale_sum;
      sums[1] = logit_sum;
      if (lane() == 0) global(upstream.row_sums)[i] = sums;
    }
  }
};

// One warp per candidate: the panel's sums of alpha and S in row-tile order, then the column's near pairs in row order.
template <class Geometry, class T, class Upstream> struct ColumnTerms {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  PairView<Geometry, T> view;
  Upstream upstream;
  NearPairs near_pairs;
  const Real* column_slots;   // [batch, row tile, C, statistics]
  Real* totals;               // [batch, C, statistics]
  Real* gradient;             // G [batch, C, m, D]
  bool first_panel;

  LaunchPlan plan(std::int64_t batches, const char* key) const { return plan_warps(view.C, batches, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t j = warp_item(), batch = block_index_z();
    if (j >= view.C) return;
    const int count = statistics_count(view.m);
    const Global<Real> total = Global<Real>(totals).at((batch * view.C + j) * count);
    for (int i = lane(); i < count; i += kWarpSize) {
      Real sum = first_panel ? Real(0) : Real(total[i]);
      const std::int64_t tiles = MODALIGN_MUTATION("column terms: forget the last row tile") ? near_pairs.row_tiles - 1 : near_pairs.row_tiles;
      for (std::int64_t tile = 0; tile < tiles; ++tile)
        sum += Global<const Real>(column_slots)[((batch * near_pairs.row_tiles + tile) * view.C + j) * count + i];
      total[i] = sum;
    }
    const std::int64_t column_tile = j / near_pairs.candidates_per_tile;
    const int place = int(j % near_pairs.candidates_per_tile), word = place / kWarpSize, bit = place % kWarpSize;
    const Real scale = view.column(batch, j).scale;
    const typename Upstream::Column column_part = upstream.column(batch, j);
    const Global<Real> g = Global<Real>(gradient).at((batch * view.C + j) * view.m * view.D);
    for (std::int64_t tile = 0; tile < near_pairs.row_tiles; ++tile) {
      if (Global<const std::uint32_t>(near_pairs.any)[(batch * near_pairs.row_tiles + tile) * near_pairs.column_tiles + column_tile] == 0) continue;
      const std::int64_t stop = minimum((tile + 1) * near_pairs.rows_per_tile, near_pairs.rows);
      for (std::int64_t begin = tile * near_pairs.rows_per_tile; begin < stop; begin += kWarpSize) {
        std::uint32_t mine = 0;
        if (begin + lane() < stop)
          mine = Global<const std::uint32_t>(
              near_pairs.bits)[((batch * near_pairs.rows + begin + lane()) * near_pairs.column_tiles + column_tile) * near_pairs.words + word];
        std::uint32_t found = warp_ballot((mine >> bit & 1) != 0);
        for (std::int64_t i = begin; found != 0; ++i, found >>= 1) {
          if ((found & 1) == 0) continue;
          const DirectPair<Geometry, T> pair(view, batch, i, j);
          const PairUpstream<Real> up = upstream.at(upstream.row(batch, i), column_part, batch, i, j, scale * square_root(pair.square));
          const PairWeight<Real> w = pair_weight(view.squared, up.value, scale, pair.square, view.root_eps * square_root(pair.reference));
          if (lane() == 0) total[0] += w.alpha;
          MODALIGN_UNROLL
          for (int p = 0; p < kMaxOthers; ++p)
            if (p < view.m) {
              const Real share = w.weight * pair.kappa(p);
              for (std::int64_t d = lane(); d < view.D; d += kWarpSize) g[p * view.D + d] += share * pair(d);
            }
        }
      }
    }
  }
};

// One warp per candidate; lanes own elements d, of all m rows. G may lie where the result goes.
template <class Geometry, class T> struct GradOthers {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  std::int64_t C, D;
  int m;
  bool nothing;   // there were no rows: the gradient is zero
  const Real* basis;
  const Real* factor;
  const Real* scale;
  const Real* totals;     // alpha, S
  const Real* gradient;   // G
  T* out;                 // [batch, C, m, D]

  LaunchPlan plan(std::int64_t batches, const char* key) const { return plan_warps(C, batches, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t j = warp_item(), batch = block_index_z();
    if (j >= (MODALIGN_MUTATION("gradient of others: one candidate too many") ? C + 1 : C)) return;
    const std::int64_t column = batch * C + j;
    const Global<T> target = Global<T>(out).at(column * m * D);
    bool zero = nothing;
    if (!zero) zero = Global<const Real>(scale)[column] == 0;
    if (zero) {
      for (std::int64_t d = lane(); d < m * D; d += kWarpSize) target[d] = narrow<T>(Real(0));
      return;
    }
    const int count = statistics_count(m);
    const Global<const Real> x = Global<const Real>(basis).at(column * m * D), g = Global<const Real>(gradient).at(column * m * D),
                             total = Global<const Real>(totals).at(column * count),
                             f = Global<const Real>(factor).at(column * Geometry::factor_size(m));
    const Real alpha = total[0];
    std::uint32_t absent = 0;   // exactly zero gradient, also beside a NaN anchor
    if constexpr (!Geometry::kTriangle) {
      for (int p = 0; p < m; ++p)
        if (f[p * m + p] == 1) {
          bool row = false;
          for (std::int64_t d = lane(); d < D; d += kWarpSize) row = row || x[p * D + d] != 0;
          if (warp_ballot(row) == 0) absent |= 1u << p;
        }
    }
    for (std::int64_t d = lane(); d < D; d += kWarpSize) {
      Real row[kMaxOthers], y[kMaxOthers];
      MODALIGN_UNROLL
      for (int p = 0; p < kMaxOthers; ++p)
        if (p < m) row[p] = x[p * D + d];
      MODALIGN_UNROLL
      for (int p = 0; p < kMaxOthers; ++p)
        if (p < m) {
          Real sum = g[p * D + d];
          MODALIGN_UNROLL
          for (int q = 0; q < kMaxOthers; ++q)
            if (q < m) sum = fused_multiply_add(-Real(total[1 + (p > q ? p * (p + 1) / 2 + q : q * (q + 1) / 2 + p)]), row[q], sum);
          y[p] = sum;
        }
      if constexpr (Geometry::kTriangle) {
        const Real along = (y[1] - alpha * row[1]) / f[0];
        target[d] = narrow<T>(-y[0] - along);
        target[D + d] = narrow<T>(along);
      } else {
        MODALIGN_UNROLL
        for (int p = kMaxOthers - 1; p >= 0; --p)
          if (p < m) {
            Real z = alpha * row[p] - y[p];
            MODALIGN_UNROLL
            for (int o = p + 1; o < kMaxOthers; ++o)
              if (o < (MODALIGN_MUTATION("gradient of others: leave out the last vector of the solve") ? m - 1 : m))
                z = fused_multiply_add(-Real(f[o * m + p]), y[o], z);
            y[p] = z / f[p * m + p];
            target[p * D + d] = narrow<T>(absent >> p & 1 ? Real(0) : y[p]);
          }
      }
    }
  }
};

// --------------------------------------------------------------------------------------------------------------------- the instances without upstream
// Shared by the matrix and the losses; compiled with gram_volume.cu.
#define MODALIGN_PAIR_SHARED_KERNELS(X, name, Geometry, dtype, T) \
  X(name ".prepare." dtype, PrepareForward<Geometry, T>)          \
  X(name ".prepare_bwd." dtype, PrepareBackward<Geometry, T>)     \
  X(name ".grad_others." dtype, GradOthers<Geometry, T>)
#define MODALIGN_SHARED_KERNELS_OF(X, dtype, T)                                \
  MODALIGN_PAIR_SHARED_KERNELS(X, "gram_volume", VolumeGeometry, dtype, T)     \
  MODALIGN_PAIR_SHARED_KERNELS(X, "triangle_area", TriangleGeometry, dtype, T) \
  X("pair_product.grad_anchor." dtype, GradAnchorKernel<T>)                    \
  X("pair_product.grad_basis." dtype, GradBasisKernel<T>)
#define MODALIGN_SHARED_KERNELS(X)             \
  MODALIGN_SHARED_KERNELS_OF(X, "f32", float)  \
  MODALIGN_SHARED_KERNELS_OF(X, "f64", double) \
  MODALIGN_SHARED_KERNELS_OF(X, "f16", f16)    \
  MODALIGN_SHARED_KERNELS_OF(X, "bf16", bf16)

MODALIGN_SHARED_KERNELS(MODALIGN_KEY_OF)

// ---------------------------------------------------------------------------------------------------------------------------------- launch sequence
// How many problems and rows are treated at once in backward.
struct BackwardPlan {
  std::int64_t batches, rows;
};

template <class Geometry, class T> struct BackwardBuffers {
  using Real = real_of<T>;
  using Backend = PairBackend<T>;
  using Coefficient = typename Arithmetic<T>::Coefficient;
  static constexpr int kPlanes = Arithmetic<T>::kPlanes;
  static constexpr bool kRealGradient = sizeof(T) == sizeof(Real);   // sums may lie where the gradient goes
  Real* scale;
  Real* row_square;
  T* operand = nullptr;
  bf16* basis_planes = nullptr;
  bf16* anchor_planes = nullptr;
  Real* gradient = nullptr;   // G
  Real* totals;
  // the panel
  Coefficient* coefficients;
  Real* addend = nullptr;   // E
  Real* row_slots;
  Real* column_slots;
  std::uint32_t* near_bits;
  std::uint32_t* near_any;
  std::int64_t pitch, column_tiles, column_walks, row_tiles;

  // The same whichever gradients are wanted, so that one size serves all.
  template <class Arena> BackwardBuffers(const PairProblem& p, const BackwardPlan& plan, Arena& arena) {
    const std::int64_t n = plan.batches, columns = p.C * p.m, wide = operand_pitch<T>(p.D);
    const TileGrid grid = make_grid(plan.rows, columns, p.D, Backend::kRows, Backend::kColumns / p.m * p.m, 0, kMaxSlots);
    pitch = round_up<std::int64_t>(columns, 8);
    column_tiles = grid.column_tiles;
    column_walks = grid.column_walks;
    row_tiles = grid.row_tiles;
    scale = arena.template take<Real>("scale", n * p.C);
    row_square = arena.template take<Real>("row_square", n * p.B);
    if constexpr (Arithmetic<T>::kRounded) operand = arena.template take<T>("operand", n * columns * wide);
    if constexpr (kPlanes == 2) {
      basis_planes = arena.template take<bf16>("basis_planes", 2 * n * columns * wide);
      anchor_planes = arena.template take<bf16>("anchor_planes", 2 * n * p.B * wide);
    }
    if constexpr (!kRealGradient) gradient = arena.template take<Real>("gradient", n * columns * p.D);
    totals = arena.template take<Real>("totals", n * p.C * statistics_count(p.m));
    coefficients = arena.template take<Coefficient>("coefficients", kPlanes * n * plan.rows * pitch);
    if constexpr (!kRealGradient) addend = arena.template take<Real>("addend", n * plan.rows * p.D);
    row_slots = arena.template take<Real>("row_slots", n * column_walks * plan.rows);
    column_slots = arena.template take<Real>("column_slots", n * row_tiles * p.C * statistics_count(p.m));
    near_bits = arena.template take<std::uint32_t>("near_bits", n * plan.rows * column_tiles * (candidate_lanes<Backend>(p.m) / kWarpSize));
    near_any = arena.template take<std::uint32_t>("near_any", n * row_tiles * column_tiles);
  }
};

template <class Geometry, class T> inline std::int64_t backward_bytes(const PairProblem& p, const BackwardPlan& plan) {
  DeviceArena count(nullptr);
  BackwardBuffers<Geometry, T>(p, plan, count);
  return count.used();
}

// The largest plan that fits into `bytes`: whole problems first, else a panel of rows of one. One tile of rows of one problem is the smallest.
// size(plan): the bytes that a plan takes.
template <class Size> inline BackwardPlan choose_plan(const PairProblem& p, std::int64_t kRows, std::int64_t bytes, const Size& size) {
  const std::int64_t most_rows = p.B < kMaxSlots * kRows ? p.B : kMaxSlots * kRows;
  const auto fits = [&](std::int64_t batches, std::int64_t rows) { return size(BackwardPlan{batches, rows}) <= bytes; };
  if (fits(1, most_rows)) {
    std::int64_t low = 1, high = p.N < 1 ? 1 : p.N < kMaxBatches ? p.N : kMaxBatches;
    if (most_rows < p.B) high = 1;
    while (low < high) {
      const std::int64_t middle = (low + high + 1) / 2;
      if (fits(middle, most_rows)) low = middle;
      else high = middle - 1;
    }
    return {low, most_rows};
  }
  std::int64_t tiles = most_rows / kRows;
  while (tiles > 1 && !fits(1, tiles * kRows)) --tiles;
  const std::int64_t rows = tiles * kRows;
  return {1, rows < most_rows && rows > 0 ? rows : most_rows};
}

// The bytes of the plan that `panel_bytes` allow for the panel, beyond what does not depend on it.
template <class Size> inline std::int64_t plan_workspace(const PairProblem& p, std::int64_t kRows, std::int64_t panel_bytes, const Size& size) {
  const std::int64_t least = size(BackwardPlan{1, p.B < kRows ? p.B : kRows}), without_panel = size(BackwardPlan{1, 0});
  const std::int64_t panel = least - without_panel;
  return size(choose_plan(p, kRows, without_panel + (panel_bytes > panel ? panel_bytes : panel), size));
}

// What is saved from the forward pass and what is wanted.
struct GradientRequest {
  const void* basis;
  const void* factor;
  void* grad_anchor;   // or nullptr
  void* grad_others;   // or nullptr
};

// upstream_of(first problem, first row): the upstream of a panel, whose problems and rows count from 0.
template <class Geometry, class T, class Upstream, class UpstreamOf, class Launch>
int run_pair_gradient(const PairProblem& whole, const GradientRequest& request, const BackwardPlan& plan, const BackwardBuffers<Geometry, T>& buffers,
                      const UpstreamOf& upstream_of, const Launch& launch) {
  using Real = real_of<T>;
  using Backend = PairBackend<T>;
  using Buffers = BackwardBuffers<Geometry, T>;
  using Coefficient = typename Arithmetic<T>::Coefficient;
  const bool need_anchor = request.grad_anchor != nullptr, need_others = request.grad_others != nullptr;
  if (!need_anchor && !need_others && !Upstream::kLogits) return 0;
  for (std::int64_t first = 0; first == 0 || first < whole.N; first += plan.batches) {
    PairProblem p = whole;
    p.N = whole.N - first < plan.batches ? whole.N - first : plan.batches;
    p.anchor.data = shifted(p.anchor.data, first * p.anchor.batch_stride, sizeof(T));
    const std::int64_t columns = p.C * p.m, wide = operand_pitch<T>(p.D);
    const Real* basis = shifted(static_cast<const Real*>(request.basis), first * columns * p.D);
    const Real* factor = shifted(static_cast<const Real*>(request.factor), first * p.C * Geometry::factor_size(p.m));
    T* grad_anchor = shifted(static_cast<T*>(request.grad_anchor), first * p.B * p.D);
    T* grad_others = shifted(static_cast<T*>(request.grad_others), first * columns * p.D);
    Real* gradient = buffers.gradient;
    if constexpr (Buffers::kRealGradient) gradient = grad_others;

    PrepareBackward<Geometry, T> prepare{p.B,
                                         p.C,
                                         p.D,
                                         p.m,
                                         p.anchor,
                                         basis,
                                         factor,
                                         buffers.scale,
                                         buffers.row_square,
                                         buffers.operand,
                                         buffers.basis_planes,
                                         buffers.anchor_planes,
                                         wide,
                                         p.N * columns * wide,
                                         p.N * p.B * wide};
    if (const int error = launch_kernel(launch, prepare, p.N)) return error;

    for (std::int64_t row = 0; row < p.B; row += plan.rows) {
      PairProblem panel = p;
      panel.B = p.B - row < plan.rows ? p.B - row : plan.rows;
      panel.anchor.data = shifted(p.anchor.data, row * p.anchor.row_stride, sizeof(T));
      const TileGrid grid = make_grid(panel.B, columns, p.D, Backend::kRows, Backend::kColumns / p.m * p.m, 0, kMaxSlots);
      PairView<Geometry, T> view = pair_view<Geometry, T>(panel, basis, factor, buffers.scale, buffers.row_square + row);
      view.row_square_stride = p.B;
      const Upstream upstream = upstream_of(first, row);
      const NearPairs near{buffers.near_bits, buffers.near_any,       panel.B,        grid.row_tiles,
                           grid.column_tiles, view.lanes / kWarpSize, Backend::kRows, Backend::kColumns / p.m};
      const std::int64_t plane_stride = p.N * panel.B * buffers.pitch;

      CoefficientKernel<Geometry, T, Upstream> coefficients{
          anchor_operand<T>(panel),
          basis_operand<T>(p, basis, buffers.operand),
          grid,
          {view, upstream, buffers.coefficients, buffers.pitch, plane_stride, panel.B, need_anchor ? buffers.row_slots : nullptr, grid.column_walks,
           need_others ? buffers.column_slots : nullptr, grid.row_tiles, near}};
      if (const int error = launch_kernel(launch, coefficients, p.N)) return error;

      T* target = shifted(grad_anchor, row * p.D);
      Real* addend = need_anchor ? buffers.addend : nullptr;
      std::int64_t addend_batch_stride = panel.B * p.D;
      if constexpr (Buffers::kRealGradient) {
        addend = target;
        addend_batch_stride = p.B * p.D;
      }
      if (need_anchor || Upstream::kLogits) {
        RowTerms<Geometry, T, Upstream> rows{view, upstream, near, buffers.row_slots, grid.column_walks, addend, addend_batch_stride, p.D};
        if (const int error = launch_kernel(launch, rows, p.N)) return error;
      }
      if (need_anchor) {
        using Product = GradAnchorBackend<T>;
        Operand<Coefficient> values;
        if constexpr (Buffers::kPlanes == 2)
          values = make_operand<bf16>(Major::line, buffers.basis_planes, columns * wide, 1, wide, p.N * columns * wide);
        else if constexpr (Arithmetic<T>::kRounded) values = make_operand<T>(Major::line, buffers.operand, columns * wide, 1, wide);
        else values = make_operand<T>(Major::line, basis, columns * p.D, 1, p.D);
        GradAnchorKernel<T> product{
            make_operand<Coefficient>(Major::depth, buffers.coefficients, panel.B * buffers.pitch, buffers.pitch, 1, plane_stride),
            values,
            make_grid(panel.B, p.D, columns, Product::kRows, Product::kColumns),
            {target, addend, p.B * p.D, p.D, addend_batch_stride, p.D, Real(-1)}};
        if (const int error = launch_kernel(launch, product, p.N)) return error;
      }
      if (need_others) {
        using Product = GradBasisBackend<T>;
        Operand<Coefficient> values;
        if constexpr (Buffers::kPlanes == 2)
          values = make_operand<bf16>(Major::line, buffers.anchor_planes + row * wide, p.B * wide, 1, wide, p.N * p.B * wide);
        else
          values = make_operand<T>(Major::line, static_cast<const T*>(panel.anchor.data), p.anchor.batch_stride, p.anchor.element_stride,
                                   p.anchor.row_stride);
        GradBasisKernel<T> product{
            make_operand<Coefficient>(Major::line, buffers.coefficients, panel.B * buffers.pitch, 1, buffers.pitch, plane_stride),
            values,
            make_grid(columns, p.D, panel.B, Product::kRows, Product::kColumns),
            {gradient, row == 0 ? nullptr : gradient, columns * p.D, p.D, columns * p.D, p.D, Real(1)}};
        if (const int error = launch_kernel(launch, product, p.N)) return error;

        ColumnTerms<Geometry, T, Upstream> column_terms{view, upstream, near, buffers.column_slots, buffers.totals, gradient, row == 0};
        if (const int error = launch_kernel(launch, column_terms, p.N)) return error;
      }
    }
    if (need_others) {
      GradOthers<Geometry, T> others{p.C, p.D, p.m, p.B == 0, basis, factor, buffers.scale, buffers.totals, gradient, grad_others};
      if (const int error = launch_kernel(launch, others, p.N)) return error;
    }
  }
  return 0;
}

}   // namespace modalign::cuda
