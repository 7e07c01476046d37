// CPU entry points of knn; one table of functions per instruction set. Workspaces as in cpu/gram_volume.h.
#pragma once

#include "cpu/instruction_set.h"
#include "cpu/parallel.h"
#include "ops/knn.h"

namespace modalign::cpu {

struct KnnKernels {
  std::int64_t (*workspace)(const KnnProblem&);
  void (*knn)(const KnnProblem&, const KnnResult&, void* workspace, const Parallel&);
  std::int64_t (*rank_workspace)(const KnnProblem&);
  void (*target_rank)(const KnnProblem&, std::int64_t* rank, void* workspace, const Parallel&);
};

const KnnKernels& knn_kernels();   // of the instruction set in use

}  // namespace modalign::cpu
