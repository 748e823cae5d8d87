// The op's CPU implementation.
//
// N images, R RoIs, C channels; (H, W) map, (P, Q) bins. The kernels work on LANES neighbouring
// channels at once. Where the channels of a pixel are neighbours in memory (channels-last) they
// work in place; otherwise the pixels under a RoI are gathered, LANES channels at a time, into a
// small tile. No tensor is copied whole.
#include "prroi_pool.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "cpu_plan.h"

namespace iou_d2::cpu {
namespace {

template <typename T>
struct Scratch {
  Tile<T> pixels, bins, outputs;
  std::vector<double> corners;
};

template <typename T>
void pool_direct(const Strided<const T>& map, const Plan<T>& plan, int64_t r, int64_t c0,
                 int64_t c1, const Strided<T>& out, const Shape& s, Scratch<T>& scratch) {
  constexpr int64_t LANES = Simd<T>::LANES;
  const Bins<T>&y = plan.y, &x = plan.x;
  if (map.channel == 1 && out.channel == 1) {
    const int64_t whole = (c1 - c0) / LANES * LANES;
    const auto from = map.grid(plan.roi.image, c0, y.origin, x.origin);
    const auto to = out.grid(r, c0, 0, 0);
    run_widest([&]() IOU_D2_INLINE_LAMBDA { pool<T>(from, y, x, to, whole); });
    c0 += whole;
  }
  if (c0 == c1) return;
  scratch.pixels.resize(y.extent, x.extent);
  scratch.bins.resize(s.P, s.Q);
  for (; c0 < c1; c0 += LANES) {
    const int64_t lanes = std::min(LANES, c1 - c0);
    const T* start = map.at(plan.roi.image, c0, y.origin, x.origin);
    run_widest([&]() IOU_D2_INLINE_LAMBDA {
      pool<T>(scratch.pixels.gather(map, start, lanes), y, x, scratch.bins.grid(), LANES);
      scratch.bins.template scatter<false>(out, out.at(r, c0, 0, 0), lanes);
    });
  }
}

template <typename T>
void forward(const at::Tensor& features, const Plans<T>& plans, const at::Tensor& output) {
  const Shape& s = plans.shape;
  const auto map = strided<const T>(features);
  const auto out = strided<T>(output);
  for_tasks<T>(s, map.channel == 1, [&](int64_t c0, int64_t c1, int64_t r0, int64_t r1) {
    Scratch<T> scratch;
    for (int64_t k = r0; k < r1; ++k) {
      const int64_t r = plans.order[k];
      if (!plans.large[r]) pool_direct(map, plans.direct[r], r, c0, c1, out, s, scratch);
    }
  });
  for_tables(plans, [&](Table& table, int64_t n, int64_t c0, int64_t c1, const auto& large,
                        const auto& corners) {
    Scratch<T> scratch;
    const bool finite = table.sum(map, map.at(n, c0, 0, 0), c1 - c0);
    for (size_t k = 0; k < large.size(); ++k) {
      const int64_t r = large[k];
      T* start = out.at(r, c0, 0, 0);
      if (!finite)
        pool_direct(map, plans.direct[r], r, c0, c1, out, s, scratch);
      else
        run_widest([&]() IOU_D2_INLINE_LAMBDA {
          pool<T>(table, corners[k], out, start, c1 - c0, scratch.corners);
        });
    }
  });
}

template <typename T>
void spread_direct(const Strided<const T>& grad, const Plan<T>& plan, int64_t r, int64_t c0,
                   int64_t c1, const Strided<T>& map, const Shape& s, Scratch<T>& scratch) {
  constexpr int64_t LANES = Simd<T>::LANES;
  const Bins<T>&y = plan.y, &x = plan.x;
  if (map.channel == 1 && grad.channel == 1) {
    const int64_t whole = (c1 - c0) / LANES * LANES;
    const auto from = grad.grid(r, c0, 0, 0);
    const auto to = map.grid(plan.roi.image, c0, y.origin, x.origin);
    run_widest([&]() IOU_D2_INLINE_LAMBDA { spread<T>(from, y, x, to, whole); });
    c0 += whole;
  }
  if (c0 == c1) return;
  scratch.pixels.resize(y.extent, x.extent);
  scratch.bins.resize(s.P, s.Q);
  for (; c0 < c1; c0 += LANES) {
    const int64_t lanes = std::min(LANES, c1 - c0);
    const T* from = grad.at(r, c0, 0, 0);
    T* to = map.at(plan.roi.image, c0, y.origin, x.origin);
    run_widest([&]() IOU_D2_INLINE_LAMBDA {
      std::fill(scratch.pixels.values.begin(), scratch.pixels.values.end(), T(0));
      spread<T>(scratch.bins.gather(grad, from, lanes), y, x, scratch.pixels.grid(), LANES);
      scratch.pixels.template scatter<true>(map, to, lanes);
    });
  }
}

// A thread owns a range of channels, so that no two write to one place and sums have one order.
template <typename T>
void backward_features(const at::Tensor& grad_output, const Plans<T>& plans,
                       const at::Tensor& grad_features) {
  const Shape& s = plans.shape;
  const auto grad = strided<const T>(grad_output);
  const auto map = strided<T>(grad_features);
  constexpr int64_t LANES = Simd<T>::LANES;
  at::parallel_for(0, (s.C + LANES - 1) / LANES, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch;
    const int64_t step = map.channel == 1 ? end - begin : 1;
    for (int64_t block = begin; block < end; block += step) {
      const int64_t c0 = block * LANES, c1 = std::min((block + step) * LANES, s.C);
      for (int64_t r : plans.order) {
        if (!plans.large[r]) spread_direct(grad, plans.direct[r], r, c0, c1, map, s, scratch);
      }
    }
  });
  for_tables(plans, [&](Table& table, int64_t n, int64_t c0, int64_t c1, const auto& large,
                        const auto& corners) {
    for (size_t k = 0; k < large.size(); ++k) {
      const T* start = grad.at(large[k], c0, 0, 0);
      run_widest([&]()
                     IOU_D2_INLINE_LAMBDA { spread<T>(table, corners[k], grad, start, c1 - c0); });
    }
    table.add_transposed(map, map.at(n, c0, 0, 0), c1 - c0);
  });
}

// What the loss does when the edges of one RoI's bins move.
struct EdgeSums {
  std::vector<double> y, x;
  double inner = 0;  // sum of gradient * output

  explicit EdgeSums(const Roi& roi) : y(roi.y.bins + 1), x(roi.x.bins + 1) {}
};

template <typename T>
void edges_direct(const Strided<const T>& grad, const Strided<const T>& map,
                  const Strided<const T>& out, const Plan<T>& plan, int64_t r, int64_t c0,
                  int64_t c1, const Shape& s, Scratch<T>& scratch, EdgeSums& sums) {
  constexpr int64_t LANES = Simd<T>::LANES;
  const Bins<T>&y = plan.y, &x = plan.x;
  const auto add = [&](Grid<const T> pixels, Grid<const T> g, Grid<const T> o,
                       int64_t channels) IOU_D2_INLINE_LAMBDA {
    edge_sums<T>(pixels, g, plan.roi.x, x, y, channels, sums.x.data());
    edge_sums<T>(pixels.turned(), g.turned(), plan.roi.y, y, x, channels, sums.y.data());
    sums.inner += inner<T>(g, o, s.P, s.Q, channels);
  };
  if (map.channel == 1 && grad.channel == 1 && out.channel == 1) {
    const int64_t whole = (c1 - c0) / LANES * LANES;
    const auto from = map.grid(plan.roi.image, c0, y.origin, x.origin);
    const auto g = grad.grid(r, c0, 0, 0), o = out.grid(r, c0, 0, 0);
    run_widest([&]() IOU_D2_INLINE_LAMBDA { add(from, g, o, whole); });
    c0 += whole;
  }
  if (c0 == c1) return;
  scratch.pixels.resize(y.extent, x.extent);
  scratch.bins.resize(s.P, s.Q);
  scratch.outputs.resize(s.P, s.Q);
  for (; c0 < c1; c0 += LANES) {
    const int64_t lanes = std::min(LANES, c1 - c0);
    const T *from = map.at(plan.roi.image, c0, y.origin, x.origin), *g = grad.at(r, c0, 0, 0),
            *o = out.at(r, c0, 0, 0);
    run_widest([&]() IOU_D2_INLINE_LAMBDA {
      add(scratch.pixels.gather(map, from, lanes), scratch.bins.gather(grad, g, lanes),
          scratch.outputs.gather(out, o, lanes), LANES);
    });
  }
}

// Adds the gradient of the two ends of an axis; `unit` is what the edge sums still have to be
// multiplied with.
void add_ends(const Axis& axis, const std::vector<double>& edges, double unit, double inner,
              double* start, double* end) {
  for (int64_t e = 0; e <= axis.bins; ++e) {
    const double t = static_cast<double>(e) / static_cast<double>(axis.bins);
    *start += (1 - t) * edges[e] * unit;
    *end += t * edges[e] * unit;
  }
  *start += inner / axis.length;
  *end -= inner / axis.length;
}

template <typename T>
void backward_rois(const at::Tensor& grad_output, const at::Tensor& features,
                   const at::Tensor& output, const Plans<T>& plans, double scale,
                   const at::Tensor& grad_rois) {
  const Shape& s = plans.shape;
  const auto grad = strided<const T>(grad_output), map = strided<const T>(features),
             out = strided<const T>(output);
  // Every block of channels adds into its own copy, so that sums have one order.
  const int64_t copies = (s.C + Table::LANES - 1) / Table::LANES;
  std::vector<double> ends(copies * s.R * 4);
  for_tasks<T>(s, map.channel == 1, [&](int64_t c0, int64_t c1, int64_t r0, int64_t r1) {
    Scratch<T> scratch;
    for (int64_t k = r0; k < r1; ++k) {
      const int64_t r = plans.order[k];
      const Roi& roi = plans.direct[r].roi;
      if (plans.large[r] || roi.x.length == 0) continue;
      EdgeSums sums(roi);
      edges_direct(grad, map, out, plans.direct[r], r, c0, c1, s, scratch, sums);
      double* to = &ends[(c0 / Table::LANES * s.R + r) * 4];
      add_ends(roi.x, sums.x, s.Q / roi.x.length, sums.inner, to, to + 2);
      add_ends(roi.y, sums.y, s.P / roi.y.length, sums.inner, to + 1, to + 3);
    }
  });
  for_tables(plans, [&](Table& table, int64_t n, int64_t c0, int64_t c1, const auto& large,
                        const auto& corners) {
    Scratch<T> scratch;
    const bool finite = table.sum(map, map.at(n, c0, 0, 0), c1 - c0);
    for (size_t k = 0; k < large.size(); ++k) {
      const int64_t r = large[k];
      const Roi& roi = plans.direct[r].roi;
      EdgeSums sums(roi);
      if (!finite) {
        edges_direct(grad, map, out, plans.direct[r], r, c0, c1, s, scratch, sums);
      } else {
        const T *g = grad.at(r, c0, 0, 0), *o = out.at(r, c0, 0, 0);
        run_widest([&]() IOU_D2_INLINE_LAMBDA {
          edge_sums<T>(table, corners[k], grad, g, c1 - c0, sums.y.data(), sums.x.data());
          sums.inner = inner<T>(grad, g, out, o, s.P, s.Q, c1 - c0);
        });
      }
      double* to = &ends[(c0 / Table::LANES * s.R + r) * 4];
      add_ends(roi.x, sums.x, finite ? 1 : s.Q / roi.x.length, sums.inner, to, to + 2);
      add_ends(roi.y, sums.y, finite ? 1 : s.P / roi.y.length, sums.inner, to + 1, to + 3);
    }
  });
  double* total = grad_rois.data_ptr<double>();
  for (int64_t k = 0; k < copies * s.R; ++k) {
    for (int64_t d = 0; d < 4; ++d) total[k % s.R * 5 + 1 + d] += scale * ends[k * 4 + d];
  }
}

at::Tensor prroi_pool_cpu(const at::Tensor& features, const at::Tensor& rois, double spatial_scale,
                          int64_t P, int64_t Q, bool aligned) {
  check_arguments(features, rois, spatial_scale, P, Q);
  const at::Tensor map = features.to(at::toOpMathType(features.scalar_type()));
  const Shape s{map.size(0), map.size(1), map.size(2), map.size(3), rois.size(0), P, Q};
  at::Tensor out = at::empty({s.R, s.C, P, Q}, map.options().memory_format(format_of(features)));
  if (out.numel() == 0) return out.to(features.scalar_type());
  AT_DISPATCH_FLOATING_TYPES(map.scalar_type(), "prroi_pool", [&] {
    forward<scalar_t>(map, Plans<scalar_t>(rois, s, spatial_scale, aligned), out);
  });
  return out.to(features.scalar_type());
}

at::Tensor prroi_pool_backward_features_cpu(const at::Tensor& grad, const at::Tensor& rois,
                                            at::IntArrayRef size, bool channels_last,
                                            double spatial_scale, bool aligned) {
  check_backward(grad, size, rois);
  const at::Tensor g = grad.to(at::toOpMathType(grad.scalar_type()));
  const auto format = channels_last ? kChannelsLast : at::MemoryFormat::Contiguous;
  at::Tensor out = at::empty(size, g.options().memory_format(format)).zero_();
  const Shape s{size[0], size[1], size[2], size[3], rois.size(0), g.size(2), g.size(3)};
  if (g.numel() == 0) return out.to(grad.scalar_type());
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "prroi_pool_backward_features", [&] {
    backward_features<scalar_t>(g, Plans<scalar_t>(rois, s, spatial_scale, aligned), out);
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
    backward_rois<scalar_t>(g, map, pooled, Plans<scalar_t>(rois, s, spatial_scale, aligned),
                            spatial_scale, out);
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
