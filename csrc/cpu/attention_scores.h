// CPU entry points of attention_column_sum and attention_row_statistics; one table of functions per instruction set. Workspaces as in cpu/gram_volume.h.
#pragma once

#include "cpu/instruction_set.h"
#include "cpu/parallel.h"
#include "ops/attention_scores.h"

namespace modalign::cpu {

struct AttentionScoreKernels {
  std::int64_t (*columns_workspace)(const AttentionProblem&);
  void (*columns)(const AttentionProblem&, const AttentionColumns&, void* workspace, const Parallel&);
  std::int64_t (*rows_workspace)(const AttentionProblem&);
  void (*rows)(const AttentionProblem&, const AttentionRowStatistics&, void* workspace, const Parallel&);
};

const AttentionScoreKernels& attention_score_kernels();   // of the instruction set in use

}  // namespace modalign::cpu
