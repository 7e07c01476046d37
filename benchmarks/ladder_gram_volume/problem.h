// Inputs, factors and a double-precision answer for the CUDA ladder: host code that ladder.cu and emulate.cpp share.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

namespace ladder {

struct HostProblem {
  std::int64_t B, C, D;
  int m;
  std::vector<float> anchor, basis, scale;
  std::vector<double> others;   // as drawn

  HostProblem(std::int64_t B, std::int64_t C, std::int64_t D, int m, unsigned seed) : B(B), C(C), D(D), m(m), anchor(B * D), basis(C * m * D), scale(C), others(C * m * D) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (float& x : anchor) x = normal(generator);
    for (double& x : others) x = normal(generator);
    std::vector<double> q(m * D);
    for (std::int64_t j = 0; j < C; ++j) {
      scale[j] = static_cast<float>(orthonormalize(j, q.data()));
      for (std::int64_t k = 0; k < m * D; ++k) basis[j * m * D + k] = static_cast<float>(q[k]);
    }
  }

  // Gram-Schmidt, twice, in double; returns the volume of the candidate's own vectors.
  double orthonormalize(std::int64_t j, double* q) const {
    double volume = 1;
    for (int p = 0; p < m; ++p) {
      double* row = q + p * D;
      for (std::int64_t k = 0; k < D; ++k) row[k] = others[(j * m + p) * D + k];
      for (int pass = 0; pass < 2; ++pass)
        for (int o = 0; o < p; ++o) {
          double along = 0;
          for (std::int64_t k = 0; k < D; ++k) along += row[k] * q[o * D + k];
          for (std::int64_t k = 0; k < D; ++k) row[k] -= along * q[o * D + k];
        }
      double square = 0;
      for (std::int64_t k = 0; k < D; ++k) square += row[k] * row[k];
      const double length = std::sqrt(square);
      for (std::int64_t k = 0; k < D; ++k) row[k] /= length;
      volume *= length;
    }
    return volume;
  }

  // Largest error over RMS among the pairs of every `stride`-th anchor; infinite where something is not finite.
  double relative_error(const std::vector<float>& volume, std::int64_t stride = 1) const {
    double largest = 0, squares = 0;
    std::int64_t count = 0;
    std::vector<double> q(m * D);
    for (std::int64_t j = 0; j < C; ++j) {
      const double d = orthonormalize(j, q.data());
      for (std::int64_t i = 0; i < B; i += stride, ++count) {
        double residual = 0;
        for (std::int64_t k = 0; k < D; ++k) residual += double(anchor[i * D + k]) * anchor[i * D + k];
        for (int p = 0; p < m; ++p) {
          double s = 0;
          for (std::int64_t k = 0; k < D; ++k) s += anchor[i * D + k] * q[p * D + k];
          residual -= s * s;
        }
        const double expected = d * std::sqrt(residual > 0 ? residual : 0), error = std::fabs(volume[i * C + j] - expected);
        if (!(error <= 1e300)) return INFINITY;
        largest = error > largest ? error : largest;
        squares += expected * expected;
      }
    }
    if (largest == 0) return 0;
    return squares > 0 ? largest / std::sqrt(squares / count) : INFINITY;
  }
};

}  // namespace ladder
