// Deformable convolution (arXiv 1703.06211, 1811.11168) on the CPU.
//
// As a plain convolution is a product of its weights with the pixels under each tap, this one is a
// product with the bilinear look-ups under each tap: `fill_columns` writes them for a block of
// output pixels, and the matrix product does the rest. Features are read channels-last, so that a
// look-up is four weighted rows of neighbouring channels.
//
// The letters are those of cpu_deform.h.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "cpu_deform.h"

namespace iou_d2::cpu {
namespace {

// Output pixels of one matrix product: their look-ups, 2.4 MB of 256 channels, stay in the cache.
constexpr int64_t BLOCK = 256;

// What is seen at a point that is not finite is NaN, so that it shows.
template <typename V, typename T = typename V::Number>
void fill_columns(const Taps<T>& taps, const T* map, const Columns<T>& columns) {
  const Sizes& s = taps.s;
  at::parallel_for(0, columns.rows, 16, [&](int64_t begin, int64_t end) {
    V::run([&]() IOU_D2_INLINE_LAMBDA {
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
        blend<V>(map + c, look, share, s.C, s.segment, to);
      };
      for (int64_t row = begin; row < end; ++row) for_segments(s, row, 0, s.C, fill);
    });
  });
}

// Adds to the gradients of the offsets and, where there is one, of the mask.
template <typename V, typename T = typename V::Number>
void add_to_taps(const Taps<T>& taps, const T* map, const Columns<T>& gradient, T* grad_offset,
                 T* grad_mask) {
  const Sizes& s = taps.s;
  at::parallel_for(0, gradient.rows, 16, [&](int64_t begin, int64_t end) {
    V::run([&]() IOU_D2_INLINE_LAMBDA {
      const auto add = [&](int64_t row, int64_t tap, int64_t group, int64_t c)
          IOU_D2_INLINE_LAMBDA {
        const int64_t pixel = gradient.first + row;
        const LookUp<T> look = taps.look_up(pixel, tap, group);
        if (!look.inside) return;
        double dots[4] = {0, 0, 0, 0}, y = 0, x = 0, value = 0;
        dots_of<V>(map + c, look, s.C, s.segment, gradient.at(row, tap, c), dots);
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
template <typename V, typename T = typename V::Number>
void add_to_map(const Taps<T>& taps, const Columns<T>& gradient, T* map) {
  const Sizes& s = taps.s;
  // The channels of a single segment may be divided further, segments may not.
  const int64_t unit = s.segment == s.C ? V::LANES : s.segment;
  const int64_t grain = std::max<int64_t>(1, 2 * V::LANES / unit);
  at::parallel_for(0, (s.C + unit - 1) / unit, grain, [&](int64_t begin, int64_t end) {
    const int64_t c0 = begin * unit, c1 = std::min(end * unit, s.C);
    V::run([&]() IOU_D2_INLINE_LAMBDA {
      const auto add = [&](int64_t row, int64_t tap, int64_t group, int64_t c)
          IOU_D2_INLINE_LAMBDA {
        const LookUp<T> look = taps.look_up(gradient.first + row, tap, group);
        if (!look.seen) return;
        const T factor = taps.factor(gradient.first + row, tap, group);
        T share[4];
        for (int k = 0; k < 4; ++k) share[k] = factor * look.share[k];
        const int64_t count = std::min(s.segment, c1 - c);
        spread<V>(gradient.at(row, tap, c), look, share, s.C, count, map + c);
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
    const auto convolve = [&](auto simd) {
      using V = decltype(simd);
      for_blocks<scalar_t>(
          s, geometry, map, offsets, factors,
          [&](int64_t n, const scalar_t* pixels, const auto& taps, int64_t first, int64_t rows) {
            at::Tensor seen = at::empty({s.groups, rows, s.taps * s.inputs()}, x.options());
            fill_columns<V>(taps, pixels, {s, first, rows, seen.data_ptr<scalar_t>()});
            at::Tensor block = block_of(output, n, first, rows, s);
            at::bmm_out(block, matrix, seen.transpose(1, 2));
          });
    };
    with_widest<scalar_t>(convolve);
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
    const auto differentiate = [&](auto simd) {
      using V = decltype(simd);
      for_blocks<scalar_t>(
          s, geometry, map, offsets, factors,
          [&](int64_t n, const scalar_t* pixels, const auto& taps, int64_t first, int64_t rows) {
            const at::Tensor block = block_of(grads, n, first, rows, s);
            at::Tensor seen = at::empty({s.groups, rows, s.taps * s.inputs()}, x.options());
            fill_columns<V>(taps, pixels, {s, first, rows, seen.data_ptr<scalar_t>()});
            grad_matrix.baddbmm_(block, seen);
            at::bmm_out(seen, block.transpose(1, 2), matrix);
            const Columns<scalar_t> gradient{s, first, rows, seen.data_ptr<scalar_t>()};
            const int64_t size = s.offset_groups * s.taps * s.pixels();
            add_to_taps<V>(taps, pixels, gradient, grad_offset.data_ptr<scalar_t>() + n * 2 * size,
                           mask ? grad_mask.data_ptr<scalar_t>() + n * size : nullptr);
            add_to_map<V>(taps, gradient, grad_map.data_ptr<scalar_t>() + n * s.H * s.W * s.C);
          });
    };
    with_widest<scalar_t>(differentiate);
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
