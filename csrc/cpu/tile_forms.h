// The forms of the tile engine as plain functions on row-major matrices: what tests and benchmarks of the engine itself call, and what to read before writing an epilogue.
//   product         out [rows, columns] = A B^t                                      (form a: plain store)
//   square_sum      out [rows, columns / group] = sum of squares of `group` neighbouring products    (form b)
//   log_sum_exp     row [rows], column [columns] of scale A B^t                          (form c: online statistics of rows and columns)
//   weighted_values out [rows, width] = (A B^t) V, the product never stored              (form d: value product)
// A [rows, depth], B [columns, depth], V [columns, width]; contiguous; float or double.
#pragma once

#include <cstdint>

#include "cpu/instruction_set.h"
#include "cpu/parallel.h"

namespace modalign::cpu {

template <class T>
struct TileForms {
  void (*product)(const T* A, const T* B, std::int64_t rows, std::int64_t columns, std::int64_t depth, T* out, const Parallel&);
  void (*square_sum)(const T* A, const T* B, std::int64_t rows, std::int64_t columns, std::int64_t depth, int group, T* out, const Parallel&);
  void (*log_sum_exp)(const T* A, const T* B, std::int64_t rows, std::int64_t columns, std::int64_t depth, T scale, T* row, T* column, const Parallel&);
  void (*weighted_values)(const T* A, const T* B, const T* V, std::int64_t rows, std::int64_t columns, std::int64_t depth, std::int64_t width, T* out, const Parallel&);
};

struct AllTileForms {
  TileForms<float> f32;
  TileForms<double> f64;
};

const AllTileForms& tile_forms();   // of the instruction set in use

}  // namespace modalign::cpu
