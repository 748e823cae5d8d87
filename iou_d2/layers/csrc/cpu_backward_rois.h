// The gradient of the RoIs.
#pragma once

#include <vector>

#include "cpu_ends_by_products.h"
#include "cpu_work.h"

namespace iou_d2::cpu {

// Adds to `to` the gradient of x1, y1, x2, y2; `unit` is what the moves of an axis' ends still have
// to be multiplied with.
void add_gradient(const Ends& ends, const Roi& roi, double unit_y, double unit_x, double* to) {
  to[0] += ends.x[0] * unit_x + ends.inner / roi.x.length;
  to[1] += ends.y[0] * unit_y + ends.inner / roi.y.length;
  to[2] += ends.x[1] * unit_x - ends.inner / roi.x.length;
  to[3] += ends.y[1] * unit_y - ends.inner / roi.y.length;
}

// The sum of gradient * output over a RoI's bins and `lanes` channels; `g` are the gradient's bins.
template <typename V, typename T = typename V::Number>
IOU_D2_INLINE double inner_of(const Strided<const T>& grad, const Strided<const T>& out,
                              Grid<const T> g, const Shape& s, int64_t r, int64_t c0, int64_t lanes,
                              GatheredBins<V>& gathered) {
  const auto dense = [&](const Strided<const T>& t) {
    return t.column == 1 && t.row == s.Q && t.channel == s.P * s.Q;
  };
  // What lies side by side in both is as one long bin, and need not be gathered.
  if (dense(grad) && dense(out) && lanes % V::LANES == 0)
    return inner<V, T>({grad.at(r, c0, 0, 0), 0, 0}, {out.at(r, c0, 0, 0), 0, 0}, 1, 1,
                    lanes * s.P * s.Q);
  const auto bins = bins_of(out, s, r, {0, s.P}, c0, lanes, gathered);
  return inner<V, T>(g, bins, s.P, s.Q, whole_lanes<V>(lanes));
}

// Whether the products of gradients and pixels are fewer than the sums along edges, for so many
// vectors of channels (estimates). Without slopes edges are the way.
template <typename T>
bool products_are_fewer(const Plan<T>& plan, int64_t vectors) {
  if (plan.x.slopes[0].empty()) return false;
  const double y = static_cast<double>(plan.y.weights.size()), bins_y = plan.roi.y.bins;
  const double x = static_cast<double>(plan.x.weights.size()), bins_x = plan.roi.x.bins;
  return y * x * (1 + 4.0 / vectors) < 3.4 * ((bins_x + 1) * y + (bins_y + 1) * x);
}

template <typename V, typename T = typename V::Number>
IOU_D2_INLINE void add_by_products(Grid<const T> map, Grid<const T> grad, const Plan<T>& plan,
                                   int64_t channels, Ends& ends) {
  const EndSums<V> sums = end_sums<V, T>(map, grad, plan.y, plan.x, channels);
  for (int end = 0; end < 2; ++end) {
    ends.y[end] += add_lanes<V>(sums.y[end]);
    ends.x[end] += add_lanes<V>(sums.x[end]);
  }
  ends.inner += add_lanes<V>(sums.inner);
}

template <typename V, typename T = typename V::Number>
void ends_direct(const Strided<const T>& grad, const Strided<const T>& map,
                 const Strided<const T>& out, const Plans<T>& plans, int64_t r, int64_t c0,
                 int64_t c1, bool strip, Scratch<V>& scratch, double* to) {
  const Shape& s = plans.shape;
  const Plan<T>& plan = plans.direct[r];
  const Roi& roi = plan.roi;
  if (roi.x.length == 0 || plan.empty()) return;
  Ends ends;
  for (int64_t c = c0, n; c < c1; c += n) {
    n = next_channels<V>(c1 - c, map.channel == 1);
    V::run([&]() IOU_D2_INLINE_LAMBDA {
      const auto pixels = pixels_of(map, plans, r, c, n, strip, scratch);
      const auto g = bins_of(grad, s, r, {0, s.P}, c, n, scratch.grads);
      const int64_t whole = whole_lanes<V>(n);
      if (products_are_fewer(plan, whole / V::LANES))
        return add_by_products<V, T>(pixels, g, plan, whole, ends);
      add_ends<V, T>(pixels, g, plan.edges_x, plan.y, whole, ends.x);
      add_ends<V, T>(pixels.turned(), g.turned(), plan.edges_y, plan.x, whole, ends.y);
      ends.inner += inner_of(grad, out, g, s, r, c, n, scratch.outputs);
    });
  }
  add_gradient(ends, roi, s.P / roi.y.length, s.Q / roi.x.length, to);
}

// `ends` (R, 4)
template <typename V, typename T = typename V::Number>
void ends_of_group(const Strided<const T>& grad, const Strided<const T>& map,
                   const Strided<const T>& out, const Plans<T>& plans, const Group& group,
                   Rows<V>& rows, int64_t c0, int64_t c1, Scratch<V>& scratch, double* ends) {
  const Shape& s = plans.shape;
  std::vector<Ends> sums(group.rois.size());
  bool finite = true;
  V::run([&]() IOU_D2_INLINE_LAMBDA {
    gather_bins(grad, s, group, c0, c1 - c0, scratch.group_bins);
    finite = sweep_down(
        group, rows, map, c0, c1 - c0, scratch.line,
        [&](const Group::Edge& e, const Group::Edge& soon) IOU_D2_INLINE_LAMBDA {
          const auto bins = [&](int64_t k) {
            return bins_in_group(grad, s, group, k, c0, c1 - c0, scratch.group_bins);
          };
          prefetch_bins(group.corners[soon.k], soon.p, bins(soon.k));
          group.prefetch_x(soon);
          add_ends<V>(rows, group.corners[e.k], e.p, bins(e.k), sums[e.k]);
        });
  });
  for (size_t k = 0; k < group.rois.size(); ++k) {
    const int64_t r = group.rois[k];
    if (finite)
      add_gradient(sums[k], plans.direct[r].roi, 1, 1, ends + r * 4);
    else
      ends_direct(grad, map, out, plans, r, c0, c1, false, scratch, ends + r * 4);
  }
}

template <typename V, typename T = typename V::Number>
void backward_rois(const at::Tensor& grad_output, const at::Tensor& features,
                   const at::Tensor& output, const Plans<T>& plans, double scale,
                   const at::Tensor& grad_rois) {
  constexpr int64_t LANES = V::LANES;
  const Shape& s = plans.shape;
  const auto grad = strided<const T>(grad_output), map = strided<const T>(features),
             out = strided<const T>(output);
  // Every block of channels adds into its own copy, so that sums have one order.
  const int64_t copies = (s.C + LANES - 1) / LANES;
  std::vector<double> ends(copies * s.R * 4);
  for_tasks<V>(plans, map.channel == 1, [&](Scratch<V>& scratch, int64_t c0, int64_t c1, int64_t r0,
                                             int64_t r1) {
    const bool strip = plans.dense && map.channel != 1;
    for (int64_t k = r0; k < r1; ++k) {
      const int64_t r = plans.order[k];
      double* to = &ends[(c0 / LANES * s.R + r) * 4];
      ends_direct(grad, map, out, plans, r, c0, c1, strip, scratch, to);
    }
  });
  for_tables<V>(plans, [&](const Group& group, Rows<V>& rows, Scratch<V>& scratch, int64_t c0,
                           int64_t c1) {
    ends_of_group(grad, map, out, plans, group, rows, c0, c1, scratch,
                  &ends[c0 / LANES * s.R * 4]);
  });
  double* total = grad_rois.data_ptr<double>();
  for (int64_t k = 0; k < copies * s.R; ++k) {
    for (int64_t d = 0; d < 4; ++d) total[k % s.R * 5 + 1 + d] += scale * ends[k * 4 + d];
  }
}

}  // namespace iou_d2::cpu
