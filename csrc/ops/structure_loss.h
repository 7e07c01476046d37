// What one call of structure_loss asks for: sizes, strides and pointers, and nothing of torch. ops/structure_loss.cpp fills these structs once;
// cpu/structure_loss.cpp and cuda/structure_loss.cuh take them as they are.
//
// B rows x_i of width Dx and y_i of width Dy, already normalised, centred and divided by the root of the temperature, have two softmaxes over the batch,
//
//     P_ij = exp(x_i . x_j - lse^x_i)        Q_ij = exp(y_i . y_j - lse^y_i)        M = (P + Q) / 2        the diagonal included
//
// and every row a divergence of the two. (STRUCTURE, NeurIPS 2025, section 4.)
//
//     js         R_i = sum_j [P log(P / M) + Q log(Q / M)] / 2
//     released   R_i = sum_j M' [log M' - (log P' + log Q') / 2]        with ' for + 1e-12: the divergence that the released code has, the other way round
//
// With F = Q dR/dQ for every pair, and c_i = sum_j F_ij, the gradient with respect to the logits of y and, since these are symmetric, to the rows is
//
//     js   F = Q log(Q / M) / 2        released   F = Q [log M' - (log P' + log Q') / 2 + (1 - P' / Q') / 2] / 2
//     dS_ij = g_i (F_ij - Q_ij c_i)        dy_i = sum_j (dS_ij + dS_ji) y_j
//
// for upstream gradients g; x has the same with P and Q exchanged, for both divergences are symmetric.
#pragma once

#include "ops/gram_volume.h"

namespace modalign {

constexpr double kReleasedEpsilon = 1e-12;

struct StructureProblem {
  Scalar dtype;              // f32 or f64
  std::int64_t B, Dx, Dy;
  BatchedRows x, y;          // batch_stride is not used
  bool released;
};

// How many products a forward leaves for its backward, whole blocks for every instruction set of the CPU; `_fake` in structure_loss.py has the same formula.
inline std::int64_t structure_products_size(std::int64_t B) {
  const std::int64_t padded = (B + 95) / 96 * 96;
  return 2 * padded * padded;
}

struct StructureForward {
  void* loss;                // [B] dtype
  double* statistics;        // [4][B] lse^x, lse^y, c of x, c of y
  void* products;            // structure_products_size(B) of dtype: x_i . x_j, then y_i . y_j; or nullptr
};

struct StructureBackward {
  const void* grad;          // [B] dtype
  std::int64_t grad_stride;
  const double* statistics;
  const void* products;      // or nullptr: they are made again
  void* grad_x;              // [B, Dx] dtype, contiguous; nullptr: not wanted
  void* grad_y;              // [B, Dy]
};

}  // namespace modalign
