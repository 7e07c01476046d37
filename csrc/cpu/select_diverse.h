// CPU entry points of select_diverse; one table of functions per instruction set. Workspaces as in cpu/gram_volume.h.
#pragma once

#include "cpu/instruction_set.h"
#include "cpu/parallel.h"
#include "ops/select_diverse.h"

namespace modalign::cpu {

struct DiverseWorkspace {
  std::int64_t bytes, cosine_bytes;   // of which the second are at most those that the caller allows
};

struct DiverseKernels {
  DiverseWorkspace (*workspace)(const DiverseProblem&, std::int64_t cosine_bytes);
  void (*select)(const DiverseProblem&, const DiverseResult&, std::int64_t cosine_bytes, void* workspace, void* cosines, const Parallel&);
};

const DiverseKernels& diverse_kernels();   // of the instruction set in use

}  // namespace modalign::cpu
