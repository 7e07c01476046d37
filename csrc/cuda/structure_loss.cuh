/// @file structure_loss.cuh
/// @brief Divergence between the neighbourhoods of a batch in two spaces on CUDA, forward and backward: kernels, launch sequences, compiled instances.
///
/// Maths      ops/structure_loss.h. (STRUCTURE, NeurIPS 2025, section 4.)
///
/// Mapping    rows in panels. A panel's products with all rows are made by the tile engine and stay in the caches as far as they fit.
///   forward    products      x_i . x_j and y_i . y_j, in pieces of the depth that are added: an error of a logit of 20 is one of its probability
///              rows          one warp per row: its product with itself again, in double, for that is the largest and all its terms have one sign;
///                            largest, log-sum-exps, loss and the sums that the gradient needs
///   backward   products      again, unless they were kept
///              coefficients  one warp per row: dS_ij + dS_ji of every pair in place; the row's own is minus twice the sum of the others, which is exact
///                            where the diagonal holds nearly all of P
///              gradient      coefficients times rows, the tile engine again
///
/// Numbers    f32, f64. Products in the input precision; sums over a row in double. All logarithms come from d = log P - log Q and log cosh(d / 2).
/// FLOPs      forward 2 B^2 (Dx + Dy); backward as much for the products unless kept, and 2 B^2 D for each gradient wanted.
/// Memory     2 panels of rows x B numbers, at most 256 MB together where one tile of rows allows it; 2 B^2 where products are kept.
/// Order      products have one order of sums; a row is summed by lanes, then by a butterfly: equal bits from run to run and with products kept or not.
/// Registers  tiles at most 128, one-warp kernels at most 168.
#pragma once

#include "cuda/pair_gradient.cuh"
#include "ops/structure_loss.h"

namespace modalign::cuda {

// --------------------------------------------------------------------------------------------------------------------------------------------- a pair
// log cosh(d / 2) for d >= 0; relative error some eps. cosh(d / 2) - 1 = a^2 / (2 (1 + a)) with a = exp(-d / 2) - 1.
template <class Real> MODALIGN_DEVICE Real log_cosh_half(Real d) {
  if (d > 2) return d / 2 - Real(0.6931471805599453) + logarithm_1p(exponential(-d));
  const Real a = exponential_minus_1(-d / 2);
  return logarithm_1p(a * a / (2 * (1 + a)));
}

// log(exp(z) + 1e-12)
template <class Real> MODALIGN_DEVICE Real floored(Real z) {
  const Real floor = Real(-27.631021115928547);   // log 1e-12
  return maximum(z, floor) + logarithm_1p(exponential(-absolute(z - floor)));
}

template <class Real> struct PairTerms {
  Real p, q;       // P and Q
  Real f_p, f_q;   // P dR/dP, Q dR/dQ
  Real loss;
};

template <bool released, class Real> MODALIGN_DEVICE PairTerms<Real> pair_terms(Real log_p, Real log_q) {
  const Real p = exponential(log_p), q = exponential(log_q), d = released ? floored(log_p) - floored(log_q) : log_p - log_q, magnitude = absolute(d);
  const Real mean_over_root = log_cosh_half(magnitude);   // log M - (log P + log Q) / 2
  if constexpr (!released) {   // log(P / M) = d / 2 - that, log(Q / M) = -d / 2 - that
    return {p, q, p * (d / 2 - mean_over_root) / 2, q * (-d / 2 - mean_over_root) / 2, (magnitude * absolute(p - q) / 2 - (p + q) * mean_over_root) / 2};
  } else {
    return {p, q, p * (mean_over_root - exponential_minus_1(-d) / 2) / 2, q * (mean_over_root - exponential_minus_1(d) / 2) / 2,
            ((p + q) / 2 + Real(kReleasedEpsilon)) * mean_over_root};
  }
}

// A row of x or of y, as its softmax is made: log P_ij = (z - lse.high) - lse.low.
template <class Real> MODALIGN_DEVICE Real log_share(Real z, const LogSum<Real>& lse) { return (z - lse.high) - lse.low; }

// ---------------------------------------------------------------------------------------------------------------------------------------------- rows
template <class Real> using StructureProducts = TileWalk<PairBackend<Real>, StoreTile<PairBackend<Real>, Real>>;

// Products of some rows, those from `first` on, with all.
template <class Pointer> struct ProductPanel {
  Pointer x, y;   // [rows, pitch]
  std::int64_t pitch;
};

template <class Real> MODALIGN_DEVICE double row_log_sum_exp(Global<Real> z, std::int64_t B) {
  Real top = -kInfinity<Real>;
  for (std::int64_t j = lane(); j < B; j += kWarpSize) top = maximum(top, Real(z[j]));
  MODALIGN_UNROLL
  for (int step = kWarpSize / 2; step > 0; step /= 2) top = maximum(top, shuffle_xor(top, step));
  double sum = 0;
  for (std::int64_t j = lane(); j < B; j += kWarpSize) sum += double(exponential(Real(z[j]) - top));
  return double(top) + logarithm(warp_sum(sum));
}

template <class Real, bool released> struct StructureRows {
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  ProductPanel<Real*> products;
  BatchedRows x_rows, y_rows;
  std::int64_t Dx, Dy, first, rows, B;
  Real* loss;           // [B]
  double* statistics;   // [4][B]

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(rows, 1, key); }

  // The product of a row with itself, in double.
  static MODALIGN_DEVICE void set_square(Global<Real> products, const BatchedRows& from, std::int64_t D, std::int64_t at, std::int64_t i) {
    const Global<const Real> z = Global<const Real>(static_cast<const Real*>(from.data)).at(i * from.row_stride);
    double square = 0;
    for (std::int64_t d = lane(); d < D; d += kWarpSize) {
      const double value = double(Real(z[d * from.element_stride]));
      square = fused_multiply_add(value, value, square);
    }
    square = warp_sum(square);
    if (lane() == 0) products[at] = Real(square);
  }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t row = warp_item(), i = first + row;
    if (row >= (MODALIGN_MUTATION("rows: one row too many") ? rows + 1 : rows)) return;
    const Global<Real> x = global(products.x).at(row * products.pitch), y = global(products.y).at(row * products.pitch);
    set_square(x, x_rows, Dx, MODALIGN_MUTATION("rows: the square beside its place") ? (i + 1) % B : i, i);
    set_square(y, y_rows, Dy, i, i);
    if (!MODALIGN_MUTATION("rows: drop the barrier behind the squares")) warp_barrier();
    const double lse_x = row_log_sum_exp(x, B), lse_y = row_log_sum_exp(y, B);
    const LogSum<Real> sum_x(lse_x), sum_y(lse_y);
    double total = 0, c_x = 0, c_y = 0;
    for (std::int64_t j = MODALIGN_MUTATION("rows: the first pairs twice") ? lane() % 2 : lane(); j < B; j += kWarpSize) {
      const PairTerms<Real> pair = pair_terms<released>(log_share(Real(x[j]), sum_x), log_share(Real(y[j]), sum_y));
      total += double(pair.loss);
      c_x += double(pair.f_p);
      c_y += double(pair.f_q);
    }
    total = warp_sum(total);
    c_x = warp_sum(c_x);
    c_y = warp_sum(c_y);
    if (lane() != 0) return;
    global(loss)[i] = Real(total);
    const Global<double> to(statistics);
    to[i] = lse_x;
    to[B + i] = lse_y;
    to[2 * B + i] = c_x;
    to[3 * B + i] = MODALIGN_MUTATION("rows: one sum for both") ? c_x : c_y;
  }
};

// -------------------------------------------------------------------------------------------------------------------------------------- coefficients
template <class Real> struct StructureLine {   // a row or a column of the pairs
  LogSum<Real> x, y;
  Real c_x, c_y, grad;

  MODALIGN_DEVICE StructureLine(const double* statistics, const Real* upstream, std::int64_t stride, std::int64_t B, std::int64_t i)
      : x(Global<const double>(statistics)[i]), y(Global<const double>(statistics)[B + i]) {
    const Global<const double> from(statistics);
    c_x = Real(double(from[2 * B + i]));
    c_y = Real(double(from[3 * B + i]));
    grad = Global<const Real>(upstream)[i * stride];
  }
};

template <class Real, bool released> struct StructureCoefficients {
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  ProductPanel<const Real*> products;
  ProductPanel<Real*> to;   // nullptr: not wanted; may be the products themselves
  std::int64_t first, rows, B;
  const double* statistics;
  const Real* grad;
  std::int64_t grad_stride;

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(rows, 1, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t row = warp_item(), i = first + row;
    if (row >= (MODALIGN_MUTATION("coefficients: one row too many") ? rows + 1 : rows)) return;
    const Global<const Real> x = Global<const Real>(products.x).at(row * products.pitch), y = Global<const Real>(products.y).at(row * products.pitch);
    const StructureLine<Real> mine(statistics, grad, grad_stride, B, i);
    double sum_x = 0, sum_y = 0;
    for (std::int64_t j = lane(); j < B; j += kWarpSize) {
      if (j == i) continue;   // no barrier below
      const StructureLine<Real> theirs(statistics, grad, grad_stride, B, j);
      const Real s_x = x[j], s_y = y[j];
      const PairTerms<Real> across = pair_terms<released>(log_share(s_x, mine.x), log_share(s_y, mine.y));
      const PairTerms<Real> down = pair_terms<released>(log_share(s_x, theirs.x), log_share(s_y, theirs.y));
      const Real across_x = mine.grad * (across.f_p - across.p * mine.c_x), across_y = mine.grad * (across.f_q - across.q * mine.c_y);
      const Real down_x = theirs.grad * (down.f_p - down.p * theirs.c_x), down_y = theirs.grad * (down.f_q - down.q * theirs.c_y);
      sum_x += double(across_x);
      sum_y += double(across_y);
      if (to.x != nullptr) global(to.x)[row * to.pitch + j] = MODALIGN_MUTATION("coefficients: the row's softmax alone") ? across_x : across_x + down_x;
      if (to.y != nullptr) global(to.y)[row * to.pitch + j] = across_y + down_y;
    }
    sum_x = warp_sum(sum_x);
    sum_y = warp_sum(sum_y);
    if (lane() != 0) return;
    const double own = MODALIGN_MUTATION("coefficients: the diagonal once") ? -1 : -2;
    if (to.x != nullptr) global(to.x)[row * to.pitch + i] = Real(own * sum_x);
    if (to.y != nullptr) global(to.y)[row * to.pitch + i] = Real(own * sum_y);
  }
};

// ---------------------------------------------------------------------------------------------------------------------------- the compiled instances
#define MODALIGN_STRUCTURE_KERNELS_OF(X, dtype, Real)                                  \
  X("structure_loss.products." dtype, StructureProducts<Real>)                         \
  X("structure_loss.rows.js." dtype, StructureRows<Real, false>)                       \
  X("structure_loss.rows.released." dtype, StructureRows<Real, true>)                  \
  X("structure_loss.coefficients.js." dtype, StructureCoefficients<Real, false>)       \
  X("structure_loss.coefficients.released." dtype, StructureCoefficients<Real, true>)
#define MODALIGN_STRUCTURE_KERNELS(X)             \
  MODALIGN_STRUCTURE_KERNELS_OF(X, "f32", float)  \
  MODALIGN_STRUCTURE_KERNELS_OF(X, "f64", double)

MODALIGN_STRUCTURE_KERNELS(MODALIGN_KEY_OF)

// ---------------------------------------------------------------------------------------------------------------------------------- launch sequences
constexpr std::int64_t kStructureBytes = 256 << 20;   // of two panels
constexpr std::int64_t kDepthPiece = 256;

// Rows of a panel; without kept products, or for coefficients where the products must stay.
template <class Real> inline std::int64_t structure_panel_rows(const StructureProblem& p, std::int64_t budget) {
  constexpr std::int64_t kTile = PairBackend<Real>::kRows;
  const std::int64_t tiles = budget / (2 * (p.B > 0 ? p.B : 1) * std::int64_t(sizeof(Real)) * kTile), rows = (tiles > 0 ? tiles : 1) * kTile;
  return rows < p.B ? rows : p.B;
}

template <class Real> struct StructureBuffers {
  std::int64_t panel_rows;
  Real *x = nullptr, *y = nullptr;   // [panel_rows, B]
  template <class Arena> StructureBuffers(const StructureProblem& p, std::int64_t budget, bool need_x, bool need_y, Arena& arena) : panel_rows(structure_panel_rows<Real>(p, budget)) {
    if (need_x) x = arena.template take<Real>("panel_x", panel_rows * p.B);
    if (need_y) y = arena.template take<Real>("panel_y", panel_rows * p.B);
  }
};

template <class Real, class Arena> StructureBuffers<Real> forward_buffers(const StructureProblem& p, bool kept, std::int64_t budget, Arena& arena) {
  return StructureBuffers<Real>(p, budget, !kept, !kept, arena);
}
template <class Real, class Arena> StructureBuffers<Real> backward_buffers(const StructureProblem& p, const StructureBackward& to, std::int64_t budget, Arena& arena) {
  const bool made = to.products == nullptr;
  return StructureBuffers<Real>(p, budget, made || to.grad_x != nullptr, made || to.grad_y != nullptr, arena);
}

inline std::int64_t structure_products_pitch(std::int64_t B) { return (B + 95) / 96 * 96; }   // of structure_products_size

template <class Real> inline ProductPanel<Real*> kept_products(Real* products, std::int64_t B, std::int64_t first) {
  const std::int64_t pitch = structure_products_pitch(B);
  return {products + first * pitch, products + pitch * pitch + first * pitch, pitch};
}

template <class Real, class Launch>
int make_products(const BatchedRows& z, std::int64_t D, std::int64_t B, std::int64_t first, std::int64_t rows, Real* out, std::int64_t pitch, const Launch& launch) {
  using Backend = PairBackend<Real>;
  const Real* data = static_cast<const Real*>(z.data);
  for (std::int64_t k = 0; k == 0 || k < D; k += kDepthPiece) {
    const std::int64_t depth = D - k < kDepthPiece ? D - k : kDepthPiece;
    const Real* piece = data + k * z.element_stride;
    const StructureProducts<Real> products{make_operand<Real>(Major::depth, piece + first * z.row_stride, 0, z.row_stride, z.element_stride),
                                           make_operand<Real>(Major::depth, piece, 0, z.row_stride, z.element_stride),
                                           make_grid(rows, B, depth, Backend::kRows, Backend::kColumns),
                                           {out, k > 0 ? out : nullptr, 0, pitch, 0, pitch, Real(1)}};
    if (const int error = launch_kernel(launch, products, 1)) return error;
  }
  return 0;
}

template <class Real, class Launch>
int make_panel(const StructureProblem& p, std::int64_t first, std::int64_t rows, const ProductPanel<Real*>& to, const Launch& launch) {
  if (const int error = make_products<Real>(p.x, p.Dx, p.B, first, rows, to.x, to.pitch, launch)) return error;
  return make_products<Real>(p.y, p.Dy, p.B, first, rows, to.y, to.pitch, launch);
}

template <class Real> inline ProductPanel<const Real*> read_only(const ProductPanel<Real*>& panel) { return {panel.x, panel.y, panel.pitch}; }

template <class Real, bool released, class Launch>
int run_structure_forward(const StructureProblem& p, const StructureForward& to, const StructureBuffers<Real>& buffers, const Launch& launch) {
  const std::int64_t step = to.products != nullptr ? p.B : buffers.panel_rows;
  for (std::int64_t first = 0; first < p.B; first += step) {
    const std::int64_t rows = p.B - first < step ? p.B - first : step;
    const ProductPanel<Real*> panel = to.products != nullptr ? kept_products(static_cast<Real*>(to.products), p.B, first) : ProductPanel<Real*>{buffers.x, buffers.y, p.B};
    if (const int error = make_panel<Real>(p, first, rows, panel, launch)) return error;
    const StructureRows<Real, released> kernel{panel, p.x, p.y, p.Dx, p.Dy, first, rows, p.B, static_cast<Real*>(to.loss), to.statistics};
    if (const int error = launch_kernel(launch, kernel, 1)) return error;
  }
  return 0;
}

// Rows first ... first + rows - 1 of a gradient: coefficients [rows, pitch] times all rows.
template <class Real, class Launch>
int structure_gradient(const Real* coefficients, std::int64_t pitch, const BatchedRows& z, std::int64_t D, std::int64_t B, std::int64_t first, std::int64_t rows, void* gradient,
                       const Launch& launch) {
  using Backend = GradAnchorBackend<Real>;
  const GradAnchorKernel<Real> kernel{make_operand<Real>(Major::depth, coefficients, 0, pitch, 1),
                                      make_operand<Real>(Major::line, static_cast<const Real*>(z.data), 0, z.element_stride, z.row_stride),
                                      make_grid(rows, D, B, Backend::kRows, Backend::kColumns),
                                      {static_cast<Real*>(gradient) + first * D, nullptr, 0, D, 0, D, Real(1)}};
  return launch_kernel(launch, kernel, 1);
}

template <class Real, bool released, class Launch>
int run_structure_backward(const StructureProblem& p, const StructureBackward& to, const StructureBuffers<Real>& buffers, const Launch& launch) {
  const bool kept = to.products != nullptr;
  for (std::int64_t first = 0; first < p.B; first += buffers.panel_rows) {
    const std::int64_t rows = p.B - first < buffers.panel_rows ? p.B - first : buffers.panel_rows;
    const ProductPanel<Real*> panel{buffers.x, buffers.y, p.B};
    if (!kept)
      if (const int error = make_panel<Real>(p, first, rows, panel, launch)) return error;
    const ProductPanel<const Real*> from = kept ? read_only(kept_products(const_cast<Real*>(static_cast<const Real*>(to.products)), p.B, first)) : read_only(panel);
    const ProductPanel<Real*> coefficients{to.grad_x != nullptr ? panel.x : nullptr, to.grad_y != nullptr ? panel.y : nullptr, p.B};
    const StructureCoefficients<Real, released> kernel{from, coefficients, first, rows, p.B, to.statistics, static_cast<const Real*>(to.grad), to.grad_stride};
    if (const int error = launch_kernel(launch, kernel, 1)) return error;
    if (to.grad_x != nullptr)
      if (const int error = structure_gradient<Real>(panel.x, p.B, p.x, p.Dx, p.B, first, rows, to.grad_x, launch)) return error;
    if (to.grad_y != nullptr)
      if (const int error = structure_gradient<Real>(panel.y, p.B, p.y, p.Dy, p.B, first, rows, to.grad_y, launch)) return error;
  }
  return 0;
}

}   // namespace modalign::cuda
