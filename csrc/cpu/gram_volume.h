// CPU entry points of the volume family; one table of functions per instruction set.
// A workspace is one allocation of the size that the matching *_workspace function names, 64-byte aligned; a kernel allocates nothing else but a tile per thread.
#pragma once

#include "cpu/instruction_set.h"
#include "cpu/parallel.h"
#include "ops/gram_volume.h"

namespace modalign::cpu {

struct GramVolumeKernels {
  std::int64_t (*gram_volume_workspace)(const GramVolumeProblem&);
  void (*gram_volume)(const GramVolumeProblem&, const PairForward&, void* workspace, const Parallel&);
  std::int64_t (*gram_volume_bwd_workspace)(const GramVolumeProblem&);
  void (*gram_volume_bwd)(const GramVolumeProblem&, const PairBackward&, void* workspace, const Parallel&);

  std::int64_t (*triangle_area_workspace)(const TriangleAreaProblem&);
  void (*triangle_area)(const TriangleAreaProblem&, const PairForward&, void* workspace, const Parallel&);
  std::int64_t (*triangle_area_bwd_workspace)(const TriangleAreaProblem&);
  void (*triangle_area_bwd)(const TriangleAreaProblem&, const PairBackward&, void* workspace, const Parallel&);

  void (*paired_gram_volume)(const PairedGramVolumeProblem&, void* value, const Parallel&);
  void (*paired_gram_volume_bwd)(const PairedGramVolumeProblem&, const void* grad, std::int64_t grad_stride, void* grad_vectors, const Parallel&);
};

const GramVolumeKernels& gram_volume_kernels();   // of the instruction set in use

}  // namespace modalign::cpu
