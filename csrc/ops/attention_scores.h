// What attention_column_sum and attention_row_statistics ask of the probabilities p_ij of masked_attention (ops/masked_attention.h), none of which is kept.
//
//     column j    sum       sum_i w_i p_ij                        row i    entropy   -sum_j p_ij ln p_ij
//                 square    sum_i w_i p_ij^2                               maximum   max_j p_ij
//                 maximum   max(0, max_i w_i p_ij)
//                 kept      sum of w_i over the i that keep j
//
// A NaN among them makes the result NaN; a pair that is not kept and a row of weight 0 add nothing, whatever is in them.
#pragma once

#include "ops/masked_attention.h"

namespace modalign {

enum class ColumnReduction { sum, square, maximum, kept };

struct AttentionWeights {   // [B, H, Nq] of the accumulation type, strides in elements
  const void* data;
  std::int64_t batch_stride, head_stride, row_stride;
};

// lse: [B, H, Nq] contiguous, of the forward. Results are contiguous; all in the accumulation type.
struct AttentionColumns {
  ColumnReduction reduction;
  const void* lse;
  AttentionWeights weights;
  void* out;   // [B, H, Nk]
};

struct AttentionRowStatistics {
  const void* lse;
  void *entropy, *maximum;   // [B, H, Nq]
};

}  // namespace modalign
