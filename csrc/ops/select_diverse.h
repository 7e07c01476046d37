// What one call of select_diverse asks for: sizes, strides and pointers, and nothing of torch.
//
// Max-min diversity (DivPrune, Alvar et al., CVPR 2025; farthest points on the sphere): of an item's tokens m_i, with d_ij = 1 - cos(m_i, m_j), n are taken one by one,
//
//     s_0 = argmax over i of min over j != i of d_ij        s_t = argmax over i not taken of min over taken u of d_iu        radius_t = that distance, radius_0 = inf
//
// equal ones in the order of their indices. A zero vector is at distance 1 from everything; a token that is not finite is taken last, with radius NaN. Tokens may be given that are taken first.
#pragma once

#include "ops/gram_volume.h"

namespace modalign {

constexpr std::int64_t kMaxDiverseTokens = (std::int64_t(1) << 31) - 1;   // of an item

struct DiverseProblem {
  Scalar dtype;
  std::int64_t B, N, D, n;
  BatchedRows features;          // [B, N, D]
  const std::int64_t* lengths;   // [B] the first so many tokens are there, at least n; nullptr: all
  const std::int64_t* start;     // [B, starts], different ones; nullptr: none
  std::int64_t starts;           // at most n
};

// Outputs are contiguous. "real" is float, or double for double.
struct DiverseResult {
  std::int64_t* indices;         // [B, n]
  void* radii;                   // [B, n] real
};

}  // namespace modalign
