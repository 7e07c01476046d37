// Tokens as rows whose cosines are asked for.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/tile.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {

// A row as it is, and 1 over its length, for a zero vector 0, NaN where it holds what is not finite. (Not at unit length: products of whole numbers are exact then, and equal ones tie.) Where a
// square leaves the range of T the row is moved into it by a power of 2, which changes no cosine.
template <class T>
inline T load_token(Scalar dtype, const void* data, std::int64_t at, std::int64_t element_stride, std::int64_t D, T* row) {
  load_row<T>(dtype, data, at, element_stride, D, row);
  T square = dot<T>(row, row, D);
  if (!(square > T(1e-30) && square < T(1e30))) {
    T largest = 0;
    for (std::int64_t k = 0; k < D; ++k) largest = std::fabs(row[k]) > largest ? std::fabs(row[k]) : largest;
    if (square != square || largest > std::numeric_limits<T>::max()) return std::numeric_limits<T>::quiet_NaN();
    if (largest == 0) return 0;
    const int exponent = std::ilogb(largest);
    for (std::int64_t k = 0; k < D; ++k) row[k] = std::ldexp(row[k], -exponent);
    square = dot<T>(row, row, D);
  }
  return 1 / std::sqrt(square);
}

}  // inline namespace
}  // namespace modalign::cpu
