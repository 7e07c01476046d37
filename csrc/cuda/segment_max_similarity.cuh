/// @file segment_max_similarity.cuh
/// @brief Largest product of every segment of rows with every candidate on CUDA: kernels, launch sequences, and the table of compiled instances.
///
/// Maths      ops/segment_max_similarity.h. (Region-attribute mapping: ViLLA, ICCV 2023; maxima over tokens: FILIP, ICLR 2022, FDT, CVPR 2023.)
///
/// Forward    prepare       one thread per item: -inf and -1 into the result (what an empty segment has) and into the slots; the segment that a walk
///                          begins in, by bisection
///            forward       tile product rows x candidates. A block walks down the row tiles of its share; in the epilogue a thread owns a candidate
///                          and keeps the best product of the segment in progress and its row in registers, over tiles too. A segment that lies
///                          inside the walk is written at its end. One that began before the walk, or goes on behind it, leaves its part in a slot
///                          of the walk, [2 parts][A].
///            merge         one thread per end of a walk and candidate: where a segment that began in the walk goes on, its parts are joined, walk
///                          by walk
/// Backward   gather_x      one warp per row and piece of kGatherDepth elements: scans the candidates of its segment for those that chose the row
///            gather_y      one warp per candidate and piece: scans the segments
///
/// Numbers    f32, f64: FmaBackend in the input precision. bf16, f16: one tensor-core product, whose operands are exact, fp32 accumulation; indices
///            are decided on the sums, before values are rounded.
/// FLOPs      forward 2 R A D; backward 4 S A D. Bytes forward: operands once per tile of the other side, 3 S A written.
/// Memory     forward: slots of at most kMaxSlots walks, 2 kMaxSlots A reals and ints; backward: none. Nothing R x A.
/// Order      a maximum has no order, ties go to the lower row; gradients: candidates, or segments, ascending. Equal bits from run to run.
/// Registers  tiles at most 128, one-warp kernels at most 168.
#pragma once

#include "cuda/pair_geometry.cuh"
#include "ops/segment_max_similarity.h"

namespace modalign::cuda {

// The best product so far and its row; row -1: nothing yet.
template <class Real> struct Best {
  Real value = -kInfinity<Real>;
  int row = -1;
};
// Whether a later product takes the place of what is there: a NaN is larger than every number.
template <class Real> MODALIGN_DEVICE bool is_better(Real value, const Best<Real>& than) {
  return than.row < 0 || value > than.value || (value != value && than.value == than.value);
}

struct DeviceOffsets {
  SegmentOffsets offsets;
  std::int64_t S;
  MODALIGN_DEVICE std::int64_t operator[](std::int64_t s) const { return Global<const std::int64_t>(offsets.data)[s * offsets.stride]; }
  // The last segment that begins at or before a row: the one that holds it, where it exists. S > 0.
  MODALIGN_DEVICE std::int64_t holding(std::int64_t row) const {
    std::int64_t low = 0, high = S;
    while (low + 1 < high) {
      const std::int64_t middle = (low + high) / 2;
      if ((*this)[middle] <= row) low = middle;
      else high = middle;
    }
    return low;
  }
};

// Parts of segments that cross the edges of walks.
template <class Real> struct SegmentSlots {
  Real* value;   // [walks][2][A]
  int* row;
  std::int64_t A;
  static constexpr int kFromBefore = 0, kGoesOn = 1;
  MODALIGN_DEVICE void write(std::int64_t walk, int part, std::int64_t column, const Best<Real>& best) const {
    global(value)[(walk * 2 + part) * A + column] = best.value;
    global(row)[(walk * 2 + part) * A + column] = best.row;
  }
  MODALIGN_DEVICE Best<Real> read(std::int64_t walk, int part, std::int64_t column) const {
    return {Real(Global<const Real>(value)[(walk * 2 + part) * A + column]), int(Global<const int>(row)[(walk * 2 + part) * A + column])};
  }
};

template <class T> struct SegmentResult {
  T* values;   // [S, A]
  std::int64_t* indices;
  std::int64_t A;
  MODALIGN_DEVICE void write(std::int64_t s, std::int64_t column, const Best<real_of<T>>& best) const {
    global(values)[s * A + column] = narrow<T>(best.value);
    global(indices)[s * A + column] = best.row;
  }
};

// One thread per item, in blocks of warps.
MODALIGN_DEVICE std::int64_t lane_item() { return warp_item() * kWarpSize + lane(); }
inline LaunchPlan plan_lanes(std::int64_t items, const char* key) { return plan_warps(ceil_divide<std::int64_t>(items, kWarpSize), 1, key); }

// ------------------------------------------------------------------------------------------------------------------------------------------- forward
template <class T> struct PrepareSegments {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  DeviceOffsets offsets;
  SegmentResult<T> result;
  SegmentSlots<Real> slots;
  std::int64_t walks, rows_per_walk;
  int* first_segment;   // [walks]

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_lanes((offsets.S + 2 * walks) * result.A + walks, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t values = offsets.S * result.A, parts = 2 * walks * result.A;
    std::int64_t item = lane_item();
    if (item < values) {
      result.write(item / result.A, item % result.A, Best<Real>());
      return;
    }
    item -= values;
    if (item < parts) {
      slots.write(item / result.A / 2, int(item / result.A % 2), item % result.A, Best<Real>());
      return;
    }
    item -= parts;
    if (item >= (MODALIGN_MUTATION("prepare: one walk too many") ? walks + 1 : walks)) return;
    global(first_segment)[item] = offsets.S == 0 ? 0 : int(offsets.holding(item * rows_per_walk));
  }
};

template <class T> struct SegmentMaxEpilogue {
  using Backend = PairBackend<T>;
  using Real = real_of<T>;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 2;
  struct State {
    Best<Real> best;
    int segment = 0;
  };
  DeviceOffsets offsets;
  const int* first_segment;
  SegmentResult<T> result;
  SegmentSlots<Real> slots;
  std::int64_t R, row_tiles_per_walk;

  MODALIGN_DEVICE void begin(State& state, const TileRange& range, std::int64_t, const WalkPosition& walk, int) const {
    if (range.row_tile != walk.row * row_tiles_per_walk) return;
    state.segment = Global<const int>(first_segment)[walk.row];
    state.best = Best<Real>();
  }
  MODALIGN_DEVICE void end(State&, const TileRange&, std::int64_t, const WalkPosition&, int) const {}

  MODALIGN_DEVICE void consume(State& state, Shared<Real> tile, const TileRange& range, std::int64_t, const WalkPosition& walk, int) const {
    const int column = thread_index();
    if (column >= range.columns) return;   // no barrier below
    const std::int64_t target = range.column_begin + column;
    const std::int64_t walk_begin = walk.row * row_tiles_per_walk * Backend::kRows;
    const std::int64_t walk_end = minimum(R, walk_begin + row_tiles_per_walk * Backend::kRows);
    for (int row = 0; row < range.rows;) {
      const std::int64_t r = range.row_begin + row;
      while (state.segment < offsets.S && offsets[state.segment + 1] <= r) {   // on to the segment of this row
        ++state.segment;
        state.best = Best<Real>();
      }
      if (state.segment == offsets.S) return;
      const std::int64_t segment_end = offsets[state.segment + 1];
      const int stop = int(minimum(segment_end - range.row_begin, std::int64_t(range.rows)));
      for (; row < stop; ++row) {
        const Real z = tile[row * Backend::kPitch + column];
        if (MODALIGN_MUTATION("segments: ties to the last row") ? !(z < state.best.value) : is_better(z, state.best))
          state.best = {z, int(range.row_begin) + row};
      }
      const std::int64_t reached = range.row_begin + stop;
      if (reached < segment_end && reached < walk_end) return;   // the next tile goes on
      const bool from_before = offsets[state.segment] < walk_begin;
      if (from_before && !MODALIGN_MUTATION("segments: forget what came before")) slots.write(walk.row, SegmentSlots<Real>::kFromBefore, target, state.best);
      else if (reached < segment_end) slots.write(walk.row, SegmentSlots<Real>::kGoesOn, target, state.best);
      else result.write(state.segment, target, state.best);
    }
  }
};
template <class T> using SegmentMaxKernel = TileWalk<PairBackend<T>, SegmentMaxEpilogue<T>>;

template <class T> struct MergeSegments {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  DeviceOffsets offsets;
  const int* first_segment;
  SegmentResult<T> result;
  SegmentSlots<Real> slots;
  std::int64_t walks, rows_per_walk;

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_lanes(walks > 1 ? (walks - 1) * result.A : 0, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t item = lane_item();
    if (item >= (walks - 1) * result.A || offsets.S == 0) return;
    const std::int64_t walk = item / result.A, column = item % result.A;
    const std::int64_t segment = Global<const int>(first_segment)[walk + 1], begin = offsets[segment], end = offsets[segment + 1];
    if (begin < walk * rows_per_walk || begin >= (walk + 1) * rows_per_walk) return;   // it began in another walk
    Best<Real> best = slots.read(walk, SegmentSlots<Real>::kGoesOn, column);
    const std::int64_t stop = MODALIGN_MUTATION("merge: one walk alone") ? walk + 2 : walks;
    for (std::int64_t next = walk + 1; next < stop && next * rows_per_walk < end; ++next) {
      const Best<Real> part = slots.read(next, SegmentSlots<Real>::kFromBefore, column);
      if (part.row >= 0 && is_better(part.value, best)) best = part;
    }
    result.write(segment, column, best);
  }
};

// ------------------------------------------------------------------------------------------------------------------------------------------ backward
constexpr int kGatherPieces = 8;
constexpr std::int64_t kGatherDepth = kGatherPieces * kWarpSize;   // elements of a row that a warp sums in registers

// A piece of one row of dx (kRows) or of dy. `list` is what is scanned: candidates of the row's segment, or segments.
template <class T, bool kRows> struct GatherGradient {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  DeviceOffsets offsets;
  std::int64_t R, A, D;
  const T* grad;
  std::int64_t grad_row_stride, grad_column_stride;
  const std::int64_t* indices;
  BatchedRows source;   // kRows: y, else x
  T* out;

  MODALIGN_HOST_DEVICE std::int64_t pieces() const { return ceil_divide(D, kGatherDepth); }
  LaunchPlan plan(std::int64_t batches, const char* key) const { return plan_warps((kRows ? R : A) * pieces(), batches, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t item = warp_item(), line = item / pieces(), from = item % pieces() * kGatherDepth;
    if (line >= (kRows ? R : A)) return;
    const std::int64_t segment = kRows && offsets.S > 0 ? offsets.holding(line) : 0, list = !kRows ? offsets.S : offsets.S > 0 ? A : 0;
    Real sum[kGatherPieces];
    MODALIGN_UNROLL
    for (int piece = 0; piece < kGatherPieces; ++piece) sum[piece] = 0;
    for (std::int64_t first = 0; first < list; first += kWarpSize) {
      const std::int64_t entry = first + lane(), s = kRows ? segment : entry, a = kRows ? entry : line;
      int chosen = -1;   // the source row of this lane's entry
      Real weight = 0;
      if (entry < list) {
        const std::int64_t row = Global<const std::int64_t>(indices)[s * A + a];
        const bool taken = kRows ? row == line : row >= 0 && row < (MODALIGN_MUTATION("gather: the last row is not there") ? R - 1 : R);
        if (taken) chosen = int(kRows ? a : row);
        if (taken) weight = widen(T(Global<const T>(grad)[s * grad_row_stride + a * grad_column_stride]));
      }
      std::uint32_t pending = warp_ballot(chosen >= 0);
      for (int other = 0; pending != 0; ++other, pending >>= 1) {
        if ((pending & 1) == 0) continue;
        const Real share = shuffle(weight, MODALIGN_MUTATION("gather: the neighbour's weight") ? other ^ 1 : other);
        const Global<const T> vector = Global<const T>(static_cast<const T*>(source.data)).at(shuffle(chosen, other) * source.row_stride);
        MODALIGN_UNROLL
        for (int piece = 0; piece < kGatherPieces; ++piece) {
          const std::int64_t d = from + piece * kWarpSize + lane();
          if (d < D) sum[piece] = fused_multiply_add(share, widen(T(vector[d * source.element_stride])), sum[piece]);
        }
      }
    }
    const Global<T> target = Global<T>(out).at(line * D);
    MODALIGN_UNROLL
    for (int piece = 0; piece < kGatherPieces; ++piece) {
      const std::int64_t d = from + piece * kWarpSize + lane();
      if (d < (MODALIGN_MUTATION("gather: one element too many") ? D + 1 : D)) target[d] = narrow<T>(sum[piece]);
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------------- the compiled instances
#define MODALIGN_SEGMENT_KERNELS_OF(X, dtype, T)                           \
  X("segment_max_similarity.prepare." dtype, PrepareSegments<T>)           \
  X("segment_max_similarity.forward." dtype, SegmentMaxKernel<T>)          \
  X("segment_max_similarity.merge." dtype, MergeSegments<T>)               \
  X("segment_max_similarity.gather_x." dtype, GatherGradient<T, true>)     \
  X("segment_max_similarity.gather_y." dtype, GatherGradient<T, false>)
#define MODALIGN_SEGMENT_KERNELS(X)             \
  MODALIGN_SEGMENT_KERNELS_OF(X, "f32", float)  \
  MODALIGN_SEGMENT_KERNELS_OF(X, "f64", double) \
  MODALIGN_SEGMENT_KERNELS_OF(X, "f16", f16)    \
  MODALIGN_SEGMENT_KERNELS_OF(X, "bf16", bf16)

MODALIGN_SEGMENT_KERNELS(MODALIGN_KEY_OF)

// ---------------------------------------------------------------------------------------------------------------------------------- launch sequences
template <class T> inline TileGrid segment_grid(const SegmentMaxProblem& p) {
  using Backend = PairBackend<T>;
  return make_grid(p.R, p.A, p.D, Backend::kRows, Backend::kColumns, kMaxSlots);
}

template <class T> struct SegmentBuffers {
  SegmentSlots<real_of<T>> slots;
  int* first_segment;
  template <class Arena> SegmentBuffers(const SegmentMaxProblem& p, Arena& arena) {
    const std::int64_t walks = segment_grid<T>(p).row_walks;
    slots = {arena.template take<real_of<T>>("slot_values", walks * 2 * p.A), arena.template take<int>("slot_rows", walks * 2 * p.A), p.A};
    first_segment = arena.template take<int>("first_segment", walks);
  }
};

template <class T, class Launch>
int run_segment_max(const SegmentMaxProblem& p, const SegmentMaxForward& output, const SegmentBuffers<T>& buffers, const Launch& launch) {
  const TileGrid grid = segment_grid<T>(p);
  const std::int64_t rows_per_walk = grid.row_tiles_per_walk * grid.rows_per_tile;
  const DeviceOffsets offsets{p.offsets, p.S};
  const SegmentResult<T> result{static_cast<T*>(output.values), output.indices, p.A};

  const PrepareSegments<T> prepare{offsets, result, buffers.slots, grid.row_walks, rows_per_walk, buffers.first_segment};
  if (const int error = launch_kernel(launch, prepare, 1)) return error;
  const SegmentMaxKernel<T> forward{make_operand<T>(Major::depth, static_cast<const T*>(p.x.data), 0, p.x.row_stride, p.x.element_stride),
                                    make_operand<T>(Major::depth, static_cast<const T*>(p.y.data), 0, p.y.row_stride, p.y.element_stride),
                                    grid,
                                    {offsets, buffers.first_segment, result, buffers.slots, p.R, grid.row_tiles_per_walk}};
  if (const int error = launch_kernel(launch, forward, 1)) return error;
  return launch_kernel(launch, MergeSegments<T>{offsets, buffers.first_segment, result, buffers.slots, grid.row_walks, rows_per_walk}, 1);
}

template <class T, class Launch> int run_segment_max_backward(const SegmentMaxProblem& p, const SegmentMaxBackward& request, const Launch& launch) {
  const DeviceOffsets offsets{p.offsets, p.S};
  const T* grad = static_cast<const T*>(request.grad);
  if (request.grad_x != nullptr) {
    const GatherGradient<T, true> rows{offsets,         p.R, p.A, p.D, grad, request.grad_row_stride, request.grad_column_stride,
                                       request.indices, p.y, static_cast<T*>(request.grad_x)};
    if (const int error = launch_kernel(launch, rows, 1)) return error;
  }
  if (request.grad_y == nullptr) return 0;
  const GatherGradient<T, false> columns{offsets,         p.R, p.A, p.D, grad, request.grad_row_stride, request.grad_column_stride,
                                         request.indices, p.x, static_cast<T*>(request.grad_y)};
  return launch_kernel(launch, columns, 1);
}

}   // namespace modalign::cuda
