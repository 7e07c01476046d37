/// @file attention_mask.cuh
/// @brief The programs of ops/attention_mask.h on CUDA: what blocks of tokens, intervals and pairs have between them, coverage of a tile, a pair.
///
/// Mapping    SummarizeTokens, SummarizeIntervals, SummarizePairs: one warp per block of tokens, of columns, or per tile.
///            MaskView::coverage is asked by one thread per tile, MaskView::keeps by one thread per pair.
/// Memory     19 words for a block of tokens, 4 for a block of columns, and one for a tile of a mask that is itself a matrix.
#pragma once

#include "cuda/launch_sequence.cuh"
#include "ops/attention_mask.h"

namespace modalign::simt {
MODALIGN_DEVICE Global<const std::int32_t> parameters_from(Global<const std::int32_t> p, int n) { return p.at(n); }   // of rules
}   // namespace modalign::simt

namespace modalign::cuda {

using Words = Global<const std::int32_t>;

// ------------------------------------------------------------------------------------------------------------------------------------------ summaries
MODALIGN_DEVICE int warp_minimum(int x) {
  MODALIGN_UNROLL
  for (int step = kWarpSize / 2; step > 0; step /= 2) x = minimum(x, shuffle_xor(x, step));
  return x;
}
MODALIGN_DEVICE int warp_maximum(int x) { return -warp_minimum(-x); }

constexpr int kLargest = 0x7fffffff;
constexpr int kTokenSummary = 2 * kTokenFields + 1;   // low and high of every field, types
constexpr int kIntervalSummary = 4;                   // lowest and highest first, lowest and highest last

struct SummarizeTokens {
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  const std::int32_t* tokens;
  std::int64_t batch_stride, N, blocks, items;
  int block;
  std::int32_t* out;   // [items, blocks, kTokenSummary]

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(items * blocks, 1, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t item = warp_item();
    if (item >= (MODALIGN_MUTATION("tokens: one block too many") ? items * blocks + 1 : items * blocks)) return;
    const std::int64_t first = item % blocks * block;
    const int count = int(minimum(N - first, std::int64_t(block)));
    const Words from = Words(tokens).at(item / blocks * batch_stride + first);
    const Global<std::int32_t> to = global(out).at(item * kTokenSummary);
    MODALIGN_UNROLL
    for (int field = 0; field < kTokenFields; ++field) {
      int low = kLargest, high = -kLargest;
      for (int n = lane(); n < count; n += kWarpSize) {
        const int x = from[field * N + n];
        low = minimum(low, x);
        high = maximum(high, x);
      }
      low = warp_minimum(low);
      high = warp_maximum(high);
      if (lane() == 0) {
        to[2 * field] = low;
        to[2 * field + 1] = MODALIGN_MUTATION("tokens: the lowest for the highest") ? low : high;
      }
    }
    std::uint32_t types = 0;
    for (int n = lane(); n < count; n += kWarpSize) types |= 1u << (std::int32_t(from[N + n]) & (kTokenTypes - 1));
    MODALIGN_UNROLL
    for (int step = kWarpSize / 2; step > 0; step /= 2) types |= shuffle_xor(types, step);
    if (lane() == 0) to[2 * kTokenFields] = std::int32_t(types);
  }
};

struct SummarizeIntervals {
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  const std::int32_t* intervals;   // [items, heads, N, 2]
  std::int64_t batch_stride, head_stride, heads, N, blocks, items;
  int block;
  std::int32_t* out;   // [items, heads, blocks, kIntervalSummary]

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(items * heads * blocks, 1, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t item = warp_item(), line = item / blocks, first = item % blocks * block;
    if (item >= items * heads * blocks) return;
    const int count = int(minimum(N - first, std::int64_t(block)));
    const Words from = Words(intervals).at(line / heads * batch_stride + line % heads * head_stride + 2 * first);
    int low_first = kLargest, high_first = -kLargest, low_last = kLargest, high_last = -kLargest;
    for (int n = lane(); n < count; n += kWarpSize) {
      const int begin = from[2 * n], end = from[2 * n + 1];
      const bool empty = begin >= end;   // keeps nothing: no reason for `some`, and one against `everything`
      low_first = minimum(low_first, empty ? kLargest : begin);
      high_first = maximum(high_first, empty ? kLargest : begin);
      low_last = minimum(low_last, MODALIGN_MUTATION("intervals: forget that one is empty") ? kLargest : empty ? -kLargest : end);
      high_last = maximum(high_last, empty ? -kLargest : end);
    }
    const int found[kIntervalSummary] = {warp_minimum(low_first), MODALIGN_MUTATION("intervals: forget that one is empty") ? -kLargest : warp_maximum(high_first), warp_minimum(low_last),
                                         warp_maximum(high_last)};
    MODALIGN_UNROLL
    for (int n = 0; n < kIntervalSummary; ++n)
      if (lane() == n) global(out)[item * kIntervalSummary + n] = found[n];
  }
};

// Of a mask that is a matrix of pairs or of tiles of pairs.
struct SummarizePairs {
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  MaskStep step;
  std::int64_t Nq, Nk, query_blocks, key_blocks, items;
  int block;
  std::int32_t* out;   // Coverage [items, heads, query_blocks, key_blocks]

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(items * step.heads * query_blocks * key_blocks, 1, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t item = warp_item(), tiles = query_blocks * key_blocks, line = item / tiles;
    if (item >= items * step.heads * tiles) return;
    const std::int64_t i = item % tiles / key_blocks * block, j = item % key_blocks * block;
    const std::int64_t r0 = i / step.tile_rows, c0 = j / step.tile_columns;
    const std::int64_t r1 = step.row_stride != 0 ? (minimum(i + block, Nq) - 1) / step.tile_rows : r0;
    const std::int64_t c1 = step.column_stride != 0 ? (minimum(j + block, Nk) - 1) / step.tile_columns : c0;
    const int columns = int(c1 - c0) + 1, count = int(r1 - r0 + 1) * columns;
    const Global<const bool> from = Global<const bool>(step.pairs).at(line / step.heads * step.batch_stride + line % step.heads * step.head_stride + r0 * step.row_stride + c0 * step.column_stride);
    bool any = false, all = true;
    for (int n = lane(); n < (MODALIGN_MUTATION("pairs: forget the last") && count > 1 ? count - 1 : count); n += kWarpSize) {
      const bool kept = from[n / columns * step.row_stride + n % columns * step.column_stride];
      any |= kept;
      all &= kept;
    }
    any = warp_ballot(any) != 0;
    all = warp_ballot(!all) == 0;
    if (lane() == 0) global(out)[item] = int(!any ? Coverage::nothing : all ? Coverage::everything : Coverage::some);
  }
};

// ------------------------------------------------------------------------------------------------------------------------------------------ questions
struct MaskView {
  MaskProgram program;
  const std::int32_t* query_summary[kMaskSteps];   // relation
  const std::int32_t* summary[kMaskSteps];         // relation: of keys; interval; tiles and dense
  std::int64_t H, Nq, Nk, query_blocks, key_blocks;

  MODALIGN_DEVICE static Token<Range> ranges(Words from) {
    const auto range = [&](int field) { return Range{from[2 * field], from[2 * field + 1]}; };
    return {range(0), range(1), range(2), range(3), range(4), range(5), range(6), range(7), range(8)};
  }
  MODALIGN_DEVICE static TokenRanges token_ranges(const std::int32_t* summary, std::int64_t at) {
    const Words from = Words(summary).at(at * kTokenSummary);
    return {ranges(from), std::uint32_t(std::int32_t(from[2 * kTokenFields]))};
  }
  MODALIGN_DEVICE static Token<std::int32_t> token(const std::int32_t* tokens, std::int64_t in_all, std::int64_t at) {
    const Words from = Words(tokens).at(at);
    return {from[0], from[in_all], from[2 * in_all], from[3 * in_all], from[4 * in_all], from[5 * in_all], from[6 * in_all], from[7 * in_all], from[8 * in_all]};
  }
  // The number of the rule and its parameters. A number that the table should not hold is the first rule's.
  MODALIGN_DEVICE static Words rule_of(const MaskStep& s, std::int64_t h, int query_type, int key_type) {
    const std::int32_t n = Words(s.table)[(h * kTokenTypes + query_type) * kTokenTypes + key_type];
    return Words(s.rules).at((n >= 0 && n < s.rules_in_all ? n : 0) * (1 + kRuleParameters));
  }

  // Of the tile of `rows` queries and some keys that is (query_block, key_block) in blocks.
  MODALIGN_DEVICE Coverage coverage(std::int64_t b, std::int64_t h, std::int64_t query_block, std::int64_t key_block, int block, int rows) const {
    std::uint32_t any = 1, all = 1;   // the last answer in the lowest bits: whether anything and whether everything is kept
    for (int n = 0; n < program.count; ++n) {
      const MaskStep& s = program.step[n];
      const std::uint32_t any_before = any >> 1, all_before = all >> 1, some = any & ~all & 1u;
      switch (s.kind) {
        case MaskStepKind::both: any = any_before & (any | ~1u), all = all_before & (all | ~1u); break;
        case MaskStepKind::either: any = any_before | (any & 1u), all = all_before | (all & 1u); break;
        case MaskStepKind::inverse:
          if (some == 0) any ^= 1u, all ^= 1u;
          break;
        default: {
          const Coverage found = coverage_of(n, b, h / (H / s.heads), query_block, key_block, block, rows);
          any = any << 1 | std::uint32_t(found != Coverage::nothing);
          all = all << 1 | std::uint32_t(found == Coverage::everything);
        }
      }
    }
    return (any & 1u) == 0 ? Coverage::nothing : (all & 1u) != 0 ? Coverage::everything : Coverage::some;
  }

  MODALIGN_DEVICE bool keeps(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    std::uint32_t stack = 1;   // the last answer in the lowest bit; without a program everything is kept
    for (int n = 0; n < program.count; ++n) {
      const MaskStep& s = program.step[n];
      const std::uint32_t before = stack >> 1;
      switch (s.kind) {
        case MaskStepKind::both: stack = before & (stack | ~1u); break;
        case MaskStepKind::either: stack = before | (stack & 1u); break;
        case MaskStepKind::inverse: stack ^= 1u; break;
        default: stack = stack << 1 | std::uint32_t(keeps_of(s, b, h / (H / s.heads), i, j));
      }
    }
    return (stack & 1u) != 0;
  }

 private:
  MODALIGN_DEVICE Coverage coverage_of(int n, std::int64_t b, std::int64_t h, std::int64_t query_block, std::int64_t key_block, int block, int rows) const {
    const MaskStep& s = program.step[n];
    if (s.kind == MaskStepKind::relation) {
      const TokenRanges q = token_ranges(query_summary[n], (s.query_batch_stride != 0 ? b : 0) * query_blocks + query_block);
      const TokenRanges k = token_ranges(summary[n], (s.key_batch_stride != 0 ? b : 0) * key_blocks + key_block);
      return relation_coverage(q, k, [&](int query_type, int key_type) { return rule_of(s, h, query_type, key_type); });
    }
    const std::int64_t line = (s.batch_stride != 0 ? b : 0) * s.heads + h;
    if (s.kind == MaskStepKind::interval) {
      const Words at = Words(summary[n]).at((line * key_blocks + key_block) * kIntervalSummary);
      const std::int64_t begin = query_block * block, end = begin + rows;
      if (at[0] >= end || at[3] <= begin) return Coverage::nothing;
      return at[1] <= begin && at[2] >= end ? Coverage::everything : Coverage::some;
    }
    return Coverage(std::int32_t(Words(summary[n])[(line * query_blocks + query_block) * key_blocks + key_block]));
  }

  MODALIGN_DEVICE bool keeps_of(const MaskStep& s, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    if (s.kind == MaskStepKind::relation) {
      const Token<std::int32_t> q = token(s.query_tokens, s.query_tokens_in_all, b * s.query_batch_stride + i);
      const Token<std::int32_t> k = token(s.key_tokens, s.key_tokens_in_all, b * s.key_batch_stride + j);
      if (q.document != k.document || (q.valid & k.valid) == 0) return false;
      const Words rule = rule_of(s, h, q.type & (kTokenTypes - 1), k.type & (kTokenTypes - 1));
      return holds<std::int32_t>(static_cast<Rule>(std::int32_t(rule[0])), rule.at(1), q, k) != 0;
    }
    if (s.kind == MaskStepKind::interval) {
      const Words at = Words(s.intervals).at(b * s.batch_stride + h * s.head_stride + 2 * j);
      return at[0] <= i && i < at[1];
    }
    return Global<const bool>(s.pairs)[b * s.batch_stride + h * s.head_stride + i / s.tile_rows * s.row_stride + j / s.tile_columns * s.column_stride];
  }
};

// ----------------------------------------------------------------------------------------------------------------------------------- the launches
#define MODALIGN_MASK_KERNELS(X)                       \
  X("attention_mask.tokens", SummarizeTokens)          \
  X("attention_mask.intervals", SummarizeIntervals)    \
  X("attention_mask.pairs", SummarizePairs)

MODALIGN_MASK_KERNELS(MODALIGN_KEY_OF)

inline std::int64_t mask_items(std::int64_t batch_stride, std::int64_t B) { return batch_stride != 0 ? B : 1; }

// Room for the summaries of a program over B items, in blocks of `block` queries or keys.
template <class Arena> MaskView mask_view(const MaskProgram& program, std::int64_t B, std::int64_t H, std::int64_t Nq, std::int64_t Nk, int block, Arena& arena) {
  MaskView view{program, {}, {}, H, Nq, Nk, ceil_divide<std::int64_t>(Nq, block), ceil_divide<std::int64_t>(Nk, block)};
  for (int n = 0; n < program.count; ++n) {
    const MaskStep& s = program.step[n];
    if (s.kind == MaskStepKind::relation) {
      view.query_summary[n] = arena.template take<std::int32_t>("query_tokens", mask_items(s.query_batch_stride, B) * view.query_blocks * kTokenSummary);
      view.summary[n] = arena.template take<std::int32_t>("key_tokens", mask_items(s.key_batch_stride, B) * view.key_blocks * kTokenSummary);
    } else if (s.kind == MaskStepKind::interval) {
      view.summary[n] = arena.template take<std::int32_t>("intervals", mask_items(s.batch_stride, B) * s.heads * view.key_blocks * kIntervalSummary);
    } else if (s.kind == MaskStepKind::tiles || s.kind == MaskStepKind::dense) {
      view.summary[n] = arena.template take<std::int32_t>("pairs", mask_items(s.batch_stride, B) * s.heads * view.query_blocks * view.key_blocks);
    }
  }
  return view;
}

template <class Launch> int summarize_mask(const MaskView& view, std::int64_t B, int block, const Launch& launch) {
  for (int n = 0; n < view.program.count; ++n) {
    const MaskStep& s = view.program.step[n];
    const auto out = [](const std::int32_t* summary) { return const_cast<std::int32_t*>(summary); };
    if (s.kind == MaskStepKind::relation) {
      const SummarizeTokens queries{s.query_tokens, s.query_batch_stride, s.query_tokens_in_all, view.query_blocks, mask_items(s.query_batch_stride, B), block, out(view.query_summary[n])};
      const SummarizeTokens keys{s.key_tokens, s.key_batch_stride, s.key_tokens_in_all, view.key_blocks, mask_items(s.key_batch_stride, B), block, out(view.summary[n])};
      if (const int error = launch_kernel(launch, queries, 1)) return error;
      if (const int error = launch_kernel(launch, keys, 1)) return error;
    } else if (s.kind == MaskStepKind::interval) {
      const SummarizeIntervals kernel{s.intervals, s.batch_stride, s.head_stride, s.heads, view.Nk, view.key_blocks, mask_items(s.batch_stride, B), block, out(view.summary[n])};
      if (const int error = launch_kernel(launch, kernel, 1)) return error;
    } else if (s.kind == MaskStepKind::tiles || s.kind == MaskStepKind::dense) {
      const SummarizePairs kernel{s, view.Nq, view.Nk, view.query_blocks, view.key_blocks, mask_items(s.batch_stride, B), block, out(view.summary[n])};
      if (const int error = launch_kernel(launch, kernel, 1)) return error;
    }
  }
  return 0;
}

}   // namespace modalign::cuda
