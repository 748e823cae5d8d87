// Precise RoI pooling of all RoIs.
#pragma once

#include "cpu_work.h"

namespace iou_d2::cpu {

template <typename V, typename T = typename V::Number>
void pool_direct(const Strided<const T>& map, const Plans<T>& plans, int64_t r, int64_t c0,
                 int64_t c1, const Strided<T>& out, bool strip, Scratch<V>& scratch) {
  const Shape& s = plans.shape;
  const bool in_place = map.channel == 1 && out.channel == 1;
  for (int64_t c = c0, n; c < c1; c += n) {
    n = next_channels<V>(c1 - c, in_place);
    V::run([&]() IOU_D2_INLINE_LAMBDA {
      const auto pixels = pixels_of(map, plans, r, c, n, strip, scratch);
      const bool there = is_in_place<V>(out, n);
      const Grid<T> bins = there ? out.grid(r, c, 0, 0) : scratch.bins.resize(s.P, s.Q).grid();
      pool<V, T>(pixels, plans.direct[r].y, plans.direct[r].x, bins, whole_lanes<V>(n));
      if (!there) scratch.bins.template scatter<false>(0, s.P, out, out.at(r, c, 0, 0), n);
    });
  }
}

template <typename V, typename T = typename V::Number>
void pool_group(const Strided<const T>& map, const Plans<T>& plans, const Group& group,
                Rows<V>& rows, int64_t c0, int64_t c1, const Strided<T>& out, Scratch<V>& scratch) {
  const Shape& s = plans.shape;
  const int64_t count = static_cast<int64_t>(group.rois.size()), lanes = c1 - c0;
  if (!is_in_place<V>(out, lanes)) scratch.group_bins.resize(count * s.P, s.Q);
  scratch.edges.resize(count * s.Q * Wide<V>::PACKS);
  V::run([&]() IOU_D2_INLINE_LAMBDA {
    const bool finite = sweep_down(
        group, rows, map, c0, lanes, scratch.line,
        [&](const Group::Edge& e, const Group::Edge& soon) IOU_D2_INLINE_LAMBDA {
          const auto bins = bins_in_group(out, s, group, e.k, c0, lanes, scratch.group_bins);
          const int64_t lines = s.Q * Wide<V>::PACKS;
          double* above = scratch.edges[e.k * lines].lane;
          group.prefetch_x(soon);
          for (int64_t n = 0; n < lines; ++n) prefetch(&scratch.edges[soon.k * lines + n]);
          pool_edge<V>(rows, group.corners[e.k], e.p, bins, above);
        });
    for (int64_t k = 0; k < count; ++k) {
      const int64_t r = group.rois[k];
      if (!finite)
        pool_direct(map, plans, r, c0, c1, out, false, scratch);
      else if (!is_in_place<V>(out, lanes))
        scratch.group_bins.template scatter<false>(k * s.P, s.P, out, out.at(r, c0, 0, 0), lanes);
    }
  });
}

template <typename V, typename T = typename V::Number>
void forward(const at::Tensor& features, const Plans<T>& plans, const at::Tensor& output) {
  const auto map = strided<const T>(features);
  const auto out = strided<T>(output);
  for_tasks<V>(plans, map.channel == 1, [&](Scratch<V>& scratch, int64_t c0, int64_t c1, int64_t r0,
                                             int64_t r1) {
    const bool strip = plans.dense && map.channel != 1;
    for (int64_t k = r0; k < r1; ++k)
      pool_direct(map, plans, plans.order[k], c0, c1, out, strip, scratch);
  });
  for_tables<V>(plans, [&](const Group& group, Rows<V>& rows, Scratch<V>& scratch, int64_t c0,
                           int64_t c1) {
    pool_group(map, plans, group, rows, c0, c1, out, scratch);
  });
}

}  // namespace iou_d2::cpu
