// Host-callable launches of segment_max_similarity on CUDA. No torch and no CUDA header is needed to include this. Conventions: cuda/gram_volume.h.
//
// The values of offsets are not looked at (that would wait for the device). Where they do not rise from 0 to R every value is still that of some rows,
// or -infinity, every index a row or -1, and nothing beyond the arrays is read or written.
#pragma once

#include <cstdint>

#include "ops/segment_max_similarity.h"

namespace modalign::cuda {

std::int64_t segment_max_similarity_workspace(const SegmentMaxProblem& problem);
int launch_segment_max_similarity(const SegmentMaxProblem& problem, const SegmentMaxForward& output, void* workspace, void* stream);

// No workspace.
int launch_segment_max_similarity_bwd(const SegmentMaxProblem& problem, const SegmentMaxBackward& request, void* stream);

const char* segment_max_kernel_catalogue();   // keys of this family's compiled instances, one a line

}   // namespace modalign::cuda
