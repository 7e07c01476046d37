// The CPU tile engine: a block of inner products is made in cache, an epilogue consumes it there, and nothing rows x columns is ever stored.
//
//   RowPanels     row operand, packed  [rows/MR][depth][MR]
//   ColumnPanels  column operand, packed [columns/NR][depth][NR]
//   tile_product  one cache block  tile[r][c] = sum_k row[r][k] column[c][k]     (c runs in packed order)
//   for_each_tile walks a grid of blocks in parallel and hands each to epilogue(Tile)
//   value_product out[r][n] += sum_c tile[r][c] value[c][n]: the form that backward passes and attention need (form d)
//
// A new family writes an epilogue: a functor that gets a Tile (a small row-major block of products, hot in L1/L2) and folds it into what it keeps
// per row or per column. cpu/gram_volume.cpp is the worked example; examples/custom_epilogue builds one outside this repository.
//
// The register block is MR rows x NV native vectors (12 x 2 with AVX-512's 32 registers, 6 x 2 with AVX2's 16); A goes in by broadcast, B by full vectors, so the
// loop does MR NV fused multiply-adds for MR + NV loads. The whole depth is accumulated in registers in one chain (no second pass over the tile): for depth D the
// row panel of MR D elements stays in L1 and the column panels stream from L2 at NR / (MR NV / 2) elements a cycle, a quarter of what L2 gives.
//
// Memory: (rows + columns) x depth elements for the packed operands, one block of kTileRows x tile columns per thread. FLOPs: 2 rows columns depth.
// Accumulation: in T (float for 16-bit and float, double for double), index order k = 0, 1, ...: one order whatever the thread count.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/vec.h"
#include "cpu/parallel.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterRows = 12;
#elif defined(__AVX__)
constexpr int kRegisterRows = 6;
#else
constexpr int kRegisterRows = 4;
#endif
constexpr int kRegisterVectors = 2;

template <class T> constexpr int kRegisterColumns = kRegisterVectors * kVectorLanes<T>;
// Column panels are whole 64-byte lane groups wide, and at least one register block.
template <class T> constexpr int kPanelColumns = kRegisterColumns<T> > kLanes<T> ? kRegisterColumns<T> : kLanes<T>;

constexpr int kTileRows = 96;   // a multiple of every kRegisterRows above: 12, 6, 4

inline std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }
inline std::int64_t minimum(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t maximum(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// 64-byte aligned scratch of one thread, released at the end of its scope.
template <class T>
class Scratch {
 public:
  explicit Scratch(std::int64_t n) : data_(static_cast<T*>(std::aligned_alloc(64, static_cast<std::size_t>(round_up(maximum(n, 1) * sizeof(T), 64))))) {
    if (data_ == nullptr) std::abort();   // a few hundred KB: nothing sensible is left to do
  }
  ~Scratch() { std::free(data_); }
  Scratch(Scratch&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// Hands out pieces of one allocation; with a null base it only counts, so that sizes and pointers come from the same code.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T> T* take(std::int64_t n) {
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += round_up(n * static_cast<std::int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(at);
  }
  std::int64_t used() const { return used_; }

 private:
  char* base_;
  std::int64_t used_ = 0;
};

// ---- packing ------------------------------------------------------------------------------------------------------------------------------------------

// Packed sizes in elements; partial panels are padded with zeros.
inline std::int64_t packed_rows_size(std::int64_t rows, std::int64_t depth) { return round_up(rows, kRegisterRows) * depth; }
template <class T> inline std::int64_t packed_columns_size(std::int64_t columns, std::int64_t depth) { return round_up(columns, kPanelColumns<T>) * depth; }

// L vectors of L lanes, transposed: log2(L) times the first half is zipped with the second.
template <class T>
inline void transpose(Vector<T>* rows) {
  constexpr int L = kVectorLanes<T>;
  using Index = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  Vector<Index> low, high;
  for (int l = 0; l < L; ++l) low[l] = l / 2 + l % 2 * L, high[l] = L / 2 + l / 2 + l % 2 * L;
#pragma GCC unroll 4
  for (int stage = 1; stage < L; stage *= 2) {
    Vector<T> zipped[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      zipped[2 * i] = __builtin_shuffle(rows[i], rows[i + L / 2], low);
      zipped[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + L / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = zipped[i];
  }
}

// `count` <= width rows of length depth (row r at source(r), contiguous T, or nullptr for zeros) into one panel [depth][width]: blocks of L rows and L depth steps are transposed in registers.
template <class T, class Source>
inline void pack_panel(int width, int count, std::int64_t depth, Source source, T* panel) {
  constexpr int L = kVectorLanes<T>;
  for (int r0 = 0; r0 < width; r0 += L) {
    const int here = static_cast<int>(minimum(L, width - r0));
    const T* from[L];
    for (int r = 0; r < L; ++r) from[r] = r0 + r < count ? source(r0 + r) : nullptr;
    std::int64_t k = 0;
    for (; k + L <= depth; k += L) {
      Vector<T> rows[L];
      for (int r = 0; r < L; ++r) rows[r] = from[r] ? load(from[r] + k) : Vector<T>{};
      transpose<T>(rows);
      T* to = panel + k * width + r0;
      const bool whole = here == L || r0 == 0;   // what a step of a narrow panel has too much belongs to the next one, which is stored later
      for (int i = 0; i < L; ++i)
        if (here == L || (whole && i + 1 < L)) store(to + i * width, rows[i]);
        else std::memcpy(to + i * width, &rows[i], here * sizeof(T));
    }
    for (; k < depth; ++k)
      for (int r = 0; r < here; ++r) panel[k * width + r0 + r] = from[r] ? from[r][k] : T(0);
  }
}

// Row `r` of the row panels, contiguous.
template <class T>
inline void unpack_row(const T* row_panels, std::int64_t r, std::int64_t depth, T* out) {
  const T* panel = row_panels + r / kRegisterRows * kRegisterRows * depth + r % kRegisterRows;
  for (std::int64_t k = 0; k < depth; ++k) out[k] = panel[k * kRegisterRows];
}

// ---- the register block -------------------------------------------------------------------------------------------------------------------------------

enum class Into { store, add, subtract };

// c[r][v] (=, +=, -=) sum_k a[k][r] b[k][v] for R rows and NV vectors. a: [depth][a_stride], by_rows: [R][a_stride]; b: [depth][b_stride].
template <class T, int R, bool by_rows = false>
inline void register_block(const T* a, std::int64_t a_stride, const T* b, std::int64_t b_stride, std::int64_t depth, T* c, std::int64_t ldc, Into into) {
  constexpr int L = kVectorLanes<T>;
  Vector<T> sum[R][kRegisterVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kRegisterVectors; ++v) sum[r][v] = Vector<T>{};
#pragma GCC unroll 4   // a four-wide front end has no room for loop counters beside twelve multiply-adds
  for (std::int64_t k = 0; k < depth; ++k) {
    Vector<T> column[kRegisterVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kRegisterVectors; ++v) column[v] = load(b + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector<T> row = broadcast(a[by_rows ? r * a_stride : r]);
#pragma GCC unroll 4
      for (int v = 0; v < kRegisterVectors; ++v) sum[r][v] += row * column[v];
    }
    a += by_rows ? 1 : a_stride;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kRegisterVectors; ++v) {
      T* to = c + r * ldc + v * L;
      store(to, into == Into::store ? sum[r][v] : into == Into::add ? load(to) + sum[r][v] : load(to) - sum[r][v]);
    }
}

// One cache block: tile[r][c], r < round_up(rows, MR), c < columns (a multiple of kPanelColumns), row-major with leading dimension ld >= columns.
// The tile must have room for the padded rows. panel pointers start at a panel boundary.
template <class T>
inline void tile_product(const T* row_panels, std::int64_t rows, const T* column_panels, std::int64_t columns, std::int64_t depth, T* tile, std::int64_t ld) {
  constexpr int MR = kRegisterRows, NR = kRegisterColumns<T>, P = kPanelColumns<T>;
  for (std::int64_t r = 0; r < rows; r += MR)
    for (std::int64_t c = 0; c < columns; c += NR)
      register_block<T, MR>(row_panels + r * depth, MR, column_panels + c / P * P * depth + c % P, P, depth, tile + r * ld + c, ld, Into::store);
}

// The same with the depth in pieces of kDepthPiece, each one chain, that are added in order: for sums that must keep more digits than a chain of hundreds does.
constexpr std::int64_t kDepthPiece = 64;
template <class T>
inline void tile_product_in_pieces(const T* row_panels, std::int64_t rows, const T* column_panels, std::int64_t columns, std::int64_t depth, T* tile, std::int64_t ld) {
  constexpr int MR = kRegisterRows, NR = kRegisterColumns<T>, P = kPanelColumns<T>;
  for (std::int64_t r = 0; r < rows; r += MR)
    for (std::int64_t c = 0; c < columns; c += NR)
      for (std::int64_t k = 0; k < depth; k += kDepthPiece)
        register_block<T, MR>(row_panels + r * depth + k * MR, MR, column_panels + c / P * P * depth + c % P + k * P, P, minimum(kDepthPiece, depth - k), tile + r * ld + c, ld,
                              k ? Into::add : Into::store);
}

// out[r][n] (+=, -=) sum_k left[k][r] value[k][n], r < rows, n < width.
// left: panels [rows/MR][depth][MR] (pack_panel of a tile or of its transpose). value: panels [width/P][depth of the panel = value_depth][P], of which `depth` rows
// starting at value_row are used: so a matrix packed once serves any block of its rows. out: row-major.
template <class T>
inline void value_product(const T* left, std::int64_t rows, std::int64_t depth, const T* value, std::int64_t value_depth, std::int64_t value_row, std::int64_t width,
                          T* out, std::int64_t ldo, Into into) {
  constexpr int MR = kRegisterRows, NR = kRegisterColumns<T>, P = kPanelColumns<T>;
  alignas(64) T edge[MR * NR];
  for (std::int64_t n = 0; n < width; n += NR) {
    const T* b = value + (n / P * value_depth + value_row) * P + n % P;
    for (std::int64_t r = 0; r < rows; r += MR) {
      const T* a = left + r * depth;
      T* to = out + r * ldo + n;
      if (r + MR <= rows && n + NR <= width) {
        register_block<T, MR>(a, MR, b, P, depth, to, ldo, into);
        continue;
      }
      register_block<T, MR>(a, MR, b, P, depth, edge, NR, Into::store);
      for (std::int64_t i = 0; i < minimum(MR, rows - r); ++i)
        for (std::int64_t j = 0; j < minimum(NR, width - n); ++j)
          if (into == Into::subtract) to[i * ldo + j] -= edge[i * NR + j];
          else if (into == Into::add) to[i * ldo + j] += edge[i * NR + j];
          else to[i * ldo + j] = edge[i * NR + j];
    }
  }
}

// The same two forms for operands that are used too rarely to be packed, row-major as they are: row r of a matrix at matrix + r * ld.
//
// tile[r][c] = sum_k left[r][k] column[c][k] for `rows` rows; column panels as in tile_product. The last rows are copied, so that nothing behind them is read.
template <class T>
inline void tile_product_by_rows(const T* left, std::int64_t left_ld, std::int64_t rows, const T* column_panels, std::int64_t columns, std::int64_t depth, T* tile, std::int64_t ld,
                                 T* edge /* [MR * depth] */) {
  constexpr int MR = kRegisterRows, NR = kRegisterColumns<T>, P = kPanelColumns<T>;
  for (std::int64_t r = 0; r < rows; r += MR) {
    const T* a = left + r * left_ld;
    std::int64_t stride = left_ld;
    if (r + MR > rows) {
      for (std::int64_t i = 0; i < MR; ++i)
        if (r + i < rows) std::memcpy(edge + i * depth, a + i * left_ld, depth * sizeof(T));
        else std::memset(edge + i * depth, 0, depth * sizeof(T));
      a = edge, stride = depth;
    }
    for (std::int64_t c = 0; c < columns; c += NR)
      register_block<T, MR, true>(a, stride, column_panels + c / P * P * depth + c % P, P, depth, tile + r * ld + c, ld, Into::store);
  }
}

// out[r][n] += sum_k tile[k][r] value[k][n] for r < rows, n < width, a multiple of kRegisterColumns; turned: of tile[r][k]. The tile is read up to the next multiple of MR.
template <bool turned, class T>
inline void add_tile_times_rows(const T* tile, std::int64_t ld, std::int64_t rows, std::int64_t depth, const T* value, std::int64_t value_ld, std::int64_t width, T* out, std::int64_t ldo) {
  constexpr int MR = kRegisterRows, NR = kRegisterColumns<T>;
  alignas(64) T edge[MR * NR];
  for (std::int64_t n = 0; n < width; n += NR)
    for (std::int64_t r = 0; r < rows; r += MR) {
      T* to = out + r * ldo + n;
      const T* left = tile + r * (turned ? ld : 1);
      if (r + MR <= rows) {
        register_block<T, MR, turned>(left, ld, value + n, value_ld, depth, to, ldo, Into::add);
        continue;
      }
      register_block<T, MR, turned>(left, ld, value + n, value_ld, depth, edge, NR, Into::store);
      for (std::int64_t i = 0; i < rows - r; ++i)
        for (int j = 0; j < NR; ++j) to[i * ldo + j] += edge[i * NR + j];
    }
}

// One row of a value operand (length width) into its panels: value[n / P][row][n % P]. Padding columns become zero.
template <class T>
inline void pack_value_row(const T* source, std::int64_t width, std::int64_t value_depth, std::int64_t row, T* value) {
  constexpr int P = kPanelColumns<T>;
  for (std::int64_t n = 0; n < width; n += P) {
    T* to = value + (n / P * value_depth + row) * P;
    const std::int64_t count = minimum(P, width - n);
    for (std::int64_t j = 0; j < count; ++j) to[j] = source[n + j];
    for (std::int64_t j = count; j < P; ++j) to[j] = 0;
  }
}
template <class T> inline std::int64_t packed_value_size(std::int64_t depth, std::int64_t width) { return round_up(width, kPanelColumns<T>) * depth; }

// A row-major block [rows][ld] as the left operand of value_product: by rows (left[k][r] = tile[r][k]) ...
template <class T>
inline void pack_tile_rows(const T* tile, std::int64_t ld, std::int64_t rows, std::int64_t depth, T* left) {
  constexpr int MR = kRegisterRows;
  for (std::int64_t r = 0; r < rows; r += MR)
    pack_panel(MR, static_cast<int>(minimum(MR, rows - r)), depth, [&](int i) { return tile + (r + i) * ld; }, left + r * depth);
}
// ... or by columns (left[k][c] = tile[k][c]): out then gets one row per tile column.
template <class T>
inline void pack_tile_columns(const T* tile, std::int64_t ld, std::int64_t columns, std::int64_t depth, T* left) {
  constexpr int MR = kRegisterRows;
  for (std::int64_t c = 0; c < columns; c += MR) {
    T* to = left + c * depth;
    const std::int64_t count = minimum(MR, columns - c);
    for (std::int64_t k = 0; k < depth; ++k) {
      for (std::int64_t i = 0; i < count; ++i) to[k * MR + i] = tile[k * ld + c + i];
      for (std::int64_t i = count; i < MR; ++i) to[k * MR + i] = 0;
    }
  }
}

// ---- the walk -----------------------------------------------------------------------------------------------------------------------------------------

// The packed operands of a problem; columns counts the padding and is a multiple of kPanelColumns, as tile_columns is.
template <class T>
struct PackedPair {
  const T* row_panels;
  std::int64_t rows;
  const T* column_panels;
  std::int64_t columns, depth, tile_columns;
  T* products = nullptr;   // [tiles][rows][tile_columns]: where one pass leaves the products for another that then need not make them again

  std::int64_t tiles() const { return (columns + tile_columns - 1) / tile_columns; }
  T* kept(std::int64_t tile, std::int64_t row) const { return products + (tile * rows + row) * tile_columns; }
};

template <class T>
struct Tile {
  std::int64_t row, rows;         // rows [row, row + rows)
  std::int64_t column, columns;   // packed columns [column, column + columns); a multiple of kPanelColumns, padding included
  T* data;                        // [rows][ld], the epilogue may overwrite it
  std::int64_t ld;
};

// All blocks of rows x columns, column block by column block (its panels stay in L2 while the row panels stream past), in parallel.
// make_epilogue() is called once per thread chunk, so that an epilogue may own scratch memory.
template <class T, class MakeEpilogue>
inline void for_each_tile(const T* row_panels, std::int64_t rows, const T* column_panels, std::int64_t columns, std::int64_t depth, std::int64_t tile_columns,
                          const Parallel& parallel, MakeEpilogue make_epilogue) {
  columns = round_up(columns, kPanelColumns<T>);
  const std::int64_t row_blocks = (rows + kTileRows - 1) / kTileRows, column_blocks = (columns + tile_columns - 1) / tile_columns;
  parallel_for(parallel, 0, row_blocks * column_blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> data(kTileRows * tile_columns);
    auto epilogue = make_epilogue();
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t row = block % row_blocks * kTileRows, column = block / row_blocks * tile_columns;
      Tile<T> tile{row, minimum(kTileRows, rows - row), column, minimum(tile_columns, columns - column), data, tile_columns};
      tile_product(row_panels + row * depth, tile.rows, column_panels + column * depth, tile.columns, depth, tile.data, tile.ld);
      epilogue(tile);
    }
  });
}

}  // inline namespace
}  // namespace modalign::cpu
