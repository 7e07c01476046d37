// What one call of knn or target_rank asks for: sizes, strides and pointers, and nothing of torch. ops/knn.cpp fills these structs once.
//
// A point is as near to a query as its score is large, and every metric is one score with a scale and a bias per point:
//
//     z_ij = (q_i . x_j) scale_j + bias_j
//
//     metric         scale_j     bias_j               what the value of a neighbour is, made of z by the caller
//     dot            1           b_j                  z
//     cosine         1 / |x_j|   b_j                  z / |q_i|                  (a zero vector: 0)
//     sqeuclidean    1           -|x_j|^2 / 2         max(|q_i|^2 - 2 z, 0)
//     euclidean      1           -|x_j|^2 / 2         the square root of that
//
// b_j: given by the caller, 0 otherwise; not for distances. |q_i|^2 is a second result: a sum in the order of the products, so that a duplicate is at distance 0 exactly.
// The scores are what lists of several calls are merged by (values may be equal where scores are not): knn of a union is the merge of the parts' lists.
//
// Order      larger z first, equal ones by rising index: total, so that neighbours depend on the scores alone. NaN and -inf are never neighbours.
// Left out   point j for query i where skip_i = j, or where both have labels and these are equal.
// Rank       of a target t_i: how many points that are not left out come before it, so 0 for the nearest; -1 without a target or where that is left out or no neighbour.
#pragma once

#include "ops/gram_volume.h"

namespace modalign {

constexpr std::int64_t kMaxPoints = (std::int64_t(1) << 31) - 1;   // kernels count points in 32 bits

enum class Metric { dot, cosine, sqeuclidean, euclidean };
enum class Precision { highest, high };   // high: on CUDA float32 products may be three bf16 ones

inline bool is_distance(Metric metric) { return metric == Metric::sqeuclidean || metric == Metric::euclidean; }

// An optional int64 or real vector with a stride in elements; data == nullptr: not given.
struct OptionalVector {
  const void* data;
  std::int64_t stride;
};

struct KnnProblem {
  Scalar dtype;
  Metric metric;
  Precision precision;           // of knn
  std::int64_t N, M, D, k;
  BatchedRows queries, points;   // [N, D], [M, D]; batch_stride is not used
  OptionalVector bias;           // [M] accumulation type
  OptionalVector skip;           // [N] int64, -1: none
  OptionalVector query_labels;   // [N] int64
  OptionalVector point_labels;   // [M] int64
  OptionalVector target;         // [N] int64, below 0: none; of target_rank, which has no k
};

// Contiguous; where fewer than k points are left, index -1 and score -inf.
struct KnnResult {
  void* scores;            // [N, k] accumulation type
  std::int64_t* indices;   // [N, k]
  void* squares;           // [N] |q_i|^2; untouched for dot
};

}  // namespace modalign
