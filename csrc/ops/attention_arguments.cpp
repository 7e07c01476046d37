#include "ops/attention_arguments.h"

#include "common/check.h"

namespace modalign {
namespace {

using Optional = std::optional<Tensor>;

std::int64_t broadcast_stride(const Tensor& t, std::int64_t dimension) { return t.size(dimension) == 1 ? 0 : t.stride(dimension); }

AttentionPairs pairs_of(const char* op, const char* argument, const Optional& t, const Tensor& like, const AttentionProblem& p) {
  if (!t) return {};
  MODALIGN_CHECK(t->is_cuda() == like.is_cuda() && t->get_device_index() == like.get_device_index(), op, ": ", argument, " must be on the device of the other arguments, got another one");
  const std::int64_t size[4] = {p.B, p.H, p.Nq, p.Nk};
  bool fits = t->dim() == 4;
  for (int d = 0; fits && d < 4; ++d) fits = t->size(d) == 1 || t->size(d) == size[d] || (d == 1 && t->size(1) == p.Hkv);
  MODALIGN_CHECK(fits && !p.cu_queries, op, ": ", argument, " must broadcast to [", p.B, ", ", p.H, ", ", p.Nq, ", ", p.Nk, "] and go without packed sequences, got ", shape_of(*t));
  return {t->const_data_ptr(), broadcast_stride(*t, 0), broadcast_stride(*t, 1), broadcast_stride(*t, 2), broadcast_stride(*t, 3), t->size(1)};
}

const std::int32_t* packed_of(const char* op, const char* argument, const Optional& t, const Tensor& like, std::int64_t sequences) {
  if (!t) return nullptr;
  check_like(op, argument, *t, like, ScalarType::Int);
  check_shape(op, argument, *t, {sequences + 1});
  MODALIGN_CHECK(t->is_contiguous(), op, ": ", argument, " must be contiguous, got a strided one");
  return static_cast<const std::int32_t*>(t->const_data_ptr());
}

// ---- masks ----------------------------------------------------------------------------------------------------------------------------------------------------

void check_rules(const char* op, const MaskStep& s, std::int64_t types, std::int64_t rules) {
  for (std::int64_t n = 0; n < types; ++n) MODALIGN_CHECK(s.table[n] >= 0 && s.table[n] < rules, op, ": mask must have a table of rules below ", rules, ", got ", s.table[n]);
  for (std::int64_t n = 0; n < rules; ++n) {
    const std::int32_t *rule = s.rules + n * (1 + kRuleParameters), *p = rule + 1;
    MODALIGN_CHECK(rule[0] >= 0 && rule[0] < kRules, op, ": mask must have rules from 0 to 15, got ", rule[0]);
    const bool grid = static_cast<Rule>(rule[0]) == Rule::grid_shift;
    for (int d = 0; grid && d < 3; ++d, p += 5)
      MODALIGN_CHECK(p[0] >= 1 && p[1] >= 1 && p[2] >= 1 && p[3] >= 1 && std::int64_t(p[1]) * p[2] <= p[0] && p[3] <= p[1], op,
                     ": mask must have a neighbourhood with stride <= kernel and kernel * dilation <= size, got size ", p[0], ", kernel ", p[1], ", dilation ", p[2], ", stride ", p[3]);
    MODALIGN_CHECK(static_cast<Rule>(rule[0]) != Rule::time_stride || rule[1] >= 1, op, ": mask must have a time stride of 1 or more, got ", rule[1]);
  }
}

void check_tokens(const char* op, const char* side, const std::int32_t* tokens, std::int64_t items, std::int64_t count) {
  for (std::int64_t b = 0; b < items; ++b, tokens += kTokenFields * count)
    for (std::int64_t n = 0; n < count; ++n) {
      const std::int32_t type = tokens[count + n], valid = tokens[8 * count + n];
      MODALIGN_CHECK(type >= 0 && type < kTokenTypes && (valid == 0 || valid == 1) && tokens[5 * count + n] >= 0 && tokens[6 * count + n] >= 0 && tokens[7 * count + n] >= 0, op,
                     ": mask must have ", side, " tokens with types from 0 to 15, valid 0 or 1 and coordinates of 0 or more, got another at token ", n);
    }
}

// One step of four numbers: kind, first tensor, and for tiles their rows and columns.
MaskProgram program_of(const AttentionArguments& a, const AttentionProblem& p) {
  const char* op = a.op;
  MaskProgram program{};
  const auto& steps = a.mask_steps;
  MODALIGN_CHECK(steps.size() % 4 == 0 && steps.size() <= 4 * kMaskSteps, op, ": mask must have at most ", kMaskSteps, " steps, got ", steps.size() / 4);
  MODALIGN_CHECK(steps.empty() || !p.cu_queries, op, ": mask must go without packed sequences");
  int depth = 0;
  for (std::size_t at = 0; at < steps.size(); at += 4) {
    MaskStep& s = program.step[program.count++];
    MODALIGN_CHECK(steps[at] >= 0 && steps[at] <= 6, op, ": mask must have steps of kind 0 to 6, got ", steps[at]);
    s.kind = static_cast<MaskStepKind>(steps[at]);
    const int takes = s.kind == MaskStepKind::inverse ? 1 : s.kind == MaskStepKind::both || s.kind == MaskStepKind::either ? 2 : 0;
    MODALIGN_CHECK(depth >= takes, op, ": mask must combine what came before, got too few");
    depth += takes == 2 ? -1 : takes == 1 ? 0 : 1;
    MODALIGN_CHECK(depth <= kMaskSteps / 2 + 1, op, ": mask must have at most ", kMaskSteps / 2 + 1, " open terms");
    if (takes) continue;
    const std::size_t first = static_cast<std::size_t>(steps[at + 1]), count = s.kind == MaskStepKind::relation ? 4 : 1;
    MODALIGN_CHECK(steps[at + 1] >= 0 && first + count <= a.mask_tensors.size(), op, ": mask must have a tensor for every term");
    const auto take = [&](std::size_t n, ScalarType dtype, bool contiguous) -> const Tensor& {
      const Tensor& t = a.mask_tensors[first + n];
      check_like(op, "mask", t, a.query, dtype);
      MODALIGN_CHECK(!contiguous || t.is_contiguous(), op, ": mask must have contiguous tokens and tables");
      return t;
    };
    const auto heads_of = [&](const Tensor& t) {
      MODALIGN_CHECK(t.size(t.dim() == 3 ? 0 : 1) > 0 && p.H % t.size(t.dim() == 3 ? 0 : 1) == 0, op, ": mask must have heads that divide ", p.H, ", got ", shape_of(t));
      return t.size(t.dim() == 3 ? 0 : 1);
    };
    if (s.kind == MaskStepKind::relation) {
      const auto tokens = [&](std::size_t n, std::int64_t N, std::int64_t& stride, std::int64_t& in_all) {
        const Tensor& t = take(n, ScalarType::Int, true);
        MODALIGN_CHECK(t.dim() == 3 && (t.size(0) == 1 || t.size(0) == p.B) && t.size(1) == kTokenFields && t.size(2) == N, op, ": mask must have tokens [1 or B, ", kTokenFields, ", ", N, "], got ",
                       shape_of(t));
        stride = t.size(0) == 1 ? 0 : kTokenFields * N, in_all = N;
        const auto* data = static_cast<const std::int32_t*>(t.const_data_ptr());
        if (!t.is_cuda()) check_tokens(op, n ? "key" : "query", data, t.size(0), N);
        return data;
      };
      s.query_tokens = tokens(0, p.Nq, s.query_batch_stride, s.query_tokens_in_all);
      s.key_tokens = tokens(1, p.Nk, s.key_batch_stride, s.key_tokens_in_all);
      const Tensor &table = take(2, ScalarType::Int, true), &rules = take(3, ScalarType::Int, true);
      MODALIGN_CHECK(table.dim() == 3, op, ": mask must have a table [heads, types, types], got ", shape_of(table));
      s.heads = heads_of(table);
      check_shape(op, "mask", table, {s.heads, kTokenTypes, kTokenTypes});
      check_shape(op, "mask", rules, {rules.size(0), 1 + kRuleParameters});
      s.table = static_cast<const std::int32_t*>(table.const_data_ptr()), s.rules = static_cast<const std::int32_t*>(rules.const_data_ptr());
      s.rules_in_all = rules.size(0);
      if (!table.is_cuda()) check_rules(op, s, s.heads * kTokenTypes * kTokenTypes, rules.size(0));
    } else {
      const Tensor& t = take(0, s.kind == MaskStepKind::interval ? ScalarType::Int : ScalarType::Bool, s.kind == MaskStepKind::interval);
      MODALIGN_CHECK(t.dim() == 4 && (t.size(0) == 1 || t.size(0) == p.B), op, ": mask must have four dimensions [1 or B, heads, ...], got ", shape_of(t));
      s.heads = heads_of(t);
      s.batch_stride = broadcast_stride(t, 0), s.head_stride = broadcast_stride(t, 1), s.row_stride = broadcast_stride(t, 2), s.column_stride = broadcast_stride(t, 3);
      s.tile_rows = s.kind == MaskStepKind::tiles ? steps[at + 2] : 1, s.tile_columns = s.kind == MaskStepKind::tiles ? steps[at + 3] : 1;
      MODALIGN_CHECK(s.tile_rows >= 1 && s.tile_columns >= 1, op, ": mask must have tiles of 1 or more, got ", s.tile_rows, " and ", s.tile_columns);
      const std::int64_t rows = s.kind == MaskStepKind::interval ? p.Nk : (p.Nq + s.tile_rows - 1) / s.tile_rows;
      const std::int64_t columns = s.kind == MaskStepKind::interval ? 2 : (p.Nk + s.tile_columns - 1) / s.tile_columns, least = s.kind == MaskStepKind::dense ? 1 : 0;
      MODALIGN_CHECK((t.size(2) == rows || t.size(2) == least) && (t.size(3) == columns || t.size(3) == least), op, ": mask must end in [", rows, ", ", columns, "], got ", shape_of(t));
      if (s.kind == MaskStepKind::interval) s.intervals = static_cast<const std::int32_t*>(t.const_data_ptr());
      else s.pairs = static_cast<const bool*>(t.const_data_ptr());
    }
  }
  MODALIGN_CHECK(depth == (program.count ? 1 : 0), op, ": mask must leave one answer, got ", depth);
  return program;
}

}  // namespace

AttentionProblem check_attention(const AttentionArguments& a) {
  const char* op = a.op;
  AttentionProblem p{};
  p.dtype = check_floating(op, "query", a.query);
  const auto operand = [&](const char* name, const Tensor& t) {
    check_like(op, name, t, a.query, a.query.scalar_type());
    MODALIGN_CHECK(t.dim() == 4 && t.size(0) == a.query.size(0), op, ": ", name, " must have shape [B, H, N, D] with the query's B, got ", shape_of(t));
    return rows_of(t);
  };
  MODALIGN_CHECK(a.query.dim() == 4, op, ": query must have shape [B, H, N, D], got ", shape_of(a.query));
  p.query = operand("query", a.query), p.key = operand("key", a.key), p.value = operand("value", a.value);
  p.H = a.query.size(1), p.Hkv = a.key.size(1), p.D = a.query.size(3), p.Dv = a.value.size(3);
  check_shape(op, "key", a.key, {a.query.size(0), p.Hkv, a.key.size(2), p.D});
  check_shape(op, "value", a.value, {a.query.size(0), p.Hkv, a.key.size(2), p.Dv});
  MODALIGN_CHECK(p.Hkv > 0 && p.H % p.Hkv == 0, op, ": key must have heads that divide the query's ", p.H, ", got ", p.Hkv);
  MODALIGN_CHECK(p.D > 0 && p.Dv > 0, op, ": query and value must have a last dimension of 1 or more, got ", shape_of(a.query), " and ", shape_of(a.value));
  p.B = a.query.size(0), p.Nq = p.total_queries = a.query.size(2), p.Nk = p.total_keys = a.key.size(2);
  constexpr std::int64_t kMost = 0x7fffffff - 128;   // row numbers are int32 on CUDA
  MODALIGN_CHECK(p.Nq <= kMost && p.Nk <= kMost, a.op, ": query and key must have fewer than ", kMost, " rows, got ", p.Nq, " and ", p.Nk);
  MODALIGN_CHECK(a.causal >= 0 && a.causal <= 2, op, ": causal must be 0, 1 or 2, got ", a.causal);
  p.causal = static_cast<Causal>(a.causal);
  p.scale = a.scale, p.cap = a.cap;
  MODALIGN_CHECK(a.cu_queries.has_value() == a.cu_keys.has_value(), op, ": cu_queries and cu_keys must be given together");
  if (a.cu_queries) {
    MODALIGN_CHECK(p.B == 1 && a.cu_queries->dim() == 1 && a.cu_queries->size(0) > 0, op, ": packed sequences must lie in one item, got ", shape_of(a.query));
    p.B = a.cu_queries->size(0) - 1;
    p.cu_queries = packed_of(op, "cu_queries", a.cu_queries, a.query, p.B), p.cu_keys = packed_of(op, "cu_keys", a.cu_keys, a.query, p.B);
    p.Nq = a.max_queries, p.Nk = a.max_keys;
    if (!a.query.is_cuda()) {   // on a GPU that would wait for it
      MODALIGN_CHECK(p.cu_queries[0] == 0 && p.cu_keys[0] == 0 && p.cu_queries[p.B] == p.total_queries && p.cu_keys[p.B] == p.total_keys, op,
                     ": cu_queries and cu_keys must begin with 0 and end with the number of rows");
      for (std::int64_t b = 0; b < p.B; ++b) {
        const std::int64_t queries = p.cu_queries[b + 1] - p.cu_queries[b], keys = p.cu_keys[b + 1] - p.cu_keys[b];
        MODALIGN_CHECK(queries >= 0 && queries <= p.Nq && keys >= 0 && keys <= p.Nk, op, ": cu_queries and cu_keys must rise by at most max_queries = ", p.Nq, " and max_keys = ", p.Nk,
                       ", got ", queries, " and ", keys, " for sequence ", b);
      }
    }
  }
  p.mask = program_of(a, p);
  p.bias = pairs_of(op, "bias", a.bias, a.query, p);
  if (a.bias) p.bias_dtype = check_floating(op, "bias", *a.bias);
  if (a.key_lengths) {
    check_like(op, "key_lengths", *a.key_lengths, a.query, ScalarType::Long);
    check_shape(op, "key_lengths", *a.key_lengths, {p.B});
    MODALIGN_CHECK(a.key_lengths->is_contiguous() && !p.cu_queries, op, ": key_lengths must be contiguous and go without packed sequences");
    p.key_lengths = static_cast<const std::int64_t*>(a.key_lengths->const_data_ptr());
    if (!a.query.is_cuda())
      for (std::int64_t b = 0; b < p.B; ++b)
        MODALIGN_CHECK(p.key_lengths[b] >= 0 && p.key_lengths[b] <= p.Nk, op, ": key_lengths must be from 0 to ", p.Nk, ", got ", p.key_lengths[b], " at ", b);
  }
  return p;
}

}  // namespace modalign
