// Facts about this binary, exported as plain C so that they can be read without torch (python/modalign/_load.py does, by ctypes).
#include "cpu/instruction_set.h"
#ifdef MODALIGN_WITH_CUDA
#include <string>

#include "cuda/attention_scores.h"
#include "cuda/contrastive_loss.h"
#include "cuda/dynamic_mask.h"
#include "cuda/gram_volume.h"
#include "cuda/knn.h"
#include "cuda/masked_attention.h"
#include "cuda/match_tokens.h"
#include "cuda/reduce_groups.h"
#include "cuda/segment_max_similarity.h"
#include "cuda/structure_loss.h"
#endif

#define MODALIGN_EXPORT extern "C" __attribute__((visibility("default")))

MODALIGN_EXPORT const char* modalign_build_info() { return MODALIGN_BUILD_INFO; }   // JSON, written by CMake
MODALIGN_EXPORT const char* modalign_compiled_instruction_sets() { return modalign::cpu::compiled_instruction_sets(); }
MODALIGN_EXPORT const char* modalign_instruction_set() { return modalign::cpu::instruction_set_name(); }
MODALIGN_EXPORT bool modalign_use_instruction_set(const char* name) { return modalign::cpu::use_instruction_set(name); }
MODALIGN_EXPORT const char* modalign_kernel_catalogue() {
#ifdef MODALIGN_WITH_CUDA
  static const std::string all = std::string(modalign::cuda::kernel_catalogue()) + modalign::cuda::contrastive_kernel_catalogue() +
                                 modalign::cuda::segment_max_kernel_catalogue() + modalign::cuda::knn_kernel_catalogue() +
                                 modalign::cuda::structure_kernel_catalogue() + modalign::cuda::attention_kernel_catalogue() +
                                 modalign::cuda::attention_score_kernel_catalogue() + modalign::cuda::dynamic_mask_kernel_catalogue() +
                                 modalign::cuda::match_tokens_kernel_catalogue() + modalign::cuda::group_kernel_catalogue();
  return all.c_str();
#else
  return "";
#endif
}
