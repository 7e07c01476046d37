/// @file tile.cuh
/// @brief The CUDA tile engine: a tile of inner products is made, an epilogue consumes it on the spot.
///
/// A *back end* multiplies a tile of row lines with a tile of column lines over the depth K and deposits the products in shared memory:
///
///   FmaBackend<T, RowMajor, ColumnMajor>
///       T = float (tiles of 128 x 128) or double (64 x 64) on the ordinary units, accumulated in T.
///   MmaBackend<Half, Parts, RowMajor, ColumnMajor>
///       Half = bf16 or f16 on the tensor cores, accumulated in fp32, 128 x 128. Parts = 1: the operands are Half. Parts = 2: each operand is the sum
///       of two bf16 planes, x = hi + lo, hi = bf16(x), lo = bf16(x - hi); lo.hi + hi.lo + hi.hi is added, small products first (error about
///       2^-15 |x| |y|: "high" precision for fp32, exact operands for f16).
///
/// The Major of an operand says which index runs along its contiguous direction: the contraction index (`Major::depth`) or the line (`Major::line`).
/// Any sizes, strides and alignments work: 16-byte loads where `Operand::vectors` allows them, single elements elsewhere, zeros beyond the edges.
///
/// TileWalk<Backend, Epilogue> is the kernel. A block walks a rectangle of tiles, rows outside, columns inside, and calls the epilogue:
///
///   struct Epilogue {
///     static constexpr int kSharedBytes;   // its own shared memory, behind the tile
///     static constexpr int kMinBlocks;     // 2, or 1 where State holds many registers
///     struct State {};                     // what a thread keeps in registers while it walks
///     void begin(State&, const TileRange&, batch, walk, shared_offset) const;                        // a new row tile
///     void consume(State&, Shared<Real> tile, const TileRange&, batch, walk, shared_offset) const;   // tile[row * kPitch + column] is complete
///     void end(State&, const TileRange&, batch, walk, shared_offset) const;                          // the row tile has met all its columns
///   };
///
/// All threads of the block call them together; the engine puts a barrier between deposit and consume and after consume. Rows >= range.rows and
/// columns >= range.columns of the tile hold zeros. Epilogues of this file show the forms that the families use:
///   (a) StoreTile: out = factor * product + addend; the addend may be the output (accumulate-into).
///   (b) Square-sum over the m adjacent columns of a candidate: PairForwardEpilogue in gram_volume.cuh. A column tile holds
///       columns_per_tile = floor(kColumns / m) * m columns, so that no candidate straddles tiles.
///   (c) LogSumExpTile: online statistics of rows and columns. A walk owns the row slots (row, column walk) and the column slots (row walk, column);
///       there are at most kMaxSlots walks along either side whatever the size, and FoldLogSumExp adds the slots in order. No atomics, so equal bits
///       from run to run.
///   (d) ValueProductTile: f(tile) times value rows, accumulated in registers along the walk (Backend::multiply_values).
///
/// Memory: float and tensor-core tiles take 68 KB of shared memory (the pipeline's buffers lie under the tile), double tiles 33 KB. 256 threads.
/// FLOPs of one product: 2 rows columns K (tensor core, Parts = 2: three times that). Bytes: each operand is read once per tile of the other side;
/// consecutive blocks share column lines and sweep kRaster row walks, so that the second level cache serves most of it.
/// Order of accumulation: K ascending in every accumulator, independent of the grid: equal bits from run to run.
#pragma once

#include <cstdint>
#include <limits>

#include "common/simt.h"
#include "ops/scalar.h"

namespace modalign::cuda {

using namespace modalign::simt;

constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / kWarpSize;
constexpr int kMaxSlots = 64;   // partial results along one side of a problem, whatever its size
constexpr int kRaster = 16;     // row walks that share a column of tiles before the next column begins

// ------------------------------------------------------------------------------------------------------------------------------------------- numbers
template <class T> struct RealOf {
  using type = float;
};
template <> struct RealOf<double> {
  using type = double;
};
template <class T> using real_of = typename RealOf<T>::type;

template <class Real> inline constexpr Real kInfinity = std::numeric_limits<Real>::infinity();   // a constant: device code may not call the function

template <class T> MODALIGN_DEVICE real_of<T> widen(T x) {
  if constexpr (sizeof(T) == 8) return x;
  else return to_float(x);
}
template <class T> MODALIGN_DEVICE T narrow(real_of<T> x) {
  if constexpr (sizeof(T) == 8) return x;
  else return from_float<T>(x);
}

// The sum over the warp, the same bits in every lane.
template <class Real> MODALIGN_DEVICE Real warp_sum(Real x) {
  MODALIGN_UNROLL
  for (int step = kWarpSize / 2; step > 0; step /= 2) x += shuffle_xor(x, step);
  return x;
}

template <class T> MODALIGN_HOST_DEVICE constexpr T round_up(T a, T b) { return (a + b - 1) / b * b; }
MODALIGN_HOST_DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }

// ------------------------------------------------------------------------------------------------------------------------------------------ operands
enum class Major { depth, line };

// Element (batch, line, k) lies at data[batch * batch_stride + line * line_stride + k * depth_stride]; the second plane (Parts = 2) plane_stride
// elements further.
template <class T> struct Operand {
  const T* data;
  std::int64_t batch_stride, line_stride, depth_stride;
  std::int64_t plane_stride = 0;
  bool vectors = false;   // every 16-byte piece of the contiguous direction that a tile starts at is aligned
};

template <class T>
inline Operand<T> make_operand(Major major, const T* data, std::int64_t batch_stride, std::int64_t line_stride, std::int64_t depth_stride,
                               std::int64_t plane_stride = 0) {
  constexpr std::int64_t kVector = 16 / sizeof(T);
  const std::int64_t along = major == Major::depth ? depth_stride : line_stride;
  const std::int64_t across = major == Major::depth ? line_stride : depth_stride;
  const bool vectors = along == 1 && reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && across % kVector == 0 && batch_stride % kVector == 0 &&
                       plane_stride % kVector == 0;
  return {data, batch_stride, line_stride, depth_stride, plane_stride, vectors};
}

struct TileRange {
  std::int64_t row_begin, column_begin, row_tile, column_tile;
  int rows, columns;   // lines of the tile that exist
};

// ----------------------------------------------------------------------------------------------------------------------------- ordinary multiply-add
// 256 threads as 16 x 16; a thread owns 2 x 2 pieces of V x V accumulators (V = elements in 16 bytes). Slabs of 8 along K lie K-major in two shared
// buffers; the next slab travels through registers while the present one is multiplied.
template <class T, Major RowMajor, Major ColumnMajor> struct FmaBackend {
  using Source = T;
  using Real = T;
  static constexpr int kMinBlocks = 2;
  static constexpr int kVector = 16 / int(sizeof(T));
  static constexpr int kMicro = 2 * kVector;
  static constexpr int kRows = 16 * kMicro, kColumns = kRows, kDepth = 8;
  static constexpr int kPitch = kRows + (sizeof(T) == 8 ? 2 : 8);   // of the deposited tile
  static constexpr int kLinePitch = kRows + kVector;                // of a slab: stores of a depth-major pack then meet different banks
  static constexpr int kSlab = kDepth * kLinePitch;
  static constexpr int kTileBytes = kRows * kPitch * int(sizeof(T));
  static constexpr int kPipelineBytes = 4 * kSlab * int(sizeof(T));
  static constexpr int kSharedBytes = larger(kTileBytes, kPipelineBytes);
  static constexpr int kValueBytes = 2 * kSlab * int(sizeof(T));   // more, behind the tile, for multiply_values
  static_assert(kRows * kDepth / kVector == kTileThreads, "one 16-byte piece of each operand per thread and slab");

  struct Accumulators {
    T value[kMicro][kMicro];
  };

  static MODALIGN_DEVICE void clear(Accumulators& sum) {
    MODALIGN_UNROLL
    for (int i = 0; i < kMicro; ++i) {
      MODALIGN_UNROLL
      for (int j = 0; j < kMicro; ++j) sum.value[i][j] = 0;
    }
  }

  // This thread's 16-byte piece of every slab of an operand; moves on by one slab with each fetch.
  template <Major major> struct Cursor {
    static constexpr int kPieces = major == Major::depth ? kDepth / kVector : kRows / kVector;
    Global<const T> from;   // the next piece
    int left, lines;        // steps of K from it to the edge, lines of it that exist; neither may be positive

    static MODALIGN_DEVICE int line() { return major == Major::depth ? thread_index() / kPieces : thread_index() % kPieces * kVector; }
    static MODALIGN_DEVICE int k() { return major == Major::depth ? thread_index() % kPieces * kVector : thread_index() / kPieces; }

    MODALIGN_DEVICE Cursor(const Operand<T>& operand, Global<const T> data, std::int64_t line_begin, int line_count, int depth)
        : from(data.at((line_begin + line()) * operand.line_stride + k() * operand.depth_stride)),
          left((MODALIGN_MUTATION("tile: one step beyond the depth") ? depth + 1 : depth) - k()),
          lines(line_count - line()) {}

    // Zeros beyond the edges.
    MODALIGN_DEVICE Pack<T, kVector> fetch(const Operand<T>& operand) {
      Pack<T, kVector> pack;
      MODALIGN_UNROLL
      for (int v = 0; v < kVector; ++v) pack[v] = 0;
      const int exist = lines <= 0 || left <= 0 ? 0 : minimum(major == Major::depth ? left : lines, kVector);
      if (operand.vectors && exist == kVector) {
        pack = load_pack<kVector>(from, 0);
      } else {
        const std::int64_t step = major == Major::depth ? operand.depth_stride : operand.line_stride;
        MODALIGN_UNROLL
        for (int v = 0; v < kVector; ++v)
          if (v < exist) pack[v] = from[v * step];
      }
      from = from.at(kDepth * operand.depth_stride);
      left -= kDepth;
      return pack;
    }

    static MODALIGN_DEVICE void store(Shared<T> slab, const Pack<T, kVector>& pack) {
      if constexpr (major == Major::depth) {
        MODALIGN_UNROLL
        for (int v = 0; v < kVector; ++v) slab[(k() + v) * kLinePitch + line()] = pack[v];
      } else {
        store_pack(slab, k() * kLinePitch + line(), pack);
      }
    }
  };

  static MODALIGN_DEVICE int micro_row(int i) { return thread_index() / 16 * kVector + i % kVector + i / kVector * (kRows / 2); }
  static MODALIGN_DEVICE int micro_column(int j) { return thread_index() % 16 * kVector + j % kVector + j / kVector * (kColumns / 2); }

  // One step of K: a outer product of kMicro row values and kMicro column values.
  static MODALIGN_DEVICE void load_micro(T (&x)[kMicro], Shared<T> line, int first) {
    MODALIGN_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Pack<T, kVector> pack = load_pack<kVector>(line, first + h * (kRows / 2));
      MODALIGN_UNROLL
      for (int v = 0; v < kVector; ++v) x[h * kVector + v] = pack[v];
    }
  }
  static MODALIGN_DEVICE void outer(Accumulators& sum, const T (&a)[kMicro], const T (&b)[kMicro]) {
    MODALIGN_UNROLL
    for (int i = 0; i < kMicro; ++i) {
      MODALIGN_UNROLL
      for (int j = 0; j < kMicro; ++j) sum.value[i][j] = fused_multiply_add(a[i], b[j], sum.value[i][j]);
    }
  }

  static MODALIGN_DEVICE void multiply(Accumulators& sum, const Operand<T>& row_operand, Global<const T> row_data, const Operand<T>& column_operand,
                                       Global<const T> column_data, const TileRange& range, int depth) {
    const Shared<T> buffers = shared<T>(0, 4 * kSlab);   // two slabs of rows, two of columns
    const int row_first = thread_index() / 16 * kVector, column_first = thread_index() % 16 * kVector;
    const int slabs = ceil_divide(depth, kDepth);
    Cursor<RowMajor> row_cursor(row_operand, row_data, range.row_begin, range.rows, depth);
    Cursor<ColumnMajor> column_cursor(column_operand, column_data, range.column_begin, range.columns, depth);
    if (slabs > 0) {
      row_cursor.store(buffers, row_cursor.fetch(row_operand));
      column_cursor.store(buffers.at(2 * kSlab), column_cursor.fetch(column_operand));
      if (!MODALIGN_MUTATION("fma: drop the barrier after the first slab")) barrier();
    }
    MODALIGN_NO_UNROLL
    for (int slab = 0; slab < slabs; ++slab) {
      const int now = slab & 1, next = now ^ 1;
      Pack<T, kVector> row_pack, column_pack;
      const bool more = slab + 1 < slabs;
      if (more) {
        row_pack = row_cursor.fetch(row_operand);
        column_pack = column_cursor.fetch(column_operand);
      }
      MODALIGN_UNROLL
      for (int k = 0; k < kDepth; ++k) {
        T a[kMicro], b[kMicro];
        load_micro(a, buffers.at(now * kSlab), k * kLinePitch + row_first);
        load_micro(b, buffers.at((2 + now) * kSlab), k * kLinePitch + column_first);
        outer(sum, a, b);
      }
      if (more) {
        row_cursor.store(buffers.at(next * kSlab), row_pack);
        column_cursor.store(buffers.at((2 + next) * kSlab), column_pack);
      }
      if (!MODALIGN_MUTATION("fma: drop the barrier between slabs")) barrier();
    }
  }

  static MODALIGN_DEVICE void deposit(const Accumulators& sum, Shared<T> tile) {
    MODALIGN_UNROLL
    for (int i = 0; i < kMicro; ++i) {
      MODALIGN_UNROLL
      for (int h = 0; h < 2; ++h) {
        Pack<T, kVector> pack;
        MODALIGN_UNROLL
        for (int v = 0; v < kVector; ++v) pack[v] = sum.value[i][h * kVector + v];
        store_pack(tile, micro_row(i) * kPitch + micro_column(h * kVector), pack);
      }
    }
  }

  // visit(row, column, value ...) for each accumulator of this thread, of one or of several tiles; values may be changed.
  template <class Visit, class... Sums> static MODALIGN_DEVICE void each(const Visit& visit, Sums&... sums) {
    MODALIGN_UNROLL
    for (int i = 0; i < kMicro; ++i) {
      MODALIGN_UNROLL
      for (int j = 0; j < kMicro; ++j) visit(micro_row(i), micro_column(j), sums.value[i][j]...);
    }
  }

  // sum[row, d] += sum_k tile[row, k] values[k, d] for the `count` first columns k of the tile; values has Major::line (d is the line). Passes a
  // barrier before it reads the tile.
  static MODALIGN_DEVICE void multiply_values(Accumulators& sum, Shared<T> tile, int count, const Operand<T>& values, Global<const T> data,
                                              std::int64_t first_value, std::int64_t line_begin, int lines, int shared_offset) {
    const Shared<T> buffers = shared<T>(shared_offset, 2 * kSlab);
    const int row_first = thread_index() / 16 * kVector, column_first = thread_index() % 16 * kVector;
    const Global<const T> base = data.at(first_value * values.depth_stride);
    Cursor<Major::line> cursor(values, base, line_begin, lines, count);
    MODALIGN_NO_UNROLL
    for (int k_begin = 0; k_begin < count; k_begin += kDepth) {
      const Shared<T> slab = buffers.at(k_begin / kDepth % 2 * kSlab);
      cursor.store(slab, cursor.fetch(values));
      if (!MODALIGN_MUTATION("fma: drop the barrier after a value slab")) barrier();   // also: all have left the slab before last
      MODALIGN_UNROLL
      for (int k = 0; k < kDepth; ++k) {
        T a[kMicro], b[kMicro];
        MODALIGN_UNROLL
        for (int i = 0; i < kMicro; ++i) a[i] = tile[(row_first + i % kVector + i / kVector * (kRows / 2)) * kPitch + k_begin + k];
        load_micro(b, slab, k * kLinePitch + column_first);
        outer(sum, a, b);
      }
    }
  }
};

// --------------------------------------------------------------------------------------------------------------------------------------- tensor core
// 8 warps as 2 x 4, a warp owns 64 x 32 = 4 x 4 products of 16 x 8. Slabs of 32 along K travel by asynchronous copies through a ring of kStages
// buffers. The 16-byte pieces of a slab are permuted so that the eight rows which ldmatrix reads at once lie in different banks.
template <class Half, int Parts, Major RowMajor, Major ColumnMajor> struct MmaBackend {
  using Source = Half;
  using Real = float;
  static constexpr int kMinBlocks = Parts == 1 ? 2 : 1;   // two planes of fragments do not fit into 128 registers
  static constexpr int kRows = 128, kColumns = 128, kDepth = 32;
  static constexpr int kPitch = kRows + 8;
  static constexpr int kStages = Parts == 1 ? 4 : 2;
  static constexpr int kPlane = kRows * kDepth;       // elements
  static constexpr int kStage = 2 * Parts * kPlane;   // rows' planes, then columns' planes
  static constexpr int kTileBytes = kRows * kPitch * int(sizeof(float));
  static constexpr int kPipelineBytes = kStages * kStage * 2;
  static constexpr int kSharedBytes = larger(kTileBytes, kPipelineBytes);
  static constexpr int kValueStages = Parts == 1 ? 2 : 1;   // what fits behind the tile in 99 KB
  static constexpr int kValueBytes = kValueStages * Parts * kPlane * 2;
  static_assert(Parts == 1 || Parts == 2, "one plane or two");

  struct Accumulators {
    float value[4][4][4];
  };

  static MODALIGN_DEVICE void clear(Accumulators& sum) {
    MODALIGN_UNROLL
    for (int i = 0; i < 4; ++i) {
      MODALIGN_UNROLL
      for (int j = 0; j < 4; ++j) {
        MODALIGN_UNROLL
        for (int v = 0; v < 4; ++v) sum.value[i][j][v] = 0.0f;
      }
    }
  }

  template <Major major> static MODALIGN_DEVICE int place(int line, int k) {
    if constexpr (major == Major::depth) return line * kDepth + ((k / 8) ^ (line / 2 % 4)) * 8 + k % 8;
    else return k * kRows + ((line / 8) ^ (k % 8)) * 8 + line % 8;
  }

  // This thread's two 16-byte pieces of every slab of an operand; moves on by one slab with each start.
  template <Major major> struct Cursor {
    static constexpr int kPieces = major == Major::depth ? kDepth / 8 : kRows / 8;
    static constexpr int kApart = kTileThreads / kPieces;   // lines (depth-major) or steps of K (line-major) from the first piece to the second
    Global<const Half> from;                                // the first piece
    int left, lines, target;                                // steps of K from it to the edge, lines from it to the edge, its element of a plane

    static MODALIGN_DEVICE int line() { return major == Major::depth ? thread_index() / kPieces : thread_index() % kPieces * 8; }
    static MODALIGN_DEVICE int k() { return major == Major::depth ? thread_index() % kPieces * 8 : thread_index() / kPieces; }

    MODALIGN_DEVICE Cursor(const Operand<Half>& operand, Global<const Half> data, std::int64_t line_begin, int line_count, int depth)
        : from(data.at((line_begin + line()) * operand.line_stride + k() * operand.depth_stride)),
          left((MODALIGN_MUTATION("tile: one step beyond the depth") ? depth + 1 : depth) - k()),
          lines(line_count - line()),
          target(place<major>(line(), k())) {}

    // Starts the copies into the planes of a stage; zeros beyond the edges.
    MODALIGN_DEVICE void start(Shared<Half> planes, const Operand<Half>& operand) {
      MODALIGN_UNROLL
      for (int part = 0; part < Parts; ++part) {
        MODALIGN_UNROLL
        for (int piece = 0; piece < 2; ++piece) {
          const int beyond = left - (major == Major::line ? piece * kApart : 0);
          const int here = lines - (major == Major::depth ? piece * kApart : 0);
          const int exist = here <= 0 || beyond <= 0 ? 0 : minimum(major == Major::depth ? beyond : here, 8);
          const std::int64_t first =
              part * operand.plane_stride + piece * kApart * (major == Major::depth ? operand.line_stride : operand.depth_stride);
          const int to = part * kPlane + target + piece * kApart * (major == Major::depth ? kDepth : kRows);
          if (operand.vectors) {
            copy_async_16(planes, to, from, first, exist * 2);   // reads nothing where nothing exists
          } else {
            const std::int64_t step = major == Major::depth ? operand.depth_stride : operand.line_stride;
            Pack<Half, 8> pack;
            MODALIGN_UNROLL
            for (int v = 0; v < 8; ++v) {
              pack[v] = from_float<Half>(0.0f);
              if (v < exist) pack[v] = from[first + v * step];
            }
            store_pack(planes, to, pack);
          }
        }
      }
      from = from.at(kDepth * operand.depth_stride);
      left -= kDepth;
    }
  };
  static_assert(kPlane / 8 == 2 * kTileThreads, "two 16-byte pieces of each plane per thread and slab");

  // Rows (or columns) first ... first + 15 and depths k ... k + 15 of a plane as the registers of an mma operand.
  template <Major major> static MODALIGN_DEVICE void load_rows(std::uint32_t (&r)[4], Shared<Half> plane, int first, int k) {
    const int matrix = lane() / 8, row = MODALIGN_MUTATION("mma: wrong lane of a fragment") ? (lane() + 1) % 8 : lane() % 8;
    if constexpr (major == Major::depth) load_matrix_x4(r, plane, place<major>(first + matrix % 2 * 8 + row, k + matrix / 2 * 8));
    else load_matrix_x4_transposed(r, plane, place<major>(first + matrix % 2 * 8, k + matrix / 2 * 8 + row));
  }
  template <Major major>
  static MODALIGN_DEVICE void load_columns(std::uint32_t (&left)[2], std::uint32_t (&right)[2], Shared<Half> plane, int first, int k) {
    const int matrix = lane() / 8, row = lane() % 8;
    std::uint32_t r[4];
    if constexpr (major == Major::depth) load_matrix_x4(r, plane, place<major>(first + matrix / 2 * 8 + row, k + matrix % 2 * 8));
    else load_matrix_x4_transposed(r, plane, place<major>(first + matrix / 2 * 8, k + matrix % 2 * 8 + row));
    left[0] = r[0];
    left[1] = r[1];
    right[0] = r[2];
    right[1] = r[3];
  }

  using Rows = std::uint32_t[Parts][4];
  using Columns = std::uint32_t[Parts][4][2];

  template <Major major> static MODALIGN_DEVICE void load_all_columns(Columns& b, Shared<Half> planes, int k) {
    MODALIGN_UNROLL
    for (int part = 0; part < Parts; ++part) {
      MODALIGN_UNROLL
      for (int j = 0; j < 4; j += 2) load_columns<major>(b[part][j], b[part][j + 1], planes.at(part * kPlane), warp() % 4 * 32 + j * 8, k);
    }
  }
  static MODALIGN_DEVICE void multiply_fragments(float (&sum)[4][4], const Rows& a, const Columns& b) {
    MODALIGN_UNROLL
    for (int j = 0; j < 4; ++j) {
      if constexpr (Parts == 2) {
        mma_16816(sum[j], a[1], b[0][j], Half());
        mma_16816(sum[j], a[0], b[1][j], Half());
      }
      mma_16816(sum[j], a[0], b[0][j], Half());
    }
  }

  static MODALIGN_DEVICE void multiply(Accumulators& sum, const Operand<Half>& row_operand, Global<const Half> row_data,
                                       const Operand<Half>& column_operand, Global<const Half> column_data, const TileRange& range, int depth) {
    const Shared<Half> ring = shared<Half>(0, kStages * kStage);
    const int slabs = ceil_divide(depth, kDepth);
    Cursor<RowMajor> row_cursor(row_operand, row_data, range.row_begin, range.rows, depth);
    Cursor<ColumnMajor> column_cursor(column_operand, column_data, range.column_begin, range.columns, depth);
    const auto start = [&](int slab) {
      const Shared<Half> stage = ring.at(slab % kStages * kStage);
      row_cursor.start(stage, row_operand);
      column_cursor.start(stage.at(Parts * kPlane), column_operand);
    };
    MODALIGN_NO_UNROLL
    for (int slab = 0; slab < kStages - 1; ++slab) {
      if (slab < slabs) start(slab);
      copy_async_commit();
    }
    MODALIGN_NO_UNROLL
    for (int slab = 0; slab < slabs; ++slab) {
      if (!MODALIGN_MUTATION("mma: drop the wait for a slab")) copy_async_wait<kStages - 2>();
      if (!MODALIGN_MUTATION("mma: drop the barrier of a slab")) barrier();   // the slab is there, and the stage before it is free again
      if (slab + kStages - 1 < slabs) start(slab + kStages - 1);
      copy_async_commit();
      const Shared<Half> stage = ring.at(slab % kStages * kStage);
      MODALIGN_UNROLL
      for (int k = 0; k < kDepth; k += 16) {
        Columns b;
        load_all_columns<ColumnMajor>(b, stage.at(Parts * kPlane), k);
        MODALIGN_UNROLL
        for (int i = 0; i < 4; ++i) {
          Rows a;
          MODALIGN_UNROLL
          for (int part = 0; part < Parts; ++part) load_rows<RowMajor>(a[part], stage.at(part * kPlane), warp() / 4 * 64 + i * 16, k);
          multiply_fragments(sum.value[i], a, b);
        }
      }
    }
    copy_async_wait<0>();
    barrier();   // the tile will lie where the ring was
  }

  static MODALIGN_DEVICE int fragment_row(int i, int half) { return warp() / 4 * 64 + i * 16 + half * 8 + lane() / 4; }
  static MODALIGN_DEVICE int fragment_column(int j) { return warp() % 4 * 32 + j * 8 + lane() % 4 * 2; }

  static MODALIGN_DEVICE void deposit(const Accumulators& sum, Shared<float> tile) {
    MODALIGN_UNROLL
    for (int i = 0; i < 4; ++i) {
      MODALIGN_UNROLL
      for (int j = 0; j < 4; ++j) {
        MODALIGN_UNROLL
        for (int half = 0; half < 2; ++half) {
          Pack<float, 2> pack;
          pack[0] = sum.value[i][j][2 * half];
          pack[1] = sum.value[i][j][2 * half + 1];
          store_pack(tile, fragment_row(i, half) * kPitch + fragment_column(j), pack);
        }
      }
    }
  }

  template <class Visit, class... Sums> static MODALIGN_DEVICE void each(const Visit& visit, Sums&... sums) {
    MODALIGN_UNROLL
    for (int i = 0; i < 4; ++i) {
      MODALIGN_UNROLL
      for (int j = 0; j < 4; ++j) {
        MODALIGN_UNROLL
        for (int v = 0; v < 4; ++v) visit(fragment_row(i, v / 2), fragment_column(j) + v % 2, sums.value[i][j][v]...);
      }
    }
  }

  // The fp32 tile becomes row fragments: rounded to Half (Parts = 1) or split into two (Parts = 2).
  static MODALIGN_DEVICE void multiply_values(Accumulators& sum, Shared<float> tile, int count, const Operand<Half>& values, Global<const Half> data,
                                              std::int64_t first_value, std::int64_t line_begin, int lines, int shared_offset) {
    const Shared<Half> buffers = shared<Half>(shared_offset, kValueStages * Parts * kPlane);
    const Global<const Half> base = data.at(first_value * values.depth_stride);
    const int slabs = ceil_divide(count, kDepth);
    Cursor<Major::line> cursor(values, base, line_begin, lines, count);
    const auto start = [&](int slab) { cursor.start(buffers.at(slab % kValueStages * Parts * kPlane), values); };
    if (kValueStages == 2 && slabs > 0) start(0);
    copy_async_commit();
    MODALIGN_NO_UNROLL
    for (int slab = 0; slab < slabs; ++slab) {
      if constexpr (kValueStages == 1) {
        if (slab > 0) barrier();   // all have read the slab before
        start(slab);
        copy_async_commit();
      }
      if (!MODALIGN_MUTATION("mma: drop the wait for a value slab")) copy_async_wait<0>();
      if (!MODALIGN_MUTATION("mma: drop the barrier of a value slab")) barrier();
      if (kValueStages == 2 && slab + 1 < slabs) start(slab + 1);
      copy_async_commit();
      const Shared<Half> planes = buffers.at(slab % kValueStages * Parts * kPlane);
      MODALIGN_UNROLL
      for (int k = 0; k < kDepth; k += 16) {
        Columns b;
        load_all_columns<Major::line>(b, planes, k);
        MODALIGN_UNROLL
        for (int i = 0; i < 4; ++i) {
          Rows a;
          MODALIGN_UNROLL
          for (int r = 0; r < 4; ++r) {   // registers 0, 1: rows g and g + 8, columns 2t; registers 2, 3: the same rows, eight columns further
            const Pack<float, 2> x = load_pack<2>(tile, fragment_row(i, r % 2) * kPitch + slab * kDepth + k + r / 2 * 8 + lane() % 4 * 2);
            const Half high0 = from_float<Half>(x[0]), high1 = from_float<Half>(x[1]);
            a[0][r] = pack_two(high0, high1);
            if constexpr (Parts == 2) a[1][r] = pack_two(from_float<Half>(x[0] - to_float(high0)), from_float<Half>(x[1] - to_float(high1)));
          }
          multiply_fragments(sum.value[i], a, b);
        }
      }
    }
    copy_async_wait<0>();
  }
};

// ------------------------------------------------------------------------------------------------------------------------------------------ the walk
struct TileGrid {
  std::int64_t rows, columns, depth;
  int rows_per_tile, columns_per_tile;
  std::int64_t row_tiles, column_tiles;
  std::int64_t row_tiles_per_walk, column_tiles_per_walk;
  std::int64_t row_walks, column_walks;
};

struct WalkPosition {
  std::int64_t row, column;   // of the walk in the grid of walks
};

// max_*_walks = 0: one tile per walk. The depth is below 2^31.
inline TileGrid make_grid(std::int64_t rows, std::int64_t columns, std::int64_t depth, int rows_per_tile, int columns_per_tile,
                          std::int64_t max_row_walks = 0, std::int64_t max_column_walks = 0) {
  TileGrid grid{rows, columns, depth, rows_per_tile, columns_per_tile, 0, 0, 1, 1, 0, 0};
  grid.row_tiles = ceil_divide<std::int64_t>(rows, rows_per_tile);
  grid.column_tiles = ceil_divide<std::int64_t>(columns, columns_per_tile);
  if (max_row_walks > 0 && grid.row_tiles > max_row_walks) grid.row_tiles_per_walk = ceil_divide(grid.row_tiles, max_row_walks);
  if (max_column_walks > 0 && grid.column_tiles > max_column_walks) grid.column_tiles_per_walk = ceil_divide(grid.column_tiles, max_column_walks);
  grid.row_walks = ceil_divide(grid.row_tiles, grid.row_tiles_per_walk);
  grid.column_walks = ceil_divide(grid.column_tiles, grid.column_tiles_per_walk);
  return grid;
}

template <class Backend_, class Epilogue_> struct TileWalk {
  using Backend = Backend_;
  using Epilogue = Epilogue_;
  using Source = typename Backend::Source;
  using Real = typename Backend::Real;
  static constexpr int kThreads = kTileThreads;
  // 2: at most 128 registers; while one block is in its epilogue the other multiplies
  static constexpr int kMinBlocks = Backend::kMinBlocks < Epilogue::kMinBlocks ? Backend::kMinBlocks : Epilogue::kMinBlocks;
  static constexpr int kSharedBytes = Backend::kSharedBytes + Epilogue::kSharedBytes;
  static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 give a block 99 KB");

  Operand<Source> rows, columns;
  TileGrid grid;
  Epilogue epilogue;

  LaunchPlan plan(std::int64_t batches, const char* key) const {
    LaunchPlan plan;
    plan.grid[0] = unsigned(grid.row_walks * grid.column_walks);
    plan.grid[1] = 1;
    plan.grid[2] = unsigned(batches);
    plan.threads = kThreads;
    plan.shared_bytes = kSharedBytes;
    plan.key = key;
    return plan;
  }

  // Bands of kRaster row walks; inside a band the column walk moves slowly.
  MODALIGN_DEVICE WalkPosition position() const {
    const std::int64_t index = block_index_x(), band = index / (kRaster * grid.column_walks), inside = index - band * kRaster * grid.column_walks;
    const std::int64_t band_rows = minimum(grid.row_walks - band * kRaster, std::int64_t(kRaster));
    return {band * kRaster + inside % band_rows, inside / band_rows};
  }

  MODALIGN_DEVICE void operator()() const {
    const WalkPosition walk = position();
    const std::int64_t batch = block_index_z();
    const Global<const Source> row_data = Global<const Source>(rows.data).at(batch * rows.batch_stride);
    const Global<const Source> column_data = Global<const Source>(columns.data).at(batch * columns.batch_stride);
    const Shared<Real> tile = shared<Real>(0, Backend::kRows * Backend::kPitch);
    const std::int64_t row_stop = minimum((walk.row + 1) * grid.row_tiles_per_walk, grid.row_tiles);
    const std::int64_t column_stop = minimum((walk.column + 1) * grid.column_tiles_per_walk, grid.column_tiles);
    typename Epilogue::State state;
    TileRange range;
    for (range.row_tile = walk.row * grid.row_tiles_per_walk; range.row_tile < row_stop; ++range.row_tile) {
      range.row_begin = range.row_tile * grid.rows_per_tile;
      range.rows = int(minimum(grid.rows - range.row_begin, std::int64_t(grid.rows_per_tile)));
      epilogue.begin(state, range, batch, walk, Backend::kSharedBytes);
      for (range.column_tile = walk.column * grid.column_tiles_per_walk; range.column_tile < column_stop; ++range.column_tile) {
        range.column_begin = range.column_tile * grid.columns_per_tile;
        range.columns = int(minimum(grid.columns - range.column_begin, std::int64_t(grid.columns_per_tile)));
        {
          typename Backend::Accumulators sum;
          Backend::clear(sum);
          Backend::multiply(sum, rows, row_data, columns, column_data, range, int(grid.depth));
          Backend::deposit(sum, tile);
        }
        if (!MODALIGN_MUTATION("tile: drop the barrier before the epilogue")) barrier();
        epilogue.consume(state, tile, range, batch, walk, Backend::kSharedBytes);
        const bool more = range.column_tile + 1 < column_stop || range.row_tile + 1 < row_stop;
        if (!(more && MODALIGN_MUTATION("tile: drop the barrier after the epilogue"))) barrier();   // the next tile will lie where this one was
      }
      epilogue.end(state, range, batch, walk, Backend::kSharedBytes);
    }
  }
};

// ----------------------------------------------------------------------------------------------------------------------------- (a) store, accumulate
// out[batch, row, column] = factor * product + addend[batch, row, column]; addend == nullptr: none. The addend may be the output itself.
template <class Backend, class Out> struct StoreTile {
  using Real = typename Backend::Real;
  static constexpr int kSharedBytes = 0;
  static constexpr int kMinBlocks = 2;
  struct State {};
  Out* out;
  const Real* addend;
  std::int64_t out_batch_stride, out_row_stride;   // contiguous along columns
  std::int64_t addend_batch_stride, addend_row_stride;
  Real factor;

  MODALIGN_DEVICE void begin(State&, const TileRange&, std::int64_t, const WalkPosition&, int) const {}
  MODALIGN_DEVICE void end(State&, const TileRange&, std::int64_t, const WalkPosition&, int) const {}
  MODALIGN_DEVICE void consume(State&, Shared<Real> tile, const TileRange& range, std::int64_t batch, const WalkPosition&, int) const {
    const Global<Out> target = Global<Out>(out).at(batch * out_batch_stride + range.row_begin * out_row_stride + range.column_begin);
    const Global<const Real> source =
        addend != nullptr ? Global<const Real>(addend).at(batch * addend_batch_stride + range.row_begin * addend_row_stride + range.column_begin)
                          : Global<const Real>(addend);
    const int rows = MODALIGN_MUTATION("store: one row too many") ? range.rows + 1 : range.rows;
    const int column = thread_index() % Backend::kColumns;
    if (column >= range.columns) return;
    for (int row = thread_index() / Backend::kColumns; row < rows; row += kThreadsPerColumn) {
      Real value = factor * tile[row * Backend::kPitch + column];
      if (addend != nullptr) value += source[row * addend_row_stride + column];
      target[row * out_row_stride + column] = narrow<Out>(value);
    }
  }
  static constexpr int kThreadsPerColumn = kTileThreads / Backend::kColumns;
};

// ---------------------------------------------------------------------------------------------------------------- (c) online statistics, log-sum-exp
// form z = scale * product. Row slots [batch][column walk][rows] and column slots [batch][row walk][columns] of (maximum, sum of exp(z - maximum)).
template <class Real> struct MaxSum {
  Real max, sum;
};
// The statistics of two disjoint sets; -inf stands for nothing yet, NaN stays.
template <class Real> MODALIGN_DEVICE MaxSum<Real> join(const MaxSum<Real>& a, const MaxSum<Real>& b) {
  if (b.sum == 0) return a;
  if (a.sum == 0) return b;
  const Real top = maximum(a.max, b.max);
  return {top, a.sum * exponential(a.max - top) + b.sum * exponential(b.max - top)};
}

template <class Backend> struct LogSumExpTile {
  using Real = typename Backend::Real;
  static constexpr int kGroups = kTileThreads / Backend::kColumns;   // threads per column
  static constexpr int kSharedBytes = (2 * Backend::kRows + 2 * kTileThreads) * int(sizeof(Real));
  static constexpr int kMinBlocks = 2;
  struct State {};
  Real scale;
  Pack<Real, 2>* row_slots;
  Pack<Real, 2>* column_slots;
  std::int64_t rows, columns, row_walks, column_walks;
  std::int64_t row_tiles_per_walk;

  static MODALIGN_DEVICE MaxSum<Real> read(Shared<Real> pairs, int i) {
    const Pack<Real, 2> pair = load_pack<2>(pairs, 2 * i);
    return {pair[0], pair[1]};
  }
  static MODALIGN_DEVICE void write(Shared<Real> pairs, int i, const MaxSum<Real>& x) {
    Pack<Real, 2> pair;
    pair[0] = x.max;
    pair[1] = x.sum;
    store_pack(pairs, 2 * i, pair);
  }

  MODALIGN_DEVICE void begin(State&, const TileRange&, std::int64_t, const WalkPosition&, int shared_offset) const {
    const Shared<Real> row_pairs = shared<Real>(shared_offset, 2 * Backend::kRows);
    for (int row = warp(); row < Backend::kRows; row += kTileWarps)   // the warp that will read it
      if (lane() == 0) write(row_pairs, row, {0, 0});
  }
  MODALIGN_DEVICE void consume(State&, Shared<Real> tile, const TileRange& range, std::int64_t batch, const WalkPosition& walk,
                               int shared_offset) const {
    const Shared<Real> row_pairs = shared<Real>(shared_offset, 2 * Backend::kRows);
    const Shared<Real> column_pairs = shared<Real>(shared_offset + 2 * Backend::kRows * int(sizeof(Real)), 2 * kTileThreads);
    for (int row = warp(); row < range.rows; row += kTileWarps) {
      MaxSum<Real> mine{0, 0};
      for (int column = lane(); column < range.columns; column += kWarpSize)
        mine = join(mine, MaxSum<Real>{scale * tile[row * Backend::kPitch + column], 1});
      MODALIGN_UNROLL
      for (int step = kWarpSize / 2; step > 0; step /= 2) {
        const MaxSum<Real> other{shuffle_down(mine.max, step), shuffle_down(mine.sum, step)};
        mine = join(mine, other);
      }
      if (lane() == 0) write(row_pairs, row, join(read(row_pairs, row), mine));
    }
    const int column = thread_index() % Backend::kColumns, group = thread_index() / Backend::kColumns;
    MaxSum<Real> mine{0, 0};
    if (column < range.columns)
      for (int row = group; row < range.rows; row += kGroups) mine = join(mine, MaxSum<Real>{scale * tile[row * Backend::kPitch + column], 1});
    write(column_pairs, thread_index(), mine);
    if (!MODALIGN_MUTATION("log-sum-exp: drop the barrier before the columns are joined")) barrier();
    if (group == 0 && column < range.columns) {
      for (int g = 1; g < kGroups; ++g) mine = join(mine, read(column_pairs, g * Backend::kColumns + column));
      const Global<Pack<Real, 2>> slot = Global<Pack<Real, 2>>(column_slots).at((batch * row_walks + walk.row) * columns + range.column_begin);
      if (range.row_tile != walk.row * row_tiles_per_walk) {
        const Pack<Real, 2> before = slot[column];
        mine = join(MaxSum<Real>{before[0], before[1]}, mine);
      }
      Pack<Real, 2> pair;
      pair[0] = mine.max;
      pair[1] = mine.sum;
      slot[column] = pair;
    }
  }
  MODALIGN_DEVICE void end(State&, const TileRange& range, std::int64_t batch, const WalkPosition& walk, int shared_offset) const {
    const Shared<Real> row_pairs = shared<Real>(shared_offset, 2 * Backend::kRows);
    const Global<Pack<Real, 2>> slot = Global<Pack<Real, 2>>(row_slots).at((batch * column_walks + walk.column) * rows + range.row_begin);
    for (int row = thread_index(); row < range.rows; row += kTileThreads) slot[row] = load_pack<2>(row_pairs, 2 * row);
    barrier();   // before the next row tile begins
  }
};

// out[batch, i] = log of the sum over all slots, in slot order; slots [batch][slot][count].
template <class Real> struct FoldLogSumExp {
  static constexpr int kThreads = 128;
  const Pack<Real, 2>* slots;
  Real* max;   // [batch, count]
  Real* sum;   // [batch, count]
  std::int64_t count, slot_count;

  LaunchPlan plan(std::int64_t batches, const char* key) const {
    LaunchPlan plan;
    plan.grid[0] = unsigned(ceil_divide<std::int64_t>(count, kThreads));
    plan.grid[2] = unsigned(batches);
    plan.threads = kThreads;
    plan.key = key;
    return plan;
  }
  MODALIGN_DEVICE void operator()() const {
    const std::int64_t i = std::int64_t(block_index_x()) * kThreads + thread_index(), batch = block_index_z();
    if (i >= (MODALIGN_MUTATION("fold: one element too many") ? count + 1 : count)) return;
    const Global<const Pack<Real, 2>> source(slots);
    MaxSum<Real> all{0, 0};
    for (std::int64_t slot = 0; slot < slot_count; ++slot) {
      const Pack<Real, 2> pair = source[(batch * slot_count + slot) * count + i];
      all = join(all, MaxSum<Real>{pair[0], pair[1]});
    }
    global(max)[batch * count + i] = all.max;
    global(sum)[batch * count + i] = all.sum;
  }
};

// -------------------------------------------------------------------------------------------------------------------------------- (d) value products
// out[batch, row, d] = sum over columns of exp(scale * product) values[batch, column, d], d < width <= kColumns; a walk meets all columns.
template <class Backend, class Out> struct ValueProductTile {
  using Source = typename Backend::Source;
  using Real = typename Backend::Real;
  static constexpr int kSharedBytes = Backend::kValueBytes;
  static constexpr int kMinBlocks = 1;   // the output rows stay in registers along the walk
  struct State {
    typename Backend::Accumulators sum;
  };
  Real scale;
  Operand<Source> values;   // Major::line: line = d, depth = column
  int width;
  Out* out;   // [batch, rows, width]
  std::int64_t rows;

  MODALIGN_DEVICE void begin(State& state, const TileRange&, std::int64_t, const WalkPosition&, int) const { Backend::clear(state.sum); }
  MODALIGN_DEVICE void consume(State& state, Shared<Real> tile, const TileRange& range, std::int64_t batch, const WalkPosition&,
                               int shared_offset) const {
    for (int index = thread_index(); index < Backend::kRows * Backend::kColumns; index += kTileThreads) {
      const int row = index / Backend::kColumns, column = index % Backend::kColumns;
      const Real z = tile[row * Backend::kPitch + column];
      tile[row * Backend::kPitch + column] = row < range.rows && column < range.columns ? exponential(scale * z) : Real(0);
    }
    // multiply_values begins with a barrier
    Backend::multiply_values(state.sum, tile, range.columns, values, Global<const Source>(values.data).at(batch * values.batch_stride),
                             range.column_begin, 0, width, shared_offset);
  }
  MODALIGN_DEVICE void end(State& state, const TileRange& range, std::int64_t batch, const WalkPosition&, int) const {
    const Global<Out> target = Global<Out>(out).at((batch * rows + range.row_begin) * width);
    const int rows_here = range.rows, width_here = width;
    Backend::each([&](int row, int column, Real value) { if (row < rows_here && column < width_here) target[std::int64_t(row) * width_here + column] = narrow<Out>(value); }, state.sum);
  }
};

}   // namespace modalign::cuda
