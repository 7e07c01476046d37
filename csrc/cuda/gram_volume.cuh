/// @file gram_volume.cuh
/// @brief Gramian volume, triangle area (all pairs) and paired volume on CUDA: kernels, launch plans, and the table of compiled instances.
///
/// Maths      ops/gram_volume.h: value_ij = scale_j |e_ij|, e_ij = a_i - sum_p kappa_ijp x_jp, with two geometries for x and kappa. (GRAM, ICLR 2025;
///            TRIANGLE, NeurIPS 2025; the whitened form is ours.)
///
/// Forward    prepare       one warp per candidate: twice-run modified Gram-Schmidt (triangle: base length and direction) -> basis, factor, scale_j,
///                          and for half inputs a copy of the basis rounded to the input dtype; one warp per anchor: |a_i|^2
///            forward       tile product anchors x basis rows; a column tile holds floor(kColumns / m) candidates of m adjacent columns. The
///                          epilogue forms r = |a|^2 - |s|^2. Where r <= theta |a|^2 the subtraction has lost its digits: the lanes of the warp
///                          together recompute that pair from the unrounded vectors, inside the tile.
/// Backward   prepare_bwd   scale_j from factor, |a_i|^2, the operand copies
///   then for each panel of rows (as many as the workspace holds, at most 64 tiles):
///            coefficients  the tile product again; T = w kappa (T[panel rows, C m] in the workspace); sums of w per row and (column walk), of alpha
///                          and S = w kappa kappa^T per candidate and (row tile). Pairs near zero get T = 0, no weight, and a bit in a mask
///                          [panel rows, column tiles, words].
///            row_terms     one warp per row: E_i = (sum_j w_ij) a_i + sum over the row's near pairs of w e, candidates ascending
///            grad_anchor   product: dA_I = E - T X
///            grad_basis    product: G += T^t A_I
///            column_terms  one warp per candidate: adds the row tiles' sums in order, then the column's near pairs (w kappa e to G, alpha), rows
///                          ascending
///   and last grad_others   one warp per candidate: S X is taken off G, then dR_j = L^-T (alpha Q - G), or du, dv
///            A near pair is recomputed by its row and by its column, each the only writer of what it adds to: no atomics, no list, no unbounded
///            memory.
/// Paired     one warp per sample: the same Gram-Schmidt over all k vectors in a workspace [N, k, D]; V = prod L_pp, dV = V L^-T Q.
///
/// Numbers    f32, f64: FmaBackend in the input precision. bf16, f16 forward: one tensor-core product of the rounded operands, fp32 accumulation.
///            Backward products: bf16 rounds T to bf16; f16 splits T, X and A into two bf16 planes (three products), for T falls below the range of
///            f16.
/// FLOPs      forward 2 B C m D; backward 6 B C m D (+ 2 m D times a few for each near pair). Bytes forward: operands once per tile of the other
///            side, B C values written.
/// Memory     workspace: (B + C) reals; half inputs: C m D halves (f16 backward: 2 (B + C m) D bf16 more); backward: the panel and, where the
///            gradient's dtype is not real, G [C m, D] and E [panel rows, D].
/// Order      every sum has one order fixed by the sizes (K ascending, slots ascending, near pairs ascending, warp sums by butterfly): equal bits
///            from run to run.
/// Registers  tiles at most 128 (two blocks of 256 threads per multiprocessor; two-plane products one block), one-warp kernels at most 168.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/tile.cuh"
#include "ops/gram_volume.h"

namespace modalign::cuda {

constexpr int kWarpKernelThreads = 128;
constexpr int kWarpKernelBlocks = 3;   // at most 168 registers
constexpr int kWarpsPerBlock = kWarpKernelThreads / kWarpSize;
constexpr int kStatisticsMax = 1 + kMaxOthers * (kMaxOthers + 1) / 2;   // alpha, then S_pq for p >= q
constexpr std::int64_t kMaxBatches = 65535;                             // grid.z

MODALIGN_HOST_DEVICE constexpr int statistics_count(int m) { return 1 + m * (m + 1) / 2; }

// How each dtype is multiplied.
template <class T> struct Arithmetic;
template <> struct Arithmetic<float> {
  template <Major R, Major C> using Pair = FmaBackend<float, R, C>;
  template <Major R, Major C> using Product = FmaBackend<float, R, C>;
  using Coefficient = float;
  static constexpr int kPlanes = 1;
  static constexpr bool kRounded = false;   // operands of the tile are the unrounded vectors
};
template <> struct Arithmetic<double> {
  template <Major R, Major C> using Pair = FmaBackend<double, R, C>;
  template <Major R, Major C> using Product = FmaBackend<double, R, C>;
  using Coefficient = double;
  static constexpr int kPlanes = 1;
  static constexpr bool kRounded = false;
};
template <> struct Arithmetic<bf16> {
  template <Major R, Major C> using Pair = MmaBackend<bf16, 1, R, C>;
  template <Major R, Major C> using Product = MmaBackend<bf16, 1, R, C>;
  using Coefficient = bf16;
  static constexpr int kPlanes = 1;
  static constexpr bool kRounded = true;
};
template <> struct Arithmetic<f16> {
  template <Major R, Major C> using Pair = MmaBackend<f16, 1, R, C>;
  template <Major R, Major C> using Product = MmaBackend<bf16, 2, R, C>;
  using Coefficient = bf16;
  static constexpr int kPlanes = 2;
  static constexpr bool kRounded = true;
};
template <class T> using PairBackend = typename Arithmetic<T>::template Pair<Major::depth, Major::depth>;
template <class T> using GradAnchorBackend = typename Arithmetic<T>::template Product<Major::depth, Major::line>;
template <class T> using GradBasisBackend = typename Arithmetic<T>::template Product<Major::line, Major::line>;

// The part of x that the first bf16 plane left over.
MODALIGN_DEVICE bf16 low_part(float x) { return from_float<bf16>(x - to_float(from_float<bf16>(x))); }

template <class Real> MODALIGN_HOST_DEVICE constexpr Real machine_epsilon() {
  return sizeof(Real) == 8 ? Real(2.220446049250313e-16) : Real(1.1920928955078125e-07f);
}

// An overflow must stay visible: where |a|^2 is infinite nothing is "near zero".
template <class Real> MODALIGN_HOST_DEVICE constexpr bool is_finite(Real x) { return x - x == 0; }

// ------------------------------------------------------------------------------------------------------------------------- modified Gram-Schmidt
// One row of D reals spread over the lanes of a warp, element d in lane d % 32: in registers where it fits, else in place in global
// memory.
template <class Real> struct RegisterRow {
  static constexpr int kPieces = 128 / int(sizeof(Real));
  static constexpr std::int64_t kLongest = kPieces * kWarpSize;
  Real value[kPieces];

  MODALIGN_DEVICE explicit RegisterRow(Global<Real>) {}
  template <class F> MODALIGN_DEVICE void fill(std::int64_t D, const F& f) {
    each(D, [&](std::int64_t d, Real& v) { v = f(d); });
  }
  template <class F> MODALIGN_DEVICE void each(std::int64_t D, const F& f) {
    MODALIGN_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {
      const int d = piece * kWarpSize + lane();
      if (d < D) f(std::int64_t(d), value[piece]);
    }
  }
};
template <class Real> struct MemoryRow {
  Global<Real> data;

  MODALIGN_DEVICE explicit MemoryRow(Global<Real> row) : data(row) {}
  template <class F> MODALIGN_DEVICE void fill(std::int64_t D, const F& f) {
    for (std::int64_t d = lane(); d < D; d += kWarpSize) data[d] = f(d);
  }
  template <class F> MODALIGN_DEVICE void each(std::int64_t D, const F& f) {
    for (std::int64_t d = lane(); d < D; d += kWarpSize) {
      Real v = data[d];
      f(d, v);
      data[d] = v;
    }
  }
};

// R = L Q over p in order, run twice. load(p, d) is element d of vector p, present(p) whether it counts. Absent: Q_p = 0, L_pp = 1. Dependent (its
// rest is at most 16 eps of its length): Q_p = 0, L_pp = 0. A NaN or Inf is neither: it reaches L_pp. Returns prod L_pp. Each lane touches only its
// own elements of Q; L is written by lane 0.
template <class Row, class Real, class Load, class Present>
MODALIGN_DEVICE Real gram_schmidt(int m, std::int64_t D, const Load& load, const Present& present, Global<Real> basis, Global<Real> factor) {
  Real volume = 1;
  for (int p = 0; p < m; ++p) {
    const Global<Real> q = basis.at(p * D);
    if (lane() == 0)
      for (int o = 0; o < m; ++o) factor[p * m + o] = 0;
    if (!present(p)) {
      for (std::int64_t d = lane(); d < D; d += kWarpSize) q[d] = 0;
      if (lane() == 0) factor[p * m + p] = 1;
      continue;
    }
    Row row(q);
    row.fill(D, [&](std::int64_t d) { return load(p, d); });
    Real square = 0;
    row.each(D, [&](std::int64_t, Real& v) { square = fused_multiply_add(v, v, square); });
    const Real length = square_root(warp_sum(square));
    for (int pass = 0; pass < (MODALIGN_MUTATION("gram-schmidt: one pass only") ? 1 : 2); ++pass)
      for (int o = 0; o < p; ++o) {
        const Global<const Real> earlier = basis.at(o * D);
        Real along = 0;
        row.each(D, [&](std::int64_t d, Real& v) { along = fused_multiply_add(v, Real(earlier[d]), along); });
        along = warp_sum(along);
        row.each(D, [&](std::int64_t d, Real& v) { v = fused_multiply_add(-along, Real(earlier[d]), v); });
        if (lane() == 0) factor[p * m + o] += along;
      }
    square = 0;
    row.each(D, [&](std::int64_t, Real& v) { square = fused_multiply_add(v, v, square); });
    const Real rest = square_root(warp_sum(square));
    const bool dependent = rest <= 16 * machine_epsilon<Real>() * length && length - length == 0;
    const Real inverse = dependent ? Real(0) : 1 / rest;
    row.each(D, [&](std::int64_t d, Real& v) {
      v = dependent ? Real(0) : v * inverse;
      q[d] = v;
    });
    if (lane() == 0) factor[p * m + p] = dependent ? Real(0) : rest;
    volume *= dependent ? Real(0) : rest;
  }
  return volume;
}

template <class Real, class Load, class Present>
MODALIGN_DEVICE Real orthonormal_rows(int m, std::int64_t D, const Load& load, const Present& present, Global<Real> basis, Global<Real> factor) {
  return D <= RegisterRow<Real>::kLongest ? gram_schmidt<RegisterRow<Real>>(m, D, load, present, basis, factor)
                                          : gram_schmidt<MemoryRow<Real>>(m, D, load, present, basis, factor);
}

// -------------------------------------------------------------------------------------------------------------------------------- the two geometries
template <class Real> struct ColumnData {
  Real scale, along, square;   // triangle: g / 2, u.n, |u|^2
};

struct VolumeGeometry {
  static constexpr bool kTriangle = false;
  static constexpr const char* kName = "gram_volume";
  static MODALIGN_HOST_DEVICE std::int64_t factor_size(int m) { return std::int64_t(m) * m; }

  // s -> kappa in place; the residual r and the square that its rounding is measured against
  template <class Real> static MODALIGN_DEVICE Real residual(Real (&s)[kMaxOthers], int m, Real row_square, const ColumnData<Real>&, Real& trust) {
    Real sum = 0;
    MODALIGN_UNROLL
    for (int p = 0; p < kMaxOthers; ++p)
      if (p < m) sum = fused_multiply_add(s[p], s[p], sum);
    trust = row_square;
    return row_square - sum;
  }
};

struct TriangleGeometry {
  static constexpr bool kTriangle = true;
  static constexpr const char* kName = "triangle_area";
  static MODALIGN_HOST_DEVICE std::int64_t factor_size(int) { return 3; }

  template <class Real>
  static MODALIGN_DEVICE Real residual(Real (&s)[kMaxOthers], int, Real row_square, const ColumnData<Real>& column, Real& trust) {
    const Real t = s[1] - column.along;
    trust = row_square + column.square;
    const Real r = trust - 2 * s[0] - t * t;
    s[0] = 1;
    s[1] = t;
    return r;
  }
};

// What epilogues and row and column kernels know about the pairs of a batch of problems; rows are those of the present panel.
template <class Geometry, class T> struct PairView {
  using Real = real_of<T>;
  const T* anchor;
  std::int64_t anchor_batch_stride, anchor_row_stride, anchor_element_stride;
  const Real* row_square;   // [batch, rows], batches row_square_stride apart
  std::int64_t row_square_stride;
  const Real* scale;    // [batch, C]
  const Real* factor;   // [batch, C, ...]
  const Real* basis;    // [batch, C, m, D]
  std::int64_t C, D;
  int m;
  int lanes;   // threads along the candidates of a tile: a multiple of the warp
  bool squared;
  Real near, rounding, root_eps;   // theta; (8 eps)^2; sqrt(eps)

  MODALIGN_DEVICE Global<const T> anchor_row(std::int64_t batch, std::int64_t i) const {
    return Global<const T>(anchor).at(batch * anchor_batch_stride + i * anchor_row_stride);
  }
  MODALIGN_DEVICE Global<const Real> basis_rows(std::int64_t batch, std::int64_t j) const {
    return Global<const Real>(basis).at((batch * C + j) * m * D);
  }
  MODALIGN_DEVICE Real square_of_row(std::int64_t batch, std::int64_t i) const {
    return Global<const Real>(row_square)[batch * row_square_stride + i];
  }
  MODALIGN_DEVICE ColumnData<Real> column(std::int64_t batch, std::int64_t j) const {
    ColumnData<Real> data{Global<const Real>(scale)[batch * C + j], 0, 0};
    if constexpr (Geometry::kTriangle) {
      data.along = Global<const Real>(factor)[(batch * C + j) * 3 + 1];
      data.square = Global<const Real>(factor)[(batch * C + j) * 3 + 2];
    }
    return data;
  }
};

// A pair recomputed from its vectors by the lanes of a warp together: e = a - sum kappa x, projected a second time. e is never stored; element(d)
// makes it again.
template <class Geometry, class T> struct DirectPair {
  using Real = real_of<T>;
  Global<const T> a;
  Global<const Real> x;
  std::int64_t stride, D;
  int m;
  Real first[kMaxOthers], second[kMaxOthers];   // coefficients of the two projections
  Real square, reference;                       // |e|^2 and what its rounding is measured against

  template <int Passes> MODALIGN_DEVICE Real element(std::int64_t d, Real (&row)[kMaxOthers]) const {
    Real e = widen(T(a[d * stride]));
    if constexpr (Geometry::kTriangle) {
      e -= x[d];
      row[1] = x[D + d];
      if constexpr (Passes > 0) e = fused_multiply_add(-first[1], row[1], e);
      if constexpr (Passes > 1) e = fused_multiply_add(-second[1], row[1], e);
    } else {
      MODALIGN_UNROLL
      for (int p = 0; p < kMaxOthers; ++p)
        if (p < m) row[p] = x[p * D + d];
      if constexpr (Passes > 0) {
        MODALIGN_UNROLL
        for (int p = 0; p < kMaxOthers; ++p)
          if (p < m) e = fused_multiply_add(-first[p], row[p], e);
      }
      if constexpr (Passes > 1) {
        MODALIGN_UNROLL
        for (int p = 0; p < kMaxOthers; ++p)
          if (p < m) e = fused_multiply_add(-second[p], row[p], e);
      }
    }
    return e;
  }
  MODALIGN_DEVICE Real operator()(std::int64_t d) const {
    Real row[kMaxOthers];
    return element<2>(d, row);
  }
  MODALIGN_DEVICE Real kappa(int p) const { return Geometry::kTriangle && p == 0 ? Real(1) : first[p] + second[p]; }

  MODALIGN_DEVICE DirectPair(const PairView<Geometry, T>& view, std::int64_t batch, std::int64_t i, std::int64_t j)
      : a(view.anchor_row(batch, i)), x(view.basis_rows(batch, j)), stride(view.anchor_element_stride), D(view.D), m(view.m) {
    constexpr int kFirst = Geometry::kTriangle ? 1 : 0;
    Real row[kMaxOthers];
    MODALIGN_UNROLL
    for (int p = 0; p < kMaxOthers; ++p) first[p] = second[p] = 0;
    Real start = 0;
    for (std::int64_t d = lane(); d < D; d += kWarpSize) {
      const Real e = element<0>(d, row);
      start = fused_multiply_add(e, e, start);
      MODALIGN_UNROLL
      for (int p = kFirst; p < kMaxOthers; ++p)
        if (p < m) first[p] = fused_multiply_add(e, row[p], first[p]);
    }
    MODALIGN_UNROLL
    for (int p = kFirst; p < kMaxOthers; ++p)
      if (p < m) first[p] = warp_sum(first[p]);
    for (std::int64_t d = lane(); d < D; d += kWarpSize) {
      const Real e = element<1>(d, row);
      MODALIGN_UNROLL
      for (int p = kFirst; p < kMaxOthers; ++p)
        if (p < m) second[p] = fused_multiply_add(e, row[p], second[p]);
    }
    MODALIGN_UNROLL
    for (int p = kFirst; p < kMaxOthers; ++p)
      if (p < m) second[p] = warp_sum(second[p]);
    Real sum = 0;
    for (std::int64_t d = lane(); d < D; d += kWarpSize) {
      const Real e = element<2>(d, row);
      sum = fused_multiply_add(e, e, sum);
    }
    square = warp_sum(sum);
    reference = warp_sum(start);
    if (square <= view.rounding * reference && is_finite(reference)) square = 0;   // false for NaN
  }
};

// The m numbers of a candidate in a tile, `at` a multiple of m. Even m moves in pieces of two or four, or the lanes of a warp, m apart, would meet in
// the same banks.
template <class Real> MODALIGN_DEVICE void load_candidate(Real (&s)[kMaxOthers], Shared<Real> tile, int at, int m) {
  if constexpr (sizeof(Real) == 4) {
    if (m == 4) {
      const Pack<Real, 4> pack = load_pack<4>(tile, at);
      MODALIGN_UNROLL
      for (int p = 0; p < 4; ++p) s[p] = pack[p];
      return;
    }
  }
  if (m % 2 == 0) {
    MODALIGN_UNROLL
    for (int p = 0; p + 1 < kMaxOthers; p += 2)
      if (p < m) {
        const Pack<Real, 2> pack = load_pack<2>(tile, at + p);
        s[p] = pack[0];
        s[p + 1] = pack[1];
      }
  } else {
    MODALIGN_UNROLL
    for (int p = 0; p < kMaxOthers; ++p)
      if (p < m) s[p] = tile[at + p];
  }
}
template <class Real> MODALIGN_DEVICE void store_candidate(const Real (&s)[kMaxOthers], Shared<Real> tile, int at, int m) {
  if (m % 2 == 0) {
    MODALIGN_UNROLL
    for (int p = 0; p + 1 < kMaxOthers; p += 2)
      if (p < m) {
        Pack<Real, 2> pack;
        pack[0] = s[p];
        pack[1] = s[p + 1];
        store_pack(tile, at + p, pack);
      }
  } else {
    MODALIGN_UNROLL
    for (int p = 0; p < kMaxOthers; ++p)
      if (p < m) tile[at + p] = s[p];
  }
}

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

// ------------------------------------------------------------------------------------------------------------------------------------------- prepare
MODALIGN_DEVICE std::int64_t warp_item() { return std::int64_t(block_index_x()) * kWarpsPerBlock + warp(); }

inline LaunchPlan plan_warps(std::int64_t items, std::int64_t batches, const char* key) {
  LaunchPlan plan;
  plan.grid[0] = unsigned(ceil_divide<std::int64_t>(items, kWarpsPerBlock));
  plan.grid[2] = unsigned(batches);
  plan.threads = kWarpKernelThreads;
  plan.key = key;
  return plan;
}

template <class Geometry, class T> struct PrepareForward {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  std::int64_t B, C, D;
  int m;
  BatchedRows anchor, others[kMaxOthers];   // triangle: u, v
  PresenceMask present;
  Real* basis;   // [batch, C, m, D]
  Real* factor;
  Real* scale;        // [batch, C]
  Real* row_square;   // [batch, B]
  T* operand;         // half dtypes: [batch, C, m, operand_pitch], the basis rounded
  std::int64_t operand_pitch;

  LaunchPlan plan(std::int64_t batches, const char* key) const { return plan_warps(C + B, batches, key); }

  MODALIGN_DEVICE Global<const T> rows_of(const BatchedRows& rows, std::int64_t batch, std::int64_t i) const {
    return Global<const T>(static_cast<const T*>(rows.data)).at(batch * rows.batch_stride + i * rows.row_stride);
  }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t item = warp_item(), batch = block_index_z();
    if (item >= (MODALIGN_MUTATION("prepare: one item too many") ? C + B + 1 : C + B)) return;
    if (item >= C) {
      const std::int64_t i = item - C;
      const Global<const T> a = rows_of(anchor, batch, i);
      Real square = 0;
      for (std::int64_t d = lane(); d < D; d += kWarpSize) {
        const Real x = widen(T(a[d * anchor.element_stride]));
        square = fused_multiply_add(x, x, square);
      }
      square = warp_sum(square);
      if (lane() == 0) global(row_square)[batch * B + i] = square;
      return;
    }
    const std::int64_t j = item, column = batch * C + j;
    const Global<Real> q = Global<Real>(basis).at(column * m * D), f = Global<Real>(factor).at(column * Geometry::factor_size(m));
    Real size;
    if constexpr (Geometry::kTriangle) {
      const Global<const T> u = rows_of(others[0], batch, j), v = rows_of(others[1], batch, j);
      Real square = 0, length = 0;
      for (std::int64_t d = lane(); d < D; d += kWarpSize) {
        const Real x = widen(T(u[d * others[0].element_stride])), base = x - widen(T(v[d * others[1].element_stride]));
        q[d] = x;
        q[D + d] = base;
        square = fused_multiply_add(x, x, square);
        length = fused_multiply_add(base, base, length);
      }
      square = warp_sum(square);
      const Real g = square_root(warp_sum(length));
      Real along = 0;
      for (std::int64_t d = lane(); d < D; d += kWarpSize) {
        const Real x = q[d], base = q[D + d], n = g == 0 ? Real(0) : base / g;
        q[D + d] = n;
        along = fused_multiply_add(x, n, along);
      }
      along = warp_sum(along);
      if (lane() == 0) {
        f[0] = g;
        f[1] = along;
        f[2] = square;
      }
      size = g / 2;
    } else {
      const auto here = [&](int p) {
        return present.data == nullptr ||
               bool(Global<const bool>(present.data)[batch * present.batch_stride + j * present.row_stride + p * present.element_stride]);
      };
      size = orthonormal_rows<Real>(
          m, D, [&](int p, std::int64_t d) { return widen(T(rows_of(others[p], batch, j)[d * others[p].element_stride])); }, here, q, f);
      if (m + 1 > D) {   // more vectors than dimensions: 0, whatever rounding says
        int count = 1;
        for (int p = 0; p < m; ++p) count += here(p);
        if (count > D) size *= 0;
      }
    }
    if (lane() == 0) global(scale)[column] = size;
    if constexpr (Arithmetic<T>::kRounded) {
      const Global<T> rounded = Global<T>(operand).at(column * m * operand_pitch);
      for (int p = 0; p < m; ++p)
        for (std::int64_t d = lane(); d < D; d += kWarpSize) rounded[p * operand_pitch + d] = narrow<T>(q[p * D + d]);
    }
  }
};

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

// ------------------------------------------------------------------------------------------------------------------------------------------- forward
// Threads along the candidates of a column tile, in whole warps so that the lanes of a warp share a row.
template <class Backend> inline int candidate_lanes(int m) {
  const int candidates = Backend::kColumns / m;
  return candidates > 64 ? 128 : candidates > 32 ? 64 : 32;
}

template <class Geometry, class T> struct PairForwardEpilogue {
  using Backend = PairBackend<T>;
  using Real = real_of<T>;
  static constexpr int kSharedBytes = Backend::kRows * int(sizeof(Real));
  static constexpr int kMinBlocks = 2;
  struct State {};
  PairView<Geometry, T> view;
  T* value;   // [batch, rows, C]
  std::int64_t rows;

  MODALIGN_DEVICE void begin(State&, const TileRange& range, std::int64_t batch, const WalkPosition&, int shared_offset) const {
    const Shared<Real> squares = shared<Real>(shared_offset, Backend::kRows);
    for (int row = thread_index(); row < range.rows; row += kTileThreads) squares[row] = view.square_of_row(batch, range.row_begin + row);
  }
  MODALIGN_DEVICE void end(State&, const TileRange&, std::int64_t, const WalkPosition&, int) const {}

  MODALIGN_DEVICE void consume(State&, Shared<Real> tile, const TileRange& range, std::int64_t batch, const WalkPosition&, int shared_offset) const {
    const Shared<Real> squares = shared<Real>(shared_offset, Backend::kRows);
    const int m = view.m, slot = thread_index() % view.lanes, row_step = kTileThreads / view.lanes;
    const int candidates = range.columns / m;
    const std::int64_t first = range.column_begin / m, j = first + slot;
    const bool exists = slot < candidates;
    const ColumnData<Real> column = exists ? view.column(batch, j) : ColumnData<Real>{0, 0, 0};
    const Global<T> target = Global<T>(value).at((batch * rows + range.row_begin) * view.C + j);
    for (int row = thread_index() / view.lanes; row < range.rows; row += row_step) {
      Real s[kMaxOthers], r = 0, trust = 0;
      if (exists) {
        load_candidate(s, tile, row * Backend::kPitch + slot * m, m);
        r = Geometry::residual(s, m, Real(squares[row]), column, trust);
      }
      const bool near = exists && trust > 0 && is_finite(trust) && column.scale != 0 && r <= view.near * trust;
      std::uint32_t pending = warp_ballot(near);
      for (int other = 0; pending != 0; ++other, pending >>= 1) {
        if ((pending & 1) == 0) continue;
        const DirectPair<Geometry, T> pair(view, batch, range.row_begin + row,
                                           j - lane() + (MODALIGN_MUTATION("forward: the neighbour's pair") ? other ^ 1 : other));
        if (lane() == other) r = pair.square;
      }
      if (exists) {
        const Real height = r < 0 ? Real(0) : r;   // keeps NaN
        target[row * view.C] = narrow<T>(view.squared ? column.scale * column.scale * height : column.scale * square_root(height));
      }
    }
  }
};

template <class Geometry, class T> using PairForwardKernel = TileWalk<PairBackend<T>, PairForwardEpilogue<Geometry, T>>;

// ------------------------------------------------------------------------------------------------------------------------------------------ backward
template <class T> struct Upstream {
  const T* data;
  std::int64_t batch_stride, row_stride, column_stride;
  MODALIGN_DEVICE real_of<T> at(std::int64_t batch, std::int64_t i, std::int64_t j) const {
    return widen(T(Global<const T>(data)[batch * batch_stride + i * row_stride + j * column_stride]));
  }
};

// Which pairs of a panel are near zero: a bit per pair, and a word per tile that says whether there is any.
struct NearPairs {
  std::uint32_t* bits;   // [batch, panel rows, column tiles, words]: bit b of word w of tile t is candidate t * candidates_per_tile + 32 w + b
  std::uint32_t* any;    // [batch, row tiles, column tiles]
  std::int64_t rows, row_tiles, column_tiles;
  int words, rows_per_tile, candidates_per_tile;
};

template <class Geometry, class T> struct CoefficientEpilogue {
  using Backend = PairBackend<T>;
  using Real = real_of<T>;
  using Coefficient = typename Arithmetic<T>::Coefficient;
  static constexpr int kWords = Backend::kColumns / kWarpSize;
  static constexpr int kRowBytes = Backend::kRows * int(sizeof(Real));
  static constexpr int kSharedBytes = (1 + kWords) * kRowBytes + kTileWarps * 4;
  static constexpr int kMinBlocks = 2;
  struct State {};
  PairView<Geometry, T> view;
  Upstream<T> grad;
  Coefficient* coefficients;   // T [plane][batch, panel rows, pitch]
  std::int64_t pitch, plane_stride, rows;
  Real* row_slots;   // sums of w [batch, column walk, panel rows], or nullptr
  std::int64_t column_walks;
  Real* column_slots;   // alpha and S [batch, row tile, C, statistics], or nullptr
  std::int64_t row_tiles;
  NearPairs near_pairs;

  MODALIGN_DEVICE void begin(State&, const TileRange& range, std::int64_t batch, const WalkPosition&, int shared_offset) const {
    const Shared<Real> squares = shared<Real>(shared_offset, Backend::kRows);
    const Shared<Real> sums = shared<Real>(shared_offset + kRowBytes, kWords * Backend::kRows);
    for (int row = thread_index(); row < range.rows; row += kTileThreads) squares[row] = view.square_of_row(batch, range.row_begin + row);
    for (int i = thread_index(); i < kWords * Backend::kRows; i += kTileThreads) sums[i] = 0;
  }

  MODALIGN_DEVICE void consume(State&, Shared<Real> tile, const TileRange& range, std::int64_t batch, const WalkPosition&, int shared_offset) const {
    const Shared<Real> squares = shared<Real>(shared_offset, Backend::kRows);
    const Shared<Real> sums = shared<Real>(shared_offset + kRowBytes, kWords * Backend::kRows);
    const Shared<std::uint32_t> warps_any = shared<std::uint32_t>(shared_offset + (1 + kWords) * kRowBytes, kTileWarps);
    const int m = view.m, slot = thread_index() % view.lanes, phase = thread_index() / view.lanes, phases = kTileThreads / view.lanes;
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
    for (int row = phase; row < range.rows; row += phases) {
      Real s[kMaxOthers], w = 0;
      bool near = false;
      if (exists) {
        load_candidate(s, tile, row * Backend::kPitch + slot * m, m);
        Real trust;
        const Real r = Geometry::residual(s, m, Real(squares[row]), column, trust);
        near = trust > 0 && is_finite(trust) && column.scale != 0 && r <= view.near * trust;
        if (!near) {
          const PairWeight<Real> pair = pair_weight(view.squared, grad.at(batch, range.row_begin + row, j), column.scale, r, Real(0));
          w = pair.weight;
          statistics[0] += pair.alpha;
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
    if (!MODALIGN_MUTATION("coefficients: drop the barrier before the tile is copied out")) barrier();
    if (thread_index() == 0) {
      std::uint32_t all = 0;
      for (int w = 0; w < kTileWarps; ++w) all |= warps_any[w];
      global(near_pairs.any)[(batch * near_pairs.row_tiles + range.row_tile) * near_pairs.column_tiles + range.column_tile] = all;
    }
    const Global<Coefficient> target = Global<Coefficient>(coefficients).at((batch * rows + range.row_begin) * pitch + range.column_begin);
    const int column_index = thread_index() % Backend::kColumns;
    if (column_index < range.columns)
      for (int row = thread_index() / Backend::kColumns; row < range.rows; row += kTileThreads / Backend::kColumns) {
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
      for (int item = thread_index(); item < candidates * count; item += kTileThreads) {
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
      for (int row = thread_index(); row < range.rows; row += kTileThreads) {
        Real sum = 0;
        for (int word = 0; word < kWords; ++word) sum += sums[word * Backend::kRows + row];
        out[row] = sum;
      }
    }
    barrier();   // before the next row tile begins
  }
};

template <class Geometry, class T> using CoefficientKernel = TileWalk<PairBackend<T>, CoefficientEpilogue<Geometry, T>>;
template <class T> using GradAnchorKernel = TileWalk<GradAnchorBackend<T>, StoreTile<GradAnchorBackend<T>, T>>;
template <class T> using GradBasisKernel = TileWalk<GradBasisBackend<T>, StoreTile<GradBasisBackend<T>, real_of<T>>>;

// E_i = (sum_j w_ij) a_i + sum over near pairs of w e: one warp per row of the panel.
template <class Geometry, class T> struct RowTerms {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  PairView<Geometry, T> view;
  Upstream<T> grad;
  NearPairs near_pairs;
  const Real* row_slots;   // [batch, slot, panel rows]
  std::int64_t slots;
  Real* addend;   // E [batch, panel rows, D]
  std::int64_t addend_batch_stride, addend_row_stride;

  LaunchPlan plan(std::int64_t batches, const char* key) const { return plan_warps(near_pairs.rows, batches, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t i = warp_item(), batch = block_index_z();
    if (i >= (MODALIGN_MUTATION("row terms: one row too many") ? near_pairs.rows + 1 : near_pairs.rows)) return;
    Real weights = 0;
    for (std::int64_t slot = 0; slot < slots; ++slot) weights += Global<const Real>(row_slots)[(batch * slots + slot) * near_pairs.rows + i];
    const Global<const T> a = view.anchor_row(batch, i);
    const Global<Real> e = Global<Real>(addend).at(batch * addend_batch_stride + i * addend_row_stride);
    // without candidates the gradient is zero, also of a NaN anchor
    for (std::int64_t d = lane(); d < view.D; d += kWarpSize) e[d] = slots > 0 ? weights * widen(T(a[d * view.anchor_element_stride])) : Real(0);
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
            const PairWeight<Real> w = pair_weight(view.squared, grad.at(batch, i, j), view.column(batch, j).scale, pair.square,
                                                   view.root_eps * square_root(pair.reference));
            for (std::int64_t d = lane(); d < view.D; d += kWarpSize) e[d] += w.weight * pair(d);
          }
        }
      }
    }
  }
};

// One warp per candidate: the panel's sums of alpha and S in row-tile order, then the column's near pairs in row order.
template <class Geometry, class T> struct ColumnTerms {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  PairView<Geometry, T> view;
  Upstream<T> grad;
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
          const PairWeight<Real> w = pair_weight(view.squared, grad.at(batch, i, j), scale, pair.square, view.root_eps * square_root(pair.reference));
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

// -------------------------------------------------------------------------------------------------------------------------------------------- paired
template <class T> struct PairedForward {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  std::int64_t N, D;
  int k;
  bool squared;
  BatchedRows vectors[kMaxOthers + 1];
  PresenceMask present;
  Real* basis;    // [N, k, D]
  Real* factor;   // [N, k, k]
  T* value;       // [N]

  LaunchPlan plan(std::int64_t batches, const char* key) const { return plan_warps(N, batches, key); }

  MODALIGN_DEVICE bool here(std::int64_t n, int p) const {
    return present.data == nullptr || bool(Global<const bool>(present.data)[n * present.row_stride + p * present.element_stride]);
  }
  MODALIGN_DEVICE Real volume(std::int64_t n) const {
    return orthonormal_rows<Real>(
        k, D,
        [&](int p, std::int64_t d) {
          return widen(T(Global<const T>(static_cast<const T*>(vectors[p].data))[n * vectors[p].row_stride + d * vectors[p].element_stride]));
        },
        [&](int p) { return here(n, p); }, Global<Real>(basis).at(n * k * D), Global<Real>(factor).at(n * k * k));
  }
  MODALIGN_DEVICE void operator()() const {
    const std::int64_t n = warp_item();
    if (n >= (MODALIGN_MUTATION("paired: one sample too many") ? N + 1 : N)) return;
    const Real v = volume(n);
    if (lane() == 0) global(value)[n] = narrow<T>(squared ? v * v : v);
  }
};

template <class T> struct PairedBackward {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  PairedForward<T> forward;
  const T* grad;
  std::int64_t grad_stride;
  T* out;   // [N, k, D]

  LaunchPlan plan(std::int64_t batches, const char* key) const { return plan_warps(forward.N, batches, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t n = warp_item(), D = forward.D;
    const int k = forward.k;
    if (n >= forward.N) return;
    const Real v = forward.volume(n);
    const Global<T> target = Global<T>(out).at(n * k * D);
    if (v == 0) {
      for (std::int64_t d = lane(); d < k * D; d += kWarpSize) target[d] = narrow<T>(Real(0));
      return;
    }
    if (!MODALIGN_MUTATION("paired: drop the barrier behind the factor")) warp_barrier();   // lane 0 wrote the factor
    const Real upstream = widen(T(Global<const T>(grad)[n * grad_stride])), share = upstream * (forward.squared ? 2 * v * v : v);
    const Global<const Real> q = Global<const Real>(forward.basis).at(n * k * D), f = Global<const Real>(forward.factor).at(n * k * k);
    std::uint32_t present = 0;
    for (int p = 0; p < k; ++p) present |= std::uint32_t(forward.here(n, p)) << p;
    for (std::int64_t d = lane(); d < D; d += kWarpSize) {
      Real y[kMaxOthers + 1];
      MODALIGN_UNROLL
      for (int p = kMaxOthers; p >= 0; --p)
        if (p < k) {
          Real z = q[p * D + d];
          MODALIGN_UNROLL
          for (int o = p + 1; o <= kMaxOthers; ++o)
            if (o < k) z = fused_multiply_add(-Real(f[o * k + p]), y[o], z);
          y[p] = z / f[p * k + p];
          target[p * D + d] = narrow<T>(present >> p & 1 ? share * y[p] : Real(0));
        }
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------------- the compiled instances
// X(key, kernel type ...): the one table behind the .cu file, the emulator's catalogue and the tests.
#define MODALIGN_PAIR_KERNELS(X, name, Geometry, dtype, T)       \
  X(name ".prepare." dtype, PrepareForward<Geometry, T>)         \
  X(name ".forward." dtype, PairForwardKernel<Geometry, T>)      \
  X(name ".prepare_bwd." dtype, PrepareBackward<Geometry, T>)    \
  X(name ".coefficients." dtype, CoefficientKernel<Geometry, T>) \
  X(name ".row_terms." dtype, RowTerms<Geometry, T>)             \
  X(name ".column_terms." dtype, ColumnTerms<Geometry, T>)       \
  X(name ".grad_others." dtype, GradOthers<Geometry, T>)
#define MODALIGN_VOLUME_KERNELS_OF(X, dtype, T)                         \
  MODALIGN_PAIR_KERNELS(X, "gram_volume", VolumeGeometry, dtype, T)     \
  MODALIGN_PAIR_KERNELS(X, "triangle_area", TriangleGeometry, dtype, T) \
  X("pair_product.grad_anchor." dtype, GradAnchorKernel<T>)             \
  X("pair_product.grad_basis." dtype, GradBasisKernel<T>)               \
  X("paired_gram_volume.forward." dtype, PairedForward<T>)              \
  X("paired_gram_volume.backward." dtype, PairedBackward<T>)
#define MODALIGN_VOLUME_KERNELS(X)             \
  MODALIGN_VOLUME_KERNELS_OF(X, "f32", float)  \
  MODALIGN_VOLUME_KERNELS_OF(X, "f64", double) \
  MODALIGN_VOLUME_KERNELS_OF(X, "f16", f16)    \
  MODALIGN_VOLUME_KERNELS_OF(X, "bf16", bf16)

template <class Kernel> struct KernelKey;   // an instance outside the table does not compile
#define MODALIGN_KEY_OF(key, ...)             \
  template <> struct KernelKey<__VA_ARGS__> { \
    static constexpr const char* value = key; \
  };
MODALIGN_VOLUME_KERNELS(MODALIGN_KEY_OF)
#undef MODALIGN_KEY_OF

// ---------------------------------------------------------------------------------------------------------------------------------- launch sequences
// Host code shared by gram_volume.cu and the emulator. An Arena hands out workspace: `template <class U> U* take(const char* name, int64 count)`; a
// Launch is called as launch(kernel, plan) and returns 0 or an error.

// Pieces of one device allocation, 256-byte aligned; with a null base it only counts.
class DeviceArena {
 public:
  explicit DeviceArena(void* base) : base_(static_cast<char*>(base)) {}
  template <class U> U* take(const char*, std::int64_t count) {
    char* at = base_ != nullptr ? base_ + used_ : nullptr;
    used_ += round_up<std::int64_t>(count * std::int64_t(sizeof(U)), 256);
    return reinterpret_cast<U*>(at);
  }
  std::int64_t used() const { return used_; }

 private:
  char* base_;
  std::int64_t used_ = 0;
};

// gram_volume and triangle_area as one.
struct PairProblem {
  Scalar dtype;
  std::int64_t N, B, C, D;
  int m;
  bool squared;
  double eps;
  BatchedRows anchor, others[kMaxOthers];
  PresenceMask present;
};
inline PairProblem pair_problem(const GramVolumeProblem& p) {
  PairProblem problem{p.dtype, p.N, p.B, p.C, p.D, p.m, p.squared, p.eps, p.anchor, {}, p.present};
  for (int o = 0; o < p.m; ++o) problem.others[o] = p.others[o];
  return problem;
}
inline PairProblem pair_problem(const TriangleAreaProblem& p) { return {p.dtype, p.N, p.B, p.C, p.D, 2, p.squared, p.eps, p.anchor, {p.u, p.v}, {}}; }

inline const void* shifted(const void* data, std::int64_t elements, std::int64_t size) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + elements * size;
}
template <class U> inline U* shifted(U* data, std::int64_t elements) { return data == nullptr ? nullptr : data + elements; }

template <class T> inline std::int64_t operand_pitch(std::int64_t D) { return round_up<std::int64_t>(D, 8); }

template <class T> struct ForwardBuffers {
  using Real = real_of<T>;
  Real* scale;
  Real* row_square;
  T* operand = nullptr;
  template <class Arena> ForwardBuffers(const PairProblem& p, Arena& arena) {
    scale = arena.template take<Real>("scale", p.N * p.C);
    row_square = arena.template take<Real>("row_square", p.N * p.B);
    if constexpr (Arithmetic<T>::kRounded) operand = arena.template take<T>("operand", p.N * p.C * p.m * operand_pitch<T>(p.D));
  }
};

template <class Geometry, class T>
inline PairView<Geometry, T> pair_view(const PairProblem& p, const real_of<T>* basis, const real_of<T>* factor, const real_of<T>* scale,
                                       const real_of<T>* row_square) {
  using Real = real_of<T>;
  constexpr Real epsilon = machine_epsilon<Real>();
  PairView<Geometry, T> view{};
  view.anchor = static_cast<const T*>(p.anchor.data);
  view.anchor_batch_stride = p.anchor.batch_stride;
  view.anchor_row_stride = p.anchor.row_stride;
  view.anchor_element_stride = p.anchor.element_stride;
  view.row_square = row_square;
  view.row_square_stride = p.B;
  view.scale = scale;
  view.factor = factor;
  view.basis = basis;
  view.C = p.C;
  view.D = p.D;
  view.m = p.m;
  view.lanes = candidate_lanes<PairBackend<T>>(p.m);
  view.squared = p.squared;
  view.near = sizeof(Real) == 8 ? Real(1e-4) : Arithmetic<T>::kRounded ? Real(2e-2) : Real(1e-2);
  view.rounding = 64 * epsilon * epsilon;
  view.root_eps = Real(std::sqrt(p.eps));
  return view;
}

// The column operand of the tile product: the basis itself, or its rounded copy.
template <class T> inline Operand<T> basis_operand(const PairProblem& p, const real_of<T>* basis, const T* rounded) {
  const std::int64_t pitch = Arithmetic<T>::kRounded ? operand_pitch<T>(p.D) : p.D;
  if constexpr (Arithmetic<T>::kRounded) return make_operand<T>(Major::depth, rounded, p.C * p.m * pitch, pitch, 1);
  else return make_operand<T>(Major::depth, basis, p.C * p.m * pitch, pitch, 1);
}
template <class T> inline Operand<T> anchor_operand(const PairProblem& p) {
  return make_operand<T>(Major::depth, static_cast<const T*>(p.anchor.data), p.anchor.batch_stride, p.anchor.row_stride, p.anchor.element_stride);
}

template <class Launch, class Kernel> inline int launch_kernel(const Launch& launch, const Kernel& kernel, std::int64_t batches) {
  return launch(kernel, kernel.plan(batches, KernelKey<Kernel>::value));   // an empty grid is a success that launches nothing
}

template <class Geometry, class T, class Launch>
int run_pair_forward(const PairProblem& whole, const PairForward& output, const ForwardBuffers<T>& buffers, const Launch& launch) {
  using Real = real_of<T>;
  using Backend = PairBackend<T>;
  for (std::int64_t first = 0; first == 0 || first < whole.N; first += kMaxBatches) {
    PairProblem p = whole;
    p.N = whole.N - first < kMaxBatches ? whole.N - first : kMaxBatches;
    p.anchor.data = shifted(p.anchor.data, first * p.anchor.batch_stride, sizeof(T));
    for (BatchedRows& rows : p.others) rows.data = shifted(rows.data, first * rows.batch_stride, sizeof(T));
    p.present.data = shifted(p.present.data, first * p.present.batch_stride);
    Real* basis = shifted(static_cast<Real*>(output.basis), first * p.C * p.m * p.D);
    Real* factor = shifted(static_cast<Real*>(output.factor), first * p.C * Geometry::factor_size(p.m));
    Real* scale = shifted(buffers.scale, first * p.C);
    Real* row_square = shifted(buffers.row_square, first * p.B);
    T* operand = shifted(buffers.operand, first * p.C * p.m * operand_pitch<T>(p.D));

    PrepareForward<Geometry, T> prepare{
        p.B, p.C, p.D, p.m, p.anchor, {}, p.present, basis, factor, scale, row_square, operand, operand_pitch<T>(p.D)};
    for (int o = 0; o < p.m; ++o) prepare.others[o] = p.others[o];
    if (const int error = launch_kernel(launch, prepare, p.N)) return error;

    PairForwardKernel<Geometry, T> forward{
        anchor_operand<T>(p),
        basis_operand<T>(p, basis, operand),
        make_grid(p.B, p.C * p.m, p.D, Backend::kRows, Backend::kColumns / p.m * p.m),
        {pair_view<Geometry, T>(p, basis, factor, scale, row_square), shifted(static_cast<T*>(output.value), first * p.B * p.C), p.B}};
    if (const int error = launch_kernel(launch, forward, p.N)) return error;
  }
  return 0;
}

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
template <class Geometry, class T> inline BackwardPlan choose_backward(const PairProblem& p, std::int64_t bytes) {
  constexpr std::int64_t kRows = PairBackend<T>::kRows;
  const std::int64_t most_rows = p.B < kMaxSlots * kRows ? p.B : kMaxSlots * kRows;
  const auto fits = [&](std::int64_t batches, std::int64_t rows) { return backward_bytes<Geometry, T>(p, {batches, rows}) <= bytes; };
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

template <class Geometry, class T> inline std::int64_t backward_workspace(const PairProblem& p, std::int64_t panel_bytes) {
  constexpr std::int64_t kRows = PairBackend<T>::kRows;
  const BackwardPlan smallest{1, p.B < kRows ? p.B : kRows};
  const std::int64_t least = backward_bytes<Geometry, T>(p, smallest), without_panel = backward_bytes<Geometry, T>(p, {1, 0});
  const std::int64_t panel = least - without_panel;
  return backward_bytes<Geometry, T>(p, choose_backward<Geometry, T>(p, without_panel + (panel_bytes > panel ? panel_bytes : panel)));
}

template <class Geometry, class T, class Launch>
int run_pair_backward(const PairProblem& whole, const PairBackward& request, const BackwardPlan& plan, const BackwardBuffers<Geometry, T>& buffers,
                      const Launch& launch) {
  using Real = real_of<T>;
  using Backend = PairBackend<T>;
  using Buffers = BackwardBuffers<Geometry, T>;
  using Coefficient = typename Arithmetic<T>::Coefficient;
  const bool need_anchor = request.grad_anchor != nullptr, need_others = request.grad_others != nullptr;
  if (!need_anchor && !need_others) return 0;
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
      const T* upstream = static_cast<const T*>(shifted(request.grad, first * request.grad_batch_stride + row * request.grad_row_stride, sizeof(T)));
      const Upstream<T> grad{upstream, request.grad_batch_stride, request.grad_row_stride, request.grad_column_stride};
      const NearPairs near{buffers.near_bits, buffers.near_any,       panel.B,        grid.row_tiles,
                           grid.column_tiles, view.lanes / kWarpSize, Backend::kRows, Backend::kColumns / p.m};
      const std::int64_t plane_stride = p.N * panel.B * buffers.pitch;

      CoefficientKernel<Geometry, T> coefficients{
          anchor_operand<T>(panel),
          basis_operand<T>(p, basis, buffers.operand),
          grid,
          {view, grad, buffers.coefficients, buffers.pitch, plane_stride, panel.B, need_anchor ? buffers.row_slots : nullptr, grid.column_walks,
           need_others ? buffers.column_slots : nullptr, grid.row_tiles, near}};
      if (const int error = launch_kernel(launch, coefficients, p.N)) return error;

      if (need_anchor) {
        T* target = grad_anchor + row * p.D;
        Real* addend = buffers.addend;
        std::int64_t addend_batch_stride = panel.B * p.D;
        if constexpr (Buffers::kRealGradient) {
          addend = target;
          addend_batch_stride = p.B * p.D;
        }
        RowTerms<Geometry, T> rows{view, grad, near, buffers.row_slots, grid.column_walks, addend, addend_batch_stride, p.D};
        if (const int error = launch_kernel(launch, rows, p.N)) return error;

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

        ColumnTerms<Geometry, T> column_terms{view, grad, near, buffers.column_slots, buffers.totals, gradient, row == 0};
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

template <class T> struct PairedBuffers {
  real_of<T>* basis;
  real_of<T>* factor;
  template <class Arena> PairedBuffers(const PairedGramVolumeProblem& p, Arena& arena) {
    basis = arena.template take<real_of<T>>("basis", p.N * p.k * p.D);
    factor = arena.template take<real_of<T>>("factor", p.N * p.k * p.k);
  }
};

template <class T> inline PairedForward<T> paired_kernel(const PairedGramVolumeProblem& p, void* value, const PairedBuffers<T>& buffers) {
  PairedForward<T> kernel{p.N, p.D, p.k, p.squared, {}, p.present, buffers.basis, buffers.factor, static_cast<T*>(value)};
  for (int o = 0; o < p.k; ++o) kernel.vectors[o] = p.vectors[o];
  return kernel;
}
template <class T, class Launch>
int run_paired_forward(const PairedGramVolumeProblem& p, void* value, const PairedBuffers<T>& buffers, const Launch& launch) {
  return launch_kernel(launch, paired_kernel<T>(p, value, buffers), 1);
}
template <class T, class Launch>
int run_paired_backward(const PairedGramVolumeProblem& p, const void* grad, std::int64_t grad_stride, void* grad_vectors,
                        const PairedBuffers<T>& buffers, const Launch& launch) {
  const PairedBackward<T> kernel{paired_kernel<T>(p, nullptr, buffers), static_cast<const T*>(grad), grad_stride, static_cast<T*>(grad_vectors)};
  return launch_kernel(launch, kernel, 1);
}

}   // namespace modalign::cuda
