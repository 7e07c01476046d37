// CPU entry points of reduce_groups and spread_groups; one table of functions per instruction set. No workspace.
#pragma once

#include "cpu/instruction_set.h"
#include "cpu/parallel.h"
#include "ops/reduce_groups.h"

namespace modalign::cpu {

struct GroupKernels {
  void (*reduce)(const GroupsProblem&, const GroupsResult&, const Parallel&);
  void (*spread)(const GroupsProblem&, const GroupsResult&, const Parallel&);
};

const GroupKernels& group_kernels();   // of the instruction set in use

}  // namespace modalign::cpu
