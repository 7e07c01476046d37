/// @file masked_attention.cuh
/// @brief Softmax attention under a mask on CUDA, forward and backward: kernels, launch sequences, the table of compiled instances.
///
/// Maths      ops/masked_attention.h. (Online softmax, and probabilities made again in the backward, as in FlashAttention.)
///
/// Mapping    summaries of the mask (attention_mask.cuh), then
///   forward    clean     a block per 128 rows: values with rows of zeros for those that hold NaN or infinity, and which blocks of rows have such rows
///              forward   a block per tile of queries of a head meets the tiles of keys in order: logits, online softmax in shared memory, then the value product into registers
///              mend      one warp per query, at once done where no value was broken: p times the broken values of the keys that it keeps
///   backward   clean     queries, keys and gradients of the output in the same way (gradients: zeros for rows that keep nothing)
///              delta     one warp per query: do . o - dlse
///              gradient  of query, of key, of value: a block per tile of its rows meets the tiles of the other side in order (keys: of all heads that share them). lse makes p of the
///                        products in shared memory; dp meets it in registers; ds (value: p) is multiplied with the rows of the other side
///              gradient of bias  a block per tile of a bias with pairs, or per tile of columns, which adds up ds of all heads and items that share it in registers
///
/// Tiles      A block visits the tiles of which something is kept (attention.cuh).
/// Numbers    f32, f64: FmaBackend in the input precision. bf16, f16: tensor cores, fp32 accumulation; p and ds are rounded to the input type where they are multiplied.
/// FLOPs      a pair that lies in a kept tile: forward 2 (D + Dv); backward 2 (5 D + 3 Dv): products are made three times, dp twice. Gradient of bias: 2 (D + Dv) more. Beyond 128 (f64: 64)
///            columns of output they are made again for every such piece.
/// Memory     forward one copy of the values; backward one of queries, keys and gradients of the output, and a number for each query. Nothing Nq x Nk.
/// Order      sums over D ascending; over keys (queries) in chains of a tile, tiles in order, heads of a group in order. No atomics: equal bits from run to run.
/// Registers  one block a multiprocessor, at most 255.
#pragma once

#include "cuda/attention.cuh"

namespace modalign::cuda {

// A copy [item, heads, rows, width]; whole vectors wide.
template <class T> std::int64_t copy_width(std::int64_t depth) { return round_up<std::int64_t>(depth, 16 / sizeof(T)); }
template <class T> AttentionRows copied_rows(const T* data, std::int64_t heads, std::int64_t rows, std::int64_t depth) {
  const std::int64_t width = copy_width<T>(depth);
  return {data, heads * rows * width, rows * width, width, 1};
}

// ------------------------------------------------------------------------------------------------------------------------------------------- prepare
// to = from, with zeros for rows that must not be multiplied: those that hold NaN or infinity, or, with lse, those of queries that keep nothing.
template <class T> struct CleanRows {
  using Real = real_of<T>;
  static constexpr int kThreads = kTileThreads;
  static constexpr int kRows = 128;   // of a block
  static constexpr int kSharedBytes = kTileWarps * 4;
  AttentionRows from;
  std::int64_t items, heads, rows, depth, width;
  const Real* lse;        // [items, heads, rows] or nullptr
  T* to;                  // [items, heads, rows, width]
  std::int32_t* broken;   // [items, heads, blocks of rows] or nullptr: whether there are such rows

  std::int64_t blocks() const { return ceil_divide<std::int64_t>(rows, kRows); }
  LaunchPlan plan(std::int64_t, const char* key) const {
    LaunchPlan plan;
    plan.grid[0] = unsigned(blocks() * heads * items);
    plan.threads = kThreads;
    plan.shared_bytes = kSharedBytes;
    plan.key = key;
    return plan;
  }
  MODALIGN_DEVICE void operator()() const {
    const std::int64_t count = ceil_divide<std::int64_t>(rows, kRows), line = block_index_x() / count, first = block_index_x() % count * kRows;
    const Global<const T> source = Global<const T>(static_cast<const T*>(from.data)).at(line / heads * from.batch_stride + line % heads * from.head_stride);
    const Global<T> target = global(to).at(line * rows * width);
    const std::int64_t stop = minimum(first + kRows, MODALIGN_MUTATION("clean: one row too many") ? rows + 1 : rows);
    bool found = false;
    for (std::int64_t row = first + warp(); row < stop; row += kTileWarps) {
      bool bad = lse != nullptr;
      if (lse != nullptr) bad = Global<const Real>(lse)[line * rows + row] == -kInfinity<Real>;
      else
        for (std::int64_t d = lane(); d < depth; d += kWarpSize) {
          const Real x = widen(T(source[row * from.row_stride + d * from.element_stride]));
          bad |= !(x - x == 0);
        }
      bad = warp_ballot(bad) != 0;
      found |= bad;
      if (MODALIGN_MUTATION("clean: leave them as they are")) bad = false;
      for (std::int64_t d = lane(); d < width; d += kWarpSize) {
        T x = narrow<T>(Real(0));
        if (!bad && d < depth) x = source[row * from.row_stride + d * from.element_stride];
        target[row * width + d] = x;
      }
    }
    if (broken == nullptr) return;
    const Shared<int> all = shared<int>(0, kTileWarps);
    if (lane() == 0) all[warp()] = found;
    if (!MODALIGN_MUTATION("clean: drop the barrier")) barrier();
    if (thread_index() != 0) return;
    int any = 0;
    for (int w = 0; w < kTileWarps; ++w) any |= int(all[w]);
    global(broken)[line * count + first / kRows] = any;
  }
};

// do . o - dlse, 0 for rows that keep nothing.
template <class T> struct AttentionDelta {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  AttentionRows grad_out, out;
  const Real *lse, *grad_lse;   // [items, heads, rows]; grad_lse or nullptr
  std::int64_t items, heads, rows, depth;
  Real* delta;

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(items * heads * rows, 1, key); }
  MODALIGN_DEVICE void operator()() const {
    const std::int64_t at = warp_item(), line = at / rows, row = at % rows;
    if (at >= (MODALIGN_MUTATION("delta: one row too many") ? items * heads * rows + 1 : items * heads * rows)) return;
    const auto row_of = [&](const AttentionRows& from) {
      return Global<const T>(static_cast<const T*>(from.data)).at(line / heads * from.batch_stride + line % heads * from.head_stride + row * from.row_stride);
    };
    const Global<const T> g = row_of(grad_out), o = row_of(out);
    Real sum = 0;
    for (std::int64_t d = lane(); d < depth; d += kWarpSize) sum = fused_multiply_add(widen(T(g[d * grad_out.element_stride])), widen(T(o[d * out.element_stride])), sum);
    sum = warp_sum(sum);
    if (lane() != 0) return;
    if (grad_lse != nullptr && !MODALIGN_MUTATION("delta: forget the gradient of lse")) sum -= Global<const Real>(grad_lse)[at];
    const Real own = Global<const Real>(lse)[at];
    global(delta)[at] = own == -kInfinity<Real> ? Real(0) : sum;
  }
};

// ------------------------------------------------------------------------------------------------------------------------------------------- forward
template <class T> struct AttentionForwardTiles {
  using Backend = AttentionBackend<T>;
  using Real = real_of<T>;
  using Bits = TileBits<Backend>;
  static constexpr int kThreads = kTileThreads;
  static constexpr int kMinBlocks = 1;   // the output rows stay in registers along the walk
  static constexpr int kBlock = Backend::kRows, kPerLane = Backend::kColumns / kWarpSize;
  static constexpr int kStatisticsOffset = Backend::kSharedBytes + Backend::kValueBytes;   // behind the tile and the slabs of values
  static constexpr int kBitsOffset = kStatisticsOffset + 3 * kBlock * int(sizeof(Real)), kListOffset = kBitsOffset + Bits::kBytes;
  static constexpr int kSharedBytes = kListOffset + kListBytes;
  AttentionCall call;
  HeadRows<T> query, key, value;   // value: clean, as values
  T* out;                          // [items, H, total queries, Dv]
  Real* lse;

  LaunchPlan plan(std::int64_t, const char* name) const {
    return plan_attention<AttentionForwardTiles>(ceil_divide<std::int64_t>(call.Nq, kBlock), ceil_divide<std::int64_t>(call.Dv, Backend::kColumns), call.H, call.B, name);
  }

  static MODALIGN_DEVICE Shared<Real> statistic(int n) { return shared<Real>(kStatisticsOffset + n * kBlock * int(sizeof(Real)), kBlock); }   // 0: maximum so far, 1: sum, 2: by how much it shrank

  // Products become exp(logit - maximum so far): a warp per row.
  MODALIGN_DEVICE void fold(Shared<Real> tile, const TileRange& range, const HeadPairs<Real>& pairs, bool tested) const {
    const Shared<Real> top = statistic(0), sum = statistic(1), shrink = statistic(2);
    MODALIGN_NO_UNROLL
    for (int row = warp(); row < range.rows; row += kTileWarps) {
      const Shared<Real> line = tile.at(row * Backend::kPitch);
      Real z[kPerLane], before = 0, most = -kInfinity<Real>;
      if (lane() == 0) before = top[row];
      before = shuffle(before, 0);
      MODALIGN_UNROLL
      for (int n = 0; n < kPerLane; ++n) {
        const int column = n * kWarpSize + lane();
        z[n] = -kInfinity<Real>;
        if (column < range.columns && (!tested || Bits::kept(kBitsOffset, row, column))) {
          z[n] = logit(call, Real(line[column]));
          if (pairs.has_bias()) z[n] = pairs.with_bias(z[n], range.row_begin + row, range.column_begin + column);
        }
        most = maximum(most, z[n]);
      }
      MODALIGN_UNROLL
      for (int step = kWarpSize / 2; step > 0; step /= 2) most = maximum(most, shuffle_xor(most, step));
      const Real now = maximum(before, most), offset = now == -kInfinity<Real> ? Real(0) : now, less = exponential(before - offset);
      Real total = 0;
      MODALIGN_UNROLL
      for (int n = 0; n < kPerLane; ++n) {
        const Real p = exponential(z[n] - offset);
        line[n * kWarpSize + lane()] = p;
        total += p;
      }
      total = warp_sum(total);
      if (lane() == 0) {
        top[row] = now;
        sum[row] = (MODALIGN_MUTATION("forward: do not shrink the sum") ? Real(sum[row]) : sum[row] * less) + total;
        shrink[row] = less;
      }
    }
  }

  MODALIGN_DEVICE void operator()() const {
    const AttentionBlock block(ceil_divide(int(call.Nq), kBlock), ceil_divide(int(call.Dv), Backend::kColumns), int(call.H), true);
    const AttentionSequence s = call.sequence(block.b);
    const int kv = block.h / int(call.H / call.Hkv), line_begin = block.piece * Backend::kColumns, lines = minimum(int(call.Dv) - line_begin, Backend::kColumns);
    TileRange range{block.tile * kBlock, 0, block.tile, 0, minimum(s.queries - block.tile * kBlock, kBlock), 0};
    if (range.rows <= 0) return;
    const HeadPairs<Real> pairs{call, s, block.b, block.h};
    const Global<const T> query_data = query.at(s.item, block.h, s.first_query), key_data = key.at(s.item, kv, s.first_key), value_data = value.at(s.item, kv, s.first_key);
    const Shared<Real> tile = shared<Real>(0, Backend::kRows * Backend::kPitch);
    for (int row = thread_index(); row < kBlock; row += kTileThreads) {
      statistic(0)[row] = -kInfinity<Real>;
      statistic(1)[row] = 0;
      statistic(2)[row] = 1;
    }
    typename Backend::Accumulators output;
    Backend::clear(output);
    for_each_kept(
        ceil_divide(s.keys, kBlock), kListOffset, [&](int key_tile) { return pairs.coverage(block.tile, key_tile, kBlock); },
        [&](int key_tile, bool everything) {
          range.column_begin = key_tile * kBlock;
          range.columns = minimum(s.keys - key_tile * kBlock, kBlock);
          {
            typename Backend::Accumulators products;
            Backend::clear(products);
            Backend::multiply(products, query.operand, query_data, key.operand, key_data, range, int(call.D));
            Backend::deposit(products, tile);
          }
          if (!everything) Bits::mark(kBitsOffset, range, [&](std::int64_t i, std::int64_t j) { return pairs.keeps(i, j); });
          if (!MODALIGN_MUTATION("forward: drop the barrier before the softmax")) barrier();
          fold(tile, range, pairs, !everything);
          if (!MODALIGN_MUTATION("forward: drop the barrier behind the softmax")) barrier();
          if (!MODALIGN_MUTATION("forward: do not shrink the output")) {
            const Shared<Real> shrink = statistic(2);
            Backend::each([&](int row, int, Real& x) { x *= shrink[row]; }, output);
          }
          Backend::multiply_values(output, tile, range.columns, value.operand, value_data, range.column_begin, line_begin, lines, Backend::kSharedBytes);
          if (!MODALIGN_MUTATION("forward: drop the barrier behind the value product")) barrier();   // the next products will lie where these were
        });
    const std::int64_t first = (s.item * call.H + block.h) * call.total_queries + s.first_query + range.row_begin;
    const Global<T> target = global(out).at(first * call.Dv + line_begin);
    const Shared<Real> top = statistic(0), sum = statistic(1);
    Backend::each(
        [&](int row, int column, Real& x) {
          if (row >= range.rows || column >= lines) return;
          const bool empty = top[row] == -kInfinity<Real> && sum[row] == 0;
          target[row * call.Dv + column] = narrow<T>(empty ? Real(0) : x / sum[row]);
        },
        output);
    if (block.piece != 0) return;
    for (int row = thread_index(); row < range.rows; row += kTileThreads) {
      const Real most = top[row], total = sum[row];
      global(lse)[first + row] = most == -kInfinity<Real> && total == 0 ? -kInfinity<Real> : most + logarithm(total);
    }
  }
};

// What the forward left out: p times the values that hold NaN or infinity, of the keys that a query keeps.
template <class T> struct AttentionMend {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  AttentionCall call;
  AttentionRows query, key, value;
  const std::int32_t* broken;   // [items, Hkv, blocks of rows]
  std::int64_t blocks;
  const Real* lse;
  T* out;

  LaunchPlan plan(std::int64_t, const char* name) const { return plan_warps(call.Nq * call.H * call.B, 1, name); }

  static MODALIGN_DEVICE Global<const T> row_of(const AttentionRows& from, std::int64_t item, std::int64_t h, std::int64_t row) {
    return Global<const T>(static_cast<const T*>(from.data)).at(item * from.batch_stride + h * from.head_stride + row * from.row_stride);
  }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t n = warp_item();
    if (n >= call.Nq * call.H * call.B) return;
    const int i = int(n % call.Nq), h = int(n / call.Nq % call.H), b = int(n / call.Nq / call.H), kv = h / int(call.H / call.Hkv);
    const AttentionSequence s = call.sequence(b);
    if (i >= s.queries || s.keys == 0) return;
    const HeadPairs<Real> pairs{call, s, b, h};
    const std::int64_t at = (s.item * call.H + h) * call.total_queries + s.first_query + i;
    const Global<const T> q = row_of(query, s.item, h, s.first_query + i);
    for (int block = s.first_key / CleanRows<T>::kRows; block <= (s.first_key + s.keys - 1) / CleanRows<T>::kRows; ++block) {
      if (Words(broken)[(s.item * call.Hkv + kv) * blocks + block] == 0) continue;
      const int begin = maximum(block * CleanRows<T>::kRows - s.first_key, 0), end = minimum((block + 1) * CleanRows<T>::kRows - s.first_key, s.keys);
      for (int j = begin; j < end; ++j) {
        if (!pairs.keeps(i, j) && !MODALIGN_MUTATION("mend: also what is not kept")) continue;
        const Global<const T> v = row_of(value, s.item, kv, s.first_key + j), k = row_of(key, s.item, kv, s.first_key + j);
        bool bad = false;
        Real product = 0;
        for (std::int64_t d = lane(); d < call.Dv; d += kWarpSize) {
          const Real x = widen(T(v[d * value.element_stride]));
          bad |= !(x - x == 0);
        }
        if (warp_ballot(bad) == 0) continue;
        for (std::int64_t d = lane(); d < call.D; d += kWarpSize) product = fused_multiply_add(widen(T(q[d * query.element_stride])), widen(T(k[d * key.element_stride])), product);
        Real z = logit(call, warp_sum(product));
        if (pairs.has_bias()) z = pairs.with_bias(z, i, j);
        if (z == -kInfinity<Real>) continue;
        const Real p = exponential(z - Global<const Real>(lse)[at]);
        for (std::int64_t d = lane(); d < call.Dv; d += kWarpSize) {
          const Global<T> to = global(out).at(at * call.Dv + d);
          to[0] = narrow<T>(widen(T(to[0])) + p * widen(T(v[d * value.element_stride])));
        }
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------------------------------------------------ backward
enum class AttentionGradient { query, key, value, bias };

// d logit / d product at the logit z
template <class Real> MODALIGN_DEVICE Real logit_slope(const AttentionCall& call, Real z) {
  if (call.cap == 0) return Real(call.scale);
  const Real t = z / Real(call.cap);
  return Real(call.scale) * (1 - t * t);
}

// Products of a tile and what they become. Rows are queries, or keys where the gradient of keys or values is made.
template <class T, AttentionGradient of> struct GradientTile {
  static constexpr bool rows_are_keys = of == AttentionGradient::key || of == AttentionGradient::value;
  using Sides = AttentionSides<T, rows_are_keys>;
  using Place = typename Sides::Place;
  using Backend = AttentionBackend<T>;
  using Real = real_of<T>;
  using Accumulators = typename Backend::Accumulators;
  using Bits = TileBits<Backend>;
  // Behind the tile and the slabs of values.
  static constexpr int kBitsOffset = Backend::kSharedBytes + Backend::kValueBytes, kDeltaOffset = kBitsOffset + Bits::kBytes;
  static constexpr int kListOffset = kDeltaOffset + Backend::kRows * int(sizeof(Real)), kSharedBytes = kListOffset + kListBytes;
  Sides sides;                                // queries and keys
  const HeadRows<T>&row_grad, &column_grad;   // gradients of the output and values
  const Real *lse, *delta;                    // [items, H, total queries]

  // p in the tile, 0 for pairs that are not kept; for the gradients of queries and keys times d logit / d product. The reader passes a barrier.
  MODALIGN_DEVICE void probabilities(Shared<Real> tile, const Place& at, bool everything) const {
    const HeadPairs<Real> pairs = sides.pairs_of(at);
    const TileRange range = Sides::range_of(pairs.s, at);
    sides.products(tile, pairs, range);
    if constexpr (of != AttentionGradient::value) {
      const int first = int(rows_are_keys ? range.column_begin : range.row_begin), count = rows_are_keys ? range.columns : range.rows;
      const Global<const Real> deltas = sides.of_queries(delta, pairs).at(first);
      const Shared<Real> to = shared<Real>(kDeltaOffset, Backend::kRows);
      if (thread_index() < Backend::kRows) to[thread_index()] = thread_index() < count ? Real(deltas[thread_index()]) : Real(0);
    }
    if (!everything) Sides::mark(kBitsOffset, pairs, range);
    if (!MODALIGN_MUTATION("gradient: drop the barrier before the softmax")) barrier();
    const Global<const Real> sums = sides.of_queries(lse, pairs);
    const int column = thread_index() % Backend::kColumns;
    MODALIGN_NO_UNROLL
    for (int row = thread_index() / Backend::kColumns; row < Backend::kRows; row += kTileThreads / Backend::kColumns) {
      Real p = 0;
      if (row < range.rows && column < range.columns && (everything || Bits::kept(kBitsOffset, row, column))) {
        const std::int64_t i = Sides::query_of(range.row_begin + row, range.column_begin + column);
        const Real sum = sums[i], x = logit(sides.call, Real(tile[row * Backend::kPitch + column]));
        Real z = x;
        if (pairs.has_bias()) z = pairs.with_bias(z, i, Sides::key_of(range.row_begin + row, range.column_begin + column));
        if (sum != -kInfinity<Real> && z != -kInfinity<Real>) {
          p = exponential(z - sum);
          if constexpr (of == AttentionGradient::query || of == AttentionGradient::key) p *= logit_slope(sides.call, x);
        }
      }
      tile[row * Backend::kPitch + column] = p;
    }
  }

  // ds (query, key: times d logit / d product) from what `probabilities` left in the tile, which is free afterwards.
  MODALIGN_DEVICE void gradients(Accumulators& ds, Shared<Real> tile, const Place& at) const {
    if (!MODALIGN_MUTATION("gradient: drop the barrier behind the softmax")) barrier();
    Backend::each([&](int row, int column, Real& p) { p = tile[row * Backend::kPitch + column]; }, ds);
    if (!MODALIGN_MUTATION("gradient: drop the barrier before dp")) barrier();   // its slabs lie where the tile is
    Accumulators dp;
    Backend::clear(dp);
    const HeadPairs<Real> pairs = sides.pairs_of(at);
    Backend::multiply(dp, row_grad.operand, Sides::row_lines(row_grad, pairs), column_grad.operand, Sides::column_lines(column_grad, pairs), Sides::range_of(pairs.s, at), int(sides.call.Dv));
    const Shared<Real> deltas = shared<Real>(kDeltaOffset, Backend::kRows);
    Backend::each([&](int row, int column, Real& p, Real& grad) { p = p == 0 ? Real(0) : p * (grad - deltas[rows_are_keys ? column : row]); },   // what is not kept may be NaN
                  ds, dp);
  }
};

// Of query, key or value.
template <class T, AttentionGradient of> struct AttentionGradientTiles {
  using Backend = AttentionBackend<T>;
  using Real = real_of<T>;
  using Tile = GradientTile<T, of>;
  static constexpr int kThreads = kTileThreads;
  static constexpr int kMinBlocks = 1;   // products, dp and the gradient in registers
  static constexpr int kBlock = Backend::kRows;
  static constexpr int kSharedBytes = Tile::kSharedBytes;
  AttentionCall call;
  HeadRows<T> row_side, column_side, row_grad, column_grad;
  HeadRows<T> value;   // what ds or p is multiplied with: keys, queries, gradients of the output; clean
  const Real *lse, *delta;
  std::int64_t width;   // of the gradient
  T* out;               // [items, heads, rows, width]

  std::int64_t rows() const { return Tile::rows_are_keys ? call.Nk : call.Nq; }
  LaunchPlan plan(std::int64_t, const char* name) const {
    return plan_attention<AttentionGradientTiles>(ceil_divide<std::int64_t>(rows(), kBlock), ceil_divide<std::int64_t>(width, Backend::kColumns), Tile::rows_are_keys ? call.Hkv : call.H, call.B, name);
  }

  MODALIGN_DEVICE void operator()() const {
    constexpr bool rows_are_keys = Tile::rows_are_keys;
    const int heads = int(rows_are_keys ? call.Hkv : call.H), group = int(call.H / call.Hkv);
    const AttentionBlock block(ceil_divide(int(rows_are_keys ? call.Nk : call.Nq), kBlock), ceil_divide(int(width), Backend::kColumns), heads, !rows_are_keys);
    const int line_begin = block.piece * Backend::kColumns, lines = minimum(int(width) - line_begin, Backend::kColumns);
    // Keys beyond the length of an item have a gradient too: zeros.
    const auto rows_left = [&](const AttentionSequence& s) { return (!rows_are_keys ? s.queries : call.cu_keys != nullptr ? s.keys : int(call.Nk)) - block.tile * kBlock; };
    if (rows_left(call.sequence(block.b)) <= 0) return;
    const Shared<Real> tile = shared<Real>(0, Backend::kRows * Backend::kPitch);
    const Tile made{{call, row_side, column_side}, row_grad, column_grad, lse, delta};
    typename Backend::Accumulators gradient;
    Backend::clear(gradient);
    for (int h = rows_are_keys ? block.h * group : block.h; h < (rows_are_keys ? (block.h + 1) * group : block.h + 1); ++h) {
      const HeadPairs<Real> pairs{call, call.sequence(block.b), block.b, h};
      for_each_kept(
          ceil_divide(rows_are_keys ? pairs.s.queries : pairs.s.keys, kBlock), Tile::kListOffset,
          [&](int other) { return rows_are_keys ? pairs.coverage(other, block.tile, kBlock) : pairs.coverage(block.tile, other, kBlock); },
          [&](int other, bool everything) {
            const typename Tile::Place at{block.b, h, block.tile, other};
            made.probabilities(tile, at, everything);
            if constexpr (of != AttentionGradient::value) {
              typename Backend::Accumulators ds;
              made.gradients(ds, tile, at);
              Backend::deposit(ds, tile);
            }
            const HeadPairs<Real> here = made.sides.pairs_of(at);
            const TileRange range = made.sides.range_of(here.s, at);
            const Global<const T> values = value.at(here.s.item, rows_are_keys ? h : here.kv(), rows_are_keys ? here.s.first_query : here.s.first_key);
            Backend::multiply_values(gradient, tile, range.columns, value.operand, values, range.column_begin, line_begin, lines, Backend::kSharedBytes);
            if (!MODALIGN_MUTATION("gradient: drop the barrier behind the product")) barrier();   // the next products will lie where these were
          });
    }
    const AttentionSequence s = call.sequence(opaque(block.b));
    const int row_begin = block.tile * kBlock, written = minimum(rows_left(s), kBlock);
    const std::int64_t total = rows_are_keys ? call.total_keys : call.total_queries, first = (s.item * heads + block.h) * total + (rows_are_keys ? s.first_key : s.first_query) + row_begin;
    const Global<T> target = global(out).at(first * width + line_begin);
    const int rows_written = MODALIGN_MUTATION("gradient: forget the last row") && written > 1 ? written - 1 : written;
    Backend::each([&](int row, int column, Real& x) { if (row < rows_written && column < lines) target[row * width + column] = narrow<T>(x); }, gradient);
  }
};

// ds added up over the heads and items that share a bias, and over the queries where it has none of its own.
template <class T> struct AttentionBiasTiles {
  using Backend = AttentionBackend<T>;
  using Real = real_of<T>;
  using Tile = GradientTile<T, AttentionGradient::bias>;
  static constexpr int kThreads = kTileThreads;
  static constexpr int kMinBlocks = 1;
  static constexpr int kBlock = Backend::kRows;
  static constexpr int kSharedBytes = Tile::kSharedBytes;
  AttentionCall call;
  HeadRows<T> query, key, grad, value;
  const Real *lse, *delta;
  bool has_rows;
  std::int64_t batches;   // of the bias
  Real* out;              // [batches, heads of the bias, Nq or 1, Nk]

  std::int64_t tiles() const { return ceil_divide<std::int64_t>(call.Nk, kBlock) * (has_rows ? ceil_divide<std::int64_t>(call.Nq, kBlock) : 1); }
  LaunchPlan plan(std::int64_t, const char* name) const { return plan_attention<AttentionBiasTiles>(tiles(), 1, call.bias.heads, batches, name); }

  MODALIGN_DEVICE void operator()() const {
    const int query_tiles = ceil_divide(int(call.Nq), kBlock), key_tiles = ceil_divide(int(call.Nk), kBlock), sharing = int(call.H / call.bias.heads);
    const AttentionBlock block(key_tiles * (has_rows ? query_tiles : 1), 1, int(call.bias.heads), false);
    const int key_tile = block.tile % key_tiles, own_query_tile = block.tile / key_tiles;   // 0 where all are met
    const Shared<Real> tile = shared<Real>(0, Backend::kRows * Backend::kPitch);
    const Tile made{{call, query, key}, grad, value, lse, delta};
    typename Backend::Accumulators total;
    Backend::clear(total);
    for (int b = batches == 1 ? 0 : block.b; b < (batches == 1 ? int(call.B) : block.b + 1); ++b)
      for (int h = block.h * sharing; h < (block.h + 1) * sharing; ++h) {
        const HeadPairs<Real> pairs{call, call.sequence(b), b, h};
        for_each_kept(
            has_rows ? 1 : query_tiles, Tile::kListOffset, [&](int n) { return pairs.coverage(own_query_tile + n, key_tile, kBlock); },
            [&](int n, bool everything) {
              const typename Tile::Place at{b, h, own_query_tile + n, opaque(key_tile)};
              made.probabilities(tile, at, everything);
              typename Backend::Accumulators ds;
              made.gradients(ds, tile, at);
              Backend::each([](int, int, Real& sum, Real& x) { sum += x; }, total, ds);
            });
      }
    const int column_begin = key_tile * kBlock;
    const int columns = minimum(int(call.Nk) - key_tile * kBlock, kBlock);
    const std::int64_t head = block.b * call.bias.heads + block.h;
    if (has_rows) {
      const int row_begin = own_query_tile * kBlock, rows = minimum(int(call.Nq) - row_begin, kBlock);
      const Global<Real> target = global(out).at((head * call.Nq + row_begin) * call.Nk + column_begin);
      Backend::each([&](int row, int column, Real& x) { if (row < rows && column < columns) target[row * call.Nk + column] = x; }, total);
    } else {
      Backend::deposit(total, tile);
      if (!MODALIGN_MUTATION("bias: drop the barrier before the sums")) barrier();
      for (int column = thread_index(); column < columns; column += kTileThreads) {
        Real sum = 0;
        for (int row = 0; row < kBlock; ++row) sum += tile[row * Backend::kPitch + column];
        global(out)[head * call.Nk + column_begin + column] = sum;
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------------- the compiled instances
template <class T> using QueryGradientTiles = AttentionGradientTiles<T, AttentionGradient::query>;
template <class T> using KeyGradientTiles = AttentionGradientTiles<T, AttentionGradient::key>;
template <class T> using ValueGradientTiles = AttentionGradientTiles<T, AttentionGradient::value>;

#define MODALIGN_ATTENTION_KERNELS_OF(X, dtype, T)                     \
  X("masked_attention.clean." dtype, CleanRows<T>)                     \
  X("masked_attention.forward." dtype, AttentionForwardTiles<T>)       \
  X("masked_attention.mend." dtype, AttentionMend<T>)                  \
  X("masked_attention.delta." dtype, AttentionDelta<T>)                \
  X("masked_attention.grad_query." dtype, QueryGradientTiles<T>)       \
  X("masked_attention.grad_key." dtype, KeyGradientTiles<T>)           \
  X("masked_attention.grad_value." dtype, ValueGradientTiles<T>)       \
  X("masked_attention.grad_bias." dtype, AttentionBiasTiles<T>)
#define MODALIGN_ATTENTION_KERNELS(X)                  \
  MODALIGN_ATTENTION_KERNELS_OF(X, "f32", float)       \
  MODALIGN_ATTENTION_KERNELS_OF(X, "f64", double)      \
  MODALIGN_ATTENTION_KERNELS_OF(X, "bf16", bf16)       \
  MODALIGN_ATTENTION_KERNELS_OF(X, "f16", f16)

MODALIGN_ATTENTION_KERNELS(MODALIGN_KEY_OF)

// ---------------------------------------------------------------------------------------------------------------------------------- launch sequences
inline std::int64_t attention_items(const AttentionProblem& p) { return p.cu_queries != nullptr ? 1 : p.B; }

template <class T> struct AttentionForwardBuffers {
  AttentionCall call;
  std::int64_t blocks;
  T* value;
  std::int32_t* broken;
  template <class Arena> AttentionForwardBuffers(const AttentionProblem& p, Arena& arena)
      : call(attention_call<T>(p, arena)),
        blocks(ceil_divide<std::int64_t>(p.total_keys, CleanRows<T>::kRows)),
        value(arena.template take<T>("clean_value", p.key_rows() * p.Hkv * copy_width<T>(p.Dv))),
        broken(arena.template take<std::int32_t>("broken", attention_items(p) * p.Hkv * blocks)) {}
};

template <class T, class Launch> int run_attention_forward(const AttentionProblem& p, const AttentionForward& to, const AttentionForwardBuffers<T>& buffers, const Launch& launch) {
  using Real = real_of<T>;
  if (const int error = summarize_mask(buffers.call.mask, p.B, AttentionBackend<T>::kRows, launch)) return error;
  const CleanRows<T> clean{p.value, attention_items(p), p.Hkv, p.total_keys, p.Dv, copy_width<T>(p.Dv), nullptr, buffers.value, buffers.broken};
  if (const int error = launch_kernel(launch, clean, 1)) return error;
  const AttentionForwardTiles<T> forward{buffers.call,
                                         head_rows<T>(Major::depth, p.query),
                                         head_rows<T>(Major::depth, p.key),
                                         head_rows<T>(Major::line, copied_rows<T>(buffers.value, p.Hkv, p.total_keys, p.Dv)),
                                         static_cast<T*>(to.out),
                                         static_cast<Real*>(to.lse)};
  if (const int error = launch_kernel(launch, forward, 1)) return error;
  const AttentionMend<T> mend{buffers.call, p.query, p.key, p.value, buffers.broken, buffers.blocks, static_cast<const Real*>(to.lse), static_cast<T*>(to.out)};
  return launch_kernel(launch, mend, 1);
}

template <class T> struct AttentionBackwardBuffers {
  AttentionCall call;
  T *query, *key, *grad;
  real_of<T>* delta;
  template <class Arena> AttentionBackwardBuffers(const AttentionProblem& p, Arena& arena)
      : call(attention_call<T>(p, arena)),
        query(arena.template take<T>("clean_query", p.query_rows() * p.H * copy_width<T>(p.D))),
        key(arena.template take<T>("clean_key", p.key_rows() * p.Hkv * copy_width<T>(p.D))),
        grad(arena.template take<T>("clean_grad", p.query_rows() * p.H * copy_width<T>(p.Dv))),
        delta(arena.template take<real_of<T>>("delta", p.query_rows() * p.H)) {}
};

template <class T, class Launch> int run_attention_backward(const AttentionProblem& p, const AttentionBackward& to, const AttentionBackwardBuffers<T>& buffers, const Launch& launch) {
  using Real = real_of<T>;
  if (const int error = summarize_mask(buffers.call.mask, p.B, AttentionBackend<T>::kRows, launch)) return error;
  const std::int64_t items = attention_items(p);
  const Real* lse = static_cast<const Real*>(to.lse);
  const CleanRows<T> clean_query{p.query, items, p.H, p.total_queries, p.D, copy_width<T>(p.D), nullptr, buffers.query, nullptr};
  const CleanRows<T> clean_key{p.key, items, p.Hkv, p.total_keys, p.D, copy_width<T>(p.D), nullptr, buffers.key, nullptr};
  const CleanRows<T> clean_grad{to.grad_out, items, p.H, p.total_queries, p.Dv, copy_width<T>(p.Dv), lse, buffers.grad, nullptr};
  for (const CleanRows<T>& clean : {clean_query, clean_key, clean_grad})
    if (const int error = launch_kernel(launch, clean, 1)) return error;
  const AttentionDelta<T> delta{to.grad_out, to.out, lse, static_cast<const Real*>(to.grad_lse), items, p.H, p.total_queries, p.Dv, buffers.delta};
  if (const int error = launch_kernel(launch, delta, 1)) return error;

  const AttentionRows query = copied_rows<T>(buffers.query, p.H, p.total_queries, p.D), key = copied_rows<T>(buffers.key, p.Hkv, p.total_keys, p.D);
  const AttentionRows grad = copied_rows<T>(buffers.grad, p.H, p.total_queries, p.Dv);
  const auto lines = [](const AttentionRows& rows) { return head_rows<T>(Major::depth, rows); };
  const auto values = [](const AttentionRows& rows) { return head_rows<T>(Major::line, rows); };
  const QueryGradientTiles<T> grad_query{buffers.call, lines(query), lines(key), lines(grad), lines(p.value), values(key), lse, buffers.delta, p.D, static_cast<T*>(to.grad_query)};
  if (const int error = launch_kernel(launch, grad_query, 1)) return error;
  const KeyGradientTiles<T> grad_key{buffers.call, lines(key), lines(query), lines(p.value), lines(grad), values(query), lse, buffers.delta, p.D, static_cast<T*>(to.grad_key)};
  if (const int error = launch_kernel(launch, grad_key, 1)) return error;
  const ValueGradientTiles<T> grad_value{buffers.call, lines(key), lines(query), lines(p.value), lines(grad), values(grad), lse, buffers.delta, p.Dv, static_cast<T*>(to.grad_value)};
  if (const int error = launch_kernel(launch, grad_value, 1)) return error;
  if (to.bias_gradient == BiasGradient::none) return 0;
  const AttentionBiasTiles<T> grad_bias{buffers.call, lines(query), lines(key), lines(grad), lines(p.value), lse, buffers.delta, to.bias_gradient == BiasGradient::pairs, to.bias_batches,
                                        static_cast<Real*>(to.grad_bias)};
  return launch_kernel(launch, grad_bias, 1);
}

}   // namespace modalign::cuda
