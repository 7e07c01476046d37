// Element types that ops accept. Values are stored as they are in memory; 16-bit types are widened to float where they are read.
#pragma once

#include <cstdint>

namespace modalign {

enum class Scalar : std::int8_t { f32, f64, f16, bf16 };

constexpr int size_of(Scalar s) { return s == Scalar::f64 ? 8 : s == Scalar::f32 ? 4 : 2; }
constexpr int accumulation_size(Scalar s) { return s == Scalar::f64 ? 8 : 4; }   // "real": float, or double for double

}  // namespace modalign
