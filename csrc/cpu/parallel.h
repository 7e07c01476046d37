// How a CPU kernel gets threads without linking any threading library: a callback with the meaning of torch's parallel_for. The ops pass
// torch::stable::parallel_for (so torch.set_num_threads rules), the host module a serial loop.
#pragma once

#include <cstdint>

namespace modalign::cpu {

struct Parallel {
  using Body = void (*)(void* context, std::int64_t begin, std::int64_t end);
  void (*run)(std::int64_t begin, std::int64_t end, std::int64_t grain, Body body, void* context);
};

}  // namespace modalign::cpu

// Included by every instruction set, hence in its namespace.
#ifndef MODALIGN_ISA
#define MODALIGN_ISA portable
#endif
namespace modalign::cpu {
inline namespace MODALIGN_ISA {

inline constexpr Parallel kSerial{[](std::int64_t begin, std::int64_t end, std::int64_t, Parallel::Body body, void* context) {
  if (begin < end) body(context, begin, end);
}};

// Chunks [begin, end) of at least `grain` items to f(begin, end), in any order and on any thread.
template <class F>
inline void parallel_for(const Parallel& parallel, std::int64_t begin, std::int64_t end, std::int64_t grain, const F& f) {
  parallel.run(begin, end, grain, [](void* context, std::int64_t first, std::int64_t last) { (*static_cast<const F*>(context))(first, last); },
               const_cast<void*>(static_cast<const void*>(&f)));
}

}  // inline namespace
}  // namespace modalign::cpu
