/// @file tile_forms.cpp
/// @brief The forms of the tile engine (cuda/tile_forms.cuh) in the emulator.
///
/// Arguments: batches, rows, columns, depth; row_operand, column_operand: [batches, lines, depth], for bf16x2 [2 planes, batches, lines, depth], for
/// product_lines [batches, depth, lines]; pad: elements between the lines' starts beyond the contiguous length (0: contiguous).
/// product: factor, addend (or missing), accumulate. log_sum_exp: scale, max_walks.
/// value_product: scale, width, values [batches, columns, width] (planes first for bf16x2).
#include "cuda/tile_forms.cuh"

#include "host/registry.h"

namespace modalign::host {
namespace {

using namespace modalign::cuda;

template <class T> Operand<T> operand(Run& run, const char* name, Major major, std::int64_t batches, std::int64_t lines, std::int64_t depth) {
  const std::int64_t pad = run.has("pad") ? run.integer("pad") : 0;
  const T* data = run.input<T>(name);
  if (major == Major::depth) return make_operand<T>(major, data, lines * (depth + pad), depth + pad, 1, batches * lines * (depth + pad));
  return make_operand<T>(major, data, depth * (lines + pad), 1, lines + pad, batches * depth * (lines + pad));
}

struct Sizes {
  std::int64_t batches, rows, columns, depth;
  explicit Sizes(Run& run)
      : batches(run.integer("batches")), rows(run.integer("rows")), columns(run.integer("columns")), depth(run.integer("depth")) {}
};

template <class Kernel> struct Form;

template <class Backend, class Out> struct Form<TileWalk<Backend, StoreTile<Backend, Out>>> {
  static void run(Run& run) {
    using Kernel = TileWalk<Backend, StoreTile<Backend, Out>>;
    using Source = typename Backend::Source;
    const Sizes s(run);
    const Major major = run.key().find("lines") != std::string::npos ? Major::line : Major::depth;
    Out* out = run.output<Out>("out", {s.batches, s.rows, s.columns});
    const auto make = [&](const Out* addend) {
      return product_form<Kernel>(operand<Source>(run, "row_operand", major, s.batches, s.rows, s.depth),
                                  operand<Source>(run, "column_operand", major, s.batches, s.columns, s.depth), s.rows, s.columns, s.depth, out,
                                  addend, static_cast<Out>(run.number("factor")));
    };
    const Kernel kernel = make(run.input<Out>("addend"));
    run.launch(kernel, kernel.plan(s.batches, FormKey<Kernel>::value));
    if (run.has("accumulate") && run.flag("accumulate")) {
      const Kernel again = make(out);
      run.launch(again, again.plan(s.batches, FormKey<Kernel>::value));
    }
  }
};

template <class Backend> struct Form<TileWalk<Backend, LogSumExpTile<Backend>>> {
  static void run(Run& run) {
    using Kernel = TileWalk<Backend, LogSumExpTile<Backend>>;
    using Source = typename Backend::Source;
    using Real = typename Backend::Real;
    const Sizes s(run);
    const LogSumExpPlan<Kernel> plan(s.rows, s.columns, s.depth, run.integer("max_walks"));
    Pack<Real, 2>* row_slots = reinterpret_cast<Pack<Real, 2>*>(run.workspace<Real>("row_slots", 2 * s.batches * plan.row_slots()));
    Pack<Real, 2>* column_slots = reinterpret_cast<Pack<Real, 2>*>(run.workspace<Real>("column_slots", 2 * s.batches * plan.column_slots()));
    const Kernel kernel = log_sum_exp_form<Kernel>(plan, operand<Source>(run, "row_operand", Major::depth, s.batches, s.rows, s.depth),
                                                   operand<Source>(run, "column_operand", Major::depth, s.batches, s.columns, s.depth),
                                                   static_cast<Real>(run.number("scale")), row_slots, column_slots);
    run.launch(kernel, kernel.plan(s.batches, FormKey<Kernel>::value));
    const FoldLogSumExp<Real> fold_rows{row_slots, run.output<Real>("row_max", {s.batches, s.rows}), run.output<Real>("row_sum", {s.batches, s.rows}),
                                        s.rows, plan.grid.column_walks};
    run.launch(fold_rows, fold_rows.plan(s.batches, FormKey<FoldLogSumExp<Real>>::value));
    const FoldLogSumExp<Real> fold_columns{column_slots, run.output<Real>("column_max", {s.batches, s.columns}),
                                           run.output<Real>("column_sum", {s.batches, s.columns}), s.columns, plan.grid.row_walks};
    run.launch(fold_columns, fold_columns.plan(s.batches, FormKey<FoldLogSumExp<Real>>::value));
  }
};
template <class Real> struct Form<FoldLogSumExp<Real>> {
  static void run(Run& run) { Form<LogSumExpForm<DepthFma<Real>>>::run(run); }
};

template <class Backend, class Out> struct Form<TileWalk<Backend, ValueProductTile<Backend, Out>>> {
  static void run(Run& run) {
    using Kernel = TileWalk<Backend, ValueProductTile<Backend, Out>>;
    using Source = typename Backend::Source;
    const Sizes s(run);
    const int width = static_cast<int>(run.integer("width"));
    const Source* values = run.input<Source>("values");
    const Kernel kernel = value_product_form<Kernel>(
        operand<Source>(run, "row_operand", Major::depth, s.batches, s.rows, s.depth),
        operand<Source>(run, "column_operand", Major::depth, s.batches, s.columns, s.depth),
        make_operand<Source>(Major::line, values, s.columns * width, 1, width, s.batches * s.columns * width), s.rows, s.columns, s.depth, width,
        static_cast<Out>(run.number("scale")), run.output<Out>("out", {s.batches, s.rows, width}));
    run.launch(kernel, kernel.plan(s.batches, FormKey<Kernel>::value));
  }
};

template <class Kernel> KernelEntry entry(const std::string& key) {
  return {.key = key, .family = "tile", .run = &Form<Kernel>::run, .threads = Kernel::kThreads, .tags = {{"dtype", key.substr(key.rfind('.') + 1)}}};
}

const std::vector<Registration> kRegistrations = [] {
  std::vector<Registration> all;
#define MODALIGN_REGISTER(key, ...) all.emplace_back(entry<__VA_ARGS__>(key));
  MODALIGN_TILE_FORMS(MODALIGN_REGISTER)
#undef MODALIGN_REGISTER
  return all;
}();

}   // namespace
}   // namespace modalign::host
