// Engine form (e): both gradients of a function of the products, each tile made once and used twice.
//
//     dRow_i = sum_j T_ij column_j        dColumn_j = sum_i T_ij row_i        T = coefficient(product), made by an epilogue in place of the product
//
// Row panels are walked in order; inside a panel every thread owns whole column slots (at most kMaxSlots, their number fixed by the problem), adds the column side into
// its own rows of column_gradient and the row side into its slot's buffer; slots are added in order. No atomics, and the bits do not depend on the number of threads.
// FLOPs: 6 rows columns depth (4 with pair.products from a pass before). Memory: the operands a second time as value operands, the column gradient, slots x panel rows x depth.
#pragma once

#include "cpu/statistics.h"
#include "cpu/tile.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {

constexpr std::int64_t kMaxPanelRows = 2 * kTileRows;   // rows whose gradient is gathered at once
inline std::int64_t panel_rows_of(std::int64_t rows) { return minimum(kMaxPanelRows, round_up(rows, kRegisterRows)); }

template <class T>
struct GradientBuffers {
  T* row_values;       // one row panel as value operand [depth / P][panel rows][P]
  T* column_values;    // the columns as value operand [depth / P][columns][P]
  T* column_gradient;  // [columns][depth], packed column order
  T* slot_rows;        // [slots][panel rows][depth]

  GradientBuffers(std::int64_t rows, std::int64_t columns, std::int64_t depth, const Slots& slots, Arena& arena) {
    row_values = arena.take<T>(packed_value_size<T>(panel_rows_of(rows), depth));
    column_values = arena.take<T>(packed_value_size<T>(columns, depth));
    column_gradient = arena.take<T>(columns * depth);
    slot_rows = arena.take<T>(slots.count * panel_rows_of(rows) * depth);
  }
};

// Slot buffers stay within one copy of the rows and columns.
inline Slots gradient_slots(std::int64_t tiles, std::int64_t rows, std::int64_t columns) {
  return {tiles, (rows + columns) / maximum(1, panel_rows_of(rows))};
}

// make_epilogue() -> epilogue(tile, row_gradient, slot): called once per thread chunk. It turns tile.data into coefficients and may add to row_gradient [rows of the tile]
//   [depth] (nullptr: not wanted) what cannot be said as a coefficient.
// column(c): the contiguous row behind packed column c, nullptr for padding.
// finish_rows(first, rows, gradient_of): gradient_of(i, out) adds the slots' sums for row first + i to out [depth], in slot order.
template <class T, class Column, class MakeEpilogue, class FinishRows>
inline void gradient_walk(const PackedPair<T>& pair, const Slots& slots, const GradientBuffers<T>& buffers, bool need_rows, bool need_columns, Into row_side,
                          const Parallel& parallel, const Column& column, const MakeEpilogue& make_epilogue, const FinishRows& finish_rows) {
  const std::int64_t depth = pair.depth, panel_rows = panel_rows_of(pair.rows);
  parallel_for(parallel, 0, pair.columns, 64, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> zero(depth);
    for (std::int64_t k = 0; k < depth; ++k) zero[k] = 0;
    for (std::int64_t c = begin; c < end; ++c) {
      const T* row = column(c);
      if (need_rows) pack_value_row(row ? row : zero, depth, pair.columns, c, buffers.column_values);
      for (std::int64_t k = 0; k < depth; ++k) buffers.column_gradient[c * depth + k] = 0;
    }
  });
  for (std::int64_t first = 0; first < pair.rows; first += panel_rows) {
    const std::int64_t rows = minimum(panel_rows, pair.rows - first);
    if (need_columns) {
      Scratch<T> line(depth);
      for (std::int64_t i = 0; i < rows; ++i) {
        unpack_row(pair.row_panels, first + i, depth, static_cast<T*>(line));
        pack_value_row<T>(line, depth, panel_rows, i, buffers.row_values);
      }
    }
    parallel_for(parallel, 0, slots.count, 1, [&](std::int64_t begin, std::int64_t end) {
      Scratch<T> data(panel_rows * pair.tile_columns), left(panel_rows * round_up(pair.tile_columns, kRegisterRows));
      auto epilogue = make_epilogue();
      for (std::int64_t slot = begin; slot < end; ++slot) {
        T* row_gradient = need_rows ? buffers.slot_rows + slot * panel_rows * depth : nullptr;
        if (row_gradient) for (std::int64_t k = 0; k < rows * depth; ++k) row_gradient[k] = 0;
        for (std::int64_t block = slots.first_tile(slot); block < slots.first_tile(slot + 1); ++block) {
          const std::int64_t at = block * pair.tile_columns;
          const Tile<T> tile{first, rows, at, minimum(pair.tile_columns, pair.columns - at), data, pair.tile_columns};
          if (pair.products) std::memcpy(data, pair.kept(block, first), rows * tile.ld * sizeof(T));
          else tile_product<T>(pair.row_panels + first * depth, rows, pair.column_panels + at * depth, tile.columns, depth, data, tile.ld);
          epilogue(tile, row_gradient, slot);
          if (row_gradient) {   // T X
            pack_tile_rows<T>(data, tile.ld, rows, tile.columns, left);
            value_product<T>(left, rows, tile.columns, buffers.column_values, pair.columns, at, depth, row_gradient, depth, row_side);
          }
          if (need_columns) {   // T^t A
            pack_tile_columns<T>(data, tile.ld, tile.columns, rows, left);
            value_product<T>(left, tile.columns, rows, buffers.row_values, panel_rows, 0, depth, buffers.column_gradient + at * depth, depth, Into::add);
          }
        }
      }
    });
    if (need_rows)
      finish_rows(first, rows, [&](std::int64_t i, T* out) {
        for (std::int64_t slot = 0; slot < slots.count; ++slot) add_scaled<T>(out, 1, buffers.slot_rows + (slot * panel_rows + i) * depth, depth);
      });
  }
}

}  // inline namespace
}  // namespace modalign::cpu
