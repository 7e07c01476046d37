/// @file gram_volume.cuh
/// @brief Gramian volume, triangle area (all pairs) and paired volume on CUDA: kernels, launch plans, and the table of compiled instances.
///
/// Maths      ops/gram_volume.h: value_ij = scale_j |e_ij|, e_ij = a_i - sum_p kappa_ijp x_jp, with two geometries for x and kappa. (GRAM, ICLR 2025;
///            TRIANGLE, NeurIPS 2025; the whitened form is ours.)
///
/// Forward    prepare       one warp per candidate: twice-run modified Gram-Schmidt (triangle: base length and direction) -> basis, factor, scale_j,
///                          and for half inputs a copy of the basis rounded to the input dtype; one warp per anchor: |a_i|^2
///            forward       tile product anchors x basis rows; a column tile holds floor(kColumns / m) candidates of m adjacent columns. The
///                          epilogue forms r = |a|^2 - |s|^2. Where r <= theta |a|^2 the subtraction has lost its digits: the lanes of the warp
///                          together recompute that pair from the unrounded vectors, inside the tile.
/// Backward   the sequence of pair_gradient.cuh with a matrix as upstream
/// Paired     one warp per sample: the same Gram-Schmidt over all k vectors in a workspace [N, k, D]; V = prod L_pp, dV = V L^-T Q.
///
/// Numbers    f32, f64: FmaBackend in the input precision. bf16, f16 forward: one tensor-core product of the rounded operands, fp32 accumulation.
///            Backward products: bf16 rounds T to bf16; f16 splits T, X and A into two bf16 planes (three products), for T falls below the range of
///            f16.
/// FLOPs      forward 2 B C m D; backward 6 B C m D (+ 2 m D times a few for each near pair). Bytes forward: operands once per tile of the other
///            side, B C values written.
/// Memory     workspace: (B + C) reals; half inputs: C m D halves (f16 backward: 2 (B + C m) D bf16 more); backward: the panel and, where the
///            gradient's dtype is not real, G [C m, D] and E [panel rows, D].
/// Order      every sum has one order fixed by the sizes (K ascending, slots ascending, near pairs ascending, warp sums by butterfly): equal bits
///            from run to run.
/// Registers  tiles at most 128 (two blocks of 256 threads per multiprocessor; two-plane products one block), one-warp kernels at most 168.
#pragma once

#include "cuda/pair_gradient.cuh"

namespace modalign::cuda {

// ------------------------------------------------------------------------------------------------------------------------------------------- forward
template <class Geometry, class T> struct PairForwardEpilogue {
  using Backend = PairBackend<T>;
  using Real = real_of<T>;
  static constexpr int kSharedBytes = Backend::kRows * int(sizeof(Real));
  static constexpr int kMinBlocks = 2;
  struct State {};
  PairView<Geometry, T> view;
  T* value;   // [batch, rows, C]
  std::int64_t rows;

  MODALIGN_DEVICE void begin(State&, const TileRange& range, std::int64_t batch, const WalkPosition&, int shared_offset) const {
    const Shared<Real> squares = shared<Real>(shared_offset, Backend::kRows);
    for (int row = thread_index(); row < range.rows; row += kTileThreads) squares[row] = view.square_of_row(batch, range.row_begin + row);
  }
  MODALIGN_DEVICE void end(State&, const TileRange&, std::int64_t, const WalkPosition&, int) const {}

  MODALIGN_DEVICE void consume(State&, Shared<Real> tile, const TileRange& range, std::int64_t batch, const WalkPosition&, int shared_offset) const {
    const Shared<Real> squares = shared<Real>(shared_offset, Backend::kRows);
    const int m = view.m, slot = thread_index() % view.lanes, row_step = kTileThreads / view.lanes;
    const int candidates = range.columns / m;
    const std::int64_t first = range.column_begin / m, j = first + slot;
    const bool exists = slot < candidates;
    const ColumnData<Real> column = exists ? view.column(batch, j) : ColumnData<Real>{0, 0, 0};
    const Global<T> target = Global<T>(value).at((batch * rows + range.row_begin) * view.C + j);
    for (int row = thread_index() / view.lanes; row < range.rows; row += row_step) {
      Real s[kMaxOthers], r = 0, trust = 0;
      if (exists) {
        load_candidate(s, tile, row * Backend::kPitch + slot * m, m);
        r = Geometry::residual(s, m, Real(squares[row]), column, trust);
      }
      const bool near = exists && trust > 0 && is_finite(trust) && column.scale != 0 && r <= view.near * trust;
      std::uint32_t pending = warp_ballot(near);
      for (int other = 0; pending != 0; ++other, pending >>= 1) {
        if ((pending & 1) == 0) continue;
        const DirectPair<Geometry, T> pair(view, batch, range.row_begin + row,
                                           j - lane() + (MODALIGN_MUTATION("forward: the neighbour's pair") ? other ^ 1 : other));
        if (lane() == other) r = pair.square;
      }
      if (exists) {
        const Real height = r < 0 ? Real(0) : r;   // keeps NaN
        target[row * view.C] = narrow<T>(view.squared ? column.scale * column.scale * height : column.scale * square_root(height));
      }
    }
  }
};

template <class Geometry, class T> using PairForwardKernel = TileWalk<PairBackend<T>, PairForwardEpilogue<Geometry, T>>;

// -------------------------------------------------------------------------------------------------------------------------------------------- paired
template <class T> struct PairedForward {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  std::int64_t N, D;
  int k;
  bool squared;
  BatchedRows vectors[kMaxOthers + 1];
  PresenceMask present;
  Real* basis;    // [N, k, D]
  Real* factor;   // [N, k, k]
  T* value;       // [N]

  LaunchPlan plan(std::int64_t batches, const char* key) const { return plan_warps(N, batches, key); }

  MODALIGN_DEVICE bool here(std::int64_t n, int p) const {
    return present.data == nullptr || bool(Global<const bool>(present.data)[n * present.row_stride + p * present.element_stride]);
  }
  MODALIGN_DEVICE Real volume(std::int64_t n) const {
    return orthonormal_rows<Real>(
        k, D,
        [&](int p, std::int64_t d) {
          return widen(T(Global<const T>(static_cast<const T*>(vectors[p].data))[n * vectors[p].row_stride + d * vectors[p].element_stride]));
        },
        [&](int p) { return here(n, p); }, Global<Real>(basis).at(n * k * D), Global<Real>(factor).at(n * k * k));
  }
  MODALIGN_DEVICE void operator()() const {
    const std::int64_t n = warp_item();
    if (n >= (MODALIGN_MUTATION("paired: one sample too many") ? N + 1 : N)) return;
    const Real v = volume(n);
    if (lane() == 0) global(value)[n] = narrow<T>(squared ? v * v : v);
  }
};

template <class T> struct PairedBackward {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  PairedForward<T> forward;
  const T* grad;
  std::int64_t grad_stride;
  T* out;   // [N, k, D]

  LaunchPlan plan(std::int64_t batches, const char* key) const { return plan_warps(forward.N, batches, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t n = warp_item(), D = forward.D;
    const int k = forward.k;
    if (n >= forward.N) return;
    const Real v = forward.volume(n);
    const Global<T> target = Global<T>(out).at(n * k * D);
    if (v == 0) {
      for (std::int64_t d = lane(); d < k * D; d += kWarpSize) target[d] = narrow<T>(Real(0));
      return;
    }
    if (!MODALIGN_MUTATION("paired: drop the barrier behind the factor")) warp_barrier();   // lane 0 wrote the factor
    const Real upstream = widen(T(Global<const T>(grad)[n * grad_stride])), share = upstream * (forward.squared ? 2 * v * v : v);
    const Global<const Real> q = Global<const Real>(forward.basis).at(n * k * D), f = Global<const Real>(forward.factor).at(n * k * k);
    std::uint32_t present = 0;
    for (int p = 0; p < k; ++p) present |= std::uint32_t(forward.here(n, p)) << p;
    for (std::int64_t d = lane(); d < D; d += kWarpSize) {
      Real y[kMaxOthers + 1];
      MODALIGN_UNROLL
      for (int p = kMaxOthers; p >= 0; --p)
        if (p < k) {
          Real z = q[p * D + d];
          MODALIGN_UNROLL
          for (int o = p + 1; o <= kMaxOthers; ++o)
            if (o < k) z = fused_multiply_add(-Real(f[o * k + p]), y[o], z);
          y[p] = z / f[p * k + p];
          target[p * D + d] = narrow<T>(present >> p & 1 ? share * y[p] : Real(0));
        }
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------------- the compiled instances
// X(key, kernel type ...): with the shared ones of pair_gradient.cuh the one table behind the .cu file, the emulator's catalogue and the tests.
#define MODALIGN_PAIR_KERNELS(X, name, Geometry, dtype, T)                          \
  X(name ".forward." dtype, PairForwardKernel<Geometry, T>)                         \
  X(name ".coefficients." dtype, CoefficientKernel<Geometry, T, MatrixUpstream<T>>) \
  X(name ".row_terms." dtype, RowTerms<Geometry, T, MatrixUpstream<T>>)             \
  X(name ".column_terms." dtype, ColumnTerms<Geometry, T, MatrixUpstream<T>>)
#define MODALIGN_VOLUME_KERNELS_OF(X, dtype, T)                         \
  MODALIGN_PAIR_KERNELS(X, "gram_volume", VolumeGeometry, dtype, T)     \
  MODALIGN_PAIR_KERNELS(X, "triangle_area", TriangleGeometry, dtype, T) \
  X("paired_gram_volume.forward." dtype, PairedForward<T>)              \
  X("paired_gram_volume.backward." dtype, PairedBackward<T>)
#define MODALIGN_MATRIX_KERNELS(X)             \
  MODALIGN_VOLUME_KERNELS_OF(X, "f32", float)  \
  MODALIGN_VOLUME_KERNELS_OF(X, "f64", double) \
  MODALIGN_VOLUME_KERNELS_OF(X, "f16", f16)    \
  MODALIGN_VOLUME_KERNELS_OF(X, "bf16", bf16)
#define MODALIGN_VOLUME_KERNELS(X) MODALIGN_SHARED_KERNELS(X) MODALIGN_MATRIX_KERNELS(X)

MODALIGN_MATRIX_KERNELS(MODALIGN_KEY_OF)

// ---------------------------------------------------------------------------------------------------------------------------------- launch sequences
template <class T> struct ForwardBuffers {
  using Real = real_of<T>;
  Real* scale;
  Real* row_square;
  T* operand = nullptr;
  template <class Arena> ForwardBuffers(const PairProblem& p, Arena& arena) {
    scale = arena.template take<Real>("scale", p.N * p.C);
    row_square = arena.template take<Real>("row_square", p.N * p.B);
    if constexpr (Arithmetic<T>::kRounded) operand = arena.template take<T>("operand", p.N * p.C * p.m * operand_pitch<T>(p.D));
  }
};

template <class Geometry, class T, class Launch>
int run_pair_forward(const PairProblem& whole, const PairForward& output, const ForwardBuffers<T>& buffers, const Launch& launch) {
  using Real = real_of<T>;
  using Backend = PairBackend<T>;
  for (std::int64_t first = 0; first == 0 || first < whole.N; first += kMaxBatches) {
    PairProblem p = whole;
    p.N = whole.N - first < kMaxBatches ? whole.N - first : kMaxBatches;
    p.anchor.data = shifted(p.anchor.data, first * p.anchor.batch_stride, sizeof(T));
    for (BatchedRows& rows : p.others) rows.data = shifted(rows.data, first * rows.batch_stride, sizeof(T));
    p.present.data = shifted(p.present.data, first * p.present.batch_stride);
    Real* basis = shifted(static_cast<Real*>(output.basis), first * p.C * p.m * p.D);
    Real* factor = shifted(static_cast<Real*>(output.factor), first * p.C * Geometry::factor_size(p.m));
    Real* scale = shifted(buffers.scale, first * p.C);
    Real* row_square = shifted(buffers.row_square, first * p.B);
    T* operand = shifted(buffers.operand, first * p.C * p.m * operand_pitch<T>(p.D));

    PrepareForward<Geometry, T> prepare{
        p.B, p.C, p.D, p.m, p.anchor, {}, p.present, basis, factor, scale, row_square, operand, operand_pitch<T>(p.D)};
    for (int o = 0; o < p.m; ++o) prepare.others[o] = p.others[o];
    if (const int error = launch_kernel(launch, prepare, p.N)) return error;

    PairForwardKernel<Geometry, T> forward{
        anchor_operand<T>(p),
        basis_operand<T>(p, basis, operand),
        make_grid(p.B, p.C * p.m, p.D, Backend::kRows, Backend::kColumns / p.m * p.m),
        {pair_view<Geometry, T>(p, basis, factor, scale, row_square), shifted(static_cast<T*>(output.value), first * p.B * p.C), p.B}};
    if (const int error = launch_kernel(launch, forward, p.N)) return error;
  }
  return 0;
}

template <class Geometry, class T> inline std::int64_t backward_workspace(const PairProblem& p, std::int64_t panel_bytes) {
  return plan_workspace(p, PairBackend<T>::kRows, panel_bytes, [&](const BackwardPlan& plan) { return backward_bytes<Geometry, T>(p, plan); });
}
template <class Geometry, class T> inline BackwardPlan choose_backward(const PairProblem& p, std::int64_t bytes) {
  return choose_plan(p, PairBackend<T>::kRows, bytes, [&](const BackwardPlan& plan) { return backward_bytes<Geometry, T>(p, plan); });
}

template <class Geometry, class T, class Launch>
int run_pair_backward(const PairProblem& p, const PairBackward& request, const BackwardPlan& plan, const BackwardBuffers<Geometry, T>& buffers,
                      const Launch& launch) {
  const auto upstream = [&](std::int64_t first, std::int64_t row) {
    const void* data = shifted(request.grad, first * request.grad_batch_stride + row * request.grad_row_stride, sizeof(T));
    return MatrixUpstream<T>{static_cast<const T*>(data), request.grad_batch_stride, request.grad_row_stride, request.grad_column_stride};
  };
  return run_pair_gradient<Geometry, T, MatrixUpstream<T>>(p, {request.basis, request.factor, request.grad_anchor, request.grad_others}, plan, buffers,
                                                           upstream, launch);
}

template <class T> struct PairedBuffers {
  real_of<T>* basis;
  real_of<T>* factor;
  template <class Arena> PairedBuffers(const PairedGramVolumeProblem& p, Arena& arena) {
    basis = arena.template take<real_of<T>>("basis", p.N * p.k * p.D);
    factor = arena.template take<real_of<T>>("factor", p.N * p.k * p.k);
  }
};

template <class T> inline PairedForward<T> paired_kernel(const PairedGramVolumeProblem& p, void* value, const PairedBuffers<T>& buffers) {
  PairedForward<T> kernel{p.N, p.D, p.k, p.squared, {}, p.present, buffers.basis, buffers.factor, static_cast<T*>(value)};
  for (int o = 0; o < p.k; ++o) kernel.vectors[o] = p.vectors[o];
  return kernel;
}
template <class T, class Launch>
int run_paired_forward(const PairedGramVolumeProblem& p, void* value, const PairedBuffers<T>& buffers, const Launch& launch) {
  return launch_kernel(launch, paired_kernel<T>(p, value, buffers), 1);
}
template <class T, class Launch>
int run_paired_backward(const PairedGramVolumeProblem& p, const void* grad, std::int64_t grad_stride, void* grad_vectors,
                        const PairedBuffers<T>& buffers, const Launch& launch) {
  const PairedBackward<T> kernel{paired_kernel<T>(p, nullptr, buffers), static_cast<const T*>(grad), grad_stride, static_cast<T*>(grad_vectors)};
  return launch_kernel(launch, kernel, 1);
}

}   // namespace modalign::cuda
