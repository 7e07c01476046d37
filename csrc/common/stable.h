// The few things that ops need from torch, through its stable ABI only (TORCH_TARGET_VERSION is set by the build); the one place with version workarounds.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "ops/scalar.h"

namespace modalign {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's own thread pool, so that torch.set_num_threads rules.
inline constexpr cpu::Parallel kTorchParallel{[](std::int64_t begin, std::int64_t end, std::int64_t grain, cpu::Parallel::Body body, void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](std::int64_t first, std::int64_t last) { body(context, first, last); });
}};

inline ScalarType accumulation_type(ScalarType t) { return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline Tensor new_tensor(const Tensor& like, std::vector<std::int64_t> size, ScalarType dtype) { return torch::stable::new_empty(like, size, dtype); }
inline Tensor new_workspace(const Tensor& like, std::int64_t bytes) { return torch::stable::new_empty(like, {bytes}, ScalarType::Byte); }

// The current CUDA stream. libtorch_cuda is not linked, so that one binary loads with and without it: the getter is looked up in the library that torch has loaded.
inline void* current_cuda_stream(int device) {
  using Getter = std::int32_t (*)(std::int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(getter && getter(device, &stream) == 0, "modalign: the current CUDA stream of this torch build cannot be found");
  return stream;
}

}  // namespace modalign
