// Softmax attention under a mask, forward and backward, with no Nq x Nk matrix; compiled once per instruction set.
//
// Maths      ops/masked_attention.h.
// Forward    a task owns kBlock queries of a head and meets the blocks of keys in order. The tile lies keys x queries: lanes are queries, so that the softmax has no sums
//            across lanes, and the tile of probabilities is the left operand of the value product as it is. 2 (D + Dv) FLOPs a pair.
// Backward   a task owns blocks of keys of a key head and meets all queries of the heads that share it; tiles lie queries x keys. dk and dv are finished there, dq goes into the
//            task's slot, and slots are added in order: their number depends on the sizes alone. 2 (3 D + 2 Dv) FLOPs a pair.
// Tiles      of which the mask keeps nothing are not made; those that it keeps whole, and that have no bias, skip the test of pairs, which is made once for the heads that share relations: they
//            take turns, block by block, where otherwise a head is finished before the next, as its keys and values stay in the cache. Where intervals leave few keys in many tiles, tiles are
//            made of gathered keys (cpu/gathered_keys.h), and slots hold dk and dv.
// Memory     operands are read where they lie, if they are of the accumulation type, contiguous along D and whole vectors wide, else from one copy. Backward at most kSlots times dq.
// Precision  sums over D are one chain; sums over keys (in the forward and dq) and over queries (dk, dv, db) are chains of kBlock, added in order. All in float, double for double.
// Order      fixed by the sizes: equal bits for any threads.

#include "cpu/masked_attention.h"

#include "cpu/gathered_keys.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {
namespace {

constexpr std::int64_t kSlots = 8;    // partial sums of dq, at most
constexpr std::int64_t kTasks = 16;   // that slots make out of few heads

// ---- forward ------------------------------------------------------------------------------------------------------------------------------------------------

template <class T>
struct ForwardBuffers {
  Mask mask;
  Operand<T> key, value;
  ForwardBuffers(const AttentionProblem& p, Arena& arena)
      : mask(p.mask, p.B, p.H, p.Nq, p.Nk, arena), key(p, p.key, true, p.D, false, arena), value(p, p.value, true, p.Dv, true, arena) {}
};

// Queries of a block and what they have met so far.
template <class T>
struct QueryBlock {
  static constexpr int L = kVectorLanes<T>;
  std::int64_t width;                                  // of the output with its padding
  Scratch<T> queries, tile, addend, out, row, edge;    // [D][kBlock] panels, [keys][kBlock], the same, [kBlock][width]
  Scratch<T> maximum_, sum, shrink;                    // [kBlock]
  Scratch<T> values;                                   // [keys][width], of values that hold NaN or infinity: these rows are zeros
  Scratch<bool> broken, kept;                          // which those are, and for them [keys][kBlock]
  Scratch<KeySpan> spans;                              // gathered keys, and of a tile their rows and their values'
  Scratch<T> gathered_key, gathered_value;

  QueryBlock(const AttentionProblem& p, bool gathered)
      : width(round_up(p.Dv, kRegisterColumns<T>)), queries(kBlock * p.D), tile(kBlock * kBlock), addend(kBlock * kBlock), out(kBlock * width), row(kBlock * maximum(p.D, p.Dv)),
        edge(kRegisterRows * p.D), maximum_(kBlock), sum(kBlock), shrink(kBlock), values(kBlock * width), broken(kBlock), kept(kBlock * kBlock),
        spans(gathered ? p.Nk + 1 : 0), gathered_key(gathered ? kBlock * p.D : 0), gathered_value(gathered ? kBlock * width : 0) {
    for (std::int64_t n = 0; n < kBlock * kBlock; ++n) tile[n] = 0, addend[n] = 0;   // lanes without a query are computed with
  }

  void begin() {
    for (std::int64_t n = 0; n < kBlock * width; ++n) out[n] = 0;
    for (std::int64_t i = 0; i < kBlock; ++i) maximum_[i] = kNothing<T>, sum[i] = 0;
  }

  // Products become exp(logit - maximum so far), and what there was is made to fit.
  void fold(const Logit<T>& logit, std::int64_t columns, std::int64_t keys, bool added, bool any_broken) {
    if (!added && !any_broken && logit.cap == 0 && logit.scale > 0) return fold_plain(logit.scale, columns, keys);
    for (std::int64_t c = 0; c < columns; c += L) {
      Vector<T> top = load(maximum_ + c);
      for (std::int64_t j = 0; j < keys; ++j) {
        T* z = tile + j * kBlock + c;
        Vector<T> value = logit(load(z));
        if (added) value = with_addend<T>(value, load(addend + j * kBlock + c));
        store(z, value);
        top = larger<T>(value, top);
        if (any_broken && broken[j])
          for (int l = 0; l < L; ++l) kept[j * kBlock + c + l] = value[l] != kNothing<T>;
      }
      const Vector<T> offset = top == broadcast(kNothing<T>) ? Vector<T>{} : top, less = exponential<T>(load(maximum_ + c) - offset);
      Vector<T> total{};
      for (std::int64_t j = 0; j < keys; ++j) {
        T* z = tile + j * kBlock + c;
        const Vector<T> p = exponential<T>(load(z) - offset);
        store(z, p);
        total += p;
      }
      store(maximum_ + c, top);
      store(shrink + c, less);
      store(sum + c, load(sum + c) * less + total);
    }
  }

  // Where logits are products times a positive number they need not be written.
  void fold_plain(T scale, std::int64_t columns, std::int64_t keys) {
    for (std::int64_t c = 0; c < columns; c += L) {
      Vector<T> most = broadcast(kNothing<T>);
      for (std::int64_t j = 0; j < keys; ++j) most = larger<T>(load(tile + j * kBlock + c), most);
      const Vector<T> before = load(maximum_ + c), top = larger<T>(most * broadcast(scale), before);
      const Vector<T> offset = top == broadcast(kNothing<T>) ? Vector<T>{} : top, less = exponential<T>(before - offset);
      Vector<T> total{};
      for (std::int64_t j = 0; j < keys; ++j) {
        T* z = tile + j * kBlock + c;
        const Vector<T> p = exponential<T>(load(z) * broadcast(scale) - offset);
        store(z, p);
        total += p;
      }
      store(maximum_ + c, top);
      store(shrink + c, less);
      store(sum + c, load(sum + c) * less + total);
    }
  }

  void shrink_output(std::int64_t rows) {
    for (std::int64_t i = 0; i < rows; ++i)
      if (shrink[i] != 1)
        for (std::int64_t n = 0; n < width; n += L) store(out + i * width + n, load(out + i * width + n) * broadcast(shrink[i]));
  }

  // Values of a tile with their broken rows as zeros; whether there are any.
  bool mend(const Lines<T>& value, std::int64_t keys, std::int64_t Dv) {
    bool any = false;
    for (std::int64_t k = 0; k < keys; ++k) {
      const T* from = value.data + k * value.ld;
      broken[k] = !is_finite<T>(from, Dv);
      any |= broken[k];
      if (broken[k]) std::memset(values + k * width, 0, width * sizeof(T));
      else std::memcpy(values + k * width, from, width * sizeof(T));
    }
    return any;
  }
};

template <class T>
void forward(const AttentionProblem& p, const AttentionForward& to, const ForwardBuffers<T>& buffers, const Parallel& parallel) {
  buffers.mask.prepare(parallel);
  buffers.key.fill(p, parallel);
  buffers.value.fill(p, parallel);
  const GatheredKeys gathered(p, parallel);
  const Logit<T> logit{static_cast<T>(p.scale), static_cast<T>(p.cap)};
  const std::int64_t most = blocks(p.Nq), heads = p.B * p.H, group = p.H / p.Hkv;
  const bool heads_first = buffers.mask.shared();
  parallel_for(parallel, 0, heads * most, 1, [&](std::int64_t begin, std::int64_t end) {
    QueryBlock<T> block(p, gathered.wanted());
    TestedTiles<true> tested(buffers.mask);
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t n = heads_first ? t / heads : t % most, head = heads_first ? t % heads : t / most, h = head % p.H, b = head / p.H;
      const std::int64_t first = (n & 1 ? most - 1 - n / 2 : n / 2) * kBlock;   // long and short causal rows in turn
      const Sequence s = sequence(p, b);
      const std::int64_t rows = minimum(kBlock, s.queries - first);
      if (rows <= 0) continue;
      const HeadPairs pairs(p, buffers.mask, s, b, h);
      const std::int64_t columns = round_up(rows, kPanelColumns<T>);
      const Lines<T> key = buffers.key.lines(s, h / group), value = buffers.value.lines(s, h / group);
      pack_columns<T>(p.dtype, p.query, s.item, h, [&](std::int64_t r) { return s.first_query + first + r; }, rows, p.D, block.row, block.queries);
      // keys: how many; added: whether block.addend holds something
      const auto meet = [&](const Lines<T>& k, const Lines<T>& v, std::int64_t keys, bool added, bool careful) {
        tile_product_by_rows<T>(k.data, k.ld, keys, block.queries, columns, p.D, block.tile, kBlock, block.edge);
        const bool broken = careful && block.mend(v, keys, p.Dv);
        block.fold(logit, columns, keys, added, broken);
        block.shrink_output(rows);
        if (broken) add_tile_times_rows<false, T>(block.tile, kBlock, rows, keys, block.values, block.width, block.width, block.out, block.width);
        else add_tile_times_rows<false, T>(block.tile, kBlock, rows, keys, v.data, v.ld, block.width, block.out, block.width);
        for (std::int64_t n = 0; broken && n < keys; ++n)
          for (std::int64_t i = 0; block.broken[n] && i < rows; ++i)
            if (block.kept[n * kBlock + i]) add_scaled<T>(block.out + i * block.width, block.tile[n * kBlock + i], v.data + n * v.ld, p.Dv);
      };
      const std::int64_t listed = gathered.wanted() ? gathered.list(b, h, first, rows, block.spans) : 0;
      // Zero times a value that is no number is none either: where the output shows such a thing the block is made again, with care.
      const auto attend = [&](bool careful) {
        block.begin();
        if (gathered.wanted()) {
          for (std::int64_t at = 0; at < listed; at += kBlock) {
            const KeySpan* spans = block.spans + at;
            const std::int64_t keys = minimum(kBlock, listed - at);
            gathered_addends<true, T>(p, pairs.bias_at(), spans, keys, first, rows, block.addend);
            meet(gathered_lines<T>(key, spans, keys, p.D, block.gathered_key), gathered_lines<T>(value, spans, keys, block.width, block.gathered_value), keys, true, careful);
          }
          return;
        }
        const auto coverage = [&](std::int64_t j, std::int64_t keys) { return pairs.coverage(first, rows, j, keys); };
        const auto ahead = [&](const Kept& next) {
          key.prefetch(next.at, next.count, p.D);
          value.prefetch(next.at, next.count, p.Dv);
        };
        for_each_kept(s.keys, coverage, ahead, [&](const Kept& now) {
          const bool added = now.coverage == Coverage::some || pairs.has_bias();
          if (added) pairs.addends(tested, first, rows, now.at, now.count, +block.addend);
          meet({key.data + now.at * key.ld, key.ld}, {value.data + now.at * value.ld, value.ld}, now.count, added, careful);
        });
      };
      attend(false);
      if (!is_finite<T>(block.out, rows * block.width)) attend(true);
      const std::int64_t row = (s.item * p.H + h) * p.total_queries + s.first_query + first;
      for (std::int64_t i = 0; i < rows; ++i) {
        const bool empty = block.maximum_[i] == kNothing<T> && block.sum[i] == 0;
        T* out = block.out + i * block.width;
        for (std::int64_t d = 0; d < p.Dv; ++d) out[d] = empty ? T(0) : out[d] / block.sum[i];
        store_row<T>(p.dtype, to.out, (row + i) * p.Dv, p.Dv, out);
        static_cast<T*>(to.lse)[row + i] = empty ? kNothing<T> : block.maximum_[i] + std::log(block.sum[i]);
      }
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------------------------------------------------

// Blocks of keys are dealt out to slots, one after the other, so that causal masks leave none with the short ones. A bias that several heads or items share, and that has
// pairs, is added to by one task in order.
struct BackwardPlan {
  std::int64_t slots, units;   // units: key heads of sequences that are tasks of their own
  BackwardPlan(const AttentionProblem& p, const AttentionBackward& to) {
    const bool shared = to.bias_gradient == BiasGradient::pairs && (to.bias_batches < p.B || p.bias.heads < p.Hkv);
    units = shared ? 1 : p.B * p.Hkv;
    slots = maximum(1, minimum(minimum(kSlots, blocks(p.Nk)), kTasks / maximum(1, units)));
  }
};

template <class T>
struct BackwardBuffers {
  BackwardPlan plan;
  Mask mask;
  Operand<T> query, grad, key;   // as left operands and as values; grad: of the output
  T *lse, *delta;                // [item, H, total queries]; lse +inf for empty rows
  T* grad_query;                 // [slots][item, H, total queries][wide], then added up
  T* columns;                    // [B * H][Nk] of db
  bool* dirty;                   // whether queries, gradients of rows that keep nothing, and keys hold NaN or infinity
  std::int64_t wide;             // D to the next whole vector
  BackwardBuffers(const AttentionProblem& p, const AttentionBackward& to, Arena& arena)
      : plan(p, to),
        mask(p.mask, p.B, p.H, p.Nq, p.Nk, arena),
        query(p, p.query, false, p.D, true, arena),
        grad(p, to.grad_out, false, p.Dv, true, arena),
        key(p, p.key, true, p.D, true, arena),
        lse(arena.take<T>(p.H * p.query_rows())),
        delta(arena.take<T>(p.H * p.query_rows())),
        grad_query(nullptr),
        columns(to.bias_gradient == BiasGradient::columns ? arena.take<T>(p.B * p.H * p.Nk) : nullptr),
        dirty(arena.take<bool>(3)),
        wide(round_up(p.D, kRegisterColumns<T>)) {
    if (plan.slots > 1 || size_of(p.dtype) != sizeof(T) || wide != p.D) grad_query = arena.take<T>(plan.slots * p.H * p.query_rows() * wide);
  }
};

// Keys of a block, and the gradients that gather there.
template <class T>
struct KeyBlock {
  static constexpr int L = kVectorLanes<T>;
  std::int64_t wide_key, wide_value;
  Scratch<T> keys, values, tile, grad, addend;   // panels [D][kBlock], [Dv][kBlock]; tiles [queries][kBlock]
  Scratch<T> grad_key, grad_value, columns, row, edge;
  explicit KeyBlock(const AttentionProblem& p)
      : wide_key(round_up(p.D, kRegisterColumns<T>)), wide_value(round_up(p.Dv, kRegisterColumns<T>)), keys(kBlock * p.D), values(kBlock * p.Dv), tile(kBlock * kBlock), grad(kBlock * kBlock),
        addend(kBlock * kBlock), grad_key(kBlock * wide_key), grad_value(kBlock * wide_value), columns(kBlock), row(kBlock * maximum(p.D, p.Dv)),
        edge(kRegisterRows * maximum(p.D, p.Dv)) {
    for (std::int64_t n = 0; n < kBlock * kBlock; ++n) tile[n] = 0, grad[n] = 0, addend[n] = 0;
  }

  // key_of(k): which the k-th is.
  template <class F>
  void begin(const AttentionProblem& p, const Sequence& s, std::int64_t h, const F& key_of, std::int64_t count) {
    const auto row_of = [&](std::int64_t k) { return s.first_key + key_of(k); };
    pack_columns<T>(p.dtype, p.key, s.item, h, row_of, count, p.D, row, keys);
    pack_columns<T>(p.dtype, p.value, s.item, h, row_of, count, p.Dv, row, values);
    for (std::int64_t n = 0; n < kBlock * wide_key; ++n) grad_key[n] = 0;
    for (std::int64_t n = 0; n < kBlock * wide_value; ++n) grad_value[n] = 0;
  }

  // tile: products become p; grad: dp becomes dx. to_bias: where ds goes, row after row, or nullptr.
  void fold(const Logit<T>& logit, std::int64_t rows, std::int64_t width, const T* lse, const T* delta, bool added, T* to_bias, std::int64_t bias_row, std::int64_t count, bool sum_columns) {
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t c = 0; c < width; c += L) {
        const std::int64_t at = i * kBlock + c;
        const Vector<T> x = logit(load(tile + at)), z = added ? with_addend<T>(x, load(addend + at)) : x;
        Vector<T> p = exponential<T>(z - broadcast(lse[i])), ds = p * (load(grad + at) - broadcast(delta[i]));
        Vector<T> dx = ds * logit.slope(x);
        if (added) {   // lse, dp and the slope may be NaN
          const auto dropped = z == broadcast(kNothing<T>);
          p = dropped ? Vector<T>{} : p, ds = dropped ? Vector<T>{} : ds, dx = dropped ? Vector<T>{} : dx;
        }
        store(tile + at, p);
        store(grad + at, dx);
        if (sum_columns) store(columns + c, load(columns + c) + ds);
        if (to_bias)
          for (std::int64_t l = 0; l < minimum(L, count - c); ++l) to_bias[i * bias_row + c + l] += ds[l];
      }
  }
};

// lse and delta of the rows, and the operands without what must not leak. What is not finite would do so through pairs that are not kept, whose p and ds are 0. Queries and keys have left
// their NaN in lse, so they may be zeros as values; so may the gradients of rows that keep nothing.
template <class T>
struct BackwardOperands {
  Operand<T> queries, grads, keys;
  Scratch<T> query_copy, grad_copy, key_copy;

  BackwardOperands(const AttentionProblem& p, const AttentionBackward& to, const BackwardBuffers<T>& buffers, const Parallel& parallel)
      : queries(buffers.query), grads(buffers.grad), keys(buffers.key), query_copy((find(p, to, buffers, parallel), copy_of(queries, p, buffers.dirty[0]))), grad_copy(copy_of(grads, p, buffers.dirty[1])),
        key_copy(copy_of(keys, p, buffers.dirty[2])) {
    const auto finite_or_zero = [](std::int64_t depth) {
      return [depth](T* row, std::int64_t, const Sequence&, std::int64_t) { if (!is_finite<T>(row, depth)) std::memset(row, 0, depth * sizeof(T)); };
    };
    if (queries.copy) queries.fill(p, parallel, finite_or_zero(p.D));
    if (keys.copy) keys.fill(p, parallel, finite_or_zero(p.D));
    if (grads.copy)
      grads.fill(p, parallel, [&](T* row, std::int64_t h, const Sequence& s, std::int64_t i) {
        if (static_cast<const T*>(to.lse)[(s.item * p.H + h) * p.total_queries + i] == kNothing<T>) std::memset(row, 0, p.Dv * sizeof(T));
      });
  }

 private:
  static void find(const AttentionProblem& p, const AttentionBackward& to, const BackwardBuffers<T>& buffers, const Parallel& parallel) {
    std::memset(buffers.dirty, 0, 3);
    for_each_block(p, p.H, false, parallel, [&](std::int64_t h, std::int64_t, const Sequence& s, std::int64_t first, std::int64_t rows) {
      Scratch<T> grad(p.Dv), out(maximum(p.D, p.Dv));
      const std::int64_t at = (s.item * p.H + h) * p.total_queries + s.first_query + first;
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t row = s.first_query + first + r;
        const T given = static_cast<const T*>(to.lse)[at + r];
        const bool empty = given == kNothing<T>;
        load_rows<T>(p.dtype, to.grad_out, s.item, h, row, 1, p.Dv, grad, p.Dv);
        load_rows<T>(p.dtype, to.out, s.item, h, row, 1, p.Dv, out, p.Dv);
        buffers.lse[at + r] = empty ? std::numeric_limits<T>::infinity() : given;
        buffers.delta[at + r] = empty ? T(0) : dot<T>(grad, out, p.Dv) - (to.grad_lse ? static_cast<const T*>(to.grad_lse)[at + r] : T(0));
        if (empty && !is_finite<T>(grad, p.Dv)) raise_flag(buffers.dirty[1]);
        load_rows<T>(p.dtype, p.query, s.item, h, row, 1, p.D, out, p.D);
        if (!is_finite<T>(out, p.D)) raise_flag(buffers.dirty[0]);
      }
    });
    for_each_block(p, p.Hkv, true, parallel, [&](std::int64_t h, std::int64_t, const Sequence& s, std::int64_t first, std::int64_t rows) {
      Scratch<T> row(p.D);
      for (std::int64_t r = 0; r < rows; ++r) {
        load_rows<T>(p.dtype, p.key, s.item, h, s.first_key + first + r, 1, p.D, row, p.D);
        if (!is_finite<T>(row, p.D)) raise_flag(buffers.dirty[2]);
      }
    });
  }
};

// Columns of db of all heads, added up where a bias is shared.
template <class T>
void add_columns(const AttentionProblem& p, const AttentionBackward& to, const T* columns) {
  std::memset(to.grad_bias, 0, to.bias_batches * p.bias.heads * p.Nk * sizeof(T));
  for (std::int64_t b = 0; b < p.B; ++b)
    for (std::int64_t h = 0; h < p.H; ++h)
      add_scaled<T>(static_cast<T*>(to.grad_bias) + (minimum(b, to.bias_batches - 1) * p.bias.heads + h / (p.H / p.bias.heads)) * p.Nk, T(1), columns + (b * p.H + h) * p.Nk, p.Nk);
}

// Gathered keys: a task owns blocks of queries of a key head's heads, finishes their dq, and adds what the keys get, row by row, into the task's slot. Slots are added in order.
template <class T>
void backward_gathered(const AttentionProblem& p, const AttentionBackward& to, const BackwardBuffers<T>& buffers, const BackwardOperands<T>& operands, const GatheredKeys& gathered,
                       const Parallel& parallel) {
  const Logit<T> logit{static_cast<T>(p.scale), static_cast<T>(p.cap)};
  const std::int64_t units = p.B * p.Hkv, group = p.H / p.Hkv, wide = buffers.wide, wide_value = round_up(p.Dv, kRegisterColumns<T>), each = wide + wide_value;
  const std::int64_t slots = maximum(1, minimum(minimum(kSlots, blocks(p.Nq)), kTasks / maximum(1, units)));
  const bool columns = to.bias_gradient == BiasGradient::columns;
  const Scratch<T> sums(slots * units * p.Nk * each), column_sums(columns ? slots * p.B * p.H * p.Nk : 0);
  parallel_for(parallel, 0, units * slots, 1, [&](std::int64_t begin, std::int64_t end) {
    KeyBlock<T> block(p);
    const Scratch<KeySpan> spans(p.Nk + 1);
    const Scratch<T> key_rows(kBlock * wide), grad_query(kBlock * wide);
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t slot = t % slots, unit = t / slots, b = unit / p.Hkv, kv = unit % p.Hkv;
      const Sequence s = sequence(p, b);
      const Lines<T> key = operands.keys.lines(s, kv);
      T* of_keys = sums + (slot * units + unit) * p.Nk * each;
      std::memset(of_keys, 0, p.Nk * each * sizeof(T));
      for (std::int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        const HeadPairs pairs(p, buffers.mask, s, b, h);
        const Lines<T> query = operands.queries.lines(s, h), grad = operands.grads.lines(s, h);
        const std::int64_t rows_before = (s.item * p.H + h) * p.total_queries;
        T* of_columns = column_sums + (slot * p.B * p.H + b * p.H + h) * p.Nk;
        if (columns) std::memset(of_columns, 0, p.Nk * sizeof(T));
        for (std::int64_t i = slot * kBlock; i < s.queries; i += slots * kBlock) {
          const std::int64_t rows = minimum(kBlock, s.queries - i), listed = gathered.list(b, h, i, rows, spans);
          std::memset(grad_query, 0, kBlock * wide * sizeof(T));
          for (std::int64_t at = 0; at < listed; at += kBlock) {
            const KeySpan* tile = spans + at;
            const std::int64_t keys = minimum(kBlock, listed - at), width = round_up(keys, kPanelColumns<T>);
            block.begin(p, s, kv, [&](std::int64_t k) { return tile[k].key; }, keys);
            tile_product_by_rows<T>(query.data + i * query.ld, query.ld, rows, block.keys, width, p.D, block.tile, kBlock, block.edge);
            tile_product_by_rows<T>(grad.data + i * grad.ld, grad.ld, rows, block.values, width, p.Dv, block.grad, kBlock, block.edge);
            gathered_addends<false, T>(p, pairs.bias_at(), tile, keys, i, rows, block.addend);
            for (std::int64_t c = 0; c < kBlock; ++c) block.columns[c] = 0;
            block.fold(logit, rows, width, buffers.lse + rows_before + i, buffers.delta + rows_before + i, true, nullptr, 0, keys, columns);
            add_tile_times_rows<false, T>(block.tile, kBlock, keys, rows, grad.data + i * grad.ld, grad.ld, wide_value, block.grad_value, wide_value);
            add_tile_times_rows<false, T>(block.grad, kBlock, keys, rows, query.data + i * query.ld, query.ld, wide, block.grad_key, wide);
            const Lines<T> gathered_key = gathered_lines<T>(key, tile, keys, wide, key_rows);
            add_tile_times_rows<true, T>(block.grad, kBlock, rows, keys, gathered_key.data, gathered_key.ld, wide, grad_query, wide);
            for (std::int64_t k = 0; k < keys; ++k) {
              T* of_key = of_keys + tile[k].key * each;
              add_scaled<T>(of_key, T(1), block.grad_key + k * wide, wide);
              add_scaled<T>(of_key + wide, T(1), block.grad_value + k * wide_value, wide_value);
              if (columns) of_columns[tile[k].key] += block.columns[k];
            }
          }
          for (std::int64_t r = 0; r < rows; ++r) store_row<T>(p.dtype, to.grad_query, (rows_before + i + r) * p.D, p.D, grad_query + r * wide);
        }
      }
    }
  });
  parallel_for(parallel, 0, units * p.Nk, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      T* sum = sums + n * each;
      for (std::int64_t slot = 1; slot < slots; ++slot) add_scaled<T>(sum, T(1), sums + (slot * units * p.Nk + n) * each, each);
      store_row<T>(p.dtype, to.grad_key, n * p.D, p.D, sum);
      store_row<T>(p.dtype, to.grad_value, n * p.Dv, p.Dv, sum + wide);
    }
  });
  if (!columns) return;
  for (std::int64_t slot = 1; slot < slots; ++slot) add_scaled<T>(column_sums, T(1), column_sums + slot * p.B * p.H * p.Nk, p.B * p.H * p.Nk);
  add_columns<T>(p, to, column_sums);
}

template <class T>
void backward(const AttentionProblem& p, const AttentionBackward& to, const BackwardBuffers<T>& buffers, const Parallel& parallel) {
  buffers.mask.prepare(parallel);
  const BackwardOperands<T> operands(p, to, buffers, parallel);
  const GatheredKeys gathered(p, parallel);
  if (gathered.wanted() && to.bias_gradient != BiasGradient::pairs) return backward_gathered(p, to, buffers, operands, gathered, parallel);
  const Operand<T>&queries = operands.queries, &grads = operands.grads, &all_keys = operands.keys;
  const Logit<T> logit{static_cast<T>(p.scale), static_cast<T>(p.cap)};
  const BackwardPlan& plan = buffers.plan;
  const std::int64_t group = p.H / p.Hkv, head_rows = p.total_queries, all_queries = (p.cu_queries ? 1 : p.B) * p.H * head_rows, wide = buffers.wide;

  T* const slots = buffers.grad_query ? buffers.grad_query : static_cast<T*>(to.grad_query);
  if (to.bias_gradient == BiasGradient::pairs) std::memset(to.grad_bias, 0, to.bias_batches * p.bias.heads * p.Nq * p.Nk * sizeof(T));
  if (buffers.columns) std::memset(buffers.columns, 0, p.B * p.H * p.Nk * sizeof(T));
  if (p.key_lengths || p.cu_keys) {   // rows that no task visits
    std::memset(to.grad_key, 0, p.key_rows() * p.Hkv * p.D * size_of(p.dtype));
    std::memset(to.grad_value, 0, p.key_rows() * p.Hkv * p.Dv * size_of(p.dtype));
  }
  parallel_for(parallel, 0, plan.slots * all_queries, 256, [&](std::int64_t begin, std::int64_t end) { std::memset(slots + begin * wide, 0, (end - begin) * wide * sizeof(T)); });

  const auto unit = [&](KeyBlock<T>& block, TestedTiles<false>& tested, std::int64_t b, std::int64_t kv, std::int64_t slot, std::int64_t j) {
    const Sequence s = sequence(p, b);
    const std::int64_t keys = minimum(kBlock, s.keys - j), width = round_up(keys, kPanelColumns<T>);
    if (keys <= 0) return;
    const Lines<T> key = all_keys.lines(s, kv);
    block.begin(p, s, kv, [j](std::int64_t k) { return j + k; }, keys);
    for (std::int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      const HeadPairs pairs(p, buffers.mask, s, b, h);
      const Lines<T> query = queries.lines(s, h), grad = grads.lines(s, h);
      const std::int64_t rows_before = (s.item * p.H + h) * head_rows + s.first_query;
      T* grad_query = slots + (slot * all_queries + rows_before) * wide;
      T* grad_bias = nullptr;
      if (to.bias_gradient == BiasGradient::pairs)
        grad_bias = static_cast<T*>(to.grad_bias) + (minimum(b, to.bias_batches - 1) * p.bias.heads + h / (p.H / p.bias.heads)) * p.Nq * p.Nk + j;
      for (std::int64_t c = 0; c < kBlock; ++c) block.columns[c] = 0;
      const auto coverage = [&](std::int64_t i, std::int64_t rows) { return pairs.coverage(i, rows, j, keys); };
      const auto ahead = [&](const Kept& next) {
        query.prefetch(next.at, next.count, p.D);
        grad.prefetch(next.at, next.count, p.Dv);
      };
      for_each_kept(s.queries, coverage, ahead, [&](const Kept& now) {
        const std::int64_t i = now.at, rows = now.count;
        tile_product_by_rows<T>(query.data + i * query.ld, query.ld, rows, block.keys, width, p.D, block.tile, kBlock, block.edge);
        tile_product_by_rows<T>(grad.data + i * grad.ld, grad.ld, rows, block.values, width, p.Dv, block.grad, kBlock, block.edge);
        const bool added = now.coverage == Coverage::some || pairs.has_bias();
        if (added) pairs.addends(tested, i, rows, j, keys, +block.addend);
        block.fold(logit, rows, width, buffers.lse + rows_before + i, buffers.delta + rows_before + i, added, grad_bias ? grad_bias + i * p.Nk : nullptr, p.Nk, keys, buffers.columns != nullptr);
        add_tile_times_rows<false, T>(block.tile, kBlock, keys, rows, grad.data + i * grad.ld, grad.ld, block.wide_value, block.grad_value, block.wide_value);
        add_tile_times_rows<false, T>(block.grad, kBlock, keys, rows, query.data + i * query.ld, query.ld, block.wide_key, block.grad_key, block.wide_key);
        add_tile_times_rows<true, T>(block.grad, kBlock, rows, keys, key.data + j * key.ld, key.ld, wide, grad_query + i * wide, wide);
      });
      if (buffers.columns) std::memcpy(buffers.columns + (b * p.H + h) * p.Nk + j, block.columns, keys * sizeof(T));
    }
    const std::int64_t row = (s.item * p.Hkv + kv) * p.total_keys + s.first_key + j;
    for (std::int64_t k = 0; k < keys; ++k) {
      store_row<T>(p.dtype, to.grad_key, (row + k) * p.D, p.D, block.grad_key + k * block.wide_key);
      store_row<T>(p.dtype, to.grad_value, (row + k) * p.Dv, p.Dv, block.grad_value + k * block.wide_value);
    }
  };
  const std::int64_t heads = p.B * p.Hkv / maximum(1, plan.units);   // of a task
  const bool heads_first = buffers.mask.shared();
  parallel_for(parallel, 0, plan.units * plan.slots, 1, [&](std::int64_t begin, std::int64_t end) {
    KeyBlock<T> block(p);
    TestedTiles<false> tested(buffers.mask);
    for (std::int64_t t = begin, now; t < end; t += now) {   // units [first, first + now) of a slot
      const std::int64_t slot = heads_first ? t / plan.units : t % plan.slots, first = heads_first ? t % plan.units : t / plan.slots, step = plan.slots * kBlock;
      now = heads_first ? minimum(plan.units - first, end - t) : 1;
      for (std::int64_t round = 0; round * step < p.Nk; ++round) {
        const std::int64_t j = round * step + (round & 1 ? plan.slots - 1 - slot : slot) * kBlock;
        for (std::int64_t n = first * heads; n < (first + now) * heads; ++n) unit(block, tested, n / p.Hkv, n % p.Hkv, slot, j);
      }
    }
  });
  if (buffers.grad_query)
    parallel_for(parallel, 0, all_queries, 64, [&](std::int64_t begin, std::int64_t end) {
      Scratch<T> sum(p.D);
      for (std::int64_t row = begin; row < end; ++row) {
        std::memcpy(sum, slots + row * wide, p.D * sizeof(T));
        for (std::int64_t slot = 1; slot < plan.slots; ++slot) add_scaled<T>(sum, T(1), slots + (slot * all_queries + row) * wide, p.D);
        store_row<T>(p.dtype, to.grad_query, row * p.D, p.D, sum);
      }
    });
  if (buffers.columns) add_columns<T>(p, to, buffers.columns);
}

// ---- entry points -------------------------------------------------------------------------------------------------------------------------------------------

template <template <class> class Buffers, class... Problem>
std::int64_t counted(Scalar dtype, const Problem&... problem) {
  return with_real(dtype, [&](auto real) {
    Arena arena(nullptr);
    Buffers<decltype(real)>(problem..., arena);
    return arena.used();
  });
}

std::int64_t forward_workspace(const AttentionProblem& p) { return counted<ForwardBuffers>(p.dtype, p); }
std::int64_t backward_workspace(const AttentionProblem& p, const AttentionBackward& to) { return counted<BackwardBuffers>(p.dtype, p, to); }

void run_forward(const AttentionProblem& p, const AttentionForward& to, void* workspace, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) {
    Arena arena(workspace);
    forward(p, to, ForwardBuffers<decltype(real)>(p, arena), parallel);
  });
}
void run_backward(const AttentionProblem& p, const AttentionBackward& to, void* workspace, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) {
    Arena arena(workspace);
    backward(p, to, BackwardBuffers<decltype(real)>(p, to, arena), parallel);
  });
}

}  // namespace

extern const AttentionKernels kAttentionKernels;
const AttentionKernels kAttentionKernels = {forward_workspace, run_forward, backward_workspace, run_backward};

}  // inline namespace
}  // namespace modalign::cpu
