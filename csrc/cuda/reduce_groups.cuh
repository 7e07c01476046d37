/// @file reduce_groups.cuh
/// @brief Sums, means and maxima of groups of rows on CUDA, and their transposes: kernels and the table of compiled instances.
///
/// Maths      ops/reduce_groups.h.
///
/// reduce     one warp per group and piece of C (16 bytes a lane: 64 f64, 128 f32, 256 of the half types): reads the members one after the other
/// spread     the same: reads the piece of y once and writes it to every member
///
/// Numbers    fp32 (f64 in double); half types are rounded once.
/// FLOPs      2 R C. Bytes: (R + M) C elements, each once, by 16 at a time where rows are aligned; offsets, members and weights once a piece, which the caches serve.
/// Memory     none.
/// Order      members rising, as they stand; a group and a piece have one owner. Equal bits from run to run.
/// Registers  at most 56, so that 36 warps of a multiprocessor wait for memory at once.
#pragma once

#include "cuda/launch_sequence.cuh"
#include "ops/reduce_groups.h"

namespace modalign::cuda {

constexpr int kGroupBlocks = 9;   // at most 56 registers

// Whatever the numbers on the device are, a group has rows alone that exist.
template <class Real> struct DeviceGroup {
  const Groups& groups;
  int begin, end;
  MODALIGN_DEVICE DeviceGroup(const Groups& groups, std::int64_t g) : groups(groups), begin(bound(g)), end(bound(g + 1)) {}
  MODALIGN_DEVICE int bound(std::int64_t g) const { return maximum(0, minimum(int(Global<const std::int32_t>(groups.offsets)[g]), int(groups.R))); }
  MODALIGN_DEVICE int count() const { return end - begin; }
  MODALIGN_DEVICE std::int64_t row(int member) const { return maximum(0, minimum(int(Global<const std::int32_t>(groups.members)[member]), int(groups.R) - 1)); }
  MODALIGN_DEVICE Real weight(std::int64_t row) const { return groups.weight == nullptr ? Real(1) : Real(Global<const Real>(static_cast<const Real*>(groups.weight))[row]); }
};

// What a lane has of a row: neighbours where rows can be moved by 16 bytes, else every 32nd element.
template <class T> struct RowPiece {
  using Real = real_of<T>;
  static constexpr int kVector = 16 / int(sizeof(T)), kWidth = kVector * kWarpSize;
  std::int64_t first, C;
  bool vectors;
  MODALIGN_DEVICE RowPiece(std::int64_t piece, std::int64_t C, bool vectors) : first(piece * kWidth + (vectors ? lane() * kVector : lane())), C(C), vectors(vectors) {}

  MODALIGN_DEVICE void load(Real (&x)[kVector], Global<const T> row, std::int64_t element_stride) const {
    if (vectors) {
      if (first >= C) return;
      const Pack<T, kVector> pack = load_pack<kVector>(row, first);
      MODALIGN_UNROLL
      for (int v = 0; v < kVector; ++v) x[v] = widen(pack[v]);
    } else {
      MODALIGN_UNROLL
      for (int v = 0; v < kVector; ++v)
        if (first + v * kWarpSize < C) x[v] = widen(T(row[(first + v * kWarpSize) * element_stride]));
    }
  }
  MODALIGN_DEVICE void store(const Real (&x)[kVector], Global<T> row) const {
    if (vectors) {
      if (first >= C) return;
      Pack<T, kVector> pack;
      MODALIGN_UNROLL
      for (int v = 0; v < kVector; ++v) pack[v] = narrow<T>(x[v]);
      store_pack(row, first, pack);
    } else {
      const std::int64_t end = MODALIGN_MUTATION("piece: one element too many") ? C + 1 : C;
      MODALIGN_UNROLL
      for (int v = 0; v < kVector; ++v)
        if (first + v * kWarpSize < end) row[first + v * kWarpSize] = narrow<T>(x[v]);
    }
  }
};

// What both kernels are called with. Blocks along y have different pieces of C; more than kMaxBatches pieces are walked through.
template <class T> struct GroupsCall {
  using Real = real_of<T>;
  static constexpr int kVector = RowPiece<T>::kVector;
  GroupsProblem p;
  T* to;
  Real* total;
  std::int64_t pieces;
  bool vectors;

  GroupsCall(const GroupsProblem& p, const GroupsResult& result)
      : p(p), to(static_cast<T*>(result.to)), total(static_cast<Real*>(result.total)), pieces(p.C > 0 ? ceil_divide<std::int64_t>(p.C, RowPiece<T>::kWidth) : 1),
        vectors(p.from.element_stride == 1 && p.from.row_stride % kVector == 0 && p.C % kVector == 0 && is_aligned(p.from.data) && is_aligned(result.to)) {}
  static bool is_aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

  LaunchPlan plan(const char* key) const {
    LaunchPlan plan = plan_warps(p.groups.M, 1, key);
    plan.grid[1] = unsigned(pieces < kMaxBatches ? pieces : kMaxBatches);
    return plan;
  }
  // f(group, piece) for each piece that the warp owns.
  template <class F> MODALIGN_DEVICE void each(const F& f) const {
    const std::int64_t g = warp_item();
    if (g >= (MODALIGN_MUTATION("groups: one too many") ? p.groups.M + 1 : p.groups.M)) return;
    for (std::int64_t piece = block_index_y(); piece < pieces; piece += grid_size_y()) f(g, piece);
  }
  MODALIGN_DEVICE Global<const T> from_row(std::int64_t row) const { return Global<const T>(static_cast<const T*>(p.from.data)).at(row * p.from.row_stride); }
  MODALIGN_DEVICE Global<T> to_row(std::int64_t row) const { return global(to).at(row * p.C); }
};

template <class T> struct ReduceGroups {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kGroupBlocks;
  static constexpr int kVector = RowPiece<T>::kVector;
  GroupsCall<T> call;

  LaunchPlan plan(std::int64_t, const char* key) const { return call.plan(key); }

  MODALIGN_DEVICE void operator()() const {
    call.each([&](std::int64_t g, std::int64_t piece) { reduce(DeviceGroup<Real>(call.p.groups, g), g, piece); });
  }
  MODALIGN_DEVICE void reduce(const DeviceGroup<Real>& group, std::int64_t g, std::int64_t piece) const {
    const GroupsProblem& p = call.p;
    const RowPiece<T> here(piece, p.C, call.vectors);
    const bool largest = p.mode == GroupMode::max, mean = p.mode == GroupMode::mean;
    const bool alone = mean && group.count() == 1 && !MODALIGN_MUTATION("reduce: the weight of a row that is alone");
    Real result[kVector], x[kVector] = {}, total = 0;
    MODALIGN_UNROLL
    for (int v = 0; v < kVector; ++v) result[v] = largest ? -kInfinity<Real> : Real(0);
    MODALIGN_NO_UNROLL
    for (int member = group.begin; member < (MODALIGN_MUTATION("reduce: leave the last member") ? group.end - 1 : group.end); ++member) {
      const std::int64_t row = group.row(member);
      const Real weight = group.weight(row), factor = alone ? Real(1) : weight;
      total += weight;
      here.load(x, call.from_row(row), p.from.element_stride);
      MODALIGN_UNROLL
      for (int v = 0; v < kVector; ++v) {
        if (largest) result[v] = x[v] > result[v] || (x[v] != x[v] && !MODALIGN_MUTATION("reduce: NaN is not the largest")) ? x[v] : result[v];
        else result[v] = member == group.begin ? factor * x[v] : fused_multiply_add(factor, x[v], result[v]);   // a zero keeps its sign
      }
    }
    if (mean && group.count() > 1) {
      MODALIGN_UNROLL
      for (int v = 0; v < kVector; ++v) result[v] = total == 0 && !MODALIGN_MUTATION("reduce: divide by zero") ? Real(0) : result[v] / total;
    }
    here.store(result, call.to_row(g));
    if (piece == 0 && lane() == 0) global(call.total)[g] = total;
  }
};

template <class T> struct SpreadGroups {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kGroupBlocks;
  static constexpr int kVector = RowPiece<T>::kVector;
  GroupsCall<T> call;

  LaunchPlan plan(std::int64_t, const char* key) const { return call.plan(key); }

  MODALIGN_DEVICE void operator()() const {
    call.each([&](std::int64_t g, std::int64_t piece) { spread(DeviceGroup<Real>(call.p.groups, g), g, piece); });
  }
  MODALIGN_DEVICE void spread(const DeviceGroup<Real>& group, std::int64_t g, std::int64_t piece) const {
    const GroupsProblem& p = call.p;
    const RowPiece<T> here(piece, p.C, call.vectors);
    const bool mean = p.mode == GroupMode::mean, shared = mean && (group.count() > 1 || MODALIGN_MUTATION("spread: the weight of a row that is alone"));
    Real y[kVector] = {}, x[kVector], total = 0;
    if (group.count() > 0) here.load(y, call.from_row(g), p.from.element_stride);
    if (shared) {
      MODALIGN_NO_UNROLL
      for (int member = group.begin; member < group.end; ++member) total += group.weight(group.row(member));
    }
    MODALIGN_NO_UNROLL
    for (int member = group.begin; member < (MODALIGN_MUTATION("spread: leave the last member") ? group.end - 1 : group.end); ++member) {
      const std::int64_t row = group.row(member);
      const Real weight = group.weight(row), factor = shared ? weight / total : mean ? Real(1) : weight;
      MODALIGN_UNROLL
      for (int v = 0; v < kVector; ++v) x[v] = shared && total == 0 && !MODALIGN_MUTATION("spread: divide by zero") ? Real(0) : factor * y[v];
      here.store(x, call.to_row(row));
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------------- the compiled instances
#define MODALIGN_GROUP_KERNELS_OF(X, dtype, T)  \
  X("reduce_groups." dtype, ReduceGroups<T>)    \
  X("spread_groups." dtype, SpreadGroups<T>)
#define MODALIGN_GROUP_KERNELS(X)             \
  MODALIGN_GROUP_KERNELS_OF(X, "f32", float)  \
  MODALIGN_GROUP_KERNELS_OF(X, "f64", double) \
  MODALIGN_GROUP_KERNELS_OF(X, "f16", f16)    \
  MODALIGN_GROUP_KERNELS_OF(X, "bf16", bf16)

MODALIGN_GROUP_KERNELS(MODALIGN_KEY_OF)

}   // namespace modalign::cuda
