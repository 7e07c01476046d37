// CPU entry points of segment_max_similarity; one table of functions per instruction set. Workspaces as in cpu/gram_volume.h.
#pragma once

#include "cpu/instruction_set.h"
#include "cpu/parallel.h"
#include "ops/segment_max_similarity.h"

namespace modalign::cpu {

struct SegmentMaxKernels {
  std::int64_t (*workspace)(const SegmentMaxProblem&);
  void (*forward)(const SegmentMaxProblem&, const SegmentMaxForward&, void* workspace, const Parallel&);
  std::int64_t (*bwd_workspace)(const SegmentMaxProblem&, bool need_x, bool need_y);
  void (*backward)(const SegmentMaxProblem&, const SegmentMaxBackward&, void* workspace, const Parallel&);
};

const SegmentMaxKernels& segment_max_kernels();   // of the instruction set in use

}  // namespace modalign::cpu
