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

// Adds what RoI r does to some rows of its own to the map, whose pixels' channels are neighbours.
template <typename V, typename T = typename V::Number>
void spread_in_place(const Strided<const T>& grad, const Plans<T>& plans, int64_t r, Span rows,
                     const Strided<T>& map, Scratch<V>& scratch) {
  const Shape& s = plans.shape;
  const Plan<T>& plan = plans.direct[r];
  const BinsView<T> y = plan.y, x = plan.x;
  const int64_t image = plan.roi.image, count = rows.end - rows.begin;
  for (int64_t c = 0, n; c < s.C; c += n) {
    n = next_channels<V>(s.C - c, true);
    V::run([&]() IOU_D2_INLINE_LAMBDA {
      const auto bins = bins_of(grad, s, r, y.touching(rows), c, n, scratch.grads);
      if (is_in_place<V>(map, n))
        return spread<V, T>(bins, y, x, map.grid(image, c, plan.y.origin, plan.x.origin), rows, n);
      scratch.pixels.resize(y.extent, x.extent).clear(rows.begin, count);
      spread<V, T>(bins, y, x, scratch.pixels.grid(), rows, whole_lanes<V>(n));
      T* start = map.at(image, c, plan.y.origin + rows.begin, plan.x.origin);
      scratch.pixels.template scatter<true>(rows.begin, count, map, start, n);
    });
  }
}

// Writes some rows of an image, whose pixels' channels are neighbours.
template <typename V, typename T = typename V::Number>
void write_rows(const Strided<const T>& grad, const Plans<T>& plans, int64_t image, Span rows,
                const Strided<T>& map, Scratch<V>& scratch) {
  const Shape& s = plans.shape;
  for (int64_t row = rows.begin; row < rows.end; ++row) clear(map, image, row, 0, s.C, s.W);
  for (auto next = plans.first_of(image); next != plans.order.end(); ++next) {
    const Plan<T>& plan = plans.direct[*next];
    if (plan.roi.image != image || plans.band(*next) >= rows.end) return;
    const Span of_roi{std::max<int64_t>(rows.begin - plan.y.origin, 0),
                      std::min(rows.end - plan.y.origin, plan.y.extent)};
    if (plan.empty() || of_roi.begin >= of_roi.end) continue;
    spread_in_place(grad, plans, *next, of_roi, map, scratch);
  }
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
        const auto bins = bins_of(grad, s, *next, {0, s.P}, c0, c1 - c0, scratch.grads);
        spread<V, T>(bins, y, x, strip.grid(y.origin, x.origin), {0, y.extent},
                     whole_lanes<V>(c1 - c0));
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

// A task has places of the map for itself, so that no two write to one and sums have one order:
// rows where channels are neighbours, else the channels of a tile.
template <typename V, typename T = typename V::Number>
void backward_features(const at::Tensor& grad_output, const Plans<T>& plans,
                       const at::Tensor& grad_features) {
  constexpr int64_t LANES = Tile<V>::LANES;
  const Shape& s = plans.shape;
  const auto grad = strided<const T>(grad_output);
  const auto map = strided<T>(grad_features);
  if (map.channel == 1) {
    // Some tasks for each thread, of rows enough that few RoIs are cut (an estimate).
    const int64_t rows = std::clamp<int64_t>(s.N * s.H / (4 * at::get_num_threads()), 4, 16);
    const int64_t parts = (s.H + rows - 1) / rows;
    hand_out<V>(s.N * parts, [&](Scratch<V>& scratch, int64_t task) {
      const int64_t first = task % parts * rows;
      write_rows(grad, plans, task / parts, {first, std::min(first + rows, s.H)}, map, scratch);
    });
  } else {
    hand_out<V>((s.C + LANES - 1) / LANES, [&](Scratch<V>& scratch, int64_t task) {
      const int64_t c = task * LANES;
      spread_in_strip(grad, plans, c, std::min(c + LANES, s.C), map, scratch);
    });
  }
  for_tables<V>(plans, [&](const Group& group, Rows<V>& rows, Scratch<V>& scratch, int64_t c0,
                           int64_t c1) {
    spread_group(grad, plans, group, rows, c0, c1, map, scratch);
  });
}

}  // namespace iou_d2::cpu
