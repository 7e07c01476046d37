// Host-callable launches of the Gramian volume family on CUDA. No torch and no CUDA header is needed to include this.
//
// Every launch_* enqueues its kernels on `stream` (a cudaStream_t) and returns a cudaError_t as int, 0 when all were accepted; nothing synchronises.
// `workspace` is one device allocation of at least the bytes that the matching *_workspace function states, aligned to 256; it may be reused as soon
// as later work is ordered after the stream. Sizes of zero are legal everywhere: outputs without elements are not touched, sums over nothing are
// zero.
#pragma once

#include <cstdint>

#include "ops/gram_volume.h"

namespace modalign::cuda {

std::int64_t gram_volume_workspace(const GramVolumeProblem& problem);
int launch_gram_volume(const GramVolumeProblem& problem, const PairForward& output, void* workspace, void* stream);

// Backward reads problem.anchor alone of the inputs; `others` pointers may be null. The coefficients of the gradient are kept for as many rows at a
// time as `workspace_bytes` allows (0: one tile of rows); the answer also holds what grows with (B + C) D. The result of the launch depends on the
// workspace size only by rounding (the order in which row panels are added); for one size it is the same bit by bit from run to run.
std::int64_t gram_volume_bwd_workspace(const GramVolumeProblem& problem, std::int64_t workspace_bytes);
int launch_gram_volume_bwd(const GramVolumeProblem& problem, const PairBackward& backward, void* workspace, std::int64_t workspace_size,
                           void* stream);

std::int64_t triangle_area_workspace(const TriangleAreaProblem& problem);
int launch_triangle_area(const TriangleAreaProblem& problem, const PairForward& output, void* workspace, void* stream);
std::int64_t triangle_area_bwd_workspace(const TriangleAreaProblem& problem, std::int64_t workspace_bytes);
int launch_triangle_area_bwd(const TriangleAreaProblem& problem, const PairBackward& backward, void* workspace, std::int64_t workspace_size,
                             void* stream);

// value [N] dtype; grad [N] dtype with any stride; grad_vectors [N, k, D] dtype, contiguous. One workspace size serves both directions.
std::int64_t paired_gram_volume_workspace(const PairedGramVolumeProblem& problem);
int launch_paired_gram_volume(const PairedGramVolumeProblem& problem, void* value, void* workspace, void* stream);
int launch_paired_gram_volume_bwd(const PairedGramVolumeProblem& problem, const void* grad, std::int64_t grad_stride, void* grad_vectors,
                                  void* workspace, void* stream);

const char* error_name(int error);   // text for a nonzero result
const char* kernel_catalogue();      // keys of this family's compiled instances, one a line

}   // namespace modalign::cuda
