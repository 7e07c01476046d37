// Host-callable launches of attention_column_sum and attention_row_statistics on CUDA. No torch and no CUDA header is needed to include this. Conventions: cuda/gram_volume.h.
#pragma once

#include <cstdint>

#include "ops/attention_scores.h"

namespace modalign::cuda {

std::int64_t attention_scores_workspace(const AttentionProblem& problem);   // of either
int launch_attention_columns(const AttentionProblem& problem, const AttentionColumns& request, void* workspace, void* stream);
int launch_attention_rows(const AttentionProblem& problem, const AttentionRowStatistics& request, void* workspace, void* stream);

const char* attention_score_kernel_catalogue();   // keys of this family's compiled instances, one a line

}   // namespace modalign::cuda
