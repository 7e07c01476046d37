// Gumbel noise of pairs: argmax_j (z_j + G_j) draws j with probability exp(z_j) / sum_j exp(z_j), with no normaliser and in one pass (Gumbel-max).
//
// G = -log E with E = -log(1 - u) exponential and u uniform from 31 bits of philox(counter = pair, key = seed). What decides a draw among many is the smallest E, so small
// u keep their relative precision: log(1 - u) is not formed from 1 - u there.
#pragma once

#include "common/philox.h"
#include "common/vec.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {

// log(x) for positive normal x, to 2 eps of the larger of 1 and the result: exponent and log(1 + u) of the mantissa
template <class T>
inline Vector<T> logarithm(Vector<T> x) {
  constexpr bool single = sizeof(T) == 4;
  using Integer = std::conditional_t<single, std::int32_t, std::int64_t>;
  constexpr int shift = single ? 23 : 52;
  constexpr Integer bias = single ? 127 : 1023, one = bias << shift, mantissa = (Integer(1) << shift) - 1;
  Vector<Integer> bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Vector<T> exponent = __builtin_convertvector((bits >> shift) - bias, Vector<T>);
  bits = (bits & mantissa) | one;
  Vector<T> m;
  std::memcpy(&m, &bits, sizeof m);
  return exponent * broadcast(T(0.6931471805599453)) + log1p_unit<T>(m - broadcast(T(1)));
}

template <int lanes> struct WordsOf {
  typedef std::uint32_t words __attribute__((vector_size(4 * lanes)));
  typedef std::int32_t integers __attribute__((vector_size(4 * lanes)));
  typedef std::uint64_t wide __attribute__((vector_size(8 * lanes)));
};

template <int lanes>
struct VectorProduct {
  using Types = WordsOf<lanes>;
  void operator()(std::uint32_t factor, typename Types::words x, typename Types::words& high, typename Types::words& low) const {
    const typename Types::wide product = __builtin_convertvector(x, typename Types::wide) * static_cast<std::uint64_t>(factor);
    high = __builtin_convertvector(product >> 32, typename Types::words);
    low = __builtin_convertvector(product, typename Types::words);
  }
};

template <class T>
inline Vector<T> gumbel(typename WordsOf<kVectorLanes<T>>::words bits) {
  const Vector<T> one = broadcast(T(1)), last = broadcast(T(1) - kEpsilon<T> / 2);
  const Vector<T> whole = __builtin_convertvector(reinterpret_cast<typename WordsOf<kVectorLanes<T>>::integers>(bits >> 1), Vector<T>);
  const Vector<T> uniform = (whole + broadcast(T(0.5))) * broadcast(T(0x1p-31)), u = uniform < last ? uniform : last, odds = u / (one - u);
  const Vector<T> exponential = odds < one ? log1p_unit<T>(odds < one ? odds : one) : -logarithm<T>(one - u);
  return -logarithm<T>(exponential);
}

template <class T>
struct PairNoise {
  Vector<T> row, column;   // two draws that have nothing to do with each other
};

// of the pairs (i, j), (i, j + 1), ... of a vector
template <class T>
inline PairNoise<T> pair_noise(std::uint64_t seed, std::int64_t i, std::int64_t j) {
  constexpr int lanes = kVectorLanes<T>;
  using Words = typename WordsOf<lanes>::words;
  Words columns;
  for (int l = 0; l < lanes; ++l) columns[l] = static_cast<std::uint32_t>(j + l);
  const PhiloxBits<Words> bits = philox<Words>({columns, Words{} + static_cast<std::uint32_t>(i), Words{}, Words{}}, seed, VectorProduct<lanes>());
  return {gumbel<T>(bits.word[0]), gumbel<T>(bits.word[1])};
}

}  // inline namespace
}  // namespace modalign::cpu
