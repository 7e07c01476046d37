// Bipartite soft matching of tokens; compiled once per instruction set.
//
// Maths      ops/match_tokens.h. (Bolya et al., "Token Merging: your ViT but faster", ICLR 2023.)
// Scores     destinations are packed, all items at once; a task is kTileRows sources of an item against all destinations tile by tile. A lane keeps the best product over the destination's
//            length that it has seen and its column; the lanes are compared at the end of the row, and the best is divided by the source's length. 2 FLOPs for a source, a destination and an element: n^2 D / 2 an item.
// Choice     sources of an item are sorted as keys of score and place (cpu/select.h); rows of the output are numbered, and tokens counted into them.
// Memory     the packed destinations, T D / 2 numbers; 8 T bytes of keys (twice that for double), twice. No matrix of scores.
// Precision  products accumulate in float (double for double) and are scaled afterwards, so that those of whole numbers are exact and equal ones tie.
// Order      products have one order of sums wherever their tile begins, a maximum has none, keys are all different: equal bits for any threads, alone and in any batch.

#include "cpu/match_tokens.h"

#include <limits>

#include "cpu/select.h"
#include "cpu/token_rows.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {
namespace {

template <class T> constexpr std::int64_t kTileColumns = 8 * kLanes<T>;
template <class T> using Integer = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;   // as wide as T, for selects lane by lane

// Where the tokens, sources and destinations of an item are.
struct Item {
  std::int64_t begin, tokens, step, first_source, sources, first_target, targets, most_merges;

  Item(const MatchProblem& p, std::int64_t b) : begin(p.cu ? p.cu[b] : b * (p.T / p.B)), tokens(p.cu ? p.cu[b + 1] - begin : p.T / p.B) {
    if (p.split >= 0) {
      step = 1, first_source = 0, sources = minimum(p.split, tokens), first_target = sources, targets = tokens - sources;
      most_merges = targets ? minimum(p.r, sources) : 0;
    } else {
      step = 2, first_source = round_up(p.first, 2), first_target = p.first | 1;
      sources = maximum(0, (tokens - first_source + 1) / 2), targets = maximum(0, (tokens - first_target + 1) / 2);
      most_merges = minimum(p.r, maximum(0, tokens - p.first) / 2);
    }
  }
  std::int64_t source(std::int64_t a) const { return first_source + step * a; }
  std::int64_t target(std::int64_t t) const { return first_target + step * t; }
};

template <class T>
struct Buffers {
  T* target_panels;             // [panels][D][kPanelColumns]
  T* target_scales;             // [panels][kPanelColumns] 1 / length
  std::int64_t *panels, *blocks;   // [B + 1] panels of destinations and blocks of sources before an item
  Key<T>*keys, *spare;          // [T] of which an item has those of its tokens
  std::int32_t* partner;        // [T] for a source, its destination
  std::int64_t* merges;         // [B]

  static std::int64_t most_targets(const MatchProblem& p) { return ((p.split < 0 ? p.T / 2 : p.T) / kPanelColumns<T> + p.B) * kPanelColumns<T>; }   // with padding

  Buffers(const MatchProblem& p, Arena& arena)
      : target_panels(arena.take<T>(most_targets(p) * p.D)),
        target_scales(arena.take<T>(most_targets(p))),
        panels(arena.take<std::int64_t>(p.B + 1)),
        blocks(arena.take<std::int64_t>(p.B + 1)),
        keys(arena.take<Key<T>>(p.T)),
        spare(arena.take<Key<T>>(p.T)),
        partner(arena.take<std::int32_t>(p.T)),
        merges(arena.take<std::int64_t>(p.B)) {}
};

// The item that piece i belongs to, told by how many pieces there are before each.
std::int64_t holding(const std::int64_t* before, std::int64_t items, std::int64_t i) {
  std::int64_t low = 0, high = items;
  while (low + 1 < high) {
    const std::int64_t middle = (low + high) / 2;
    if (before[middle] <= i) low = middle;
    else high = middle;
  }
  return low;
}

template <class T>
T load_token(const MatchProblem& p, const Item& item, std::int64_t b, std::int64_t i, T* row) {
  const std::int64_t at = p.cu ? (item.begin + i) * p.features.row_stride : b * p.features.batch_stride + i * p.features.row_stride;
  return modalign::cpu::load_token<T>(p.dtype, p.features.data, at, p.features.element_stride, p.D, row);
}

template <class T>
void score_sources(const MatchProblem& p, const Buffers<T>& buffers, T* score, const Parallel& parallel) {
  constexpr std::int64_t P = kPanelColumns<T>, L = kVectorLanes<T>, ld = kTileColumns<T>;
  constexpr T none = -std::numeric_limits<T>::infinity();
  parallel_for(parallel, 0, buffers.panels[p.B], 1, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> rows(P * p.D);
    for (std::int64_t panel = begin; panel < end; ++panel) {
      const std::int64_t b = holding(buffers.panels, p.B, panel), t = (panel - buffers.panels[b]) * P;
      const Item item(p, b);
      const int count = static_cast<int>(minimum(P, item.targets - t));
      for (int r = 0; r < P; ++r) buffers.target_scales[panel * P + r] = r < count ? load_token<T>(p, item, b, item.target(t + r), rows + r * p.D) : T(1);
      pack_panel(static_cast<int>(P), count, p.D, [&](int r) { return rows + r * p.D; }, buffers.target_panels + panel * P * p.D);
    }
  });
  parallel_for(parallel, 0, buffers.blocks[p.B], 1, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> rows(kTileRows * p.D), edge(kRegisterRows * p.D), tile(kTileRows * ld), best(kTileRows * L), scales(kTileRows);
    Scratch<Integer<T>> at(kTileRows * L);
    Vector<Integer<T>> lane;
    for (int l = 0; l < L; ++l) lane[l] = l;
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t b = holding(buffers.blocks, p.B, block), first = (block - buffers.blocks[b]) * kTileRows;
      const Item item(p, b);
      const std::int64_t count = minimum(kTileRows, item.sources - first);
      for (std::int64_t i = 0; i < count; ++i) scales[i] = load_token<T>(p, item, b, item.source(first + i), rows + i * p.D);
      for (std::int64_t i = 0; i < count * L; ++i) best[i] = none, at[i] = 0;
      for (std::int64_t t = 0; t < item.targets; t += ld) {
        const std::int64_t valid = minimum(ld, item.targets - t), columns = round_up(valid, P), packed = buffers.panels[b] * P + t;
        tile_product_by_rows<T>(rows, p.D, count, buffers.target_panels + packed * p.D, columns, p.D, tile, ld, edge);
        for (std::int64_t i = 0; i < count; ++i) {
          T* const product = tile + i * ld;
          for (std::int64_t c = valid; c < columns; ++c) product[c] = none;
          Vector<T> top = load(best + i * L);
          Vector<Integer<T>> where = load(at + i * L);
          for (std::int64_t c = 0; c < columns; c += L) {
            const Vector<T> z = load(product + c) * load(buffers.target_scales + packed + c);
            const auto better = z > top;
            where = better ? broadcast(static_cast<Integer<T>>(t + c)) + lane : where;
            top = better ? z : top;
          }
          store(best + i * L, top);
          store(at + i * L, where);
        }
      }
      for (std::int64_t i = 0; i < count; ++i) {
        T top = none;
        Integer<T> where = 0;
        for (std::int64_t l = i * L; l < (i + 1) * L; ++l)
          if (best[l] > top || (best[l] == top && at[l] < where)) top = best[l], where = at[l];
        const std::int64_t source = item.begin + item.source(first + i);
        const T cosine = top * scales[i];
        score[source] = top > none && cosine == cosine ? cosine : none;
        buffers.partner[source] = static_cast<std::int32_t>(item.target(where));
      }
    }
  });
}

// Sources of an item by falling score, to the front of its keys; returns how many merge.
template <class T>
std::int64_t order_sources(const MatchProblem& p, const Item& item, const T* score, Key<T>* keys, Key<T>* spare) {
  for (std::int64_t a = 0; a < item.sources; ++a) keys[a] = key_of(score[item.begin + item.source(a)], a);
  sort_falling<Key<T>>(keys, item.sources, spare);
  std::int64_t merges = 0;
  while (merges < item.most_merges && (!p.has_threshold || score[item.begin + item.source(index_of(keys[merges]))] > p.threshold)) ++merges;
  return merges;
}

// The rows of the output that an item's tokens are in, counted from its first.
template <class T>
void number_rows(const MatchProblem& p, const Item& item, const Key<T>* keys, std::int64_t merges, const std::int32_t* partner, std::int32_t* row) {
  constexpr std::int32_t open = -1, joins = -2;
  for (std::int64_t i = 0; i < item.tokens; ++i) row[i] = open;
  for (std::int64_t s = 0; s < merges; ++s) row[item.source(index_of(keys[s]))] = joins;
  std::int32_t next = 0;
  const auto number = [&](std::int64_t i) { if (row[i] == open) row[i] = next++; };
  if (p.keep_order || merges == 0) {
    for (std::int64_t i = 0; i < item.tokens; ++i) number(row[i] == joins ? partner[item.begin + i] : i);
  } else {
    for (std::int64_t i = 0; i < minimum(p.first, item.tokens); ++i) number(i);
    if (p.first == 0) for (std::int64_t s = merges; s < item.sources; ++s) number(item.source(index_of(keys[s])));
    else for (std::int64_t a = 0; a < item.sources; ++a) number(item.source(a));
    for (std::int64_t t = 0; t < item.targets; ++t) number(item.target(t));
  }
  for (std::int64_t s = 0; s < merges; ++s) {
    const std::int64_t i = item.source(index_of(keys[s]));
    row[i] = row[partner[item.begin + i]];
  }
}

template <class T>
void match(const MatchProblem& p, const MatchResult& to, const Buffers<T>& buffers, const Parallel& parallel) {
  T* const score = static_cast<T*>(to.score);
  buffers.panels[0] = buffers.blocks[0] = 0;
  for (std::int64_t b = 0; b < p.B; ++b) {
    const Item item(p, b);
    buffers.panels[b + 1] = buffers.panels[b] + (item.targets + kPanelColumns<T> - 1) / kPanelColumns<T>;
    buffers.blocks[b + 1] = buffers.blocks[b] + (item.sources + kTileRows - 1) / kTileRows;
  }
  for (std::int64_t i = 0; i < p.T; ++i) score[i] = -std::numeric_limits<T>::infinity();
  score_sources<T>(p, buffers, score, parallel);
  parallel_for(parallel, 0, p.B, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      const Item item(p, b);
      buffers.merges[b] = order_sources<T>(p, item, score, buffers.keys + item.begin, buffers.spare + item.begin);
    }
  });
  to.cu[0] = 0;
  for (std::int64_t b = 0; b < p.B; ++b) to.cu[b + 1] = static_cast<std::int32_t>(to.cu[b] + Item(p, b).tokens - buffers.merges[b]);
  parallel_for(parallel, 0, p.B, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      const Item item(p, b);
      std::int32_t* const group = to.group + item.begin;
      number_rows<T>(p, item, buffers.keys + item.begin, buffers.merges[b], buffers.partner, group);
      const std::int64_t rows = item.tokens - buffers.merges[b];
      std::int32_t* const offsets = to.offsets + to.cu[b];
      Scratch<std::int32_t> next(rows + 1);
      for (std::int64_t g = 0; g <= rows; ++g) next[g] = 0;
      for (std::int64_t i = 0; i < item.tokens; ++i) ++next[group[i] + 1];
      next[0] = static_cast<std::int32_t>(item.begin);
      for (std::int64_t g = 0; g < rows; ++g) offsets[g] = next[g], next[g + 1] += next[g];
      for (std::int64_t i = 0; i < item.tokens; ++i) {
        to.members[next[group[i]]++] = static_cast<std::int32_t>(item.begin + i);
        group[i] += to.cu[b];
      }
    }
  });
  for (std::int64_t g = to.cu[p.B]; g <= p.T; ++g) to.offsets[g] = static_cast<std::int32_t>(p.T);
}

// ---- entry points -------------------------------------------------------------------------------------------------------------------------------------

std::int64_t workspace_bytes(const MatchProblem& p) {
  return with_real(p.dtype, [&](auto real) {
    Arena arena(nullptr);
    Buffers<decltype(real)>(p, arena);
    return arena.used();
  });
}

void run_match(const MatchProblem& p, const MatchResult& to, void* workspace, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) {
    Arena arena(workspace);
    match(p, to, Buffers<decltype(real)>(p, arena), parallel);
  });
}

}  // namespace

extern const MatchKernels kMatchKernels;
const MatchKernels kMatchKernels = {workspace_bytes, run_match};

}  // inline namespace
}  // namespace modalign::cpu
