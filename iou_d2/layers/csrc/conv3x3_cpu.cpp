// Convolution with 3 x 3 weights and stride 1 on the CPU, of channels-last maps in float32, by
// Winograd's algorithm: F(4x4, 3x3), which takes a quarter of the products, of maps with many
// tiles, else F(2x2, 3x3), which takes four ninths and transforms weights in less time.
//
// The tiles of all images, of one map or of several that share weights, are numbered through and
// taken in blocks: transform, one matrix product for each slot, transform back. In the gradients
// the same transforms are turned around.
//
// The letters are those of cpu_conv3x3.h.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <vector>

#include "cpu_conv3x3.h"

namespace iou_d2::cpu {
namespace {

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
  TORCH_CHECK_VALUE(weight.size(0) > 0 && weight.size(2) == 3 && weight.size(3) == 3,
                    "conv3x3: the weight must be (D, C, 3, 3), got shape ", weight.sizes(), ".");
}

void require_shape(const at::Tensor& t, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, "conv3x3: ", name, " must have shape ", sizes, ", got ",
                    t.sizes(), ".");
}

// Maps that share weights.
void require_all(at::TensorList ts, const char* name) {
  TORCH_CHECK_VALUE(!ts.empty(), "conv3x3: there is no map of ", name, ".");
  for (const at::Tensor& t : ts) {
    require(t, name);
    TORCH_CHECK_VALUE(t.size(1) == ts[0].size(1), "conv3x3: all of ", name, " must have the ",
                      ts[0].size(1), " channels of the first, got ", t.size(1), ".");
  }
}

// That `ts` have `channels` channels and the shapes of the outputs for `xs` else.
template <typename F>
void require_outputs(at::TensorList ts, at::TensorList xs, const Tiles<F>& tiles,
                     int64_t channels, const char* name) {
  TORCH_CHECK_VALUE(ts.size() == xs.size(), "conv3x3: there are ", ts.size(), " maps of ", name,
                    " for ", xs.size(), " of x.");
  for (size_t k = 0; k < xs.size(); ++k) {
    require(ts[k], name);
    require_shape(ts[k], {xs[k].size(0), channels, tiles[k].h, tiles[k].w}, name);
  }
}

// Weights in slots, (slots, C, widened D), or (slots, widened D, C) if they are `turned`.
template <typename F, typename V>
at::Tensor weights_for(const Tiles<F>& tiles, const at::Tensor& weight, bool turned) {
  if (turned) return slots_of_weights<F, V>(weight, true);
  if (tiles.count() >= WORTH_TRANSPOSING) return transposed_slots_of_weights<F, V>(weight);
  return slots_of_weights<F, V>(weight, false).transpose(1, 2);
}

// The outputs of `xs`, of widened channels, or of gradients for weights that are `turned`.
template <typename F>
std::vector<at::Tensor> convolved(at::TensorList xs, const at::Tensor& weight, bool turned,
                                  int64_t padding, const Finish& finish) {
  const Tiles<F> tiles(xs, padding);
  const int64_t C = xs[0].size(1), D = turned ? weight.size(1) : widened(weight.size(0));
  std::vector<at::Tensor> ys;
  for (size_t k = 0; k < xs.size(); ++k) {
    ys.push_back(at::empty({xs[k].size(0), D, tiles[k].h, tiles[k].w}, xs[k].options(), LAST));
  }
  const auto from = starts_of<const float>(xs);
  const auto to = starts_of<float>(ys);
  const Slots<F> inputs(block_of(tiles, C + D), C, xs[0].options());
  const Slots<F> outputs(block_of(tiles, C + D), D, xs[0].options());
  with_widest<float>([&](auto simd) {
    using V = decltype(simd);
    const at::Tensor weights = weights_for<F, V>(tiles, weight, turned);
    for_blocks(tiles, C + D, [&](int64_t first, int64_t count) {
      at::Tensor seen = inputs.of(count), made = outputs.of(count);
      fill_slots<V>(tiles, from, C, first, seen);
      at::bmm_out(made, seen, weights);
      empty_slots<V>(tiles, made, first, finish, to);
    });
  });
  return ys;
}

// clamp(convolution of x + bias + addend, low, high) of each x, which may have an addend or not, if
// the channels of the output are a multiple.
std::vector<at::Tensor> conv3x3_cpu(at::TensorList xs, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias, at::TensorList addends,
                                    int64_t padding, double low, double high) {
  require_all(xs, "x");
  require_weight(weight);
  const int64_t D = weight.size(0);
  TORCH_CHECK_VALUE(xs[0].size(1) == weight.size(1), "conv3x3: x has ", xs[0].size(1),
                    " channels and the weight is for ", weight.size(1), ".");
  if (bias) {
    require_shape(*bias, {D}, "the bias");
    TORCH_CHECK_TYPE(bias->scalar_type() == at::kFloat && bias->is_contiguous(),
                     "conv3x3: the bias must be contiguous float32.");
  }
  const int64_t missing = widened(D) - D;
  const std::optional<at::Tensor> wide_bias =
      bias && missing ? at::constant_pad_nd(*bias, {0, missing}) : bias;
  std::vector<at::Tensor> ys = with_tiles(xs, padding, [&](auto algorithm) {
    using F = decltype(algorithm);
    if (!addends.empty()) {
      require_outputs(addends, xs, Tiles<F>(xs, padding), D, "the addend");
    }
    const Finish finish{wide_bias ? wide_bias->const_data_ptr<float>() : nullptr,
                        starts_of<const float>(addends), static_cast<float>(low),
                        static_cast<float>(high)};
    return convolved<F>(xs, weight, false, padding, finish);
  });
  if (missing) {
    // No views for autograd, which would forbid to change them in place.
    const at::AutoDispatchBelowADInplaceOrView unseen;
    for (at::Tensor& y : ys) y = y.narrow(1, 0, D);
  }
  return ys;
}

// The gradient of each x: the convolution of that of y, of widened channels, with weights turned by
// 180 degrees.
std::vector<at::Tensor> conv3x3_of_input(at::TensorList grads, const at::Tensor& weight,
                                         int64_t padding) {
  require_all(grads, "the gradient");
  require_weight(weight);
  TORCH_CHECK_VALUE(grads[0].size(1) == widened(weight.size(0)), "conv3x3: the gradient has ",
                    grads[0].size(1), " channels and the weight makes ", weight.size(0), ".");
  const float most = std::numeric_limits<float>::infinity();
  return with_tiles(grads, 2 - padding, [&](auto algorithm) {
    using F = decltype(algorithm);
    const Finish finish{nullptr, {}, -most, most};
    return convolved<F>(grads, weight, true, 2 - padding, finish);
  });
}

// Tiles [first, first + count) of the gradients of the outputs, transformed.
template <typename V, typename F>
void fill_slots_of_gradients(const Tiles<F>& tiles, const std::vector<const float*>& grads,
                             int64_t D, int64_t first, const at::Tensor& slots) {
  const std::vector<float> zeros(D);
  const float* none = zeros.data();
  float* to = slots.mutable_data_ptr<float>();
  const int64_t count = slots.size(1);
  in_parallel<V>(count, 8, [=, &tiles, &grads](int64_t k) IOU_D2_INLINE_LAMBDA {
    const float* pixels[F::TILE * F::TILE];
    const int64_t map = tiles.map_of(first + k);
    tiles.of_output(first + k, tiles[map], grads[map], D, none, pixels);
    transform_gradient<F, V>(pixels, D, to + D * k, D * count);
  });
}

// The gradient of the weight, (D, C, 3, 3), which all maps share.
template <typename F>
at::Tensor of_weight(at::TensorList grads, at::TensorList xs, int64_t padding) {
  const Tiles<F> tiles(xs, padding);
  const int64_t C = xs[0].size(1), D = grads[0].size(1);
  require_outputs(grads, xs, tiles, D, "the gradient");
  const auto from = starts_of<const float>(xs), from_grads = starts_of<const float>(grads);
  const Slots<F> inputs(block_of(tiles, C + D), C, xs[0].options());
  const Slots<F> outputs(block_of(tiles, C + D), D, xs[0].options());
  at::Tensor sums = at::empty({F::SLOTS, D, C}, xs[0].options());
  if (tiles.count() == 0) sums.zero_();
  at::Tensor weight = at::empty({D, C, 3, 3}, xs[0].options(), LAST);
  with_widest<float>([&](auto simd) {
    using V = decltype(simd);
    for_blocks(tiles, C + D, [&](int64_t first, int64_t count) {
      at::Tensor seen = inputs.of(count), made = outputs.of(count);
      fill_slots<V>(tiles, from, C, first, seen);
      fill_slots_of_gradients<V>(tiles, from_grads, D, first, made);
      if (first == 0) {
        at::bmm_out(sums, made.transpose(1, 2), seen);
      } else {
        at::baddbmm_out(sums, sums, made.transpose(1, 2), seen);
      }
    });
    const float* from = sums.const_data_ptr<float>();
    float* to = weight.mutable_data_ptr<float>();
    in_parallel<V>(D, 4, [=](int64_t d) IOU_D2_INLINE_LAMBDA {
      transform_weight_gradient<F, V>(from + C * d, D * C, C, to + 9 * C * d);
    });
  });
  return weight;
}

at::Tensor conv3x3_of_weight(at::TensorList grads, at::TensorList xs, int64_t padding) {
  require_all(grads, "the gradient");
  require_all(xs, "x");
  return with_tiles(xs, padding, [&](auto algorithm) {
    return of_weight<decltype(algorithm)>(grads, xs, padding);
  });
}

}  // namespace
}  // namespace iou_d2::cpu

TORCH_LIBRARY_FRAGMENT(iou_d2, m) {
  m.def(
      "conv3x3(Tensor[] xs, Tensor weight, Tensor? bias, Tensor[] addends, int padding, float low, "
      "float high) -> Tensor[]");
  m.def("conv3x3_of_input(Tensor[] grads, Tensor weight, int padding) -> Tensor[]");
  m.def("conv3x3_of_weight(Tensor[] grads, Tensor[] xs, int padding) -> Tensor");
}

TORCH_LIBRARY_IMPL(iou_d2, CPU, m) {
  m.impl("conv3x3", iou_d2::cpu::conv3x3_cpu);
  m.impl("conv3x3_of_input", iou_d2::cpu::conv3x3_of_input);
  m.impl("conv3x3_of_weight", iou_d2::cpu::conv3x3_of_weight);
}
