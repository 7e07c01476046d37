/// @file tile_forms.cuh
/// @brief Instances of every epilogue form of tile.cuh, with the launches that a family would make: worked examples, and what the emulator proves of
/// the engine itself.
///
/// They are not part of the library: families instantiate the forms with their own epilogues.
#pragma once

#include "cuda/tile.cuh"

namespace modalign::cuda {

template <class T> using DepthFma = FmaBackend<T, Major::depth, Major::depth>;
template <class Half, int Parts> using DepthMma = MmaBackend<Half, Parts, Major::depth, Major::depth>;
template <class Backend, class Out> using ProductForm = TileWalk<Backend, StoreTile<Backend, Out>>;
template <class Backend> using LogSumExpForm = TileWalk<Backend, LogSumExpTile<Backend>>;
template <class Backend> using ValueProductForm = TileWalk<Backend, ValueProductTile<Backend, typename Backend::Real>>;

// bf16x2: fp32 operands as two planes each, the "high" precision.
#define MODALIGN_TILE_FORMS(X)                                                                    \
  X("tile.product.f32", ProductForm<DepthFma<float>, float>)                                      \
  X("tile.product.f64", ProductForm<DepthFma<double>, double>)                                    \
  X("tile.product.f16", ProductForm<DepthMma<f16, 1>, float>)                                     \
  X("tile.product.bf16", ProductForm<DepthMma<bf16, 1>, float>)                                   \
  X("tile.product.bf16x2", ProductForm<DepthMma<bf16, 2>, float>)                                 \
  X("tile.product_lines.f32", ProductForm<FmaBackend<float, Major::line, Major::line>, float>)    \
  X("tile.product_lines.bf16", ProductForm<MmaBackend<bf16, 1, Major::line, Major::line>, float>) \
  X("tile.log_sum_exp.f32", LogSumExpForm<DepthFma<float>>)                                       \
  X("tile.log_sum_exp.f64", LogSumExpForm<DepthFma<double>>)                                      \
  X("tile.log_sum_exp.bf16", LogSumExpForm<DepthMma<bf16, 1>>)                                    \
  X("tile.fold_log_sum_exp.f32", FoldLogSumExp<float>)                                            \
  X("tile.fold_log_sum_exp.f64", FoldLogSumExp<double>)                                           \
  X("tile.value_product.f32", ValueProductForm<DepthFma<float>>)                                  \
  X("tile.value_product.f64", ValueProductForm<DepthFma<double>>)                                 \
  X("tile.value_product.bf16", ValueProductForm<DepthMma<bf16, 1>>)                               \
  X("tile.value_product.bf16x2", ValueProductForm<DepthMma<bf16, 2>>)

template <class Kernel> struct FormKey;
#define MODALIGN_FORM_KEY(key, ...)           \
  template <> struct FormKey<__VA_ARGS__> {   \
    static constexpr const char* value = key; \
  };
MODALIGN_TILE_FORMS(MODALIGN_FORM_KEY)
#undef MODALIGN_FORM_KEY

// out [batches, rows, columns] = factor * rows columns^T + addend; addend has the shape of out, or is null, or is out.
template <class Kernel>
inline Kernel product_form(const Operand<typename Kernel::Source>& rows, const Operand<typename Kernel::Source>& columns, std::int64_t row_count,
                           std::int64_t column_count, std::int64_t depth, typename Kernel::Real* out, const typename Kernel::Real* addend,
                           typename Kernel::Real factor) {
  using Backend = typename Kernel::Backend;
  const std::int64_t size = row_count * column_count;
  return {rows,
          columns,
          make_grid(row_count, column_count, depth, Backend::kRows, Backend::kColumns),
          {out, addend, size, column_count, size, column_count, factor}};
}

// Statistics of exp(scale * rows columns^T) along both sides; at most `max_walks` (<= kMaxSlots) slots along each.
template <class Kernel> struct LogSumExpPlan {
  using Backend = typename Kernel::Backend;
  TileGrid grid;
  LogSumExpPlan(std::int64_t rows, std::int64_t columns, std::int64_t depth, std::int64_t max_walks)
      : grid(make_grid(rows, columns, depth, Backend::kRows, Backend::kColumns, max_walks, max_walks)) {}
  std::int64_t row_slots() const { return grid.column_walks * grid.rows; }   // pairs of a batch
  std::int64_t column_slots() const { return grid.row_walks * grid.columns; }
};
template <class Kernel>
inline Kernel log_sum_exp_form(const LogSumExpPlan<Kernel>& plan, const Operand<typename Kernel::Source>& rows,
                               const Operand<typename Kernel::Source>& columns, typename Kernel::Real scale,
                               Pack<typename Kernel::Real, 2>* row_slots, Pack<typename Kernel::Real, 2>* column_slots) {
  const TileGrid& grid = plan.grid;
  return {rows, columns, grid, {scale, row_slots, column_slots, grid.rows, grid.columns, grid.row_walks, grid.column_walks, grid.row_tiles_per_walk}};
}

// out [batches, rows, width] = exp(scale * rows columns^T) values; values [batches, columns, width], width <= Backend::kColumns.
template <class Kernel>
inline Kernel value_product_form(const Operand<typename Kernel::Source>& rows, const Operand<typename Kernel::Source>& columns,
                                 const Operand<typename Kernel::Source>& values, std::int64_t row_count, std::int64_t column_count,
                                 std::int64_t depth, int width, typename Kernel::Real scale, typename Kernel::Real* out) {
  using Backend = typename Kernel::Backend;
  TileGrid grid = make_grid(row_count, column_count, depth, Backend::kRows, Backend::kColumns, 0, 1);
  grid.column_walks = 1;   // also where there are no columns: the sum over nothing is written
  return {rows, columns, grid, {scale, values, width, out, row_count}};
}

}   // namespace modalign::cuda
