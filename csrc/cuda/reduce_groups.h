// Host-callable launches of reduce_groups and spread_groups on CUDA. No torch and no CUDA header is needed to include this. Conventions: cuda/gram_volume.h. No workspace.
//
// The values of offsets and members are not looked at (that would wait for the device). Where they do not hold every row once, nothing beyond the arrays is read or written.
#pragma once

#include <cstdint>

#include "ops/reduce_groups.h"

namespace modalign::cuda {

int launch_reduce_groups(const GroupsProblem& problem, const GroupsResult& output, void* stream);
int launch_spread_groups(const GroupsProblem& problem, const GroupsResult& output, void* stream);

const char* group_kernel_catalogue();   // keys of this family's compiled instances, one a line

}   // namespace modalign::cuda
