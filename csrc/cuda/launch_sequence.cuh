/// @file launch_sequence.cuh
/// @brief What the launch sequences of all families share: kernels of one warp per item, workspace, keys of instances.
#pragma once

#include <cstdint>

#include "cuda/tile.cuh"

namespace modalign::cuda {

// ------------------------------------------------------------------------------------------------------------------------------- one warp per item
constexpr int kWarpKernelThreads = 128;
constexpr int kWarpKernelBlocks = 3;   // at most 168 registers
constexpr int kWarpsPerBlock = kWarpKernelThreads / kWarpSize;
constexpr std::int64_t kMaxBatches = 65535;                             // grid.z

MODALIGN_DEVICE std::int64_t warp_item() { return std::int64_t(block_index_x()) * kWarpsPerBlock + warp(); }

inline LaunchPlan plan_warps(std::int64_t items, std::int64_t batches, const char* key) {
  LaunchPlan plan;
  plan.grid[0] = unsigned(ceil_divide<std::int64_t>(items, kWarpsPerBlock));
  plan.grid[2] = unsigned(batches);
  plan.threads = kWarpKernelThreads;
  plan.key = key;
  return plan;
}

// ------------------------------------------------------------------------------------------------------------------------------------------- launches
template <class Kernel> struct KernelKey;   // an instance outside the tables does not compile
#define MODALIGN_KEY_OF(key, ...)             \
  template <> struct KernelKey<__VA_ARGS__> { \
    static constexpr const char* value = key; \
  };

// Host code shared by the .cu files and the emulator. An Arena hands out workspace: `template <class U> U* take(const char* name, int64 count)`; a
// Launch is called as launch(kernel, plan) and returns 0 or an error.

// Pieces of one device allocation, 256-byte aligned; with a null base it only counts.
class DeviceArena {
 public:
  explicit DeviceArena(void* base) : base_(static_cast<char*>(base)) {}
  template <class U> U* take(const char*, std::int64_t count) {
    char* at = base_ != nullptr ? base_ + used_ : nullptr;
    used_ += round_up<std::int64_t>(count * std::int64_t(sizeof(U)), 256);
    return reinterpret_cast<U*>(at);
  }
  std::int64_t used() const { return used_; }

 private:
  char* base_;
  std::int64_t used_ = 0;
};

template <class Launch, class Kernel> inline int launch_kernel(const Launch& launch, const Kernel& kernel, std::int64_t batches) {
  return launch(kernel, kernel.plan(batches, KernelKey<Kernel>::value));   // an empty grid is a success that launches nothing
}

}   // namespace modalign::cuda
