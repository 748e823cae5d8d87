// Deformable convolution (arXiv 1703.06211, 1811.11168) on the CPU.
//
// As a plain convolution is a product of its weights with the pixels under each tap, this one is a
// product with the bilinear look-ups under each tap: `look_up` writes them for a block of output
// pixels, and the matrix product does the rest. Features are read channels-last, so that a look-up
// is four weighted rows of neighbouring channels.
//
// N images, C channels; (H, W) map, (h, w) output, T taps, G groups of the convolution. Channels
// come in segments, which share their group and their offsets.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>

#include "cpu_simd.h"

namespace iou_d2::cpu {
namespace {

// Output pixels of one matrix product: their look-ups, 2.4 MB of 256 channels, stay in the cache.
constexpr int64_t BLOCK = 256;

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

int64_t output_side(int64_t side, int64_t kernel, int64_t stride, int64_t padding,
                    int64_t dilation) {
  return (side + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

Sizes sizes_of(const at::Tensor& x, const at::Tensor& offset, const std::optional<at::Tensor>& mask,
               const at::Tensor& weight, const Geometry& geometry) {
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

template <typename T>
IOU_D2_INLINE void blend(const T* map, const LookUp<T>& look, const T* share, int64_t C,
                         int64_t count, T* to) {
  constexpr int64_t LANES = Simd<T>::LANES;
  const T* from[4];
  for (int k = 0; k < 4; ++k) from[k] = map + look.pixel[k] * C;
  int64_t c = 0;
  for (; c + LANES <= count; c += LANES) {
    auto sum = share[0] * pack<T>(from[0] + c);
    for (int k = 1; k < 4; ++k) sum += share[k] * pack<T>(from[k] + c);
    pack<T>(to + c) = sum;
  }
  for (; c < count; ++c) {
    to[c] = share[0] * from[0][c] + share[1] * from[1][c] + share[2] * from[2][c] +
            share[3] * from[3][c];
  }
}

// dots[k] = sum over channels of gradient * pixel k.
template <typename T>
IOU_D2_INLINE void dots_of(const T* map, const LookUp<T>& look, int64_t C, int64_t count,
                           const T* gradient, double* dots) {
  constexpr int64_t LANES = Simd<T>::LANES;
  for (int k = 0; k < 4; ++k) {
    const T* from = map + look.pixel[k] * C;
    int64_t c = 0;
    if (count >= LANES) {
      auto sum = pack<T>(gradient) * pack<T>(from);
      for (c = LANES; c + LANES <= count; c += LANES)
        sum += pack<T>(gradient + c) * pack<T>(from + c);
      dots[k] += add_lanes<T>(sum);
    }
    for (; c < count; ++c) dots[k] += static_cast<double>(gradient[c]) * from[c];
  }
}

// map[pixel k] += share[k] * gradient
template <typename T>
IOU_D2_INLINE void spread(const T* gradient, const LookUp<T>& look, const T* share, int64_t C,
                          int64_t count, T* map) {
  constexpr int64_t LANES = Simd<T>::LANES;
  for (int k = 0; k < 4; ++k) {
    if (share[k] == 0) continue;
    T* to = map + look.pixel[k] * C;
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES) pack<T>(to + c) += share[k] * pack<T>(gradient + c);
    for (; c < count; ++c) to[c] += share[k] * gradient[c];
  }
}

// What is seen at a point that is not finite is NaN, so that it shows.
template <typename T>
void fill_columns(const Taps<T>& taps, const T* map, const Columns<T>& columns) {
  const Sizes& s = taps.s;
  at::parallel_for(0, columns.rows, 16, [&](int64_t begin, int64_t end) {
    run_widest([&]() IOU_D2_INLINE_LAMBDA {
      const auto fill = [&](int64_t row, int64_t tap, int64_t group, int64_t c)
          IOU_D2_INLINE_LAMBDA {
        const LookUp<T> look = taps.look_up(columns.first + row, tap, group);
        const T factor = taps.factor(columns.first + row, tap, group);
        T* to = columns.at(row, tap, c);
        if (!look.seen) {
          const T outside = look.finite ? 0 : std::numeric_limits<T>::quiet_NaN();
          std::fill(to, to + s.segment, outside);
          return;
        }
        T share[4];
        for (int k = 0; k < 4; ++k) share[k] = factor * look.share[k];
        blend(map + c, look, share, s.C, s.segment, to);
      };
      for (int64_t row = begin; row < end; ++row) for_segments(s, row, 0, s.C, fill);
    });
  });
}

// Adds to the gradients of the offsets and, where there is one, of the mask.
template <typename T>
void add_to_taps(const Taps<T>& taps, const T* map, const Columns<T>& gradient, T* grad_offset,
                 T* grad_mask) {
  const Sizes& s = taps.s;
  at::parallel_for(0, gradient.rows, 16, [&](int64_t begin, int64_t end) {
    run_widest([&]() IOU_D2_INLINE_LAMBDA {
      const auto add = [&](int64_t row, int64_t tap, int64_t group, int64_t c)
          IOU_D2_INLINE_LAMBDA {
        const int64_t pixel = gradient.first + row;
        const LookUp<T> look = taps.look_up(pixel, tap, group);
        if (!look.inside) return;
        double dots[4] = {0, 0, 0, 0}, y = 0, x = 0, value = 0;
        dots_of(map + c, look, s.C, s.segment, gradient.at(row, tap, c), dots);
        for (int k = 0; k < 4; ++k) {
          y += look.along_y[k] * dots[k];
          x += look.along_x[k] * dots[k];
          value += look.share[k] * dots[k];
        }
        const T factor = taps.factor(pixel, tap, group);
        grad_offset[taps.place(pixel, tap, group, 2, 0)] += factor * y;
        grad_offset[taps.place(pixel, tap, group, 2, 1)] += factor * x;
        if (grad_mask) grad_mask[taps.place(pixel, tap, group, 1, 0)] += value;
      };
      for (int64_t row = begin; row < end; ++row) for_segments(s, row, 0, s.C, add);
    });
  });
}

// A thread owns a range of channels, so that no two write to one place and sums have one order.
template <typename T>
void add_to_map(const Taps<T>& taps, const Columns<T>& gradient, T* map) {
  const Sizes& s = taps.s;
  // Parts of at least a vector where channels are not divided further.
  const int64_t parts = s.C / s.segment;
  const int64_t grain = std::max<int64_t>(1, Simd<T>::LANES / s.segment);
  const bool whole = parts == 1;
  const int64_t units = whole ? (s.C + Simd<T>::LANES - 1) / Simd<T>::LANES : parts;
  at::parallel_for(0, units, whole ? 2 : grain, [&](int64_t begin, int64_t end) {
    const int64_t unit = whole ? Simd<T>::LANES : s.segment;
    const int64_t c0 = begin * unit, c1 = std::min(end * unit, s.C);
    run_widest([&]() IOU_D2_INLINE_LAMBDA {
      const auto add = [&](int64_t row, int64_t tap, int64_t group, int64_t c)
          IOU_D2_INLINE_LAMBDA {
        const LookUp<T> look = taps.look_up(gradient.first + row, tap, group);
        if (!look.seen) return;
        const T factor = taps.factor(gradient.first + row, tap, group);
        T share[4];
        for (int k = 0; k < 4; ++k) share[k] = factor * look.share[k];
        const int64_t count = std::min(s.segment, c1 - c);
        spread(gradient.at(row, tap, c), look, share, s.C, count, map + c);
      };
      for (int64_t row = 0; row < gradient.rows; ++row) for_segments(s, row, c0, c1, add);
    });
  });
}

// (C_out, inputs, kernel) -> (groups, C_out of a group, taps * inputs)
at::Tensor as_matrix(const at::Tensor& weight, const Sizes& s) {
  return weight.reshape({s.groups, s.out / s.groups, s.inputs(), s.taps})
      .transpose(2, 3)
      .reshape({s.groups, s.out / s.groups, s.taps * s.inputs()});
}

at::MemoryFormat format_of(const at::Tensor& t) {
  return t.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
}

// Pixels [first, first + rows) of image n of an (N, C_out, h, w) in one of the two formats:
// (groups, C_out of a group, rows). The matrix product writes into either.
at::Tensor block_of(const at::Tensor& t, int64_t n, int64_t first, int64_t rows, const Sizes& s) {
  return t.select(0, n).view({s.groups, s.out / s.groups, s.pixels()}).narrow(2, first, rows);
}

at::Tensor pixel_by_pixel(const at::Tensor& map) {
  return map.permute({0, 2, 3, 1}).contiguous();
}

template <typename T>
const T* data_or_null(const std::optional<at::Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// Calls body(n, pixels of the map, taps, columns, `rows` of them) for every block of every image.
template <typename T, typename F>
void for_blocks(const Sizes& s, const Geometry& geometry, const at::Tensor& map,
                const at::Tensor& offset, const std::optional<at::Tensor>& mask, const F& body) {
  const int64_t size = s.offset_groups * s.taps * s.pixels();
  const T* mask_data = data_or_null<T>(mask);
  for (int64_t n = 0; n < s.N; ++n) {
    const Taps<T> taps{s, geometry, offset.const_data_ptr<T>() + n * 2 * size,
                       mask_data ? mask_data + n * size : nullptr};
    for (int64_t first = 0; first < s.pixels(); first += BLOCK)
      body(n, map.const_data_ptr<T>() + n * s.H * s.W * s.C, taps, first,
           std::min(BLOCK, s.pixels() - first));
  }
}

at::Tensor deform_conv_cpu(const at::Tensor& x, const at::Tensor& offset,
                           const std::optional<at::Tensor>& mask, const at::Tensor& weight,
                           at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation) {
  const Geometry geometry(stride, padding, dilation);
  const Sizes s = sizes_of(x, offset, mask, weight, geometry);
  const at::Tensor map = pixel_by_pixel(x), offsets = offset.contiguous();
  const auto factors = mask ? std::optional(mask->contiguous()) : std::nullopt;
  const at::Tensor matrix = as_matrix(weight, s);
  const at::Tensor output =
      at::empty({s.N, s.out, s.h, s.w}, x.options().memory_format(format_of(x)));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "deform_conv", [&] {
    for_blocks<scalar_t>(
        s, geometry, map, offsets, factors,
        [&](int64_t n, const scalar_t* pixels, const auto& taps, int64_t first, int64_t rows) {
          at::Tensor seen = at::empty({s.groups, rows, s.taps * s.inputs()}, x.options());
          fill_columns<scalar_t>(taps, pixels, {s, first, rows, seen.data_ptr<scalar_t>()});
          at::Tensor block = block_of(output, n, first, rows, s);
          at::bmm_out(block, matrix, seen.transpose(1, 2));
        });
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> deform_conv_backward_cpu(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& offset,
    const std::optional<at::Tensor>& mask, const at::Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation) {
  const Geometry geometry(stride, padding, dilation);
  const Sizes s = sizes_of(x, offset, mask, weight, geometry);
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef({s.N, s.out, s.h, s.w}) &&
                        grad.scalar_type() == x.scalar_type(),
                    "deform_conv: a gradient of shape ", grad.sizes(), " does not fit an input of ",
                    x.sizes(), " and a weight of ", weight.sizes(), ".");
  const at::Tensor map = pixel_by_pixel(x), offsets = offset.contiguous();
  const auto factors = mask ? std::optional(mask->contiguous()) : std::nullopt;
  const at::Tensor matrix = as_matrix(weight, s), grads = grad.contiguous(format_of(grad));
  at::Tensor grad_map = at::zeros({s.N, s.H * s.W, s.C}, x.options());
  at::Tensor grad_offset = at::zeros(offset.sizes(), x.options());
  at::Tensor grad_mask = at::zeros(mask ? mask->sizes() : at::IntArrayRef({0}), x.options());
  at::Tensor grad_matrix = at::zeros(matrix.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "deform_conv_backward", [&] {
    for_blocks<scalar_t>(
        s, geometry, map, offsets, factors,
        [&](int64_t n, const scalar_t* pixels, const auto& taps, int64_t first, int64_t rows) {
          const at::Tensor block = block_of(grads, n, first, rows, s);
          at::Tensor seen = at::empty({s.groups, rows, s.taps * s.inputs()}, x.options());
          fill_columns<scalar_t>(taps, pixels, {s, first, rows, seen.data_ptr<scalar_t>()});
          grad_matrix.baddbmm_(block, seen);
          at::bmm_out(seen, block.transpose(1, 2), matrix);
          const Columns<scalar_t> gradient{s, first, rows, seen.data_ptr<scalar_t>()};
          const int64_t size = s.offset_groups * s.taps * s.pixels();
          add_to_taps<scalar_t>(taps, pixels, gradient,
                                grad_offset.data_ptr<scalar_t>() + n * 2 * size,
                                mask ? grad_mask.data_ptr<scalar_t>() + n * size : nullptr);
          add_to_map<scalar_t>(taps, gradient,
                               grad_map.data_ptr<scalar_t>() + n * s.H * s.W * s.C);
        });
  });
  const at::Tensor grad_weight =
      grad_matrix.view({s.out, s.taps, s.inputs()}).transpose(1, 2).reshape(weight.sizes());
  const at::Tensor grad_x = grad_map.view({s.N, s.H, s.W, s.C}).permute({0, 3, 1, 2});
  return {grad_x.contiguous(format_of(x)), grad_offset, grad_mask, grad_weight};
}

}  // namespace
}  // namespace iou_d2::cpu

TORCH_LIBRARY_IMPL(iou_d2, CPU, m) {
  m.impl("deform_conv", iou_d2::cpu::deform_conv_cpu);
  m.impl("deform_conv_backward", iou_d2::cpu::deform_conv_backward_cpu);
}
