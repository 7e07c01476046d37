// The gradient of a value per pair, whatever its upstream gradient is made of: a matrix (gram_volume_bwd) or the statistics of a loss (contrastive_loss_bwd).
//
//   struct Upstream {
//     std::int64_t begin_row(row, first_group, last_group);   // -> the candidate of this row that is always recomputed from its vectors, kNone without one,
//                                                             //    kNoPart for a row (of zeros) that takes no part
//     const T* weights(group, const T* value);                // dL/dvalue of this row's pairs of a lane group
//     void end_row(slot);
//   };
//
// Formulas: ops/gram_volume.h. T = w kappa; where a residual is near zero (and for the named candidate) the pair leaves the product form, T = 0 and no weight, and adds
// w e itself, inside the tile and with no list of pairs: sum_j w_ij a_i - T X would cancel for exactly those pairs.
#pragma once

#include "cpu/gradient_walk.h"
#include "cpu/pair_geometry.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {

constexpr std::int64_t kNone = -1, kNoPart = -2;

template <class T>
inline Slots slots_of(const Sizes& s, const Columns<T>& columns) {
  return gradient_slots((columns.count + columns.tile - 1) / columns.tile, s.B, s.C);
}

template <class T>
struct BackwardBuffers {
  Operands<T> operands;
  GradientBuffers<T> gradient;
  // Sums over all rows or columns that enter differences of large terms: in double beyond one tile.
  double* statistics;    // [groups][1 + m (m + 1) / 2][lanes]: alpha, then S_pq for p >= q
  double* slot_weights;  // [slots][panel rows]: sum_j w_ij
  BackwardBuffers(const Sizes& s, int data, Arena& arena)
      : operands(s, data, arena), gradient(s.B, Columns<T>(s.C, s.D, s.m).count, s.D, slots_of<T>(s, Columns<T>(s.C, s.D, s.m)), arena) {
    const Columns<T> columns(s.C, s.D, s.m);
    statistics = arena.take<double>(columns.groups * (1 + s.m * (s.m + 1) / 2) * kLanes<T>);
    slot_weights = arena.take<double>(slots_of<T>(s, columns).count * panel_rows_of(s.B));
  }
};

// Turns a tile of products into T = w kappa in place, and folds w, alpha and S into the row and column statistics.
template <class T, class Geometry, class Upstream>
struct BackwardEpilogue {
  const Sizes& sizes;
  const Geometry& geometry;
  const Operands<T>& operands;
  const T* basis;
  bool squared;
  T root_eps;
  T* column_gradient;   // or nullptr
  double* statistics;
  double* slot_weights;
  Upstream upstream;
  Scratch<T> e, a;      // e [lanes][D]
  Scratch<T> partial;   // the statistics of one tile, in T

  void operator()(const Tile<T>& tile, T* row_gradient, std::int64_t slot) {
    constexpr int W = kLanes<T>, L = kVectorLanes<T>;
    const int m = sizes.m, per_group = 1 + m * (m + 1) / 2;
    const std::int64_t first_group = tile.column / (m * W), last_group = minimum((tile.column + tile.columns) / (m * W), (sizes.C + W - 1) / W);
    const std::int64_t statistics_here = (last_group - first_group) * per_group * W;
    for (std::int64_t k = 0; k < statistics_here; ++k) partial[k] = 0;
    for (std::int64_t i = 0; i < tile.rows; ++i) {
      const std::int64_t row = tile.row + i, named = upstream.begin_row(row, first_group, last_group);
      if (named == kNoPart) {
        for (std::int64_t c = 0; c < tile.columns; ++c) tile.data[i * tile.ld + c] = 0;
        continue;
      }
      const T row_square = operands.row_square[row];
      bool loaded = false;
      Vector<T> weight{};
      for (std::int64_t group = first_group; group < last_group; ++group) {
        T* s = tile.data + i * tile.ld + group * m * W - tile.column;
        const T* data = operands.column_data + group * Geometry::kData * W;
        T* sums = partial + (group - first_group) * per_group * W;
        T r[W], trust[W], root[W], value[W], w[W];
        geometry.residual(s, row_square, data, r, trust);
        int any = named >= 0 && named / W == group;
        for (int l = 0; l < W; ++l) any |= near_zero(r[l], trust[l]);
        if (any) {
          if (!loaded) unpack_row(operands.row_panels, row, sizes.D, static_cast<T*>(a));
          loaded = true;
          direct_pairs(group, named, row_square, s, r, trust, row_gradient ? row_gradient + i * sizes.D : nullptr, sums, w);
        } else {
          for (int l = 0; l < W; ++l) {
            root[l] = std::sqrt(r[l]);
            value[l] = squared ? data[l] * data[l] * r[l] : data[l] * root[l];
          }
          const T* W_up = upstream.weights(group, value);
          for (int l = 0; l < W; ++l) {
            w[l] = squared ? 2 * W_up[l] * data[l] * data[l] : W_up[l] * data[l] / root[l];
            sums[l] += w[l] * r[l];   // alpha: W value, for both forms (squared: twice)
          }
        }
        for (int l = 0; l < W; l += L) weight += load(w + l);
        T* S = sums + W;
        for (int p = 0; p < m; ++p)
          for (int q = 0; q <= p; ++q, S += W)
            for (int l = 0; l < W; ++l) S[l] += w[l] * s[p * W + l] * s[q * W + l];
        for (int p = 0; p < m; ++p)
          for (int l = 0; l < W; ++l) s[p * W + l] *= w[l];
      }
      double total = 0;
      for (int l = 0; l < L; ++l) total += weight[l];
      slot_weights[slot * panel_rows_of(sizes.B) + i] += total;
      upstream.end_row(slot);
    }
    double* to = statistics + first_group * per_group * W;
    for (std::int64_t k = 0; k < statistics_here; ++k) to[k] += partial[k];
  }

 private:
  // A lane group with pairs that are recomputed from their vectors: these add w e themselves and leave w = 0, s = 0 and their alpha behind.
  void direct_pairs(std::int64_t group, std::int64_t named, T row_square, T* s, T* r, const T* trust, T* row_gradient, T* sums, T* w) {
    constexpr int W = kLanes<T>;
    const int m = sizes.m;
    const std::int64_t D = sizes.D;
    const T* data = operands.column_data + group * Geometry::kData * W;
    T value[W], kappa[W][kMaxOthers], reference[W];
    bool direct[W];
    for (int l = 0; l < W; ++l) {
      const std::int64_t j = group * W + l;
      direct[l] = near_zero(r[l], trust[l]) || j == named;
      if (direct[l] && j < sizes.C) {
        reference[l] = geometry.direct(a, row_square, basis + j * m * D, kappa[l], e + l * D);
        r[l] = dot<T>(e + l * D, e + l * D, D);
        if (is_rounding(r[l], reference[l])) r[l] = 0;
      }
      const T residual = r[l] < 0 ? 0 : r[l];   // keeps NaN
      value[l] = squared ? data[l] * data[l] * residual : data[l] * std::sqrt(residual);
    }
    const T* W_up = upstream.weights(group, value);
    for (int l = 0; l < W; ++l) {
      const T root = std::sqrt(r[l]);
      if (!direct[l]) {
        w[l] = squared ? 2 * W_up[l] * data[l] * data[l] : W_up[l] * data[l] / root;
        sums[l] += w[l] * r[l];
        continue;
      }
      w[l] = 0;
      for (int p = 0; p < m; ++p) s[p * W + l] = 0;
      if (r[l] == 0 || group * W + l >= sizes.C) continue;
      const T floor = root_eps * std::sqrt(reference[l]);
      const T w_direct = squared ? 2 * W_up[l] * data[l] * data[l] : W_up[l] * data[l] / (root > floor ? root : floor);
      sums[l] += squared ? w_direct * r[l] : W_up[l] * value[l];
      if (row_gradient) add_scaled<T>(row_gradient, w_direct, e + l * D, D);
      if (column_gradient)
        for (int p = 0; p < m; ++p) add_scaled<T>(column_gradient + ((group * m + p) * W + l) * D, w_direct * kappa[l][p], e + l * D, D);
    }
  }
};

// Operands must be packed. to.grad* of PairBackward are not read: make_upstream() is called once per thread chunk.
template <class T, class Geometry, class MakeUpstream>
inline void pair_gradient(const Sizes& sizes, Scalar dtype, std::int64_t batch, bool squared, double eps, const T* basis, const Geometry& geometry, void* grad_anchor,
                          void* grad_others, const BackwardBuffers<T>& buffers, const Parallel& parallel, const MakeUpstream& make_upstream, T* products = nullptr) {
  constexpr int W = kLanes<T>;
  const std::int64_t D = sizes.D, panel_rows = panel_rows_of(sizes.B);
  const int m = sizes.m, per_group = 1 + m * (m + 1) / 2;
  const Columns<T> columns(sizes.C, D, m);
  const Slots slots = slots_of<T>(sizes, columns);
  const auto clear_weights = [&] { for (std::int64_t i = 0; i < slots.count * panel_rows; ++i) buffers.slot_weights[i] = 0; };
  for (std::int64_t k = 0; k < columns.groups * per_group * W; ++k) buffers.statistics[k] = 0;
  clear_weights();
  using Upstream = decltype(make_upstream());
  gradient_walk<T>(
      {buffers.operands.row_panels, sizes.B, buffers.operands.column_panels, columns.count, D, columns.tile, products}, slots, buffers.gradient, grad_anchor != nullptr,
      grad_others != nullptr, Into::subtract, parallel, [&](std::int64_t c) { return columns.row(c, basis); },
      [&] {
        return BackwardEpilogue<T, Geometry, Upstream>{sizes, geometry, buffers.operands, basis, squared, static_cast<T>(std::sqrt(eps)),
                                                       grad_others ? buffers.gradient.column_gradient : nullptr, buffers.statistics, buffers.slot_weights,
                                                       make_upstream(), Scratch<T>(W * D), Scratch<T>(D), Scratch<T>(columns.tile / m * per_group)};
      },
      [&](std::int64_t first, std::int64_t rows, const auto& add_slots) {   // dA_i = (sum_j w_ij) a_i - (T X)_i + near-zero pairs
        parallel_for(parallel, 0, rows, 8, [&](std::int64_t begin, std::int64_t end) {
          Scratch<T> line(D);
          for (std::int64_t i = begin; i < end; ++i) {
            double weight = 0;
            for (std::int64_t slot = 0; slot < slots.count; ++slot) weight += buffers.slot_weights[slot * panel_rows + i];
            unpack_row(buffers.operands.row_panels, first + i, D, static_cast<T*>(line));
            for (std::int64_t k = 0; k < D; ++k) line[k] *= static_cast<T>(weight);
            add_slots(i, static_cast<T*>(line));
            store_row<T>(dtype, grad_anchor, (batch * sizes.B + first + i) * D, D, line);
          }
        });
        clear_weights();
      });
  if (grad_others)
    parallel_for(parallel, 0, sizes.C, 16, [&](std::int64_t begin, std::int64_t end) {
      Scratch<T> G(m * D);
      for (std::int64_t j = begin; j < end; ++j) {
        const std::int64_t group = j / W, l = j % W;
        const double* sums = buffers.statistics + group * per_group * W + l;
        const T* x = basis + j * m * D;
        for (int p = 0; p < m; ++p) {
          const T* from = buffers.gradient.column_gradient + ((group * m + p) * W + l) * D;
          for (std::int64_t k = 0; k < D; ++k) G[p * D + k] = from[k];
          for (int q = 0; q < m; ++q) {   // G_p = (T^t A)_p - sum_q S_pq x_q
            const int high = p > q ? p : q, low = p > q ? q : p;
            add_scaled<T>(G + p * D, -static_cast<T>(sums[(1 + high * (high + 1) / 2 + low) * W]), x + q * D, D);
          }
        }
        geometry.finish(j, x, static_cast<T>(sums[0]), G);
        store_row<T>(dtype, grad_others, (batch * sizes.C + j) * m * D, m * D, G);
      }
    });
}

}  // inline namespace
}  // namespace modalign::cpu
