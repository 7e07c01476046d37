// Host-callable launch of match_tokens on CUDA. No torch and no CUDA header is needed to include this. Conventions: cuda/gram_volume.h.
//
// The values of cu are not looked at (that would wait for the device). Where they do not rise from 0 to T by at most `longest`, every group is still a row below T and every member a token, but
// which is not said (items that overlap are numbered one over the other), and nothing beyond the arrays is read or written.
#pragma once

#include <cstdint>

#include "ops/match_tokens.h"

namespace modalign::cuda {

std::int64_t match_tokens_workspace(const MatchProblem& problem);
int launch_match_tokens(const MatchProblem& problem, const MatchResult& output, void* workspace, void* stream);

const char* match_tokens_kernel_catalogue();   // keys of this family's compiled instances, one a line

}   // namespace modalign::cuda
