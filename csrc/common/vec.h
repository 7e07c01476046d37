// SIMD vocabulary of the CPU kernels: one native vector type per element type, half conversions, and the reductions whose order every kernel shares.
//
// Each instruction set compiles the kernels again, so everything here lives in an inline namespace named after it (MODALIGN_ISA): two copies of an inline
// function built with different flags can then never be merged by the linker, which would put AVX-512 code on a machine without it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__) || defined(__AVX__)
#include <immintrin.h>
#endif

#include "ops/scalar.h"

#ifndef MODALIGN_ISA
#define MODALIGN_ISA portable
#endif

namespace modalign::cpu {
inline namespace MODALIGN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// A native register of T. GCC and Clang vector extensions: the arithmetic operators work lane by lane and contract to FMA where the target has it.
template <class T> struct VectorOf { typedef T type __attribute__((vector_size(kVectorBytes))); };
template <class T> using Vector = typename VectorOf<T>::type;
template <class T> constexpr int kVectorLanes = kVectorBytes / static_cast<int>(sizeof(T));

// Columns are always grouped by 64 bytes (16 floats, 8 doubles), whatever the register width, so that packed layouts and epilogues are the same on every path.
template <class T> constexpr int kLanes = 64 / static_cast<int>(sizeof(T));

template <class T> inline Vector<T> load(const T* p) { Vector<T> v; std::memcpy(&v, p, sizeof v); return v; }
template <class T> inline void store(T* p, Vector<T> v) { std::memcpy(p, &v, sizeof v); }
template <class T> inline Vector<T> broadcast(T x) { return x - Vector<T>{}; }

// Bit l says whether lane l of a is at least that of b. (Where comparisons have a mask register the compiler would make lanes of it and a mask of these again.)
template <class T>
inline std::uint32_t at_least(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GE_OQ);
  else return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), _CMP_GE_OQ);
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4) return static_cast<std::uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(a >= b)));
  else return static_cast<std::uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(a >= b)));
#else
  const auto holds = a >= b;
  std::uint32_t bits = 0;
  for (int l = 0; l < kVectorLanes<T>; ++l) bits |= static_cast<std::uint32_t>(holds[l] != 0) << l;
  return bits;
#endif
}

// f(T{}) with what a dtype is accumulated in: double for double, float for everything else.
template <class F>
inline auto with_real(Scalar dtype, F f) {
  return dtype == Scalar::f64 ? f(double{}) : f(float{});
}

// ---- 16-bit types -------------------------------------------------------------------------------------------------------------------------------------

inline float widen_bf16(std::uint16_t h) {
  const std::uint32_t bits = static_cast<std::uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline std::uint16_t narrow_bf16(float x) {   // round to nearest even; a NaN stays a (quiet) NaN
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return static_cast<std::uint16_t>(x != x ? (bits >> 16) | 0x40 : rounded >> 16);
}

// float16 by hand where the processor cannot: compiler helpers for _Float16 would tie the binary to the newest libgcc.
inline float widen_f16(std::uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  // exponent and mantissa moved into place make x * 2^-112; the multiplication also normalises subnormals. Infinity and NaN get their exponent back.
  std::uint32_t bits = (h & 0x7fffu) << 13;
  float x;
  std::memcpy(&x, &bits, 4);
  x *= 0x1p112f;
  std::memcpy(&bits, &x, 4);
  if ((h & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  bits |= (h & 0x8000u) << 16;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

inline std::uint16_t narrow_f16(float x) {   // round to nearest even
#if defined(__F16C__)
  return static_cast<std::uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);    // NaN
  if (bits >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);   // 65520 and above round to infinity
  if (bits < 0x38800000u) {   // below 2^-14: adding 0.5 lets the adder do the rounding of the subnormal
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return static_cast<std::uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xc8000fffu + (bits >> 13 & 1);   // exponent 127 -> 15, half a unit, ties to even
  return static_cast<std::uint16_t>(sign | bits >> 13);
#endif
}

// n elements of any dtype, `stride` elements apart, widened to T (float for 16-bit and float input, double for double).
template <class T>
inline void load_row(Scalar dtype, const void* data, std::int64_t offset, std::int64_t stride, std::int64_t n, T* out) {
  switch (dtype) {
    case Scalar::f32: {
      const float* p = static_cast<const float*>(data) + offset;
      if (stride == 1) for (std::int64_t k = 0; k < n; ++k) out[k] = p[k];
      else for (std::int64_t k = 0; k < n; ++k) out[k] = p[k * stride];
      return;
    }
    case Scalar::f64: {
      const double* p = static_cast<const double*>(data) + offset;
      for (std::int64_t k = 0; k < n; ++k) out[k] = static_cast<T>(p[k * stride]);
      return;
    }
    case Scalar::bf16: {
      const std::uint16_t* p = static_cast<const std::uint16_t*>(data) + offset;
      if (stride == 1) for (std::int64_t k = 0; k < n; ++k) out[k] = widen_bf16(p[k]);
      else for (std::int64_t k = 0; k < n; ++k) out[k] = widen_bf16(p[k * stride]);
      return;
    }
    case Scalar::f16: {
      const std::uint16_t* p = static_cast<const std::uint16_t*>(data) + offset;
      for (std::int64_t k = 0; k < n; ++k) out[k] = widen_f16(p[k * stride]);
      return;
    }
  }
}

// n elements of T to contiguous elements of any dtype.
template <class T>
inline void store_row(Scalar dtype, void* data, std::int64_t offset, std::int64_t n, const T* in) {
  switch (dtype) {
    case Scalar::f32: { float* p = static_cast<float*>(data) + offset; for (std::int64_t k = 0; k < n; ++k) p[k] = static_cast<float>(in[k]); return; }
    case Scalar::f64: { double* p = static_cast<double*>(data) + offset; for (std::int64_t k = 0; k < n; ++k) p[k] = static_cast<double>(in[k]); return; }
    case Scalar::bf16: { auto* p = static_cast<std::uint16_t*>(data) + offset; for (std::int64_t k = 0; k < n; ++k) p[k] = narrow_bf16(static_cast<float>(in[k])); return; }
    case Scalar::f16: { auto* p = static_cast<std::uint16_t*>(data) + offset; for (std::int64_t k = 0; k < n; ++k) p[k] = narrow_f16(static_cast<float>(in[k])); return; }
  }
}

// ---- vectors of length n ------------------------------------------------------------------------------------------------------------------------------

// Four register accumulators in a fixed order: more digits than one running sum, and the same bits whoever calls.
template <class T>
inline T dot(const T* x, const T* y, std::int64_t n) {
  constexpr int L = kVectorLanes<T>;
  Vector<T> sum[4] = {};
  std::int64_t k = 0;
  for (; k + 4 * L <= n; k += 4 * L)
    for (int u = 0; u < 4; ++u) sum[u] += load(x + k + u * L) * load(y + k + u * L);
  for (; k + L <= n; k += L) sum[0] += load(x + k) * load(y + k);
  const Vector<T> total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  T result = 0;
  for (int lane = 0; lane < L; ++lane) result += total[lane];
  for (; k < n; ++k) result += x[k] * y[k];
  return result;
}

// y += scale x
template <class T>
inline void add_scaled(T* y, T scale, const T* x, std::int64_t n) {
  for (std::int64_t k = 0; k < n; ++k) y[k] += scale * x[k];
}

// ---- elementwise --------------------------------------------------------------------------------------------------------------------------------------

// The larger one; a NaN in x is dropped, as a running maximum wants it (the sum of exponentials keeps it).
template <class T> inline Vector<T> larger(Vector<T> x, Vector<T> y) { return x > y ? x : y; }

// exp(x) to 2 ulp (float) and 1 ulp (double) for x <= 88 (709); below the normal range 0; NaN stays NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2; the Taylor polynomial of exp(r); n added to the exponent. ln 2 in two parts, so that n ln 2 is subtracted exactly.
template <class T>
inline Vector<T> exponential(Vector<T> x) {
  constexpr bool single = sizeof(T) == 4;
  using Integer = std::conditional_t<single, std::int32_t, std::int64_t>;
  constexpr T lowest = single ? T(-87.3) : T(-708.3), highest = single ? T(88.7) : T(709.7);
  constexpr T shifter = single ? T(12582912) : T(6755399441055744);   // 1.5 2^23, 1.5 2^52: adding it rounds to an integer, left in the low bits
  constexpr T high = single ? T(0.693359375) : T(0.693145751953125), low = single ? T(-2.12194440e-4) : T(1.42860682030941723212e-6);
  constexpr int degree = single ? 7 : 13;
  constexpr double inverse_factorials[] = {1.0, 1.0, 0.5, 0.16666666666666666, 0.041666666666666664, 0.008333333333333333, 0.001388888888888889, 0.0001984126984126984,
                                           2.48015873015873e-05, 2.7557319223985893e-06, 2.755731922398589e-07, 2.505210838544172e-08, 2.08767569878681e-09, 1.6059043836821613e-10};
  const Vector<T> clamped = x > broadcast(highest) ? broadcast(highest) : x;
  const Vector<T> shifted = clamped * broadcast(T(1.4426950408889634)) + broadcast(shifter);
  const Vector<T> n = shifted - broadcast(shifter);
  const Vector<T> r = (clamped - n * broadcast(high)) - n * broadcast(low);
  Vector<T> power = broadcast(T(inverse_factorials[degree]));
  for (int d = degree - 1; d >= 0; --d) power = power * r + broadcast(T(inverse_factorials[d]));
  Vector<Integer> bits, exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &power, sizeof bits);
  bits += exponent << (single ? 23 : 52);   // the shifter's own bits leave at the top
  Vector<T> result;
  std::memcpy(&result, &bits, sizeof result);
  result = x < broadcast(lowest) ? Vector<T>{} : result;
  return x != x ? x : result;
}

// 2 atanh(s) = log((1 + s) / (1 - s)) for 0 <= s <= 1/3; relative error 2 eps, also for tiny s.
template <class T>
inline Vector<T> twice_atanh(Vector<T> s) {
  constexpr int terms = sizeof(T) == 4 ? 8 : 17;   // s^2 <= 1/9
  const Vector<T> square = s * s;
  Vector<T> series{};
  for (int n = terms; n >= 0; --n) series = series * square + broadcast(T(1) / T(2 * n + 1));
  return broadcast(T(2)) * s * series;
}

// log(1 + u) for 0 <= u <= 1
template <class T>
inline Vector<T> log1p_unit(Vector<T> u) {
  return twice_atanh<T>(u / (u + broadcast(T(2))));
}

// log(1 + exp(z)), no overflow for any z
template <class T>
inline Vector<T> softplus(Vector<T> z) {
  const Vector<T> positive = z > Vector<T>{} ? z : Vector<T>{}, magnitude = z > Vector<T>{} ? z : -z;
  return positive + log1p_unit<T>(exponential<T>(-magnitude));
}

// 1 / (1 + exp(-z))
template <class T>
inline Vector<T> sigmoid(Vector<T> z) {
  const Vector<T> one = broadcast(T(1)), e = exponential<T>(z > Vector<T>{} ? -z : z);
  return (z > Vector<T>{} ? one : e) / (one + e);
}

template <class T> constexpr T kEpsilon = sizeof(T) == 4 ? T(1.1920929e-7) : T(2.220446049250313e-16);

}  // inline namespace
}  // namespace modalign::cpu
