/// @file attention.cuh
/// @brief What the CUDA kernels of attention share: operands, sequences, kept pairs, logits, tiles of products (the counterpart of cpu/attention.h).
///
/// A block first asks for the coverage of 256 tiles, a thread each, and visits those of which something is kept (`for_each_kept`). Only where not everything is kept is every pair asked
/// for, once, and remembered as a bit (`TileBits`).
#pragma once

#include "cuda/attention_mask.cuh"
#include "ops/masked_attention.h"

namespace modalign::cuda {

// ------------------------------------------------------------------------------------------------------------------------------------------ operands
template <class T> struct AttentionBackendOf {
  using type = MmaBackend<T, 1, Major::depth, Major::depth>;
};
template <> struct AttentionBackendOf<float> {
  using type = FmaBackend<float, Major::depth, Major::depth>;
};
template <> struct AttentionBackendOf<double> {
  using type = FmaBackend<double, Major::depth, Major::depth>;
};
template <class T> using AttentionBackend = typename AttentionBackendOf<T>::type;

// Rows of an operand, head by head: as lines of a product, whose depth is D, or as values, whose lines are d.
template <class T> struct HeadRows {
  Operand<T> operand;
  std::int64_t head_stride, row_stride;

  MODALIGN_DEVICE Global<const T> at(std::int64_t item, std::int64_t h, std::int64_t row) const {
    return Global<const T>(operand.data).at(item * operand.batch_stride + h * head_stride + row * row_stride);
  }
};
template <class T> HeadRows<T> head_rows(Major major, const AttentionRows& rows) {
  const T* data = static_cast<const T*>(rows.data);
  HeadRows<T> made{major == Major::depth ? make_operand<T>(major, data, rows.batch_stride, rows.row_stride, rows.element_stride)
                                         : make_operand<T>(major, data, rows.batch_stride, rows.element_stride, rows.row_stride),
                   rows.head_stride, rows.row_stride};
  made.operand.vectors = made.operand.vectors && rows.head_stride % (16 / std::int64_t(sizeof(T))) == 0;
  return made;
}

template <class Real> MODALIGN_DEVICE Real number_at(Scalar dtype, const void* data, std::int64_t at) {
  switch (dtype) {
    case Scalar::f64: return Real(double(Global<const double>(static_cast<const double*>(data))[at]));
    case Scalar::f16: return Real(to_float(f16(Global<const f16>(static_cast<const f16*>(data))[at])));
    case Scalar::bf16: return Real(to_float(bf16(Global<const bf16>(static_cast<const bf16*>(data))[at])));
    default: return Real(float(Global<const float>(static_cast<const float*>(data))[at]));
  }
}

// ---------------------------------------------------------------------------------------------------------------------------------- sequences, pairs
// Rows of an item are below 2^31: registers are scarce.
struct AttentionSequence {
  int item, first_query, queries, first_key, keys;   // item of the tensors; keys: those within the length
  int reach;                                         // causal: query i sees the keys up to i + reach
};

// What the kernels of a call share.
struct AttentionCall {
  std::int64_t B, H, Hkv, Nq, Nk, D, Dv, total_queries, total_keys;
  const std::int64_t* key_lengths;
  const std::int32_t *cu_queries, *cu_keys;
  Causal causal;
  Scalar bias_dtype;
  AttentionPairs bias;
  double scale, cap;
  MaskView mask;

  // Stays inside the tensors whatever the numbers on the device are.
  MODALIGN_DEVICE AttentionSequence sequence(int b) const {
    AttentionSequence s{b, 0, int(Nq), 0, int(Nk), 0};
    if (cu_queries != nullptr) {
      const auto begin = [](const std::int32_t* cu, int n, std::int64_t total) { return maximum(0, minimum(int(Words(cu)[n]), int(total))); };
      s.item = 0;
      s.first_query = begin(cu_queries, b, total_queries);
      s.first_key = begin(cu_keys, b, total_keys);
      s.queries = maximum(0, minimum(begin(cu_queries, b + 1, total_queries) - s.first_query, int(Nq)));
      s.keys = maximum(0, minimum(begin(cu_keys, b + 1, total_keys) - s.first_key, int(Nk)));
    }
    s.reach = causal == Causal::none ? s.keys : causal == Causal::top_left ? 0 : s.keys - s.queries;
    if (key_lengths != nullptr) s.keys = int(maximum(std::int64_t(0), minimum(std::int64_t(s.keys), std::int64_t(Global<const std::int64_t>(key_lengths)[b]))));
    return s;
  }
};

template <class Real> MODALIGN_DEVICE Real logit(const AttentionCall& call, Real product) {
  const Real x = product * Real(call.scale), cap = Real(call.cap);
  return cap == 0 ? x : cap * hyperbolic_tangent(x / cap);
}

// Which pairs of a head are kept, and what is added to their logits.
template <class Real> struct HeadPairs {
  const AttentionCall& call;
  AttentionSequence s;
  int b, h;

  MODALIGN_DEVICE int kv() const { return h / int(call.H / call.Hkv); }
  MODALIGN_DEVICE bool has_bias() const { return call.bias.data != nullptr; }
  // `block`: lines of a tile; tiles in blocks.
  MODALIGN_DEVICE Coverage coverage(int query_block, int key_block, int block) const {
    const int i = query_block * block, j = key_block * block, rows = minimum(s.queries - i, block), columns = minimum(s.keys - j, block);
    if (rows <= 0 || columns <= 0 || j > i + rows - 1 + s.reach) return Coverage::nothing;
    return (j + columns - 1 <= i + s.reach ? Coverage::everything : Coverage::some) & call.mask.coverage(b, h, query_block, key_block, block, rows);
  }
  MODALIGN_DEVICE bool keeps(std::int64_t i, std::int64_t j) const { return j <= (MODALIGN_MUTATION("pairs: causal off by one") ? i + s.reach + 1 : i + s.reach) && call.mask.keeps(b, h, i, j); }
  MODALIGN_DEVICE Real with_bias(Real z, std::int64_t i, std::int64_t j) const {   // -inf drops a pair, also one whose logit is NaN
    const AttentionPairs& bias = call.bias;
    const Real addend = number_at<Real>(call.bias_dtype, bias.data, b * bias.batch_stride + h / (call.H / bias.heads) * bias.head_stride + i * bias.row_stride + j * bias.column_stride);
    return addend == -kInfinity<Real> ? addend : z + addend;
  }
};

// f(tile, whether everything is kept) for the tiles of which something is kept, in order; all threads of the block together.
constexpr int kListBytes = 2 * kTileWarps * 4;
template <class Cover, class F> MODALIGN_DEVICE void for_each_kept(int tiles, int list_offset, const Cover& coverage, const F& f) {
  const Shared<std::uint32_t> list = shared<std::uint32_t>(list_offset, 2 * kTileWarps);
  for (int first = 0; first == 0 || first < tiles; first += kTileThreads) {
    const int mine = first + thread_index();
    const Coverage found = mine < tiles ? coverage(mine) : Coverage::nothing;
    const std::uint32_t any = warp_ballot(found != Coverage::nothing), all = warp_ballot(found == Coverage::everything);
    if (!MODALIGN_MUTATION("list: drop the barrier before it")) barrier();
    if (lane() == 0) {
      list[warp()] = any;
      list[kTileWarps + warp()] = all;
    }
    if (!MODALIGN_MUTATION("list: drop the barrier behind it")) barrier();
    MODALIGN_NO_UNROLL
    for (int w = 0; w < kTileWarps; ++w) {
      const std::uint32_t everything = list[kTileWarps + w];
      for (std::uint32_t bits = list[w]; bits != 0; bits &= bits - 1) {
        const int n = population_count((bits & (0 - bits)) - 1);
        f(first + w * kWarpSize + n, (everything >> n & 1u) != 0);
      }
    }
  }
}

// A bit for each pair of a tile.
template <class Backend> struct TileBits {
  static constexpr int kWords = Backend::kColumns / kWarpSize;   // of a row
  static constexpr int kBytes = Backend::kRows * kWords * 4;

  static MODALIGN_DEVICE Shared<std::uint32_t> at(int offset) { return shared<std::uint32_t>(offset, Backend::kRows * kWords); }
  template <class Keeps> static MODALIGN_DEVICE void mark(int offset, const TileRange& range, const Keeps& keeps) {
    const Shared<std::uint32_t> to = at(offset);
    MODALIGN_NO_UNROLL
    for (int n = thread_index(); n < Backend::kRows * kWords; n += kTileThreads) {
      const int row = n / kWords, column = n % kWords * kWarpSize, count = minimum(range.columns - column, kWarpSize);
      std::uint32_t bits = 0;
      if (row < range.rows) {
        MODALIGN_NO_UNROLL
        for (int c = 0; c < count; ++c) bits |= std::uint32_t(keeps(range.row_begin + row, range.column_begin + column + c)) << c;
      }
      to[n] = bits;
    }
  }
  static MODALIGN_DEVICE bool kept(int offset, int row, int column) {
    const std::uint32_t bits = at(offset)[row * kWords + column / kWarpSize];
    return (bits >> column % kWarpSize & 1u) != 0;
  }
};

// ------------------------------------------------------------------------------------------------------------------------------ tiles of products
// Which tile, piece of the output's columns, head and item a block owns; tiles from the last on where `reversed`, for those of causal queries are the long ones.
struct AttentionBlock {
  int tile, piece, h, b;
  MODALIGN_DEVICE AttentionBlock(int tiles, int pieces, int heads, bool reversed) {
    const int index = int(block_index_x());
    tile = reversed ? tiles - 1 - index % tiles : index % tiles;
    piece = index / tiles % pieces;
    h = index / tiles / pieces % heads;
    b = index / tiles / pieces / heads;
  }
};
template <class Kernel> LaunchPlan plan_attention(std::int64_t tiles, std::int64_t pieces, std::int64_t heads, std::int64_t items, const char* key) {
  static_assert(Kernel::kSharedBytes <= 99 * 1024, "sm_86 and sm_89 give a block 99 KB");
  static_assert(sizeof(Kernel) <= 4096, "arguments of a kernel");
  LaunchPlan plan;
  plan.grid[0] = unsigned(tiles * pieces * heads * items);
  plan.threads = Kernel::kThreads;
  plan.shared_bytes = Kernel::kSharedBytes;
  plan.key = key;
  return plan;
}

// The two sides of tiles of products: rows are queries, columns keys, or the other way round.
template <class T, bool rows_are_keys> struct AttentionSides {
  using Backend = AttentionBackend<T>;
  using Real = real_of<T>;
  using Bits = TileBits<Backend>;
  const AttentionCall& call;
  const HeadRows<T>&rows, &columns;

  template <class Rows> MODALIGN_DEVICE static Global<const T> row_lines(const Rows& rows, const HeadPairs<Real>& pairs) {
    return rows.at(pairs.s.item, rows_are_keys ? pairs.kv() : pairs.h, rows_are_keys ? pairs.s.first_key : pairs.s.first_query);
  }
  template <class Rows> MODALIGN_DEVICE static Global<const T> column_lines(const Rows& rows, const HeadPairs<Real>& pairs) {
    return rows.at(pairs.s.item, rows_are_keys ? pairs.h : pairs.kv(), rows_are_keys ? pairs.s.first_query : pairs.s.first_key);
  }
  MODALIGN_DEVICE static std::int64_t query_of(std::int64_t row, std::int64_t column) { return rows_are_keys ? column : row; }
  MODALIGN_DEVICE static std::int64_t key_of(std::int64_t row, std::int64_t column) { return rows_are_keys ? row : column; }
  MODALIGN_DEVICE Global<const Real> of_queries(const Real* numbers, const HeadPairs<Real>& pairs) const {
    return Global<const Real>(numbers).at((pairs.s.item * call.H + pairs.h) * call.total_queries + pairs.s.first_query);
  }

  // A tile of a head. What follows from these numbers is made anew where it is used, and not kept in registers through products.
  struct Place {
    int b, h, row_tile, column_tile;
  };
  MODALIGN_DEVICE HeadPairs<Real> pairs_of(const Place& at) const {
    const int b = opaque(at.b);
    return {call, call.sequence(b), b, at.h};
  }
  MODALIGN_DEVICE static TileRange range_of(const AttentionSequence& s, const Place& at) {
    const int row = at.row_tile * Backend::kRows, column = at.column_tile * Backend::kColumns;
    const int rows = (rows_are_keys ? s.keys : s.queries) - row, columns = (rows_are_keys ? s.queries : s.keys) - column;
    return {row, column, 0, 0, minimum(rows, Backend::kRows), minimum(columns, Backend::kColumns)};
  }

  // The reader of either passes a barrier.
  MODALIGN_DEVICE void products(Shared<Real> tile, const HeadPairs<Real>& pairs, const TileRange& range) const {
    typename Backend::Accumulators sum;
    Backend::clear(sum);
    Backend::multiply(sum, rows.operand, row_lines(rows, pairs), columns.operand, column_lines(columns, pairs), range, int(call.D));
    Backend::deposit(sum, tile);
  }
  MODALIGN_DEVICE static void mark(int offset, const HeadPairs<Real>& pairs, const TileRange& range) {
    Bits::mark(offset, range, [&](std::int64_t row, std::int64_t column) { return pairs.keeps(query_of(row, column), key_of(row, column)); });
  }
};

// --------------------------------------------------------------------------------------------------------------------------------- launch sequences
template <class T, class Arena> AttentionCall attention_call(const AttentionProblem& p, Arena& arena) {
  return {p.B,          p.H,          p.Hkv,      p.Nq,     p.Nk,         p.D,    p.Dv,    p.total_queries, p.total_keys,
          p.key_lengths, p.cu_queries, p.cu_keys, p.causal, p.bias_dtype, p.bias, p.scale, p.cap,           mask_view(p.mask, p.B, p.H, p.Nq, p.Nk, AttentionBackend<T>::kRows, arena)};
}

}   // namespace modalign::cuda
