/// @file match_tokens.cuh
/// @brief Bipartite soft matching of tokens on CUDA: kernels, launch sequence, and the table of compiled instances.
///
/// Maths      ops/match_tokens.h. (Bolya et al., "Token Merging: your ViT but faster", ICLR 2023.)
///
/// prepare    one warp per token: its inverse length; outputs that later kernels write in part get what stands in the rest
/// scores     tile product destinations x sources of an item, lines of one tensor that are `step` rows apart. A block has a tile of sources and walks down
///            destinations; in the epilogue a thread owns a source and some rows of the tile, and keeps its best product and destination in registers,
///            over tiles too. They go to a slot, [walks x row parts of a tile][T].
/// best       one thread per token: the slots of a source become one cosine and its destination
/// rank       one warp per token: how many sources of the item come before it; and one per item: how many of its sources join
/// order      one warp per token: a key, equal in a group and rising with the rows of the output; and one per item: how many rows are before it
/// groups     one warp per token: the tokens with lower keys are the members before its group, those of them that join none its rows
///
/// Numbers    f32, f64: FmaBackend in the input precision. bf16, f16: one tensor-core product, whose operands are exact, fp32 accumulation. The rows are
///            multiplied as they are, z = (m_a . m_t) / |m_t|, and 1 / |m_a| follows at the end: so for float lengths must lie between 1.1e-19 and
///            1.8e19 (a shorter vector has cosines 0, a longer one 0 or NaN). An infinity makes products NaN by its inverse length 0.
/// FLOPs      of an item with n tokens n^2 D / 2 for scores; n^2 / 4 comparisons for rank, n^2 for groups (keep_order: n^2 / 2 more): no sort, for any n.
/// Bytes      scores: operands once per tile of the other side; the rest a few numbers a token and what the caches serve.
/// Memory     T (1 + slots) reals, T (3 + slots) ints; slots: 2 (f64: 4) a walk, more walks than one only where blocks would be fewer than kMatchBlocks.
/// Order      sums over D ascending, a maximum has no order, equal products go to the lower destination; ranks and places are counts. No atomics: equal bits
///            from run to run, and for every number of walks.
/// Registers  tiles at most 128, one-warp kernels at most 168.
#pragma once

#include "cuda/pair_geometry.cuh"
#include "ops/match_tokens.h"

namespace modalign::cuda {

// --------------------------------------------------------------------------------------------------------------------------------------------- items
// Where the tokens, sources and destinations of an item are. All numbers of tokens are below 2^31.
struct MatchItem {
  int b, begin, tokens;
  int apart;   // tokens that take no part
  int step, first_source, sources, first_target, targets, most_merges;

  MODALIGN_HOST_DEVICE MatchItem(const MatchProblem& p, int b, int begin, int tokens) : b(b), begin(begin), tokens(tokens) {
    const auto smaller = [](std::int64_t x, int y) { return x < y ? int(x) : y; };
    if (p.split >= 0) {
      apart = 0, step = 1, first_source = 0;
      sources = first_target = smaller(p.split, tokens);
      targets = tokens - sources;
      most_merges = targets > 0 ? smaller(p.r, sources) : 0;
    } else {
      apart = smaller(p.first, tokens), step = 2, first_source = apart + apart % 2, first_target = apart | 1;
      sources = (tokens - first_source + 1) / 2, targets = (tokens - first_target + 1) / 2;
      most_merges = smaller(p.r, (tokens - apart) / 2);
    }
  }
  MODALIGN_DEVICE int source(int a) const { return first_source + step * a; }
  MODALIGN_DEVICE int target(int t) const { return first_target + step * t; }
  // Which source or destination the token at a place is; -1: none.
  MODALIGN_DEVICE int source_at(int place) const { return index_of(place - first_source, sources); }
  MODALIGN_DEVICE int target_at(int place) const { return index_of(place - first_target, targets); }
  MODALIGN_DEVICE int index_of(int distance, int count) const {   // the step is 1 or 2
    const int index = distance >> (step - 1);
    return distance >= 0 && (distance & (step - 1)) == 0 && index < count ? index : -1;
  }
  // Elements from the first of the tensor to a token of the item.
  MODALIGN_DEVICE std::int64_t row(const MatchProblem& p, int place) const {
    return p.cu != nullptr ? (std::int64_t(begin) + place) * p.features.row_stride : b * p.features.batch_stride + place * p.features.row_stride;
  }
};

// Whatever the numbers on the device are, an item lies within the tokens. (`longest` of a batch is N: run_match.)
MODALIGN_DEVICE MatchItem match_item(const MatchProblem& p, int b) {
  if (p.cu == nullptr) return MatchItem(p, b, b * int(p.longest), int(p.longest));
  const Global<const std::int32_t> cu(p.cu);
  const int begin = maximum(0, minimum(int(cu[b]), int(p.T))), end = maximum(0, minimum(int(cu[b + 1]), int(p.T)));
  return MatchItem(p, b, begin, maximum(0, minimum(end - begin, int(p.longest))));
}
// The last item that begins at or before a token.
MODALIGN_DEVICE MatchItem item_holding(const MatchProblem& p, int token) {
  if (p.cu == nullptr) return match_item(p, token / int(p.longest));
  int low = 0, high = int(p.B);
  while (low + 1 < high) {
    const int middle = (low + high) / 2;
    if (int(Global<const std::int32_t>(p.cu)[middle]) <= token) low = middle;
    else high = middle;
  }
  return match_item(p, low);
}

// ------------------------------------------------------------------------------------------------------------------------------------------- prepare
template <class T> struct PrepareTokens {
  using Real = real_of<T>;
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  MatchProblem p;
  MatchResult to;
  Real* scale;   // [T]
  static constexpr Real kLeastSquare = std::numeric_limits<Real>::min();   // below it numbers have fewer digits

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(p.T + 1, 1, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t token = warp_item();
    if (token > (MODALIGN_MUTATION("prepare: one token too many") ? p.T + 1 : p.T)) return;
    if (lane() == 0) global(to.offsets)[token] = std::int32_t(p.T);   // what stands behind the last group
    if (token >= p.T) return;
    const MatchItem item = item_holding(p, int(token));
    const Global<const T> x = Global<const T>(static_cast<const T*>(p.features.data)).at(item.row(p, int(token) - item.begin));
    Real square = 0;
    const std::int64_t end = MODALIGN_MUTATION("prepare: leave the last element") ? p.D - 1 : p.D;
    for (std::int64_t d = lane(); d < end; d += kWarpSize) {
      const Real value = widen(T(x[d * p.features.element_stride]));
      square = fused_multiply_add(value, value, square);
    }
    square = warp_sum(square);
    if (lane() != 0) return;
    const bool vanishes = square < kLeastSquare;
    global(scale)[token] = vanishes && !MODALIGN_MUTATION("prepare: divide by zero") ? Real(0) : 1 / square_root(square);
    global(to.group)[token] = 0;   // these two stay only where cu leaves tokens out
    global(to.members)[token] = std::int32_t(token);
  }
};

// -------------------------------------------------------------------------------------------------------------------------------------------- scores
// The best product so far and its destination; NaN and -inf are never better.
template <class Real> struct MatchBest {
  Real value = -kInfinity<Real>;
  int target = 0;
};

template <class Real> struct MatchSlots {
  Real* value;   // [slots][T]
  int* target;
  std::int64_t T;
  MODALIGN_DEVICE void write(std::int64_t slot, int token, const MatchBest<Real>& best) const {
    global(value)[slot * T + token] = best.value;
    global(target)[slot * T + token] = best.target;
  }
  MODALIGN_DEVICE MatchBest<Real> read(std::int64_t slot, int token) const {
    return {Real(Global<const Real>(value)[slot * T + token]), int(Global<const int>(target)[slot * T + token])};
  }
};

struct MatchGrid {
  int tiles, walks;   // of the longest item: tiles of sources, walks along its destinations
  int rows_per_walk, slots_per_walk;
};

template <class T> struct MatchScoreTiles {
  using Backend = PairBackend<T>;
  using Real = real_of<T>;
  static constexpr int kThreads = kTileThreads;
  static constexpr int kMinBlocks = Backend::kMinBlocks;
  static constexpr int kParts = kTileThreads / Backend::kColumns, kRowsOfPart = Backend::kRows / kParts;   // threads of a source, rows of each
  static constexpr int kVector = 16 / int(sizeof(Real));
  static constexpr int kSharedBytes = Backend::kSharedBytes + Backend::kRows * int(sizeof(Real));
  static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 give a block 99 KB");
  static constexpr Real kNone = std::numeric_limits<Real>::quiet_NaN();

  MatchProblem p;
  Operand<T> tokens;   // every step-th of them
  const Real* scale;
  MatchSlots<Real> slots;
  MatchGrid grid;

  LaunchPlan plan(std::int64_t, const char* key) const {
    LaunchPlan plan;
    plan.grid[0] = unsigned(p.B * grid.tiles * grid.walks);
    plan.threads = kThreads;
    plan.shared_bytes = kSharedBytes;
    plan.key = key;
    return plan;
  }

  // What a block owns. It is made anew for every tile, and not kept in registers through products.
  struct Place {
    MatchItem item;
    int walk, column, columns;   // sources from `column` on; not positive: the item is shorter than the longest
    MODALIGN_DEVICE Place(const MatchScoreTiles& call, int index)
        : item(match_item(call.p, index / call.grid.tiles / call.grid.walks)),
          walk(index / call.grid.tiles % call.grid.walks),
          column(index % call.grid.tiles * Backend::kColumns),
          columns(minimum(item.sources - column, Backend::kColumns)) {}
  };
  MODALIGN_DEVICE Place place() const { return Place(*this, opaque(int(block_index_x()))); }

  MODALIGN_DEVICE void operator()() const {
    MatchBest<Real> best;
    for (int row = 0; row < grid.rows_per_walk; row += Backend::kRows) {
      const Place at = place();
      const int first = at.walk * grid.rows_per_walk + row;
      const TileRange range{first, at.column, 0, 0, minimum(at.item.targets - first, Backend::kRows), at.columns};
      if (range.rows <= 0 || range.columns <= 0) break;
      multiply(at.item, range);
      if (!MODALIGN_MUTATION("scores: drop the barrier before the epilogue")) barrier();
      consume(best, row);
      if (!MODALIGN_MUTATION("scores: drop the barrier after the epilogue")) barrier();   // the next tile will lie where this one was
    }
    const Place at = place();
    const int thread = opaque(thread_index()), column = thread % Backend::kColumns, part = thread / Backend::kColumns;
    if (at.walk * grid.rows_per_walk >= at.item.targets || column >= (MODALIGN_MUTATION("scores: one source too many") ? at.columns + 1 : at.columns)) return;
    best.target += at.walk * grid.rows_per_walk;
    slots.write(at.walk * kParts + part, at.item.begin + at.item.source(at.column + column), best);
  }

  MODALIGN_DEVICE void multiply(const MatchItem& item, const TileRange& range) const {
    load_scales(item, range);
    const Global<const T> data(tokens.data);
    typename Backend::Accumulators sum;
    Backend::clear(sum);
    Backend::multiply(sum, tokens, data.at(item.row(p, item.first_target)), tokens, data.at(item.row(p, item.first_source)), range, int(p.D));
    Backend::deposit(sum, shared<Real>(0, Backend::kRows * Backend::kPitch));
  }

  // Inverse lengths of the tile's destinations. Rows that do not exist have NaN, which never wins.
  MODALIGN_DEVICE void load_scales(const MatchItem& item, const TileRange& range) const {
    const Shared<Real> scales = shared<Real>(Backend::kSharedBytes, Backend::kRows);
    const int row = opaque(thread_index());
    if (row >= Backend::kRows) return;
    Real here = MODALIGN_MUTATION("scores: rows that do not exist") ? Real(1) : kNone;
    if (row < range.rows) here = Global<const Real>(scale)[item.begin + item.target(int(range.row_begin) + row)];
    scales[row] = here;
  }

  MODALIGN_DEVICE void consume(MatchBest<Real>& best, int row_begin) const {
    const Shared<Real> tile = shared<Real>(0, Backend::kRows * Backend::kPitch);
    const Shared<Real> scales = shared<Real>(Backend::kSharedBytes, Backend::kRows);
    const int thread = opaque(thread_index()), column = thread % Backend::kColumns, first = thread / Backend::kColumns * kRowsOfPart;
    MODALIGN_UNROLL
    for (int row = 0; row < kRowsOfPart; row += kVector) {
      const Pack<Real, kVector> factors = load_pack<kVector>(scales, first + row);
      MODALIGN_UNROLL
      for (int v = 0; v < kVector; ++v) {
        const Real z = tile[(first + row + v) * Backend::kPitch + column] * factors[v];
        if (MODALIGN_MUTATION("scores: ties to the last destination") ? z >= best.value : z > best.value) best = {z, row_begin + first + row + v};
      }
    }
  }
};

// One thread per token, in blocks of warps.
template <class Real> struct BestTargets {
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  MatchProblem p;
  MatchGrid grid;
  MatchSlots<Real> slots;
  const Real* scale;
  Real* score;    // [T]
  int* partner;   // [T] the place of a source's destination in the item

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(ceil_divide<std::int64_t>(p.T, kWarpSize), 1, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t index = warp_item() * kWarpSize + lane();
    if (index >= (MODALIGN_MUTATION("best: one token too many") ? p.T + 1 : p.T)) return;
    const int token = int(index);
    const MatchItem item = item_holding(p, token);
    MatchBest<Real> best;
    if (item.source_at(token - item.begin) >= 0) {
      const int count = (MODALIGN_MUTATION("best: one walk alone") ? 1 : ceil_divide(item.targets, grid.rows_per_walk)) * grid.slots_per_walk;
      for (int slot = 0; slot < count; ++slot) {
        const MatchBest<Real> part = slots.read(slot, token);
        const bool first = MODALIGN_MUTATION("best: ties to the last part") ? part.target > best.target : part.target < best.target;
        if (part.value > best.value || (part.value == best.value && first)) best = part;
      }
      best.value = best.value * Real(Global<const Real>(scale)[token]);
      if (best.value != best.value && !MODALIGN_MUTATION("best: keep NaN")) best = MatchBest<Real>();   // an infinity among the source's elements
    }
    global(score)[token] = best.value;
    global(partner)[token] = item.target(best.target);
  }
};

// ---------------------------------------------------------------------------------------------------------------------------------------------- rank
template <class Real> struct RankSources {
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  MatchProblem p;
  const Real* score;
  int* rank;     // [T] of a source, those before it
  int* merges;   // [B] sources that join: those of rank 0 ... merges - 1

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(p.T + p.B, 1, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t index = warp_item();
    if (index >= (MODALIGN_MUTATION("rank: one item too many") ? p.T + p.B + 1 : p.T + p.B)) return;
    if (index >= p.T) {
      const MatchItem item = match_item(p, int(index - p.T));
      const int passing = !p.has_threshold ? item.sources : count(item, [&](int, Real v) {
        return MODALIGN_MUTATION("rank: also those at the threshold") ? double(v) >= p.threshold : double(v) > p.threshold;
      });
      if (lane() == 0) global(merges)[item.b] = minimum(item.most_merges, passing);
      return;
    }
    const MatchItem item = item_holding(p, int(index));
    const int own = item.source_at(int(index) - item.begin);
    const Real value = Global<const Real>(score)[index];
    int before = 0;
    if (own >= 0) before = count(item, [&](int a, Real v) { return v > value || (v == value && (MODALIGN_MUTATION("rank: ties to the last source") ? a > own : a < own)); });
    if (lane() == 0) global(rank)[index] = before;
  }

  // How many sources of an item, by the warp together.
  template <class Counts> MODALIGN_DEVICE int count(const MatchItem& item, const Counts& counts) const {
    const Global<const Real> scores = Global<const Real>(score).at(item.begin);
    int found = 0;
    for (int a = lane(); a < item.sources; a += kWarpSize) found += counts(a, Real(scores[item.source(a)])) ? 1 : 0;
    return warp_sum(found);
  }
};

// --------------------------------------------------------------------------------------------------------------------------------------------- order
struct OrderTokens {
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  MatchProblem p;
  const int *partner, *rank, *merges;
  int* mark;          // [T] the key; of a source that joins ~key, which is negative
  std::int32_t* cu;   // [B + 1]

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(p.T + p.B + 1, 1, key); }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t index = warp_item();
    if (index > (MODALIGN_MUTATION("order: one item too many") ? p.T + p.B + 1 : p.T + p.B)) return;
    if (index >= p.T) return count_rows(int(index - p.T));
    const MatchItem item = item_holding(p, int(index));
    const int place = int(index) - item.begin, joining = Global<const int>(merges)[item.b], before = Global<const int>(rank)[index];
    const bool joins = item.source_at(place) >= 0 && before < joining;
    const int home = joins ? int(Global<const int>(partner)[index]) : place;   // the token of its group that joins none
    const int key = p.keep_order || (joining == 0 && !MODALIGN_MUTATION("order: an item in which none joins")) ? first_of(item, home, joining) : row_key(item, home, before);
    if (lane() == 0) global(mark)[index] = joins ? ~key : key;
  }

  // Tokens that take no part, sources, destinations.
  MODALIGN_DEVICE int row_key(const MatchItem& item, int home, int before) const {
    const int a = item.source_at(home), t = item.target_at(home);
    if (a >= 0) return item.apart + (item.apart > 0 && !MODALIGN_MUTATION("order: sources that stay by value") ? a : before);
    return t >= 0 ? item.apart + item.sources + t : home;
  }

  // The first token of a group, by the warp together.
  MODALIGN_DEVICE int first_of(const MatchItem& item, int home, int joining) const {
    if (joining == 0 || item.target_at(home) < 0) return home;
    const Global<const int> partners = Global<const int>(partner).at(item.begin), ranks = Global<const int>(rank).at(item.begin);
    int first = home;
    for (int a = lane(); a < item.sources; a += kWarpSize) {
      const int source = item.source(a);
      const bool member = int(partners[source]) == home && (MODALIGN_MUTATION("order: also sources that stay") || int(ranks[source]) < joining);
      if (member && source < first) first = source;
    }
    MODALIGN_UNROLL
    for (int step = kWarpSize / 2; step > 0; step /= 2) first = minimum(first, shuffle_xor(first, step));
    return first;
  }

  // Rows of the output before an item: its tokens before, without those that join.
  MODALIGN_DEVICE void count_rows(int b) const {
    int joined = 0;
    for (int other = lane(); other < b; other += kWarpSize) joined += int(Global<const int>(merges)[other]);
    joined = warp_sum(joined);
    const int begin = b < p.B ? match_item(p, b).begin : int(p.T);
    if (lane() == 0) global(cu)[b] = maximum(0, MODALIGN_MUTATION("order: rows as many as tokens") ? begin : begin - joined);
  }
};

// -------------------------------------------------------------------------------------------------------------------------------------------- groups
struct NumberGroups {
  static constexpr int kThreads = kWarpKernelThreads;
  static constexpr int kMinBlocks = kWarpKernelBlocks;
  MatchProblem p;
  const int* mark;
  MatchResult to;

  LaunchPlan plan(std::int64_t, const char* key) const { return plan_warps(p.T, 1, key); }

  static MODALIGN_DEVICE int key_of(int mark) { return mark < 0 ? ~mark : mark; }

  MODALIGN_DEVICE void operator()() const {
    const std::int64_t index = warp_item();
    if (index >= (MODALIGN_MUTATION("groups: one token too many") ? p.T + 1 : p.T)) return;
    const MatchItem item = item_holding(p, int(index));
    const Global<const int> marks = Global<const int>(mark).at(item.begin);
    const int place = int(index) - item.begin, own = marks[place], key = key_of(own);
    int rows = 0, members = 0, inside = 0;   // groups before, members of them; members of its own before it
    for (int other = lane(); other < item.tokens; other += kWarpSize) {
      const int there = marks[other], other_key = key_of(there);
      members += other_key < key ? 1 : 0;
      rows += other_key < key && (there >= 0 || MODALIGN_MUTATION("groups: a row for each token")) ? 1 : 0;
      inside += other_key == key && (MODALIGN_MUTATION("groups: members fall") ? other > place : other < place) ? 1 : 0;
    }
    rows = warp_sum(rows), members = warp_sum(members), inside = warp_sum(inside);
    if (lane() != 0 || place < 0 || place >= item.tokens) return;   // beyond the item only where cu leaves tokens out
    const int row = int(Global<const std::int32_t>(to.cu)[item.b]) + rows;
    global(to.group)[index] = row;
    global(to.members)[item.begin + members + inside] = std::int32_t(index);
    if (own >= 0) global(to.offsets)[row] = item.begin + members;
  }
};

// ---------------------------------------------------------------------------------------------------------------------------- the compiled instances
#define MODALIGN_MATCH_KERNELS_OF(X, dtype, T)          \
  X("match_tokens.prepare." dtype, PrepareTokens<T>)    \
  X("match_tokens.scores." dtype, MatchScoreTiles<T>)
#define MODALIGN_MATCH_KERNELS_OF_REAL(X, dtype, Real)  \
  X("match_tokens.best." dtype, BestTargets<Real>)      \
  X("match_tokens.rank." dtype, RankSources<Real>)
#define MODALIGN_MATCH_KERNELS(X)                 \
  MODALIGN_MATCH_KERNELS_OF(X, "f32", float)      \
  MODALIGN_MATCH_KERNELS_OF(X, "f64", double)     \
  MODALIGN_MATCH_KERNELS_OF(X, "f16", f16)        \
  MODALIGN_MATCH_KERNELS_OF(X, "bf16", bf16)      \
  MODALIGN_MATCH_KERNELS_OF_REAL(X, "f32", float)  \
  MODALIGN_MATCH_KERNELS_OF_REAL(X, "f64", double) \
  X("match_tokens.order", OrderTokens)            \
  X("match_tokens.groups", NumberGroups)

MODALIGN_MATCH_KERNELS(MODALIGN_KEY_OF)

// ----------------------------------------------------------------------------------------------------------------------------------- launch sequence
constexpr std::int64_t kMatchBlocks = 512;   // enough for any GPU; the result does not depend on it

template <class T> inline MatchGrid match_grid(const MatchProblem& p, std::int64_t blocks) {
  using Tiles = MatchScoreTiles<T>;
  const auto larger = [](std::int64_t x, std::int64_t y) { return x > y ? x : y; };
  const MatchItem longest(p, 0, 0, int(p.longest));
  const int tiles = ceil_divide(longest.sources, Tiles::Backend::kColumns), target_tiles = ceil_divide(longest.targets, Tiles::Backend::kRows);
  const std::int64_t walks = larger(1, blocks / larger(1, p.B * tiles));
  const int tiles_per_walk = int(larger(1, ceil_divide<std::int64_t>(target_tiles, walks)));
  return {tiles, ceil_divide(target_tiles, tiles_per_walk), tiles_per_walk * Tiles::Backend::kRows, Tiles::kParts};
}

// The problem with `longest` no longer than the tokens, and N in a batch.
inline MatchProblem with_length(MatchProblem p) {
  if (p.cu == nullptr) p.longest = p.B > 0 ? p.T / p.B : 0;
  if (p.longest > p.T) p.longest = p.T;
  return p;
}

template <class T> struct MatchBuffers {
  using Real = real_of<T>;
  MatchProblem p;
  MatchGrid grid;
  Real* scale;
  MatchSlots<Real> slots;
  int *partner, *rank, *merges, *mark;
  template <class Arena> MatchBuffers(const MatchProblem& problem, std::int64_t blocks, Arena& arena) : p(with_length(problem)), grid(match_grid<T>(p, blocks)) {
    const std::int64_t count = std::int64_t(grid.walks) * grid.slots_per_walk * p.T;
    scale = arena.template take<Real>("scale", p.T);
    slots = {arena.template take<Real>("slot_values", count), arena.template take<int>("slot_targets", count), p.T};
    partner = arena.template take<int>("partner", p.T), rank = arena.template take<int>("rank", p.T), mark = arena.template take<int>("mark", p.T);
    merges = arena.template take<int>("merges", p.B);
  }
};

template <class T, class Launch> int run_match_tokens(const MatchResult& to, const MatchBuffers<T>& buffers, const Launch& launch) {
  using Real = real_of<T>;
  const MatchProblem& p = buffers.p;
  Real* const score = static_cast<Real*>(to.score);
  if (const int error = launch_kernel(launch, PrepareTokens<T>{p, to, buffers.scale}, 1)) return error;
  Operand<T> tokens = make_operand<T>(Major::depth, static_cast<const T*>(p.features.data), p.cu != nullptr ? 0 : p.features.batch_stride, p.features.row_stride, p.features.element_stride);
  tokens.line_stride *= MatchItem(p, 0, 0, 0).step;
  if (const int error = launch_kernel(launch, MatchScoreTiles<T>{p, tokens, buffers.scale, buffers.slots, buffers.grid}, 1)) return error;
  if (const int error = launch_kernel(launch, BestTargets<Real>{p, buffers.grid, buffers.slots, buffers.scale, score, buffers.partner}, 1)) return error;
  if (const int error = launch_kernel(launch, RankSources<Real>{p, score, buffers.rank, buffers.merges}, 1)) return error;
  if (const int error = launch_kernel(launch, OrderTokens{p, buffers.partner, buffers.rank, buffers.merges, buffers.mark, to.cu}, 1)) return error;
  return launch_kernel(launch, NumberGroups{p, buffers.mark, to}, 1);
}

}   // namespace modalign::cuda
