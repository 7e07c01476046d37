// What the attention kernels share: sequences, kept pairs, logits, operands, and the walk over the tiles of which something is kept. ops/masked_attention.h has the maths.
#pragma once

#include "cpu/attention_mask.h"
#include "cpu/statistics.h"
#include "ops/masked_attention.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {

constexpr std::int64_t kBlock = kMaskBlock;   // queries and keys of a tile: whole panels of every kind

template <class T> constexpr T kNothing = -std::numeric_limits<T>::infinity();

inline std::int64_t blocks(std::int64_t n) { return (n + kBlock - 1) / kBlock; }

// ---- sequences and pairs ------------------------------------------------------------------------------------------------------------------------------------

struct Sequence {
  std::int64_t item, first_query, queries, first_key, keys;   // item of the tensors; keys: those within the length
  std::int64_t reach;                                         // causal: query i sees the keys up to i + reach
};

inline Sequence sequence(const AttentionProblem& p, std::int64_t b) {
  Sequence s{b, 0, p.Nq, 0, p.Nk, 0};
  if (p.cu_queries) s = {0, p.cu_queries[b], p.cu_queries[b + 1] - p.cu_queries[b], p.cu_keys[b], p.cu_keys[b + 1] - p.cu_keys[b], 0};
  s.reach = p.causal == Causal::none ? s.keys : p.causal == Causal::top_left ? 0 : s.keys - s.queries;
  if (p.key_lengths) s.keys = maximum(0, minimum(s.keys, p.key_lengths[b]));
  return s;
}

// Which pairs of a head are kept, and what is added to their logits.
class HeadPairs {
 public:
  HeadPairs(const AttentionProblem& p, const Mask& mask, const Sequence& s, std::int64_t b, std::int64_t h)
      : s_(s), mask_(mask), b_(b), h_(h), bias_(p.bias), bias_dtype_(p.bias_dtype), bias_at_(bias_.data ? b * bias_.batch_stride + h / (p.H / bias_.heads) * bias_.head_stride : 0) {}

  Coverage coverage(std::int64_t i, std::int64_t rows, std::int64_t j, std::int64_t columns) const {
    if (j > i + rows - 1 + s_.reach) return Coverage::nothing;
    return (j + columns - 1 <= i + s_.reach ? Coverage::everything : Coverage::some) & mask_.coverage(b_, h_, i, rows, j, columns);
  }

  bool has_bias() const { return bias_.data != nullptr; }
  std::int64_t bias_at() const { return bias_at_; }   // of the item and head

  // to[line * kBlock + k]: the bias, -inf where a pair is not kept. Lines are keys and k counts queries, or the other way round.
  template <bool lines_are_keys, class T>
  void addends(TestedTiles<lines_are_keys>& tested, std::int64_t i, std::int64_t rows, std::int64_t j, std::int64_t columns, T* to) const {
    const std::uint8_t* keep = mask_.keeps_all() ? nullptr : tested.tile(b_, h_, i, j);
    const std::int64_t lines = lines_are_keys ? columns : rows, count = lines_are_keys ? rows : columns;
    for (std::int64_t line = 0; line < lines; ++line, to += kBlock) {
      const std::int64_t at = lines_are_keys ? (j + line) * bias_.column_stride + i * bias_.row_stride : (i + line) * bias_.row_stride + j * bias_.column_stride;
      if (bias_.data) load_row<T>(bias_dtype_, bias_.data, bias_at_ + at, lines_are_keys ? bias_.row_stride : bias_.column_stride, count, to);
      else for (std::int64_t k = 0; k < count; ++k) to[k] = 0;
      if (keep)
        for (std::int64_t k = 0; k < count; ++k) to[k] = keep[line * kBlock + k] ? to[k] : kNothing<T>;
      // i + k + reach < j + line, and i + line + reach < j + k
      const std::int64_t edge = lines_are_keys ? j + line - s_.reach - i : i + line + s_.reach + 1 - j;
      if (lines_are_keys) for (std::int64_t k = 0; k < minimum(edge, count); ++k) to[k] = kNothing<T>;
      else for (std::int64_t k = maximum(edge, 0); k < count; ++k) to[k] = kNothing<T>;
    }
  }

 private:
  const Sequence& s_;
  const Mask& mask_;
  std::int64_t b_, h_;
  AttentionPairs bias_;
  Scalar bias_dtype_;
  std::int64_t bias_at_;
};

// ---- logits -------------------------------------------------------------------------------------------------------------------------------------------------

// tanh; relative error some eps. Its Taylor series up to 1/4, beyond it (1 - e^-2x) / (1 + e^-2x).
template <class T>
inline Vector<T> hyperbolic_tangent(Vector<T> x) {
  constexpr double series[] = {1.0, -0.3333333333333333, 0.13333333333333333, -0.05396825396825397, 0.021869488536155203, -0.008863235529902197, 0.003592128036572481,
                               -0.0014558343870513183, 0.000590027440945586, -0.00023912911424355248, 9.691537956929451e-05, -3.927832388331683e-05};
  constexpr int count = sizeof(T) == 4 ? 6 : 12;
  const Vector<T> one = broadcast(T(1)), magnitude = x < Vector<T>{} ? -x : x, square = x * x;
  Vector<T> near{};
  for (int n = count - 1; n >= 0; --n) near = near * square + broadcast(T(series[n]));
  const Vector<T> e = exponential<T>(broadcast(T(-2)) * magnitude), far = (one - e) / (one + e);
  return magnitude < broadcast(T(0.25)) ? near * x : x < Vector<T>{} ? -far : far;
}

// Products become logits.
template <class T>
struct Logit {
  T scale, cap;
  Vector<T> operator()(Vector<T> product) const {
    const Vector<T> x = product * broadcast(scale);
    return cap == 0 ? x : broadcast(cap) * hyperbolic_tangent<T>(x / broadcast(cap));
  }
  // dx / dproduct at the logit z: scale (1 - tanh^2)
  Vector<T> slope(Vector<T> z) const {
    if (cap == 0) return broadcast(scale);
    const Vector<T> t = z / broadcast(cap);
    return broadcast(scale) * (broadcast(T(1)) - t * t);
  }
};

template <class T> inline Vector<T> with_addend(Vector<T> z, Vector<T> addend) { return addend == broadcast(kNothing<T>) ? addend : z + addend; }   // also a NaN that is not kept

template <class T>
inline bool is_finite(const T* x, std::int64_t n) {
  constexpr int L = kVectorLanes<T>;
  Vector<T> lanes{};   // a sum of one would be a chain of additions
  std::int64_t k = 0;
  for (; k + L <= n; k += L) lanes += load(x + k) * broadcast(T(0));
  T sum = 0;
  for (int l = 0; l < L; ++l) sum += lanes[l];
  for (; k < n; ++k) sum += x[k] * T(0);
  return sum == 0;
}

// By any number of threads at once.
inline void raise_flag(bool& flag) { __atomic_store_n(&flag, true, __ATOMIC_RELAXED); }

// ---- operands -----------------------------------------------------------------------------------------------------------------------------------------------

// Source rows widened and laid one behind the other.
template <class T>
void load_rows(Scalar dtype, const AttentionRows& from, std::int64_t item, std::int64_t h, std::int64_t first, std::int64_t count, std::int64_t depth, T* rows, std::int64_t ld) {
  for (std::int64_t r = 0; r < count; ++r)
    load_row<T>(dtype, from.data, item * from.batch_stride + h * from.head_stride + (first + r) * from.row_stride, from.element_stride, depth, rows + r * ld);
}

// Some rows as column panels [depth][width]; row_of(r): which the r-th is; `rows` has room for them.
template <class T, class F>
void pack_columns(Scalar dtype, const AttentionRows& from, std::int64_t item, std::int64_t h, const F& row_of, std::int64_t count, std::int64_t depth, T* rows, T* panels) {
  constexpr int P = kPanelColumns<T>;
  for (std::int64_t r = 0; r < count; ++r) load_rows<T>(dtype, from, item, h, row_of(r), 1, depth, rows + r * depth, depth);
  for (std::int64_t r = 0; r < count; r += P)
    pack_panel(P, static_cast<int>(minimum(P, count - r)), depth, [&](int n) { return rows + (r + n) * depth; }, panels + r * depth);
}

// Every block of rows of every head and sequence: f(made, h, b, sequence, first row, rows), in parallel; make(): what the blocks of a thread use one after the other. heads_first: heads take
// turns, block by block.
template <class Make, class F>
void for_each_block(const AttentionProblem& p, std::int64_t heads, bool of_keys, bool heads_first, const Parallel& parallel, const Make& make, const F& f) {
  const std::int64_t most = blocks(of_keys ? p.Nk : p.Nq), lines = heads * p.B;
  parallel_for(parallel, 0, lines * most, 1, [&](std::int64_t begin, std::int64_t end) {
    auto made = make();
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t line = heads_first ? t % lines : t / most, h = line % heads, b = line / heads, first = (heads_first ? t / lines : t % most) * kBlock;
      const Sequence s = sequence(p, b);
      const std::int64_t rows = minimum(kBlock, (of_keys ? s.keys : s.queries) - first);
      if (rows > 0) f(made, h, b, s, first, rows);
    }
  });
}
template <class F>
void for_each_block(const AttentionProblem& p, std::int64_t heads, bool of_keys, const Parallel& parallel, const F& f) {
  for_each_block(p, heads, of_keys, false, parallel, [] { return 0; },
                 [&](int, std::int64_t h, std::int64_t b, const Sequence& s, std::int64_t first, std::int64_t rows) { f(h, b, s, first, rows); });
}

template <class T>
struct Lines {   // line n at data + n * ld
  const T* data;
  std::int64_t ld;

  // Towards the second cache. Lines one behind the other come by themselves.
  void prefetch(std::int64_t first, std::int64_t count, std::int64_t depth) const {
    for (std::int64_t n = first; n < first + count; ++n)
      for (std::int64_t d = 0; d < depth; d += 64 / sizeof(T)) __builtin_prefetch(data + n * ld + d, 0, 2);
  }
};

// A tile of a row or column of tiles, and the next of which something is kept.
struct Kept {
  std::int64_t at, count;   // first line, lines; at = end: no more
  Coverage coverage;
};
template <class F>
Kept next_kept(std::int64_t at, std::int64_t end, const F& coverage) {
  for (; at < end; at += kBlock) {
    const std::int64_t count = minimum(kBlock, end - at);
    const Coverage found = coverage(at, count);
    if (found != Coverage::nothing) return {at, count, found};
  }
  return {end, 0, Coverage::nothing};
}
// f(tile) for those of which something is kept; ahead(tile) where the next one is not the neighbour, before f of the one before it.
template <class F, class Ahead, class G>
void for_each_kept(std::int64_t end, const F& coverage, const Ahead& ahead, const G& f) {
  for (Kept now = next_kept(0, end, coverage), next; now.at < end; now = next) {
    next = next_kept(now.at + kBlock, end, coverage);
    if (next.at < end && next.at > now.at + kBlock) ahead(next);
    f(now);
  }
}

// The rows of an operand as the tile engine reads them: where they lie if they are of T and contiguous (and fill whole vectors, where that is asked for), else from a copy.
template <class T>
struct Operand {
  AttentionRows from;
  std::int64_t heads, rows_in_all, depth, width;   // rows_in_all: of an item; width: of the copy
  bool of_keys, in_place;
  T* copy;   // [item][heads][rows][width]
  Operand(const AttentionProblem& p, const AttentionRows& from, bool of_keys, std::int64_t depth, bool whole_vectors, Arena& arena)
      : from(from), heads(of_keys ? p.Hkv : p.H), rows_in_all(of_keys ? p.total_keys : p.total_queries), depth(depth), width(whole_vectors ? round_up(depth, kRegisterColumns<T>) : depth),
        of_keys(of_keys), in_place(size_of(p.dtype) == sizeof(T) && from.element_stride == 1 && width == depth),
        copy(in_place ? nullptr : arena.take<T>(size(p))) {}
  std::int64_t size(const AttentionProblem& p) const { return (of_keys ? p.key_rows() : p.query_rows()) * heads * width; }

  // f(row of T [depth], h, sequence, row) may change what is copied.
  template <class F>
  void fill(const AttentionProblem& p, const Parallel& parallel, const F& f) const {
    for_each_block(p, heads, of_keys, parallel, [&](std::int64_t h, std::int64_t, const Sequence& s, std::int64_t first, std::int64_t rows) {
      first += of_keys ? s.first_key : s.first_query;
      T* to = copy + ((s.item * heads + h) * rows_in_all + first) * width;
      load_rows<T>(p.dtype, from, s.item, h, first, rows, depth, to, width);
      for (std::int64_t r = 0; r < rows; ++r) {
        f(to + r * width, h, s, first + r);
        for (std::int64_t d = depth; d < width; ++d) to[r * width + d] = 0;
      }
    });
  }
  void fill(const AttentionProblem& p, const Parallel& parallel) const {
    if (!in_place) fill(p, parallel, [](T*, std::int64_t, const Sequence&, std::int64_t) {});
  }

  Lines<T> lines(const Sequence& s, std::int64_t h) const {
    const std::int64_t first = of_keys ? s.first_key : s.first_query;
    if (copy) return {copy + ((s.item * heads + h) * rows_in_all + first) * width, width};
    return {static_cast<const T*>(from.data) + s.item * from.batch_stride + h * from.head_stride + first * from.row_stride, from.row_stride};
  }
};

// The copy of an operand that lies well but holds what must not be used as it is: rare, so its memory is no part of the workspace.
template <class T>
Scratch<T> copy_of(Operand<T>& operand, const AttentionProblem& p, bool wanted) {
  Scratch<T> copy(wanted && operand.in_place ? operand.size(p) : 0);
  if (wanted && operand.in_place) operand.copy = copy;
  return copy;
}

}  // inline namespace
}  // namespace modalign::cpu
