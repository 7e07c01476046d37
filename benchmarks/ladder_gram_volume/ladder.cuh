// The CUDA side of the ladder, in the subset of common/simt.h: the same source is compiled by nvcc (ladder.cu) and run thread by thread in the emulator (emulate.cpp).
//
//   naive    one thread per pair, every operand from global memory            4 bytes read for 2 FLOPs
//   tiled    64 x 64 coefficients per block through shared memory, stored; a second kernel squares, sums and takes the root
//   fused    the same tile, its square-sum in the block, nothing but volumes stored
//
// V_ij = d_j sqrt(|a_i|^2 - sum_p (q_jp . a_i)^2); basis q [C, m, D] and scale d [C] are given (one thin QR per candidate, not part of the ladder).
// Mapping    tiled, fused: block (x, y) makes rows 64 y .. and packed columns kColumnsPerTile x .., a whole number of candidates; each of 256 threads holds 4 x 4 sums.
// Shared     two strips of 64 x 16 operands, padded against bank conflicts; fused lays the 64 x 64 products over them.
// Order      d = 0, 1, ... in one chain: the same bits whatever the grid.
// The library's own kernels (csrc/cuda) go on from here: asynchronous copies, tensor cores, nearly dependent pairs, a backward.
#pragma once

#include "common/simt.h"

namespace ladder {

using namespace modalign::simt;

struct Problem {
  std::int64_t B, C, D;
  int m;
  const float* anchor;   // [B, D]
  const float* basis;    // [C, m, D]
  const float* scale;    // [C]
};

constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kPitch = kTile + 4;   // of a strip row [kDepth][kPitch]
constexpr int kThreads = 256;

MODALIGN_HOST_DEVICE constexpr int columns_per_tile(int m) { return kTile / m * m; }

// ---- rung 1 -------------------------------------------------------------------------------------------------------------------------------------------

struct NaiveKernel {
  static constexpr int kThreads = 256;
  Problem p;
  float* volume;   // [B, C]

  MODALIGN_DEVICE void operator()() const {
    const Global<const float> anchor(p.anchor), basis(p.basis), scale(p.scale);
    const Global<float> out(volume);
    const std::int64_t j = std::int64_t(block_index_x()) * 16 + thread_index() % 16, i = std::int64_t(block_index_y()) * 16 + thread_index() / 16;
    if (i >= p.B || j >= p.C) return;
    float residual = 0;
    for (std::int64_t d = 0; d < p.D; ++d) {
      const float a = anchor[i * p.D + d];
      residual += a * a;
    }
    for (int o = 0; o < p.m; ++o) {
      float s = 0;
      for (std::int64_t d = 0; d < p.D; ++d) {
        const float a = anchor[i * p.D + d], q = basis[(j * p.m + o) * p.D + d];
        s += a * q;
      }
      residual -= s * s;
    }
    const float d = scale[j];
    out[i * p.C + j] = d * square_root(maximum(residual, 0.0f));
  }
};

inline LaunchPlan plan_naive(const Problem& p) {
  return {{unsigned(ceil_divide<std::int64_t>(p.C, 16)), unsigned(ceil_divide<std::int64_t>(p.B, 16)), 1}, 256, 0, "ladder_naive"};
}

// ---- the tile that rungs 2 and 3 share -----------------------------------------------------------------------------------------------------------------

// sum[u][v] = a_{row + 16 u + ty} . q_{column + 16 v + tx}, zero beyond the edges; square[u] = |a|^2 of the same rows.
MODALIGN_DEVICE void multiply_tile(const Problem& p, std::int64_t row, std::int64_t column, std::int64_t columns, float (&sum)[4][4], float (&square)[4]) {
  const Global<const float> anchor(p.anchor), basis(p.basis);
  const Shared<float> left = shared<float>(0, kDepth * kPitch), right = shared<float>(kDepth * kPitch * 4, kDepth * kPitch);
  const int t = thread_index(), tx = t % 16, ty = t / 16;
  MODALIGN_UNROLL
  for (int u = 0; u < 4; ++u) {
    square[u] = 0;
    MODALIGN_UNROLL
    for (int v = 0; v < 4; ++v) sum[u][v] = 0;
  }
  for (std::int64_t d0 = 0; d0 < p.D; d0 += kDepth) {
    MODALIGN_UNROLL
    for (int part = 0; part < kTile * kDepth / ladder::kThreads; ++part) {   // 16 neighbouring threads read 64 neighbouring bytes
      const int line = part * 16 + ty;
      const std::int64_t d = d0 + tx;
      left[tx * kPitch + line] = row + line < p.B && d < p.D ? float(anchor[(row + line) * p.D + d]) : 0.0f;
      right[tx * kPitch + line] = column + line < columns && d < p.D ? float(basis[(column + line) * p.D + d]) : 0.0f;
    }
    barrier();
    MODALIGN_UNROLL
    for (int k = 0; k < kDepth; ++k) {
      float a[4], q[4];
      MODALIGN_UNROLL
      for (int u = 0; u < 4; ++u) {
        a[u] = left[k * kPitch + 16 * u + ty];
        q[u] = right[k * kPitch + 16 * u + tx];
      }
      MODALIGN_UNROLL
      for (int u = 0; u < 4; ++u) {
        square[u] += a[u] * a[u];
        MODALIGN_UNROLL
        for (int v = 0; v < 4; ++v) sum[u][v] += a[u] * q[v];
      }
    }
    barrier();
  }
}

inline LaunchPlan plan_tile(const Problem& p, int columns, unsigned shared_bytes, const char* key) {
  return {{unsigned(ceil_divide<std::int64_t>(p.C * p.m, columns)), unsigned(ceil_divide<std::int64_t>(p.B, kTile)), 1}, unsigned(kThreads), shared_bytes, key};
}

// ---- rung 2 -------------------------------------------------------------------------------------------------------------------------------------------

struct TiledProductKernel {
  static constexpr int kThreads = ladder::kThreads;
  Problem p;
  float* coefficients;   // [B, C m]
  float* squares;        // [B]

  MODALIGN_DEVICE void operator()() const {
    const Global<float> out(coefficients), lengths(squares);
    const std::int64_t row = std::int64_t(block_index_y()) * kTile, column = std::int64_t(block_index_x()) * kTile, columns = p.C * p.m;
    const int tx = thread_index() % 16, ty = thread_index() / 16;
    float sum[4][4], square[4];
    multiply_tile(p, row, column, columns, sum, square);
    MODALIGN_UNROLL
    for (int u = 0; u < 4; ++u) {
      const std::int64_t i = row + 16 * u + ty;
      if (i >= p.B) continue;
      if (block_index_x() == 0 && tx == 0) lengths[i] = square[u];
      MODALIGN_UNROLL
      for (int v = 0; v < 4; ++v) {
        const std::int64_t c = column + 16 * v + tx;
        if (c < columns) out[i * columns + c] = sum[u][v];
      }
    }
  }
};

struct VolumeKernel {
  static constexpr int kThreads = ladder::kThreads;
  Problem p;
  const float* coefficients;
  const float* squares;
  float* volume;

  MODALIGN_DEVICE void operator()() const {
    const Global<const float> s(coefficients), lengths(squares), scale(p.scale);
    const Global<float> out(volume);
    const std::int64_t pair = std::int64_t(block_index_x()) * kThreads + thread_index();
    if (pair >= p.B * p.C) return;
    const std::int64_t i = pair / p.C, j = pair % p.C;
    float residual = lengths[i];
    for (int o = 0; o < p.m; ++o) {
      const float x = s[pair * p.m + o];
      residual -= x * x;
    }
    const float d = scale[j];
    out[i * p.C + j] = d * square_root(maximum(residual, 0.0f));
  }
};

inline LaunchPlan plan_tiled_product(const Problem& p) { return plan_tile(p, kTile, 2 * kDepth * kPitch * 4, "ladder_tiled_product"); }
inline LaunchPlan plan_volume(const Problem& p) { return {{unsigned(ceil_divide<std::int64_t>(p.B * p.C, kThreads)), 1, 1}, unsigned(kThreads), 0, "ladder_volume"}; }

// ---- rung 3 -------------------------------------------------------------------------------------------------------------------------------------------

struct FusedKernel {
  static constexpr int kThreads = ladder::kThreads;
  static constexpr int kTilePitch = kTile + 1;
  static constexpr int kSharedBytes = (kTile * kTilePitch + kTile) * 4;
  static_assert(kSharedBytes >= 2 * kDepth * kPitch * 4);
  Problem p;
  float* volume;

  MODALIGN_DEVICE void operator()() const {
    const Global<const float> scale(p.scale);
    const Global<float> out(volume);
    const int per_tile = columns_per_tile(p.m), t = thread_index(), tx = t % 16, ty = t / 16;
    const std::int64_t row = std::int64_t(block_index_y()) * kTile, column = std::int64_t(block_index_x()) * per_tile;
    float sum[4][4], square[4];
    multiply_tile(p, row, column, p.C * p.m, sum, square);   // its last barrier lets the strips be overwritten
    const Shared<float> tile = shared<float>(0, kTile * kTilePitch), lengths = shared<float>(kTile * kTilePitch * 4, kTile);
    MODALIGN_UNROLL
    for (int u = 0; u < 4; ++u) {
      if (tx == 0) lengths[16 * u + ty] = square[u];
      MODALIGN_UNROLL
      for (int v = 0; v < 4; ++v) tile[(16 * u + ty) * kTilePitch + 16 * v + tx] = sum[u][v];
    }
    barrier();
    const int candidates = per_tile / p.m;
    for (int pair = t; pair < kTile * candidates; pair += kThreads) {
      const int r = pair / candidates, c = pair % candidates;
      const std::int64_t i = row + r, j = column / p.m + c;
      if (i >= p.B || j >= p.C) continue;
      float residual = lengths[r];
      for (int o = 0; o < p.m; ++o) {
        const float x = tile[r * kTilePitch + c * p.m + o];
        residual -= x * x;
      }
      const float d = scale[j];
      out[i * p.C + j] = d * square_root(maximum(residual, 0.0f));
    }
  }
};

inline LaunchPlan plan_fused(const Problem& p) { return plan_tile(p, columns_per_tile(p.m), FusedKernel::kSharedBytes, "ladder_fused"); }

}  // namespace ladder
