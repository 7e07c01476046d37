/// @file attention_scores.cuh
/// @brief What the probabilities of an attention add up to along a column or a row, on CUDA: kernels, launch sequences, the table of compiled instances.
///
/// Maths      ops/attention_scores.h. The log-sum-exp of every row is known, so one more product of queries and keys gives p tile by tile.
/// Mapping    summaries of the mask (attention_mask.cuh), then a block per tile of keys of a query head (for rows: of queries) meets the tiles of the other side in order: products in shared
///            memory, then a warp per line adds what its pairs give to what the line has from the tiles before. Tiles whose queries all have weight 0 are passed over; counting what is kept
///            makes no products.
/// Numbers    f32, f64: FmaBackend in the input precision. bf16, f16: tensor cores, fp32 accumulation. NaN stays in the products of its line, so operands are read where they lie.
/// FLOPs      2 D for a pair that lies in a kept tile. Memory: the summaries.
/// Order      sums over D ascending; of a line by the butterfly of a warp, tiles in order. No atomics: equal bits from run to run.
/// Registers  two blocks a multiprocessor, at most 128.
#pragma once

#include "cuda/attention.cuh"
#include "ops/attention_scores.h"

namespace modalign::cuda {

// NaN stays.
template <class Real> MODALIGN_DEVICE Real join(bool most, Real before, Real now) { return !most ? before + now : now > before || now != now ? now : before; }

// Lines of a tile are keys where the matrix is reduced along its columns, queries where along its rows.
template <class T, bool lines_are_keys> struct AttentionScoreTiles {
  using Backend = AttentionBackend<T>;
  using Real = real_of<T>;
  using Bits = TileBits<Backend>;
  using Sides = AttentionSides<T, lines_are_keys>;
  static constexpr int kThreads = kTileThreads;
  static constexpr int kMinBlocks = 2;
  static constexpr int kBlock = Backend::kRows;
  static constexpr int kScores = lines_are_keys ? 1 : 2;   // of keys: the reduction; of queries: entropy, maximum
  static constexpr int kFoundOffset = Backend::kSharedBytes, kBitsOffset = kFoundOffset + kScores * kBlock * int(sizeof(Real));   // behind the tile
  static constexpr int kListOffset = kBitsOffset + Bits::kBytes, kWeightedOffset = kListOffset + kListBytes, kSharedBytes = kWeightedOffset + kTileWarps * 4;
  AttentionCall call;
  HeadRows<T> lines, others;
  const Real* lse;            // [B, H, Nq]
  AttentionWeights weights;   // where lines are keys, as the reduction
  ColumnReduction reduction;
  Real* out[kScores];         // [B, H, lines]

  MODALIGN_HOST_DEVICE std::int64_t lines_in_all() const { return lines_are_keys ? call.Nk : call.Nq; }
  LaunchPlan plan(std::int64_t, const char* name) const { return plan_attention<AttentionScoreTiles>(ceil_divide<std::int64_t>(lines_in_all(), kBlock), 1, call.H, call.B, name); }

  static MODALIGN_DEVICE Shared<Real> found(int score) { return shared<Real>(kFoundOffset + score * kBlock * int(sizeof(Real)), kBlock); }
  MODALIGN_DEVICE bool most(int score) const { return lines_are_keys ? reduction == ColumnReduction::maximum : score == 1; }
  MODALIGN_DEVICE bool counts() const { return lines_are_keys && reduction == ColumnReduction::kept; }

  MODALIGN_DEVICE Real weight(const HeadPairs<Real>& pairs, std::int64_t i) const {
    return Global<const Real>(static_cast<const Real*>(weights.data))[pairs.b * weights.batch_stride + pairs.h * weights.head_stride + i * weights.row_stride];
  }
  // Whether a query of the tile has a weight other than 0; all threads of the block together.
  MODALIGN_DEVICE bool is_weighted(const HeadPairs<Real>& pairs, const TileRange& range) const {
    const Shared<std::uint32_t> warps = shared<std::uint32_t>(kWeightedOffset, kTileWarps);
    const std::uint32_t mine = warp_ballot(thread_index() < range.columns && weight(pairs, range.column_begin + thread_index()) != 0);
    if (lane() == 0) warps[warp()] = mine;
    if (!MODALIGN_MUTATION("scores: drop the barrier behind the weights")) barrier();
    std::uint32_t all = 0;
    for (int w = 0; w < (MODALIGN_MUTATION("scores: look at the first weights alone") ? 1 : kTileWarps); ++w) all |= warps[w];
    return all != 0;
  }

  // What a pair adds; false where that is nothing.
  MODALIGN_DEVICE bool score(Real (&added)[kScores], const HeadPairs<Real>& pairs, Shared<Real> product, std::int64_t i, std::int64_t j) const {
    const Real w = lines_are_keys ? weight(pairs, i) : Real(1);
    if (w == 0 && !MODALIGN_MUTATION("scores: queries of weight 0 too")) return false;
    Real z = counts() ? Real(0) : logit(call, Real(product[0]));
    if (pairs.has_bias()) z = pairs.with_bias(z, i, j);
    if (z == -kInfinity<Real>) return false;
    if constexpr (lines_are_keys) added[0] = w;
    if (counts()) return true;
    const Real sum = Global<const Real>(lse)[(pairs.b * call.H + pairs.h) * call.Nq + i];
    if (sum == -kInfinity<Real>) return false;
    const Real log_p = z - sum, p = exponential(log_p);
    if constexpr (lines_are_keys) {
      added[0] = w * p;
      if (reduction == ColumnReduction::square) added[0] *= p;
    } else {
      added[0] = -p * log_p;
      added[1] = p;
    }
    return true;
  }

  // What a line's pairs add is joined with what it has so far: a warp per line, the same one in all tiles.
  MODALIGN_DEVICE void fold(Shared<Real> tile, const HeadPairs<Real>& pairs, const TileRange& range, bool everything) const {
    MODALIGN_NO_UNROLL
    for (int line = warp(); line < range.rows; line += kTileWarps) {
      Real total[kScores] = {};
      MODALIGN_NO_UNROLL
      for (int other = lane(); other < range.columns; other += kWarpSize) {
        if (!everything && !Bits::kept(kBitsOffset, line, other)) continue;
        const std::int64_t row = range.row_begin + line, column = range.column_begin + other;
        Real added[kScores];
        if (!score(added, pairs, tile.at(line * Backend::kPitch + other), Sides::query_of(row, column), Sides::key_of(row, column))) continue;
        MODALIGN_UNROLL
        for (int n = 0; n < kScores; ++n) total[n] = join(most(n), total[n], added[n]);
      }
      MODALIGN_UNROLL
      for (int n = 0; n < kScores; ++n) {
        MODALIGN_UNROLL
        for (int step = kWarpSize / 2; step > 0; step /= 2) total[n] = join(most(n), total[n], shuffle_xor(total[n], step));
        if (lane() == 0) found(n)[line] = MODALIGN_MUTATION("scores: forget the tiles before") ? total[n] : join(most(n), Real(found(n)[line]), total[n]);
      }
    }
  }

  MODALIGN_DEVICE void operator()() const {
    const AttentionBlock block(ceil_divide(int(lines_in_all()), kBlock), 1, int(call.H), !lines_are_keys);
    const Sides sides{call, lines, others};
    const Shared<Real> tile = shared<Real>(0, Backend::kRows * Backend::kPitch);
    for (int n = 0; n < kScores; ++n)
      for (int line = warp(); line < kBlock; line += kTileWarps)   // the warp that adds to it
        if (lane() == 0) found(n)[line] = 0;
    const HeadPairs<Real> pairs{call, call.sequence(block.b), block.b, block.h};
    for_each_kept(
        ceil_divide(lines_are_keys ? pairs.s.queries : pairs.s.keys, kBlock), kListOffset,
        [&](int other) { return lines_are_keys ? pairs.coverage(other, block.tile, kBlock) : pairs.coverage(block.tile, other, kBlock); },
        [&](int other, bool everything) {
          const TileRange range = Sides::range_of(pairs.s, {block.b, block.h, block.tile, other});
          if (!lines_are_keys || is_weighted(pairs, range)) {
            if (!counts()) sides.products(tile, pairs, range);
            if (!everything) Sides::mark(kBitsOffset, pairs, range);
            if (!MODALIGN_MUTATION("scores: drop the barrier before the sums")) barrier();
            fold(tile, pairs, range, everything);
          }
          if (!MODALIGN_MUTATION("scores: drop the barrier behind the sums")) barrier();   // the next products will lie where these were
        });
    // Lines beyond the length of an item have scores too: zeros.
    const std::int64_t first = std::int64_t(block.b * int(call.H) + block.h) * lines_in_all() + block.tile * kBlock;
    const int written = minimum(int(lines_in_all()) - block.tile * kBlock, MODALIGN_MUTATION("scores: forget the last line") ? kBlock - 1 : kBlock);
    for (int n = 0; n < kScores; ++n)
      for (int line = thread_index(); line < written; line += kTileThreads) global(out[n])[first + line] = found(n)[line];
  }
};

// ---------------------------------------------------------------------------------------------------------------------------- the compiled instances
template <class T> using AttentionColumnTiles = AttentionScoreTiles<T, true>;
template <class T> using AttentionRowTiles = AttentionScoreTiles<T, false>;

#define MODALIGN_ATTENTION_SCORE_KERNELS_OF(X, dtype, T)        \
  X("attention_scores.columns." dtype, AttentionColumnTiles<T>) \
  X("attention_scores.rows." dtype, AttentionRowTiles<T>)
#define MODALIGN_ATTENTION_SCORE_KERNELS(X)               \
  MODALIGN_ATTENTION_SCORE_KERNELS_OF(X, "f32", float)    \
  MODALIGN_ATTENTION_SCORE_KERNELS_OF(X, "f64", double)   \
  MODALIGN_ATTENTION_SCORE_KERNELS_OF(X, "bf16", bf16)    \
  MODALIGN_ATTENTION_SCORE_KERNELS_OF(X, "f16", f16)

MODALIGN_ATTENTION_SCORE_KERNELS(MODALIGN_KEY_OF)

// ---------------------------------------------------------------------------------------------------------------------------------- launch sequences
template <class T, class Launch> int run_attention_columns(const AttentionProblem& p, const AttentionColumns& to, const AttentionCall& call, const Launch& launch) {
  using Real = real_of<T>;
  if (const int error = summarize_mask(call.mask, p.B, AttentionBackend<T>::kRows, launch)) return error;
  const HeadRows<T> query = head_rows<T>(Major::depth, p.query), key = head_rows<T>(Major::depth, p.key);
  const AttentionColumnTiles<T> columns{call, key, query, static_cast<const Real*>(to.lse), to.weights, to.reduction, {static_cast<Real*>(to.out)}};
  return launch_kernel(launch, columns, 1);
}

template <class T, class Launch> int run_attention_rows(const AttentionProblem& p, const AttentionRowStatistics& to, const AttentionCall& call, const Launch& launch) {
  using Real = real_of<T>;
  if (const int error = summarize_mask(call.mask, p.B, AttentionBackend<T>::kRows, launch)) return error;
  const HeadRows<T> query = head_rows<T>(Major::depth, p.query), key = head_rows<T>(Major::depth, p.key);
  const AttentionRowTiles<T> rows{call, query, key, static_cast<const Real*>(to.lse), {}, {}, {static_cast<Real*>(to.entropy), static_cast<Real*>(to.maximum)}};
  return launch_kernel(launch, rows, 1);
}

}   // namespace modalign::cuda
