// Sums, means and maxima of groups of rows, and their transposes; compiled once per instruction set.
//
// Maths      ops/reduce_groups.h.
// Mapping    a task is some groups, of which it reads every row once and writes every row once: (R + M) C elements of traffic, 2 R C FLOPs. The row that is summed stays in L1.
// Precision  float (double for double) in the order of the members; half types are rounded once.
// Order      a group has one owner: equal bits for any threads.

#include "cpu/reduce_groups.h"

#include <limits>

#include "cpu/tile.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {
namespace {

constexpr std::int64_t kGrain = 1 << 14;   // elements of a task, or more

template <class T>
struct Group {
  const Groups& groups;
  std::int64_t begin, end;
  T total = 0;

  Group(const Groups& groups, std::int64_t g) : groups(groups), begin(groups.offsets[g]), end(groups.offsets[g + 1]) {
    for (std::int64_t k = begin; k < end; ++k) total += weight(k);
  }
  std::int64_t count() const { return end - begin; }
  std::int64_t row(std::int64_t k) const { return groups.members[k]; }
  T weight(std::int64_t k) const { return groups.weight ? static_cast<const T*>(groups.weight)[row(k)] : T(1); }
};

// Rows as they are where they lie as T, else widened.
template <class T>
class Rows {
 public:
  explicit Rows(const GroupsProblem& p) : p_(p), direct_(p.from.element_stride == 1 && size_of(p.dtype) == static_cast<int>(sizeof(T))), line_(direct_ ? 0 : p.C) {}
  const T* operator[](std::int64_t i) const {
    if (direct_) return static_cast<const T*>(p_.from.data) + i * p_.from.row_stride;
    load_row<T>(p_.dtype, p_.from.data, i * p_.from.row_stride, p_.from.element_stride, p_.C, line_);
    return line_;
  }

 private:
  const GroupsProblem& p_;
  bool direct_;
  Scratch<T> line_;
};

// A row of the output, in place where it lies as T.
template <class T>
class Output {
 public:
  Output(const GroupsProblem& p, void* to) : p_(p), to_(to), direct_(size_of(p.dtype) == static_cast<int>(sizeof(T))), line_(direct_ ? 0 : p.C) {}
  T* line(std::int64_t i) const { return direct_ ? static_cast<T*>(to_) + i * p_.C : line_; }
  void finish(std::int64_t i) const { if (!direct_) store_row<T>(p_.dtype, to_, i * p_.C, p_.C, static_cast<T*>(line_)); }

 private:
  const GroupsProblem& p_;
  void* to_;
  bool direct_;
  Scratch<T> line_;
};

template <class T>
void scale_row(T* __restrict__ out, const T* __restrict__ x, T weight, std::int64_t C) {
  if (weight == 1) std::memcpy(out, x, C * sizeof(T));
  else for (std::int64_t k = 0; k < C; ++k) out[k] = weight * x[k];
}
template <class T>
void fill_row(T* out, T value, std::int64_t C) {
  for (std::int64_t k = 0; k < C; ++k) out[k] = value;
}

template <class T>
void reduce_group(const GroupsProblem& p, const Group<T>& group, const Rows<T>& rows, T* __restrict__ out) {
  if (group.count() == 0) return fill_row<T>(out, p.mode == GroupMode::max ? -std::numeric_limits<T>::infinity() : T(0), p.C);
  if (p.mode == GroupMode::max) {
    scale_row<T>(out, rows[group.row(group.begin)], 1, p.C);
    for (std::int64_t m = group.begin + 1; m < group.end; ++m) {
      const T* __restrict__ x = rows[group.row(m)];
      for (std::int64_t k = 0; k < p.C; ++k) out[k] = (x[k] > out[k]) | (x[k] != x[k]) ? x[k] : out[k];
    }
    return;
  }
  const bool mean = p.mode == GroupMode::mean;
  if (mean && group.count() == 1) return scale_row<T>(out, rows[group.row(group.begin)], 1, p.C);
  if (mean && group.total == 0) return fill_row<T>(out, 0, p.C);
  scale_row<T>(out, rows[group.row(group.begin)], group.weight(group.begin), p.C);
  for (std::int64_t m = group.begin + 1; m < group.end; ++m) {
    const T* __restrict__ x = rows[group.row(m)];
    const T weight = group.weight(m);
    if (mean && m + 1 == group.end) for (std::int64_t k = 0; k < p.C; ++k) out[k] = (out[k] + weight * x[k]) / group.total;   // exact for two equal rows
    else for (std::int64_t k = 0; k < p.C; ++k) out[k] += weight * x[k];
  }
}

template <class T>
void reduce(const GroupsProblem& p, const GroupsResult& to, const Parallel& parallel) {
  parallel_for(parallel, 0, p.groups.M, maximum(1, kGrain / maximum(1, p.C)), [&](std::int64_t begin, std::int64_t end) {
    const Rows<T> rows(p);
    const Output<T> output(p, to.to);
    for (std::int64_t g = begin; g < end; ++g) {
      const Group<T> group(p.groups, g);
      reduce_group<T>(p, group, rows, output.line(g));
      output.finish(g);
      static_cast<T*>(to.total)[g] = group.total;
    }
  });
}

template <class T>
void spread(const GroupsProblem& p, const GroupsResult& to, const Parallel& parallel) {
  parallel_for(parallel, 0, p.groups.M, maximum(1, kGrain / maximum(1, p.C)), [&](std::int64_t begin, std::int64_t end) {
    const Rows<T> rows(p);
    const Output<T> output(p, to.to);
    for (std::int64_t g = begin; g < end; ++g) {
      const Group<T> group(p.groups, g);
      const bool mean = p.mode == GroupMode::mean, shared = mean && group.count() > 1;
      const T* const y = group.count() ? rows[g] : nullptr;
      for (std::int64_t m = group.begin; m < group.end; ++m) {
        T* const line = output.line(group.row(m));
        if (shared && group.total == 0) fill_row<T>(line, 0, p.C);
        else scale_row<T>(line, y, shared ? group.weight(m) / group.total : mean ? T(1) : group.weight(m), p.C);
        output.finish(group.row(m));
      }
    }
  });
}

void run_reduce(const GroupsProblem& p, const GroupsResult& to, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) { reduce<decltype(real)>(p, to, parallel); });
}
void run_spread(const GroupsProblem& p, const GroupsResult& to, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) { spread<decltype(real)>(p, to, parallel); });
}

}  // namespace

extern const GroupKernels kGroupKernels;
const GroupKernels kGroupKernels = {run_reduce, run_spread};

}  // inline namespace
}  // namespace modalign::cpu
