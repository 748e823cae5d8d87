// The gradient of one RoI by its bins' edges: what a move of an edge does to the bins on its sides.
// The fast way for few channels, and for large bins, since it reads the pixels at edges alone.
#pragma once

#include <cmath>
#include <vector>

#include "cpu_direct.h"

namespace iou_d2::cpu {

// The two pixels around edge e of an axis, counted from the RoI's first, and their hats. A pixel
// outside the map or with a hat of 0, which may not be under the RoI, is replaced by the other one.
struct EdgePixels {
  int64_t pixel[2];
  double hats[2];

  EdgePixels(const Axis& axis, int64_t origin, int64_t e) {
    const double at = axis.edge(e);
    const int64_t left =
        static_cast<int64_t>(std::floor(clamp(at, -1, static_cast<double>(axis.size))));
    for (int64_t s = 0; s < 2; ++s) {
      const bool inside = left + s >= 0 && left + s < axis.size;
      pixel[s] = inside ? left + s - origin : 0;
      hats[s] = inside ? hat(at - static_cast<double>(left + s)) : 0;
    }
    if (hats[0] == 0) pixel[0] = pixel[1];
    if (hats[1] == 0) pixel[1] = pixel[0];
  }
};

// The sum over the bins k across of (grad[e-1, k] - grad[e, k]) * (mean over bin k of the map along
// edge e): what moving edge e does to the bins on its two sides, but for the bin length. `map` and
// `grad` are addressed as (across, along), i.e. column strides run along the axis whose edges move.
template <typename V, int K, typename T = typename V::Number>
IOU_D2_INLINE typename V::Pack edge_sum(Grid<const T> map, Grid<const T> grad, const EdgePixels& at,
                                        BinsView<T> across, int64_t e, int64_t bins, int64_t c) {
  constexpr int64_t LANES = V::LANES;
  typename V::Pack total[K] = {};
  for (int64_t k = 0; k < across.count; ++k) {
    typename V::Pack near[K] = {}, far[K] = {};  // sums of weighted pixels on either side
    for (int64_t i = across.begin[k]; i < across.end[k]; ++i) {
      const T w = across.weight(k, i);
      for (int n = 0; n < K; ++n) near[n] += w * pack<V>(map.at(i, at.pixel[0]) + c + n * LANES);
      for (int n = 0; n < K; ++n) far[n] += w * pack<V>(map.at(i, at.pixel[1]) + c + n * LANES);
    }
    for (int n = 0; n < K; ++n) {
      typename V::Pack step = {}, mean = static_cast<T>(at.hats[0]) * near[n];
      mean += static_cast<T>(at.hats[1]) * far[n];
      if (e > 0) step += pack<V>(grad.at(k, e - 1) + c + n * LANES);
      if (e < bins) step += T(-1) * pack<V>(grad.at(k, e) + c + n * LANES);
      total[n] += step * mean;
    }
  }
  for (int n = 1; n < K; ++n) total[0] += total[n];
  return total[0];
}

// Adds what moving the two ends of an axis does: edge e, at the share t from start to end, moves
// by 1 - t and t of their moves.
template <typename V, typename T = typename V::Number>
IOU_D2_INLINE void add_ends(Grid<const T> map, Grid<const T> grad,
                            const std::vector<EdgePixels>& edges, BinsView<T> across,
                            int64_t channels, double* ends) {
  const int64_t bins = static_cast<int64_t>(edges.size()) - 1;
  typename V::Pack start = {}, end = {};
  for (int64_t e = 0; e <= bins; ++e) {
    const EdgePixels& at = edges[e];
    if (at.hats[0] == 0 && at.hats[1] == 0) continue;
    typename V::Pack total = {};
    for_packs<V>(channels, [&](int64_t c, auto K) IOU_D2_INLINE_LAMBDA {
      total += edge_sum<V, K>(map, grad, at, across, e, bins, c);
    });
    const T t = static_cast<T>(e) / static_cast<T>(bins);
    start += (1 - t) * total;
    end += t * total;
  }
  ends[0] += add_lanes<V>(start);
  ends[1] += add_lanes<V>(end);
}

// sum of grad * out over bins and channels
template <typename V, typename T = typename V::Number>
IOU_D2_INLINE double inner(Grid<const T> grad, Grid<const T> out, int64_t rows, int64_t columns,
                           int64_t channels) {
  constexpr int64_t LANES = V::LANES;
  typename V::Pack total[4] = {};  // so that an addition need not wait for the one before
  for (int64_t p = 0; p < rows; ++p) {
    for (int64_t q = 0; q < columns; ++q) {
      for_packs<V>(channels, [&](int64_t c, auto K) IOU_D2_INLINE_LAMBDA {
        const T *from = grad.at(p, q) + c, *with = out.at(p, q) + c;
        for (int n = 0; n < K; ++n)
          total[n] += pack<V>(from + n * LANES) * pack<V>(with + n * LANES);
      });
    }
  }
  return add_lanes<V>(total[0]) + add_lanes<V>(total[1]) + add_lanes<V>(total[2]) +
         add_lanes<V>(total[3]);
}

}  // namespace iou_d2::cpu
