// Engine form (e): the best k of every row of a matrix of scores that is never stored.
//
// Order      larger score first, equal ones by rising index. That is a total order, and a product has one order of sums wherever its tile begins, so the result depends on
//            the scores alone: not on tiles, on the order in which they are visited, on threads, or on k (the first 10 of k = 100 are those of k = 10).
// Keys       score and index are packed into one integer, the score's bits so that they rise with it, the index downwards: one comparison decides.
// Epilogue   a row has a list with room for some keys beyond k and a threshold, its k-th best so far. A vector of columns is compared with the threshold, and only what
//            reaches it is looked at; where the list is full the best k are found and the threshold rises. Randomly ordered columns give k (1 + ln(M / k)) survivors.
// Tiles      are visited in bit-reversed order: columns that are sorted worst first would otherwise all survive.
#pragma once

#include <limits>

#include "cpu/tile.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {

// ---- keys ---------------------------------------------------------------------------------------------------------------------------------------------

template <class T> struct ScoreBits;
template <> struct ScoreBits<float> { using Bits = std::uint32_t; using Key = std::uint64_t; };
template <> struct ScoreBits<double> { using Bits = std::uint64_t; __extension__ using Key = unsigned __int128; };
template <class T> using Key = typename ScoreBits<T>::Key;   // 0 is below every key

template <class T>
inline Key<T> key_of(T score, std::int64_t index) {
  using Bits = typename ScoreBits<T>::Bits;
  constexpr Bits sign = Bits(1) << (8 * sizeof(T) - 1);
  score += T(0);   // -0 and 0 are equal
  Bits bits;
  std::memcpy(&bits, &score, sizeof bits);
  bits = bits & sign ? ~bits : bits | sign;
  return Key<T>(bits) << 32 | (0xffffffffu - static_cast<std::uint32_t>(index));
}
template <class T>
inline T score_of(Key<T> key) {
  using Bits = typename ScoreBits<T>::Bits;
  constexpr Bits sign = Bits(1) << (8 * sizeof(T) - 1);
  Bits bits = static_cast<Bits>(key >> 32);
  bits = bits & sign ? bits & ~sign : ~bits;
  T score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}
template <class K> inline std::int64_t index_of(K key) { return 0xffffffffu - static_cast<std::uint32_t>(key); }

// At least k and at most `most` of n different keys to the front, the largest, in the order that they had; returns how many, *below is under all of them and under no other.
// (Bisection of the keys' range: a pass counts without a branch, and there are never more than bits in a key. The standard library's functions would be merged by the linker across
// instruction sets.)
template <class K>
inline std::int64_t keep_largest(K* keys, std::int64_t n, std::int64_t k, std::int64_t most, K* below) {
  K low = keys[0], high = keys[0];
  for (std::int64_t i = 1; i < n; ++i) low = keys[i] < low ? keys[i] : low, high = keys[i] > high ? keys[i] : high;
  --low;
  for (std::int64_t above = n; above > most;) {   // k or more above low, fewer above high
    const K middle = low + (high - low) / 2;
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < n; ++i) count += keys[i] > middle;
    if (count < k) high = middle;
    else low = middle, above = count;
  }
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const K key = keys[i];
    keys[kept] = key;
    kept += key > low;
  }
  *below = low;
  return kept;
}

// Falling order of n different keys, with as much spare room: runs by counting how many are larger, which are then merged; neither has a branch to mispredict.
template <class K>
inline void sort_falling(K* keys, std::int64_t n, K* spare) {
  constexpr std::int64_t run = sizeof(K) == 8 ? 64 : 16;
  for (std::int64_t first = 0; first < n; first += run) {
    const std::int64_t size = minimum(run, n - first);
    for (std::int64_t i = first; i < first + size; ++i) {
      const K key = keys[i];
      std::int64_t larger = 0;
      for (std::int64_t j = first; j < first + size; ++j) larger += keys[j] > key;
      spare[first + larger] = key;
    }
  }
  K *from = spare, *to = keys;
  for (std::int64_t width = run; width < n; width *= 2) {
    for (std::int64_t first = 0; first < n; first += 2 * width) {
      const std::int64_t middle = minimum(first + width, n), last = minimum(middle + width, n);
      std::int64_t i = first, j = middle, at = first;
      while (i < middle && j < last) {
        const bool right = from[j] > from[i];
        to[at++] = right ? from[j] : from[i];
        i += !right;
        j += right;
      }
      while (i < middle) to[at++] = from[i++];
      while (j < last) to[at++] = from[j++];
    }
    K* const other = from;
    from = to;
    to = other;
  }
  if (from != keys) std::memcpy(keys, from, n * sizeof(K));
}

// ---- lists --------------------------------------------------------------------------------------------------------------------------------------------

inline std::int64_t list_room(std::int64_t k) { return k + maximum(64, k <= 1024 ? k : k / 8); }

// Which of some columns, at most kMaskColumns and whole vectors, reach a threshold. One word for many vectors: a loop over bits ends, and mispredicts, once for all of them.
constexpr std::int64_t kMaskColumns = 64;
template <class T>
inline std::uint64_t reaching(const T* score, std::int64_t columns, Vector<T> threshold) {
  std::uint64_t reached = 0;
  const auto look = [&](std::int64_t c) { reached |= std::uint64_t(at_least<T>(load(score + c), threshold)) << c; };
  if (columns >= kMaskColumns)
    for (std::int64_t c = 0; c < kMaskColumns; c += kVectorLanes<T>) look(c);   // a number of steps that the compiler knows
  else
    for (std::int64_t c = 0; c < columns; c += kVectorLanes<T>) look(c);
  return reached;
}

template <class T>
class BestOfRows {
 public:
  BestOfRows(std::int64_t rows, std::int64_t k) : k_(k), room_(list_room(k)), most_(k + (room_ - k) / 4), keys_(rows * room_), spare_(room_), least_(rows), count_(rows), threshold_(rows) {}

  void clear(std::int64_t rows) {
    for (std::int64_t i = 0; i < rows; ++i) least_[i] = 0, count_[i] = 0, threshold_[i] = std::numeric_limits<T>::lowest();   // -inf is no neighbour
  }

  // A row of scores, whole panels of columns, of the points first, first + 1, ...; allowed(j) is asked of those alone that reach the threshold.
  template <class Allowed>
  void offer(std::int64_t i, const T* score, std::int64_t columns, std::int64_t first, const Allowed& allowed) {
    const Vector<T> threshold = broadcast(threshold_[i]);   // it may rise meanwhile: the least key is looked at again
    Key<T>* const list = keys_ + i * room_;
    Key<T> least = least_[i];
    std::int64_t count = count_[i];
    for (std::int64_t c = 0; c < columns; c += kMaskColumns)
      for (std::uint64_t reached = reaching(score + c, columns - c, threshold); reached; reached &= reached - 1) {
        const std::int64_t j = c + __builtin_ctzll(reached);
        const Key<T> key = key_of(score[j], first + j);
        if (key <= least || !allowed(first + j)) continue;
        list[count++] = key;
        if (count == room_) count = keep_largest(list, room_, k_, most_, &least);
      }
    if (least != least_[i]) least_[i] = least, threshold_[i] = score_of<T>(least);
    count_[i] = count;
  }

  // The list of row i in order, at most k keys.
  Key<T>* sorted(std::int64_t i, std::int64_t* count) {
    Key<T>* list = keys_ + i * room_;
    if (count_[i] > k_) count_[i] = keep_largest(list, count_[i], k_, k_, &least_[i]);
    *count = count_[i];
    sort_falling<Key<T>>(list, *count, spare_);
    return list;
  }

 private:
  std::int64_t k_, room_, most_;
  Scratch<Key<T>> keys_, spare_, least_;
  Scratch<std::int64_t> count_;
  Scratch<T> threshold_;
};

// ---- the walk -----------------------------------------------------------------------------------------------------------------------------------------

// f(t) for t = 0 ... n - 1, in the order of their reversed bits.
template <class F>
inline void bit_reversed(std::int64_t n, const F& f) {
  int bits = 0;
  while ((std::int64_t(1) << bits) < n) ++bits;
  for (std::int64_t i = 0; i < std::int64_t(1) << bits; ++i) {
    std::int64_t t = 0;
    for (int b = 0; b < bits; ++b) t |= (i >> b & 1) << (bits - 1 - b);
    if (t < n) f(t);
  }
}

// f(tile) for the tiles of some rows with some tiles of columns, in this order of columns.
template <class T, class F>
inline void for_tiles_of(const PackedPair<T>& pair, std::int64_t first, std::int64_t rows, std::int64_t tile_of_columns, T* data, const F& f) {
  const std::int64_t column = tile_of_columns * pair.tile_columns;
  for (std::int64_t r = 0; r < rows; r += kTileRows) {
    const std::int64_t row = first + r;
    const Tile<T> tile{row, minimum(kTileRows, rows - r), column, minimum(pair.tile_columns, pair.columns - column), data, pair.tile_columns};
    tile_product<T>(pair.row_panels + row * pair.depth, tile.rows, pair.column_panels + column * pair.depth, tile.columns, pair.depth, data, tile.ld);
    f(tile);
  }
}

// How rows and tiles of columns are dealt out to tasks. Groups of rows first; where these are few the columns are split as well, and lists are merged.
struct SelectionPlan {
  static constexpr std::int64_t kTasks = 32, kGroupRows = 8 * kTileRows, kListBytes = 8 << 20, kPartialBytes = 16 << 20, kLeastTiles = 4;
  std::int64_t group_rows, groups, splits;

  SelectionPlan(std::int64_t rows, std::int64_t tiles, std::int64_t k, std::int64_t key_bytes) {
    const std::int64_t fair = round_up((rows + kTasks - 1) / kTasks, kRegisterRows), affordable = kListBytes / (list_room(k) * key_bytes) / kRegisterRows * kRegisterRows;
    group_rows = maximum(kRegisterRows, minimum(maximum(kTileRows, minimum(fair, kGroupRows)), affordable));
    groups = (rows + group_rows - 1) / group_rows;
    splits = maximum(1, minimum(minimum(kTasks / maximum(1, groups), tiles / kLeastTiles), kPartialBytes / maximum(1, rows * k * key_bytes)));
  }
};

template <class T>
struct SelectionBuffers {
  Key<T>* keys = nullptr;         // [splits][rows][k], where there is more than one split
  std::int64_t* count = nullptr;  // [splits][rows]
  SelectionBuffers(const SelectionPlan& plan, std::int64_t rows, std::int64_t k, Arena& arena) {
    if (plan.splits == 1) return;
    keys = arena.take<Key<T>>(plan.splits * rows * k);
    count = arena.take<std::int64_t>(plan.splits * rows);
  }
};

// The best k of every row: score(tile) turns products into scores in place (padding columns: -inf), allowed(i, j) says whether point j may be a neighbour of row i,
// finish(i, keys, count) gets the list in order.
template <class T, class Score, class Allowed, class Finish>
inline void select_best(const PackedPair<T>& pair, std::int64_t k, const SelectionPlan& plan, const SelectionBuffers<T>& buffers, const Parallel& parallel, const Score& score,
                        const Allowed& allowed, const Finish& finish) {
  const std::int64_t tiles = pair.tiles();
  parallel_for(parallel, 0, plan.groups * plan.splits, 1, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> data(kTileRows * pair.tile_columns);
    BestOfRows<T> best(plan.group_rows, k);
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t split = task % plan.splits, first = task / plan.splits * plan.group_rows, rows = minimum(plan.group_rows, pair.rows - first);
      const std::int64_t first_tile = split * tiles / plan.splits;
      best.clear(rows);
      bit_reversed((split + 1) * tiles / plan.splits - first_tile, [&](std::int64_t t) {
        for_tiles_of<T>(pair, first, rows, first_tile + t, data, [&](const Tile<T>& tile) {
          score(tile);
          for (std::int64_t i = 0; i < tile.rows; ++i)
            best.offer(tile.row - first + i, data + i * tile.ld, tile.columns, tile.column, [&](std::int64_t j) { return allowed(tile.row + i, j); });
        });
      });
      for (std::int64_t i = 0; i < rows; ++i) {
        std::int64_t count;
        const Key<T>* keys = best.sorted(i, &count);
        if (plan.splits == 1) {
          finish(first + i, keys, count);
        } else {
          const std::int64_t at = split * pair.rows + first + i;
          std::memcpy(buffers.keys + at * k, keys, count * sizeof(Key<T>));
          buffers.count[at] = count;
        }
      }
    }
  });
  if (plan.splits == 1) return;
  parallel_for(parallel, 0, pair.rows, 8, [&](std::int64_t begin, std::int64_t end) {
    Scratch<Key<T>> keys(plan.splits * k), spare(k);
    Key<T> below;
    for (std::int64_t i = begin; i < end; ++i) {
      std::int64_t count = 0;
      for (std::int64_t split = 0; split < plan.splits; ++split) {
        const std::int64_t at = split * pair.rows + i;
        std::memcpy(keys + count, buffers.keys + at * k, buffers.count[at] * sizeof(Key<T>));
        count += buffers.count[at];
      }
      if (count > k) count = keep_largest<Key<T>>(keys, count, k, k, &below);
      sort_falling<Key<T>>(keys, count, spare);
      finish(i, keys, count);
    }
  });
}

// How many points of every row come before its target, whose score is given: larger scores, and equal ones of a lower index. NaN as score: none does.
// count: [splits][rows], each split's part.
template <class T, class Score, class Allowed>
inline void count_before(const PackedPair<T>& pair, const T* target_score, const std::int64_t* target, const SelectionPlan& plan, std::int64_t* count, const Parallel& parallel,
                         const Score& score, const Allowed& allowed) {
  const std::int64_t tiles = pair.tiles();
  parallel_for(parallel, 0, plan.groups * plan.splits, 1, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> data(kTileRows * pair.tile_columns);
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t split = task % plan.splits, first = task / plan.splits * plan.group_rows, rows = minimum(plan.group_rows, pair.rows - first);
      std::int64_t* counted = count + split * pair.rows;
      for (std::int64_t i = first; i < first + rows; ++i) counted[i] = 0;
      for (std::int64_t t = split * tiles / plan.splits; t < (split + 1) * tiles / plan.splits; ++t)
        for_tiles_of<T>(pair, first, rows, t, data, [&](const Tile<T>& tile) {
          score(tile);
          for (std::int64_t i = 0; i < tile.rows; ++i) {
            const T* z = data + i * tile.ld;
            const T mine = target_score[tile.row + i];
            for (std::int64_t c = 0; c < tile.columns; c += kMaskColumns)
              for (std::uint64_t reached = reaching(z + c, tile.columns - c, broadcast(mine)); reached; reached &= reached - 1) {
                const std::int64_t at = c + __builtin_ctzll(reached), j = tile.column + at;
                counted[tile.row + i] += (z[at] != mine || j < target[tile.row + i]) && allowed(tile.row + i, j);
              }
          }
        });
    }
  });
}

}  // inline namespace
}  // namespace modalign::cpu
