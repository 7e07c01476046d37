/// @file reduce_groups.cpp
/// @brief reduce_groups and spread_groups in the emulator. Arguments: R, M, C, mode (its number); from [R, C], or [M, C] for spread, with strides as in host/gram_volume.cpp; members int32 [R],
/// offsets int32 [M + 1], weight [R] or None.
#include "cuda/reduce_groups.cuh"

#include "host/pair_arguments.h"

namespace modalign::host {
namespace {

using namespace modalign::cuda;

template <class T> GroupsProblem problem_of(Run& run, const char* count) {
  GroupsProblem p{};
  p.C = run.integer("C"), p.mode = static_cast<GroupMode>(run.integer("mode"));
  p.groups = {run.integer("R"), run.integer("M"), run.input<std::int32_t>("members"), run.input<std::int32_t>("offsets"), run.input<real_of<T>>("weight")};
  p.from = rows<T>(run, "from", run.integer(count), p.C);
  return p;
}

template <class T> void reduce(Run& run) {
  const GroupsProblem p = problem_of<T>(run, "R");
  const GroupsResult to{run.output<T>("to", {p.groups.M, p.C}), run.output<real_of<T>>("total", {p.groups.M})};
  launch_kernel(launcher(run), ReduceGroups<T>{{p, to}}, 1);
}
template <class T> void spread(Run& run) {
  const GroupsProblem p = problem_of<T>(run, "M");
  const GroupsResult to{run.output<T>("to", {p.groups.R, p.C}), nullptr};
  launch_kernel(launcher(run), SpreadGroups<T>{{p, to}}, 1);
}

template <class Kernel> constexpr auto kSequence = nullptr;
template <class T> constexpr auto kSequence<ReduceGroups<T>> = &reduce<T>;
template <class T> constexpr auto kSequence<SpreadGroups<T>> = &spread<T>;

template <class Kernel> KernelEntry entry(const std::string& key) {
  return {.key = key, .family = "reduce_groups", .run = kSequence<Kernel>, .threads = Kernel::kThreads, .tags = {{"dtype", key.substr(key.rfind('.') + 1)}}};
}

const std::vector<Registration> kRegistrations = [] {
  std::vector<Registration> all;
#define MODALIGN_REGISTER(key, ...) all.emplace_back(entry<__VA_ARGS__>(key));
  MODALIGN_GROUP_KERNELS(MODALIGN_REGISTER)
#undef MODALIGN_REGISTER
  return all;
}();

}   // namespace
}   // namespace modalign::host
