// gram_contrastive_loss, triangle_contrastive_loss, clip_loss, siglip_loss: one schema, one check, CPU and CUDA entry points. ops/contrastive_loss.h says what the numbers are.
#include "ops/contrastive_loss.h"

#include <cmath>
#include <tuple>

#include "common/check.h"
#include "common/stable.h"
#include "cpu/contrastive_loss.h"
#ifdef MODALIGN_WITH_CUDA
#include "cuda/contrastive_loss.h"
#endif
#include "ops/cuda_call.h"

namespace modalign {
namespace {

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor>;
using Optional = std::optional<Tensor>;

template <PairForm form_, PairLoss loss_>
struct Loss {
  static constexpr PairForm form = form_;
  static constexpr PairLoss loss = loss_;
  static constexpr const char* name = loss == PairLoss::sigmoid ? "siglip_loss" : form == PairForm::product ? "clip_loss" : form == PairForm::triangle ? "triangle_contrastive_loss" : "gram_contrastive_loss";
  static constexpr bool distance = form != PairForm::product;   // scale = -1 / temperature
  static constexpr std::size_t least = form == PairForm::triangle ? 2 : 1, most = form == PairForm::triangle ? 2 : form == PairForm::product ? 1 : kMaxOthers;
};

BatchedRows rows_of(const Tensor& t) { return {t.const_data_ptr(), 0, t.stride(0), t.stride(1)}; }

double value_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? *static_cast<const double*>(t.const_data_ptr()) : *static_cast<const float*>(t.const_data_ptr());
}

const void* check_scalar(const char* op, const char* argument, const Tensor& t, const Tensor& anchor) {
  check_like(op, argument, t, anchor, accumulation_type(anchor.scalar_type()));
  MODALIGN_CHECK(t.dim() == 0, op, ": ", argument, " must have no dimensions, got ", shape_of(t));
  return t.const_data_ptr();
}

// Values are looked at on the CPU alone: on a GPU that would wait for it.
template <class L>
void check_values(const ContrastiveProblem& p, const Tensor& scale, const Optional& bias) {
  const double s = value_of(scale);
  if (L::distance) {
    MODALIGN_CHECK(s < 0 && std::isfinite(s), L::name, ": temperature must be positive and finite, got ", -1 / s);
  } else {
    MODALIGN_CHECK(s > 0 && std::isfinite(s), L::name, ": logit_scale must be positive and finite, got ", s);
  }
  if (bias) MODALIGN_CHECK(std::isfinite(value_of(*bias)), L::name, ": logit_bias must be finite, got ", value_of(*bias));
  if (p.target)
    for (std::int64_t i = 0; i < p.pairs.B; ++i) {
      const std::int64_t t = p.target[i * p.target_stride];
      MODALIGN_CHECK(t == kIgnoredTarget || (t >= kNoTarget && t < p.pairs.C), L::name, ": target must hold indices from 0 to C - 1 = ", p.pairs.C - 1, ", -1 or -100, got ", t, " at row ", i);
    }
}

template <class L>
ContrastiveProblem check(const Tensor& anchor, const std::vector<Tensor>& others, const Tensor& scale, const Optional& bias, const Optional& target, const Optional& present,
                         double label_smoothing, double row_part, double column_part, double eps) {
  ContrastiveProblem p{};
  GramVolumeProblem& q = p.pairs;
  p.form = L::form, p.loss = L::loss;
  q.dtype = check_floating(L::name, "anchor", anchor);
  MODALIGN_CHECK(anchor.dim() == 2, L::name, ": anchor must have shape [B, D], got ", shape_of(anchor));
  MODALIGN_CHECK(others.size() >= L::least && others.size() <= L::most, L::name, ": others must hold ", L::least, " to ", L::most, " tensors, got ", others.size());
  MODALIGN_CHECK(others[0].dim() == 2, L::name, ": others must have shape [C, D], got ", shape_of(others[0]));
  MODALIGN_CHECK(eps >= 0 && std::isfinite(eps), L::name, ": eps must be finite and at least 0, got ", eps);
  MODALIGN_CHECK(label_smoothing >= 0 && label_smoothing < 1 && (L::loss == PairLoss::softmax || label_smoothing == 0), L::name, ": label_smoothing must be in [0, 1), got ", label_smoothing);
  q.N = 1, q.B = anchor.size(0), q.D = anchor.size(1), q.C = others[0].size(0), q.m = static_cast<int>(others.size()), q.eps = eps;
  q.anchor = rows_of(anchor);
  for (int o = 0; o < q.m; ++o) {
    check_like(L::name, "others", others[o], anchor, anchor.scalar_type());
    check_shape(L::name, "others", others[o], {q.C, q.D});
    q.others[o] = rows_of(others[o]);
  }
  if (present) {
    MODALIGN_CHECK(L::form != PairForm::triangle, L::name, ": present must be None, got a tensor");
    check_like(L::name, "present", *present, anchor, ScalarType::Bool);
    check_shape(L::name, "present", *present, {q.C, q.m});
    q.present = {static_cast<const bool*>(present->const_data_ptr()), 0, present->stride(0), present->stride(1)};
  }
  p.scale = check_scalar(L::name, L::distance ? "temperature" : "logit_scale", scale, anchor);
  if (bias) p.bias = check_scalar(L::name, "logit_bias", *bias, anchor);
  if (target) {
    check_like(L::name, "target", *target, anchor, ScalarType::Long);
    check_shape(L::name, "target", *target, {q.B});
    p.target = static_cast<const std::int64_t*>(target->const_data_ptr());
    p.target_stride = target->stride(0);
  }
  MODALIGN_CHECK(row_part >= 0 && column_part >= 0 && row_part + column_part <= 1, L::name, ": row_part and column_part must be at least 0 and add up to 1 at most, got ", row_part, " and ", column_part);
  p.label_smoothing = label_smoothing, p.row_part = row_part, p.column_part = column_part;
  if (!anchor.is_cuda()) check_values<L>(p, scale, bias);
  return p;
}

template <class L>
Forward forward(const Tensor& anchor, std::vector<Tensor> others, const Tensor& scale, Optional bias, Optional target, Optional present, double label_smoothing, double row_part, double column_part, double eps,
                std::int64_t workspace_bytes, Optional seed) {
  ContrastiveProblem p = check<L>(anchor, others, scale, bias, target, present, label_smoothing, row_part, column_part, eps);
  if (seed) {
    check_like(L::name, "seed", *seed, anchor, ScalarType::Long);
    check_shape(L::name, "seed", *seed, {});
    p.seed = static_cast<const std::int64_t*>(seed->const_data_ptr());
  }
  const std::int64_t B = p.pairs.B, C = p.pairs.C, D = p.pairs.D, m = p.pairs.m;
  const ScalarType real = accumulation_type(anchor.scalar_type()), whole = ScalarType::Long;
  const auto rows = [&](ScalarType type) { return new_tensor(anchor, {B}, type); };
  const auto columns = [&](ScalarType type) { return new_tensor(anchor, {C}, type); };
  Tensor loss = rows(real), row_lse = rows(ScalarType::Double), row_sum = rows(real), label = rows(real), row_best = rows(whole);
  Tensor column_lse = columns(ScalarType::Double), column_sum = columns(real), column_best = columns(whole), classes = new_tensor(anchor, {4}, real);
  const bool product = L::form == PairForm::product;
  Tensor basis = new_tensor(anchor, {product ? 0 : C, m, D}, real);
  Tensor factor = new_tensor(anchor, {product ? 0 : C, L::form == PairForm::triangle ? 3 : m * m}, real);
  const std::int64_t size = products_size(p.pairs), keep = !anchor.is_cuda() && size * accumulation_size(p.pairs.dtype) <= workspace_bytes ? size : 0;
  Tensor products = new_tensor(anchor, {keep}, real);
  const ContrastiveForward to{loss.mutable_data_ptr(), static_cast<double*>(row_lse.mutable_data_ptr()), static_cast<double*>(column_lse.mutable_data_ptr()), row_sum.mutable_data_ptr(), column_sum.mutable_data_ptr(),
                              label.mutable_data_ptr(), static_cast<std::int64_t*>(row_best.mutable_data_ptr()), static_cast<std::int64_t*>(column_best.mutable_data_ptr()),
                              classes.mutable_data_ptr(), basis.mutable_data_ptr(), factor.mutable_data_ptr(), keep ? products.mutable_data_ptr() : nullptr};
  if (anchor.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(anchor.get_device_index());
    const Tensor workspace = new_workspace(anchor, cuda::contrastive_loss_workspace(p));
    check_launch(L::name, cuda::launch_contrastive_loss(p, to, workspace.mutable_data_ptr(), current_cuda_stream(anchor.get_device_index())));
#endif
  } else {
    const cpu::ContrastiveKernels& kernels = cpu::contrastive_kernels();
    const Tensor workspace = new_workspace(anchor, kernels.workspace(p));
    kernels.forward(p, to, workspace.mutable_data_ptr(), kTorchParallel);
  }
  return {loss, row_lse, column_lse, row_sum, column_sum, label, row_best, column_best, classes, basis, factor, products};
}

template <class L>
Backward backward(const Tensor& row_weight, const Tensor& column_weight, const Tensor& row_lse, const Tensor& column_lse, const Tensor& classes, const Tensor& basis, const Tensor& factor,
                  const Tensor& products, const Tensor& anchor, std::vector<Tensor> others, const Tensor& scale, Optional bias, Optional target, Optional present, double label_smoothing, double row_part, double column_part, double eps,
                  bool need_anchor, bool need_others) {
  const ContrastiveProblem p = check<L>(anchor, others, scale, bias, target, present, label_smoothing, row_part, column_part, eps);
  const std::int64_t B = p.pairs.B, C = p.pairs.C, D = p.pairs.D, m = p.pairs.m;
  const ScalarType real = accumulation_type(anchor.scalar_type());
  const bool product = L::form == PairForm::product;
  const auto typed = [&](const char* argument, const Tensor& t, std::initializer_list<std::int64_t> shape, ScalarType type) {
    check_like(L::name, argument, t, anchor, type);
    check_shape(L::name, argument, t, shape);
    MODALIGN_CHECK(t.is_contiguous(), L::name, ": ", argument, " must be contiguous, got a strided one");
    return t.const_data_ptr();
  };
  const auto data = [&](const char* argument, const Tensor& t, std::initializer_list<std::int64_t> shape) { return typed(argument, t, shape, real); };
  MODALIGN_CHECK(!anchor.is_cuda() || products.numel() == 0, L::name, ": products must be empty on a GPU, got ", shape_of(products));
  Tensor grad_anchor = need_anchor ? new_tensor(anchor, {B, D}, anchor.scalar_type()) : new_tensor(anchor, {0}, anchor.scalar_type());
  Tensor grad_others = need_others ? new_tensor(anchor, {C, m, D}, anchor.scalar_type()) : new_tensor(anchor, {0}, anchor.scalar_type());
  Tensor grad_scale = new_tensor(anchor, {2}, real);
  const ContrastiveBackward to{data("row_weight", row_weight, {B}),
                               data("column_weight", column_weight, {C}),
                               static_cast<const double*>(typed("row_lse", row_lse, {B}, ScalarType::Double)),
                               static_cast<const double*>(typed("column_lse", column_lse, {C}, ScalarType::Double)),
                               data("classes", classes, {4}),
                               data("basis", basis, {product ? 0 : C, m, D}),
                               data("factor", factor, {product ? 0 : C, L::form == PairForm::triangle ? 3 : m * m}),
                               products.numel() ? data("products", products, {products_size(p.pairs)}) : nullptr,
                               need_anchor ? grad_anchor.mutable_data_ptr() : nullptr,
                               need_others ? grad_others.mutable_data_ptr() : nullptr,
                               grad_scale.mutable_data_ptr()};
  if (anchor.is_cuda()) {
#ifdef MODALIGN_WITH_CUDA
    const DeviceGuard device(anchor.get_device_index());
    const std::int64_t bytes = cuda::contrastive_loss_bwd_workspace(p, kWorkspaceBytes);
    const Tensor workspace = new_workspace(anchor, bytes);
    check_launch(L::name, cuda::launch_contrastive_loss_bwd(p, to, workspace.mutable_data_ptr(), bytes, current_cuda_stream(anchor.get_device_index())));
#endif
  } else {
    const cpu::ContrastiveKernels& kernels = cpu::contrastive_kernels();
    const Tensor workspace = new_workspace(anchor, kernels.bwd_workspace(p));
    kernels.backward(p, to, workspace.mutable_data_ptr(), kTorchParallel);
  }
  return {grad_anchor, grad_others, grad_scale};
}

using Gram = Loss<PairForm::volume, PairLoss::softmax>;
using Triangle = Loss<PairForm::triangle, PairLoss::softmax>;
using Clip = Loss<PairForm::product, PairLoss::softmax>;
using SigLip = Loss<PairForm::product, PairLoss::sigmoid>;

template <class L, class Library>
void define(Library& m) {
  const std::string inputs = "Tensor anchor, Tensor[] others, Tensor scale, Tensor? bias, Tensor? target, Tensor? present, float label_smoothing, float row_part, float column_part, float eps", name = L::name;
  m.def((name + "(" + inputs + ", int workspace_bytes, Tensor? seed=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)").c_str());
  m.def((name + "_bwd(Tensor row_weight, Tensor column_weight, Tensor row_lse, Tensor column_lse, Tensor classes, Tensor basis, Tensor factor, Tensor products, " + inputs +
         ", bool need_anchor, bool need_others) -> (Tensor, Tensor, Tensor)").c_str());
}

template <class L, class Library>
void implement(Library& m) {
  static const std::string name = L::name, name_bwd = name + "_bwd";
  m.impl(name.c_str(), TORCH_BOX(&forward<L>));
  m.impl(name_bwd.c_str(), TORCH_BOX(&backward<L>));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modalign, m) {
  define<Gram>(m);
  define<Triangle>(m);
  define<Clip>(m);
  define<SigLip>(m);
}

STABLE_TORCH_LIBRARY_IMPL(modalign, CPU, m) {
  implement<Gram>(m);
  implement<Triangle>(m);
  implement<Clip>(m);
  implement<SigLip>(m);
}
#ifdef MODALIGN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(modalign, CUDA, m) {
  implement<Gram>(m);
  implement<Triangle>(m);
  implement<Clip>(m);
  implement<SigLip>(m);
}
#endif

namespace cpu {
namespace portable { extern const ContrastiveKernels kContrastiveKernels; }
#ifdef MODALIGN_WITH_X86
namespace avx2 { extern const ContrastiveKernels kContrastiveKernels; }
namespace avx512 { extern const ContrastiveKernels kContrastiveKernels; }
#endif

const ContrastiveKernels& contrastive_kernels() {
#ifdef MODALIGN_WITH_X86
  return Variants<ContrastiveKernels>{&portable::kContrastiveKernels, &avx2::kContrastiveKernels, &avx512::kContrastiveKernels}.chosen();
#else
  return portable::kContrastiveKernels;
#endif
}
}  // namespace cpu

}  // namespace modalign
