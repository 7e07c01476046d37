// What one call of reduce_groups and spread_groups asks for: sizes, strides and pointers, and nothing of torch.
//
// R rows lie in M groups: group g has the rows members[offsets[g]] ... members[offsets[g + 1] - 1], and every row is in one group. With weights w (1 where there are none) and
// total_g = sum of w_i over group g
//
//     reduce    sum:  y_g = sum of w_i x_i        mean:  y_g = sum of w_i x_i / total_g        max:  y_g = max of x_i, element by element, a NaN is the largest
//     spread    sum:  x_i = w_i y_g               mean:  x_i = w_i / total_g y_g
//
// so that each is the transpose, and the gradient, of the other. A mean of one row is that row, bit for bit, whatever its weight; of several whose weights sum to 0 it is 0, as their shares
// w_i / total_g are then taken for 0. An empty group: 0, the maximum -inf.
#pragma once

#include "ops/gram_volume.h"

namespace modalign {

enum class GroupMode : std::int8_t { sum, mean, max };

struct Groups {
  std::int64_t R, M;
  const std::int32_t* members;   // [R]
  const std::int32_t* offsets;   // [M + 1]
  const void* weight;            // [R] real, or nullptr
};

struct GroupsProblem {
  Scalar dtype;
  std::int64_t C;
  Groups groups;
  GroupMode mode;
  BatchedRows from;              // reduce: x [R, C]; spread: y [M, C]; batch_stride is not used
};

// Outputs are contiguous. "real" is float, or double for double.
struct GroupsResult {
  void* to;                      // reduce: [M, C] dtype; spread: [R, C]
  void* total;                   // reduce: [M] real; spread: nullptr
};

}  // namespace modalign
