// What the probabilities of an attention add up to along a column or a row, with no Nq x Nk matrix; compiled once per instruction set.
//
// Maths      ops/attention_scores.h. The log-sum-exp of every row is known, so one more product of queries and keys gives p tile by tile.
// Mapping    a task owns kBlock keys of a head (queries, for rows) and meets all queries (keys) in order. What it owns lies across the lanes, so that nothing is summed over lanes.
// Cost       2 D FLOPs for each pair of the tiles of which something is kept by a query of weight other than 0. Memory: the other operand is read where it lies or copied once, as in masked_attention.cpp.
// Precision  sums are chains of kBlock, added in order. All in float, double for double. Equal bits for any threads: every result has one owner.

#include "cpu/attention_scores.h"

#include "cpu/attention.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {
namespace {

enum class Score { probability, square, maximum, kept, entropy };

// What a pair adds.
template <class T, Score score>
inline Vector<T> score_of(Vector<T> log_p, T weight) {
  const Vector<T> p = exponential<T>(log_p), w = broadcast(weight);
  const Vector<T> found = score == Score::kept ? w : score == Score::square ? w * p * p : score == Score::entropy ? -p * log_p : w * p;
  return log_p == broadcast(kNothing<T>) ? Vector<T>{} : found;
}

template <class T, Score score>
inline Vector<T> join(Vector<T> before, Vector<T> now) {
  if constexpr (score == Score::maximum) return (now > before) | (now != now) ? now : before;   // a NaN stays
  else return before + now;
}

// The lines of a tile are the operand that passes by: keys where a task owns queries.
template <bool lines_are_keys, class T>
struct ScoreBuffers {
  Mask mask;
  Operand<T> lines;
  ScoreBuffers(const AttentionProblem& p, Arena& arena)
      : mask(p.mask, p.B, p.H, p.Nq, p.Nk, arena), lines(p, lines_are_keys ? p.key : p.query, lines_are_keys, p.D, false, arena) {}
};
template <class T> using ColumnBuffers = ScoreBuffers<false, T>;
template <class T> using RowBuffers = ScoreBuffers<true, T>;

template <class T>
struct ScoreBlock {
  static constexpr int L = kVectorLanes<T>;
  Scratch<T> panels, tile, addend, row, edge;   // [D][kBlock] panels, [lines][kBlock], the same
  Scratch<T> lse, weight, found;                // [kBlock], [kBlock], [scores][kBlock]
  ScoreBlock(std::int64_t D, std::int64_t scores)
      : panels(kBlock * D), tile(kBlock * kBlock), addend(kBlock * kBlock), row(kBlock * D), edge(kRegisterRows * D), lse(kBlock), weight(kBlock), found(scores * kBlock) {
    for (std::int64_t n = 0; n < kBlock * kBlock; ++n) addend[n] = 0;   // lanes beyond the last are computed with
    for (std::int64_t n = 0; n < kBlock; ++n) lse[n] = 0, weight[n] = 1;
    for (std::int64_t n = 0; n < scores * kBlock; ++n) found[n] = 0;
  }

  // Products become log p, and the scores are joined with those of the tiles before. Queries, whose lse and weight it is, are lanes or lines.
  template <bool lines_are_keys, Score... scores>
  void fold(const Logit<T>& logit, std::int64_t width, std::int64_t lines, bool added) {
    for (std::int64_t c = 0; c < width; c += L) {
      Vector<T> total[sizeof...(scores)] = {};
      for (std::int64_t line = 0; line < lines; ++line) {
        if (!lines_are_keys && weight[line] == 0) continue;
        const Vector<T> x = logit(load(tile + line * kBlock + c)), z = added ? with_addend<T>(x, load(addend + line * kBlock + c)) : x;
        const Vector<T> log_p = z == broadcast(kNothing<T>) ? z : z - (lines_are_keys ? load(lse + c) : broadcast(lse[line]));   // lse may be NaN
        int n = 0;
        ((total[n] = join<T, scores>(total[n], score_of<T, scores>(log_p, lines_are_keys ? T(1) : weight[line])), ++n), ...);
      }
      int n = 0;
      ((store(found + n * kBlock + c, join<T, scores>(load(found + n * kBlock + c), total[n])), ++n), ...);
    }
  }
};

// to[n] gets score n of every lane, [B, H, lanes].
template <bool lines_are_keys, Score... scores, class T>
void harvest(const AttentionProblem& p, const void* lse, const AttentionWeights& weights, void* const* to, const ScoreBuffers<lines_are_keys, T>& buffers, const Parallel& parallel) {
  buffers.mask.prepare(parallel);
  buffers.lines.fill(p, parallel);
  const Logit<T> logit{static_cast<T>(p.scale), static_cast<T>(p.cap)};
  const std::int64_t group = p.H / p.Hkv, lanes_in_all = lines_are_keys ? p.Nq : p.Nk;
  for (std::size_t n = 0; n < sizeof...(scores); ++n) std::memset(to[n], 0, p.B * p.H * lanes_in_all * sizeof(T));   // keys beyond a length, which no task visits
  const auto make = [&] { return TestedTiles<lines_are_keys>(buffers.mask); };
  for_each_block(p, p.H, !lines_are_keys, buffers.mask.shared(), parallel, make, [&](TestedTiles<lines_are_keys>& tested, std::int64_t h, std::int64_t b, const Sequence& s, std::int64_t first, std::int64_t lanes) {
    const HeadPairs pairs(p, buffers.mask, s, b, h);
    const Lines<T> lines = buffers.lines.lines(s, lines_are_keys ? h / group : h);
    const T* const row_lse = static_cast<const T*>(lse) + (b * p.H + h) * p.Nq;
    const T* const row_weight = static_cast<const T*>(weights.data) + b * weights.batch_stride + h * weights.head_stride;
    const std::int64_t width = round_up(lanes, kPanelColumns<T>);
    ScoreBlock<T> block(p.D, sizeof...(scores));
    if (lines_are_keys) pack_columns<T>(p.dtype, p.query, b, h, [&](std::int64_t r) { return first + r; }, lanes, p.D, block.row, block.panels);
    else pack_columns<T>(p.dtype, p.key, b, h / group, [&](std::int64_t r) { return first + r; }, lanes, p.D, block.row, block.panels);
    if (lines_are_keys) std::memcpy(block.lse, row_lse + first, lanes * sizeof(T));
    const auto coverage = [&](std::int64_t at, std::int64_t count) { return lines_are_keys ? pairs.coverage(first, lanes, at, count) : pairs.coverage(at, count, first, lanes); };
    const auto ahead = [&](const Kept& next) { lines.prefetch(next.at, next.count, p.D); };
    for_each_kept(lines_are_keys ? s.keys : s.queries, coverage, ahead, [&](const Kept& now) {
      bool any = lines_are_keys;
      for (std::int64_t i = 0; !lines_are_keys && i < now.count; ++i) {
        block.lse[i] = row_lse[now.at + i], block.weight[i] = row_weight[(now.at + i) * weights.row_stride];
        any |= block.weight[i] != 0;
      }
      if (!any) return;
      tile_product_by_rows<T>(lines.data + now.at * lines.ld, lines.ld, now.count, block.panels, width, p.D, block.tile, kBlock, block.edge);
      const bool added = now.coverage == Coverage::some || pairs.has_bias();
      if (added) pairs.addends(tested, lines_are_keys ? first : now.at, lines_are_keys ? lanes : now.count, lines_are_keys ? now.at : first, lines_are_keys ? now.count : lanes, +block.addend);
      block.template fold<lines_are_keys, scores...>(logit, width, now.count, added);
    });
    for (std::size_t n = 0; n < sizeof...(scores); ++n) std::memcpy(static_cast<T*>(to[n]) + (b * p.H + h) * lanes_in_all + first, block.found + n * kBlock, lanes * sizeof(T));
  });
}

// ---- entry points -------------------------------------------------------------------------------------------------------------------------------------------

template <template <class> class Buffers>
std::int64_t workspace(const AttentionProblem& p) {
  return with_real(p.dtype, [&](auto real) {
    Arena arena(nullptr);
    Buffers<decltype(real)>(p, arena);
    return arena.used();
  });
}

void run_columns(const AttentionProblem& p, const AttentionColumns& to, void* workspace, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) {
    Arena arena(workspace);
    const ColumnBuffers<decltype(real)> buffers(p, arena);
    switch (to.reduction) {
      case ColumnReduction::sum: return harvest<false, Score::probability>(p, to.lse, to.weights, &to.out, buffers, parallel);
      case ColumnReduction::square: return harvest<false, Score::square>(p, to.lse, to.weights, &to.out, buffers, parallel);
      case ColumnReduction::maximum: return harvest<false, Score::maximum>(p, to.lse, to.weights, &to.out, buffers, parallel);
      case ColumnReduction::kept: return harvest<false, Score::kept>(p, to.lse, to.weights, &to.out, buffers, parallel);
    }
  });
}
void run_rows(const AttentionProblem& p, const AttentionRowStatistics& to, void* workspace, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) {
    Arena arena(workspace);
    void* const both[] = {to.entropy, to.maximum};
    harvest<true, Score::entropy, Score::maximum>(p, to.lse, {}, both, RowBuffers<decltype(real)>(p, arena), parallel);
  });
}

}  // namespace

extern const AttentionScoreKernels kAttentionScoreKernels;
const AttentionScoreKernels kAttentionScoreKernels = {workspace<ColumnBuffers>, run_columns, workspace<RowBuffers>, run_rows};

}  // inline namespace
}  // namespace modalign::cpu
