/// @file match_tokens.cpp
/// @brief match_tokens in the emulator: every key of the compiled table, run through the very launch sequence of cuda/match_tokens.cu.
///
/// Running any key runs the whole sequence. Arguments: B, T, D; features [B, N, D] with strides as in host/gram_volume.cpp; cu int32 [B + 1] and longest, where items are packed (features
/// [T, D]); first, split, r, threshold or None, keep_order; blocks, of which more walks are made. The keys without a dtype run the sequence in float.
#include "cuda/match_tokens.cuh"

#include "host/pair_arguments.h"

namespace modalign::host {
namespace {

using namespace modalign::cuda;

template <class T> void match(Run& run) {
  MatchProblem p{};
  p.B = run.integer("B"), p.T = run.integer("T"), p.D = run.integer("D");
  p.cu = run.input<std::int32_t>("cu");
  p.longest = p.cu != nullptr ? run.integer("longest") : p.B > 0 ? p.T / p.B : 0;
  p.features = rows<T>(run, "features", p.longest, p.D);
  p.first = run.integer("first"), p.split = run.integer("split"), p.r = run.integer("r"), p.keep_order = run.flag("keep_order");
  p.has_threshold = run.has("threshold");
  if (p.has_threshold) p.threshold = run.number("threshold");
  const auto ints = [&](const char* name, std::int64_t count) { return run.output<std::int32_t>(name, {count}); };
  const MatchResult to{run.output<real_of<T>>("score", {p.T}), ints("group", p.T), ints("members", p.T), ints("offsets", p.T + 1), ints("rows", p.B + 1)};
  HostArena arena(run);
  run_match_tokens<T>(to, MatchBuffers<T>(p, run.has("blocks") ? run.integer("blocks") : kMatchBlocks, arena), launcher(run));
}

// What element a kernel type belongs to.
template <class Kernel> constexpr auto kSequence = &match<float>;
template <class T> constexpr auto kSequence<PrepareTokens<T>> = &match<T>;
template <class T> constexpr auto kSequence<MatchScoreTiles<T>> = &match<T>;
template <class Real> constexpr auto kSequence<BestTargets<Real>> = &match<Real>;
template <class Real> constexpr auto kSequence<RankSources<Real>> = &match<Real>;

template <class Kernel> KernelEntry entry(const std::string& key) {
  return {.key = key, .family = "match_tokens", .run = kSequence<Kernel>, .threads = Kernel::kThreads, .tags = {{"dtype", key.substr(key.rfind('.') + 1)}}};
}

const std::vector<Registration> kRegistrations = [] {
  std::vector<Registration> all;
#define MODALIGN_REGISTER(key, ...) all.emplace_back(entry<__VA_ARGS__>(key));
  MODALIGN_MATCH_KERNELS(MODALIGN_REGISTER)
#undef MODALIGN_REGISTER
  return all;
}();

}   // namespace
}   // namespace modalign::host
