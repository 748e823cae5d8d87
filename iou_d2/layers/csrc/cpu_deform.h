// What deformable convolution on the CPU is made of: shapes, the four pixels around a point, and
// rows of channels that are read and written there.
//
// N images, C channels; (H, W) map, (h, w) output, T taps, G groups of the convolution. Channels
// come in segments, which share their group and their offsets.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>

#include "cpu_simd.h"

namespace iou_d2::cpu {

struct Geometry {
  int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;

  Geometry(at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
    TORCH_CHECK_VALUE(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                      "deform_conv: stride, padding and dilation are pairs, got ", stride, ", ",
                      padding, ", ", dilation, ".");
    TORCH_CHECK_VALUE(stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 && dilation[1] > 0,
                      "deform_conv: stride and dilation must be positive, got ", stride, " and ",
                      dilation, ".");
    std::tie(stride_y, stride_x) = std::pair(stride[0], stride[1]);
    std::tie(padding_y, padding_x) = std::pair(padding[0], padding[1]);
    std::tie(dilation_y, dilation_x) = std::pair(dilation[0], dilation[1]);
  }
};

struct Sizes {
  int64_t N, C, H, W, out, h, w, kernel_y, kernel_x, taps, groups, offset_groups, segment;

  int64_t pixels() const {
    return h * w;
  }
  int64_t inputs() const {  // of a group
    return C / groups;
  }
};

inline int64_t output_side(int64_t side, int64_t kernel, int64_t stride, int64_t padding,
                           int64_t dilation) {
  return (side + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

inline Sizes sizes_of(const at::Tensor& x, const at::Tensor& offset,
                      const std::optional<at::Tensor>& mask, const at::Tensor& weight,
                      const Geometry& geometry) {
  TORCH_CHECK_VALUE(x.dim() == 4 && offset.dim() == 4 && weight.dim() == 4,
                    "deform_conv: the input, the offsets and the weight have 4 dimensions, got ",
                    x.sizes(), ", ", offset.sizes(), " and ", weight.sizes(), ".");
  TORCH_CHECK_TYPE(x.scalar_type() == offset.scalar_type() &&
                       x.scalar_type() == weight.scalar_type() &&
                       (!mask || mask->scalar_type() == x.scalar_type()),
                   "deform_conv: the input, the offsets, the mask and the weight differ in dtype.");
  Sizes s{};
  s.N = x.size(0), s.C = x.size(1), s.H = x.size(2), s.W = x.size(3);
  s.out = weight.size(0), s.kernel_y = weight.size(2), s.kernel_x = weight.size(3);
  s.taps = s.kernel_y * s.kernel_x;
  s.h = output_side(s.H, s.kernel_y, geometry.stride_y, geometry.padding_y, geometry.dilation_y);
  s.w = output_side(s.W, s.kernel_x, geometry.stride_x, geometry.padding_x, geometry.dilation_x);
  TORCH_CHECK_VALUE(s.taps > 0 && s.h > 0 && s.w > 0, "deform_conv: an input of ", x.sizes(),
                    " is smaller than the kernel ", weight.sizes(), ".");
  s.groups = weight.size(1) > 0 ? s.C / weight.size(1) : 0;
  TORCH_CHECK_VALUE(s.groups > 0 && s.groups * weight.size(1) == s.C && s.out % s.groups == 0,
                    "deform_conv: a weight of ", weight.sizes(), " does not fit an input of ",
                    x.sizes(), ".");
  s.offset_groups = offset.size(1) / (2 * s.taps);
  TORCH_CHECK_VALUE(s.offset_groups > 0 && s.C % s.offset_groups == 0 &&
                        offset.sizes() == at::IntArrayRef({s.N, 2 * s.offset_groups * s.taps, s.h,
                                                           s.w}),
                    "deform_conv: offsets of ", offset.sizes(), " do not fit an output of (", s.N,
                    ", ", s.out, ", ", s.h, ", ", s.w, ") of ", s.taps, " taps.");
  TORCH_CHECK_VALUE(
      !mask || mask->sizes() == at::IntArrayRef({s.N, s.offset_groups * s.taps, s.h, s.w}),
      "deform_conv: a mask of ", mask ? mask->sizes() : at::IntArrayRef(),
      " does not fit offsets of ", offset.sizes(), ".");
  s.segment = std::gcd(s.inputs(), s.C / s.offset_groups);
  return s;
}

// The four pixels around a point, each with its share of the value there. A pixel outside the map
// has none, and stands for the nearest one inside.
template <typename T>
struct LookUp {
  bool finite;
  bool seen;    // one of the four has a share
  bool inside;  // one of the four would have a share a little further right or down
  int64_t pixel[4];
  T share[4], along_y[4], along_x[4];  // and the derivatives of the share

  LookUp(T y, T x, int64_t H, int64_t W) {
    finite = std::isfinite(y) && std::isfinite(x);
    inside = finite && y >= -1 && y < H && x >= -1 && x < W;
    seen = inside && y > -1 && x > -1;
    if (!inside) return;
    const int64_t top = static_cast<int64_t>(std::floor(y));
    const int64_t left = static_cast<int64_t>(std::floor(x));
    const T part_y[2] = {1 - (y - top), y - top}, part_x[2] = {1 - (x - left), x - left};
    for (int k = 0; k < 4; ++k) {
      const int below = k / 2, right = k % 2;
      const int64_t row = std::clamp<int64_t>(top + below, 0, H - 1);
      const int64_t column = std::clamp<int64_t>(left + right, 0, W - 1);
      const T weight = row == top + below && column == left + right ? 1 : 0;
      pixel[k] = row * W + column;
      share[k] = weight * part_y[below] * part_x[right];
      along_y[k] = weight * (below ? part_x[right] : -part_x[right]);
      along_x[k] = weight * (right ? part_y[below] : -part_y[below]);
    }
  }
};

// The offsets of one image, and its mask or nullptr: (G, T, y and x, h, w) and (G, T, h, w).
template <typename T>
struct Taps {
  const Sizes& s;
  const Geometry& geometry;
  const T* offset;
  const T* mask;

  int64_t place(int64_t pixel, int64_t tap, int64_t group, int64_t values, int64_t value) const {
    return ((group * s.taps + tap) * values + value) * s.pixels() + pixel;
  }
  LookUp<T> look_up(int64_t pixel, int64_t tap, int64_t group) const {
    const int64_t y = pixel / s.w * geometry.stride_y - geometry.padding_y +
                      tap / s.kernel_x * geometry.dilation_y;
    const int64_t x = pixel % s.w * geometry.stride_x - geometry.padding_x +
                      tap % s.kernel_x * geometry.dilation_x;
    return LookUp<T>(y + offset[place(pixel, tap, group, 2, 0)],
                     x + offset[place(pixel, tap, group, 2, 1)], s.H, s.W);
  }
  T factor(int64_t pixel, int64_t tap, int64_t group) const {
    return mask ? mask[place(pixel, tap, group, 1, 0)] : T(1);
  }
};

// The look-ups of the output pixels [first, first + rows) of an image, or their gradients:
// (groups of the convolution, rows, T, channels of a group).
template <typename T>
struct Columns {
  const Sizes& s;
  int64_t first, rows;
  T* values;

  T* at(int64_t row, int64_t tap, int64_t channel) const {
    const int64_t group = channel / s.inputs();
    return values + ((group * rows + row) * s.taps + tap) * s.inputs() + channel % s.inputs();
  }
};

// Calls body(row, tap, offset group, first channel) for every segment of [c0, c1), which begins and
// ends with one.
template <typename F>
IOU_D2_INLINE void for_segments(const Sizes& s, int64_t row, int64_t c0, int64_t c1,
                                const F& body) {
  for (int64_t tap = 0; tap < s.taps; ++tap) {
    for (int64_t c = c0; c < c1; c += s.segment) body(row, tap, c / (s.C / s.offset_groups), c);
  }
}

template <typename V, typename T = typename V::Number>
IOU_D2_INLINE void blend(const T* map, const LookUp<T>& look, const T* share, int64_t C,
                         int64_t count, T* to) {
  constexpr int64_t LANES = V::LANES;
  const T* from[4];
  for (int k = 0; k < 4; ++k) from[k] = map + look.pixel[k] * C;
  int64_t c = 0;
  for (; c + LANES <= count; c += LANES) {
    auto sum = share[0] * pack<V>(from[0] + c);
    for (int k = 1; k < 4; ++k) sum += share[k] * pack<V>(from[k] + c);
    pack<V>(to + c) = sum;
  }
  for (; c < count; ++c) {
    to[c] = share[0] * from[0][c] + share[1] * from[1][c] + share[2] * from[2][c] +
            share[3] * from[3][c];
  }
}

// dots[k] = sum over channels of gradient * pixel k.
template <typename V, typename T = typename V::Number>
IOU_D2_INLINE void dots_of(const T* map, const LookUp<T>& look, int64_t C, int64_t count,
                           const T* gradient, double* dots) {
  constexpr int64_t LANES = V::LANES;
  for (int k = 0; k < 4; ++k) {
    const T* from = map + look.pixel[k] * C;
    int64_t c = 0;
    if (count >= LANES) {
      auto sum = pack<V>(gradient) * pack<V>(from);
      for (c = LANES; c + LANES <= count; c += LANES)
        sum += pack<V>(gradient + c) * pack<V>(from + c);
      dots[k] += add_lanes<V>(sum);
    }
    for (; c < count; ++c) dots[k] += static_cast<double>(gradient[c]) * from[c];
  }
}

// map[pixel k] += share[k] * gradient
template <typename V, typename T = typename V::Number>
IOU_D2_INLINE void spread(const T* gradient, const LookUp<T>& look, const T* share, int64_t C,
                          int64_t count, T* map) {
  constexpr int64_t LANES = V::LANES;
  for (int k = 0; k < 4; ++k) {
    if (share[k] == 0) continue;
    T* to = map + look.pixel[k] * C;
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES) pack<V>(to + c) += share[k] * pack<V>(gradient + c);
    for (; c < count; ++c) to[c] += share[k] * gradient[c];
  }
}

}  // namespace iou_d2::cpu
