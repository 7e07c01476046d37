// Four epilogues in their shortest form; see tile_forms.h.
#include "cpu/tile_forms.h"

#include "cpu/statistics.h"
#include "cpu/tile.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {
namespace {

constexpr int kTileLaneGroups = 8;   // 8 x 64 bytes: with depth 512 the column panels of one tile take 256 KB, which stays in L2

// Both operands packed; source(c) may permute the columns and return nullptr for padding.
template <class T>
struct Packed {
  std::int64_t columns;
  Scratch<T> row_panels, column_panels;

  template <class Source>
  Packed(const T* A, std::int64_t rows, std::int64_t columns, std::int64_t depth, Source source, const Parallel& parallel)
      : columns(round_up(columns, kPanelColumns<T>)), row_panels(packed_rows_size(rows, depth)), column_panels(packed_columns_size<T>(columns, depth)) {
    parallel_for(parallel, 0, (rows + kRegisterRows - 1) / kRegisterRows, 8, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t p = begin; p < end; ++p) {
        const std::int64_t first = p * kRegisterRows;
        pack_panel(kRegisterRows, static_cast<int>(minimum(kRegisterRows, rows - first)), depth, [&](int r) { return A + (first + r) * depth; }, row_panels + first * depth);
      }
    });
    constexpr int P = kPanelColumns<T>;
    parallel_for(parallel, 0, this->columns / P, 4, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t p = begin; p < end; ++p) pack_panel(P, P, depth, [&](int c) { return source(p * P + c); }, column_panels + p * P * depth);
    });
  }
};

template <class T>
void product(const T* A, const T* B, std::int64_t rows, std::int64_t columns, std::int64_t depth, T* out, const Parallel& parallel) {
  const Packed<T> packed(A, rows, columns, depth, [&](std::int64_t c) { return c < columns ? B + c * depth : nullptr; }, parallel);
  for_each_tile<T>(packed.row_panels, rows, packed.column_panels, columns, depth, kTileLaneGroups * kLanes<T>, parallel, [&] {
    return [&](const Tile<T>& tile) {
      const std::int64_t count = minimum(tile.columns, columns - tile.column);
      for (std::int64_t i = 0; i < tile.rows; ++i)
        for (std::int64_t c = 0; c < count; ++c) out[(tile.row + i) * columns + tile.column + c] = tile.data[i * tile.ld + c];
    };
  });
}

// Vertical sums: lane l of `group` neighbouring lane vectors belongs to one result, so packed column = (result / W * group + p) W + result % W.
template <class T>
void square_sum(const T* A, const T* B, std::int64_t rows, std::int64_t columns, std::int64_t depth, int group, T* out, const Parallel& parallel) {
  constexpr int W = kLanes<T>;
  const std::int64_t results = columns / group, blocks = (results + W - 1) / W;
  const auto source = [&](std::int64_t c) -> const T* {
    const std::int64_t block = c / (group * W), result = block * W + c % W;
    return block < blocks && result < results ? B + (result * group + c / W % group) * depth : nullptr;
  };
  const Packed<T> packed(A, rows, blocks * group * W, depth, source, parallel);
  std::int64_t per_tile = maximum(1, kTileLaneGroups / group);
  while (per_tile * group * W % kPanelColumns<T>) ++per_tile;
  for_each_tile<T>(packed.row_panels, rows, packed.column_panels, packed.columns, depth, per_tile * group * W, parallel, [&] {
    return [&](const Tile<T>& tile) {
      const std::int64_t first = tile.column / (group * W), last = minimum((tile.column + tile.columns) / (group * W), blocks);
      for (std::int64_t i = 0; i < tile.rows; ++i)
        for (std::int64_t block = first; block < last; ++block) {
          const T* s = tile.data + i * tile.ld + block * group * W - tile.column;
          T sum[W] = {};
          for (int p = 0; p < group; ++p)
            for (int l = 0; l < W; ++l) sum[l] += s[p * W + l] * s[p * W + l];
          for (int l = 0; l < minimum(W, results - block * W); ++l) out[(tile.row + i) * results + block * W + l] = sum[l];
        }
    };
  });
}

template <class T>
void log_sum_exp_form(const T* A, const T* B, std::int64_t rows, std::int64_t columns, std::int64_t depth, T scale, T* row, T* column, const Parallel& parallel) {
  const Packed<T> packed(A, rows, columns, depth, [&](std::int64_t c) { return c < columns ? B + c * depth : nullptr; }, parallel);
  const std::int64_t tile_columns = kTileLaneGroups * kLanes<T>;
  const Slots slots((packed.columns + tile_columns - 1) / tile_columns, kMaxSlots);
  Arena count(nullptr);
  StatisticsBuffers<T>(rows, packed.columns, slots, count);
  const Scratch<char> memory(count.used());
  Arena arena(memory);
  log_sum_exp<T>({packed.row_panels, rows, packed.column_panels, packed.columns, depth, tile_columns}, columns, slots, StatisticsBuffers<T>(rows, packed.columns, slots, arena),
                 row, column, parallel, [&] {
                   return [&](const Tile<T>& tile, std::int64_t) {
                     for (std::int64_t i = 0; i < tile.rows; ++i)
                       for (std::int64_t c = 0; c < tile.columns; ++c) {
                         T& z = tile.data[i * tile.ld + c];
                         z = tile.column + c < columns ? scale * z : -std::numeric_limits<T>::infinity();
                       }
                     return tile;
                   };
                 }, [](const auto&, const auto&) {});
}

template <class T>
void weighted_values(const T* A, const T* B, const T* V, std::int64_t rows, std::int64_t columns, std::int64_t depth, std::int64_t width, T* out, const Parallel& parallel) {
  const Packed<T> packed(A, rows, columns, depth, [&](std::int64_t c) { return c < columns ? B + c * depth : nullptr; }, parallel);
  const Scratch<T> values(packed_value_size<T>(packed.columns, width)), zero(width);
  for (std::int64_t n = 0; n < width; ++n) zero[n] = 0;
  for (std::int64_t c = 0; c < packed.columns; ++c) pack_value_row<T>(c < columns ? V + c * width : zero, width, packed.columns, c, values);
  constexpr std::int64_t tile_columns = kTileLaneGroups * kLanes<T>;
  // a thread owns whole row blocks and walks their columns in order
  parallel_for(parallel, 0, (rows + kTileRows - 1) / kTileRows, 1, [&](std::int64_t begin, std::int64_t end) {
    const Scratch<T> tile(kTileRows * tile_columns), left(kTileRows * tile_columns);
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t row = block * kTileRows, count = minimum(kTileRows, rows - row);
      for (std::int64_t k = 0; k < count * width; ++k) out[row * width + k] = 0;
      for (std::int64_t column = 0; column < packed.columns; column += tile_columns) {
        const std::int64_t width_here = minimum(tile_columns, packed.columns - column);
        tile_product<T>(packed.row_panels + row * depth, count, packed.column_panels + column * depth, width_here, depth, tile, tile_columns);
        pack_tile_rows<T>(tile, tile_columns, count, width_here, left);
        value_product<T>(left, count, width_here, values, packed.columns, column, width, out + row * width, width, Into::add);
      }
    }
  });
}

template <class T>
constexpr TileForms<T> forms() { return {product<T>, square_sum<T>, log_sum_exp_form<T>, weighted_values<T>}; }

}  // namespace

extern const AllTileForms kTileForms;
const AllTileForms kTileForms = {forms<float>(), forms<double>()};

}  // inline namespace
}  // namespace modalign::cpu
