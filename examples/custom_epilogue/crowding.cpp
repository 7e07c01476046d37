// An epilogue of your own on modalign's CPU tile engine: crowding_i = sum_j max(0, q_i . c_j - threshold).
//
// How crowded it is around a query: how many candidates lie within its cap, weighted by how deep. Nothing N x M is stored.
//
// Forward    epilogue: subtract, clamp, add up each row of the tile; one partial sum per (column block, row), added in order. 2 N M D FLOPs.
// Backward   grad_q_i = g_i sum_j [q_i . c_j > t] c_j: epilogue turns the tile into weights, the value product multiplies them with the candidates.
//            grad_c_j is the same with the sides exchanged. 4 N M D FLOPs each.
// Threads    a partial sum and a gradient row belong to one thread alone, and sums run in one order: equal bits for any number of threads.
//
// Build: c++ -std=c++20 -O3 -march=native -fPIC -shared -pthread -I $(python -c "import modalign; print(modalign.include_dir())") crowding.cpp -o crowding.so
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/tile.h"

namespace {

using namespace modalign::cpu;

constexpr std::int64_t kTileColumns = 128;

// The engine asks its caller for threads. A torch op would pass on torch's; a plain library brings its own.
thread_local int threads_of_caller = 1;
const Parallel kThreads{[](std::int64_t begin, std::int64_t end, std::int64_t, Parallel::Body body, void* context) {
  const std::int64_t count = end - begin, chunks = minimum(threads_of_caller, count);
  if (count <= 0) return;
  std::vector<std::thread> others;
  for (std::int64_t t = 1; t < chunks; ++t) others.emplace_back(body, context, begin + count * t / chunks, begin + count * (t + 1) / chunks);
  body(context, begin, chunks > 1 ? begin + count / chunks : end);
  for (std::thread& other : others) other.join();
}};

template <class T>
void pack_rows(const T* matrix, std::int64_t rows, std::int64_t depth, T* panels) {
  parallel_for(kThreads, 0, (rows + kRegisterRows - 1) / kRegisterRows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t first = begin * kRegisterRows; first < minimum(end * kRegisterRows, rows); first += kRegisterRows)
      pack_panel(kRegisterRows, static_cast<int>(minimum(kRegisterRows, rows - first)), depth, [&](int r) { return matrix + (first + r) * depth; },
                 panels + first * depth);
  });
}

template <class T>
void pack_columns(const T* matrix, std::int64_t columns, std::int64_t depth, T* panels) {
  constexpr int P = kPanelColumns<T>;
  parallel_for(kThreads, 0, (columns + P - 1) / P, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t first = begin * P; first < minimum(end * P, columns); first += P)
      pack_panel(P, static_cast<int>(minimum(P, columns - first)), depth, [&](int c) { return matrix + (first + c) * depth; }, panels + first * depth);
  });
}

template <class T>
void forward(const T* queries, const T* candidates, std::int64_t N, std::int64_t M, std::int64_t D, T threshold, T* crowding) {
  Scratch<T> rows(packed_rows_size(N, D)), columns(packed_columns_size<T>(M, D));
  pack_rows(queries, N, D, static_cast<T*>(rows));
  pack_columns(candidates, M, D, static_cast<T*>(columns));
  const std::int64_t blocks = (M + kTileColumns - 1) / kTileColumns;
  Scratch<T> partial(blocks * N);
  for_each_tile<T>(rows, N, columns, M, D, kTileColumns, kThreads, [&] {
    return [&](const Tile<T>& tile) {
      const std::int64_t real = minimum(tile.columns, M - tile.column);   // without the padding
      for (std::int64_t i = 0; i < tile.rows; ++i) {
        T lanes[kLanes<T>] = {};
        for (std::int64_t c = 0; c < real; ++c) {
          const T depth_in_cap = tile.data[i * tile.ld + c] - threshold;
          lanes[c % kLanes<T>] += depth_in_cap < 0 ? 0 : depth_in_cap;   // keeps NaN
        }
        T sum = 0;
        for (T lane : lanes) sum += lane;
        partial[tile.column / kTileColumns * N + tile.row + i] = sum;
      }
    };
  });
  for (std::int64_t i = 0; i < N; ++i) {
    crowding[i] = 0;
    for (std::int64_t block = 0; block < blocks; ++block) crowding[i] += partial[block * N + i];
  }
}

// gradient_i = sum_j [row_i . column_j > threshold] row_weight_i column_weight_j column_j; a null weight is 1.
template <class T>
void gather(const T* row_matrix, const T* column_matrix, std::int64_t N, std::int64_t M, std::int64_t D, T threshold, const T* row_weight,
            const T* column_weight, T* gradient) {
  Scratch<T> rows(packed_rows_size(N, D)), columns(packed_columns_size<T>(M, D)), values(packed_value_size<T>(M, D));
  pack_rows(row_matrix, N, D, static_cast<T*>(rows));
  pack_columns(column_matrix, M, D, static_cast<T*>(columns));
  for (std::int64_t j = 0; j < M; ++j) pack_value_row<T>(column_matrix + j * D, D, M, j, values);
  const std::int64_t row_blocks = (N + kTileRows - 1) / kTileRows;
  parallel_for(kThreads, 0, row_blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> tile(kTileRows * kTileColumns), left(kTileRows * kTileColumns);
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t row = block * kTileRows, rows_here = minimum(kTileRows, N - row);
      for (std::int64_t k = 0; k < rows_here * D; ++k) gradient[row * D + k] = 0;
      for (std::int64_t column = 0; column < M; column += kTileColumns) {
        const std::int64_t real = minimum(kTileColumns, M - column);
        tile_product<T>(rows + row * D, rows_here, columns + column * D, round_up(real, kPanelColumns<T>), D, tile, kTileColumns);
        for (std::int64_t i = 0; i < rows_here; ++i)
          for (std::int64_t c = 0; c < real; ++c) {
            T& s = tile[i * kTileColumns + c];
            const T weight = (row_weight ? row_weight[row + i] : 1) * (column_weight ? column_weight[column + c] : 1);
            s = s > threshold ? weight : s == s ? 0 : s;   // at the threshold itself: 0
          }
        pack_tile_rows<T>(tile, kTileColumns, rows_here, real, left);
        value_product<T>(left, rows_here, real, values, M, column, D, gradient + row * D, D, Into::add);
      }
    }
  });
}

template <class T>
void backward(const T* grad, const T* queries, const T* candidates, std::int64_t N, std::int64_t M, std::int64_t D, T threshold, T* grad_queries,
              T* grad_candidates) {
  gather<T>(queries, candidates, N, M, D, threshold, grad, nullptr, grad_queries);
  gather<T>(candidates, queries, M, N, D, threshold, nullptr, grad, grad_candidates);
}

}  // namespace

#define CROWDING(name, T)                                                                                                                         \
  extern "C" void crowding_##name(const T* queries, const T* candidates, std::int64_t N, std::int64_t M, std::int64_t D, double threshold,       \
                                  T* out, int threads) {                                                                                         \
    threads_of_caller = threads;                                                                                                                 \
    forward<T>(queries, candidates, N, M, D, static_cast<T>(threshold), out);                                                                    \
  }                                                                                                                                              \
  extern "C" void crowding_bwd_##name(const T* grad, const T* queries, const T* candidates, std::int64_t N, std::int64_t M, std::int64_t D,      \
                                      double threshold, T* grad_queries, T* grad_candidates, int threads) {                                      \
    threads_of_caller = threads;                                                                                                                 \
    backward<T>(grad, queries, candidates, N, M, D, static_cast<T>(threshold), grad_queries, grad_candidates);                                   \
  }
CROWDING(float32, float)
CROWDING(float64, double)
