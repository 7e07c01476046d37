// Rows of any dtype and strides as an operand of the tile engine.
#pragma once

#include "cpu/tile.h"
#include "ops/gram_volume.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {

// `count` rows of length D into panels of `width`; done(panel, first row) follows each.
template <int width, class T, class Done>
inline void pack_rows(Scalar dtype, const BatchedRows& from, std::int64_t count, std::int64_t D, T* panels, const Parallel& parallel, const Done& done) {
  parallel_for(parallel, 0, (count + width - 1) / width, 4, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> rows(width * D);
    for (std::int64_t panel = begin; panel < end; ++panel) {
      const std::int64_t first = panel * width;
      const int here = static_cast<int>(minimum(width, count - first));
      for (int r = 0; r < here; ++r) load_row<T>(dtype, from.data, (first + r) * from.row_stride, from.element_stride, D, rows + r * D);
      pack_panel(width, here, D, [&](int r) { return rows + r * D; }, panels + first * D);
      done(panels + first * D, first);
    }
  });
}

template <int width, class T>
inline void pack_rows(Scalar dtype, const BatchedRows& from, std::int64_t count, std::int64_t D, T* panels, const Parallel& parallel) {
  pack_rows<width>(dtype, from, count, D, panels, parallel, [](const T*, std::int64_t) {});
}

}  // inline namespace
}  // namespace modalign::cpu
