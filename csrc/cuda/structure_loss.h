// Host-callable launches of structure_loss on CUDA. No torch and no CUDA header is needed to include this. Conventions: cuda/gram_volume.h.
#pragma once

#include <cstdint>

#include "ops/structure_loss.h"

namespace modalign::cuda {

// `kept`: the products stay in output.products.
std::int64_t structure_loss_workspace(const StructureProblem& problem, bool kept);
int launch_structure_loss(const StructureProblem& problem, const StructureForward& output, void* workspace, void* stream);

std::int64_t structure_loss_bwd_workspace(const StructureProblem& problem, const StructureBackward& request);
int launch_structure_loss_bwd(const StructureProblem& problem, const StructureBackward& request, void* workspace, void* stream);

const char* structure_kernel_catalogue();   // keys of this family's compiled instances, one a line

}   // namespace modalign::cuda
