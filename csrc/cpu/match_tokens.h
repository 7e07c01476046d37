// CPU entry points of match_tokens; one table of functions per instruction set. Workspaces as in cpu/gram_volume.h.
#pragma once

#include "cpu/instruction_set.h"
#include "cpu/parallel.h"
#include "ops/match_tokens.h"

namespace modalign::cpu {

struct MatchKernels {
  std::int64_t (*workspace)(const MatchProblem&);
  void (*match)(const MatchProblem&, const MatchResult&, void* workspace, const Parallel&);
};

const MatchKernels& match_kernels();   // of the instruction set in use

}  // namespace modalign::cpu
