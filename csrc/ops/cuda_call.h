// What an op does around a CUDA launch, through the stable ABI.
#pragma once

#ifdef MODALIGN_WITH_CUDA
#include "common/check.h"
#include "cuda/gram_volume.h"

namespace modalign {

constexpr std::int64_t kWorkspaceBytes = 64 << 20;   // what a backward pass may take for its row panels beyond what is linear in rows and columns

using torch::stable::accelerator::DeviceGuard;   // tensors of one call may live on another device than the current one

inline void check_launch(const char* op, int error) { MODALIGN_CHECK(error == 0, op, ": CUDA reports ", cuda::error_name(error)); }

}  // namespace modalign
#endif
