// Where the kernels find the pixels of a RoI (in place, in a strip, or in a tile) and its bins (in
// place or gathered).
#pragma once

#include <algorithm>

#include "cpu_plan.h"

namespace iou_d2::cpu {

// How many of `left` channels a kernel takes at once.
template <typename V>
int64_t next_channels(int64_t left, bool in_place) {
  constexpr int64_t LANES = V::LANES;
  return in_place && left >= LANES ? left / LANES * LANES : std::min(left, Tile<V>::LANES);
}

template <typename V>
int64_t whole_lanes(int64_t channels) {
  return (channels + V::LANES - 1) / V::LANES * V::LANES;
}

// The pixels under RoI r: where they are, in a strip, or in a tile.
template <typename V, typename T = typename V::Number>
IOU_D2_INLINE Grid<const T> pixels_of(const Strided<const T>& map, const Plans<T>& plans, int64_t r,
                                      int64_t c0, int64_t lanes, bool strip, Scratch<V>& scratch) {
  const Plan<T>& plan = plans.direct[r];
  const Bins<T>&y = plan.y, &x = plan.x;
  const int64_t n = plan.roi.image;
  const T* start = map.at(n, c0, y.origin, x.origin);
  if (is_in_place<V>(map, lanes)) return {start, map.row, map.column};
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

// RoI r's bins: where they are or, in some rows, gathered.
template <typename V, typename T = typename V::Number>
IOU_D2_INLINE Grid<const T> bins_of(const Strided<const T>& bins, const Shape& s, int64_t r,
                                    Span rows, int64_t c0, int64_t lanes,
                                    GatheredBins<V>& gathered) {
  if (is_in_place<V>(bins, lanes)) return bins.grid(r, c0, 0, 0);
  return gathered.gather(bins, bins.at(r, c0, 0, 0), rows, s.Q, lanes);
}

// The same for all RoIs of a group, with RoI k's in rows [k * P, (k + 1) * P) of the tile.
template <typename V, typename T = typename V::Number>
IOU_D2_INLINE void gather_bins(const Strided<const T>& bins, const Shape& s, const Group& group,
                               int64_t c0, int64_t lanes, Tile<V, 1>& tile) {
  if (is_in_place<V>(bins, lanes)) return;
  const int64_t count = static_cast<int64_t>(group.rois.size());
  tile.resize(count * s.P, s.Q);
  for (int64_t k = 0; k < count; ++k)
    tile.gather(k * s.P, s.P, bins, bins.at(group.rois[k], c0, 0, 0), lanes);
}

template <typename V, typename U, typename T = typename V::Number>
IOU_D2_INLINE Grid<U> bins_in_group(const Strided<U>& bins, const Shape& s, const Group& group,
                                    int64_t k, int64_t c0, int64_t lanes, Tile<V, 1>& tile) {
  if (is_in_place<V>(bins, lanes)) return bins.grid(group.rois[k], c0, 0, 0);
  const Grid<T> grid = tile.grid(k * s.P);
  return {grid.data, grid.row, grid.column};
}

}  // namespace iou_d2::cpu
