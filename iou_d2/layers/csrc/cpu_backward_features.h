// The gradient of the features.
#pragma once

#include <algorithm>

#include "cpu_work.h"

namespace iou_d2::cpu {

template <typename T>
void clear(const Strided<T>& map, int64_t n, int64_t row, int64_t c0, int64_t c1, int64_t width) {
  if (map.channel == 1) {
    for (int64_t j = 0; j < width; ++j) std::fill_n(map.at(n, c0, row, j), c1 - c0, T(0));
  } else {
    for (int64_t c = c0; c < c1; ++c) std::fill_n(map.at(n, c, row, 0), width, T(0));
  }
}

// Writes all of the map, whose pixels' channels are neighbours, for channels [c0, c1).
template <typename V, typename T = typename V::Number>
void spread_in_place(const Strided<const T>& grad, const Plans<T>& plans, int64_t c0, int64_t c1,
                     const Strided<T>& map, Scratch<V>& scratch) {
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
      n = next_channels<V>(c1 - c, true);
      T* start = map.at(plan.roi.image, c, y.origin, x.origin);
      V::run([&]() IOU_D2_INLINE_LAMBDA {
        const auto bins = bins_of(grad, s, r, c, n, scratch.grads);
        if (is_in_place<V>(map, n))
          return spread<V, T>(bins, y, x, {start, map.row, map.column}, n);
        scratch.pixels.resize(y.extent, x.extent).clear(0, y.extent);
        spread<V, T>(bins, y, x, scratch.pixels.grid(), whole_lanes<V>(n));
        scratch.pixels.template scatter<true>(0, y.extent, map, start, n);
      });
    }
  }
  clear_to(s.N * s.H);
}

// Writes all of the map for the channels of a tile.
template <typename V, typename T = typename V::Number>
void spread_in_strip(const Strided<const T>& grad, const Plans<T>& plans, int64_t c0, int64_t c1,
                     const Strided<T>& map, Scratch<V>& scratch) {
  const Shape& s = plans.shape;
  Strip<V>& strip = scratch.strip;
  auto next = plans.order.begin();
  for (int64_t image = 0; image < s.N; ++image) {
    const auto bring = [&](int64_t, int64_t i) IOU_D2_INLINE_LAMBDA { strip.tile.clear(i, 1); };
    const auto leave = [&](int64_t row, int64_t i) IOU_D2_INLINE_LAMBDA {
      if (i < 0) return clear(map, image, row, c0, c1, s.W);
      strip.tile.template scatter<false>(i, 1, map, map.at(image, c0, row, 0), c1 - c0);
    };
    strip.start(plans.strip_rows, s.W);
    V::run([&]() IOU_D2_INLINE_LAMBDA {
      for (; next != plans.order.end() && plans.direct[*next].roi.image == image; ++next) {
        const Plan<T>& plan = plans.direct[*next];
        const Bins<T>&y = plan.y, &x = plan.x;
        if (plan.empty()) continue;
        strip.open(plans.band(*next), y.origin + y.extent, bring, leave);
        const auto bins = bins_of(grad, s, *next, c0, c1 - c0, scratch.grads);
        spread<V, T>(bins, y, x, strip.grid(y.origin, x.origin), whole_lanes<V>(c1 - c0));
      }
      strip.close(s.H, leave);
    });
  }
}

template <typename V, typename T = typename V::Number>
void spread_group(const Strided<const T>& grad, const Plans<T>& plans, const Group& group,
                  Rows<V>& rows, int64_t c0, int64_t c1, const Strided<T>& map,
                  Scratch<V>& scratch) {
  const Shape& s = plans.shape;
  V::run([&]() IOU_D2_INLINE_LAMBDA {
    gather_bins(grad, s, group, c0, c1 - c0, scratch.group_bins);
    sweep_up(group, rows, map, c0, c1 - c0, scratch.line,
             [&](const Group::Edge& e, const Group::Edge& soon) IOU_D2_INLINE_LAMBDA {
               const auto bins = [&](int64_t k) {
                 return bins_in_group(grad, s, group, k, c0, c1 - c0, scratch.group_bins);
               };
               prefetch_bins(group.corners[soon.k], soon.p, bins(soon.k));
               group.prefetch_x(soon);
               spread_edge<V>(rows, group.corners[e.k], e.p, bins(e.k));
             });
  });
}

// A thread owns a range of channels, so that no two write to one place and sums have one order.
template <typename V, typename T = typename V::Number>
void backward_features(const at::Tensor& grad_output, const Plans<T>& plans,
                       const at::Tensor& grad_features) {
  constexpr int64_t LANES = Tile<V>::LANES;
  const int64_t C = plans.shape.C;
  const auto grad = strided<const T>(grad_output);
  const auto map = strided<T>(grad_features);
  at::parallel_for(0, (C + LANES - 1) / LANES, 1, [&](int64_t begin, int64_t end) {
    Scratch<V> scratch;
    if (map.channel == 1)
      return spread_in_place(grad, plans, begin * LANES, std::min(end * LANES, C), map, scratch);
    for (int64_t b = begin; b < end; ++b)
      spread_in_strip(grad, plans, b * LANES, std::min((b + 1) * LANES, C), map, scratch);
  });
  for_tables<V>(plans, [&](const Group& group, Rows<V>& rows, Scratch<V>& scratch, int64_t c0,
                           int64_t c1) {
    spread_group(grad, plans, group, rows, c0, c1, map, scratch);
  });
}

}  // namespace iou_d2::cpu
