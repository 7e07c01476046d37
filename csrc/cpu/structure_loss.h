// CPU entry points of structure_loss; one table of functions per instruction set. Workspaces as in cpu/gram_volume.h.
#pragma once

#include "cpu/instruction_set.h"
#include "cpu/parallel.h"
#include "ops/structure_loss.h"

namespace modalign::cpu {

struct StructureKernels {
  std::int64_t (*workspace)(const StructureProblem&);
  void (*forward)(const StructureProblem&, const StructureForward&, void* workspace, const Parallel&);
  std::int64_t (*bwd_workspace)(const StructureProblem&, const StructureBackward&);
  void (*backward)(const StructureProblem&, const StructureBackward&, void* workspace, const Parallel&);
};

const StructureKernels& structure_kernels();   // of the instruction set in use

}  // namespace modalign::cpu
