// Convolution with 3 x 3 weights and stride 1 on the CPU, of channels-last maps in float32, by
// Winograd's algorithm: F(4x4, 3x3), which takes a quarter of the products, of maps with many
// tiles, else F(2x2, 3x3), which takes four ninths and transforms weights in less time.
//
// The tiles of all images are numbered through and taken in blocks: transform, one matrix product
// for each slot, transform back. In the gradients the same transforms are turned around.
//
// The letters are those of cpu_conv3x3.h.
#include <ATen/core/Tensor.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <vector>

#include "cpu_conv3x3.h"

namespace iou_d2::cpu {
namespace {

constexpr int64_t MULTIPLE = 16;  // of channels, which every vector divides

void require(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 4 && t.is_contiguous(LAST), "conv3x3: ", name,
                    " must have four dimensions, channels last, got shape ", t.sizes(),
                    " and strides ", t.strides(), ".");
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, "conv3x3: ", name, " must be float32, got ",
                   t.scalar_type(), ".");
  TORCH_CHECK_VALUE(t.size(1) % MULTIPLE == 0, "conv3x3: the channels of ", name,
                    " must be a multiple of ", MULTIPLE, ", got ", t.size(1), ".");
}

void require_weight(const at::Tensor& weight) {
  require(weight, "the weight");
  TORCH_CHECK_VALUE(weight.size(0) % MULTIPLE == 0 && weight.size(2) == 3 && weight.size(3) == 3,
                    "conv3x3: the weight must be (D, C, 3, 3) with a D that is a multiple of ",
                    MULTIPLE, ", got shape ", weight.sizes(), ".");
}

void require_shape(const at::Tensor& t, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, "conv3x3: ", name, " must have shape ", sizes, ", got ",
                    t.sizes(), ".");
}

// The output of `x` for weights in slots, (slots, C, D).
template <typename F>
at::Tensor convolved(const at::Tensor& x, const at::Tensor& weights, int64_t padding,
                     const Finish& finish) {
  const Tiles<F> tiles(x, padding);
  const int64_t C = weights.size(1), D = weights.size(2);
  at::Tensor y = at::empty({tiles.N, D, tiles.h, tiles.w}, x.options(), LAST);
  const Slots<F> inputs(block_of(tiles, C + D), C, x.options());
  const Slots<F> outputs(block_of(tiles, C + D), D, x.options());
  with_widest<float>([&](auto simd) {
    using V = decltype(simd);
    for_blocks(tiles, C + D, [&](int64_t first, int64_t count) {
      at::Tensor seen = inputs.of(count), made = outputs.of(count);
      fill_slots<V>(tiles, x.const_data_ptr<float>(), C, first, seen);
      at::bmm_out(made, seen, weights);
      empty_slots<V>(tiles, made, first, finish, y.mutable_data_ptr<float>());
    });
  });
  return y;
}

template <typename F>
at::Tensor weights_in_slots(const at::Tensor& weight, bool turned) {
  at::Tensor slots;
  with_widest<float>([&](auto simd) {
    slots = slots_of_weights<F, decltype(simd)>(weight, turned);
  });
  return slots;
}

// clamp(convolution of x + bias + addend, low, high)
at::Tensor conv3x3_cpu(const at::Tensor& x, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias,
                       const std::optional<at::Tensor>& addend, int64_t padding, double low,
                       double high) {
  require(x, "x");
  require_weight(weight);
  const int64_t D = weight.size(0);
  TORCH_CHECK_VALUE(x.size(1) == weight.size(1), "conv3x3: x has ", x.size(1),
                    " channels and the weight is for ", weight.size(1), ".");
  if (bias) {
    require_shape(*bias, {D}, "the bias");
    TORCH_CHECK_TYPE(bias->scalar_type() == at::kFloat && bias->is_contiguous(),
                     "conv3x3: the bias must be contiguous float32.");
  }
  const Finish finish{bias ? bias->const_data_ptr<float>() : nullptr,
                      addend ? addend->const_data_ptr<float>() : nullptr,
                      static_cast<float>(low), static_cast<float>(high)};
  return with_tiles(x, padding, [&](auto algorithm) {
    using F = decltype(algorithm);
    if (addend) {
      const Tiles<F> tiles(x, padding);
      require(*addend, "the addend");
      require_shape(*addend, {tiles.N, D, tiles.h, tiles.w}, "the addend");
    }
    return convolved<F>(x, weights_in_slots<F>(weight, false).transpose(1, 2), padding, finish);
  });
}

// The gradient of x: the convolution of that of y with weights that are turned by 180 degrees.
at::Tensor conv3x3_of_input(const at::Tensor& grad, const at::Tensor& weight, int64_t padding) {
  require(grad, "the gradient");
  require_weight(weight);
  TORCH_CHECK_VALUE(grad.size(1) == weight.size(0), "conv3x3: the gradient has ", grad.size(1),
                    " channels and the weight makes ", weight.size(0), ".");
  const float most = std::numeric_limits<float>::infinity();
  return with_tiles(grad, 2 - padding, [&](auto algorithm) {
    using F = decltype(algorithm);
    const Finish finish{nullptr, nullptr, -most, most};
    return convolved<F>(grad, weights_in_slots<F>(weight, true), 2 - padding, finish);
  });
}

// The gradient of the weight, (D, C, 3, 3).
template <typename F>
at::Tensor of_weight(const at::Tensor& grad, const at::Tensor& x, int64_t padding) {
  const Tiles<F> tiles(x, padding);
  const int64_t C = x.size(1), D = grad.size(1);
  require_shape(grad, {tiles.N, D, tiles.h, tiles.w}, "the gradient");
  const Slots<F> inputs(block_of(tiles, C + D), C, x.options());
  const Slots<F> outputs(block_of(tiles, C + D), D, x.options());
  at::Tensor sums = at::zeros({F::SLOTS, D, C}, x.options());
  at::Tensor weight = at::empty({D, C, 3, 3}, x.options(), LAST);
  with_widest<float>([&](auto simd) {
    using V = decltype(simd);
    for_blocks(tiles, C + D, [&](int64_t first, int64_t count) {
      at::Tensor seen = inputs.of(count), made = outputs.of(count);
      fill_slots<V>(tiles, x.const_data_ptr<float>(), C, first, seen);
      const std::vector<float> zeros(D);
      const float *from = grad.const_data_ptr<float>(), *none = zeros.data();
      float* to = made.mutable_data_ptr<float>();
      in_parallel<V>(count, 8, [=, &tiles](int64_t k) IOU_D2_INLINE_LAMBDA {
        const float* pixels[F::TILE * F::TILE];
        tiles.of_output(first + k, from, D, none, pixels);
        transform_gradient<F, V>(pixels, D, to + D * k, D * count);
      });
      at::baddbmm_out(sums, sums, made.transpose(1, 2), seen);
    });
    const float* from = sums.const_data_ptr<float>();
    float* to = weight.mutable_data_ptr<float>();
    in_parallel<V>(D, 4, [=](int64_t d) IOU_D2_INLINE_LAMBDA {
      transform_weight_gradient<F, V>(from + C * d, D * C, C, to + 9 * C * d);
    });
  });
  return weight;
}

at::Tensor conv3x3_of_weight(const at::Tensor& grad, const at::Tensor& x, int64_t padding) {
  require(grad, "the gradient");
  require(x, "x");
  return with_tiles(x, padding, [&](auto algorithm) {
    return of_weight<decltype(algorithm)>(grad, x, padding);
  });
}

}  // namespace
}  // namespace iou_d2::cpu

TORCH_LIBRARY_FRAGMENT(iou_d2, m) {
  m.def(
      "conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? addend, int padding, float low, "
      "float high) -> Tensor");
  m.def("conv3x3_of_input(Tensor grad, Tensor weight, int padding) -> Tensor");
  m.def("conv3x3_of_weight(Tensor grad, Tensor x, int padding) -> Tensor");
}

TORCH_LIBRARY_IMPL(iou_d2, CPU, m) {
  m.impl("conv3x3", iou_d2::cpu::conv3x3_cpu);
  m.impl("conv3x3_of_input", iou_d2::cpu::conv3x3_of_input);
  m.impl("conv3x3_of_weight", iou_d2::cpu::conv3x3_of_weight);
}
