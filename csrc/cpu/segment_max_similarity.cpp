// Largest product of every segment of rows with every candidate, forward and backward; compiled once per instruction set.
//
// Maths      ops/segment_max_similarity.h. (Region-attribute mapping: ViLLA, ICCV 2023; maxima over tokens: FILIP, ICLR 2022, FDT, CVPR 2023.)
// Forward    segments are dealt to chunks of about kChunkRows rows, and a task is a chunk times a block of candidates. It walks its rows tile by tile and keeps, for each
//            candidate, the best product of the segment in progress and its row; a segment may span tiles, a tile may hold many segments. 2 R A D FLOPs; reads
//            (R + A) D, writes S A. Memory beyond in- and outputs: the packed operands, (R + A) D.
// Backward   a segment owns its rows of dx and a block of candidates its rows of dy, a piece of kDepth elements at a time, so that what is gathered stays in cache.
//            4 S A D FLOPs. Memory: (R + A) D widened, for half types as much again for the sums.
// Precision  accumulation in float (double for double); indices are decided on those sums, before the value is rounded to a half type.
// Order      products have one order of sums wherever their tile begins, a maximum has none, gradients are summed in ascending order: equal bits for any threads.

#include "cpu/segment_max_similarity.h"

#include <limits>

#include "cpu/pack_rows.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {
namespace {

constexpr std::int64_t kChunkRows = 4 * kTileRows;
template <class T> constexpr std::int64_t kTileColumns = 8 * kLanes<T>;
constexpr std::int64_t kDepth = 128;         // elements of a row that a task of the backward pass sums
constexpr std::int64_t kBlockColumns = 128;   // candidates that share the rows that they gather
constexpr std::int64_t kNone = -1;

template <class T> using Integer = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;   // as wide as T, for selects lane by lane

std::int64_t offset(const SegmentMaxProblem& p, std::int64_t s) { return p.offsets.data[s * p.offsets.stride]; }

// ---- forward ------------------------------------------------------------------------------------------------------------------------------------------

template <class T>
struct Operands {
  T* row_panels;
  T* column_panels;
  Operands(const SegmentMaxProblem& p, Arena& arena)
      : row_panels(arena.take<T>(packed_rows_size(p.R, p.D))), column_panels(arena.take<T>(packed_columns_size<T>(p.A, p.D))) {}
};

// The first segment that begins at or behind `row`.
std::int64_t segment_from(const SegmentMaxProblem& p, std::int64_t row) {
  std::int64_t low = 0, high = p.S;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (offset(p, middle) < row) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Rows `row`, row + 1, ... of products into the best of a segment and where it stands; `fresh`: they are the segment's first.
template <class T>
void fold_rows(const T* products, std::int64_t ld, std::int64_t row, std::int64_t rows, std::int64_t columns, bool fresh, T* best, Integer<T>* best_row) {
  constexpr int L = kVectorLanes<T>;
  for (std::int64_t c = 0; c < columns; c += L) {
    Vector<T> top = load(fresh ? products + c : best + c);
    Vector<Integer<T>> at = fresh ? broadcast(static_cast<Integer<T>>(row)) : load(best_row + c);
    for (std::int64_t i = fresh; i < rows; ++i) {
      const Vector<T> z = load(products + i * ld + c);
      const auto better = (z > top) | ((z != z) & (top == top));
      top = better ? z : top;
      at = better ? broadcast(static_cast<Integer<T>>(row + i)) : at;
    }
    store(best + c, top);
    store(best_row + c, at);
  }
}

template <class T>
void forward(const SegmentMaxProblem& p, const SegmentMaxForward& to, const Operands<T>& operands, const Parallel& parallel) {
  pack_rows<kRegisterRows>(p.dtype, p.x, p.R, p.D, operands.row_panels, parallel);
  pack_rows<kPanelColumns<T>>(p.dtype, p.y, p.A, p.D, operands.column_panels, parallel);
  const std::int64_t chunks = maximum(1, minimum(p.S, p.R / kChunkRows)), blocks = (p.A + kTileColumns<T> - 1) / kTileColumns<T>;
  parallel_for(parallel, 0, chunks * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t ld = kTileColumns<T>;
    Scratch<T> tile(kTileRows * ld), best(ld);
    Scratch<Integer<T>> best_row(ld);
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t chunk = task % chunks, column = task / chunks * ld, count = minimum(ld, p.A - column), columns = round_up(count, kPanelColumns<T>);
      const std::int64_t stop = chunk + 1 < chunks ? segment_from(p, (chunk + 1) * p.R / chunks) : p.S;
      std::int64_t tile_row = 0, tile_end = 0;
      for (std::int64_t s = segment_from(p, chunk * p.R / chunks); s < stop; ++s) {
        const std::int64_t first = offset(p, s), last = offset(p, s + 1);
        for (std::int64_t row = first; row < last;) {
          if (row >= tile_end) {   // the next tile, from the panel that holds the row
            tile_row = row / kRegisterRows * kRegisterRows;
            tile_end = minimum(tile_row + kTileRows, offset(p, stop));
            tile_product<T>(operands.row_panels + tile_row * p.D, tile_end - tile_row, operands.column_panels + column * p.D, columns, p.D, tile, ld);
          }
          const std::int64_t rows = minimum(last, tile_end) - row;
          fold_rows<T>(tile + (row - tile_row) * ld, ld, row, rows, columns, row == first, best, best_row);
          row += rows;
        }
        if (first == last)
          for (std::int64_t c = 0; c < count; ++c) best[c] = -std::numeric_limits<T>::infinity(), best_row[c] = kNone;
        store_row<T>(p.dtype, to.values, s * p.A + column, count, best);
        for (std::int64_t c = 0; c < count; ++c) to.indices[s * p.A + column + c] = best_row[c];
      }
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------------------------------------------

// Rows of dtype, widened, [rows, D].
template <class T>
void widen_rows(Scalar dtype, const BatchedRows& from, std::int64_t rows, std::int64_t D, T* to, const Parallel& parallel) {
  parallel_for(parallel, 0, rows, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) load_row<T>(dtype, from.data, r * from.row_stride, from.element_stride, D, to + r * D);
  });
}

template <class T>
struct Gathered {   // one side's gradient: what it gathers, and the sums where they are not the output itself
  T* source = nullptr;
  T* sums = nullptr;
  Gathered(bool need, Scalar dtype, std::int64_t source_rows, std::int64_t rows, std::int64_t D, Arena& arena) {
    if (!need) return;
    source = arena.take<T>(source_rows * D);
    if (size_of(dtype) == 2) sums = arena.take<T>(rows * D);
  }
};

template <class T>
struct BackwardBuffers {
  Gathered<T> x, y;
  BackwardBuffers(const SegmentMaxProblem& p, bool need_x, bool need_y, Arena& arena)
      : x(need_x, p.dtype, p.A, p.R, p.D, arena), y(need_y, p.dtype, p.R, p.A, p.D, arena) {}
};

template <class T>
struct Sums {   // rows [first, first + rows) of the sums, elements [from, from + count)
  Scalar dtype;
  void* result;
  T* data;
  std::int64_t D, from, count;

  Sums(Scalar dtype, void* result, T* sums, std::int64_t D, std::int64_t piece)
      : dtype(dtype), result(result), data(sums ? sums : static_cast<T*>(result)), D(D), from(piece * kDepth), count(minimum(kDepth, D - from)) {}
  void clear(std::int64_t first, std::int64_t last) const {
    for (std::int64_t r = first; r < last; ++r) std::memset(data + r * D + from, 0, count * sizeof(T));
  }
  void add(std::int64_t r, T weight, const T* source, std::int64_t source_row) const { add_scaled(data + r * D + from, weight, source + source_row * D + from, count); }
  void finish(std::int64_t first, std::int64_t last) const {
    if (data == result) return;
    for (std::int64_t r = first; r < last; ++r) store_row<T>(dtype, result, r * D + from, count, data + r * D + from);
  }
};

template <class T>
void backward(const SegmentMaxProblem& p, const SegmentMaxBackward& to, const BackwardBuffers<T>& buffers, const Parallel& parallel) {
  const std::int64_t pieces = (p.D + kDepth - 1) / kDepth;
  const auto load_grad = [&](std::int64_t s, std::int64_t a, std::int64_t count, T* line) {
    load_row<T>(p.dtype, to.grad, s * to.grad_row_stride + a * to.grad_column_stride, to.grad_column_stride, count, line);
  };
  if (to.grad_x) {
    widen_rows(p.dtype, p.y, p.A, p.D, buffers.x.source, parallel);
    parallel_for(parallel, 0, pieces * p.S, 4, [&](std::int64_t begin, std::int64_t end) {
      Scratch<T> line(p.A);
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t s = task % p.S;
        const Sums<T> sums(p.dtype, to.grad_x, buffers.x.sums, p.D, task / p.S);
        load_grad(s, 0, p.A, line);
        sums.clear(offset(p, s), offset(p, s + 1));
        for (std::int64_t a = 0; a < p.A; ++a)
          if (const std::int64_t r = to.indices[s * p.A + a]; r != kNone) sums.add(r, line[a], buffers.x.source, a);
        sums.finish(offset(p, s), offset(p, s + 1));
      }
    });
  }
  if (to.grad_y) {
    widen_rows(p.dtype, p.x, p.R, p.D, buffers.y.source, parallel);
    const std::int64_t blocks = (p.A + kBlockColumns - 1) / kBlockColumns;
    parallel_for(parallel, 0, pieces * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
      T line[kBlockColumns];
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t first = task % blocks * kBlockColumns, last = minimum(first + kBlockColumns, p.A);
        const Sums<T> sums(p.dtype, to.grad_y, buffers.y.sums, p.D, task / blocks);
        sums.clear(first, last);
        for (std::int64_t s = 0; s < p.S; ++s) {
          load_grad(s, first, last - first, line);
          for (std::int64_t a = first; a < last; ++a)
            if (const std::int64_t r = to.indices[s * p.A + a]; r != kNone) sums.add(a, line[a - first], buffers.y.source, r);
        }
        sums.finish(first, last);
      }
    });
  }
}

// ---- entry points -------------------------------------------------------------------------------------------------------------------------------------

std::int64_t workspace_bytes(const SegmentMaxProblem& p) {
  return with_real(p.dtype, [&](auto real) {
    Arena arena(nullptr);
    Operands<decltype(real)>(p, arena);
    return arena.used();
  });
}

void run_forward(const SegmentMaxProblem& p, const SegmentMaxForward& to, void* workspace, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) {
    Arena arena(workspace);
    forward(p, to, Operands<decltype(real)>(p, arena), parallel);
  });
}

std::int64_t backward_workspace_bytes(const SegmentMaxProblem& p, bool need_x, bool need_y) {
  return with_real(p.dtype, [&](auto real) {
    Arena arena(nullptr);
    BackwardBuffers<decltype(real)>(p, need_x, need_y, arena);
    return arena.used();
  });
}

void run_backward(const SegmentMaxProblem& p, const SegmentMaxBackward& to, void* workspace, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) {
    Arena arena(workspace);
    backward(p, to, BackwardBuffers<decltype(real)>(p, to.grad_x != nullptr, to.grad_y != nullptr, arena), parallel);
  });
}

}  // namespace

extern const SegmentMaxKernels kSegmentMaxKernels;
const SegmentMaxKernels kSegmentMaxKernels = {workspace_bytes, run_forward, backward_workspace_bytes, run_backward};

}  // inline namespace
}  // namespace modalign::cpu
