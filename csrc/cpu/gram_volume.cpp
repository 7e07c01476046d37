// Gramian volume and triangle area on the CPU, forward and backward; compiled once per instruction set.
//
// Maths      ops/gram_volume.h: value_ij = scale_j |e_ij|, e_ij = a_i - sum_p kappa_ijp x_jp. One product with the m basis rows of every candidate gives all
//            coefficients; |e|^2 = |a|^2 - |s|^2 follows in the epilogue. (GRAM, ICLR 2025; TRIANGLE, NeurIPS 2025; the whitened form is ours.)
// Mapping    cpu/pair_geometry.h: m basis rows of a group of candidates are neighbouring vectors of the packed column operand.
// Near zero  |a|^2 - |s|^2 has an absolute error of about eps |a|^2. Where it does not exceed kNearZero of |a|^2 the pair is recomputed from its vectors, inside the tile
//            and with no list of pairs: e = a - sum kappa x, projected a second time. The same pairs leave the product form of the gradient and add w e directly.
// Forward    2 B C m D FLOPs; reads (B + m C) D, writes B C values. Memory beyond in- and outputs: the packed operands, (B + m C) D.
// Backward   cpu/pair_gradient.h, 6 B C m D FLOPs: each tile of coefficients is made again, once, and used twice (T X and T^t A).
// Precision  accumulation in float (double for double), the few sums over all rows or columns in double; the packed operands are widened, never rounded.

#include "cpu/gram_volume.h"

#include "cpu/gram_schmidt.h"
#include "cpu/pair_gradient.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {
namespace {

constexpr std::int64_t kLaneBytes = 64 << 20;   // workspace that small problems side by side may take together
constexpr std::int64_t kSmallProblem = std::int64_t(1) << 22;   // multiply-adds below which a batch of problems is spread over threads instead of each problem

// Many small problems run side by side, each in a lane with a workspace of its own; the number of lanes is fixed by the problem.
std::int64_t lanes_of(std::int64_t N, std::int64_t work, std::int64_t lane_bytes) {
  return work < kSmallProblem ? maximum(1, minimum(minimum(N, 16), kLaneBytes / maximum(1, lane_bytes))) : 1;
}

template <class F>
void for_each_problem(std::int64_t N, std::int64_t lanes, const Parallel& parallel, const F& f) {
  if (lanes == 1) {
    for (std::int64_t n = 0; n < N; ++n) f(n, 0, parallel);
    return;
  }
  parallel_for(parallel, 0, lanes, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t lane = begin; lane < end; ++lane)
      for (std::int64_t n = lane; n < N; n += lanes) f(n, lane, kSerial);
  });
}

// ---- forward ------------------------------------------------------------------------------------------------------------------------------------------

template <class T, class Geometry>
void forward(const Sizes& sizes, Scalar dtype, const BatchedRows& anchor, std::int64_t batch, bool squared, const T* basis, const Geometry& geometry, void* value,
             const Operands<T>& operands, const Parallel& parallel) {
  pack_operands(sizes, dtype, anchor, batch, basis, geometry, operands, parallel);
  const Columns<T> columns(sizes.C, sizes.D, sizes.m);
  for_each_tile(operands.row_panels, sizes.B, operands.column_panels, columns.count, sizes.D, columns.tile, parallel, [&] {
    return [&, values = PairValues<T, Geometry>(sizes, geometry, operands, basis, squared), line = Scratch<T>(columns.tile)](const Tile<T>& tile) mutable {
      constexpr int W = kLanes<T>;
      const std::int64_t stride = sizes.m * W, first = tile.column / stride, last = minimum((tile.column + tile.columns) / stride, columns.groups);
      for (std::int64_t i = 0; i < tile.rows; ++i) {
        values.begin_row(tile.row + i);
        for (std::int64_t group = first; group < last; ++group) values(group, tile.data + i * tile.ld + group * stride - tile.column, line + (group - first) * W);
        const std::int64_t offset = (batch * sizes.B + tile.row + i) * sizes.C + first * W;
        store_row<T>(dtype, value, offset, minimum(last * W, sizes.C) - first * W, line);
      }
    };
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------------------------------------------

// The upstream gradient of gram_volume and triangle_area: a matrix of any dtype and strides, one line of it at a time.
template <class T>
struct MatrixUpstream {
  Scalar dtype;
  const void* data;
  std::int64_t offset, row_stride, column_stride, C;
  Scratch<T> line;
  std::int64_t first_group = 0;

  std::int64_t begin_row(std::int64_t row, std::int64_t first, std::int64_t last) {
    constexpr int W = kLanes<T>;
    const std::int64_t columns = minimum(last * W, C) - first * W;
    load_row<T>(dtype, data, offset + row * row_stride + first * W * column_stride, column_stride, columns, line);
    for (std::int64_t l = columns; l < (last - first) * W; ++l) line[l] = 0;
    first_group = first;
    return kNone;
  }
  const T* weights(std::int64_t group, const T*) const { return line + (group - first_group) * kLanes<T>; }
  void end_row(std::int64_t) const {}
};

// Bytes of one lane: Buffers is Operands or BackwardBuffers.
template <template <class> class Buffers, class Problem>
std::int64_t lane_bytes(const Problem& p) {
  return with_real(p.dtype, [&](auto real) {
    using T = decltype(real);
    Arena arena(nullptr);
    Buffers<T>(sizes_of(p), data_of<T>(p), arena);
    return arena.used();
  });
}

template <template <class> class Buffers, class Problem>
std::int64_t workspace(const Problem& p) {
  const std::int64_t bytes = lane_bytes<Buffers>(p);
  return bytes * lanes_of(p.N, work_of(sizes_of(p)), bytes);
}

// f(n, buffers, parallel) for every problem n
template <template <class> class Buffers, class T, class Problem, class F>
void in_lanes(const Problem& p, void* workspace, const Parallel& parallel, const F& f) {
  const Sizes sizes = sizes_of(p);
  const std::int64_t bytes = lane_bytes<Buffers>(p);
  for_each_problem(p.N, lanes_of(p.N, work_of(sizes), bytes), parallel, [&](std::int64_t n, std::int64_t lane, const Parallel& threads) {
    Arena arena(static_cast<char*>(workspace) + lane * bytes);
    f(n, Buffers<T>(sizes, data_of<T>(p), arena), threads);
  });
}

template <class Problem>
void pair_forward(const Problem& p, const PairForward& to, void* workspace, const Parallel& parallel) {
  const Sizes sizes = sizes_of(p);
  with_real(p.dtype, [&](auto real) {
    using T = decltype(real);
    in_lanes<Operands, T>(p, workspace, parallel, [&](std::int64_t n, const Operands<T>& operands, const Parallel& threads) {
      T* basis = static_cast<T*>(to.basis);
      candidate_basis(p, n, basis, static_cast<T*>(to.factor), threads);
      forward(sizes, p.dtype, p.anchor, n, p.squared, basis + n * p.C * sizes.m * p.D, geometry_of<T>(p, to.factor, n), to.value, operands, threads);
    });
  });
}

template <class Problem>
void pair_backward(const Problem& p, const PairBackward& to, void* workspace, const Parallel& parallel) {
  const Sizes sizes = sizes_of(p);
  with_real(p.dtype, [&](auto real) {
    using T = decltype(real);
    in_lanes<BackwardBuffers, T>(p, workspace, parallel, [&](std::int64_t n, const BackwardBuffers<T>& buffers, const Parallel& threads) {
      const T* basis = static_cast<const T*>(to.basis) + n * p.C * sizes.m * p.D;
      const auto geometry = geometry_of<T>(p, to.factor, n);
      pack_operands(sizes, p.dtype, p.anchor, n, basis, geometry, buffers.operands, threads);
      pair_gradient(sizes, p.dtype, n, p.squared, p.eps, basis, geometry, to.grad_anchor, to.grad_others, buffers, threads, [&] {
        return MatrixUpstream<T>{p.dtype, to.grad, n * to.grad_batch_stride, to.grad_row_stride, to.grad_column_stride, p.C,
                                 Scratch<T>(Columns<T>(p.C, p.D, sizes.m).tile)};
      });
    });
  });
}

// ---- paired_gram_volume: V = prod L_pp of one small set of vectors, dV = V L^-T Q ------------------------------------------------------------------------

// Loads sample n and factors it; returns the volume (an empty set: 1).
template <class T>
T factor_sample(const PairedGramVolumeProblem& p, std::int64_t n, T* q, T* factor, bool* here) {
  for (int o = 0; o < p.k; ++o) {
    here[o] = !p.present.data || p.present.data[n * p.present.row_stride + o * p.present.element_stride];
    if (here[o]) load_row(p.dtype, p.vectors[o].data, n * p.vectors[o].row_stride, p.vectors[o].element_stride, p.D, q + o * p.D);
  }
  return gram_schmidt(q, p.k, p.D, factor, [&](int o) { return here[o]; });
}

void paired_gram_volume(const PairedGramVolumeProblem& p, void* value, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) {
    using T = decltype(real);
    parallel_for(parallel, 0, p.N, 16, [&](std::int64_t begin, std::int64_t end) {
      Scratch<T> q(p.k * p.D);
      T factor[(kMaxOthers + 1) * (kMaxOthers + 1)];
      bool here[kMaxOthers + 1];
      for (std::int64_t n = begin; n < end; ++n) {
        T volume = factor_sample<T>(p, n, q, factor, here);
        if (p.squared) volume *= volume;
        store_row<T>(p.dtype, value, n, 1, &volume);
      }
    });
  });
}

void paired_gram_volume_bwd(const PairedGramVolumeProblem& p, const void* grad, std::int64_t grad_stride, void* grad_vectors, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) {
    using T = decltype(real);
    parallel_for(parallel, 0, p.N, 16, [&](std::int64_t begin, std::int64_t end) {
      Scratch<T> q(p.k * p.D);
      T factor[(kMaxOthers + 1) * (kMaxOthers + 1)];
      bool here[kMaxOthers + 1];
      for (std::int64_t n = begin; n < end; ++n) {
        const T volume = factor_sample<T>(p, n, q, factor, here);
        T scale = 0;
        load_row<T>(p.dtype, grad, n * grad_stride, 1, 1, &scale);
        scale *= p.squared ? 2 * volume * volume : volume;
        if (volume == 0) {
          for (std::int64_t k = 0; k < p.k * p.D; ++k) q[k] = 0;
        } else {
          solve_transposed<T>(factor, p.k, p.D, q);
          for (int o = 0; o < p.k; ++o)
            for (std::int64_t k = 0; k < p.D; ++k) q[o * p.D + k] = here[o] ? scale * q[o * p.D + k] : 0;
        }
        store_row<T>(p.dtype, grad_vectors, n * p.k * p.D, p.k * p.D, q);
      }
    });
  });
}

}  // namespace

extern const GramVolumeKernels kGramVolumeKernels;
const GramVolumeKernels kGramVolumeKernels = {
    workspace<Operands, GramVolumeProblem>,    pair_forward<GramVolumeProblem>,    workspace<BackwardBuffers, GramVolumeProblem>,    pair_backward<GramVolumeProblem>,
    workspace<Operands, TriangleAreaProblem>,  pair_forward<TriangleAreaProblem>,  workspace<BackwardBuffers, TriangleAreaProblem>,  pair_backward<TriangleAreaProblem>,
    paired_gram_volume,                        paired_gram_volume_bwd,
};

}  // inline namespace
}  // namespace modalign::cpu
