// Divergence between the neighbourhoods of a batch in two spaces, forward and backward, with no B x B matrix unless asked for; compiled once per instruction set.
//
// Maths      ops/structure_loss.h. Two matrices of products side by side; each row has two softmaxes and one loss.
// Forward    a task owns kTileRows rows: it makes their products with all rows tile by tile, keeps them as they are (kTileRows B numbers of each side), and goes over each
//            row three times: largest, log-sum-exps, loss. 2 B^2 (Dx + Dy) FLOPs. Where the products are to be kept, only blocks on and above the diagonal are made and
//            turned over, half the FLOPs: S_ij and S_ji are the same sum in the same order.
// Backward   a task owns the same rows. Tile by tile the products are made again, or read; with the statistics of the row and of the column a pair's coefficient
//            dS_ij + dS_ji is whole, so one value product finishes the row's gradient and nothing is shared. 2 B^2 (Dx + Dy) FLOPs for the products unless kept,
//            2 B^2 D for each gradient wanted. Per pair three exponentials and a logarithm, forward and twice backward.
// Memory     the packed operands, 2 B (Dx + Dy); backward also rows of the other operand, B D. Forward kTileRows B numbers of each side for each thread.
// Precision  products in float (double for double), in pieces, since an error of a logit of 20 is one of its probability; sums over a row in double. All logarithms come from the difference of logits, d = log P - log Q, and log cosh(d / 2):
//            exact also where P and Q are nearly equal (the loss is then P d^2 / 8), or too small to be numbers. The dS of a row have the sum 0; where the
//            diagonal holds nearly all of P its own is a difference of equal numbers, so it is made of the sum of the others.
// Order      products have one order of sums, rows are summed in ascending order: equal bits for any threads, and with products kept or not.

#include "cpu/structure_loss.h"

#include <initializer_list>

#include "cpu/pack_rows.h"
#include "cpu/statistics.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {
namespace {

constexpr std::int64_t kBlock = kTileRows;   // of kept products, square; a multiple of every kPanelColumns
constexpr std::int64_t kTileColumns = 4 * kBlock;
template <class T> constexpr T kAbsent = T(-1e30);   // logit of padding: no share in a softmax, and no infinity whose difference is NaN

// ---- one pair ---------------------------------------------------------------------------------------------------------------------------------------------

template <class T>
struct Terms {
  Vector<T> p, q;         // P and Q
  Vector<T> f_p, f_q;     // P dR/dP, Q dR/dQ
  Vector<T> loss;
};

// log(exp(z) + epsilon)
template <class T>
inline Vector<T> floored(Vector<T> z) {
  const Vector<T> floor = broadcast(T(-27.631021115928547)), over = z - floor;   // log 1e-12
  const Vector<T> magnitude = over > Vector<T>{} ? over : -over;
  return (over > Vector<T>{} ? z : floor) + log1p_unit<T>(exponential<T>(-magnitude));
}

// log cosh(d / 2) for d >= 0; relative error some eps. Its Taylor series up to 1, beyond it d / 2 - log(2 / (1 + e^-d)).
template <class T>
inline Vector<T> log_cosh_half(Vector<T> d) {
  // 2^(2n - 1) (2^2n - 1) B_2n / (n (2n)!), n = 1, 2, ...
  constexpr double series[] = {0.5, -0.08333333333333333, 0.022222222222222223, -0.006746031746031746, 0.0021869488536155205, -0.0007386029608251831, 0.0002565805740408915, -9.09896491907074e-05, 3.277930227475478e-05, -1.1956455712177625e-05, 4.405244525877023e-06, -1.6365968284715348e-06, 6.122655795895756e-07, -2.3041747198769394e-07, 8.715903837635848e-08, -3.3116463500327045e-08};
  constexpr int count = sizeof(T) == 4 ? 8 : 16;
  const Vector<T> y = broadcast(T(0.25)) * d * d, one = broadcast(T(1));
  Vector<T> near{};
  for (int n = count - 1; n >= 0; --n) near = near * y + broadcast(T(series[n]));
  const Vector<T> e = exponential<T>(-d), far = broadcast(T(0.5)) * d - twice_atanh<T>((one - e) / (broadcast(T(3)) + e));
  return d < one ? near * y : far;
}

template <class T, bool released>
inline Terms<T> terms(Vector<T> log_p, Vector<T> log_q) {
  const Vector<T> zero{}, one = broadcast(T(1)), half = broadcast(T(0.5));
  const Vector<T> p = exponential<T>(log_p), q = exponential<T>(log_q);
  const Vector<T> d = released ? floored<T>(log_p) - floored<T>(log_q) : log_p - log_q, magnitude = d > zero ? d : -d;
  const Vector<T> mean_over_root = log_cosh_half<T>(magnitude);   // log M - (log P + log Q) / 2
  if constexpr (!released) {
    const Vector<T> apart = half * d;   // log(P / M) = d / 2 - that, log(Q / M) = -d / 2 - that
    const Vector<T> difference = p > q ? p - q : q - p;
    return {p, q, half * p * (apart - mean_over_root), half * q * (-apart - mean_over_root), half * (half * magnitude * difference - (p + q) * mean_over_root)};
  }
  const Vector<T> e = exponential<T>(-magnitude), inverse = one / e, p_over_q = d > zero ? inverse : e, q_over_p = d > zero ? e : inverse;
  return {p, q, half * p * (mean_over_root + half * (one - q_over_p)), half * q * (mean_over_root + half * (one - p_over_q)),
          (half * (p + q) + broadcast(T(kReleasedEpsilon))) * mean_over_root};
}

// ---- operands -----------------------------------------------------------------------------------------------------------------------------------------------

std::int64_t columns_of(std::int64_t B) { return round_up(B, kBlock); }

template <class T>
struct Side {   // the rows of x or of y as both operands of their products
  std::int64_t D;
  T *row_panels, *column_panels;
  Side(std::int64_t B, std::int64_t D, Arena& arena) : D(D), row_panels(arena.take<T>(packed_rows_size(columns_of(B), D))), column_panels(arena.take<T>(columns_of(B) * D)) {}

  void pack(Scalar dtype, const BatchedRows& from, std::int64_t B, const Parallel& parallel) const {
    constexpr int P = kPanelColumns<T>;
    pack_rows<kRegisterRows>(dtype, from, B, D, row_panels, parallel);
    pack_rows<P>(dtype, from, B, D, column_panels, parallel);
    const std::int64_t packed = round_up(B, P), rows = round_up(B, kRegisterRows);
    std::memset(column_panels + packed * D, 0, (columns_of(B) - packed) * D * sizeof(T));
    std::memset(row_panels + rows * D, 0, (columns_of(B) - rows) * D * sizeof(T));
  }
  void product(std::int64_t row, std::int64_t rows, std::int64_t column, std::int64_t columns, T* tile, std::int64_t ld) const {
    tile_product_in_pieces<T>(row_panels + row * D, rows, column_panels + column * D, columns, D, tile, ld);
  }
};

template <class T>
struct Operands {
  Side<T> x, y;
  Operands(const StructureProblem& p, Arena& arena) : x(p.B, p.Dx, arena), y(p.B, p.Dy, arena) {}
  void pack(const StructureProblem& p, const Parallel& parallel) const {
    x.pack(p.dtype, p.x, p.B, parallel);
    y.pack(p.dtype, p.y, p.B, parallel);
  }
};

// ---- forward ------------------------------------------------------------------------------------------------------------------------------------------------

template <class T>
double sum_of(Vector<T> v) {
  double total = 0;
  for (int l = 0; l < kVectorLanes<T>; ++l) total += v[l];
  return total;
}

constexpr std::int64_t kRun = 256;   // columns that are added in T before they are added in double

// The log-sum-exp of a row of n logits, n a multiple of kBlock; `count` of them are there, the others become kAbsent.
template <class T>
double row_log_sum_exp(T* z, std::int64_t count, std::int64_t n) {
  constexpr int L = kVectorLanes<T>;
  for (std::int64_t j = count; j < n; ++j) z[j] = kAbsent<T>;
  Vector<T> top = broadcast(kAbsent<T>);
  for (std::int64_t j = 0; j < n; j += L) top = larger<T>(load(z + j), top);
  T maximum = kAbsent<T>;
  for (int l = 0; l < L; ++l) maximum = top[l] > maximum ? top[l] : maximum;
  double sum = 0;
  for (std::int64_t begin = 0; begin < n; begin += kRun) {
    Vector<T> part{};
    for (std::int64_t j = begin; j < minimum(begin + kRun, n); j += L) part += exponential<T>(load(z + j) - broadcast(maximum));
    sum += sum_of<T>(part);
  }
  return maximum + std::log(sum);
}

template <class T, bool released>
void finish_row(const StructureForward& to, std::int64_t B, std::int64_t i, T* x, T* y, std::int64_t n) {
  constexpr int L = kVectorLanes<T>;
  const double lse[2] = {row_log_sum_exp(x, B, n), row_log_sum_exp(y, B, n)};
  const LogSum<T> sum_x(lse[0]), sum_y(lse[1]);
  double loss = 0, c_x = 0, c_y = 0;
  for (std::int64_t begin = 0; begin < n; begin += kRun) {
    Vector<T> part{}, part_x{}, part_y{};
    for (std::int64_t j = begin; j < minimum(begin + kRun, n); j += L) {
      const Terms<T> t = terms<T, released>((load(x + j) - broadcast(sum_x.high)) - broadcast(sum_x.low), (load(y + j) - broadcast(sum_y.high)) - broadcast(sum_y.low));
      part += t.loss, part_x += t.f_p, part_y += t.f_q;
    }
    loss += sum_of<T>(part), c_x += sum_of<T>(part_x), c_y += sum_of<T>(part_y);
  }
  static_cast<T*>(to.loss)[i] = static_cast<T>(loss);
  to.statistics[i] = lse[0], to.statistics[B + i] = lse[1], to.statistics[2 * B + i] = c_x, to.statistics[3 * B + i] = c_y;
}

template <class T, bool released>
void forward(const StructureProblem& p, const StructureForward& to, const Operands<T>& operands, const Parallel& parallel) {
  operands.pack(p, parallel);
  const std::int64_t n = columns_of(p.B), blocks = n / kBlock;
  T* const kept = static_cast<T*>(to.products);
  if (kept) {   // block (I, J) for J >= I, and turned over
    parallel_for(parallel, 0, blocks * (blocks + 1) / 2, 1, [&](std::int64_t begin, std::int64_t end) {
      std::int64_t I = 0, first = 0;   // of the block row's blocks
      for (std::int64_t block = begin; block < end; ++block) {
        while (block >= first + blocks - I) first += blocks - I++;
        const std::int64_t row = I * kBlock, column = (I + block - first) * kBlock;
        for (int side = 0; side < 2; ++side) {
          T* const S = kept + side * n * n;
          (side ? operands.y : operands.x).product(row, kBlock, column, kBlock, S + row * n + column, n);
          if (row != column)
            for (std::int64_t i = 0; i < kBlock; ++i)
              for (std::int64_t j = 0; j < kBlock; ++j) S[(column + j) * n + row + i] = S[(row + i) * n + column + j];
        }
      }
    });
  }
  parallel_for(parallel, 0, blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> scratch(kept ? 0 : 2 * kBlock * n);
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t row = block * kBlock, rows = minimum(kBlock, p.B - row);
      T* const x = kept ? kept + row * n : scratch + 0;
      T* const y = kept ? kept + n * n + row * n : scratch + kBlock * n;
      for (std::int64_t column = 0; !kept && column < n; column += kTileColumns) {
        operands.x.product(row, rows, column, minimum(kTileColumns, n - column), x + column, n);
        operands.y.product(row, rows, column, minimum(kTileColumns, n - column), y + column, n);
      }
      for (std::int64_t i = 0; i < rows; ++i) finish_row<T, released>(to, p.B, row + i, x + i * n, y + i * n, n);
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------------------------------------------------

// What a row's softmaxes are to its column, for every row with its padding: [columns] each.
template <class T>
struct Columns {
  T *high_x, *low_x, *high_y, *low_y, *c_x, *c_y, *grad;
  Columns(std::int64_t n, Arena& arena) {
    for (T** each : {&high_x, &low_x, &high_y, &low_y, &c_x, &c_y, &grad}) *each = arena.take<T>(n);
  }
  void fill(const StructureProblem& p, const StructureBackward& to) const {
    for (std::int64_t j = 0; j < columns_of(p.B); ++j) {
      const bool here = j < p.B;
      const LogSum<T> sum_x(here ? to.statistics[j] : -kAbsent<T>), sum_y(here ? to.statistics[p.B + j] : -kAbsent<T>);
      high_x[j] = sum_x.high, low_x[j] = sum_x.low, high_y[j] = sum_y.high, low_y[j] = sum_y.low;
      c_x[j] = here ? static_cast<T>(to.statistics[2 * p.B + j]) : T(0), c_y[j] = here ? static_cast<T>(to.statistics[3 * p.B + j]) : T(0);
      grad[j] = here ? static_cast<const T*>(to.grad)[j * to.grad_stride] : T(0);
    }
  }
};

template <class T>
struct BackwardBuffers {
  Operands<T> operands;
  Columns<T> columns;
  T *values_x = nullptr, *values_y = nullptr;   // the rows as value operands
  BackwardBuffers(const StructureProblem& p, const StructureBackward& to, Arena& arena) : operands(p, arena), columns(columns_of(p.B), arena) {
    if (to.grad_x) values_x = arena.take<T>(packed_value_size<T>(columns_of(p.B), p.Dx));
    if (to.grad_y) values_y = arena.take<T>(packed_value_size<T>(columns_of(p.B), p.Dy));
  }
};

template <class T>
void pack_values(const Side<T>& side, std::int64_t n, T* values, const Parallel& parallel) {
  parallel_for(parallel, 0, n, 64, [&](std::int64_t begin, std::int64_t end) {
    Scratch<T> line(side.D);
    for (std::int64_t j = begin; j < end; ++j) {
      unpack_row(side.row_panels, j, side.D, static_cast<T*>(line));
      pack_value_row<T>(line, side.D, n, j, values);
    }
  });
}

// dS_ij + dS_ji of both sides for a tile of products, 0 on the diagonal, and the sums of dS_ij over each row of `count` added to sum_x, sum_y.
template <class T, bool released>
void coefficients(const Columns<T>& all, std::int64_t count, std::int64_t row, std::int64_t rows, std::int64_t column, std::int64_t columns, const T* x, const T* y, std::int64_t ld, T* to_x, T* to_y,
                  double* sum_x, double* sum_y) {
  constexpr int L = kVectorLanes<T>;
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t r = row + i;
    const auto of_row = [&](const T* values) { return broadcast(values[r]); };
    const Vector<T> high_x = of_row(all.high_x), low_x = of_row(all.low_x), high_y = of_row(all.high_y), low_y = of_row(all.low_y);
    const Vector<T> c_x = of_row(all.c_x), c_y = of_row(all.c_y), grad = of_row(all.grad);
    Vector<T> row_x{}, row_y{};
    for (std::int64_t c = 0; c < columns; c += L) {
      const std::int64_t j = column + c;
      const Vector<T> s_x = load(x + i * ld + c), s_y = load(y + i * ld + c);
      const Terms<T> across = terms<T, released>((s_x - high_x) - low_x, (s_y - high_y) - low_y);
      const Terms<T> down = terms<T, released>((s_x - load(all.high_x + j)) - load(all.low_x + j), (s_y - load(all.high_y + j)) - load(all.low_y + j));
      Vector<T> across_x = grad * (across.f_p - across.p * c_x), across_y = grad * (across.f_q - across.q * c_y);
      Vector<T> down_x = load(all.grad + j) * (down.f_p - down.p * load(all.c_x + j)), down_y = load(all.grad + j) * (down.f_q - down.q * load(all.c_y + j));
      if (r >= j && r < j + L) across_x[r - j] = across_y[r - j] = down_x[r - j] = down_y[r - j] = 0;
      for (std::int64_t l = maximum(0, count - j); l < L; ++l) across_x[l] = across_y[l] = 0;   // padding
      row_x += across_x, row_y += across_y;
      if (to_x) store(to_x + i * columns + c, across_x + down_x);
      if (to_y) store(to_y + i * columns + c, across_y + down_y);
    }
    sum_x[i] += sum_of<T>(row_x), sum_y[i] += sum_of<T>(row_y);
  }
}

template <class T, bool released>
void backward(const StructureProblem& p, const StructureBackward& to, const BackwardBuffers<T>& buffers, const Parallel& parallel) {
  const std::int64_t n = columns_of(p.B);
  const T* const kept = static_cast<const T*>(to.products);
  const Side<T>&x = buffers.operands.x, &y = buffers.operands.y;
  buffers.operands.pack(p, parallel);
  buffers.columns.fill(p, to);
  if (to.grad_x) pack_values(x, n, buffers.values_x, parallel);
  if (to.grad_y) pack_values(y, n, buffers.values_y, parallel);
  parallel_for(parallel, 0, n / kBlock, 1, [&](std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t size = kBlock * kTileColumns;
    Scratch<T> products(kept ? 0 : 2 * size), coefficient(2 * size), left(size);
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t row = block * kBlock, rows = minimum(kBlock, p.B - row);
      double sum_x[kBlock] = {}, sum_y[kBlock] = {};
      for (std::int64_t column = 0; column < n; column += kTileColumns) {
        const std::int64_t columns = minimum(kTileColumns, n - column), ld = kept ? n : kTileColumns;
        const T* s_x = products + 0;
        const T* s_y = products + size;
        if (kept) {
          s_x = kept + row * n + column, s_y = kept + n * n + row * n + column;
        } else {
          x.product(row, rows, column, columns, products, ld);
          y.product(row, rows, column, columns, products + size, ld);
        }
        T* const to_x = to.grad_x ? coefficient + 0 : nullptr;
        T* const to_y = to.grad_y ? coefficient + size : nullptr;
        coefficients<T, released>(buffers.columns, p.B, row, rows, column, columns, s_x, s_y, ld, to_x, to_y, sum_x, sum_y);
        const auto add = [&](const T* tile, const Side<T>& side, const T* values, void* gradient) {
          if (!tile) return;
          pack_tile_rows<T>(tile, columns, rows, columns, left);
          value_product<T>(left, rows, columns, values, n, column, side.D, static_cast<T*>(gradient) + row * side.D, side.D, column ? Into::add : Into::store);
        };
        add(to_x, x, buffers.values_x, to.grad_x);
        add(to_y, y, buffers.values_y, to.grad_y);
      }
      const auto add_diagonal = [&](const Side<T>& side, const double* sum, void* gradient) {
        Scratch<T> line(side.D);
        for (std::int64_t i = 0; gradient && i < rows; ++i) {
          unpack_row(side.row_panels, row + i, side.D, static_cast<T*>(line));
          add_scaled<T>(static_cast<T*>(gradient) + (row + i) * side.D, static_cast<T>(-2 * sum[i]), line, side.D);
        }
      };
      add_diagonal(x, sum_x, to.grad_x);
      add_diagonal(y, sum_y, to.grad_y);
    }
  });
}

// ---- entry points ---------------------------------------------------------------------------------------------------------------------------------------------

std::int64_t workspace_bytes(const StructureProblem& p) {
  return with_real(p.dtype, [&](auto real) {
    Arena arena(nullptr);
    Operands<decltype(real)>(p, arena);
    return arena.used();
  });
}

void run_forward(const StructureProblem& p, const StructureForward& to, void* workspace, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) {
    using T = decltype(real);
    Arena arena(workspace);
    const Operands<T> operands(p, arena);
    p.released ? forward<T, true>(p, to, operands, parallel) : forward<T, false>(p, to, operands, parallel);
  });
}

std::int64_t backward_workspace_bytes(const StructureProblem& p, const StructureBackward& to) {
  return with_real(p.dtype, [&](auto real) {
    Arena arena(nullptr);
    BackwardBuffers<decltype(real)>(p, to, arena);
    return arena.used();
  });
}

void run_backward(const StructureProblem& p, const StructureBackward& to, void* workspace, const Parallel& parallel) {
  with_real(p.dtype, [&](auto real) {
    using T = decltype(real);
    Arena arena(workspace);
    const BackwardBuffers<T> buffers(p, to, arena);
    p.released ? backward<T, true>(p, to, buffers, parallel) : backward<T, false>(p, to, buffers, parallel);
  });
}

}  // namespace

extern const StructureKernels kStructureKernels;
const StructureKernels kStructureKernels = {workspace_bytes, run_forward, backward_workspace_bytes, run_backward};

}  // inline namespace
}  // namespace modalign::cpu
