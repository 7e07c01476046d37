// Gramian volume and triangle area on the CPU, forward and backward; compiled once per instruction set.
//
// Maths      ops/gram_volume.h: value_ij = scale_j |e_ij|, e_ij = a_i - sum_p kappa_ijp x_jp. One product with the m basis rows of every candidate gives all
//            coefficients; |e|^2 = |a|^2 - |s|^2 follows in the epilogue. (GRAM, ICLR 2025; TRIANGLE, NeurIPS 2025; the whitened form is ours.)
// Mapping    candidates are taken in groups of 64 bytes (16 floats): the m basis rows of a group are m neighbouring vectors of the packed column operand, so the
//            square-sum over p is vertical and needs no shuffle:   packed column = (group m + p) lanes + lane.
// Near zero  |a|^2 - |s|^2 has an absolute error of about eps |a|^2. Where it does not exceed kNearZero of |a|^2 the pair is recomputed from its vectors, inside the tile
//            and with no list of pairs: e = a - sum kappa x, projected a second time. The same pairs leave the product form of the gradient and add w e directly.
// Forward    2 B C m D FLOPs; reads (B + m C) D, writes B C values. Memory beyond in- and outputs: the packed operands, (B + m C) D.
// Backward   6 B C m D FLOPs: each tile of coefficients is made again, once, and used twice (T X and T^t A). Row panels are walked in order; inside a panel every
//            thread owns whole column slots (at most kMaxSlots, their number fixed by the problem), adds the column side into its own rows of G and the row side into
//            its slot's buffer; slots are added in order. No atomics, and the bits do not depend on the number of threads.
// Precision  accumulation in float (double for double), the few sums over all rows or columns in double; the packed operands are widened, never rounded.

#include "cpu/gram_volume.h"

#include <limits>

#include "common/vec.h"
#include "cpu/gram_schmidt.h"
#include "cpu/statistics.h"
#include "cpu/tile.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {
namespace {

constexpr std::int64_t kMaxPanelRows = 2 * kTileRows;   // rows whose gradient is gathered at once in backward
constexpr std::int64_t kLaneBytes = 64 << 20;           // workspace that small problems side by side may take together
constexpr std::int64_t kSmallProblem = std::int64_t(1) << 22;   // multiply-adds below which a batch of problems is spread over threads instead of each problem

// The share of |a|^2 below which |a|^2 - |s|^2 is not trusted: its relative error there is about 4 eps / share.
template <class T> constexpr T kNearZero = sizeof(T) == 4 ? T(1e-2) : T(1e-4);
// A recomputed residual this small is rounding: identical, antiparallel and linearly dependent vectors give exactly zero.
// An infinite |a|^2 trusts nothing and is near nothing: an overflow stays visible.
template <class T> inline bool near_zero(T r, T trust) { return r <= kNearZero<T> * trust && trust < std::numeric_limits<T>::infinity(); }
template <class T> constexpr T kRounding = 64 * kEpsilon<T> * kEpsilon<T>;
template <class T> inline bool is_rounding(T r, T reference) { return r <= kRounding<T> * reference && reference < std::numeric_limits<T>::infinity(); }

// Hands out pieces of one allocation; with a null base it only counts, so that sizes and pointers come from the same code.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T> T* take(std::int64_t n) {
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += round_up(n * static_cast<std::int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(at);
  }
  std::int64_t used() const { return used_; }

 private:
  char* base_;
  std::int64_t used_ = 0;
};

// ---- the two geometries -------------------------------------------------------------------------------------------------------------------------------
// column data: kData numbers per candidate, stored [group][kData][lanes]; data[0] is the scale.

template <class T>
struct VolumeGeometry {
  static constexpr int kData = 1;   // d = prod |L_pp|
  int m;
  std::int64_t D;
  const T* factor;

  void column_data(std::int64_t j, T* data) const {
    T d = 1;
    for (int p = 0; p < m; ++p) d *= factor[(j * m + p) * m + p];
    data[0] = d;
  }
  // coefficients s [m][lanes] are already kappa; residual and its scale of trust
  void residual(T* s, T row_square, const T*, T* r, T* trust) const {
    constexpr int W = kLanes<T>;
    for (int l = 0; l < W; ++l) r[l] = 0;
    for (int p = 0; p < m; ++p)
      for (int l = 0; l < W; ++l) r[l] += s[p * W + l] * s[p * W + l];
    for (int l = 0; l < W; ++l) r[l] = row_square - r[l];
    for (int l = 0; l < W; ++l) trust[l] = row_square;
  }
  // e = a - sum kappa x from the vectors, projected twice; returns the square length that rounding is measured against
  T direct(const T* a, T row_square, const T* x, T* kappa, T* e) const {
    for (int p = 0; p < m; ++p) kappa[p] = 0;
    for (std::int64_t k = 0; k < D; ++k) e[k] = a[k];
    for (int pass = 0; pass < 2; ++pass) project(x, m, kappa, e);
    return row_square;
  }
  void project(const T* x, int count, T* kappa, T* e) const {
    T s[kMaxOthers];
    for (int p = 0; p < count; ++p) s[p] = dot(e, x + p * D, D);
    for (int p = 0; p < count; ++p) {
      add_scaled(e, -s[p], x + p * D, D);
      kappa[p] += s[p];
    }
  }
  // dR = L^-T (alpha Q - G), G complete. `out` holds G on entry. S = sum w kappa kappa^T has been applied by the caller.
  void finish(std::int64_t j, const T* x, T alpha, T* out) const {
    const T* L = factor + j * m * m;
    for (int p = 0; p < m; ++p)
      if (L[p * m + p] == 0) {   // dependent candidate: volume 0 for every anchor, gradient 0
        for (std::int64_t k = 0; k < m * D; ++k) out[k] = 0;
        return;
      }
    for (std::int64_t k = 0; k < m * D; ++k) out[k] = alpha * x[k] - out[k];
    solve_transposed(L, m, D, out);
    for (int p = 0; p < m; ++p)   // absent: exactly zero, also beside a NaN anchor
      if (L[p * m + p] == 1 && dot(x + p * D, x + p * D, D) == 0)
        for (std::int64_t k = 0; k < D; ++k) out[p * D + k] = 0;
  }
};

template <class T>
struct TriangleGeometry {
  static constexpr int kData = 3;   // g/2, u.n, |u|^2
  static constexpr int m = 2;
  std::int64_t D;
  const T* factor;

  void column_data(std::int64_t j, T* data) const {
    data[0] = factor[j * 3] / 2;
    data[1] = factor[j * 3 + 1];
    data[2] = factor[j * 3 + 2];
  }
  void residual(T* s, T row_square, const T* data, T* r, T* trust) const {
    constexpr int W = kLanes<T>;
    for (int l = 0; l < W; ++l) {
      const T t = s[W + l] - data[W + l];
      trust[l] = row_square + data[2 * W + l];
      r[l] = trust[l] - 2 * s[l] - t * t;
      s[l] = 1;
      s[W + l] = t;
    }
  }
  T direct(const T* a, T, const T* x, T* kappa, T* e) const {
    const T* n = x + D;
    for (std::int64_t k = 0; k < D; ++k) e[k] = a[k] - x[k];
    const T from_u = dot(e, e, D);
    kappa[0] = 1;
    kappa[1] = 0;
    for (int pass = 0; pass < 2; ++pass) {
      const T t = dot(e, n, D);
      add_scaled(e, -t, n, D);
      kappa[1] += t;
    }
    return from_u;
  }
  // du = -G_0 - G_1/g + (alpha/g) n,  dv = G_1/g - (alpha/g) n
  void finish(std::int64_t j, const T* x, T alpha, T* out) const {
    const T g = factor[j * 3];
    if (g == 0) {
      for (std::int64_t k = 0; k < 2 * D; ++k) out[k] = 0;
      return;
    }
    const T* n = x + D;
    for (std::int64_t k = 0; k < D; ++k) {
      const T along = (out[D + k] - alpha * n[k]) / g;
      out[k] = -out[k] - along;
      out[D + k] = along;
    }
  }
};

// ---- what forward and backward share ------------------------------------------------------------------------------------------------------------------

struct Sizes {
  std::int64_t B, C, D;
  int m;
  std::int64_t panel_rows() const { return minimum(kMaxPanelRows, round_up(B, kRegisterRows)); }
};

// Packed-column bookkeeping for C candidates of m vectors.
template <class T>
struct Columns {
  std::int64_t C, D, groups, count, tile;   // count: packed columns incl. padding; tile: columns of a cache block, whole groups and whole panels
  int m;
  Columns(std::int64_t C, std::int64_t D, int m) : C(C), D(D), m(m) {
    constexpr int W = kLanes<T>, P = kPanelColumns<T>;
    groups = (C + W - 1) / W;
    count = round_up(groups * m * W, P);
    std::int64_t per_tile = maximum(1, 8 / m);
    while (per_tile * m * W % P) ++per_tile;
    tile = per_tile * m * W;
  }
  // the basis row behind a packed column, or nullptr for padding
  const T* row(std::int64_t column, const T* basis) const {
    constexpr int W = kLanes<T>;
    const std::int64_t vector = column / W, j = vector / m * W + column % W;
    return vector < groups * m && j < C ? basis + (j * m + vector % m) * D : nullptr;
  }
};

template <class T>
struct Operands {
  T* row_panels;      // anchors, packed
  T* row_square;      // |a_i|^2
  T* column_panels;   // basis rows, packed
  T* column_data;     // [groups][kData][lanes]
  Operands(const Sizes& s, int data, Arena& arena) {
    const Columns<T> columns(s.C, s.D, s.m);
    row_panels = arena.take<T>(packed_rows_size(s.B, s.D));
    row_square = arena.take<T>(s.B);
    column_panels = arena.take<T>(columns.count * s.D);
    column_data = arena.take<T>(columns.groups * data * kLanes<T>);
  }
};

template <class T, class Geometry>
void pack_operands(const Sizes& s, Scalar dtype, const BatchedRows& anchor, std::int64_t batch, const T* basis, const Geometry& geometry, const Operands<T>& to,
                   const Parallel& parallel) {
  parallel_for(parallel, 0, (s.B + kRegisterRows - 1) / kRegisterRows, 4, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> rows(kRegisterRows * s.D);
    for (std::int64_t panel = begin; panel < end; ++panel) {
      const std::int64_t first = panel * kRegisterRows;
      const int count = static_cast<int>(minimum(kRegisterRows, s.B - first));
      for (int r = 0; r < count; ++r) {
        T* row = rows + r * s.D;
        load_row(dtype, anchor.data, batch * anchor.batch_stride + (first + r) * anchor.row_stride, anchor.element_stride, s.D, row);
        to.row_square[first + r] = dot(row, row, s.D);
      }
      pack_panel(kRegisterRows, count, s.D, [&](int r) { return rows + r * s.D; }, to.row_panels + first * s.D);
    }
  });
  const Columns<T> columns(s.C, s.D, s.m);
  constexpr int P = kPanelColumns<T>, W = kLanes<T>;
  parallel_for(parallel, 0, columns.count / P, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t panel = begin; panel < end; ++panel)
      pack_panel(P, P, s.D, [&](int c) { return columns.row(panel * P + c, basis); }, to.column_panels + panel * P * s.D);
  });
  for (std::int64_t group = 0; group < columns.groups; ++group)
    for (int l = 0; l < W; ++l) {
      T data[Geometry::kData] = {};   // padding: scale 0
      if (group * W + l < s.C) geometry.column_data(group * W + l, data);
      for (int d = 0; d < Geometry::kData; ++d) to.column_data[(group * Geometry::kData + d) * W + l] = data[d];
    }
}

// Row `r` of the row panels, contiguous.
template <class T>
void unpack_row(const T* row_panels, std::int64_t r, std::int64_t D, T* out) {
  const T* panel = row_panels + r / kRegisterRows * kRegisterRows * D + r % kRegisterRows;
  for (std::int64_t k = 0; k < D; ++k) out[k] = panel[k * kRegisterRows];
}

// Many small problems run side by side, each in a lane with a workspace of its own; the number of lanes is fixed by the problem.
std::int64_t lanes_of(std::int64_t N, std::int64_t work, std::int64_t lane_bytes) {
  return work < kSmallProblem ? maximum(1, minimum(minimum(N, 16), kLaneBytes / maximum(1, lane_bytes))) : 1;
}

template <class F>
void for_each_problem(std::int64_t N, std::int64_t lanes, const Parallel& parallel, const F& f) {
  if (lanes == 1) {
    for (std::int64_t n = 0; n < N; ++n) f(n, 0, parallel);
    return;
  }
  parallel_for(parallel, 0, lanes, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t lane = begin; lane < end; ++lane)
      for (std::int64_t n = lane; n < N; n += lanes) f(n, lane, kSerial);
  });
}

// ---- forward ------------------------------------------------------------------------------------------------------------------------------------------

template <class T, class Geometry>
struct ForwardEpilogue {
  const Sizes& sizes;
  const Geometry& geometry;
  const Operands<T>& operands;
  const T* basis;
  Scalar dtype;
  bool squared;
  void* value;
  std::int64_t value_offset;
  Scratch<T> line, e, a;

  void operator()(Tile<T>& tile) {
    constexpr int W = kLanes<T>;
    const int m = sizes.m;
    const std::int64_t first_group = tile.column / (m * W), last_group = minimum((tile.column + tile.columns) / (m * W), (sizes.C + W - 1) / W);
    for (std::int64_t i = 0; i < tile.rows; ++i) {
      const std::int64_t row = tile.row + i;
      const T row_square = operands.row_square[row];
      bool loaded = false;
      for (std::int64_t group = first_group; group < last_group; ++group) {
        T* s = tile.data + i * tile.ld + group * m * W - tile.column;
        const T* data = operands.column_data + group * Geometry::kData * W;
        T* out = line + (group - first_group) * W;
        T r[W], trust[W];
        geometry.residual(s, row_square, data, r, trust);
        int any = 0;
        for (int l = 0; l < W; ++l) any |= near_zero(r[l], trust[l]);
        if (any) {
          if (!loaded) unpack_row(operands.row_panels, row, sizes.D, static_cast<T*>(a));
          loaded = true;
          for (int l = 0; l < W; ++l) {
            const std::int64_t j = group * W + l;
            if (!near_zero(r[l], trust[l]) || j >= sizes.C) continue;
            T kappa[kMaxOthers];
            const T reference = geometry.direct(a, row_square, basis + j * m * sizes.D, kappa, e);
            r[l] = dot<T>(e, e, sizes.D);
            if (is_rounding(r[l], reference)) r[l] = 0;
          }
        }
        if (squared) for (int l = 0; l < W; ++l) out[l] = data[l] * data[l] * (r[l] < 0 ? 0 : r[l]);   // keeps NaN
        else for (int l = 0; l < W; ++l) out[l] = data[l] * std::sqrt(r[l] < 0 ? 0 : r[l]);
      }
      const std::int64_t j = first_group * W;
      store_row<T>(dtype, value, value_offset + row * sizes.C + j, minimum(last_group * W, sizes.C) - j, line);
    }
  }
};

template <class T, class Geometry>
void forward(const Sizes& sizes, Scalar dtype, const BatchedRows& anchor, std::int64_t batch, bool squared, const T* basis, const Geometry& geometry, void* value,
             const Operands<T>& operands, const Parallel& parallel) {
  pack_operands(sizes, dtype, anchor, batch, basis, geometry, operands, parallel);
  const Columns<T> columns(sizes.C, sizes.D, sizes.m);
  for_each_tile(operands.row_panels, sizes.B, operands.column_panels, columns.count, sizes.D, columns.tile, parallel, [&] {
    return ForwardEpilogue<T, Geometry>{sizes, geometry, operands, basis, dtype, squared, value, batch * sizes.B * sizes.C,
                                        Scratch<T>(columns.tile), Scratch<T>(sizes.D), Scratch<T>(sizes.D)};
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------------------------------------------

template <class T>
Slots slots_of(const Sizes& s, const Columns<T>& columns) {   // slot buffers stay within one copy of the rows and columns
  return {(columns.count + columns.tile - 1) / columns.tile, (s.B + s.C) / maximum(1, s.panel_rows())};
}

template <class T>
struct BackwardBuffers {
  Operands<T> operands;
  T* row_values;       // the anchors of one row panel as value operand [D / P][panel rows][P]
  T* column_values;    // the basis rows as value operand [D / P][columns][P]
  T* column_gradient;  // G [columns][D], packed column order
  // Sums over all rows or columns that enter differences of large terms: in double whatever T is, they are few.
  double* statistics;    // [groups][1 + m (m + 1) / 2][lanes]: alpha, then S_pq for p >= q
  double* slot_weights;  // [slots][panel rows]: sum_j w_ij
  T* slot_rows;          // [slots][panel rows][D]
  BackwardBuffers(const Sizes& s, int data, Arena& arena) : operands(s, data, arena) {
    const Columns<T> columns(s.C, s.D, s.m);
    const Slots slots = slots_of<T>(s, columns);
    row_values = arena.take<T>(packed_value_size<T>(s.panel_rows(), s.D));
    column_values = arena.take<T>(packed_value_size<T>(columns.count, s.D));
    column_gradient = arena.take<T>(columns.count * s.D);
    statistics = arena.take<double>(columns.groups * (1 + s.m * (s.m + 1) / 2) * kLanes<T>);
    slot_rows = arena.take<T>(slots.count * s.panel_rows() * s.D);
    slot_weights = arena.take<double>(slots.count * s.panel_rows());
  }
};

struct Upstream {
  const void* data;
  std::int64_t offset, row_stride, column_stride;
};

// Turns a tile of products into T = w kappa in place, and folds w, alpha and S into the row and column statistics. Pairs near zero get T = 0 and add w e themselves.
template <class T, class Geometry>
struct BackwardEpilogue {
  const Sizes& sizes;
  const Geometry& geometry;
  const Operands<T>& operands;
  const T* basis;
  Scalar dtype;
  bool squared;
  T root_eps;
  Upstream grad;
  T* column_gradient;
  double* statistics;
  Scratch<T> upstream, e, a;

  // row_gradient [rows][D] and row_weight [rows] belong to this slot
  void operator()(const Tile<T>& tile, T* row_gradient, double* row_weight) const {
    constexpr int W = kLanes<T>;
    const int m = sizes.m, per_group = 1 + m * (m + 1) / 2;
    const std::int64_t first_group = tile.column / (m * W), last_group = minimum((tile.column + tile.columns) / (m * W), (sizes.C + W - 1) / W);
    const std::int64_t first_column = first_group * W, columns = minimum(last_group * W, sizes.C) - first_column;
    for (std::int64_t l = columns; l < (last_group - first_group) * W; ++l) upstream[l] = 0;
    for (std::int64_t i = 0; i < tile.rows; ++i) {
      const std::int64_t row = tile.row + i;
      const T row_square = operands.row_square[row];
      load_row<T>(dtype, grad.data, grad.offset + row * grad.row_stride + first_column * grad.column_stride, grad.column_stride, columns, upstream);
      bool loaded = false;
      double weight = 0;
      for (std::int64_t group = first_group; group < last_group; ++group) {
        T* s = tile.data + i * tile.ld + group * m * W - tile.column;
        const T* data = operands.column_data + group * Geometry::kData * W;
        const T* W_up = upstream + (group - first_group) * W;
        double* sums = statistics + group * per_group * W;
        T r[W], trust[W], w[W];
        geometry.residual(s, row_square, data, r, trust);
        int any = 0;
        for (int l = 0; l < W; ++l) {
          const bool direct = near_zero(r[l], trust[l]);
          any |= direct;
          const T residual = direct ? T(1) : r[l];   // not used where direct
          const T root = std::sqrt(residual);
          w[l] = direct ? T(0) : squared ? 2 * W_up[l] * data[l] * data[l] : W_up[l] * data[l] / root;
          sums[l] += w[l] * residual;                // alpha: W value, for both forms (squared: twice)
          weight += w[l];
        }
        if (any) {
          for (int l = 0; l < W; ++l) {
            const std::int64_t j = group * W + l;
            if (!near_zero(r[l], trust[l]) || j >= sizes.C) continue;
            for (int p = 0; p < m; ++p) s[p * W + l] = 0;
            if (!loaded) unpack_row(operands.row_panels, row, sizes.D, static_cast<T*>(a));
            loaded = true;
            T kappa[kMaxOthers];
            const T reference = geometry.direct(a, row_square, basis + j * m * sizes.D, kappa, e);
            const T residual = dot<T>(e, e, sizes.D);
            if (is_rounding(residual, reference)) continue;
            const T root = std::sqrt(residual), floor = root_eps * std::sqrt(reference);
            const T w_direct = squared ? 2 * W_up[l] * data[l] * data[l] : W_up[l] * data[l] / (root > floor ? root : floor);
            sums[l] += squared ? w_direct * residual : W_up[l] * data[l] * root;
            if (row_gradient) add_scaled<T>(row_gradient + i * sizes.D, w_direct, e, sizes.D);
            if (column_gradient)
              for (int p = 0; p < m; ++p) add_scaled<T>(column_gradient + ((group * m + p) * W + l) * sizes.D, w_direct * kappa[p], e, sizes.D);
          }
        }
        double* S = sums + W;
        for (int p = 0; p < m; ++p)
          for (int q = 0; q <= p; ++q, S += W)
            for (int l = 0; l < W; ++l) S[l] += w[l] * s[p * W + l] * s[q * W + l];
        for (int p = 0; p < m; ++p)
          for (int l = 0; l < W; ++l) s[p * W + l] *= w[l];
      }
      row_weight[i] += weight;
    }
  }
};

template <class T, class Geometry>
void backward(const Sizes& sizes, Scalar dtype, const BatchedRows& anchor, std::int64_t batch, bool squared, double eps, const T* basis, const Geometry& geometry,
              const PairBackward& to, const BackwardBuffers<T>& buffers, const Parallel& parallel) {
  constexpr int W = kLanes<T>;
  const std::int64_t D = sizes.D, panel_rows = sizes.panel_rows();
  const int m = sizes.m, per_group = 1 + m * (m + 1) / 2;
  const Columns<T> columns(sizes.C, D, m);
  const Slots slots = slots_of<T>(sizes, columns);
  pack_operands(sizes, dtype, anchor, batch, basis, geometry, buffers.operands, parallel);
  parallel_for(parallel, 0, columns.count, 64, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> zero(D);
    for (std::int64_t k = 0; k < D; ++k) zero[k] = 0;
    for (std::int64_t c = begin; c < end; ++c) {
      const T* row = columns.row(c, basis);
      if (to.grad_anchor) pack_value_row(row ? row : zero, D, columns.count, c, buffers.column_values);
      for (std::int64_t k = 0; k < D; ++k) buffers.column_gradient[c * D + k] = 0;
    }
  });
  for (std::int64_t k = 0; k < columns.groups * per_group * W; ++k) buffers.statistics[k] = 0;
  const Upstream grad{to.grad, batch * to.grad_batch_stride, to.grad_row_stride, to.grad_column_stride};

  for (std::int64_t first = 0; first < sizes.B; first += panel_rows) {
    const std::int64_t rows = minimum(panel_rows, sizes.B - first);
    if (to.grad_others) {
      Scratch<T> line(D);
      for (std::int64_t i = 0; i < rows; ++i) {
        unpack_row(buffers.operands.row_panels, first + i, D, static_cast<T*>(line));
        pack_value_row<T>(line, D, panel_rows, i, buffers.row_values);
      }
    }
    parallel_for(parallel, 0, slots.count, 1, [&](std::int64_t begin, std::int64_t end) {
      Scratch<T> data(panel_rows * columns.tile), left(panel_rows * round_up(columns.tile, kRegisterRows));
      const BackwardEpilogue<T, Geometry> epilogue{sizes, geometry, buffers.operands, basis, dtype, squared, static_cast<T>(std::sqrt(eps)), grad,
                                                   to.grad_others ? buffers.column_gradient : nullptr, buffers.statistics,
                                                   Scratch<T>(columns.tile), Scratch<T>(D), Scratch<T>(D)};
      for (std::int64_t slot = begin; slot < end; ++slot) {
        T* row_gradient = to.grad_anchor ? buffers.slot_rows + slot * panel_rows * D : nullptr;
        double* row_weight = buffers.slot_weights + slot * panel_rows;
        for (std::int64_t i = 0; i < rows; ++i) row_weight[i] = 0;
        if (row_gradient) for (std::int64_t k = 0; k < rows * D; ++k) row_gradient[k] = 0;
        for (std::int64_t block = slots.first_tile(slot); block < slots.first_tile(slot + 1); ++block) {
          const std::int64_t column = block * columns.tile;
          const Tile<T> tile{first, rows, column, minimum(columns.tile, columns.count - column), data, columns.tile};
          tile_product<T>(buffers.operands.row_panels + first * D, rows, buffers.operands.column_panels + column * D, tile.columns, D, data, tile.ld);
          epilogue(tile, row_gradient, row_weight);
          if (row_gradient) {   // - T X
            pack_tile_rows<T>(data, tile.ld, rows, tile.columns, left);
            value_product<T>(left, rows, tile.columns, buffers.column_values, columns.count, column, D, row_gradient, D, Into::subtract);
          }
          if (to.grad_others) {   // T^t A
            pack_tile_columns<T>(data, tile.ld, tile.columns, rows, left);
            value_product<T>(left, tile.columns, rows, buffers.row_values, panel_rows, 0, D, buffers.column_gradient + column * D, D, Into::add);
          }
        }
      }
    });
    if (to.grad_anchor)   // dA_i = (sum_j w_ij) a_i - (T X)_i + near-zero pairs, slots in order
      parallel_for(parallel, 0, rows, 8, [&](std::int64_t begin, std::int64_t end) {
        Scratch<T> line(D);
        for (std::int64_t i = begin; i < end; ++i) {
          double weight = 0;
          for (std::int64_t slot = 0; slot < slots.count; ++slot) weight += buffers.slot_weights[slot * panel_rows + i];
          unpack_row(buffers.operands.row_panels, first + i, D, static_cast<T*>(line));
          for (std::int64_t k = 0; k < D; ++k) line[k] *= static_cast<T>(weight);
          for (std::int64_t slot = 0; slot < slots.count; ++slot) add_scaled<T>(line, 1, buffers.slot_rows + (slot * panel_rows + i) * D, D);
          store_row<T>(dtype, to.grad_anchor, (batch * sizes.B + first + i) * D, D, line);
        }
      });
  }

  if (to.grad_others)
    parallel_for(parallel, 0, sizes.C, 16, [&](std::int64_t begin, std::int64_t end) {
      Scratch<T> G(m * D);
      for (std::int64_t j = begin; j < end; ++j) {
        const std::int64_t group = j / W, l = j % W;
        const double* sums = buffers.statistics + group * per_group * W + l;
        const T* x = basis + j * m * D;
        for (int p = 0; p < m; ++p) {
          const T* from = buffers.column_gradient + ((group * m + p) * W + l) * D;
          for (std::int64_t k = 0; k < D; ++k) G[p * D + k] = from[k];
          for (int q = 0; q < m; ++q) {   // G_p = (T^t A)_p - sum_q S_pq x_q
            const int high = p > q ? p : q, low = p > q ? q : p;
            add_scaled<T>(G + p * D, -static_cast<T>(sums[(1 + high * (high + 1) / 2 + low) * W]), x + q * D, D);
          }
        }
        geometry.finish(j, x, static_cast<T>(sums[0]), G);
        store_row<T>(dtype, to.grad_others, (batch * sizes.C + j) * m * D, m * D, G);
      }
    });
}

// ---- gram_volume --------------------------------------------------------------------------------------------------------------------------------------

template <class F>
auto with_real(Scalar dtype, F f) {
  return dtype == Scalar::f64 ? f(double{}) : f(float{});
}

Sizes sizes_of(const GramVolumeProblem& p) { return {p.B, p.C, p.D, p.m}; }
Sizes sizes_of(const TriangleAreaProblem& p) { return {p.B, p.C, p.D, 2}; }
std::int64_t work_of(const Sizes& s) { return s.B * s.C * s.m * s.D; }
template <class T> int data_of(const GramVolumeProblem&) { return VolumeGeometry<T>::kData; }
template <class T> int data_of(const TriangleAreaProblem&) { return TriangleGeometry<T>::kData; }
template <class T> VolumeGeometry<T> geometry_of(const GramVolumeProblem& p, const void* factor, std::int64_t n) {
  return {p.m, p.D, static_cast<const T*>(factor) + n * p.C * p.m * p.m};
}
template <class T> TriangleGeometry<T> geometry_of(const TriangleAreaProblem& p, const void* factor, std::int64_t n) {
  return {p.D, static_cast<const T*>(factor) + n * p.C * 3};
}

template <class T>
void candidate_basis(const GramVolumeProblem& p, std::int64_t n, T* basis, T* factor, const Parallel& parallel) {
  parallel_for(parallel, 0, p.C, 32, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t j = begin; j < end; ++j) {
      T* q = basis + (n * p.C + j) * p.m * p.D;
      const auto present = [&](int o) {
        return !p.present.data || p.present.data[n * p.present.batch_stride + j * p.present.row_stride + o * p.present.element_stride];
      };
      for (int o = 0; o < p.m; ++o) {
        const BatchedRows& rows = p.others[o];
        if (present(o)) load_row(p.dtype, rows.data, n * rows.batch_stride + j * rows.row_stride, rows.element_stride, p.D, q + o * p.D);
      }
      gram_schmidt(q, p.m, p.D, factor + (n * p.C + j) * p.m * p.m, present);
    }
  });
}

template <class T>
void candidate_basis(const TriangleAreaProblem& p, std::int64_t n, T* basis, T* factor, const Parallel& parallel) {
  parallel_for(parallel, 0, p.C, 32, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t j = begin; j < end; ++j) {
      T *u = basis + (n * p.C + j) * 2 * p.D, *normal = u + p.D, *out = factor + (n * p.C + j) * 3;
      load_row(p.dtype, p.u.data, n * p.u.batch_stride + j * p.u.row_stride, p.u.element_stride, p.D, u);
      load_row(p.dtype, p.v.data, n * p.v.batch_stride + j * p.v.row_stride, p.v.element_stride, p.D, normal);
      for (std::int64_t k = 0; k < p.D; ++k) normal[k] = u[k] - normal[k];
      const T g = std::sqrt(dot(normal, normal, p.D));
      const T inverse = g == 0 ? 0 : 1 / g;   // u = v: the triangle is a segment, n = 0
      for (std::int64_t k = 0; k < p.D; ++k) normal[k] *= inverse;
      out[0] = g;
      out[1] = dot(u, normal, p.D);
      out[2] = dot(u, u, p.D);
    }
  });
}

// Bytes of one lane: Buffers is Operands or BackwardBuffers.
template <template <class> class Buffers, class Problem>
std::int64_t lane_bytes(const Problem& p) {
  return with_real(p.dtype, [&](auto real) {
    using T = decltype(real);
    Arena arena(nullptr);
    Buffers<T>(sizes_of(p), data_of<T>(p), arena);
    return arena.used();
  });
}

template <template <class> class Buffers, class Problem>
std::int64_t workspace(const Problem& p) {
  const std::int64_t bytes = lane_bytes<Buffers>(p);
  return bytes * lanes_of(p.N, work_of(sizes_of(p)), bytes);
}

// f(n, buffers, parallel) for every problem n
template <template <class> class Buffers, class T, class Problem, class F>
void in_lanes(const Problem& p, void* workspace, const Parallel& parallel, const F& f) {
  const Sizes sizes = sizes_of(p);
  const std::int64_t bytes = lane_bytes<Buffers>(p);
  for_each_problem(p.N, lanes_of(p.N, work_of(sizes), bytes), parallel, [&](std::int64_t n, std::int64_t lane, const Parallel& threads) {
    Arena arena(static_cast<char*>(workspace) + lane * bytes);
    f(n, Buffers<T>(sizes, data_of<T>(p), arena), threads);
  });
}

template <class Problem>
void pair_forward(const Problem& p, const PairForward& to, void* workspace, const Parallel& parallel) {
  const Sizes sizes = sizes_of(p);
  with_real(p.dtype, [&](auto real) {
    using T = decltype(real);
    in_lanes<Operands, T>(p, workspace, parallel, [&](std::int64_t n, const Operands<T>& operands, const Parallel& threads) {
      T* basis = static_cast<T*>(to.basis);
      candidate_basis(p, n, basis, static_cast<T*>(to.factor), threads);
      forward(sizes, p.dtype, p.anchor, n, p.squared, basis + n * p.C * sizes.m * p.D, geometry_of<T>(p, to.factor, n), to.value, operands, threads);
    });
  });
}

template <class Problem>
void pair_backward(const Problem& p, const PairBackward& to, void* workspace, const Parallel& parallel) {
  const Sizes sizes = sizes_of(p);
  with_real(p.dtype, [&](auto real) {
    using T = decltype(real);
    in_lanes<BackwardBuffers, T>(p, workspace, parallel, [&](std::int64_t n, const BackwardBuffers<T>& buffers, const Parallel& threads) {
      backward(sizes, p.dtype, p.anchor, n, p.squared, p.eps, static_cast<const T*>(to.basis) + n * p.C * sizes.m * p.D, geometry_of<T>(p, to.factor, n), to, buffers,
               threads);
    });
  });
}

// ---- paired_gram_volume: V = prod L_pp of one small set of vectors, dV = V L^-T Q ------------------------------------------------------------------------

// Loads sample n and factors it; returns the volume (an empty set: 1).
template <class T>
T factor_sample(const PairedGramVolumeProblem& p, std::int64_t n, T* q, T* factor, bool* here) {
  for (int o = 0; o < p.k; ++o) {
    here[o] = !p.present.data || p.present.data[n * p.present.row_stride + o * p.present.element_stride];
    if (here[o]) load_row(p.dtype, p.vectors[o].data, n * p.vectors[o].row_stride, p.vectors[o].element_stride, p.D, q + o * p.D);
  }
  return gram_schmidt(q, p.k, p.D, factor, [&](int o) { return here[o]; });
}

void paired_gram_volume(const PairedGramVolumeProblem& p, void* value, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) {
    using T = decltype(real);
    parallel_for(parallel, 0, p.N, 16, [&](std::int64_t begin, std::int64_t end) {
      Scratch<T> q(p.k * p.D);
      T factor[(kMaxOthers + 1) * (kMaxOthers + 1)];
      bool here[kMaxOthers + 1];
      for (std::int64_t n = begin; n < end; ++n) {
        T volume = factor_sample<T>(p, n, q, factor, here);
        if (p.squared) volume *= volume;
        store_row<T>(p.dtype, value, n, 1, &volume);
      }
    });
  });
}

void paired_gram_volume_bwd(const PairedGramVolumeProblem& p, const void* grad, std::int64_t grad_stride, void* grad_vectors, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) {
    using T = decltype(real);
    parallel_for(parallel, 0, p.N, 16, [&](std::int64_t begin, std::int64_t end) {
      Scratch<T> q(p.k * p.D);
      T factor[(kMaxOthers + 1) * (kMaxOthers + 1)];
      bool here[kMaxOthers + 1];
      for (std::int64_t n = begin; n < end; ++n) {
        const T volume = factor_sample<T>(p, n, q, factor, here);
        T scale = 0;
        load_row<T>(p.dtype, grad, n * grad_stride, 1, 1, &scale);
        scale *= p.squared ? 2 * volume * volume : volume;
        if (volume == 0) {
          for (std::int64_t k = 0; k < p.k * p.D; ++k) q[k] = 0;
        } else {
          solve_transposed<T>(factor, p.k, p.D, q);
          for (int o = 0; o < p.k; ++o)
            for (std::int64_t k = 0; k < p.D; ++k) q[o * p.D + k] = here[o] ? scale * q[o * p.D + k] : 0;
        }
        store_row<T>(p.dtype, grad_vectors, n * p.k * p.D, p.k * p.D, q);
      }
    });
  });
}

}  // namespace

extern const GramVolumeKernels kGramVolumeKernels;
const GramVolumeKernels kGramVolumeKernels = {
    workspace<Operands, GramVolumeProblem>,    pair_forward<GramVolumeProblem>,    workspace<BackwardBuffers, GramVolumeProblem>,    pair_backward<GramVolumeProblem>,
    workspace<Operands, TriangleAreaProblem>,  pair_forward<TriangleAreaProblem>,  workspace<BackwardBuffers, TriangleAreaProblem>,  pair_backward<TriangleAreaProblem>,
    paired_gram_volume,                        paired_gram_volume_bwd,
};

}  // inline namespace
}  // namespace modalign::cpu
