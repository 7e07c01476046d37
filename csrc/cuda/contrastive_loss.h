// Host-callable launches of the contrastive losses on CUDA. No torch and no CUDA header is needed to include this. Conventions: cuda/gram_volume.h.
//
// The values of targets are not looked at (that would wait for the device): an index outside 0 ... C - 1 counts as no label.
#pragma once

#include <cstdint>

#include "ops/contrastive_loss.h"

namespace modalign::cuda {

std::int64_t contrastive_loss_workspace(const ContrastiveProblem& problem);
int launch_contrastive_loss(const ContrastiveProblem& problem, const ContrastiveForward& output, void* workspace, void* stream);

// `workspace_bytes` is what the coefficients of the gradient may take, a panel of rows at a time (0: one tile of rows); the answer also holds what
// grows with (B + C) D.
std::int64_t contrastive_loss_bwd_workspace(const ContrastiveProblem& problem, std::int64_t workspace_bytes);
int launch_contrastive_loss_bwd(const ContrastiveProblem& problem, const ContrastiveBackward& request, void* workspace,
                                std::int64_t workspace_size, void* stream);

const char* contrastive_kernel_catalogue();   // keys of this family's compiled instances, one a line

}   // namespace modalign::cuda
