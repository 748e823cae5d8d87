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
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "cpu_memory.h"
#include "cpu_plan.h"

namespace iou_d2::cpu {
namespace {

// How many of `left` channels a kernel takes at once.
template <typename T>
int64_t next_channels(int64_t left, bool in_place) {
  constexpr int64_t LANES = Simd<T>::LANES;
  return in_place && left >= LANES ? left / LANES * LANES : std::min(left, Tile<T>::LANES);
}

template <typename T>
int64_t whole_lanes(int64_t channels) {
  return (channels + Simd<T>::LANES - 1) / Simd<T>::LANES * Simd<T>::LANES;
}

// The pixels under RoI r: where they are, in a strip, or in a tile.
template <typename T>
IOU_D2_INLINE Grid<const T> pixels_of(const Strided<const T>& map, const Plans<T>& plans, int64_t r,
                                      int64_t c0, int64_t lanes, bool strip, Scratch<T>& scratch) {
  const Plan<T>& plan = plans.direct[r];
  const Bins<T>&y = plan.y, &x = plan.x;
  const int64_t n = plan.roi.image;
  const T* start = map.at(n, c0, y.origin, x.origin);
  if (map.in_place(lanes)) return {start, map.row, map.column};
  if (!strip || plan.empty()) {
    scratch.pixels.resize(y.extent, x.extent);
    return scratch.pixels.gather(0, y.extent, map, start, lanes);
  }
  if (scratch.image != n) scratch.strip.start(plans.strip_rows, plans.shape.W);
  scratch.image = n;
  scratch.strip.open(
      plans.band(r), y.origin + y.extent,
      [&](int64_t row, int64_t i) IOU_D2_INLINE_LAMBDA {
        scratch.strip.tile.gather(i, 1, map, map.at(n, c0, row, 0), lanes);
      },
      [](int64_t, int64_t) {});
  const Grid<T> pixels = scratch.strip.grid(y.origin, x.origin);
  return {pixels.data, pixels.row, pixels.column};
}

// RoI r's bins: where they are, or in a tile.
template <typename T>
IOU_D2_INLINE Grid<const T> bins_of(const Strided<const T>& bins, const Shape& s, int64_t r,
                                    int64_t c0, int64_t lanes, Tile<T>& tile) {
  if (bins.in_place(lanes)) return bins.grid(r, c0, 0, 0);
  return tile.resize(s.P, s.Q).gather(0, s.P, bins, bins.at(r, c0, 0, 0), lanes);
}

// The same for all RoIs of a group, with RoI k's in rows [k * P, (k + 1) * P) of the tile.
template <typename T>
IOU_D2_INLINE void gather_bins(const Strided<const T>& bins, const Shape& s, const Group& group,
                               int64_t c0, int64_t lanes, Tile<T, 1>& tile) {
  if (bins.in_place(lanes)) return;
  const int64_t count = static_cast<int64_t>(group.rois.size());
  tile.resize(count * s.P, s.Q);
  for (int64_t k = 0; k < count; ++k)
    tile.gather(k * s.P, s.P, bins, bins.at(group.rois[k], c0, 0, 0), lanes);
}

template <typename T, typename U>
IOU_D2_INLINE Grid<U> bins_in_group(const Strided<U>& bins, const Shape& s, const Group& group,
                                    int64_t k, int64_t c0, int64_t lanes, Tile<T, 1>& tile) {
  if (bins.in_place(lanes)) return bins.grid(group.rois[k], c0, 0, 0);
  const Grid<T> grid = tile.grid(k * s.P);
  return {grid.data, grid.row, grid.column};
}

template <typename T>
void pool_direct(const Strided<const T>& map, const Plans<T>& plans, int64_t r, int64_t c0,
                 int64_t c1, const Strided<T>& out, bool strip, Scratch<T>& scratch) {
  const Shape& s = plans.shape;
  const bool in_place = map.channel == 1 && out.channel == 1;
  for (int64_t c = c0, n; c < c1; c += n) {
    n = next_channels<T>(c1 - c, in_place);
    run_widest([&]() IOU_D2_INLINE_LAMBDA {
      const auto pixels = pixels_of(map, plans, r, c, n, strip, scratch);
      const bool there = out.in_place(n);
      const Grid<T> bins = there ? out.grid(r, c, 0, 0) : scratch.bins.resize(s.P, s.Q).grid();
      pool<T>(pixels, plans.direct[r].y, plans.direct[r].x, bins, whole_lanes<T>(n));
      if (!there) scratch.bins.template scatter<false>(0, s.P, out, out.at(r, c, 0, 0), n);
    });
  }
}

template <typename T>
void pool_group(const Strided<const T>& map, const Plans<T>& plans, const Group& group,
                Rows<T>& rows, int64_t c0, int64_t c1, const Strided<T>& out, Scratch<T>& scratch) {
  const Shape& s = plans.shape;
  const int64_t count = static_cast<int64_t>(group.rois.size()), lanes = c1 - c0;
  if (!out.in_place(lanes)) scratch.group_bins.resize(count * s.P, s.Q);
  scratch.edges.resize(count * s.Q * Wide<T>::PACKS);
  run_widest([&]() IOU_D2_INLINE_LAMBDA {
    const bool finite = sweep_down(
        group, rows, map, c0, lanes, scratch.line,
        [&](const Group::Edge& e, const Group::Edge& soon) IOU_D2_INLINE_LAMBDA {
          const auto bins = bins_in_group(out, s, group, e.k, c0, lanes, scratch.group_bins);
          const int64_t lines = s.Q * Wide<T>::PACKS;
          double* above = scratch.edges[e.k * lines].lane;
          group.prefetch_x(soon);
          for (int64_t n = 0; n < lines; ++n) prefetch(&scratch.edges[soon.k * lines + n]);
          pool_edge<T>(rows, group.corners[e.k], e.p, bins, above);
        });
    for (int64_t k = 0; k < count; ++k) {
      const int64_t r = group.rois[k];
      if (!finite)
        pool_direct(map, plans, r, c0, c1, out, false, scratch);
      else if (!out.in_place(lanes))
        scratch.group_bins.template scatter<false>(k * s.P, s.P, out, out.at(r, c0, 0, 0), lanes);
    }
  });
}

template <typename T>
void forward(const at::Tensor& features, const Plans<T>& plans, const at::Tensor& output) {
  const auto map = strided<const T>(features);
  const auto out = strided<T>(output);
  for_tasks<T>(plans, map.channel == 1, [&](Scratch<T>& scratch, int64_t c0, int64_t c1, int64_t r0,
                                            int64_t r1) {
    const bool strip = plans.dense && map.channel != 1;
    for (int64_t k = r0; k < r1; ++k)
      pool_direct(map, plans, plans.order[k], c0, c1, out, strip, scratch);
  });
  for_tables<T>(plans, [&](const Group& group, Rows<T>& rows, Scratch<T>& scratch, int64_t c0,
                           int64_t c1) {
    pool_group(map, plans, group, rows, c0, c1, out, scratch);
  });
}

template <typename T>
void clear(const Strided<T>& map, int64_t n, int64_t row, int64_t c0, int64_t c1, int64_t width) {
  if (map.channel == 1) {
    for (int64_t j = 0; j < width; ++j) std::fill_n(map.at(n, c0, row, j), c1 - c0, T(0));
  } else {
    for (int64_t c = c0; c < c1; ++c) std::fill_n(map.at(n, c, row, 0), width, T(0));
  }
}

// Writes all of the map, whose pixels' channels are neighbours, for channels [c0, c1).
template <typename T>
void spread_in_place(const Strided<const T>& grad, const Plans<T>& plans, int64_t c0, int64_t c1,
                     const Strided<T>& map, Scratch<T>& scratch) {
  const Shape& s = plans.shape;
  int64_t cleared = 0;  // rows of all images: just before they are needed, while in cache
  const auto clear_to = [&](int64_t end) {
    for (; cleared < end; ++cleared) clear(map, cleared / s.H, cleared % s.H, c0, c1, s.W);
  };
  for (int64_t r : plans.order) {
    const Plan<T>& plan = plans.direct[r];
    const Bins<T>&y = plan.y, &x = plan.x;
    if (plan.empty()) continue;
    clear_to(plan.roi.image * s.H + y.origin + y.extent);
    for (int64_t c = c0, n; c < c1; c += n) {
      n = next_channels<T>(c1 - c, grad.channel == 1);
      T* start = map.at(plan.roi.image, c, y.origin, x.origin);
      run_widest([&]() IOU_D2_INLINE_LAMBDA {
        const auto bins = bins_of(grad, s, r, c, n, scratch.bins);
        if (map.in_place(n)) return spread<T>(bins, y, x, {start, map.row, map.column}, n);
        scratch.pixels.resize(y.extent, x.extent).clear(0, y.extent);
        spread<T>(bins, y, x, scratch.pixels.grid(), whole_lanes<T>(n));
        scratch.pixels.template scatter<true>(0, y.extent, map, start, n);
      });
    }
  }
  clear_to(s.N * s.H);
}

// Writes all of the map for the channels of a tile.
template <typename T>
void spread_in_strip(const Strided<const T>& grad, const Plans<T>& plans, int64_t c0, int64_t c1,
                     const Strided<T>& map, Scratch<T>& scratch) {
  const Shape& s = plans.shape;
  Strip<T>& strip = scratch.strip;
  auto next = plans.order.begin();
  for (int64_t image = 0; image < s.N; ++image) {
    const auto bring = [&](int64_t, int64_t i) IOU_D2_INLINE_LAMBDA { strip.tile.clear(i, 1); };
    const auto leave = [&](int64_t row, int64_t i) IOU_D2_INLINE_LAMBDA {
      if (i < 0) return clear(map, image, row, c0, c1, s.W);
      strip.tile.template scatter<false>(i, 1, map, map.at(image, c0, row, 0), c1 - c0);
    };
    strip.start(plans.strip_rows, s.W);
    run_widest([&]() IOU_D2_INLINE_LAMBDA {
      for (; next != plans.order.end() && plans.direct[*next].roi.image == image; ++next) {
        const Plan<T>& plan = plans.direct[*next];
        const Bins<T>&y = plan.y, &x = plan.x;
        if (plan.empty()) continue;
        strip.open(plans.band(*next), y.origin + y.extent, bring, leave);
        const auto bins = bins_of(grad, s, *next, c0, c1 - c0, scratch.bins);
        spread<T>(bins, y, x, strip.grid(y.origin, x.origin), whole_lanes<T>(c1 - c0));
      }
      strip.close(s.H, leave);
    });
  }
}

template <typename T>
void spread_group(const Strided<const T>& grad, const Plans<T>& plans, const Group& group,
                  Rows<T>& rows, int64_t c0, int64_t c1, const Strided<T>& map,
                  Scratch<T>& scratch) {
  const Shape& s = plans.shape;
  run_widest([&]() IOU_D2_INLINE_LAMBDA {
    gather_bins(grad, s, group, c0, c1 - c0, scratch.group_bins);
    sweep_up(group, rows, map, c0, c1 - c0, scratch.line,
             [&](const Group::Edge& e, const Group::Edge& soon) IOU_D2_INLINE_LAMBDA {
               const auto bins = bins_in_group(grad, s, group, e.k, c0, c1 - c0, scratch.group_bins);
               prefetch_bins(group.corners[soon.k], soon.p,
                             bins_in_group(grad, s, group, soon.k, c0, c1 - c0, scratch.group_bins));
               group.prefetch_x(soon);
               spread_edge<T>(rows, group.corners[e.k], e.p, bins);
             });
  });
}

// A thread owns a range of channels, so that no two write to one place and sums have one order.
template <typename T>
void backward_features(const at::Tensor& grad_output, const Plans<T>& plans,
                       const at::Tensor& grad_features) {
  constexpr int64_t LANES = Tile<T>::LANES;
  const int64_t C = plans.shape.C;
  const auto grad = strided<const T>(grad_output);
  const auto map = strided<T>(grad_features);
  at::parallel_for(0, (C + LANES - 1) / LANES, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch;
    if (map.channel == 1)
      return spread_in_place(grad, plans, begin * LANES, std::min(end * LANES, C), map, scratch);
    for (int64_t b = begin; b < end; ++b)
      spread_in_strip(grad, plans, b * LANES, std::min((b + 1) * LANES, C), map, scratch);
  });
  for_tables<T>(plans, [&](const Group& group, Rows<T>& rows, Scratch<T>& scratch, int64_t c0,
                           int64_t c1) {
    spread_group(grad, plans, group, rows, c0, c1, map, scratch);
  });
}

// Adds to `to` the gradient of x1, y1, x2, y2; `unit` is what the moves of an axis' ends still have
// to be multiplied with.
void add_gradient(const Ends& ends, const Roi& roi, double unit_y, double unit_x, double* to) {
  to[0] += ends.x[0] * unit_x + ends.inner / roi.x.length;
  to[1] += ends.y[0] * unit_y + ends.inner / roi.y.length;
  to[2] += ends.x[1] * unit_x - ends.inner / roi.x.length;
  to[3] += ends.y[1] * unit_y - ends.inner / roi.y.length;
}

// The sum of gradient * output over a RoI's bins and `lanes` channels; `g` are the gradient's bins.
template <typename T>
IOU_D2_INLINE double inner_of(const Strided<const T>& grad, const Strided<const T>& out,
                              Grid<const T> g, const Shape& s, int64_t r, int64_t c0, int64_t lanes,
                              Tile<T>& tile) {
  const auto dense = [&](const Strided<const T>& t) {
    return t.column == 1 && t.row == s.Q && t.channel == s.P * s.Q;
  };
  // What lies side by side in both is as one long bin, and need not go through a tile.
  if (dense(grad) && dense(out) && lanes % Simd<T>::LANES == 0)
    return inner<T>({grad.at(r, c0, 0, 0), 0, 0}, {out.at(r, c0, 0, 0), 0, 0}, 1, 1,
                    lanes * s.P * s.Q);
  return inner<T>(g, bins_of(out, s, r, c0, lanes, tile), s.P, s.Q, whole_lanes<T>(lanes));
}

template <typename T>
void ends_direct(const Strided<const T>& grad, const Strided<const T>& map,
                 const Strided<const T>& out, const Plans<T>& plans, int64_t r, int64_t c0,
                 int64_t c1, bool strip, Scratch<T>& scratch, double* to) {
  const Shape& s = plans.shape;
  const Plan<T>& plan = plans.direct[r];
  const Roi& roi = plan.roi;
  if (roi.x.length == 0 || plan.empty()) return;
  const bool in_place = map.channel == 1 && grad.channel == 1 && out.channel == 1;
  Ends ends;
  for (int64_t c = c0, n; c < c1; c += n) {
    n = next_channels<T>(c1 - c, in_place);
    run_widest([&]() IOU_D2_INLINE_LAMBDA {
      const auto pixels = pixels_of(map, plans, r, c, n, strip, scratch);
      const auto g = bins_of(grad, s, r, c, n, scratch.bins);
      const int64_t whole = whole_lanes<T>(n);
      add_ends<T>(pixels, g, plan.edges_x, plan.y, whole, ends.x);
      add_ends<T>(pixels.turned(), g.turned(), plan.edges_y, plan.x, whole, ends.y);
      ends.inner += inner_of(grad, out, g, s, r, c, n, scratch.outputs);
    });
  }
  add_gradient(ends, roi, s.P / roi.y.length, s.Q / roi.x.length, to);
}

// `ends` (R, 4)
template <typename T>
void ends_of_group(const Strided<const T>& grad, const Strided<const T>& map,
                   const Strided<const T>& out, const Plans<T>& plans, const Group& group,
                   Rows<T>& rows, int64_t c0, int64_t c1, Scratch<T>& scratch, double* ends) {
  const Shape& s = plans.shape;
  std::vector<Ends> sums(group.rois.size());
  bool finite = true;
  run_widest([&]() IOU_D2_INLINE_LAMBDA {
    gather_bins(grad, s, group, c0, c1 - c0, scratch.group_bins);
    finite = sweep_down(
        group, rows, map, c0, c1 - c0, scratch.line,
        [&](const Group::Edge& e, const Group::Edge& soon) IOU_D2_INLINE_LAMBDA {
          const auto bins = bins_in_group(grad, s, group, e.k, c0, c1 - c0, scratch.group_bins);
          prefetch_bins(group.corners[soon.k], soon.p,
                        bins_in_group(grad, s, group, soon.k, c0, c1 - c0, scratch.group_bins));
          group.prefetch_x(soon);
          add_ends<T>(rows, group.corners[e.k], e.p, bins, sums[e.k]);
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

template <typename T>
void backward_rois(const at::Tensor& grad_output, const at::Tensor& features,
                   const at::Tensor& output, Plans<T> plans, double scale,
                   const at::Tensor& grad_rois) {
  constexpr int64_t LANES = Simd<T>::LANES;
  const Shape& s = plans.shape;
  const auto grad = strided<const T>(grad_output), map = strided<const T>(features),
             out = strided<const T>(output);
  for (Plan<T>& plan : plans.direct) plan.set_edges();
  // Every block of channels adds into its own copy, so that sums have one order.
  const int64_t copies = (s.C + LANES - 1) / LANES;
  std::vector<double> ends(copies * s.R * 4);
  for_tasks<T>(plans, map.channel == 1, [&](Scratch<T>& scratch, int64_t c0, int64_t c1, int64_t r0,
                                            int64_t r1) {
    const bool strip = plans.dense && map.channel != 1;
    for (int64_t k = r0; k < r1; ++k) {
      const int64_t r = plans.order[k];
      double* to = &ends[(c0 / LANES * s.R + r) * 4];
      ends_direct(grad, map, out, plans, r, c0, c1, strip, scratch, to);
    }
  });
  for_tables<T>(plans, [&](const Group& group, Rows<T>& rows, Scratch<T>& scratch, int64_t c0,
                           int64_t c1) {
    ends_of_group(grad, map, out, plans, group, rows, c0, c1, scratch,
                  &ends[c0 / LANES * s.R * 4]);
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
  at::Tensor out = empty({s.R, s.C, P, Q}, map.options().memory_format(format_of(features)));
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
  at::Tensor out = empty(size, g.options().memory_format(format));
  const Shape s{size[0], size[1], size[2], size[3], rois.size(0), g.size(2), g.size(3)};
  if (g.numel() == 0) return out.zero_().to(grad.scalar_type());
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
