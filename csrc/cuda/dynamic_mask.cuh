/// @file dynamic_mask.cuh
/// @brief Which keys a dynamic mask keeps, on CUDA: the twin of cpu/dynamic_mask.h.
///
/// Maths      ends[j] = the first t >= j such that `keep` of the keys 0 ... t beat key j; N where there is none. s beats j with a larger score, or the same and a larger index; NaN is -inf.
/// Mapping    one warp per key, which counts those that beat it, 32 at a time, until they are enough. The keys of a block are neighbours and read the same scores.
/// Work       N comparisons a key at most; for random scores about keep (1 + ln(N / keep)).
/// Order      every end has one owner and is a count: nothing depends on order.
#pragma once

#include "cuda/launch_sequence.cuh"

namespace modalign::cuda {

template <class Real> struct DynamicMaskEnds {
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  const Real* scores;   // [lines, N]
  std::int64_t lines, N, keep;
  std::int32_t* ends;   // [lines, N]

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(lines * N, 1, key); }

  static MODALIGN_DEVICE Real score(Global<const Real> from, std::int64_t s) {
    const Real x = from[s];
    return x == x ? x : -kInfinity<Real>;
  }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t item = warp_item();
    if (item >= (MODALIGN_MUTATION("ends: one key too many") ? lines * N + 1 : lines * N)) return;
    const std::int64_t j = item % N;
    const Global<const Real> line = Global<const Real>(scores).at(item - j);
    const Real own = score(line, j);
    std::int64_t end = N, missing = keep;   // how many more must beat it
    for (std::int64_t first = 0; first < N; first += kWarpSize) {
      const std::int64_t s = first + lane();
      bool beats = false;
      if (s < N) {
        const Real other = score(line, s);
        beats = other > own || (other == own && (MODALIGN_MUTATION("ends: the oldest of equal ones wins") ? s < j : s > j));
      }
      std::uint32_t bits = warp_ballot(beats);
      const int count = population_count(bits);
      if (count < missing) {
        missing -= count;
        continue;
      }
      for (; missing > 1; --missing) bits &= bits - 1;
      end = maximum(first + population_count((bits & (0 - bits)) - 1), MODALIGN_MUTATION("ends: before the key is there") ? std::int64_t(0) : j);
      break;
    }
    if (lane() == 0) global(ends)[item] = std::int32_t(end);
  }
};

#define MODALIGN_DYNAMIC_MASK_KERNELS(X)                    \
  X("dynamic_mask.ends.f32", DynamicMaskEnds<float>)        \
  X("dynamic_mask.ends.f64", DynamicMaskEnds<double>)

MODALIGN_DYNAMIC_MASK_KERNELS(MODALIGN_KEY_OF)

}   // namespace modalign::cuda
