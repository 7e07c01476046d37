// What all kernels of the volume family share on the CPU: the two geometries of a pair (ops/gram_volume.h), the candidates' basis, packed operands.
//
// Candidates are taken in groups of 64 bytes (16 floats): the m basis rows of a group are m neighbouring vectors of the packed column operand, so that the square-sum over
// p is vertical and needs no shuffle:   packed column = (group m + p) lanes + lane.
#pragma once

#include <limits>

#include "common/vec.h"
#include "cpu/gram_schmidt.h"
#include "cpu/tile.h"
#include "ops/gram_volume.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {

// The share of |a|^2 below which |a|^2 - |s|^2 is not trusted: its relative error there is about 4 eps / share.
template <class T> constexpr T kNearZero = sizeof(T) == 4 ? T(1e-2) : T(1e-4);
// A recomputed residual this small is rounding: identical, antiparallel and linearly dependent vectors give exactly zero.
// An infinite |a|^2 trusts nothing and is near nothing: an overflow stays visible.
template <class T> inline bool near_zero(T r, T trust) { return r <= kNearZero<T> * trust && trust < std::numeric_limits<T>::infinity(); }
template <class T> constexpr T kRounding = 64 * kEpsilon<T> * kEpsilon<T>;
template <class T> inline bool is_rounding(T r, T reference) { return r <= kRounding<T> * reference && reference < std::numeric_limits<T>::infinity(); }

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

// rows for which takes_part is false become zeros, whatever they hold
template <class T, class Geometry, class TakesPart>
inline void pack_operands(const Sizes& s, Scalar dtype, const BatchedRows& anchor, std::int64_t batch, const T* basis, const Geometry& geometry, const Operands<T>& to,
                          const Parallel& parallel, const TakesPart& takes_part) {
  parallel_for(parallel, 0, (s.B + kRegisterRows - 1) / kRegisterRows, 4, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> rows(kRegisterRows * s.D);
    for (std::int64_t panel = begin; panel < end; ++panel) {
      const std::int64_t first = panel * kRegisterRows;
      const int count = static_cast<int>(minimum(kRegisterRows, s.B - first));
      for (int r = 0; r < count; ++r) {
        T* row = rows + r * s.D;
        if (takes_part(first + r)) load_row(dtype, anchor.data, batch * anchor.batch_stride + (first + r) * anchor.row_stride, anchor.element_stride, s.D, row);
        else for (std::int64_t k = 0; k < s.D; ++k) row[k] = 0;
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
template <class T, class Geometry>
inline void pack_operands(const Sizes& s, Scalar dtype, const BatchedRows& anchor, std::int64_t batch, const T* basis, const Geometry& geometry, const Operands<T>& to,
                          const Parallel& parallel) {
  pack_operands(s, dtype, anchor, batch, basis, geometry, to, parallel, [](std::int64_t) { return true; });
}

// The values of a lane group of pairs, value = scale |e|. Pairs near zero, and one named candidate of the row, are recomputed from their vectors.
template <class T, class Geometry>
struct PairValues {
  const Sizes& sizes;
  const Geometry& geometry;
  const Operands<T>& operands;
  const T* basis;
  bool squared;
  Scratch<T> e, a;
  std::int64_t row = 0;
  bool loaded = false;

  PairValues(const Sizes& sizes, const Geometry& geometry, const Operands<T>& operands, const T* basis, bool squared)
      : sizes(sizes), geometry(geometry), operands(operands), basis(basis), squared(squared), e(sizes.D), a(sizes.D) {}

  void begin_row(std::int64_t i) { row = i, loaded = false; }
  T residual(std::int64_t j) {   // |e|^2 from the vectors
    if (!loaded) unpack_row(operands.row_panels, row, sizes.D, static_cast<T*>(a));
    loaded = true;
    T kappa[kMaxOthers];
    const T reference = geometry.direct(a, operands.row_square[row], basis + j * sizes.m * sizes.D, kappa, e);
    const T r = dot<T>(e, e, sizes.D);
    return is_rounding(r, reference) ? 0 : r;
  }
  T value(T r, T scale) const {
    r = r < 0 ? 0 : r;   // keeps NaN
    return squared ? scale * scale * r : scale * std::sqrt(r);
  }
  T pair(std::int64_t j) { return value(residual(j), operands.column_data[j / kLanes<T> * Geometry::kData * kLanes<T> + j % kLanes<T>]); }

  // s: m lane vectors of coefficients, left as kappa
  void operator()(std::int64_t group, T* s, T* out) {
    constexpr int W = kLanes<T>;
    const T* data = operands.column_data + group * Geometry::kData * W;
    T r[W], trust[W];
    geometry.residual(s, operands.row_square[row], data, r, trust);
    int any = 0;
    for (int l = 0; l < W; ++l) any |= near_zero(r[l], trust[l]);
    if (any)
      for (int l = 0; l < W; ++l)
        if (near_zero(r[l], trust[l]) && group * W + l < sizes.C) r[l] = residual(group * W + l);
    for (int l = 0; l < W; ++l) out[l] = value(r[l], data[l]);
  }
};

// ---- from a problem to its geometry -------------------------------------------------------------------------------------------------------------------

inline Sizes sizes_of(const GramVolumeProblem& p) { return {p.B, p.C, p.D, p.m}; }
inline Sizes sizes_of(const TriangleAreaProblem& p) { return {p.B, p.C, p.D, 2}; }
inline std::int64_t work_of(const Sizes& s) { return s.B * s.C * s.m * s.D; }
template <class T> inline int data_of(const GramVolumeProblem&) { return VolumeGeometry<T>::kData; }
template <class T> inline int data_of(const TriangleAreaProblem&) { return TriangleGeometry<T>::kData; }
template <class T> inline VolumeGeometry<T> geometry_of(const GramVolumeProblem& p, const void* factor, std::int64_t n) {
  return {p.m, p.D, static_cast<const T*>(factor) + n * p.C * p.m * p.m};
}
template <class T> inline TriangleGeometry<T> geometry_of(const TriangleAreaProblem& p, const void* factor, std::int64_t n) {
  return {p.D, static_cast<const T*>(factor) + n * p.C * 3};
}

template <class T>
inline void candidate_basis(const GramVolumeProblem& p, std::int64_t n, T* basis, T* factor, const Parallel& parallel) {
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
inline void candidate_basis(const TriangleAreaProblem& p, std::int64_t n, T* basis, T* factor, const Parallel& parallel) {
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

}  // inline namespace
}  // namespace modalign::cpu
