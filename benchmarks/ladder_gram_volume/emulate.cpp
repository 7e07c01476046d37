// Runs the CUDA ladder in the emulator, in several orders of threads and blocks, and compares with double precision. Needs no GPU and no CUDA.
// Prints one line per rung: name, largest error over RMS. Exit code 1: an error was too large; 2: the emulator reported a broken rule.
#include "ladder.cuh"
#include "problem.h"

#include <exception>

using namespace modalign::simt;

namespace {

const float* upload(DeviceMemory& memory, const char* name, const std::vector<float>& values) {
  Allocation& array = memory.allocate(name, values.size() * sizeof(float), sizeof(float));
  std::memcpy(array.data, values.data(), array.bytes);
  DeviceMemory::written_by_host(array);
  return reinterpret_cast<const float*>(array.data);
}

float* reserve(DeviceMemory& memory, const char* name, std::int64_t count) {
  return reinterpret_cast<float*>(memory.allocate(name, count * sizeof(float), sizeof(float)).data);
}

}  // namespace

int main() try {
  double worst[3] = {};
  const char* names[3] = {"naive", "tiled", "fused"};
  for (const auto& [B, C, D, m] : {std::tuple{70, 37, 21, 2}, std::tuple{33, 50, 16, 3}, std::tuple{1, 1, 3, 1}, std::tuple{65, 20, 19, 5}})
    for (int order = 0; order < 2; ++order) {
      const ladder::HostProblem host(B, C, D, m, 7);
      Options options;
      options.seed = 11 + order;
      options.thread_order = options.block_order = order ? Order::random : Order::forward;
      options.yield_probability = order ? 0.05 : 0;
      for (int rung = 0; rung < 3; ++rung) {
        DeviceMemory memory;
        const ladder::Problem p{B, C, D, m, upload(memory, "anchor", host.anchor), upload(memory, "basis", host.basis), upload(memory, "scale", host.scale)};
        float* volume = reserve(memory, "volume", std::int64_t(B) * C);
        if (rung == 0) emulator.run(ladder::NaiveKernel{p, volume}, ladder::plan_naive(p), options);
        if (rung == 1) {
          float* coefficients = reserve(memory, "coefficients", std::int64_t(B) * C * m);
          float* squares = reserve(memory, "squares", B);
          emulator.run(ladder::TiledProductKernel{p, coefficients, squares}, ladder::plan_tiled_product(p), options);
          emulator.run(ladder::VolumeKernel{p, coefficients, squares, volume}, ladder::plan_volume(p), options);
        }
        if (rung == 2) emulator.run(ladder::FusedKernel{p, volume}, ladder::plan_fused(p), options);
        const double error = host.relative_error(std::vector<float>(volume, volume + std::int64_t(B) * C));
        worst[rung] = error > worst[rung] ? error : worst[rung];
      }
    }
  bool good = true;
  for (int rung = 0; rung < 3; ++rung) {
    std::printf("%s %.3g\n", names[rung], worst[rung]);
    good = good && worst[rung] < 1e-5;
  }
  return good ? 0 : 1;
} catch (const std::exception& broken) {
  std::fprintf(stderr, "%s\n", broken.what());
  return 2;
}
