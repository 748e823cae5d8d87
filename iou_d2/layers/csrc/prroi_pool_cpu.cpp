// The op's CPU implementation.
//
// N images, R RoIs, C channels; (H, W) map, (P, Q) bins. The kernels work on LANES neighbouring
// channels at once. Where the channels of a pixel are neighbours in memory (channels-last) they
// work in place; otherwise pixels are brought into tiles, some channels wide. No tensor is copied
// whole.
#include "prroi_pool.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu_backward_features.h"
#include "cpu_backward_rois.h"
#include "cpu_forward.h"
#include "cpu_memory.h"

namespace iou_d2::cpu {
namespace {

at::Tensor prroi_pool_cpu(const at::Tensor& features, const at::Tensor& rois, double spatial_scale,
                          int64_t P, int64_t Q, bool aligned) {
  check_arguments(features, rois, spatial_scale, P, Q);
  const at::Tensor map = features.to(at::toOpMathType(features.scalar_type()));
  const Shape s{map.size(0), map.size(1), map.size(2), map.size(3), rois.size(0), P, Q};
  at::Tensor out = empty({s.R, s.C, P, Q}, map.options().memory_format(format_of(features)));
  if (out.numel() == 0) return out.to(features.scalar_type());
  AT_DISPATCH_FLOATING_TYPES(map.scalar_type(), "prroi_pool", [&] {
    const Plans<scalar_t> plans(rois, s, spatial_scale, aligned);
    with_widest<scalar_t>([&](auto simd) { forward<decltype(simd)>(map, plans, out); });
  });
  return out.to(features.scalar_type());
}

at::Tensor prroi_pool_backward_features_cpu(const at::Tensor& grad, const at::Tensor& rois,
                                            at::IntArrayRef size, bool channels_last,
                                            double spatial_scale, bool aligned) {
  check_backward(grad, size, rois);
  const at::Tensor g = grad.to(at::toOpMathType(grad.scalar_type()));
  const auto format = channels_last ? kChannelsLast : at::MemoryFormat::Contiguous;
  at::Tensor out = empty(size, g.options().memory_format(format));
  const Shape s{size[0], size[1], size[2], size[3], rois.size(0), g.size(2), g.size(3)};
  if (g.numel() == 0) return out.zero_().to(grad.scalar_type());
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "prroi_pool_backward_features", [&] {
    const Plans<scalar_t> plans(rois, s, spatial_scale, aligned);
    with_widest<scalar_t>([&](auto simd) { backward_features<decltype(simd)>(g, plans, out); });
  });
  return out.to(grad.scalar_type());
}

at::Tensor prroi_pool_backward_rois_cpu(const at::Tensor& grad, const at::Tensor& features,
                                        const at::Tensor& output, const at::Tensor& rois,
                                        double spatial_scale, bool aligned) {
  check_backward(grad, features.sizes(), rois);
  TORCH_CHECK_VALUE(output.sizes() == grad.sizes() && output.scalar_type() == grad.scalar_type(),
                    "prroi_pool: the output and its gradient differ in shape or dtype.");
  const auto dtype = at::toOpMathType(features.scalar_type());
  const at::Tensor g = grad.to(dtype), map = features.to(dtype), pooled = output.to(dtype);
  at::Tensor out = at::zeros(rois.sizes(), rois.options().dtype(at::kDouble));
  const Shape s{map.size(0),  map.size(1), map.size(2), map.size(3),
                rois.size(0), g.size(2),   g.size(3)};
  if (g.numel() == 0) return out.to(rois.scalar_type());
  AT_DISPATCH_FLOATING_TYPES(dtype, "prroi_pool_backward_rois", [&] {
    Plans<scalar_t> plans(rois, s, spatial_scale, aligned);
    plans.set_edges();
    if (map.stride(1) == 1) plans.set_slopes();  // all channels of a pixel at once
    with_widest<scalar_t>([&](auto simd) {
      backward_rois<decltype(simd)>(g, map, pooled, plans, spatial_scale, out);
    });
  });
  return out.to(rois.scalar_type());
}

}  // namespace
}  // namespace iou_d2::cpu

TORCH_LIBRARY_IMPL(iou_d2, CPU, m) {
  m.impl("prroi_pool", iou_d2::cpu::prroi_pool_cpu);
  m.impl("prroi_pool_backward_features", iou_d2::cpu::prroi_pool_backward_features_cpu);
  m.impl("prroi_pool_backward_rois", iou_d2::cpu::prroi_pool_backward_rois_cpu);
}
