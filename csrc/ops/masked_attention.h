// What one call of masked_attention asks for: sizes, strides and pointers, and nothing of torch. ops/masked_attention.cpp fills these structs once.
//
//     x_ij = scale q_i . k_j        z_ij = cap tanh(x_ij / cap) + b_ij        (cap = 0: z = x + b)        for the pairs (i, j) that are kept
//     lse_i = log sum_j exp z_ij    p_ij = exp(z_ij - lse_i)    o_i = sum_j p_ij v_j
//
//     dp_ij = do_i . v_j        ds_ij = p_ij (dp_ij - do_i . o_i + dlse_i)        dx_ij = ds_ij (1 - tanh^2)
//     dv_j = sum_i p_ij do_i        dq_i = scale sum_j dx_ij k_j        dk_j = scale sum_i dx_ij q_i        db = ds, summed over what b is broadcast over
//
// Kept       what causal, key lengths, the mask (ops/attention_mask.h) and a bias above -inf all keep. Nothing of a pair that is not kept reaches a result, NaN neither.
// Empty row  (nothing is kept): o = 0, lse = -inf, and no gradient passes.
// Heads      query head h meets key head h / (H / Hkv).
// Sequences  item b of the batch: Nq queries and Nk keys, or where cu_queries and cu_keys are given rows cu[b] ... cu[b + 1] of one long item.
#pragma once

#include <cstdint>

#include "ops/attention_mask.h"
#include "ops/scalar.h"

namespace modalign {

// A [B, H, N, D] operand, strides in elements; any strides.
struct AttentionRows {
  const void* data;
  std::int64_t batch_stride, head_stride, row_stride, element_stride;
};

// [B, heads, Nq, Nk], broadcast where a stride is 0; heads divides H, and neighbouring query heads share one.
struct AttentionPairs {
  const void* data;   // nullptr: not given
  std::int64_t batch_stride, head_stride, row_stride, column_stride;
  std::int64_t heads;
};

enum class Causal { none, bottom_right, top_left };

struct AttentionProblem {
  Scalar dtype;
  std::int64_t B, H, Hkv, Nq, Nk, D, Dv;   // Nq, Nk: of the longest sequence
  AttentionRows query, key, value;
  MaskProgram mask;
  AttentionPairs bias;                     // of the dtype bias_dtype
  Scalar bias_dtype;
  const std::int64_t* key_lengths;         // [B] or nullptr
  const std::int32_t *cu_queries, *cu_keys;   // [B + 1], both or neither
  Causal causal;
  double scale, cap;
  std::int64_t total_queries, total_keys;  // rows of an item of the tensors: Nq and Nk, or the sums over all sequences

  std::int64_t query_rows() const { return (cu_queries ? 1 : B) * total_queries; }   // of one head, in all items
  std::int64_t key_rows() const { return (cu_keys ? 1 : B) * total_keys; }
};

// Contiguous [B, H, total_queries, ...].
struct AttentionForward {
  void* out;   // [..., Dv] dtype
  void* lse;   // accumulation type
};

// What db is summed over decides how it is made.
enum class BiasGradient { none, columns, pairs };   // columns: b does not depend on the query; pairs: it does

struct AttentionBackward {
  AttentionRows grad_out;                                        // [B, H, Nq, Dv]
  const void* grad_lse;                                          // [B, H, Nq] contiguous, accumulation type, or nullptr
  AttentionRows out;                                             // of the forward
  const void* lse;
  void *grad_query, *grad_key, *grad_value;                      // contiguous, dtype
  BiasGradient bias_gradient;
  void* grad_bias;                                               // contiguous, accumulation type, sizes as below
  std::int64_t bias_batches;                                     // 1 or B; as many heads as the bias has, 1 or Nq rows, Nk columns
};

}  // namespace modalign
