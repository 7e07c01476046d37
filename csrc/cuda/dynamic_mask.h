// Host-callable launch of dynamic_mask.cuh. No torch and no CUDA header is needed to include this. Conventions: cuda/gram_volume.h.
#pragma once

#include <cstdint>

#include "ops/scalar.h"

namespace modalign::cuda {

int launch_dynamic_mask_ends(Scalar dtype, const void* scores, std::int64_t lines, std::int64_t N, std::int64_t keep, std::int32_t* ends, void* stream);

const char* dynamic_mask_kernel_catalogue();   // keys of this family's compiled instances, one a line

}   // namespace modalign::cuda
