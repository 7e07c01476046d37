// Which keys a dynamic mask keeps: of the scores so far the `keep` largest, of equal ones the most recent. (Dynamic mask attention, 2025.)
//
// The scores do not depend on the query, so a key's rank only falls as keys arrive: it is kept from its own arrival until `keep` others have beaten it. That arrival is the whole mask.
#pragma once

#include <cstdint>

namespace modalign::cpu {

// ends[j] = the first t >= j such that `keep` of the keys 0 ... t beat key j; N where there is none. heap: room for `keep` keys. O(N log keep).
template <class T>
void dynamic_mask_ends(const T* scores, std::int64_t N, std::int64_t keep, std::int32_t* ends, std::int32_t* heap) {
  const auto beats = [&](std::int32_t a, std::int32_t b) { return scores[a] > scores[b] || (scores[a] == scores[b] && a > b); };
  std::int64_t size = 0;   // of the heap of those that are kept, the weakest on top
  for (std::int32_t t = 0; t < N; ++t) {
    ends[t] = static_cast<std::int32_t>(N);
    if (size < keep) {
      std::int64_t at = size++;
      for (; at > 0 && beats(heap[(at - 1) / 2], t); at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
      heap[at] = t;
      continue;
    }
    if (!beats(t, heap[0])) {
      ends[t] = t;
      continue;
    }
    ends[heap[0]] = t;
    std::int64_t at = 0;
    for (std::int64_t child = 1; child < size; child = 2 * at + 1) {
      if (child + 1 < size && beats(heap[child], heap[child + 1])) ++child;
      if (!beats(t, heap[child])) break;
      heap[at] = heap[child], at = child;
    }
    heap[at] = t;
  }
}

}  // namespace modalign::cpu
