// Host-callable launches of knn and target_rank on CUDA. No torch and no CUDA header is needed to include this. Conventions: cuda/gram_volume.h.
//
// The values of targets are not looked at (that would wait for the device): what is no index of a point has rank -1.
#pragma once

#include <cstdint>

#include "ops/knn.h"

namespace modalign::cuda {

std::int64_t knn_workspace(const KnnProblem& problem);
int launch_knn(const KnnProblem& problem, const KnnResult& output, void* workspace, void* stream);

// float32 and float64 alone
std::int64_t knn_scores_workspace(const KnnProblem& problem);
int launch_knn_scores(const KnnProblem& problem, const std::int64_t* indices, const KnnResult& output, void* workspace, void* stream);

std::int64_t target_rank_workspace(const KnnProblem& problem);
int launch_target_rank(const KnnProblem& problem, std::int64_t* rank, void* workspace, void* stream);

const char* knn_kernel_catalogue();   // keys of this family's compiled instances, one a line

}   // namespace modalign::cuda
