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
/// Registers  at most 168.
#pragma once

#include "cuda/launch_sequence.cuh"
#include "ops/reduce_groups.h"

namespace modalign::cuda {

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
  int step;
  MODALIGN_DEVICE RowPiece(std::int64_t piece, std::int64_t C, bool vectors) : first(piece * kWidth + (vectors ? lane() * kVector : lane())), C(C), step(vectors ? 1 : kWarpSize) {}

  MODALIGN_DEVICE void load(Real (&x)[kVector], Global<const T> row, std::int64_t element_stride) const {
    if (step == 1) {
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
    if (step == 1) {
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

// What both kernels are called with.
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

  LaunchPlan plan(const char* key) const { return plan_warps(p.groups.M * pieces, 1, key); }
  MODALIGN_DEVICE RowPiece<T> piece(std::int64_t item) const { return RowPiece<T>(item % pieces, p.C, vectors); }
  MODALIGN_DEVICE Global<const T> from_row(std::int64_t row) const { return Global<const T>(static_cast<const T*>(p.from.data)).at(row * p.from.row_stride); }
  MODALIGN_DEVICE Global<T> to_row(std::int64_t row) const { return global(to).at(row * p.C); }
};

template <class T> struct ReduceGroups {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  static constexpr int kVector = RowPiece<T>::kVector;
  GroupsCall<T> call;

  LaunchPlan plan(std::int64_t, const char* key) const { return call.plan(key); }

  MODALIGN_DEVICE void operator()() const {
    const GroupsProblem& p = call.p;
    const std::int64_t item = warp_item(), g = item / call.pieces;
    if (g >= (MODALIGN_MUTATION("reduce: one group too many") ? p.groups.M + 1 : p.groups.M)) return;
    const DeviceGroup<Real> group(p.groups, g);
    const RowPiece<T> piece = call.piece(item);
    const bool largest = p.mode == GroupMode::max, mean = p.mode == GroupMode::mean;
    const bool alone = mean && group.count() == 1 && !MODALIGN_MUTATION("reduce: the weight of a row that is alone");
    Real result[kVector], x[kVector] = {}, total = 0;
    MODALIGN_UNROLL
    for (int v = 0; v < kVector; ++v) result[v] = largest ? -kInfinity<Real> : Real(0);
    for (int member = group.begin; member < (MODALIGN_MUTATION("reduce: leave the last member") ? group.end - 1 : group.end); ++member) {
      const std::int64_t row = group.row(member);
      const Real weight = group.weight(row), factor = alone ? Real(1) : weight;
      total += weight;
      piece.load(x, call.from_row(row), p.from.element_stride);
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
    piece.store(result, call.to_row(g));
    if (item % call.pieces == 0 && lane() == 0) global(call.total)[g] = total;
  }
};

template <class T> struct SpreadGroups {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  static constexpr int kVector = RowPiece<T>::kVector;
  GroupsCall<T> call;

  LaunchPlan plan(std::int64_t, const char* key) const { return call.plan(key); }

  MODALIGN_DEVICE void operator()() const {
    const GroupsProblem& p = call.p;
    const std::int64_t item = warp_item(), g = item / call.pieces;
    if (g >= (MODALIGN_MUTATION("spread: one group too many") ? p.groups.M + 1 : p.groups.M)) return;
    const DeviceGroup<Real> group(p.groups, g);
    const RowPiece<T> piece = call.piece(item);
    const bool mean = p.mode == GroupMode::mean, shared = mean && (group.count() > 1 || MODALIGN_MUTATION("spread: the weight of a row that is alone"));
    Real y[kVector] = {}, x[kVector], total = 0;
    if (group.count() > 0) piece.load(y, call.from_row(g), p.from.element_stride);
    if (shared) {
      for (int member = group.begin; member < group.end; ++member) total += group.weight(group.row(member));
    }
    for (int member = group.begin; member < (MODALIGN_MUTATION("spread: leave the last member") ? group.end - 1 : group.end); ++member) {
      const std::int64_t row = group.row(member);
      const Real weight = group.weight(row), factor = shared ? weight / total : mean ? Real(1) : weight;
      MODALIGN_UNROLL
      for (int v = 0; v < kVector; ++v) x[v] = shared && total == 0 && !MODALIGN_MUTATION("spread: divide by zero") ? Real(0) : factor * y[v];
      piece.store(x, call.to_row(row));
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
