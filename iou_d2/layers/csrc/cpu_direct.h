// CPU kernels that read every pixel under a RoI: the fast way for RoIs of a few hundred pixels.
//
// Each handles `channels` (a multiple of LANES) neighbouring channels of one RoI. `map` addresses
// the first pixel under the RoI, `out` and `grad` its first bin.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "prroi_pool.h"
#include "cpu_tile.h"

namespace iou_d2::cpu {

// The bins of one axis of a RoI: which pixels each touches, and their weights.
template <typename T>
struct Bins {
  int64_t origin, extent;  // the pixels under the RoI
  std::vector<int64_t> begin, end,
      offset;  // of each bin: pixels counted from origin, and where its weights are
  std::vector<T> weights;

  Bins() = default;
  explicit Bins(const Axis& axis) : begin(axis.bins), end(axis.bins), offset(axis.bins) {
    origin = axis.bin_first(0);
    extent = std::max<int64_t>(axis.bin_last(axis.bins - 1) - origin, 0);
    weights.reserve(extent + 2 * axis.bins);  // neighbours share at most two pixels
    for (int64_t k = 0; k < axis.bins; ++k) {
      begin[k] = axis.bin_first(k) - origin;
      end[k] = std::max(axis.bin_last(k) - origin, begin[k]);
      offset[k] = static_cast<int64_t>(weights.size()) - begin[k];
      const T whole = static_cast<T>(1 / (axis.length / static_cast<double>(axis.bins)));
      for (int64_t i = begin[k]; i < end[k]; ++i) {  // hats two from the bin's ends are whole
        const bool inner = begin[k] + 2 <= i && i < end[k] - 2;
        weights.push_back(inner ? whole : static_cast<T>(axis.weight(k, origin + i)));
      }
    }
  }
};

// The same by value: a kernel's stores could change what it reads through a reference, as far as a
// compiler knows.
template <typename T>
struct BinsView {
  int64_t count, extent;
  const int64_t *begin, *end, *offset;
  const T* weights;

  BinsView(const Bins<T>& b)
      : count(static_cast<int64_t>(b.begin.size())),
        extent(b.extent),
        begin(b.begin.data()),
        end(b.end.data()),
        offset(b.offset.data()),
        weights(b.weights.data()) {}
  IOU_D2_INLINE T weight(int64_t k, int64_t i) const {
    return weights[offset[k] + i];
  }
  // Bins [k, over(i, k)) touch pixel i, if k is the first that does; `k` only grows with i.
  IOU_D2_INLINE int64_t over(int64_t i, int64_t& k) const {
    while (k < count && end[k] <= i) ++k;
    int64_t last = k;
    while (last < count && begin[last] <= i) ++last;
    return last;
  }
};

// Calls body(c, K) for K vectors of channels at a time, so that what they share is done once.
template <typename V, typename F>
IOU_D2_INLINE void for_packs(int64_t channels, const F& body) {
  constexpr int64_t LANES = V::LANES;
  int64_t c = 0;
  for (; c + 4 * LANES <= channels; c += 4 * LANES) body(c, std::integral_constant<int, 4>());
  for (; c + 2 * LANES <= channels; c += 2 * LANES) body(c, std::integral_constant<int, 2>());
  if (c < channels) body(c, std::integral_constant<int, 1>());
}

// out[p, q] = sum_i Wy[p, i] sum_j Wx[q, j] map[i, j], reading the map once, row by row. Its first
// row writes a bin, the others add to it.
template <typename V, int K, typename T = typename V::Number>
IOU_D2_INLINE void pool_row(Grid<const T> map, BinsView<T> y, BinsView<T> x, Grid<T> out,
                            int64_t i, int64_t p0, int64_t p1, int64_t q, int64_t c) {
  constexpr int64_t LANES = V::LANES;
  typename V::Pack line[K] = {};
  for (int64_t j = x.begin[q]; j < x.end[q]; ++j) {
    const T w = x.weight(q, j);
    for (int k = 0; k < K; ++k) line[k] += w * pack<V>(map.at(i, j) + c + k * LANES);
    prefetch_packs<V, K>(map.at(i + 1, j) + c);
  }
  for (int64_t p = p0; p < p1; ++p) {
    const T w = y.weight(p, i);
    T* bin = out.at(p, q) + c;
    if (i == y.begin[p]) {
      for (int k = 0; k < K; ++k) pack<V>(bin + k * LANES) = w * line[k];
    } else {
      for (int k = 0; k < K; ++k) pack<V>(bin + k * LANES) += w * line[k];
    }
  }
}

template <typename V, typename T = typename V::Number>
IOU_D2_INLINE void pool(Grid<const T> map, BinsView<T> y, BinsView<T> x, Grid<T> out,
                        int64_t channels) {
  for (int64_t p = 0; p < y.count; ++p) {
    if (y.begin[p] < y.end[p]) continue;
    for (int64_t q = 0; q < x.count; ++q) std::fill_n(out.at(p, q), channels, T(0));
  }
  for (int64_t i = 0, p0 = 0; i < y.extent; ++i) {
    const int64_t p1 = y.over(i, p0);
    for (int64_t q = 0; q < x.count; ++q) {
      for_packs<V>(channels, [&](int64_t c, auto K) IOU_D2_INLINE_LAMBDA {
        pool_row<V, K>(map, y, x, out, i, p0, p1, q, c);
      });
    }
  }
}

// map[i, j] += sum_q Wx[q, j] sum_p Wy[p, i] grad[p, q]
template <typename V, int K, typename T = typename V::Number>
IOU_D2_INLINE void spread_row(Grid<const T> grad, BinsView<T> y, BinsView<T> x, Grid<T> map,
                              int64_t i, int64_t p0, int64_t p1, int64_t q, int64_t c) {
  constexpr int64_t LANES = V::LANES;
  typename V::Pack line[K] = {};
  for (int64_t p = p0; p < p1; ++p) {
    const T w = y.weight(p, i);
    for (int k = 0; k < K; ++k) line[k] += w * pack<V>(grad.at(p, q) + c + k * LANES);
  }
  for (int64_t j = x.begin[q]; j < x.end[q]; ++j) {
    const T w = x.weight(q, j);
    for (int k = 0; k < K; ++k) pack<V>(map.at(i, j) + c + k * LANES) += w * line[k];
  }
}

template <typename V, typename T = typename V::Number>
IOU_D2_INLINE void spread(Grid<const T> grad, BinsView<T> y, BinsView<T> x, Grid<T> map,
                          int64_t channels) {
  for (int64_t i = 0, p0 = 0; i < y.extent; ++i) {
    const int64_t p1 = y.over(i, p0);
    for (int64_t q = 0; q < x.count; ++q) {
      for_packs<V>(channels, [&](int64_t c, auto K) IOU_D2_INLINE_LAMBDA {
        spread_row<V, K>(grad, y, x, map, i, p0, p1, q, c);
      });
    }
  }
}

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
IOU_D2_INLINE typename V::Pack edge_sum(Grid<const T> map, Grid<const T> grad,
                                              const EdgePixels& at, BinsView<T> across,
                                              int64_t e, int64_t bins, int64_t c) {
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
