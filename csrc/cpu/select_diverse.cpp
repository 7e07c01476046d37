// Max-min diversity: farthest tokens on the sphere; compiled once per instruction set.
//
// Maths      ops/select_diverse.h. (Alvar et al., "DivPrune", CVPR 2025.)
// First      the largest cosine of every token with another: tiles of rows and of columns from the diagonal on, each product is made once and counts for its row and its column. kTasks tasks take
//            rows in turn, so that a triangle is dealt out evenly; each has maxima of its own, which are joined. N^2 D FLOPs, half of the matrix's 2 N^2 D.
// Then       a step folds the cosines of the token taken last into the largest cosine of every token with those taken, and takes the smallest. Cosines come from where the first pass left them,
//            where that is within the caller's bytes and pays (the upper half of the matrix), else they are made again, 2 N D FLOPs a step.
// Batches    small items one a task, large ones one after the other with tasks inside.
// Memory     rows and panels, 2 N D, kTasks N maxima, the cosines within the bytes given.
// Order      maxima have no order, products one order of sums, ties go to the lower index: equal bits for any threads. (Whether cosines are kept may show in near ties.)

#include "cpu/select_diverse.h"

#include "cpu/token_rows.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {
namespace {

template <class T> constexpr std::int64_t kTileColumns = 8 * kLanes<T>;
constexpr std::int64_t kTasks = 32, kSmallItem = 4 << 20;   // bytes of an item that is left to one task
template <class T> constexpr T kNone = -std::numeric_limits<T>::infinity();
template <class T> constexpr T kTaken = std::numeric_limits<T>::infinity();
template <class T> constexpr T kBroken = std::numeric_limits<T>::max();   // no cosine: taken when nothing else is left

// Where the columns begin that a row's block has: the upper half of the matrix of cosines, block by block of kTileRows rows.
template <class T> std::int64_t first_column(std::int64_t row) { return row / kTileRows * kTileRows / kPanelColumns<T> * kPanelColumns<T>; }

template <class T>
struct UpperHalf {
  std::int64_t columns;   // with padding

  std::int64_t width(std::int64_t row) const { return columns - first_column<T>(row); }
  std::int64_t blocks_before(std::int64_t blocks) const {
    std::int64_t elements = 0;
    for (std::int64_t block = 0; block < blocks; ++block) elements += kTileRows * width(block * kTileRows);
    return elements;
  }
  std::int64_t elements() const { return blocks_before((columns + kTileRows - 1) / kTileRows); }
};

template <class T>
struct ItemBuffers {
  UpperHalf<T> half;
  std::int64_t columns;      // tokens with padding
  bool looks_at_all;         // whether all pairs are looked at
  std::int64_t cosine_elements;
  std::int64_t* blocks;      // where a block of rows begins among the cosines
  T *rows, *column_panels, *scales, *closest, *maxima, *cosines;

  // `cosines`: what the caller has for them, in memory of its own, as both together would be too large for an allocator to keep.
  ItemBuffers(const DiverseProblem& p, std::int64_t cosine_bytes, Arena& arena, void* cosines) : half{round_up(p.N, kPanelColumns<T>)}, columns(half.columns) {
    const bool fits = half.elements() * static_cast<std::int64_t>(sizeof(T)) <= cosine_bytes;
    looks_at_all = p.starts == 0 || (fits && 16 * p.n >= p.N);   // a matrix of products goes ten times faster than products with one row
    cosine_elements = looks_at_all && fits ? half.elements() : 0;
    blocks = arena.take<std::int64_t>(columns / kTileRows + 1);
    rows = arena.take<T>(p.N * p.D);
    column_panels = arena.take<T>(columns * p.D);
    scales = arena.take<T>(columns);
    closest = arena.take<T>(columns);
    maxima = arena.take<T>(looks_at_all ? kTasks * columns : 0);
    this->cosines = cosine_elements ? static_cast<T*>(cosines) : nullptr;
    if (cosines)
      for (std::int64_t block = 0, at = 0; block <= columns / kTileRows; ++block) blocks[block] = at, at += kTileRows * half.width(block * kTileRows);
  }
  // The cosines of row i with the columns from first_column(i) on.
  T* cosines_of(std::int64_t i) const { return cosines + blocks[i / kTileRows] + i % kTileRows * half.width(i); }
};

template <class T>
void pack(const DiverseProblem& p, std::int64_t b, std::int64_t tokens, const ItemBuffers<T>& buffers, const Parallel& parallel) {
  constexpr std::int64_t P = kPanelColumns<T>;
  parallel_for(parallel, 0, (tokens + P - 1) / P, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t panel = begin; panel < end; ++panel) {
      const std::int64_t first = panel * P;
      const int here = static_cast<int>(minimum(P, tokens - first));
      for (int r = 0; r < P; ++r)
        buffers.scales[first + r] = r < here ? load_token<T>(p.dtype, p.features.data, b * p.features.batch_stride + (first + r) * p.features.row_stride, p.features.element_stride, p.D,
                                                             buffers.rows + (first + r) * p.D)
                                             : T(1);
      pack_panel(static_cast<int>(P), here, p.D, [&](int r) { return buffers.rows + (first + r) * p.D; }, buffers.column_panels + first * p.D);
    }
  });
}

// The largest cosine of every token with another to buffers.closest, and the cosines to where they are kept.
template <class T>
void look_at_all(const DiverseProblem& p, std::int64_t tokens, const ItemBuffers<T>& buffers, const Parallel& parallel) {
  constexpr std::int64_t L = kVectorLanes<T>, ld = kTileColumns<T>;
  const std::int64_t columns = round_up(tokens, kPanelColumns<T>), blocks = (tokens + kTileRows - 1) / kTileRows, tasks = minimum(kTasks, blocks);
  parallel_for(parallel, 0, tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> panels(kTileRows * p.D), tile(kTileRows * ld), line(kTileRows * L);
    for (std::int64_t task = begin; task < end; ++task) {
      T* const most = buffers.maxima + task * buffers.columns;
      for (std::int64_t c = 0; c < columns; ++c) most[c] = kNone<T>;
      for (std::int64_t block = task; block < blocks; block += tasks) {
        const std::int64_t row = block * kTileRows, rows = minimum(kTileRows, tokens - row);
        pack_tile_rows<T>(buffers.rows + row * p.D, p.D, rows, p.D, panels);
        for (std::int64_t i = 0; i < rows * L; ++i) line[i] = kNone<T>;
        for (std::int64_t column = first_column<T>(row); column < columns; column += ld) {
          const std::int64_t width = minimum(ld, columns - column);
          tile_product<T>(panels, rows, buffers.column_panels + column * p.D, width, p.D, tile, ld);
          for (std::int64_t i = 0; i < rows; ++i) {
            T* const z = tile + i * ld;
            const Vector<T> scale = broadcast(buffers.scales[row + i]);
            for (std::int64_t c = 0; c < width; c += L) store(z + c, load(z + c) * load(buffers.scales + column + c) * scale);
            if (buffers.cosines) std::memcpy(buffers.cosines_of(row + i) + column - first_column<T>(row), z, width * sizeof(T));
            for (std::int64_t c = maximum(0, tokens - column); c < width; ++c) z[c] = kNone<T>;
            if (row + i >= column && row + i < column + width) z[row + i - column] = kNone<T>;
            Vector<T> of_row = load(line + i * L);
            for (std::int64_t c = 0; c < width; c += L) {
              const Vector<T> cosine = load(z + c);
              of_row = larger<T>(cosine, of_row);
              store(most + column + c, larger<T>(cosine, load(most + column + c)));
            }
            store(line + i * L, of_row);
          }
        }
        for (std::int64_t i = 0; i < rows; ++i)
          for (std::int64_t l = 0; l < L; ++l)
            if (line[i * L + l] > most[row + i]) most[row + i] = line[i * L + l];
      }
    }
  });
  for (std::int64_t c = 0; c < tokens; ++c) {
    T most = kNone<T>;
    for (std::int64_t task = 0; task < tasks; ++task) most = buffers.maxima[task * buffers.columns + c] > most ? buffers.maxima[task * buffers.columns + c] : most;
    buffers.closest[c] = most;
  }
}

// The cosines of token s folded into the closest of all.
template <class T>
void fold(const DiverseProblem& p, std::int64_t s, std::int64_t tokens, const ItemBuffers<T>& buffers, const Parallel& parallel) {
  T* const closest = buffers.closest;
  const auto meet = [&](std::int64_t j, T cosine) { closest[j] = cosine > closest[j] ? cosine : closest[j]; };
  if (buffers.cosines) {
    const std::int64_t here = first_column<T>(s);
    for (std::int64_t j = 0; j < here; ++j) meet(j, buffers.cosines_of(j)[s - first_column<T>(j)]);
    const T* const own = buffers.cosines_of(s) - here;
    for (std::int64_t j = here; j < tokens; ++j) meet(j, own[j]);
    return;
  }
  parallel_for(parallel, 0, tokens, 256, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t j = begin; j < end; ++j) meet(j, dot<T>(buffers.rows + s * p.D, buffers.rows + j * p.D, p.D) * buffers.scales[j] * buffers.scales[s]);
  });
}

template <class T>
std::int64_t farthest(const T* closest, std::int64_t tokens) {
  std::int64_t best = 0;
  for (std::int64_t i = 1; i < tokens; ++i)
    if (closest[i] < closest[best]) best = i;
  return best;
}

template <class T>
void select_item(const DiverseProblem& p, std::int64_t b, const DiverseResult& to, const ItemBuffers<T>& buffers, const Parallel& parallel) {
  const std::int64_t tokens = p.lengths ? p.lengths[b] : p.N;
  T* const closest = buffers.closest;
  const auto clear = [&](bool all) {
    for (std::int64_t i = 0; i < tokens; ++i)
      if (buffers.scales[i] != buffers.scales[i]) closest[i] = kBroken<T>;
      else if (all) closest[i] = kNone<T>;
  };
  pack<T>(p, b, tokens, buffers, parallel);
  if (buffers.looks_at_all) look_at_all<T>(p, tokens, buffers, parallel);
  std::int64_t next = -1;
  if (p.starts == 0) {
    clear(false);
    next = farthest<T>(closest, tokens);
  }
  clear(true);
  for (std::int64_t t = 0; t < p.n; ++t) {
    if (t < p.starts) next = p.start[b * p.starts + t];
    else if (t > 0) next = farthest<T>(closest, tokens);
    const T cosine = closest[next], radius = cosine == kBroken<T> ? std::numeric_limits<T>::quiet_NaN() : 1 - cosine;   // of the first: infinity
    to.indices[b * p.n + t] = next;
    static_cast<T*>(to.radii)[b * p.n + t] = radius < 0 ? 0 : radius;
    closest[next] = kTaken<T>;
    fold<T>(p, next, tokens, buffers, parallel);
  }
}

template <class T>
DiverseWorkspace item_workspace(const DiverseProblem& p, std::int64_t cosine_bytes) {
  Arena arena(nullptr);
  const ItemBuffers<T> buffers(p, cosine_bytes, arena, nullptr);
  return {arena.used(), buffers.cosine_elements * static_cast<std::int64_t>(sizeof(T))};
}
bool one_a_task(const DiverseProblem& p, const DiverseWorkspace& item) { return item.bytes + item.cosine_bytes <= kSmallItem && p.B > 1; }

template <class T>
void select(const DiverseProblem& p, const DiverseResult& to, std::int64_t cosine_bytes, void* workspace, void* cosines, const Parallel& parallel) {
  const DiverseWorkspace item = item_workspace<T>(p, cosine_bytes);
  if (one_a_task(p, item)) {
    parallel_for(parallel, 0, p.B, 1, [&](std::int64_t begin, std::int64_t end) {
      Scratch<char> own(item.bytes), own_cosines(item.cosine_bytes);
      Arena arena(own);
      const ItemBuffers<T> buffers(p, cosine_bytes, arena, own_cosines);
      for (std::int64_t b = begin; b < end; ++b) select_item<T>(p, b, to, buffers, kSerial);
    });
    return;
  }
  Arena arena(workspace);
  const ItemBuffers<T> buffers(p, cosine_bytes, arena, cosines);
  for (std::int64_t b = 0; b < p.B; ++b) select_item<T>(p, b, to, buffers, parallel);
}

// ---- entry points -------------------------------------------------------------------------------------------------------------------------------------

DiverseWorkspace workspace(const DiverseProblem& p, std::int64_t cosine_bytes) {
  return with_real(p.dtype, [&](auto real) {
    const DiverseWorkspace item = item_workspace<decltype(real)>(p, cosine_bytes);
    return one_a_task(p, item) ? DiverseWorkspace{0, 0} : item;
  });
}

void run_select(const DiverseProblem& p, const DiverseResult& to, std::int64_t cosine_bytes, void* space, void* cosines, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) { select<decltype(real)>(p, to, cosine_bytes, space, cosines, parallel); });
}

}  // namespace

extern const DiverseKernels kDiverseKernels;
const DiverseKernels kDiverseKernels = {workspace, run_select};

}  // inline namespace
}  // namespace modalign::cpu
