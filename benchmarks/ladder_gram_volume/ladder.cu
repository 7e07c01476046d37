// The CUDA ladder on a GPU: checks every rung against double precision, times it with events, prints JSON. Built and run by benchmarks/device.sh:
//   nvcc -std=c++20 -O3 -arch=native -I csrc benchmarks/ladder_gram_volume/ladder.cu -o ladder && ./ladder [B C D m rounds]
// Rounds are interleaved over the rungs; between calls a buffer larger than the second-level cache is written. No speed is printed for a wrong result.
#include "ladder.cuh"
#include "problem.h"

#include <algorithm>
#include <cstdlib>
#include <string>

using namespace modalign::simt;

namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
T* device(std::int64_t count) {
  T* pointer = nullptr;
  check(cudaMalloc(&pointer, std::max<std::int64_t>(count, 1) * sizeof(T)), "cudaMalloc");
  return pointer;
}

const float* upload(const std::vector<float>& values) {
  float* pointer = device<float>(values.size());
  check(cudaMemcpy(pointer, values.data(), values.size() * sizeof(float), cudaMemcpyHostToDevice), "cudaMemcpy");
  return pointer;
}

std::string format(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", x);
  return text;
}

double quantile(std::vector<float> values, double q) {
  std::sort(values.begin(), values.end());
  const double at = q * (values.size() - 1);
  const std::size_t low = static_cast<std::size_t>(at), high = std::min(low + 1, values.size() - 1);
  return values[low] + (at - low) * (values[high] - values[low]);
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int n, std::int64_t otherwise) { return argc > n ? std::atoll(argv[n]) : otherwise; };
  const std::int64_t B = argument(1, 2048), C = argument(2, 2048), D = argument(3, 512);
  const int m = static_cast<int>(argument(4, 2)), rounds = static_cast<int>(argument(5, 15));
  if (B < 1 || C < 1 || D < 1 || m < 1 || m > 7 || rounds < 1) {
    std::fprintf(stderr, "ladder: sizes must be B C D >= 1, 1 <= m <= 7, rounds >= 1\n");
    return 2;
  }
  const unsigned seed = 7;
  const ladder::HostProblem host(B, C, D, m, seed);
  const ladder::Problem p{B, C, D, m, upload(host.anchor), upload(host.basis), upload(host.scale)};
  float* volume = device<float>(B * C);
  float* coefficients = device<float>(B * C * m);
  float* squares = device<float>(B);
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  const std::size_t flush_bytes = 2 * std::max<std::size_t>(properties.l2CacheSize, 1 << 20);
  char* flush = device<char>(flush_bytes);

  const auto call = [&](int rung) {
    if (rung == 0) check(launch(ladder::NaiveKernel{p, volume}, ladder::plan_naive(p), nullptr), "naive");
    if (rung == 1) {
      check(launch(ladder::TiledProductKernel{p, coefficients, squares}, ladder::plan_tiled_product(p), nullptr), "tiled product");
      check(launch(ladder::VolumeKernel{p, coefficients, squares, volume}, ladder::plan_volume(p), nullptr), "tiled volume");
    }
    if (rung == 2) check(launch(ladder::FusedKernel{p, volume}, ladder::plan_fused(p), nullptr), "fused");
  };
  const char* names[3] = {"naive", "tiled", "fused"};
  double errors[3];
  std::vector<float> result(B * C), milliseconds[3];
  for (int rung = 0; rung < 3; ++rung) {
    check(cudaMemset(volume, 0xff, B * C * sizeof(float)), "cudaMemset");   // NaN: a pair that nobody writes is seen
    call(rung);
    check(cudaMemcpy(result.data(), volume, B * C * sizeof(float), cudaMemcpyDeviceToHost), "result");
    errors[rung] = host.relative_error(result, std::max<std::int64_t>(1, B / 32));
  }
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  for (int round = 0; round < rounds; ++round)
    for (int turn = 0; turn < 3; ++turn) {
      const int rung = (turn + round) % 3;
      check(cudaMemsetAsync(flush, round, flush_bytes), "flush");
      check(cudaEventRecord(begin), "event");
      call(rung);
      check(cudaEventRecord(end), "event");
      check(cudaEventSynchronize(end), "event");
      float elapsed;
      check(cudaEventElapsedTime(&elapsed, begin, end), "event");
      milliseconds[rung].push_back(elapsed);
    }
  std::printf("{\"schema\": \"modalign.cuda_ladder/1\", \"device\": \"%s\", \"capability\": \"%d.%d\", \"cuda\": %d, ", properties.name, properties.major,
              properties.minor, CUDART_VERSION);
  std::printf("\"parameters\": {\"B\": %lld, \"C\": %lld, \"D\": %lld, \"k\": %d}, \"seed\": %u, \"rounds\": %d, \"rows\": [", (long long)B, (long long)C,
              (long long)D, m + 1, seed, rounds);
  bool good = true;
  for (int rung = 0; rung < 3; ++rung) {
    const bool right = errors[rung] < 1e-5;
    good = good && right;
    std::printf("%s{\"provider\": \"%s\", \"status\": \"%s\", \"error\": %s", rung ? ", " : "", names[rung], right ? "ok" : "mismatch",
                std::isfinite(errors[rung]) ? format(errors[rung]).c_str() : "null");
    if (right) {
      const double median = quantile(milliseconds[rung], .5) / 1e3, q20 = quantile(milliseconds[rung], .2) / 1e3, q80 = quantile(milliseconds[rung], .8) / 1e3;
      std::printf(", \"seconds\": {\"median\": %.4g, \"q20\": %.4g, \"q80\": %.4g}, \"flop_per_second\": %.4g", median, q20, q80, 2.0 * B * C * m * D / median);
    }
    std::printf("}");
  }
  std::printf("]}\n");
  return good ? 0 : 1;
}
