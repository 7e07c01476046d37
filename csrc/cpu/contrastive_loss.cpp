// Contrastive losses over all pairs on the CPU, forward and backward, with no matrix of similarities; compiled once per instruction set.
//
// Maths      ops/contrastive_loss.h. The values of a tile become logits in place; engine form (c) folds them into log-sum-exps of rows and columns at once, beside them
//            sums and the largest are kept. Backward makes each tile again, forms dL/dz from the saved log-sum-exps and goes on as pair_gradient.h does.
//            (GRAM, ICLR 2025; CLIP 2021; SigLIP 2023; TRIANGLE, NeurIPS 2025; recomputation as in FlashAttention and Inf-CL.)
// Label      the labelled pair of a row is always computed from its vectors. Sums of exponentials begin with it, in double, and its dL/dz is a single expm1: losses
//            and gradients of nearly solved batches keep their digits, and no loss is below 0 by rounding.
// FLOPs      forward 2 B C m D, backward 6 B C m D (4 where the forward could keep its products); two exponentials per pair each (sigmoid: one).
// Memory     beyond in- and outputs: the packed operands; backward the operands and gradients of pair_gradient.h. Row statistics take at most 32 slots.
// Precision  tiles in float (double for double), all sums over tiles in double.
// Order      slots fixed by the problem, added in slot order: the same bits for any number of threads.

#include "cpu/contrastive_loss.h"

#include "cpu/gumbel.h"
#include "cpu/pair_gradient.h"

namespace modalign::cpu {
inline namespace MODALIGN_ISA {
namespace {

// ---- the plain product as a third geometry --------------------------------------------------------------------------------------------------------------

template <class T>
struct ProductGeometry {
  static constexpr int kData = 0;
  void column_data(std::int64_t, T*) const {}
};

template <class T>
struct ProductValues {
  const Sizes& sizes;
  const Operands<T>& operands;
  const T* columns;   // [C][D]
  Scratch<T> a;
  std::int64_t row = 0;

  ProductValues(const Sizes& sizes, const ProductGeometry<T>&, const Operands<T>& operands, const T* columns, bool)
      : sizes(sizes), operands(operands), columns(columns), a(sizes.D) {}
  void begin_row(std::int64_t i) { row = i; }
  T pair(std::int64_t j) {
    unpack_row(operands.row_panels, row, sizes.D, static_cast<T*>(a));
    return dot<T>(a, columns + j * sizes.D, sizes.D);
  }
  void operator()(std::int64_t, const T* s, T* out) const {
    for (int l = 0; l < kLanes<T>; ++l) out[l] = s[l];
  }
};

template <class T, class Geometry> struct ValuesOf { using type = PairValues<T, Geometry>; };
template <class T> struct ValuesOf<T, ProductGeometry<T>> { using type = ProductValues<T>; };

// ---- what both passes know about rows and columns -------------------------------------------------------------------------------------------------------

template <class T>
struct Sides {
  T scale, bias;
  std::int64_t* label;     // [B] column of the row's label, kNone without one, kNoPart for a row that takes no part
  T* active;               // [lane groups of C] 1 where the column takes part, else 0
  T* absent;               // [lane groups of C] 0 where the column takes part, else -infinity: added to logits
  Sides(std::int64_t B, std::int64_t C, Arena& arena) {
    label = arena.take<std::int64_t>(B);
    active = arena.take<T>(round_up(C, kLanes<T>));
    absent = arena.take<T>(round_up(C, kLanes<T>));
  }
};

// row(i), column(j): whether they may take part at all
template <class T, class Row, class Column>
void fill_sides(const ContrastiveProblem& p, const Sides<T>& sides, const Row& row, const Column& column) {
  const std::int64_t B = p.pairs.B, C = p.pairs.C;
  for (std::int64_t j = 0; j < round_up(C, kLanes<T>); ++j) {
    const bool here = j < C && column(j);
    sides.active[j] = here;
    sides.absent[j] = here ? 0 : -std::numeric_limits<T>::infinity();
  }
  for (std::int64_t i = 0; i < B; ++i) {
    const std::int64_t t = p.target ? p.target[i * p.target_stride] : i;
    sides.label[i] = t == kIgnoredTarget || !row(i) ? kNoPart : t >= 0 && t < C && sides.active[t] ? t : kNone;
  }
}

template <class T>
T read_scalar(const void* p) { return p ? *static_cast<const T*>(p) : T(0); }

// f(geometry) for the problem's form
template <class T, class F>
auto with_geometry(const ContrastiveProblem& p, const void* factor, const F& f) {
  if (p.form == PairForm::volume) return f(VolumeGeometry<T>{p.pairs.m, p.pairs.D, static_cast<const T*>(factor)});
  if (p.form == PairForm::triangle) return f(TriangleGeometry<T>{p.pairs.D, static_cast<const T*>(factor)});
  return f(ProductGeometry<T>{});
}

TriangleAreaProblem triangle_of(const GramVolumeProblem& p) { return {p.dtype, 1, p.B, p.C, p.D, false, p.eps, p.anchor, p.others[0], p.others[1]}; }

template <class T>
void widen_columns(const GramVolumeProblem& p, T* out, const Parallel& parallel) {
  parallel_for(parallel, 0, p.C, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t j = begin; j < end; ++j) load_row(p.dtype, p.others[0].data, j * p.others[0].row_stride, p.others[0].element_stride, p.D, out + j * p.D);
  });
}

int data_of(const ContrastiveProblem& p) { return p.form == PairForm::volume ? 1 : p.form == PairForm::triangle ? 3 : 0; }

// ---- forward --------------------------------------------------------------------------------------------------------------------------------------------

template <class T> using Integer = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;   // what comparing T gives; rows are fewer than 2^31

template <class T>
struct ForwardBuffers {
  Sides<T> sides;
  Operands<T> operands;
  T* columns = nullptr;        // form product: [C][D]
  StatisticsBuffers<T> statistics;
  T* row_label;                // [B] label logit
  double* row_sum;             // [slots][B]
  double* column_sum;          // [lane groups]
  T *row_top, *column_top;     // [slots][B], [lane groups] the largest logit ...
  Integer<T> *row_best, *column_best;   // ... and where it stands, kNone while there is none

  static Slots slots_of(const ContrastiveProblem& p) {
    const Columns<T> columns(p.pairs.C, p.pairs.D, p.pairs.m);
    return {(columns.count + columns.tile - 1) / columns.tile, kMaxSlots};
  }
  ForwardBuffers(const ContrastiveProblem& p, Arena& arena)
      : sides(p.pairs.B, p.pairs.C, arena), operands(sizes_of(p.pairs), data_of(p), arena),
        statistics(p.pairs.B, Columns<T>(p.pairs.C, p.pairs.D, p.pairs.m).groups * kLanes<T>, slots_of(p), arena) {
    const std::int64_t B = p.pairs.B, padded = round_up(p.pairs.C, kLanes<T>), slots = slots_of(p).count;
    if (p.form == PairForm::product) columns = arena.take<T>(p.pairs.C * p.pairs.D);
    row_label = arena.take<T>(B);
    row_sum = arena.take<double>(slots * B);
    column_sum = arena.take<double>(padded);
    row_top = arena.take<T>(slots * B);
    column_top = arena.take<T>(padded);
    row_best = arena.take<Integer<T>>(slots * B);
    column_best = arena.take<Integer<T>>(padded);
  }
};

// Turns a tile of products into logits in place (packed columns [.., m, lanes] become [.., lanes]); sums them (sigmoid: their softplus) and keeps the largest of each row
// and column. The largest are found before the label takes its exact value, so that equal vectors have equal logits and the lowest index wins.
// draw: the largest of logit + noise, without the label.
template <class T, class Values, bool draw>
struct Logits {
  const ContrastiveProblem& p;
  const ForwardBuffers<T>& buffers;
  std::int64_t groups;
  std::uint64_t seed;
  Values values;
  Scratch<T> column_sum;       // of one tile

  Tile<T> operator()(const Tile<T>& tile, std::int64_t slot) {
    constexpr int W = kLanes<T>, L = kVectorLanes<T>;
    const Sides<T>& sides = buffers.sides;
    const std::int64_t B = p.pairs.B, stride = p.pairs.m * W, first = tile.column / stride, last = minimum((tile.column + tile.columns) / stride, groups);
    const std::int64_t count = (last - first) * W, at = first * W;
    for (std::int64_t c = 0; c < count; ++c) column_sum[c] = 0;
    for (std::int64_t i = 0; i < tile.rows; ++i) {
      const std::int64_t row = tile.row + i, label = sides.label[row];
      T* z = tile.data + i * tile.ld;
      if (label == kNoPart) {
        for (std::int64_t c = 0; c < count; ++c) z[c] = -std::numeric_limits<T>::infinity();
        continue;
      }
      values.begin_row(row);
      Vector<T> sum{}, top = broadcast(-std::numeric_limits<T>::infinity());
      Vector<Integer<T>> best = broadcast(Integer<T>(kNone)), lane;
      for (int l = 0; l < L; ++l) lane[l] = l;
      for (std::int64_t group = first; group < last; ++group) {
        T *out = z + (group - first) * W, *lane_sum = column_sum + (group - first) * W;
        T value[W];
        values(group, z + (group - first) * stride, value);
        for (int l = 0; l < W; l += L) {
          const std::int64_t j = group * W + l;
          const Vector<T> logit = broadcast(sides.scale) * load(value + l) + broadcast(sides.bias) + load(sides.absent + j), column_top = load(buffers.column_top + j);
          Vector<T> row_rank = logit, column_rank = logit;
          if constexpr (draw) {
            const PairNoise<T> noise = pair_noise<T>(seed, row, j);
            row_rank += noise.row, column_rank += noise.column;
            if (label >= j && label < j + L) row_rank[label - j] = column_rank[label - j] = -std::numeric_limits<T>::infinity();
          }
          best = row_rank > top ? lane + broadcast(static_cast<Integer<T>>(j)) : best;
          top = row_rank > top ? row_rank : top;
          store(buffers.column_best + j, column_rank > column_top ? broadcast(static_cast<Integer<T>>(row)) : load(buffers.column_best + j));
          store(buffers.column_top + j, column_rank > column_top ? column_rank : column_top);
          store(out + l, logit);
        }
        if (label / W == group && label >= 0) out[label % W] = buffers.row_label[row];
        for (int l = 0; l < W; l += L) {
          const Vector<T> term = p.loss == PairLoss::sigmoid ? softplus<T>(load(out + l)) : load(out + l);
          const Vector<T> counted = load(sides.active + group * W + l) > Vector<T>{} ? term : Vector<T>{};
          sum += counted;
          store(lane_sum + l, load(lane_sum + l) + counted);
        }
        if (label / W == group && label >= 0) out[label % W] = -std::numeric_limits<T>::infinity();   // the sums of exponentials begin with it
      }
      double total = 0;
      T& row_top = buffers.row_top[slot * B + row];
      Integer<T>& row_best = buffers.row_best[slot * B + row];
      T tile_top = -std::numeric_limits<T>::infinity();
      Integer<T> tile_best = kNone;
      for (int l = 0; l < L; ++l) {
        total += sum[l];
        if (top[l] > tile_top || (top[l] == tile_top && best[l] < tile_best)) tile_top = top[l], tile_best = best[l];
      }
      if (tile_top > row_top) row_top = tile_top, row_best = tile_best;
      buffers.row_sum[slot * B + row] += total;
    }
    for (std::int64_t c = 0; c < count; ++c) buffers.column_sum[at + c] += column_sum[c];
    return {tile.row, tile.rows, at, count, tile.data, tile.ld};
  }
};

template <class T, class Geometry>
void forward(const ContrastiveProblem& p, const ContrastiveForward& to, const ForwardBuffers<T>& buffers, const T* basis, const Geometry& geometry, const Parallel& parallel) {
  using Values = typename ValuesOf<T, Geometry>::type;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  const Sizes sizes = sizes_of(p.pairs);
  const std::int64_t B = sizes.B, C = sizes.C, padded = round_up(C, kLanes<T>);
  const Sides<T>& sides = buffers.sides;
  pack_operands(sizes, p.pairs.dtype, p.pairs.anchor, 0, basis, geometry, buffers.operands, parallel, [&](std::int64_t i) { return sides.label[i] != kNoPart; });

  parallel_for(parallel, 0, B, 32, [&](std::int64_t begin, std::int64_t end) {
    Values values(sizes, geometry, buffers.operands, basis, false);
    for (std::int64_t i = begin; i < end; ++i) {
      values.begin_row(i);
      buffers.row_label[i] = sides.label[i] >= 0 ? sides.scale * values.pair(sides.label[i]) + sides.bias : T(0);
    }
  });
  for (std::int64_t j = 0; j < padded; ++j) buffers.column_sum[j] = 0, buffers.column_top[j] = -infinity, buffers.column_best[j] = kNone;
  const Columns<T> columns(C, sizes.D, sizes.m);
  const Slots slots = ForwardBuffers<T>::slots_of(p);
  for (std::int64_t i = 0; i < slots.count * B; ++i) buffers.row_sum[i] = 0, buffers.row_top[i] = -infinity, buffers.row_best[i] = kNone;

  const PackedPair<T> pair{buffers.operands.row_panels, B, buffers.operands.column_panels, columns.count, sizes.D, columns.tile, static_cast<T*>(to.products)};
  double *row_lse = to.row_lse, *column_lse = to.column_lse;
  T *row_sum = static_cast<T*>(to.row_sum), *label = static_cast<T*>(to.label), *column_sum = static_cast<T*>(to.column_sum), *loss = static_cast<T*>(to.loss), *classes = static_cast<T*>(to.classes);
  const auto walk = [&](auto draw) {
    const auto make_logits = [&] {
      const std::uint64_t seed = p.seed ? static_cast<std::uint64_t>(*p.seed) : 0;
      return Logits<T, Values, decltype(draw)::value>{p, buffers, columns.groups, seed, Values(sizes, geometry, buffers.operands, basis, false), Scratch<T>(columns.tile)};
    };
    if (p.loss == PairLoss::sigmoid) {
      for_each_slot_tile<T>(pair, slots, parallel, [&] { return [logits = make_logits()](const Tile<T>& tile, std::int64_t slot) mutable { logits(tile, slot); }; });
      for (std::int64_t i = 0; i < B; ++i) row_lse[i] = sides.label[i] == kNoPart ? -infinity : 0;
      for (std::int64_t j = 0; j < C; ++j) column_lse[j] = sides.absent[j];
      return;
    }
    log_sum_exp<T>(pair, C, slots, buffers.statistics, row_lse, column_lse, parallel, make_logits, [&](const OnlineSum<T>& row, const OnlineSum<T>& column) {
      for (std::int64_t i = 0; i < B; ++i) {
        const std::int64_t t = sides.label[i];
        if (t < 0) continue;
        merge(row.maximum[i], row.sum[i], buffers.row_label[i], 1);
        merge(column.maximum[t], column.sum[t], buffers.row_label[i], 1);
      }
    });
  };
  if (p.seed) walk(std::true_type());
  else walk(std::false_type());

  double rows_here = 0, columns_here = 0, labelled = 0;
  for (std::int64_t j = 0; j < C; ++j) columns_here += sides.active[j];
  for (std::int64_t i = 0; i < B; ++i) rows_here += sides.label[i] != kNoPart, labelled += sides.label[i] >= 0;
  classes[0] = static_cast<T>(columns_here), classes[1] = static_cast<T>(rows_here), classes[2] = static_cast<T>(labelled);
  double center = 0;
  if (p.loss == PairLoss::softmax)
    for (std::int64_t j = 0; j < C; ++j)
      if (sides.active[j] != 0) center += (column_lse[j] - std::log(rows_here) - sides.bias) / sides.scale / columns_here;
  classes[3] = static_cast<T>(std::abs(center) < infinity ? center : 0);
  for (std::int64_t j = 0; j < C; ++j) {
    column_sum[j] = static_cast<T>(buffers.column_sum[j]);
    to.column_best[j] = p.seed && sides.active[j] != 0 ? buffers.column_best[j] : kNone;
  }
  for (std::int64_t i = 0; i < B; ++i) {
    double sum = 0;
    T top = -infinity;
    std::int64_t best = p.seed ? kNone : C;
    for (std::int64_t slot = 0; slot < slots.count; ++slot) {
      sum += buffers.row_sum[slot * B + i];
      if (buffers.row_top[slot * B + i] > top) top = buffers.row_top[slot * B + i], best = buffers.row_best[slot * B + i];
    }
    const std::int64_t t = sides.label[i];
    const double z = buffers.row_label[i], lambda = p.label_smoothing;
    if (t >= 0 && !p.seed) to.column_best[t] = buffers.column_best[t] == kNone ? B : buffers.column_best[t];
    to.row_best[i] = t == kNoPart || (t < 0 && !p.seed) ? kNone : best;
    row_sum[i] = static_cast<T>(sum);
    label[i] = static_cast<T>(z);
    if (p.loss == PairLoss::sigmoid) loss[i] = static_cast<T>(sum - z);
    else if (t < 0) loss[i] = 0;
    else
      loss[i] = static_cast<T>(p.row_part * (row_lse[i] - z + lambda * (z - sum / columns_here)) +
                               p.column_part * (column_lse[t] - z + lambda * (z - buffers.column_sum[t] / rows_here)));
  }
}

template <class T>
void forward_of(const ContrastiveProblem& p, const ContrastiveForward& to, void* workspace, const Parallel& parallel) {
  Arena arena(workspace);
  ForwardBuffers<T> buffers(p, arena);
  buffers.sides.scale = read_scalar<T>(p.scale);
  buffers.sides.bias = read_scalar<T>(p.bias);
  const PresenceMask& present = p.pairs.present;
  fill_sides(p, buffers.sides, [](std::int64_t) { return true; }, [&](std::int64_t j) {
    bool any = present.data == nullptr;
    for (int o = 0; o < p.pairs.m && !any; ++o) any = present.data[j * present.row_stride + o * present.element_stride];
    return any;
  });
  T* basis = static_cast<T*>(to.basis);
  if (p.form == PairForm::volume) candidate_basis(p.pairs, 0, basis, static_cast<T*>(to.factor), parallel);
  else if (p.form == PairForm::triangle) candidate_basis(triangle_of(p.pairs), 0, basis, static_cast<T*>(to.factor), parallel);
  else widen_columns(p.pairs, basis = buffers.columns, parallel);
  with_geometry<T>(p, to.factor, [&](const auto& geometry) { forward(p, to, buffers, basis, geometry, parallel); });
}

// ---- backward -------------------------------------------------------------------------------------------------------------------------------------------

template <class T>
struct LossBuffers {
  Sides<T> sides;
  T* columns = nullptr;    // form product: [C][D]
  T *column_high, *column_low;   // [lane groups] its log-sum-exp, +infinity where the column takes no part
  T* column_weight;        // [lane groups]
  double* slot_scale;      // [slots][2]
  LossBuffers(const ContrastiveProblem& p, Arena& arena) : sides(p.pairs.B, p.pairs.C, arena) {
    const std::int64_t padded = round_up(p.pairs.C, kLanes<T>);
    if (p.form == PairForm::product) columns = arena.take<T>(p.pairs.C * p.pairs.D);
    column_high = arena.take<T>(padded);
    column_low = arena.take<T>(padded);
    column_weight = arena.take<T>(padded);
    slot_scale = arena.take<double>(kMaxSlots * 2);
  }
};

// dL/dvalue of the pairs of a row, a lane group at a time.
template <class T>
struct LossUpstream {
  const ContrastiveProblem& p;
  const LossBuffers<T>& buffers;
  const T* row_weight;
  const double* row_lse;
  T row_share, column_share;   // lambda / columns, lambda / rows
  T row_part, column_part, smoothing, center;
  std::int64_t label = kNone;
  T g = 0;
  LogSum<T> lse{0};
  Vector<T> dscale{}, dbias{};
  alignas(64) T out[kLanes<T>] = {};

  std::int64_t begin_row(std::int64_t row, std::int64_t, std::int64_t) {
    label = buffers.sides.label[row];
    g = label == kNoPart ? T(0) : row_weight[row];
    lse = LogSum<T>(row_lse[row]);
    dscale = dbias = Vector<T>{};
    return label;
  }
  const T* weights(std::int64_t group, const T* value) {
    constexpr int W = kLanes<T>, L = kVectorLanes<T>;
    const Sides<T>& sides = buffers.sides;
    for (int l = 0; l < W; l += L) {
      const std::int64_t at = group * W + l;
      const Vector<T> v = load(value + l), z = broadcast(sides.scale) * v + broadcast(sides.bias), here = load(sides.active + at);
      Vector<T> dz;
      if (p.loss == PairLoss::sigmoid) {
        dz = broadcast(g) * sigmoid<T>(z);
      } else {
        const Vector<T> h = load(buffers.column_weight + at);
        dz = broadcast(row_part * g) * (exponential<T>(z - broadcast(lse.high) - broadcast(lse.low)) - broadcast(row_share)) +
             broadcast(column_part) * h * (exponential<T>(z - load(buffers.column_high + at) - load(buffers.column_low + at)) - broadcast(column_share));
      }
      if (label >= at && label < at + L) {
        const int lane = static_cast<int>(label - at);
        if (p.loss == PairLoss::sigmoid) dz[lane] -= g;
        else dz[lane] = of_label(z[lane], at + lane);
      }
      dz = here > Vector<T>{} ? dz : Vector<T>{};
      dscale += here > Vector<T>{} ? dz * (v - broadcast(center)) : Vector<T>{};
      dbias += dz;
      store(out + l, broadcast(sides.scale) * dz);
    }
    return out;
  }
  // The labelled pair's, with exp(z - lse) - 1 in one piece: in a nearly solved batch little is left of their difference.
  T of_label(T z, std::int64_t j) const {
    const T h = buffers.column_weight[j], along_row = std::expm1(z - lse.high - lse.low), along_column = std::expm1(z - buffers.column_high[j] - buffers.column_low[j]);
    return row_part * g * (along_row + (smoothing - row_share)) + column_part * (h * (along_column + (smoothing - column_share)) + (1 - smoothing) * (h - g));
  }
  void end_row(std::int64_t slot) const {
    double scale = 0, bias = 0;
    for (int l = 0; l < kVectorLanes<T>; ++l) scale += dscale[l], bias += dbias[l];
    buffers.slot_scale[2 * slot] += scale;
    buffers.slot_scale[2 * slot + 1] += bias;
  }
};

// Form product: the coefficient of a pair is dL/dvalue itself.
template <class T>
struct ProductEpilogue {
  const Sizes& sizes;
  std::int64_t groups;
  ProductValues<T> values;
  LossUpstream<T> upstream;

  void operator()(const Tile<T>& tile, T*, std::int64_t slot) {
    constexpr int W = kLanes<T>;
    const std::int64_t first = tile.column / W, last = minimum((tile.column + tile.columns) / W, groups);
    for (std::int64_t i = 0; i < tile.rows; ++i) {
      const std::int64_t named = upstream.begin_row(tile.row + i, first, last);
      if (named == kNoPart) {
        for (std::int64_t c = 0; c < tile.columns; ++c) tile.data[i * tile.ld + c] = 0;
        continue;
      }
      values.begin_row(tile.row + i);
      for (std::int64_t group = first; group < last; ++group) {
        T* s = tile.data + i * tile.ld + (group - first) * W;
        if (named >= 0 && named / W == group) s[named % W] = values.pair(named);
        const T* weights = upstream.weights(group, s);
        for (int l = 0; l < W; ++l) s[l] = weights[l];
      }
      upstream.end_row(slot);
    }
  }
};

template <class T>
struct BackwardOf {
  LossBuffers<T> loss;
  BackwardBuffers<T> pairs;
  BackwardOf(const ContrastiveProblem& p, Arena& arena) : loss(p, arena), pairs(sizes_of(p.pairs), data_of(p), arena) {}
};

template <class T>
void backward_of(const ContrastiveProblem& p, const ContrastiveBackward& to, void* workspace, const Parallel& parallel) {
  Arena arena(workspace);
  BackwardOf<T> buffers(p, arena);
  const Sizes sizes = sizes_of(p.pairs);
  const std::int64_t D = sizes.D;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  const double *row_lse = to.row_lse, *column_lse = to.column_lse;
  const T* classes = static_cast<const T*>(to.classes);
  LossBuffers<T>& loss = buffers.loss;
  loss.sides.scale = read_scalar<T>(p.scale);
  loss.sides.bias = read_scalar<T>(p.bias);
  fill_sides(p, loss.sides, [&](std::int64_t i) { return row_lse[i] != -infinity; }, [&](std::int64_t j) { return column_lse[j] != -infinity; });
  for (std::int64_t j = 0; j < round_up(sizes.C, kLanes<T>); ++j) {
    const LogSum<T> lse(loss.sides.active[j] != 0 ? column_lse[j] : infinity);
    loss.column_high[j] = lse.high, loss.column_low[j] = lse.low;
    loss.column_weight[j] = loss.sides.active[j] != 0 ? static_cast<const T*>(to.column_weight)[j] : 0;
  }
  for (std::int64_t s = 0; s < 2 * kMaxSlots; ++s) loss.slot_scale[s] = 0;
  const T* basis = static_cast<const T*>(to.basis);
  T* products = static_cast<T*>(const_cast<void*>(to.products));   // only read
  if (p.form == PairForm::product) widen_columns(p.pairs, loss.columns, parallel), basis = loss.columns;

  const auto make_upstream = [&] {
    const T lambda = static_cast<T>(p.label_smoothing);
    return LossUpstream<T>{p, loss, static_cast<const T*>(to.row_weight), row_lse, lambda == 0 ? 0 : lambda / classes[0], lambda == 0 ? 0 : lambda / classes[1],
                           static_cast<T>(p.row_part), static_cast<T>(p.column_part), lambda, classes[3]};
  };
  with_geometry<T>(p, to.factor, [&](const auto& geometry) {
    using Geometry = std::decay_t<decltype(geometry)>;
    pack_operands(sizes, p.pairs.dtype, p.pairs.anchor, 0, basis, geometry, buffers.pairs.operands, parallel,
                  [&](std::int64_t i) { return loss.sides.label[i] != kNoPart; });
    if constexpr (std::is_same_v<Geometry, ProductGeometry<T>>) {
      const Columns<T> columns(sizes.C, D, 1);
      gradient_walk<T>(
          {buffers.pairs.operands.row_panels, sizes.B, buffers.pairs.operands.column_panels, columns.count, D, columns.tile, products}, slots_of<T>(sizes, columns),
          buffers.pairs.gradient, to.grad_anchor != nullptr, to.grad_others != nullptr, Into::add, parallel, [&](std::int64_t c) { return columns.row(c, basis); },
          [&] { return ProductEpilogue<T>{sizes, columns.groups, ProductValues<T>(sizes, geometry, buffers.pairs.operands, basis, false), make_upstream()}; },
          [&](std::int64_t first, std::int64_t rows, const auto& add_slots) {
            parallel_for(parallel, 0, rows, 8, [&](std::int64_t begin, std::int64_t end) {
              Scratch<T> line(D);
              for (std::int64_t i = begin; i < end; ++i) {
                for (std::int64_t k = 0; k < D; ++k) line[k] = 0;
                add_slots(i, static_cast<T*>(line));
                store_row<T>(p.pairs.dtype, to.grad_anchor, (first + i) * D, D, line);
              }
            });
          });
      if (to.grad_others)
        for (std::int64_t j = 0; j < sizes.C; ++j) store_row<T>(p.pairs.dtype, to.grad_others, j * D, D, buffers.pairs.gradient.column_gradient + j * D);
    } else {
      pair_gradient(sizes, p.pairs.dtype, 0, false, p.pairs.eps, basis, geometry, to.grad_anchor, to.grad_others, buffers.pairs, parallel, make_upstream, products);
    }
  });
  double scale = 0, bias = 0;
  for (std::int64_t s = 0; s < kMaxSlots; ++s) scale += loss.slot_scale[2 * s], bias += loss.slot_scale[2 * s + 1];
  static_cast<T*>(to.grad_scale)[0] = static_cast<T>(scale);
  static_cast<T*>(to.grad_scale)[1] = static_cast<T>(bias);
}

// ---- entry points ---------------------------------------------------------------------------------------------------------------------------------------

template <template <class> class Buffers>
std::int64_t workspace(const ContrastiveProblem& p) {
  return with_real(p.pairs.dtype, [&](auto real) {
    Arena arena(nullptr);
    Buffers<decltype(real)>(p, arena);
    return arena.used();
  });
}
void forward_entry(const ContrastiveProblem& p, const ContrastiveForward& to, void* workspace, const Parallel& parallel) {
  with_real(p.pairs.dtype, [&](auto real) { forward_of<decltype(real)>(p, to, workspace, parallel); });
}
void backward_entry(const ContrastiveProblem& p, const ContrastiveBackward& to, void* workspace, const Parallel& parallel) {
  with_real(p.pairs.dtype, [&](auto real) { backward_of<decltype(real)>(p, to, workspace, parallel); });
}

}  // namespace

extern const ContrastiveKernels kContrastiveKernels;
const ContrastiveKernels kContrastiveKernels = {workspace<ForwardBuffers>, forward_entry, workspace<BackwardOf>, backward_entry};

}  // inline namespace
}  // namespace modalign::cpu
