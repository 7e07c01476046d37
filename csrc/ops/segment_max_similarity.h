// What one call of segment_max_similarity asks for: sizes, strides and pointers, and nothing of torch. ops/segment_max_similarity.cpp fills these structs once;
// cpu/segment_max_similarity.cpp and cuda/segment_max_similarity.cuh both take them as they are.
//
// R rows x_r lie in S segments one behind the other: segment s has rows offsets[s] ... offsets[s + 1] - 1, perhaps none. For every segment and each of A candidates y_a
//
//     value_sa = max over r in segment s of x_r . y_a        index_sa = the first r that attains it        (an empty segment: -inf, -1)
//
// A NaN is larger than every number, as for torch.max: the value is NaN and the index that of the first NaN. With upstream gradient g, through the chosen rows alone,
//
//     dx_r = sum over a with index_sa = r of g_sa y_a        dy_a = sum over s of g_sa x_{index_sa}        both in ascending order, skipping index -1
#pragma once

#include "ops/gram_volume.h"

namespace modalign {

constexpr std::int64_t kMaxSegmentRows = (std::int64_t(1) << 31) - 1;   // kernels count rows and segments in 32 bits

struct SegmentOffsets {
  const std::int64_t* data;   // S + 1 of them, rising from 0 to R
  std::int64_t stride;
};

struct SegmentMaxProblem {
  Scalar dtype;
  std::int64_t R, S, A, D;
  BatchedRows x, y;           // [R, D], [A, D]; batch_stride is not used
  SegmentOffsets offsets;
};

// Outputs are contiguous.
struct SegmentMaxForward {
  void* values;               // [S, A] dtype
  std::int64_t* indices;      // [S, A]
};

struct SegmentMaxBackward {
  const void* grad;           // [S, A] dtype, strides below (an expanded scalar has strides 0)
  std::int64_t grad_row_stride, grad_column_stride;
  const std::int64_t* indices;
  void* grad_x;               // [R, D] dtype, or nullptr: not wanted
  void* grad_y;               // [A, D] dtype, or nullptr
};

}  // namespace modalign
