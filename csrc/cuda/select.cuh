/// @file select.cuh
/// @brief Form (e) of the tile engine: the best k of every row of a matrix of scores that is never stored, and how many scores of a row come before a
/// given one. The twin of cpu/select.h.
///
/// Order      larger score first, equal ones by rising index. That is a total order, and a product has one order of sums wherever its tile lies, so the
///            result depends on the scores alone: not on tiles, walks, panels or k. NaN and -inf are never chosen.
/// Mapping    a warp owns every eighth row of a tile. Its lanes compare their columns with the row's bar, the k-th best so far; a row that nothing reaches
///            costs one ballot. What reaches the bar is appended to the row's list, and a full list is sorted, cut to k, and raises the bar. Columns in
///            random order give k (1 + ln(M / k)) such candidates a row; in the worst order every column is one, and the result is the same.
/// Memory     lists live in global memory, [walk of columns][row][room], small enough for the caches; bars and counts in shared memory.
///
/// A Score says what a family selects by, product * scale + bias:
///     Pack<Real, 2> column(std::int64_t j) const;           // scale and bias of an existing column
///     bool allowed(std::int64_t i, std::int64_t j) const;   // asked of those alone that reach the bar
#pragma once

#include "cuda/tile.cuh"

namespace modalign::cuda {

// An index and its score.
template <class Real> struct Ranked {
  Real score;
  int index;
};
template <class Real> MODALIGN_DEVICE bool comes_before(const Ranked<Real>& a, const Ranked<Real>& b) {
  return a.score > b.score || (a.score == b.score && (MODALIGN_MUTATION("select: ties to the higher index") ? a.index > b.index : a.index < b.index));
}
// Every score but NaN and -inf comes before it.
template <class Real> MODALIGN_DEVICE Ranked<Real> lowest_ranked() { return {-kInfinity<Real>, -1}; }

template <class Real> struct RankedList {
  Global<Real> scores;
  Global<int> indices;

  MODALIGN_DEVICE Ranked<Real> read(int at) const { return {Real(scores[at]), int(indices[at])}; }
  MODALIGN_DEVICE void write(int at, const Ranked<Real>& entry) const {
    scores[at] = entry.score;
    indices[at] = entry.index;
  }

  // The first `count` entries into order, by a warp together, thread `mine` of it. What lies behind them, to the next power of two, is overwritten. (Bitonic sort.)
  MODALIGN_DEVICE void sort(int count, int mine) const {
    int span = 1;
    while (span < count) span *= 2;
    for (int at = count + mine; at < span; at += kWarpSize) write(at, lowest_ranked<Real>());
    if (!MODALIGN_MUTATION("select: sort before all have written")) warp_barrier();
    for (int size = 2; size <= span; size *= 2)
      for (int stride = size / 2; stride > 0; stride /= 2) {
        for (int pair = mine; pair < span / 2; pair += kWarpSize) {
          const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
          const Ranked<Real> a = read(low), b = read(high);
          if (comes_before(b, a) == ((low & size) == 0)) {
            write(low, b);
            write(high, a);
          }
        }
        if (!MODALIGN_MUTATION("select: drop the barrier of the sort")) warp_barrier();
      }
  }

  // How many of the first `count` entries, which are in order, come before another one.
  MODALIGN_DEVICE int before(const Ranked<Real>& other, int count) const {
    int low = 0, high = count;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (comes_before(read(middle), other)) low = middle + 1;
      else high = middle;
    }
    return low;
  }
};

template <class Real> struct RankedLists {
  Real* scores;   // [splits][rows][room]
  int* indices;
  int* counts;   // [splits][rows]
  std::int64_t rows;
  int room;   // a power of two

  MODALIGN_DEVICE RankedList<Real> at(std::int64_t split, std::int64_t row) const {
    return {global(scores).at((split * rows + row) * room), global(indices).at((split * rows + row) * room)};
  }
  MODALIGN_DEVICE Global<int> counts_of(std::int64_t split) const { return global(counts).at(split * rows); }
};

// What a tile's epilogue keeps in shared memory, from a byte offset on: the scale and the bias of every column; of every row the bar and a count.
template <class Backend, class Score> struct SelectShared {
  using Real = typename Backend::Real;
  static constexpr int kRowOffset = 2 * Backend::kColumns * int(sizeof(Real)), kIndexOffset = kRowOffset + Backend::kRows * int(sizeof(Real));
  static constexpr int kCountOffset = kIndexOffset + Backend::kRows * int(sizeof(int)), kBytes = kCountOffset + Backend::kRows * int(sizeof(int));
  Shared<Pack<Real, 2>> column;
  Shared<Real> bar;
  Shared<int> bar_index, count;

  MODALIGN_DEVICE explicit SelectShared(int offset)
      : column(shared<Pack<Real, 2>>(offset, Backend::kColumns)),
        bar(shared<Real>(offset + kRowOffset, Backend::kRows)),
        bar_index(shared<int>(offset + kIndexOffset, Backend::kRows)),
        count(shared<int>(offset + kCountOffset, Backend::kRows)) {}

  MODALIGN_DEVICE void write_row(int row, const Ranked<Real>& least, int entries) const {   // by one thread
    bar[row] = least.score;
    bar_index[row] = least.index;
    count[row] = entries;
  }
  MODALIGN_DEVICE void load_columns(const Score& score, const TileRange& range, int thread) const {
    if (thread < range.columns) column[thread] = score.column(range.column_begin + thread);
    if (!MODALIGN_MUTATION("select: drop the barrier behind the columns")) barrier();
  }
  MODALIGN_DEVICE Real score_of(Shared<Real> tile, int row, int at) const {
    const Pack<Real, 2> here = column[at];
    return fused_multiply_add(Real(tile[row * Backend::kPitch + at]), here[0], here[1]);
  }
};

// At least 32 beyond k, as many as a step may add, and half of k: the rarer a full list the better.
inline int list_room(std::int64_t k) {
  int room = 64;
  while (room < k + (k / 2 > kWarpSize ? k / 2 : kWarpSize)) room *= 2;
  return room;
}

template <class Backend, class Score> struct SelectTile {
  using Real = typename Backend::Real;
  static constexpr int kSharedBytes = SelectShared<Backend, Score>::kBytes;
  static constexpr int kMinBlocks = 2;
  static constexpr int kPieces = Backend::kColumns / kWarpSize;
  struct State {};
  using Rows = SelectShared<Backend, Score>;
  Score score;
  RankedLists<Real> lists;
  int k;

  MODALIGN_DEVICE void begin(State&, const TileRange&, std::int64_t, const WalkPosition&, int shared_offset) const {
    const Rows rows(opaque(shared_offset));
    for (int row = opaque(warp()); row < Backend::kRows; row += kTileWarps)
      if (lane() == 0) rows.write_row(row, lowest_ranked<Real>(), 0);
  }

  MODALIGN_DEVICE void consume(State&, Shared<Real> tile, const TileRange& range, std::int64_t, const WalkPosition& walk, int shared_offset) const {
    const Rows rows(opaque(shared_offset));
    const int thread = opaque(thread_index()), mine = thread % kWarpSize;   // or what follows from them is carried through the product
    rows.load_columns(score, range, thread);
    for (int row = thread / kWarpSize; row < range.rows; row += kTileWarps) {
      const Real bar = rows.bar[row];
      bool reached = false;
      MODALIGN_UNROLL
      for (int piece = 0; piece < kPieces; ++piece) {
        const int at = piece * kWarpSize + mine;
        if (at < range.columns) reached = reached || rows.score_of(tile, row, at) >= bar;
      }
      if (warp_ballot(reached) != 0) offer(rows, tile, row, mine, range, walk);
    }
  }

  // The candidates of a row that something reached.
  MODALIGN_DEVICE void offer(const Rows& rows, Shared<Real> tile, int row, int mine, const TileRange& range, const WalkPosition& walk) const {
    const std::int64_t i = range.row_begin + row;
    const RankedList<Real> list = lists.at(walk.column, i);
    Ranked<Real> least{Real(rows.bar[row]), int(rows.bar_index[row])};
    int entries = rows.count[row];
    MODALIGN_NO_UNROLL
    for (int first = 0; first < range.columns; first += kWarpSize) {
      const int at = first + mine;
      Ranked<Real> own = lowest_ranked<Real>();
      if (at < range.columns) own = {rows.score_of(tile, row, at), int(range.column_begin) + at};
      std::uint32_t taken = warp_ballot(comes_before(own, least) && score.allowed(i, own.index));
      if (entries + population_count(taken) > lists.room) {
        list.sort(entries, mine);
        entries = k;
        least = list.read(k - 1);
        taken = warp_ballot((taken >> mine & 1) != 0 && comes_before(own, least));
      }
      const std::uint32_t below = (std::uint32_t(1) << mine) - 1;
      if ((taken >> mine & 1) != 0) list.write(entries + population_count(taken & below), own);
      entries += population_count(taken);
    }
    if (!MODALIGN_MUTATION("select: drop the barrier before the row's state")) warp_barrier();   // all have read it
    if (mine == 0) rows.write_row(row, least, entries);
  }

  // The lists are left as they are, for merge_lists to sort: a second sort here would cost the product its registers.
  MODALIGN_DEVICE void end(State&, const TileRange& range, std::int64_t, const WalkPosition& walk, int shared_offset) const {
    const Rows rows(opaque(shared_offset));
    const Global<int> counts = lists.counts_of(walk.column).at(range.row_begin);
    for (int row = opaque(thread_index()); row < range.rows; row += kTileThreads) counts[row] = int(rows.count[row]);
    barrier();   // before the next row tile begins
  }
};

// f(place, entry) for the best k of a row over all walks, by a warp together; returns how many there are. Lists are sorted, and the place of an entry is the
// number of those that come before it.
template <class Real, class F> MODALIGN_DEVICE int merge_lists(const RankedLists<Real>& lists, std::int64_t splits, std::int64_t row, int k, const F& f) {
  const auto count_of = [&](std::int64_t split) { return minimum(int(lists.counts_of(split)[row]), k); };
  int total = 0;
  for (std::int64_t split = 0; split < splits; ++split) {
    lists.at(split, row).sort(lists.counts_of(split)[row], lane());
    total += count_of(split);
  }
  for (std::int64_t split = 0; split < splits; ++split) {
    const RankedList<Real> list = lists.at(split, row);
    for (int at = lane(); at < count_of(split); at += kWarpSize) {
      const Ranked<Real> entry = list.read(at);
      int place = at;
      for (std::int64_t other = 0; other < splits && place < k; ++other)
        if (other != split && !MODALIGN_MUTATION("merge: one walk alone")) place += lists.at(other, row).before(entry, count_of(other));
      if (place < k) f(place, entry);
    }
  }
  return minimum(total, k);
}

// slots[walk of columns][row]: how many columns of the walk come before the row's target. Score and index of that are given by `target(i)`.
template <class Backend, class Score, class Target> struct CountTile {
  using Real = typename Backend::Real;
  static constexpr int kSharedBytes = SelectShared<Backend, Score>::kBytes;
  static constexpr int kMinBlocks = 2;
  static constexpr int kPieces = Backend::kColumns / kWarpSize;
  struct State {};
  using Rows = SelectShared<Backend, Score>;
  Score score;
  Target target;
  int* slots;
  std::int64_t rows_in_all;

  MODALIGN_DEVICE void begin(State&, const TileRange& range, std::int64_t, const WalkPosition&, int shared_offset) const {
    const Rows rows(opaque(shared_offset));
    for (int row = warp(); row < range.rows; row += kTileWarps)
      if (lane() == 0) rows.write_row(row, target(range.row_begin + row), 0);
  }

  MODALIGN_DEVICE void consume(State&, Shared<Real> tile, const TileRange& range, std::int64_t, const WalkPosition&, int shared_offset) const {
    const Rows rows(opaque(shared_offset));
    const int thread = opaque(thread_index()), mine = thread % kWarpSize;   // or what follows from them is carried through the product
    rows.load_columns(score, range, thread);
    for (int row = thread / kWarpSize; row < range.rows; row += kTileWarps) {
      const Ranked<Real> mark{Real(rows.bar[row]), int(rows.bar_index[row])};
      int before = 0;
      MODALIGN_UNROLL
      for (int piece = 0; piece < kPieces; ++piece) {
        const int at = piece * kWarpSize + mine, j = int(range.column_begin) + at;
        bool counts = false;
        if (at < range.columns) counts = comes_before(Ranked<Real>{rows.score_of(tile, row, at), j}, mark);
        before += population_count(warp_ballot(counts && score.allowed(range.row_begin + row, j)));
      }
      if (mine == 0 && before > 0) rows.count[row] = rows.count[row] + before;
    }
  }

  MODALIGN_DEVICE void end(State&, const TileRange& range, std::int64_t, const WalkPosition& walk, int shared_offset) const {
    const Rows rows(opaque(shared_offset));
    const Global<int> slot = global(slots).at(walk.column * rows_in_all + range.row_begin);
    for (int row = opaque(thread_index()); row < range.rows; row += kTileThreads) slot[row] = int(rows.count[row]);
    barrier();   // before the next row tile begins
  }
};

// How a problem is cut into launches and walks; the result does not depend on it.
struct SelectLayout {
  std::int64_t panel_rows;   // of one launch
  std::int64_t splits;       // walks along the columns, at most
};
constexpr std::int64_t kSelectBlocks = 512, kLeastTilesOfWalk = 4;   // enough blocks for any GPU; long enough for a bar to rise
constexpr std::int64_t kSelectBytes = 256 << 20;                     // what rows in progress may take

// bytes: of one row in one walk, and of one row whatever the number of walks.
inline SelectLayout select_layout(std::int64_t rows, std::int64_t columns, int rows_per_tile, int columns_per_tile, std::int64_t bytes_per_walk, std::int64_t bytes_per_row,
                                  std::int64_t budget) {
  const auto at_least_1 = [](std::int64_t x) { return x < 1 ? std::int64_t(1) : x; };
  const auto smaller = [](std::int64_t a, std::int64_t b) { return a < b ? a : b; };
  const std::int64_t row_tiles = at_least_1(ceil_divide<std::int64_t>(rows, rows_per_tile)), column_tiles = ceil_divide<std::int64_t>(columns, columns_per_tile);
  const std::int64_t panel_tiles = smaller(row_tiles, at_least_1(budget / ((bytes_per_walk + bytes_per_row) * rows_per_tile)));
  const std::int64_t affordable = (budget / (panel_tiles * rows_per_tile) - bytes_per_row) / bytes_per_walk;
  return {panel_tiles * rows_per_tile, at_least_1(smaller(kSelectBlocks / panel_tiles, smaller(column_tiles / kLeastTilesOfWalk, affordable)))};
}

}   // namespace modalign::cuda
