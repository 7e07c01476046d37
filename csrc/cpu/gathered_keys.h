// Keys that lie scattered: a mask of intervals keeps few of them for a block of queries, but some in nearly every tile. (Dynamic mask attention, 2025: the keys with the best scores.)
//
// Together with causal an interval says that key j is kept for the queries from low to high - 1. Keys that no query keeps are left out once; a block of queries lists those whose span
// meets it, and its tiles are made of kBlock keys of that list, copied side by side. Work queries * (kept + kBlock) instead of queries * keys.
#pragma once

#include "cpu/attention.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {

struct KeySpan {
  std::int32_t key, low, high;
};

class GatheredKeys {
 public:
  GatheredKeys(const AttentionProblem& p, const Parallel& parallel)
      : heads_(possible(p) ? p.mask.step[0].heads : 0), sharing_(heads_ ? p.H / heads_ : 1), Nk_(p.Nk), spans_(p.B * heads_ * p.Nk), counts_(p.B * heads_), listed_(p.B * heads_), tiled_(p.B * heads_) {
    parallel_for(parallel, 0, p.B * heads_, 1, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t query_blocks = blocks(p.Nq);
      const Scratch<std::int32_t> edges(query_blocks + 1);   // spans of a tile of keys that begin at a block of queries, less those that end before it
      std::memset(edges, 0, (query_blocks + 1) * sizeof(std::int32_t));
      for (std::int64_t n = begin; n < end; ++n) {
        const std::int64_t b = n / heads_;
        const Sequence s = sequence(p, b);
        const MaskStep& step = p.mask.step[0];
        const std::int32_t* from = step.intervals + b * step.batch_stride + n % heads_ * step.head_stride;
        KeySpan* to = spans_ + n * Nk_;
        std::int64_t count = 0;
        for (std::int64_t j = 0; j < s.keys; ++j) {
          const std::int64_t low = maximum(0, maximum(from[2 * j], j - s.reach)), high = minimum(from[2 * j + 1], s.queries);
          if (low < high) to[count++] = {static_cast<std::int32_t>(j), static_cast<std::int32_t>(low), static_cast<std::int32_t>(high)};
        }
        counts_[n] = count, listed_[n] = 0, tiled_[n] = 0;
        for (std::int64_t k = 0; k < count; ++k) {   // linear in keys and tiles, whatever the spans are
          const std::int64_t first = to[k].low / kBlock, last = blocks(to[k].high);
          listed_[n] += last - first;
          ++edges[first], --edges[last];
          if (k + 1 < count && to[k + 1].key / kBlock == to[k].key / kBlock) continue;
          for (std::int64_t block = 0, open = 0; block <= query_blocks; ++block) open += edges[block], tiled_[n] += open > 0, edges[block] = 0;
        }
      }
    });
    std::int64_t listed = 0, tiled = 0;
    for (std::int64_t n = 0; n < p.B * heads_; ++n) listed += listed_[n], tiled += tiled_[n];
    wanted_ = 4 * listed < 3 * kBlock * tiled;
  }

  bool wanted() const { return wanted_; }

  // The keys of some queries, in order; how many.
  std::int64_t list(std::int64_t b, std::int64_t h, std::int64_t first, std::int64_t rows, KeySpan* to) const {
    const std::int64_t n = b * heads_ + h / sharing_;
    const KeySpan* from = spans_ + n * Nk_;
    std::int64_t count = 0;
    for (std::int64_t k = 0; k < counts_[n]; ++k) {
      to[count] = from[k];
      count += from[k].low < first + rows && first < from[k].high;
    }
    return count;
  }

 private:
  static bool possible(const AttentionProblem& p) { return p.mask.count == 1 && p.mask.step[0].kind == MaskStepKind::interval; }

  std::int64_t heads_, sharing_, Nk_;
  Scratch<KeySpan> spans_;
  Scratch<std::int64_t> counts_, listed_, tiled_;   // of a head: keys that are kept at all, those of all blocks of queries, and the tiles that hold them
  bool wanted_;
};

// What is added to the logits of some gathered keys: to[line * kBlock + n] as HeadPairs::addends has it. bias_at: of the item and head.
template <bool lines_are_keys, class T>
void gathered_addends(const AttentionProblem& p, std::int64_t bias_at, const KeySpan* spans, std::int64_t keys, std::int64_t first, std::int64_t rows, T* to) {
  const AttentionPairs& bias = p.bias;
  const auto low = static_cast<std::int32_t>(first);
  if constexpr (lines_are_keys) {
    for (std::int64_t k = 0; k < keys; ++k, to += kBlock) {
      if (bias.data) load_row<T>(p.bias_dtype, bias.data, bias_at + spans[k].key * bias.column_stride + first * bias.row_stride, bias.row_stride, rows, to);
      else for (std::int64_t i = 0; i < rows; ++i) to[i] = 0;
      for (std::int32_t i = 0; i < rows; ++i) to[i] = std::int32_t(spans[k].low <= low + i) & std::int32_t(low + i < spans[k].high) ? to[i] : kNothing<T>;
    }
  } else {
    alignas(64) T line[kBlock];
    for (std::int32_t i = 0; i < rows; ++i, to += kBlock) {
      if (i == 0 || bias.row_stride)
        for (std::int64_t k = 0; k < keys; ++k) {
          line[k] = 0;
          if (bias.data) load_row<T>(p.bias_dtype, bias.data, bias_at + spans[k].key * bias.column_stride + (first + i) * bias.row_stride, 1, 1, line + k);
        }
      for (std::int64_t k = 0; k < keys; ++k) to[k] = std::int32_t(spans[k].low <= low + i) & std::int32_t(low + i < spans[k].high) ? line[k] : kNothing<T>;
    }
  }
}

// Rows of gathered keys one behind the other.
template <class T>
Lines<T> gathered_lines(const Lines<T>& from, const KeySpan* spans, std::int64_t keys, std::int64_t width, T* to) {
  for (std::int64_t k = 0; k < keys; ++k) std::memcpy(to + k * width, from.data + spans[k].key * from.ld, width * sizeof(T));
  return {to, width};
}

}  // inline namespace
}  // namespace modalign::cpu
