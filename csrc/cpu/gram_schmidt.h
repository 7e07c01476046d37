// Thin QR of a handful of vectors, R = L Q, by modified Gram-Schmidt run twice. Working on the D-vectors themselves, never on their Gram matrix, keeps the digits that
// squared quantities lose (a Cholesky factor of the Gram matrix in float fails once vectors differ by less than 1e-4).
#pragma once

#include <limits>


#include "common/vec.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {

// A vector whose part outside the span of its predecessors is below this share of its own length is taken as dependent: that part is rounding.
template <class T> constexpr T kDependent = 16 * kEpsilon<T>;

// q: m rows of length D holding R, overwritten with Q; factor: [m, m] = L. present[p] false: row p is ignored (Q_p = 0, L_pp = 1) whatever it contains.
// Dependent p: Q_p = 0, L_pp = 0. A NaN reaches L_pp and with it the product of the diagonal. Returns that product, the volume of the present vectors.
template <class T, class Present>
inline T gram_schmidt(T* q, int m, std::int64_t D, T* factor, const Present& present) {
  T volume = 1;
  for (int p = 0; p < m; ++p) {
    T* row = q + p * D;
    T* L = factor + p * m;
    for (int o = 0; o < m; ++o) L[o] = 0;
    if (!present(p)) {
      for (std::int64_t k = 0; k < D; ++k) row[k] = 0;
      L[p] = 1;
      continue;
    }
    const T length = std::sqrt(dot(row, row, D));
    for (int pass = 0; pass < 2; ++pass)
      for (int o = 0; o < p; ++o) {
        const T along = dot(row, q + o * D, D);   // rows of absent and dependent predecessors are zero
        L[o] += along;
        add_scaled(row, -along, q + o * D, D);
      }
    const T rest = std::sqrt(dot(row, row, D));
    if (rest <= kDependent<T> * length && rest < std::numeric_limits<T>::infinity()) {   // false for NaN and Inf: these go on into the volume
      for (std::int64_t k = 0; k < D; ++k) row[k] = 0;
      L[p] = 0;
    } else {
      const T inverse = 1 / rest;
      for (std::int64_t k = 0; k < D; ++k) row[k] *= inverse;
      L[p] = rest;
    }
    volume *= L[p];
  }
  return volume;
}

// x <- L^-T x for m right-hand rows of length D; a zero on the diagonal was dealt with before.
template <class T>
inline void solve_transposed(const T* factor, int m, std::int64_t D, T* x) {
  for (int p = m - 1; p >= 0; --p) {
    T* row = x + p * D;
    for (int o = p + 1; o < m; ++o) add_scaled(row, -factor[o * m + p], x + o * D, D);
    const T inverse = 1 / factor[p * m + p];
    for (std::int64_t k = 0; k < D; ++k) row[k] *= inverse;
  }
}

}  // inline namespace
}  // namespace modalign::cpu
