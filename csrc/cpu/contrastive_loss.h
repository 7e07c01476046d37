// CPU entry points of the contrastive losses; one table of functions per instruction set. Workspaces as in cpu/gram_volume.h.
#pragma once

#include "cpu/instruction_set.h"
#include "cpu/parallel.h"
#include "ops/contrastive_loss.h"

namespace modalign::cpu {

struct ContrastiveKernels {
  std::int64_t (*workspace)(const ContrastiveProblem&);
  void (*forward)(const ContrastiveProblem&, const ContrastiveForward&, void* workspace, const Parallel&);
  std::int64_t (*bwd_workspace)(const ContrastiveProblem&);
  void (*backward)(const ContrastiveProblem&, const ContrastiveBackward&, void* workspace, const Parallel&);
};

const ContrastiveKernels& contrastive_kernels();   // of the instruction set in use

}  // namespace modalign::cpu
