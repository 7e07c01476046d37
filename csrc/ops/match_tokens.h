// What one call of match_tokens asks for: sizes, strides and pointers, and nothing of torch. ops/match_tokens.cpp fills these structs once; cpu/match_tokens.cpp and
// cuda/match_tokens.cuh both take them as they are.
//
// Bipartite soft matching (Bolya et al., "Token Merging: your ViT but faster", ICLR 2023). Item b has n tokens with features m_i: n = N in a batch; in a packed one its tokens are the rows
// cu[b] ... cu[b + 1] - 1. The first `first` tokens take no part; of the others those at even places are sources, those at odd places destinations (or, where `split` is not negative: the
// first `split` tokens are sources, the others destinations, and first = 0):
//
//     v_a = max over destinations t of cos(m_a, m_t)        j_a = the first t that attains it        (a zero vector: cosine 0; a NaN loses to everything, none left: -inf, the first t)
//
// The sources with the largest v_a, of equal ones the first, join j_a: min(r, floor((n - first) / 2)) of them (split: min(r, sources), none without a destination), with a threshold only those with v_a > threshold. So every token is in a
// group, which is one row of the output. The rows of an item stand in this order:
//
//     first = 0     sources that stay, by falling v (equal: by place), then the destinations
//     first > 0     tokens that take no part, sources that stay, destinations, each by place
//     keep_order    by the first token of the group
//
// (in an item in which no source joins, as they were)
// and those of an item behind those of the item before it.
#pragma once

#include "ops/gram_volume.h"

namespace modalign {

constexpr std::int64_t kMaxTokens = (std::int64_t(1) << 31) - 1;   // of a batch: kernels count them in 32 bits

struct MatchProblem {
  Scalar dtype;
  std::int64_t B, T, D;       // items, tokens of all of them
  const std::int32_t* cu;     // [B + 1], or nullptr: T / B tokens each
  std::int64_t longest;       // tokens of an item, or more
  BatchedRows features;       // [B, N, D]; packed [1, T, D], batch_stride is not used
  std::int64_t first, split, r;
  bool has_threshold;
  double threshold;
  bool keep_order;
};

// Outputs are contiguous. "real" is float, or double for double.
struct MatchResult {
  void* score;                // [T] real: v_a, -inf for tokens that are no sources
  std::int32_t* group;        // [T] the row of the output that a token is in
  std::int32_t* members;      // [T] tokens, group by group, rising in each
  std::int32_t* offsets;      // [T + 1] group g has the members offsets[g] ... offsets[g + 1] - 1; behind the last group T
  std::int32_t* cu;           // [B + 1] groups of the items before
};

}  // namespace modalign
