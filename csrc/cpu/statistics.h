// Engine form (c): online log-sum-exp over rows *and* columns of a matrix of logits that is never stored.
//
//     row_i = log sum_j exp z_ij        column_j = log sum_i exp z_ij        z_ij = logit(product_ij, i, j)
//
// A running pair (M, S) stands for M + log S. Folding in new values with maximum M' gives M+ = max(M, M'), S+ = S exp(M - M+) + sum exp(z - M+).
// Slots: the columns are dealt out to at most kMaxSlots slots, their number fixed by the problem. A slot owns its columns for all rows, so column statistics need no
// merging; each slot keeps its own partial statistic of every row, and these are merged in slot order at the end. So the result does not depend on the threads.
// Empty rows and columns give -infinity; a NaN stays in its row and its column.
#pragma once

#include <limits>

#include "cpu/tile.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {

constexpr std::int64_t kMaxSlots = 32;

template <class T>
struct OnlineSum {
  T* maximum;
  double* sum;   // partial sums of one tile are made in T, everything beyond in double
};

template <class T>
inline void clear(const OnlineSum<T>& s, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) s.maximum[i] = -std::numeric_limits<T>::infinity(), s.sum[i] = 0;
}

// exp(z - offset) where nothing has been seen yet (offset = -infinity) is 0, not NaN
template <class T>
inline T finite(T offset) { return offset == -std::numeric_limits<T>::infinity() ? T(0) : offset; }

// (M, S) <- (M, S) + (M', S')
template <class T>
inline void merge(T& maximum, double& sum, T other_maximum, double other_sum) {
  const T top = other_maximum > maximum ? other_maximum : maximum, offset = finite(top);
  sum = sum * std::exp(maximum - offset) + other_sum * std::exp(other_maximum - offset);
  maximum = top;
}

// Folds logits tile[i][c] (rows x columns, whole lane groups; absent entries -infinity) into `row` (of these rows) and `column` (of these columns).
template <class T>
inline void fold_logits(const Tile<T>& tile, const OnlineSum<T>& row, const OnlineSum<T>& column) {
  constexpr int L = kVectorLanes<T>;
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    const T* z = tile.data + i * tile.ld;
    Vector<T> top = broadcast(-std::numeric_limits<T>::infinity());
    for (std::int64_t c = 0; c < tile.columns; c += L) top = larger<T>(load(z + c), top);
    T maximum = row.maximum[i];
    for (int l = 0; l < L; ++l) maximum = top[l] > maximum ? top[l] : maximum;
    const T offset = finite(maximum);
    Vector<T> sum{};
    for (std::int64_t c = 0; c < tile.columns; c += L) sum += exponential<T>(load(z + c) - broadcast(offset));
    double total = row.sum[i] * std::exp(row.maximum[i] - offset);
    for (int l = 0; l < L; ++l) total += sum[l];
    row.maximum[i] = maximum;
    row.sum[i] = total;
  }
  for (std::int64_t c = 0; c < tile.columns; c += L) {
    const Vector<T> before = load(column.maximum + c);
    Vector<T> top = before;
    for (std::int64_t i = 0; i < tile.rows; ++i) top = larger<T>(load(tile.data + i * tile.ld + c), top);
    Vector<T> offset = top;
    for (int l = 0; l < L; ++l) offset[l] = finite<T>(top[l]);
    const Vector<T> shrink = exponential<T>(before - offset);
    Vector<T> sum{};
    for (std::int64_t i = 0; i < tile.rows; ++i) sum += exponential<T>(load(tile.data + i * tile.ld + c) - offset);
    store(column.maximum + c, top);
    for (int l = 0; l < L; ++l) column.sum[c + l] = column.sum[c + l] * shrink[l] + sum[l];
  }
}

// How column tiles are dealt out to slots: fixed by the problem, never by the threads.
struct Slots {
  std::int64_t tiles, count;
  // limit: how many slot buffers the caller can afford
  Slots(std::int64_t tiles, std::int64_t limit) : tiles(tiles), count(maximum(1, minimum(minimum(kMaxSlots, tiles), limit))) {}
  std::int64_t first_tile(std::int64_t slot) const { return slot * tiles / count; }
};

template <class T>
struct StatisticsBuffers {
  OnlineSum<T> row, column;   // [slots][rows], [columns]
  std::int64_t columns;       // of the logits with their padding: all that tiles of logits cover
  StatisticsBuffers(std::int64_t rows, std::int64_t columns, const Slots& slots, Arena& arena) : columns(columns) {
    row = {arena.take<T>(slots.count * rows), arena.take<double>(slots.count * rows)};
    column = {arena.take<T>(columns), arena.take<double>(columns)};
  }
};

// Every tile of products of the problem, slots in parallel: make_epilogue() -> epilogue(tile, slot), called once per thread chunk. Fills pair.products where there are any.
template <class T, class MakeEpilogue>
inline void for_each_slot_tile(const PackedPair<T>& pair, const Slots& slots, const Parallel& parallel, const MakeEpilogue& make_epilogue) {
  parallel_for(parallel, 0, slots.count, 1, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> data(kTileRows * pair.tile_columns);
    auto epilogue = make_epilogue();
    for (std::int64_t slot = begin; slot < end; ++slot)
      for (std::int64_t block = slots.first_tile(slot); block < slots.first_tile(slot + 1); ++block)
        for (std::int64_t row = 0; row < pair.rows; row += kTileRows) {
          const std::int64_t column = block * pair.tile_columns;
          const Tile<T> tile{row, minimum(kTileRows, pair.rows - row), column, minimum(pair.tile_columns, pair.columns - column), data, pair.tile_columns};
          tile_product<T>(pair.row_panels + row * pair.depth, tile.rows, pair.column_panels + column * pair.depth, tile.columns, pair.depth, data, tile.ld);
          if (pair.products) std::memcpy(pair.kept(block, row), data, tile.rows * tile.ld * sizeof(T));
          epilogue(tile, slot);
        }
  });
}

// A log-sum-exp as two numbers of T, so that exp(z - lse) = exp((z - high) - low) is as exact near 1 as T is: z - high has no rounding there.
template <class T>
struct LogSum {
  T high, low;
  explicit LogSum(double lse) : high(static_cast<T>(lse)), low(std::isfinite(high) ? static_cast<T>(lse - high) : T(0)) {}
};

// Row and column log-sum-exp of logits, written to row_result [rows] and column_result [columns].
// make_logits() -> logits(tile, slot): turns products into logits in place and returns the tile of logits, its columns counted in logits.
// begin(row, column): what the sums begin with, beside nothing.
template <class T, class Result, class MakeLogits, class Begin>
inline void log_sum_exp(const PackedPair<T>& pair, std::int64_t columns, const Slots& slots, const StatisticsBuffers<T>& buffers, Result* row_result, Result* column_result,
                        const Parallel& parallel, const MakeLogits& make_logits, const Begin& begin) {
  clear(buffers.row, slots.count * pair.rows);
  clear(buffers.column, buffers.columns);
  begin(buffers.row, buffers.column);
  for_each_slot_tile(pair, slots, parallel, [&] {
    return [&, logits = make_logits()](const Tile<T>& tile, std::int64_t slot) mutable {
      const Tile<T> z = logits(tile, slot);
      const std::int64_t row = slot * pair.rows + z.row;
      fold_logits<T>(z, {buffers.row.maximum + row, buffers.row.sum + row}, {buffers.column.maximum + z.column, buffers.column.sum + z.column});
    };
  });
  for (std::int64_t i = 0; i < pair.rows; ++i) {
    T maximum = -std::numeric_limits<T>::infinity();
    double sum = 0;
    for (std::int64_t slot = 0; slot < slots.count; ++slot) merge(maximum, sum, buffers.row.maximum[slot * pair.rows + i], buffers.row.sum[slot * pair.rows + i]);
    row_result[i] = static_cast<Result>(maximum + std::log(sum));
  }
  for (std::int64_t j = 0; j < columns; ++j) column_result[j] = static_cast<Result>(buffers.column.maximum[j] + std::log(buffers.column.sum[j]));
}

}  // inline namespace
}  // namespace modalign::cpu
