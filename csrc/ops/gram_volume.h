// What one call of each volume op asks for: sizes, strides and pointers, and nothing of torch. check_<op> in gram_volume.cpp fills these structs once;
// the CPU kernels (cpu/gram_volume.cpp) and the CUDA kernels (cuda/gram_volume.cuh) both take them as they are.
//
// gram_volume and triangle_area are one family. Both measure the distance of a row vector a_i from a small affine space that belongs to column j:
//
//     e_ij = a_i - sum_p kappa_ijp x_jp,     r_ij = |e_ij|^2,     value_ij = scale_j sqrt(r_ij)          (squared: scale_j^2 r_ij)
//
//                 x_jp                                          kappa_ijp                  scale_j
//     volume      Q_jp, orthonormal rows of R_j = L_j Q_j       s_ijp = a_i . Q_jp         d_j = prod_p |L_jpp|
//     triangle    x_j0 = u_j, x_j1 = n_j = (u_j - v_j)/g_j      1,  t_ij = (a_i - u_j).n_j   g_j / 2,  g_j = |u_j - v_j|
//
// and share the gradient (W = upstream, w_ij = W_ij scale_j / sqrt(r_ij), squared: 2 W_ij scale_j^2):
//
//     dA_i = sum_j w_ij e_ij        G_jp = sum_i w_ij kappa_ijp e_ij        alpha_j = sum_i W_ij value_ij  (squared: twice that)
//     volume:    dR_j = L_j^-T (alpha_j Q_j - G_j)
//     triangle:  du_j = -G_j0 - G_j1/g_j + (alpha_j/g_j) n_j        dv_j = G_j1/g_j - (alpha_j/g_j) n_j
#pragma once

#include <cstdint>

#include "ops/scalar.h"

namespace modalign {

constexpr int kMaxOthers = 7;   // modalities beside the anchor in a kernel (k <= 8); more go through the plain-torch path on every device

// A read-only [N, rows, D] operand with strides in elements; any strides, also 0.
struct BatchedRows {
  const void* data;
  std::int64_t batch_stride, row_stride, element_stride;
};

// A [N, C, m] bool mask with strides in elements; data == nullptr: everything is present.
struct PresenceMask {
  const bool* data;
  std::int64_t batch_stride, row_stride, element_stride;
};

// gram_volume: N independent problems, B anchors against C candidates of m = 1..7 vectors each.
struct GramVolumeProblem {
  Scalar dtype;
  std::int64_t N, B, C, D;
  int m;
  bool squared;
  double eps;                       // the gradient uses max(sqrt(r), sqrt(eps) |a|)
  BatchedRows anchor;               // [N, B, D]
  BatchedRows others[kMaxOthers];   // m of [N, C, D]
  PresenceMask present;             // [N, C, m]
};

// triangle_area: vertices a_i, u_j, v_j.
struct TriangleAreaProblem {
  Scalar dtype;
  std::int64_t N, B, C, D;
  bool squared;
  double eps;
  BatchedRows anchor, u, v;         // [N, B, D], [N, C, D], [N, C, D]
};

// paired_gram_volume: one volume per row of k = 1..8 matrices.
struct PairedGramVolumeProblem {
  Scalar dtype;
  std::int64_t N, D;
  int k;
  bool squared;
  double eps;
  BatchedRows vectors[kMaxOthers + 1];   // k of [1, N, D]: batch_stride is not used
  PresenceMask present;                  // [1, N, k]
};

// Outputs are contiguous. "real" is the accumulation type: float for f32, f16, bf16; double for f64.
// Saved for backward, the same on every device:
//   basis  [N, C, m, D] real   volume: Q (a zero row where absent or dependent);   triangle (m = 2): u, n (n = 0 where u = v)
//   factor volume:   [N, C, m, m] real, L lower triangular; absent p: row and column p of the identity; dependent p: L_pp = 0, so d_j = 0
//          triangle: [N, C, 3]    real: g = |u - v|, u.n, |u|^2
struct PairForward {
  void* value;    // [N, B, C] dtype
  void* basis;    // real
  void* factor;   // real
};

struct PairBackward {
  const void* grad;          // [N, B, C] dtype, strides below (an expanded scalar has strides 0)
  std::int64_t grad_batch_stride, grad_row_stride, grad_column_stride;
  const void* basis;
  const void* factor;
  void* grad_anchor;         // [N, B, D] dtype, or nullptr: not wanted
  void* grad_others;         // [N, C, m, D] dtype (triangle: du, dv), or nullptr
};

}  // namespace modalign
