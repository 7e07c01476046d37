// The programs of ops/attention_mask.h on the CPU: coverage of a tile, and lines of pairs.
#pragma once

#include <limits>

#include "cpu/tile.h"
#include "ops/attention_mask.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {

constexpr std::int64_t kMaskBlock = kTileRows;   // queries or keys whose tokens are summed up together, and the longest line

template <class F>
inline void for_each_field(Token<Range>& token, const F& f) {
  Range* const fields[kTokenFields] = {&token.index, &token.type, &token.segment, &token.last, &token.document, &token.t, &token.y, &token.x, &token.valid};
  for (int n = 0; n < kTokenFields; ++n) f(n, *fields[n]);
}

inline TokenRanges ranges_of(const std::int32_t* tokens, std::int64_t tokens_in_all, std::int64_t first, std::int64_t count) {
  TokenRanges found{};
  for_each_field(found.range, [&](int field, Range& range) {
    const std::int32_t* from = tokens + field * tokens_in_all + first;
    range = {from[0], from[0]};
    for (std::int64_t n = 1; n < count; ++n) range.low = from[n] < range.low ? from[n] : range.low, range.high = from[n] > range.high ? from[n] : range.high;
  });
  for (std::int64_t n = 0; n < count; ++n) found.types |= 1u << tokens[tokens_in_all + first + n];
  return found;
}

// Of the intervals of a block of keys; those that are empty begin nowhere and end nowhere, but for `first.high` and `last.low`.
struct IntervalRanges {
  Range first, last;
};
inline IntervalRanges intervals_between(const std::int32_t* at, std::int64_t count) {
  constexpr std::int32_t most = std::numeric_limits<std::int32_t>::max();
  IntervalRanges found{{most, -most}, {most, -most}};
  for (std::int64_t n = 0; n < count; ++n) {
    const Range each{at[2 * n], at[2 * n + 1]};
    const bool empty = each.low >= each.high;
    const std::int32_t low = empty ? most : each.low, high = empty ? -most : each.high;
    found.first = {low < found.first.low ? low : found.first.low, low > found.first.high ? low : found.first.high};
    found.last = {high < found.last.low ? high : found.last.low, high > found.last.high ? high : found.last.high};
  }
  return found;
}

// A token at `first`, or as many as a loop needs: value(field, n).
template <bool many>
struct TokenLine {
  const std::int32_t* tokens;   // of field 0, at the first token
  std::int64_t tokens_in_all;
  std::int32_t value(int field, std::int64_t n) const { return tokens[field * tokens_in_all + (many ? n : 0)]; }
  __attribute__((always_inline)) Token<std::int32_t> token(std::int64_t n) const {
    return {value(0, n), value(1, n), value(2, n), value(3, n), value(4, n), value(5, n), value(6, n), value(7, n), value(8, n)};
  }
};

// keep[n] |= whether the rule holds, for n with the given type. One loop per rule, which the compiler turns into vectors (but for remainders), as `keep` overlaps no tokens.
template <Rule rule, bool lines_are_keys>
inline void add_rule(const std::int32_t* p, std::int32_t type, const TokenLine<!lines_are_keys>& key, const TokenLine<lines_are_keys>& query, std::int64_t count, std::int32_t* keep) {
#pragma GCC ivdep
  for (std::int64_t n = 0; n < count; ++n) {
    const Token<std::int32_t> q = query.token(n), k = key.token(n);
    const std::int32_t applies = std::int32_t((lines_are_keys ? q.type : k.type) == type) & std::int32_t(q.document == k.document) & q.valid & k.valid;
    keep[n] |= applies & holds<std::int32_t>(rule, p, q, k);
  }
}
template <bool lines_are_keys>
inline void add_rule(Rule rule, const std::int32_t* p, std::int32_t type, const TokenLine<!lines_are_keys>& key, const TokenLine<lines_are_keys>& query, std::int64_t count, std::int32_t* keep) {
  const auto of = [&](auto constant) { add_rule<decltype(constant)::value, lines_are_keys>(p, type, key, query, count, keep); };
  switch (rule) {
#define MODALIGN_RULE(name) \
  case Rule::name: return of(std::integral_constant<Rule, Rule::name>());
    MODALIGN_RULE(always)
    MODALIGN_RULE(causal)
    MODALIGN_RULE(self)
    MODALIGN_RULE(same_segment)
    MODALIGN_RULE(causal_or_same_segment)
    MODALIGN_RULE(causal_window)
    MODALIGN_RULE(band)
    MODALIGN_RULE(grid_clip)
    MODALIGN_RULE(grid_shift)
    MODALIGN_RULE(last_segment)
    MODALIGN_RULE(up_to_last_segment)
    MODALIGN_RULE(same_time)
    MODALIGN_RULE(time_stride)
    MODALIGN_RULE(same_site)
    MODALIGN_RULE(causal_not_same_segment)
#undef MODALIGN_RULE
    default: return;   // never
  }
}

// A program with the ranges of all blocks of tokens.
class Mask {
 public:
  static std::int64_t blocks(std::int64_t n) { return (n + kMaskBlock - 1) / kMaskBlock; }

  Mask(const MaskProgram& program, std::int64_t B, std::int64_t H, std::int64_t Nq, std::int64_t Nk, Arena& arena) : program_(program), B_(B), H_(H), Nq_(Nq), Nk_(Nk) {
    for (int n = 0; n < program.count; ++n)
      if (program.step[n].kind == MaskStepKind::relation) {
        query_ranges_[n] = arena.take<TokenRanges>(items(program.step[n].query_batch_stride) * blocks(Nq));
        key_ranges_[n] = arena.take<TokenRanges>(items(program.step[n].key_batch_stride) * blocks(Nk));
      } else if (program.step[n].kind == MaskStepKind::interval) {
        interval_ranges_[n] = arena.take<IntervalRanges>(items(program.step[n].batch_stride) * program.step[n].heads * blocks(Nk));
      }
  }
  void prepare(const Parallel& parallel) const {
    for (int n = 0; n < program_.count; ++n) {
      const MaskStep& s = program_.step[n];
      if (s.kind == MaskStepKind::interval)
        parallel_for(parallel, 0, items(s.batch_stride) * s.heads * blocks(Nk_), 64, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t t = begin; t < end; ++t) {
            const std::int64_t line = t / blocks(Nk_), first = t % blocks(Nk_) * kMaskBlock;
            interval_ranges_[n][t] = intervals_between(s.intervals + line / s.heads * s.batch_stride + line % s.heads * s.head_stride + first * 2, minimum(kMaskBlock, Nk_ - first));
          }
        });
      if (s.kind != MaskStepKind::relation) continue;
      const auto fill = [&](TokenRanges* to, const std::int32_t* tokens, std::int64_t batch_stride, std::int64_t in_all, std::int64_t N) {
        parallel_for(parallel, 0, items(batch_stride) * blocks(N), 16, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t t = begin; t < end; ++t) {
            const std::int64_t first = t % blocks(N) * kMaskBlock;
            to[t] = ranges_of(tokens + t / blocks(N) * batch_stride, in_all, first, minimum(kMaskBlock, N - first));
          }
        });
      };
      fill(query_ranges_[n], s.query_tokens, s.query_batch_stride, s.query_tokens_in_all, Nq_);
      fill(key_ranges_[n], s.key_tokens, s.key_batch_stride, s.key_tokens_in_all, Nk_);
    }
  }

  bool keeps_all() const { return program_.count == 0; }

  // Consecutive heads that share the mask, and whether the items do; whether it pays to test pairs once for them, which relations alone take long enough for.
  std::int64_t sharing_heads() const {
    std::int64_t common = H_;   // divisor
    for (int n = 0; n < program_.count; ++n)
      for (std::int64_t other = program_.step[n].heads > 0 ? H_ / program_.step[n].heads : 0; other;) {
        const std::int64_t rest = common % other;
        common = other, other = rest;
      }
    return common;
  }
  bool shared_by_items() const {
    std::int64_t strides = 0;
    for (int n = 0; n < program_.count; ++n) strides |= program_.step[n].batch_stride | program_.step[n].query_batch_stride | program_.step[n].key_batch_stride;
    return strides == 0;
  }
  std::int64_t queries() const { return Nq_; }
  std::int64_t keys() const { return Nk_; }
  bool shared() const {
    bool relations = false;
    for (int n = 0; n < program_.count; ++n) relations |= program_.step[n].kind == MaskStepKind::relation;
    return relations && (sharing_heads() > 1 || (B_ > 1 && shared_by_items()));
  }

  // Of the tile of at most kMaskBlock queries and keys from (i, j), multiples of kMaskBlock.
  Coverage coverage(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t rows, std::int64_t j, std::int64_t columns) const {
    Coverage stack[kMaskSteps];
    int top = 0;
    for (int n = 0; n < program_.count; ++n) {
      const MaskStep& s = program_.step[n];
      switch (s.kind) {
        case MaskStepKind::both: --top, stack[top - 1] = stack[top - 1] & stack[top]; break;
        case MaskStepKind::either: --top, stack[top - 1] = stack[top - 1] | stack[top]; break;
        case MaskStepKind::inverse: stack[top - 1] = !stack[top - 1]; break;
        default: stack[top++] = coverage_of(n, b, h / (H_ / s.heads), i, rows, j, columns);
      }
    }
    return program_.count ? stack[0] : Coverage::everything;
  }

  // keep[k] = 1 or 0 along a line of `count` pairs: of key `line` with the queries from `first` on, or of query `line` with keys.
  template <bool lines_are_keys>
  void line(std::int64_t b, std::int64_t h, std::int64_t line, std::int64_t first, std::int64_t count, std::int32_t* keep) const {
    std::int32_t stack[kMaskSteps / 2 + 1][kMaskBlock];
    int top = 0;
    for (int n = 0; n < program_.count; ++n) {
      const MaskStep& s = program_.step[n];
      std::int32_t *last = stack[top ? top - 1 : 0], *before = stack[top > 1 ? top - 2 : 0];
      switch (s.kind) {
        case MaskStepKind::both:
          for (std::int64_t k = 0; k < count; ++k) before[k] &= last[k];
          --top;
          break;
        case MaskStepKind::either:
          for (std::int64_t k = 0; k < count; ++k) before[k] |= last[k];
          --top;
          break;
        case MaskStepKind::inverse:
          for (std::int64_t k = 0; k < count; ++k) last[k] = 1 - last[k];
          break;
        default: line_of<lines_are_keys>(s, b, h / (H_ / s.heads), line, first, count, stack[top++]);
      }
    }
    for (std::int64_t k = 0; k < count; ++k) keep[k] = stack[0][k];
  }

 private:
  std::int64_t items(std::int64_t batch_stride) const { return batch_stride ? B_ : 1; }
  static const std::int32_t* rule_of(const MaskStep& s, std::int64_t h, int tq, int tk) { return s.rules + s.table[(h * kTokenTypes + tq) * kTokenTypes + tk] * (1 + kRuleParameters); }

  Coverage coverage_of(int n, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t rows, std::int64_t j, std::int64_t columns) const {
    const MaskStep& s = program_.step[n];
    bool any = false, all = true;
    const auto see = [&](bool kept) { any |= kept, all &= kept; };
    if (s.kind == MaskStepKind::relation) {
      const TokenRanges& q = query_ranges_[n][(s.query_batch_stride ? b : 0) * blocks(Nq_) + i / kMaskBlock];
      const TokenRanges& k = key_ranges_[n][(s.key_batch_stride ? b : 0) * blocks(Nk_) + j / kMaskBlock];
      return relation_coverage(q, k, [&](int tq, int tk) { return rule_of(s, h, tq, tk); });
    }
    if (s.kind == MaskStepKind::interval) {
      const IntervalRanges& between = interval_ranges_[n][((s.batch_stride ? b : 0) * s.heads + h) * blocks(Nk_) + j / kMaskBlock];
      if (between.first.low >= i + rows || between.last.high <= i) return Coverage::nothing;
      if (between.first.high <= i && i + rows <= between.last.low) return Coverage::everything;
      const std::int32_t* at = s.intervals + b * s.batch_stride + h * s.head_stride + j * 2;
      for (std::int64_t c = 0; c < columns; ++c) any |= at[2 * c] < i + rows && i < at[2 * c + 1] && at[2 * c] < at[2 * c + 1], all &= at[2 * c] <= i && i + rows <= at[2 * c + 1];
    } else {
      const bool* pairs = s.pairs + b * s.batch_stride + h * s.head_stride;
      const std::int64_t r0 = i / s.tile_rows, r1 = s.row_stride ? (i + rows - 1) / s.tile_rows : r0, c0 = j / s.tile_columns, c1 = s.column_stride ? (j + columns - 1) / s.tile_columns : c0;
      for (std::int64_t r = r0; r <= r1; ++r)
        for (std::int64_t c = c0; c <= c1; ++c) see(pairs[r * s.row_stride + c * s.column_stride]);
    }
    return !any ? Coverage::nothing : all ? Coverage::everything : Coverage::some;
  }

  template <bool lines_are_keys>
  void line_of(const MaskStep& s, std::int64_t b, std::int64_t h, std::int64_t line, std::int64_t first, std::int64_t count, std::int32_t* keep) const {
    const std::int64_t i = lines_are_keys ? first : line, j = lines_are_keys ? line : first;
    if (s.kind == MaskStepKind::relation) {
      const TokenLine<lines_are_keys> query{s.query_tokens + b * s.query_batch_stride + i, s.query_tokens_in_all};
      const TokenLine<!lines_are_keys> key{s.key_tokens + b * s.key_batch_stride + j, s.key_tokens_in_all};
      for (std::int64_t k = 0; k < count; ++k) keep[k] = 0;
      std::uint32_t types = 0;   // along the line
      for (std::int64_t k = 0; k < count; ++k) types |= 1u << (lines_are_keys ? query.value(1, k) : key.value(1, k));
      const std::int32_t own = lines_are_keys ? key.value(1, 0) : query.value(1, 0);
      for (; types; types &= types - 1) {
        const std::int32_t other = lowest_bit(types), tq = lines_are_keys ? other : own, tk = lines_are_keys ? own : other;
        const std::int32_t* rule = rule_of(s, h, tq, tk);
        add_rule<lines_are_keys>(static_cast<Rule>(rule[0]), rule + 1, other, key, query, count, keep);
      }
    } else if (s.kind == MaskStepKind::interval) {
      const std::int32_t* at = s.intervals + b * s.batch_stride + h * s.head_stride + j * 2;
      const auto low = static_cast<std::int32_t>(i);
      if (lines_are_keys) for (std::int32_t k = 0; k < count; ++k) keep[k] = std::int32_t(at[0] <= low + k) & std::int32_t(low + k < at[1]);
      else for (std::int64_t k = 0; k < count; ++k) keep[k] = std::int32_t(at[2 * k] <= low) & std::int32_t(low < at[2 * k + 1]);
    } else {
      const bool* pairs = s.pairs + b * s.batch_stride + h * s.head_stride;
      if (lines_are_keys) spread(pairs + j / s.tile_columns * s.column_stride, s.row_stride, s.tile_rows, i, count, keep);
      else spread(pairs + i / s.tile_rows * s.row_stride, s.column_stride, s.tile_columns, j, count, keep);
    }
  }

  // keep[k]: of the tile that holds first + k.
  static void spread(const bool* tiles, std::int64_t stride, std::int64_t size, std::int64_t first, std::int64_t count, std::int32_t* keep) {
    if (size == 1)
      for (std::int64_t k = 0; k < count; ++k) keep[k] = tiles[(first + k) * stride];
    else
      for (std::int64_t k = 0, tile = first / size; k < count; ++tile)
        for (const std::int64_t end = minimum(count, (tile + 1) * size - first); k < end; ++k) keep[k] = tiles[tile * stride];
  }

  const MaskProgram& program_;
  std::int64_t B_, H_, Nq_, Nk_;
  TokenRanges *query_ranges_[kMaskSteps] = {}, *key_ranges_[kMaskSteps] = {};
  IntervalRanges* interval_ranges_[kMaskSteps] = {};
};

// The pairs of tiles that a mask keeps in part, tested once for the heads and items that share it, as long as a task meets the same block of lanes again and again. Lines are keys and lanes
// queries, or the other way round.
template <bool lines_are_keys>
class TestedTiles {
 public:
  explicit TestedTiles(const Mask& mask)
      : mask_(mask), heads_(mask.sharing_heads()), by_items_(mask.shared_by_items()), room_(mask.shared() ? minimum(kRoom, Mask::blocks(lines_are_keys ? mask.keys() : mask.queries())) : 1),
        holds_(room_), kept_(mask.keeps_all() ? 0 : room_ * kMaskBlock * kMaskBlock) {
    forget();
  }

  // [lines][kMaskBlock] of the tile from (i, j), multiples of kMaskBlock: 1 where a pair is kept.
  const std::uint8_t* tile(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) {
    const std::int64_t owner[] = {by_items_ ? 0 : b, h / heads_, lines_are_keys ? i : j}, passing = lines_are_keys ? j : i, at = passing / kMaskBlock % room_;
    if (std::memcmp(owner, owner_, sizeof owner) != 0) forget(), std::memcpy(owner_, owner, sizeof owner);
    std::uint8_t* const kept = kept_ + at * kMaskBlock * kMaskBlock;
    if (holds_[at] == passing) return kept;
    holds_[at] = passing;
    const std::int64_t rows = minimum(kMaskBlock, mask_.queries() - i), columns = minimum(kMaskBlock, mask_.keys() - j);   // beyond an item's length too: others may be longer
    std::int32_t keep[kMaskBlock];
    for (std::int64_t line = 0; line < (lines_are_keys ? columns : rows); ++line) {
      const std::int64_t count = lines_are_keys ? rows : columns;
      mask_.line<lines_are_keys>(b, h, passing + line, lines_are_keys ? i : j, count, keep);
      for (std::int64_t k = 0; k < count; ++k) kept[line * kMaskBlock + k] = static_cast<std::uint8_t>(keep[k]);
    }
    return kept;
  }

 private:
  static constexpr std::int64_t kRoom = 256;   // 2.25 MiB

  void forget() {
    for (std::int64_t n = 0; n < room_; ++n) holds_[n] = -1;
  }

  const Mask& mask_;
  std::int64_t heads_;
  bool by_items_;
  std::int64_t room_, owner_[3] = {-1, -1, -1};
  Scratch<std::int64_t> holds_;   // first line of the tile in each place
  Scratch<std::uint8_t> kept_;
};

}  // inline namespace
}  // namespace modalign::cpu
