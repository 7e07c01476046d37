/// @file pair_arguments.h
/// @brief How the bindings of the pair families read strided operands from Python, hand out workspace and launch.
#pragma once

#include "host/registry.h"
#include "ops/gram_volume.h"

namespace modalign::host {

// Every piece is an array of its own, so that a step over the edge of one is seen.
class HostArena {
 public:
  explicit HostArena(Run& run) : run_(run) {}
  template <class U> U* take(const char* name, std::int64_t count) { return run_.workspace<U>(name, count); }

 private:
  Run& run_;
};

// The sequences ask for each launch by its key, so that the table and the launches cannot drift apart.
inline auto launcher(Run& run) {
  return [&run](const auto& kernel, const simt::LaunchPlan& plan) {
    run.launch(kernel, plan);
    return 0;
  };
}

inline std::int64_t stride(Run& run, const std::string& name, const char* which, std::int64_t contiguous) {
  const std::string argument = name + "_" + which + "_stride";
  return run.has(argument.c_str()) ? run.integer(argument.c_str()) : contiguous;
}
template <class T> inline BatchedRows rows(Run& run, const std::string& name, std::int64_t count, std::int64_t D) {
  return {run.input<T>(name.c_str()), stride(run, name, "batch", count * D), stride(run, name, "row", D), stride(run, name, "element", 1)};
}
inline PresenceMask presence(Run& run, std::int64_t count, int m) {
  if (!run.has("present")) return {nullptr, 0, 0, 0};
  return {run.input<bool>("present"), stride(run, "present", "batch", count * m), stride(run, "present", "row", m),
          stride(run, "present", "element", 1)};
}

}   // namespace modalign::host
