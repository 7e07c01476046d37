// Argument checks. Every message reads "op: argument must ..., got ...". The public Python functions have checked the same things with ValueError and TypeError;
// these are for callers of the raw torch.ops, and guard every pointer that a kernel follows.
#pragma once

#include <string>

#include "common/stable.h"

#define MODALIGN_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

namespace modalign {

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (std::int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline Scalar check_floating(const char* op, const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Scalar::f32;
    case ScalarType::Double: return Scalar::f64;
    case ScalarType::Half: return Scalar::f16;
    case ScalarType::BFloat16: return Scalar::bf16;
    default: MODALIGN_CHECK(false, op, ": ", argument, " must be float32, float64, float16 or bfloat16, got dtype number ", static_cast<int>(t.scalar_type()));
  }
  return Scalar::f32;
}

inline void check_shape(const char* op, const char* argument, const Tensor& t, std::initializer_list<std::int64_t> size) {
  bool same = t.dim() == static_cast<std::int64_t>(size.size());
  std::string wanted = "[";
  std::int64_t i = 0;
  for (std::int64_t n : size) {
    same = same && t.size(i) == n;
    wanted += (i++ ? ", " : "") + std::to_string(n);
  }
  MODALIGN_CHECK(same, op, ": ", argument, " must have shape ", wanted + "]", ", got ", shape_of(t));
}

inline void check_like(const char* op, const char* argument, const Tensor& t, const Tensor& other, ScalarType dtype) {
  MODALIGN_CHECK(t.is_cuda() == other.is_cuda() && t.get_device_index() == other.get_device_index(), op, ": ", argument,
                 " must be on the device of the other arguments, got another one");
  MODALIGN_CHECK(t.scalar_type() == dtype, op, ": ", argument, " must have dtype number ", static_cast<int>(dtype), ", got ", static_cast<int>(t.scalar_type()));
}

}  // namespace modalign
