// The gradient of one RoI by the products of its bins' gradients and their pixels. Once those are
// summed over channels, a bin and pixel are left with a few numbers: the fast way for many channels
// and bins of few pixels.
#pragma once

#include <type_traits>

#include "cpu_direct.h"

namespace iou_d2::cpu {

// Calls body(k, K) for runs of K <= 5 neighbours in [begin, end), nearly equal in length.
template <typename F>
IOU_D2_INLINE void for_runs(int64_t begin, int64_t end, const F& body) {
  int64_t runs = (end - begin + 4) / 5;
  for (int64_t k = begin, n; k < end; k += n, --runs) {
    n = (end - k + runs - 1) / runs;
    if (n == 5) body(k, std::integral_constant<int, 5>());
    if (n == 4) body(k, std::integral_constant<int, 4>());
    if (n == 3) body(k, std::integral_constant<int, 3>());
    if (n == 2) body(k, std::integral_constant<int, 2>());
    if (n == 1) body(k, std::integral_constant<int, 1>());
  }
}

// sums[k] = the sum over channels of grad * pixel k of K neighbours, lane by lane.
template <typename V, int K, typename T = typename V::Number>
IOU_D2_INLINE void multiply(const T* grad, const T* pixels, int64_t column, int64_t channels,
                            typename V::Pack (&sums)[K]) {
  constexpr int64_t LANES = V::LANES;
  typename V::Pack odd[K] = {};  // so that an addition need not wait for the one before
  int64_t c = 0;
  for (; c + 2 * LANES <= channels; c += 2 * LANES) {
    const typename V::Pack g = pack<V>(grad + c), h = pack<V>(grad + c + LANES);
    for (int k = 0; k < K; ++k) sums[k] += g * pack<V>(pixels + k * column + c);
    for (int k = 0; k < K; ++k) odd[k] += h * pack<V>(pixels + k * column + c + LANES);
  }
  if (c < channels) {
    for (int k = 0; k < K; ++k) sums[k] += pack<V>(grad + c) * pack<V>(pixels + k * column + c);
  }
  for (int k = 0; k < K; ++k) sums[k] += odd[k];
}

// What moving the two ends of an axis does to the loss, times the length of a bin, which is kept;
// and the sum of gradient * output; lane by lane.
template <typename V>
struct EndSums {
  typename V::Pack y[2] = {}, x[2] = {}, inner = {};
};

// Adds bin (p, q)'s part of row i.
template <typename V, typename T = typename V::Number>
IOU_D2_INLINE void add_row(Grid<const T> map, Grid<const T> grad, BinsView<T> y, BinsView<T> x,
                           int64_t i, int64_t p, int64_t q, int64_t channels, EndSums<V>& ends) {
  typename V::Pack value = {}, start = {}, end = {};
  for_runs(x.begin[q], x.end[q], [&](int64_t j, auto K) IOU_D2_INLINE_LAMBDA {
    typename V::Pack sums[K] = {};
    multiply<V, K>(grad.at(p, q), map.at(i, j), map.column, channels, sums);
    for (int k = 0; k < K; ++k) {
      value += x.weight(q, j + k) * sums[k];
      start += x.slope(0, q, j + k) * sums[k];
      end += x.slope(1, q, j + k) * sums[k];
    }
  });
  const T w = y.weight(p, i);
  ends.inner += w * value;
  ends.x[0] += w * start, ends.x[1] += w * end;
  ends.y[0] += y.slope(0, p, i) * value, ends.y[1] += y.slope(1, p, i) * value;
}

template <typename V, typename T = typename V::Number>
IOU_D2_INLINE EndSums<V> end_sums(Grid<const T> map, Grid<const T> grad, BinsView<T> y,
                                  BinsView<T> x, int64_t channels) {
  EndSums<V> ends;
  for (int64_t i = 0, p0 = 0; i < y.extent; ++i) {
    const int64_t p1 = y.over(i, p0);
    for (int64_t p = p0; p < p1; ++p) {
      for (int64_t q = 0; q < x.count; ++q) add_row<V>(map, grad, y, x, i, p, q, channels, ends);
    }
  }
  return ends;
}

}  // namespace iou_d2::cpu
