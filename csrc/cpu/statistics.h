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
  T* sum;
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
inline void merge(T& maximum, T& sum, T other_maximum, T other_sum) {
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
    T total = row.sum[i] * std::exp(row.maximum[i] - offset);
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
    Vector<T> sum = load(column.sum + c) * exponential<T>(before - offset);
    for (std::int64_t i = 0; i < tile.rows; ++i) sum += exponential<T>(load(tile.data + i * tile.ld + c) - offset);
    store(column.maximum + c, top);
    store(column.sum + c, sum);
  }
}

// How column tiles are dealt out to slots: fixed by the problem, never by the threads.
struct Slots {
  std::int64_t tiles, count;
  // limit: how many slot buffers the caller can afford
  Slots(std::int64_t tiles, std::int64_t limit) : tiles(tiles), count(maximum(1, minimum(minimum(kMaxSlots, tiles), limit))) {}
  std::int64_t first_tile(std::int64_t slot) const { return slot * tiles / count; }
};

// Row and column log-sum-exp of logit(product, i, j), written to row_result [rows] and column_result [columns].
// row_scratch holds 2 slots.count rows numbers, column_scratch 2 round_up(columns, kPanelColumns).
template <class T, class Logit>
inline void log_sum_exp(const T* row_panels, std::int64_t rows, const T* column_panels, std::int64_t columns, std::int64_t depth, std::int64_t tile_columns, Logit logit,
                        const Slots& slots, T* row_scratch, T* column_scratch, T* row_result, T* column_result, const Parallel& parallel) {
  const std::int64_t padded = round_up(columns, kPanelColumns<T>);
  const OnlineSum<T> column_sums{column_scratch, column_scratch + padded};
  clear(column_sums, padded);
  parallel_for(parallel, 0, slots.count, 1, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> data(kTileRows * tile_columns);
    for (std::int64_t slot = begin; slot < end; ++slot) {
      const OnlineSum<T> row_sums{row_scratch + 2 * slot * rows, row_scratch + (2 * slot + 1) * rows};
      clear(row_sums, rows);
      for (std::int64_t block = slots.first_tile(slot); block < slots.first_tile(slot + 1); ++block)
        for (std::int64_t row = 0; row < rows; row += kTileRows) {
          const std::int64_t column = block * tile_columns;
          const Tile<T> tile{row, minimum(kTileRows, rows - row), column, minimum(tile_columns, padded - column), data, tile_columns};
          tile_product<T>(row_panels + row * depth, tile.rows, column_panels + column * depth, tile.columns, depth, data, tile.ld);
          for (std::int64_t i = 0; i < tile.rows; ++i)
            for (std::int64_t c = 0; c < tile.columns; ++c) {
              T& z = data[i * tile.ld + c];
              z = column + c < columns ? logit(z, row + i, column + c) : -std::numeric_limits<T>::infinity();
            }
          fold_logits<T>(tile, {row_sums.maximum + row, row_sums.sum + row}, {column_sums.maximum + column, column_sums.sum + column});
        }
    }
  });
  for (std::int64_t i = 0; i < rows; ++i) {
    T maximum = -std::numeric_limits<T>::infinity(), sum = 0;
    for (std::int64_t slot = 0; slot < slots.count; ++slot) merge(maximum, sum, row_scratch[2 * slot * rows + i], row_scratch[(2 * slot + 1) * rows + i]);
    row_result[i] = maximum + std::log(sum);
  }
  for (std::int64_t j = 0; j < columns; ++j) column_result[j] = column_sums.maximum[j] + std::log(column_sums.sum[j]);
}

}  // inline namespace
}  // namespace modalign::cpu
