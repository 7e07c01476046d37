// The one check of what attention ops are given. ops/masked_attention.h says what the numbers are.
#pragma once

#include <optional>
#include <vector>

#include "common/stable.h"
#include "ops/masked_attention.h"

namespace modalign {

struct AttentionArguments {
  const char* op;
  const Tensor &query, &key, &value;
  const std::optional<Tensor> &bias, &key_lengths, &cu_queries, &cu_keys;
  std::int64_t max_queries, max_keys, causal;
  double scale, cap;
  const std::vector<Tensor>& mask_tensors;
  const std::vector<std::int64_t>& mask_steps;
};

AttentionProblem check_attention(const AttentionArguments& arguments);

inline AttentionRows rows_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

}  // namespace modalign
