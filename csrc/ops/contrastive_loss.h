// What one call of a contrastive loss over all pairs asks for: sizes, strides and pointers, and nothing of torch. check_<op> in contrastive_loss.cpp fills these structs
// once; cpu/contrastive_loss.cpp and cuda/contrastive_loss.cuh both take them as they are.
//
// Rows i are anchors, columns j candidates; v_ij is a value per pair and z_ij = scale v_ij + bias its logit:
//
//     form        v_ij                                       scale
//     volume      Gramian volume (ops/gram_volume.h)         -1 / temperature
//     triangle    triangle area                              -1 / temperature
//     product     x_i . y_j                                  logit_scale
//
// Taking part: rows whose target is not kIgnored and columns that have any modality present. Everything below runs over these alone. What an absent column holds is
// not read; form product alone reads it, so there it must be finite.
//     row_lse_i = log sum_j exp z_ij      row_sum_i = sum_j z_ij      column_lse_j, column_sum_j over rows the same way
//     label_i = z_{i, t_i}, always recomputed from the vectors; a row is labelled where its target takes part
//     row_best_i = the candidate with the largest logit of a row, column_best_j = the row with the largest logit of a candidate; ties go to the lowest index
//     with a seed, both are draws instead: j with probability exp(z_ij) / sum, never the row's label; i likewise, never a row whose label is j. The largest z_ij + G_ij
//     draws so, with Gumbel noise from a counter (i, j): the same draws on every device up to rounding of z (GRAM's and ALBEF's hard negatives)
//
// softmax, per labelled row, t = t_i, alpha and beta the parts of the two directions (1/2 and 1/2, or one of them alone):
//     loss_i = alpha [row_lse_i - (1 - lambda) label_i - lambda row_sum_i / columns] + beta [column_lse_t - (1 - lambda) label_i - lambda column_sum_t / rows]
// sigmoid:                    loss_i = sum_j softplus(z_ij) - label_i
// and 0 for rows without a label (sigmoid: without the label term). With row weights g_i = dL/dloss_i and column weights h_j = sum of g_i over the rows whose target is j
//
// softmax:  dL/dz_ij = alpha g_i (exp(z_ij - row_lse_i) - lambda / columns) + beta h_j (exp(z_ij - column_lse_j) - lambda / rows)
//                      - (alpha + beta) (1 - lambda) g_i [j = t_i]
// sigmoid:  dL/dz_ij = g_i (sigmoid(z_ij) - [j = t_i])
// dv = scale dz,  dscale = sum_ij dz_ij (v_ij - center),  dbias = sum_ij dz_ij; from dv on it is the gradient of the pair value. The dz of softmax add up to 0 over the whole
// problem, so any constant may be its center: with the mean over columns of (column_lse - log rows - bias) / scale, what all values have in common (0 for sigmoid and where
// that is not finite), dscale keeps two more digits.
#pragma once

#include "ops/gram_volume.h"

namespace modalign {

constexpr std::int64_t kIgnoredTarget = -100;   // torch's ignore_index: the row takes no part
constexpr std::int64_t kNoTarget = -1;          // the row takes part and has no label

enum class PairForm : std::int8_t { volume, triangle, product };
enum class PairLoss : std::int8_t { softmax, sigmoid };

struct ContrastiveProblem {
  PairForm form;
  PairLoss loss;
  GramVolumeProblem pairs;         // N = 1; form triangle: others = u, v; form product: others = y and m = 1. `squared` is false
  const void* scale;               // 1 real, in the memory of the device
  const void* bias;                // 1 real, or nullptr: 0
  const std::int64_t* target;      // [B], or nullptr: t_i = i
  std::int64_t target_stride;
  double label_smoothing;          // lambda; sigmoid: 0
  double row_part, column_part;    // alpha, beta
  const std::int64_t* seed;        // 1, in the memory of the device, or nullptr; forward alone
};

// How many products a CPU forward leaves for its backward: whole tiles of candidates, the same for every instruction set. `_fake` in _contrastive.py has the same formula.
inline std::int64_t products_size(const GramVolumeProblem& p) {
  const std::int64_t lanes = 64 / accumulation_size(p.dtype), groups = (p.C + lanes - 1) / lanes;
  return p.B * ((groups + 7) / 8 * 8) * p.m * lanes;
}

// Contiguous. "real" is float, or double for f64.
struct ContrastiveForward {
  void* loss;                      // [B] real
  double* row_lse;                 // [B], in double so that backward sees how far a nearly solved row is from its label; -inf where the row takes no part
  double* column_lse;              // [C]
  void* row_sum;                   // [B] real
  void* column_sum;                // [C] real
  void* label;                     // [B] real; 0 where the row has none
  std::int64_t* row_best;          // [B]; -1 where the row has no label, C where all logits are NaN; draws: -1 where there is nothing to draw
  std::int64_t* column_best;       // [C]; -1 where the column is nobody's target, B where all logits are NaN; draws: as rows
  void* classes;                   // [4] real: columns and rows that take part, rows with a label, center
  void* basis;                     // as in PairForward; form product: empty
  void* factor;
  void* products;                  // products_size elements of real: the products of all pairs, for a backward that does not make them again; or nullptr (CUDA: always)
};

struct ContrastiveBackward {
  const void* row_weight;          // g [B] real; softmax: 0 where a row has no label in the whole problem
  const void* column_weight;       // h [C] real
  const double* row_lse;           // of this forward, or of a larger problem that this one is a part of
  const double* column_lse;
  const void* classes;
  const void* basis;
  const void* factor;
  const void* products;            // or nullptr
  void* grad_anchor;               // [B, D] dtype, or nullptr
  void* grad_others;               // [C, m, D] dtype, or nullptr
  void* grad_scale;                // [2] real: dscale, dbias
};

}  // namespace modalign
