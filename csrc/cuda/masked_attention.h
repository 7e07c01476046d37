// Host-callable launches of masked_attention on CUDA. No torch and no CUDA header is needed to include this. Conventions: cuda/gram_volume.h.
#pragma once

#include <cstdint>

#include "ops/masked_attention.h"

namespace modalign::cuda {

std::int64_t masked_attention_workspace(const AttentionProblem& problem);
int launch_masked_attention(const AttentionProblem& problem, const AttentionForward& output, void* workspace, void* stream);

std::int64_t masked_attention_bwd_workspace(const AttentionProblem& problem);
int launch_masked_attention_bwd(const AttentionProblem& problem, const AttentionBackward& request, void* workspace, void* stream);

const char* attention_kernel_catalogue();   // keys of this family's compiled instances, one a line

}   // namespace modalign::cuda
