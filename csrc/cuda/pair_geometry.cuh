/// @file pair_geometry.cuh
/// @brief What all kernels over pairs of the volume family share on CUDA: how each dtype is multiplied, the candidates' basis, the two geometries of
/// a pair, a pair recomputed from its vectors, and the pieces of a launch sequence. The twin of cpu/pair_geometry.h; formulas in ops/gram_volume.h.
///
/// Mapping    one warp per candidate or anchor in `prepare`; in the epilogues of a tile a thread owns one candidate and walks its rows.
/// Order      sums over D: elements d, d + 32, ... of a lane ascending, then a butterfly over the warp: the same bits in every lane.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/launch_sequence.cuh"
#include "cuda/tile.cuh"
#include "ops/gram_volume.h"

namespace modalign::cuda {

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

// A log-sum-exp as two numbers, so that exp(z - lse) = exp((z - high) - low) is as exact near 1 as Real is: z - high has no rounding there.
template <class Real> struct LogSum {
  Real high = 0, low = 0;
  LogSum() = default;
  MODALIGN_DEVICE explicit LogSum(double lse) : high(Real(lse)), low(is_finite(high) ? Real(lse - double(high)) : Real(0)) {}
};

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

// ------------------------------------------------------------------------------------------------------------------------------------------- prepare
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

// Threads along the candidates of a column tile, in whole warps so that the lanes of a warp share a row.
template <class Backend> inline int candidate_lanes(int m) {
  const int candidates = Backend::kColumns / m;
  return candidates > 64 ? 128 : candidates > 32 ? 64 : 32;
}

// ---------------------------------------------------------------------------------------------------------------------------------- launch sequences
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

}   // namespace modalign::cuda
