// Which pairs of queries and keys an attention mask keeps: a small program over pairs, in memory that is linear in queries and keys. Nothing of torch.
//
// A program is a list of steps that leave one answer each on a stack, `both`, `either` and `inverse` combining those before them:
//
//     relation   a rule looked up by the types of query and key in a table, between tokens of the same document that are not padding
//     interval   key j is kept for the queries from first_j to last_j - 1
//     tiles      a matrix of tiles, kept or not
//     dense      a matrix of pairs, kept or not
//
// Every rule is written once, over numbers or over ranges: over the ranges of a tile's tokens it says whether nothing, everything or some of the tile is kept. Answers over
// ranges are right but need not be tight: `some` may be said of any tile.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MODALIGN_MASK_FUNCTION __host__ __device__ inline
#else
#define MODALIGN_MASK_FUNCTION inline
#endif

namespace modalign {

// ---- answers and ranges -------------------------------------------------------------------------------------------------------------------------------------

enum class Coverage : std::int32_t { nothing, some, everything };

MODALIGN_MASK_FUNCTION Coverage operator&(Coverage a, Coverage b) {
  if (a == Coverage::nothing || b == Coverage::nothing) return Coverage::nothing;
  return a == Coverage::everything && b == Coverage::everything ? Coverage::everything : Coverage::some;
}
MODALIGN_MASK_FUNCTION Coverage operator!(Coverage a) {
  return a == Coverage::nothing ? Coverage::everything : a == Coverage::everything ? Coverage::nothing : Coverage::some;
}
MODALIGN_MASK_FUNCTION Coverage operator|(Coverage a, Coverage b) { return !((!a) & (!b)); }

struct Range {
  std::int32_t low, high;
};
MODALIGN_MASK_FUNCTION Range operator-(Range a, Range b) { return {a.low - b.high, a.high - b.low}; }
MODALIGN_MASK_FUNCTION Range operator%(Range a, std::int32_t n) { return a.low == a.high ? Range{a.low % n, a.low % n} : Range{0, n - 1}; }
MODALIGN_MASK_FUNCTION Coverage operator<=(Range a, Range b) { return a.high <= b.low ? Coverage::everything : a.low > b.high ? Coverage::nothing : Coverage::some; }
MODALIGN_MASK_FUNCTION Coverage operator==(Range a, Range b) {
  if (a.high < b.low || b.high < a.low) return Coverage::nothing;
  return a.low == a.high && b.low == b.high ? Coverage::everything : Coverage::some;
}
MODALIGN_MASK_FUNCTION Coverage operator<=(Range a, std::int32_t b) { return a <= Range{b, b}; }
MODALIGN_MASK_FUNCTION Coverage operator<=(std::int32_t a, Range b) { return Range{a, a} <= b; }

// ---- rules --------------------------------------------------------------------------------------------------------------------------------------------------

enum class Rule : std::int32_t {
  never,
  always,
  causal,                    // k.index <= q.index
  self,                      // k.index = q.index
  same_segment,              // k.segment = q.segment >= 0
  causal_or_same_segment,
  causal_window,             // 0 <= q.index - k.index < p[0]
  band,                      // -p[0] <= k.index - q.index <= p[1]
  grid_clip,                 // the same segment, |t| <= p[0], |y| <= p[1], |x| <= p[2] apart
  grid_shift,                // a neighbourhood: `in_neighborhood` along t, y and x with p[0 ... 4], p[5 ... 9], p[10 ... 14]
  last_segment,              // k.segment = q.last >= 0
  up_to_last_segment,        // 0 <= k.segment <= q.last
  same_time,                 // the same segment and t
  time_stride,               // the same segment, t equal modulo p[0]
  same_site,                 // the same segment, y and x
  causal_not_same_segment,
};
constexpr int kRules = 16, kRuleParameters = 15, kTokenTypes = 16;

// Fields of a token, in this order in memory: [fields][tokens] int32. segment, last: -1 for none.
template <class X>
struct Token {
  X index, type, segment, last, document, t, y, x, valid;
};
constexpr int kTokenFields = 9;

// Parameters of rules are read through a pointer, or through a view that a device gives; this is the one that begins n further on.
MODALIGN_MASK_FUNCTION const std::int32_t* parameters_from(const std::int32_t* p, int n) { return p + n; }

// Neighbourhood attention along one dimension: size, kernel, dilation, stride, causal. The first key of query i's window among `size` tokens of the same residue. A window is shifted where
// it would leave the grid, so every query has `kernel` keys. Rises with i and with the size.
template <class P>
MODALIGN_MASK_FUNCTION std::int32_t first_neighbor(std::int32_t i, std::int32_t size, const P& p) {
  const std::int32_t kernel = p[1], stride = p[3], causal = p[4];
  std::int32_t center = i / stride * stride + (causal ? stride - 1 : stride / 2);
  center = center < size - 1 ? center : size - 1;
  const std::int32_t left = causal ? kernel - 1 : kernel / 2, right = kernel - left - 1, first = center > left ? center - left : 0;
  return !causal && center + right >= size ? size - kernel : first;
}
template <class P>
MODALIGN_MASK_FUNCTION std::int32_t in_neighborhood(std::int32_t q, std::int32_t k, const P& p) {
  const std::int32_t kernel = p[1], dilation = p[2], causal = p[4], residue = q % dilation;
  const std::int32_t size = (p[0] - residue + dilation - 1) / dilation, i = q / dilation, j = k / dilation;   // within the tokens of the same residue
  const std::int32_t first = first_neighbor(i, size, p), end = causal ? i + 1 : first + kernel;
  return std::int32_t(k % dilation == residue) & std::int32_t(first <= j) & std::int32_t(j < end);
}
template <class P>
MODALIGN_MASK_FUNCTION Coverage in_neighborhood(Range q, Range k, const P& p) {
  const std::int32_t kernel = p[1], dilation = p[2], causal = p[4], low = q.low / dilation, high = q.high / dilation;
  const std::int32_t least = p[0] / dilation, most = (p[0] + dilation - 1) / dilation;   // tokens of a residue
  const std::int32_t first = first_neighbor(low, least, p) * dilation, last = (causal ? high : first_neighbor(high, most, p) + kernel - 1) * dilation + dilation - 1;
  if (k.high < first || last < k.low) return Coverage::nothing;
  if (dilation > 1) return Coverage::some;
  const std::int32_t end = causal ? low + 1 : first_neighbor(low, most, p) + kernel;
  return first_neighbor(high, most, p) <= k.low && k.high < end ? Coverage::everything : Coverage::some;
}

MODALIGN_MASK_FUNCTION std::int32_t truth(bool x) { return x; }
MODALIGN_MASK_FUNCTION Coverage truth(Coverage x) { return x; }
MODALIGN_MASK_FUNCTION std::int32_t opposite(std::int32_t x) { return 1 - x; }
MODALIGN_MASK_FUNCTION Coverage opposite(Coverage x) { return !x; }

template <class X> struct AnswerOf { using type = std::int32_t; };
template <> struct AnswerOf<Range> { using type = Coverage; };
template <class X> using Answer = typename AnswerOf<X>::type;
MODALIGN_MASK_FUNCTION void answer(bool kept, std::int32_t& to) { to = kept; }
MODALIGN_MASK_FUNCTION void answer(bool kept, Coverage& to) { to = kept ? Coverage::everything : Coverage::nothing; }

// Whether a rule keeps key k for query q, types and documents apart.
template <class X, class P>
MODALIGN_MASK_FUNCTION Answer<X> holds(Rule rule, const P& p, const Token<X>& q, const Token<X>& k) {
  const auto within = [](X apart, std::int32_t reach) { return truth(apart <= reach) & truth(-reach <= apart); };
  const auto causal = [&] { return truth(k.index <= q.index); };
  const auto same_segment = [&] { return truth(k.segment == q.segment) & truth(0 <= q.segment); };
  Answer<X> constant;
  answer(rule == Rule::always, constant);
  switch (rule) {
    case Rule::always: return constant;
    case Rule::causal: return causal();
    case Rule::self: return truth(k.index == q.index);
    case Rule::same_segment: return same_segment();
    case Rule::causal_or_same_segment: return causal() | same_segment();
    case Rule::causal_window: return causal() & truth(q.index - k.index <= p[0] - 1);
    case Rule::band: return truth(k.index - q.index <= p[1]) & truth(-p[0] <= k.index - q.index);
    case Rule::grid_clip: return same_segment() & within(k.t - q.t, p[0]) & within(k.y - q.y, p[1]) & within(k.x - q.x, p[2]);
    case Rule::grid_shift: return same_segment() & in_neighborhood(q.t, k.t, p) & in_neighborhood(q.y, k.y, parameters_from(p, 5)) &
                                  in_neighborhood(q.x, k.x, parameters_from(p, 10));
    case Rule::last_segment: return truth(k.segment == q.last) & truth(0 <= q.last);
    case Rule::up_to_last_segment: return truth(0 <= k.segment) & truth(k.segment <= q.last);
    case Rule::same_time: return same_segment() & truth(k.t == q.t);
    case Rule::time_stride: return same_segment() & truth(k.t % p[0] == q.t % p[0]);
    case Rule::same_site: return same_segment() & truth(k.y == q.y) & truth(k.x == q.x);
    case Rule::causal_not_same_segment: return causal() & opposite(same_segment());
    default: return constant;
  }
}

// What the tokens of a block have between them.
struct TokenRanges {
  Token<Range> range;
  std::uint32_t types;   // a bit for each
};

MODALIGN_MASK_FUNCTION int lowest_bit(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

// Of the pairs of two blocks under a table: rule_of(type of query, type of key) gives the number of a rule and its parameters behind it.
template <class F>
MODALIGN_MASK_FUNCTION Coverage relation_coverage(const TokenRanges& q, const TokenRanges& k, const F& rule_of) {
  const Coverage there = (q.range.document == k.range.document) & (1 <= q.range.valid) & (1 <= k.range.valid);
  if (there == Coverage::nothing) return there;
  bool any = false, all = true;
  for (std::uint32_t query_types = q.types; query_types; query_types &= query_types - 1)
    for (std::uint32_t key_types = k.types; key_types; key_types &= key_types - 1) {
      const auto rule = rule_of(lowest_bit(query_types), lowest_bit(key_types));
      const Coverage c = holds<Range>(static_cast<Rule>(std::int32_t(rule[0])), parameters_from(rule, 1), q.range, k.range);
      any |= c != Coverage::nothing, all &= c == Coverage::everything;
    }
  return there & (!any ? Coverage::nothing : all ? Coverage::everything : Coverage::some);
}

// ---- programs -----------------------------------------------------------------------------------------------------------------------------------------------

enum class MaskStepKind : std::int32_t { relation, interval, tiles, dense, both, either, inverse };
constexpr int kMaskSteps = 16;

struct MaskStep {
  MaskStepKind kind;
  std::int64_t heads;                // of the table, intervals, tiles or matrix: divides H
  std::int64_t batch_stride;         // 0 where items share it
  // relation: tokens [batch, kTokenFields, N]
  const std::int32_t *query_tokens, *key_tokens;
  std::int64_t query_batch_stride, key_batch_stride, query_tokens_in_all, key_tokens_in_all;
  const std::int32_t* table;         // [heads][kTokenTypes][kTokenTypes] numbers of rules
  const std::int32_t* rules;         // [rules in all][1 + kRuleParameters]: Rule, parameters
  std::int64_t rules_in_all;
  // interval: [batch, heads, Nk, 2]
  const std::int32_t* intervals;
  std::int64_t head_stride;          // also of tiles and dense
  // tiles: [batch, heads, ceil(Nq / tile_rows), ceil(Nk / tile_columns)]; dense: [batch, heads, Nq, Nk]
  const bool* pairs;
  std::int64_t row_stride, column_stride, tile_rows, tile_columns;
};

struct MaskProgram {
  int count;   // 0: everything is kept
  MaskStep step[kMaskSteps];
};

}  // namespace modalign
