// CPU entry points of masked_attention; one table of functions per instruction set. Workspaces as in cpu/gram_volume.h.
#pragma once

#include "cpu/instruction_set.h"
#include "cpu/parallel.h"
#include "ops/masked_attention.h"

namespace modalign::cpu {

struct AttentionKernels {
  std::int64_t (*workspace)(const AttentionProblem&);
  void (*forward)(const AttentionProblem&, const AttentionForward&, void* workspace, const Parallel&);
  std::int64_t (*bwd_workspace)(const AttentionProblem&, const AttentionBackward&);
  void (*backward)(const AttentionProblem&, const AttentionBackward&, void* workspace, const Parallel&);
};

const AttentionKernels& attention_kernels();   // of the instruction set in use

}  // namespace modalign::cpu
