/// @file attention_arguments.h
/// @brief How the bindings of the attention families read a call from Python.
///
/// Arguments: query [B, H, Nq, D], key [B, Hkv, Nk, D], D, each with <name>_row_stride and <name>_element_stride where rows are wider; scale, cap, causal (0, 1, 2), key_lengths [B],
/// bias [1 or B, heads, 1 or Nq, 1 or Nk] (bias_dtype f16 or bf16: of it, else of the accumulation), steps: the numbers of the op's mask_steps, whose tensors are m0, m1, ...
/// value [B, Hkv, Nk, Dv] and Dv where there are values; cu_queries, cu_keys [sequences + 1] of one item, max_queries, max_keys where sequences are packed.
#pragma once

#include "cuda/attention.cuh"
#include "host/pair_arguments.h"

namespace modalign::host {

template <class T> inline constexpr Scalar kScalar = sizeof(T) == 8 ? Scalar::f64 : sizeof(T) == 4 ? Scalar::f32 : std::is_same_v<T, simt::bf16> ? Scalar::bf16 : Scalar::f16;

template <class T> AttentionRows attention_rows(Run& run, const std::string& name) {
  const auto shape = run.shape(name.c_str());
  const std::int64_t element = stride(run, name, "element", 1), row = stride(run, name, "row", shape[3]);
  return {run.input<T>(name.c_str()), shape[1] * shape[2] * row, shape[2] * row, row, element};
}

inline std::int64_t broadcast(const std::vector<std::int64_t>& shape, std::size_t dimension) {
  if (shape[dimension] == 1) return 0;
  std::int64_t stride = 1;
  for (std::size_t d = dimension + 1; d < shape.size(); ++d) stride *= shape[d];
  return stride;
}

// As ops/masked_attention.cpp does it from tensors.
inline MaskProgram mask_program(Run& run) {
  MaskProgram program{};
  const auto steps = run.integers("steps");
  for (std::size_t at = 0; at < steps.size(); at += 4) {
    MaskStep& s = program.step[program.count++];
    s.kind = static_cast<MaskStepKind>(steps[at]);
    const auto name = [&](std::int64_t n) { return "m" + std::to_string(steps[at + 1] + n); };
    const auto shape = [&](std::int64_t n) { return run.shape(name(n).c_str()); };
    if (s.kind == MaskStepKind::relation) {
      const auto tokens = [&](std::int64_t n, std::int64_t& batch_stride, std::int64_t& in_all) {
        in_all = shape(n)[2], batch_stride = shape(n)[0] == 1 ? 0 : kTokenFields * in_all;
        return run.input<std::int32_t>(name(n).c_str());
      };
      s.query_tokens = tokens(0, s.query_batch_stride, s.query_tokens_in_all);
      s.key_tokens = tokens(1, s.key_batch_stride, s.key_tokens_in_all);
      s.heads = shape(2)[0], s.table = run.input<std::int32_t>(name(2).c_str());
      s.rules = run.input<std::int32_t>(name(3).c_str()), s.rules_in_all = shape(3)[0];
    } else if (s.kind == MaskStepKind::interval || s.kind == MaskStepKind::tiles || s.kind == MaskStepKind::dense) {
      const auto size = shape(0);
      s.heads = size[1], s.batch_stride = broadcast(size, 0), s.head_stride = broadcast(size, 1), s.row_stride = broadcast(size, 2), s.column_stride = broadcast(size, 3);
      s.tile_rows = s.kind == MaskStepKind::tiles ? steps[at + 2] : 1, s.tile_columns = s.kind == MaskStepKind::tiles ? steps[at + 3] : 1;
      if (s.kind == MaskStepKind::interval) s.intervals = run.input<std::int32_t>(name(0).c_str());
      else s.pairs = run.input<bool>(name(0).c_str());
    }
  }
  return program;
}

template <class T> AttentionProblem attention_problem(Run& run) {
  AttentionProblem p{};
  const auto query = run.shape("query"), key = run.shape("key");
  p.dtype = kScalar<T>;
  p.B = query[0], p.H = query[1], p.Hkv = key[1], p.Nq = p.total_queries = query[2], p.Nk = p.total_keys = key[2], p.D = p.Dv = run.integer("D");
  p.query = attention_rows<T>(run, "query"), p.key = p.value = attention_rows<T>(run, "key");
  if (run.has("value")) p.value = attention_rows<T>(run, "value"), p.Dv = run.integer("Dv");
  p.causal = static_cast<Causal>(run.integer("causal")), p.scale = run.number("scale"), p.cap = run.number("cap");
  if (run.has("cu_queries")) {
    p.B = run.shape("cu_queries")[0] - 1;
    p.cu_queries = run.input<std::int32_t>("cu_queries"), p.cu_keys = run.input<std::int32_t>("cu_keys");
    p.Nq = run.integer("max_queries"), p.Nk = run.integer("max_keys");
  }
  if (run.has("key_lengths")) p.key_lengths = run.input<std::int64_t>("key_lengths");
  if (run.has("bias")) {
    const auto shape = run.shape("bias");
    const std::string dtype = run.has("bias_dtype") ? run.text("bias_dtype") : "";
    const void* data = dtype == "f16" ? run.input<simt::f16>("bias") : dtype == "bf16" ? static_cast<const void*>(run.input<simt::bf16>("bias")) : run.input<cuda::real_of<T>>("bias");
    p.bias = {data, broadcast(shape, 0), broadcast(shape, 1), broadcast(shape, 2), broadcast(shape, 3), shape[1]};
    p.bias_dtype = dtype == "f16" ? Scalar::f16 : dtype == "bf16" ? Scalar::bf16 : kScalar<cuda::real_of<T>>;
  }
  p.mask = mask_program(run);
  return p;
}

}   // namespace modalign::host
