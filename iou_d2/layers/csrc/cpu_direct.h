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
  int64_t origin = 0, extent = 0;  // the pixels under the RoI
  std::vector<int64_t> begin, end,
      offset;  // of each bin: pixels counted from origin, and where its weights are
  std::vector<T> weights;
  // For the RoI's gradient alone: what a move of its start, and of its end, does to the weights
  // times a bin's length, with that kept where it divides.
  std::vector<T> slopes[2];

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
  // Edge k, at the share k / bins from start to end, moves by 1 - k / bins and k / bins of their
  // moves, and the bins on its sides gain and lose the surface there.
  void set_slopes(const Axis& axis) {
    const double bins = static_cast<double>(axis.bins);
    for (int64_t k = 0; k < axis.bins; ++k) {
      const double low = static_cast<double>(k) / bins, high = static_cast<double>(k + 1) / bins;
      for (int64_t i = begin[k]; i < end[k]; ++i) {
        const double pixel = static_cast<double>(origin + i);
        const double lost = hat(axis.edge(k) - pixel), gained = hat(axis.edge(k + 1) - pixel);
        slopes[0].push_back(static_cast<T>((1 - high) * gained - (1 - low) * lost));
        slopes[1].push_back(static_cast<T>(high * gained - low * lost));
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
  const T *weights, *slopes[2];

  BinsView(const Bins<T>& b)
      : count(static_cast<int64_t>(b.begin.size())),
        extent(b.extent),
        begin(b.begin.data()),
        end(b.end.data()),
        offset(b.offset.data()),
        weights(b.weights.data()),
        slopes{b.slopes[0].data(), b.slopes[1].data()} {}
  IOU_D2_INLINE T weight(int64_t k, int64_t i) const {
    return weights[offset[k] + i];
  }
  IOU_D2_INLINE T slope(int64_t end_of_roi, int64_t k, int64_t i) const {
    return slopes[end_of_roi][offset[k] + i];
  }
  // Bins [k, over(i, k)) touch pixel i, if k is the first that does; `k` only grows with i.
  IOU_D2_INLINE int64_t over(int64_t i, int64_t& k) const {
    while (k < count && end[k] <= i) ++k;
    int64_t last = k;
    while (last < count && begin[last] <= i) ++last;
    return last;
  }
  // The bins that touch any of some pixels, of which there is at least one.
  IOU_D2_INLINE Span touching(Span pixels) const {
    int64_t first = 0;
    over(pixels.begin, first);
    int64_t last = first;
    return {first, over(pixels.end - 1, last)};
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

// map[i, j] += sum_q Wx[q, j] sum_p Wy[p, i] grad[p, q], in some rows of the RoI's
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
                          Span rows, int64_t channels) {
  for (int64_t i = rows.begin, p0 = 0; i < rows.end; ++i) {
    const int64_t p1 = y.over(i, p0);
    for (int64_t q = 0; q < x.count; ++q) {
      for_packs<V>(channels, [&](int64_t c, auto K) IOU_D2_INLINE_LAMBDA {
        spread_row<V, K>(grad, y, x, map, i, p0, p1, q, c);
      });
    }
  }
}

}  // namespace iou_d2::cpu
