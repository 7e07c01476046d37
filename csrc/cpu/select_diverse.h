// CPU entry points of select_diverse; one table of functions per instruction set. Workspaces as in cpu/gram_volume.h.
#pragma once

#include "cpu/instruction_set.h"
#include "cpu/parallel.h"
#include "ops/select_diverse.h"

namespace modalign::cpu {

struct DiverseKernels {
  std::int64_t (*workspace)(const DiverseProblem&, std::int64_t cosine_bytes);
  void (*select)(const DiverseProblem&, const DiverseResult&, std::int64_t cosine_bytes, void* workspace, const Parallel&);
};

const DiverseKernels& diverse_kernels();   // of the instruction set in use

}  // namespace modalign::cpu
