// The Gramian volume of all pairs, four times: how the CPU kernel of modalign comes to be. Built against the installed engine headers by build.py.
//
//   definition   k x k Gram matrix of every pair from its vectors, Cholesky, product of the diagonal       B C k (k+1) D FLOPs, nothing stored
//   naive        candidates orthonormalised once, then m dot products per pair                            2 B C m D FLOPs
//   tiled        the same products by packed register blocks, stored, and read again for the volume       2 B C m D FLOPs, B m C coefficients written and read
//   fused        the square-sum in the epilogue of the tile, nothing but volumes stored                   2 B C m D FLOPs
//
// V_ij = d_j sqrt(|a_i|^2 - sum_p (q_jp . a_i)^2), R_j = L_j Q_j, d_j = prod L_pp.   (GRAM, ICLR 2025)
// What the library's kernel has beyond `fused`: nearly dependent pairs computed again from their vectors, missing modalities, half and double types, a backward.
//
// Arrays are float, contiguous: anchor [B, D], others [C, m, D], volume [B, C]. m <= 7.
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/gram_schmidt.h"
#include "cpu/tile.h"

namespace {

using namespace modalign::cpu;
constexpr int kMaxModalities = 8;

struct Problem {
  std::int64_t B, C, D;
  int m;
  const float* anchor;
  const float* others;
};

// The engine takes threads as a callback; here it is a handful of std::thread with one contiguous chunk each.
thread_local int threads_of_caller = 1;
const Parallel kThreads{[](std::int64_t begin, std::int64_t end, std::int64_t, Parallel::Body body, void* context) {
  const std::int64_t count = end - begin, chunks = minimum(threads_of_caller, count);
  if (chunks <= 1) {
    if (count > 0) body(context, begin, end);
    return;
  }
  std::vector<std::thread> others;
  for (std::int64_t t = 1; t < chunks; ++t) others.emplace_back(body, context, begin + count * t / chunks, begin + count * (t + 1) / chunks);
  body(context, begin, begin + count / chunks);
  for (std::thread& other : others) other.join();
}};

// Q [C, m, D] and d [C].
void factor(const Problem& p, float* basis, float* scale) {
  parallel_for(kThreads, 0, p.C, 16, [&](std::int64_t begin, std::int64_t end) {
    float lower[kMaxModalities * kMaxModalities];
    for (std::int64_t j = begin; j < end; ++j) {
      float* q = basis + j * p.m * p.D;
      for (std::int64_t k = 0; k < p.m * p.D; ++k) q[k] = p.others[j * p.m * p.D + k];
      scale[j] = gram_schmidt(q, p.m, p.D, lower, [](int) { return true; });
    }
  });
}

float plain_dot(const float* x, const float* y, std::int64_t n) {
  float sum = 0;
  for (std::int64_t k = 0; k < n; ++k) sum += x[k] * y[k];
  return sum;
}

float positive_root(float r) { return std::sqrt(r < 0 ? 0 : r); }

// ---- rung 1 -------------------------------------------------------------------------------------------------------------------------------------------

void definition(const Problem& p, float* volume) {
  const int k = p.m + 1;
  parallel_for(kThreads, 0, p.B, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      for (std::int64_t j = 0; j < p.C; ++j) {
        const float* vectors[kMaxModalities] = {p.anchor + i * p.D};
        for (int o = 0; o < p.m; ++o) vectors[o + 1] = p.others + (j * p.m + o) * p.D;
        float lower[kMaxModalities][kMaxModalities], product = 1;
        for (int r = 0; r < k; ++r)
          for (int c = 0; c <= r; ++c) {
            float entry = plain_dot(vectors[r], vectors[c], p.D);
            for (int o = 0; o < c; ++o) entry -= lower[r][o] * lower[c][o];
            lower[r][c] = r == c ? positive_root(entry) : lower[c][c] == 0 ? 0 : entry / lower[c][c];
            if (r == c) product *= lower[r][r];
          }
        volume[i * p.C + j] = product;
      }
  });
}

// ---- rung 2: the work that depends on one candidate alone is done once per candidate ------------------------------------------------------------------------

void naive(const Problem& p, float* volume) {
  std::vector<float> basis(p.C * p.m * p.D), scale(p.C);
  factor(p, basis.data(), scale.data());
  parallel_for(kThreads, 0, p.B, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const float* a = p.anchor + i * p.D;
      const float square = plain_dot(a, a, p.D);
      for (std::int64_t j = 0; j < p.C; ++j) {
        float r = square;
        for (int o = 0; o < p.m; ++o) {
          const float s = plain_dot(a, basis.data() + (j * p.m + o) * p.D, p.D);
          r -= s * s;
        }
        volume[i * p.C + j] = scale[j] * positive_root(r);
      }
    }
  });
}

// ---- rungs 3 and 4: operands packed for the register block. The m basis rows of 16 candidates are m neighbouring lane groups, so the square-sum is vertical -----

constexpr int W = kLanes<float>;

struct Packed {
  Scratch<float> rows, columns, square, scale;
  std::int64_t groups, count;   // lane groups of candidates; packed columns

  explicit Packed(const Problem& p)
      : rows(packed_rows_size(p.B, p.D)), columns(packed_columns_size<float>((p.C + W - 1) / W * W * p.m, p.D)), square(p.B), scale((p.C + W - 1) / W * W),
        groups((p.C + W - 1) / W), count(round_up(groups * W * p.m, kPanelColumns<float>)) {
    std::vector<float> basis(p.C * p.m * p.D);
    factor(p, basis.data(), scale);
    for (std::int64_t j = p.C; j < groups * W; ++j) scale[j] = 0;
    parallel_for(kThreads, 0, (p.B + kRegisterRows - 1) / kRegisterRows, 4, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t panel = begin; panel < end; ++panel) {
        const std::int64_t first = panel * kRegisterRows;
        const int rows_here = static_cast<int>(minimum(kRegisterRows, p.B - first));
        for (int r = 0; r < rows_here; ++r) square[first + r] = dot(p.anchor + (first + r) * p.D, p.anchor + (first + r) * p.D, p.D);
        pack_panel(kRegisterRows, rows_here, p.D, [&](int r) { return p.anchor + (first + r) * p.D; }, rows + first * p.D);
      }
    });
    parallel_for(kThreads, 0, count / kPanelColumns<float>, 4, [&](std::int64_t begin, std::int64_t end) {
      constexpr int P = kPanelColumns<float>;
      for (std::int64_t panel = begin; panel < end; ++panel)
        pack_panel(P, P, p.D,
                   [&](int c) -> const float* {
                     const std::int64_t group = (panel * P + c) / W, j = group / p.m * W + c % W;
                     return j < p.C ? basis.data() + (j * p.m + group % p.m) * p.D : nullptr;
                   },
                   columns + panel * P * p.D);
    });
  }
};

// Whole candidates and whole panels to a cache block.
std::int64_t tile_columns(int m) {
  std::int64_t groups = maximum(1, 8 / m);
  while (groups * m * W % kPanelColumns<float>) ++groups;
  return groups * m * W;
}

// Volumes of the lane groups [first, last) of row i from their coefficients s.
void square_sum(const Problem& p, const Packed& packed, std::int64_t i, std::int64_t first, std::int64_t last, const float* s, float* volume) {
  for (std::int64_t group = first; group < last; ++group, s += p.m * W) {
    float r[W];
    for (int l = 0; l < W; ++l) r[l] = packed.square[i];
    for (int o = 0; o < p.m; ++o)
      for (int l = 0; l < W; ++l) r[l] -= s[o * W + l] * s[o * W + l];
    for (int l = 0; l < W; ++l) r[l] = packed.scale[group * W + l] * std::sqrt(r[l] < 0 ? 0 : r[l]);
    for (int l = 0; l < minimum(W, p.C - group * W); ++l) volume[i * p.C + group * W + l] = r[l];
  }
}

void tiled(const Problem& p, float* volume) {
  const Packed packed(p);
  Scratch<float> coefficients(p.B * packed.count);
  for_each_tile(static_cast<float*>(packed.rows), p.B, static_cast<float*>(packed.columns), packed.count, p.D, tile_columns(p.m), kThreads, [&] {
    return [&](const Tile<float>& tile) {   // plain store
      for (std::int64_t i = 0; i < tile.rows; ++i)
        for (std::int64_t c = 0; c < tile.columns; ++c) coefficients[(tile.row + i) * packed.count + tile.column + c] = tile.data[i * tile.ld + c];
    };
  });
  parallel_for(kThreads, 0, p.B, 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) square_sum(p, packed, i, 0, packed.groups, coefficients + i * packed.count, volume);
  });
}

void fused(const Problem& p, float* volume) {
  const Packed packed(p);
  for_each_tile(static_cast<float*>(packed.rows), p.B, static_cast<float*>(packed.columns), packed.count, p.D, tile_columns(p.m), kThreads, [&] {
    return [&](const Tile<float>& tile) {   // consumed while it is in L1
      const std::int64_t first = tile.column / (p.m * W), last = minimum((tile.column + tile.columns) / (p.m * W), packed.groups);
      for (std::int64_t i = 0; i < tile.rows; ++i) square_sum(p, packed, tile.row + i, first, last, tile.data + i * tile.ld, volume);
    };
  });
}

}  // namespace

// rung: 0 definition, 1 naive, 2 tiled, 3 fused. False for anything else.
extern "C" bool ladder_gram_volume(int rung, std::int64_t B, std::int64_t C, int m, std::int64_t D, const float* anchor, const float* others, float* volume,
                                   int threads) {
  if (rung < 0 || rung > 3 || m < 1 || m >= kMaxModalities) return false;
  threads_of_caller = threads;
  constexpr void (*kRungs[])(const Problem&, float*) = {definition, naive, tiled, fused};
  kRungs[rung]({B, C, D, m, anchor, others}, volume);
  return true;
}
