#include "cpu/instruction_set.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace modalign::cpu {
namespace {

bool supported(InstructionSet set) {
#if defined(__x86_64__)
  switch (set) {
    case InstructionSet::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case InstructionSet::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    default: return true;
  }
#else
  return set == InstructionSet::portable;
#endif
}

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

InstructionSet best() {
  for (InstructionSet set : {InstructionSet::avx512, InstructionSet::avx2})
    if (supported(set)) return set;
  return InstructionSet::portable;
}

// The environment variable is for tests and measurements; a name that cannot run here is ignored in favour of the best set, and `modalign info` shows what is used.
std::atomic<int>& current() {
  static std::atomic<int> set([] {
    const char* wanted = std::getenv("MODALIGN_INSTRUCTION_SET");
    for (int i = 0; wanted && i < 3; ++i)
      if (std::strcmp(wanted, kNames[i]) == 0 && supported(static_cast<InstructionSet>(i))) return i;
    return static_cast<int>(best());
  }());
  return set;
}

}  // namespace

InstructionSet instruction_set() { return static_cast<InstructionSet>(current().load(std::memory_order_relaxed)); }
const char* instruction_set_name() { return kNames[static_cast<int>(instruction_set())]; }

bool use_instruction_set(const char* name) {
  if (name == nullptr || std::strcmp(name, "auto") == 0) {
    current() = static_cast<int>(best());
    return true;
  }
  for (int i = 0; i < 3; ++i)
    if (std::strcmp(name, kNames[i]) == 0 && supported(static_cast<InstructionSet>(i))) {
      current() = i;
      return true;
    }
  return false;
}

const char* compiled_instruction_sets() {
#if defined(__x86_64__)
  return "portable avx2 avx512";
#else
  return "portable";
#endif
}

}  // namespace modalign::cpu
