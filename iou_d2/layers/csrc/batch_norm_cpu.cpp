// Batch norm in training and a clamp behind it (ReLU, ReLU6) on the CPU, of channels-last maps.
//
// y = clamp(z, low, high) of z = s (x - mean) + bias, where s = weight / sqrt(variance + eps).
// What y and its gradient need of z is computed from x again, so that z is not kept.
//
// Letters: P pixels of all images, C channels. Pixels are cut into parts of one size, whose sums
// are added in order: the number of threads changes no bit.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "cpu_simd.h"

#if defined(__GNUC__)
#define IOU_D2_ALONE __restrict__
#else
#define IOU_D2_ALONE
#endif

namespace iou_d2::cpu {
namespace {

constexpr int64_t PART = 256;  // pixels whose sums are in float64
constexpr int64_t RUN = 32;    // pixels whose sums are in float32

struct Map {
  int64_t P, C;

  explicit Map(const at::Tensor& x) : P(x.size(0) * x.size(2) * x.size(3)), C(x.size(1)) {}

  int64_t parts() const {
    return (P + PART - 1) / PART;
  }
};

void require(const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast),
                    "batch_norm: ", name, " must be (N, C, H, W) in channels-last, got shape ",
                    x.sizes(), " and strides ", x.strides(), ".");
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "batch_norm: ", name,
                   " must be float32, got ", x.scalar_type(), ".");
}

void require_numbers(const at::Tensor& numbers, const Map& map, const char* name) {
  TORCH_CHECK_VALUE(numbers.dim() == 1 && numbers.size(0) == map.C && numbers.is_contiguous() &&
                        numbers.scalar_type() == at::kFloat,
                    "batch_norm: ", name, " must be ", map.C, " float32 numbers, got ",
                    numbers.sizes(), " of ", numbers.scalar_type(), ".");
}

// What is done with one pixel, in loops that compilers turn into vectors: no branch, no alias.
struct Clamp {
  float low, high;
};

// z = s (x - mean) + bias, of each channel.
struct Scale {
  const float *mean, *s, *bias;
};

IOU_D2_INLINE void add_moments(int64_t C, const float* IOU_D2_ALONE x,
                               const float* IOU_D2_ALONE origin, float* IOU_D2_ALONE sum,
                               float* IOU_D2_ALONE squares) {
  for (int64_t c = 0; c < C; ++c) {
    const float v = x[c] - origin[c];
    sum[c] += v;
    squares[c] += v * v;
  }
}

IOU_D2_INLINE void normalize(int64_t C, const float* IOU_D2_ALONE x, const Scale& f, Clamp ends,
                             float* IOU_D2_ALONE y) {
  const float *IOU_D2_ALONE mean = f.mean, *IOU_D2_ALONE s = f.s, *IOU_D2_ALONE bias = f.bias;
  for (int64_t c = 0; c < C; ++c) {
    float z = s[c] * (x[c] - mean[c]) + bias[c];
    z = z < ends.low ? ends.low : z;
    y[c] = z > ends.high ? ends.high : z;
  }
}

// The gradient of y where it passes the clamp; none passes at its ends, as in PyTorch's hardtanh.
IOU_D2_INLINE float passed(float z, Clamp ends, float grad) {
  return (z <= ends.low) | (z >= ends.high) ? 0.f : grad;
}

IOU_D2_INLINE void add_gradients(int64_t C, const float* IOU_D2_ALONE x,
                                 const float* IOU_D2_ALONE grad, const Scale& f, Clamp ends,
                                 float* IOU_D2_ALONE sum, float* IOU_D2_ALONE along_x) {
  const float *IOU_D2_ALONE mean = f.mean, *IOU_D2_ALONE s = f.s, *IOU_D2_ALONE bias = f.bias;
  for (int64_t c = 0; c < C; ++c) {
    const float v = x[c] - mean[c], g = passed(s[c] * v + bias[c], ends, grad[c]);
    sum[c] += g;
    along_x[c] += g * v;
  }
}

// of_x = s g + slope (x - mean) + constant
IOU_D2_INLINE void differentiate(int64_t C, const float* IOU_D2_ALONE x,
                                 const float* IOU_D2_ALONE grad, const Scale& f, Clamp ends,
                                 const float* IOU_D2_ALONE slope,
                                 const float* IOU_D2_ALONE constant, float* IOU_D2_ALONE of_x) {
  const float *IOU_D2_ALONE mean = f.mean, *IOU_D2_ALONE s = f.s, *IOU_D2_ALONE bias = f.bias;
  for (int64_t c = 0; c < C; ++c) {
    const float v = x[c] - mean[c], g = passed(s[c] * v + bias[c], ends, grad[c]);
    of_x[c] = s[c] * g + (slope[c] * v + constant[c]);
  }
}

// Sums of a(pixel, channel) and b(pixel, channel), for each channel, which add(first pixel, pixels,
// a, b) adds in float32 for a few pixels.
template <typename V, typename F>
std::vector<double> sums_of(const Map& map, const F& add) {
  const int64_t C = map.C;
  std::vector<double> sums(2 * C * map.parts());
  at::parallel_for(0, map.parts(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> a(C), b(C);
    for (int64_t part = begin; part < end; ++part) {
      double* total = sums.data() + 2 * C * part;
      const int64_t last = std::min((part + 1) * PART, map.P);
      for (int64_t p = part * PART; p < last; p += RUN) {
        std::fill(a.begin(), a.end(), 0.f);
        std::fill(b.begin(), b.end(), 0.f);
        V::run([&]() IOU_D2_INLINE_LAMBDA { add(p, std::min(RUN, last - p), a.data(), b.data()); });
        for (int64_t c = 0; c < C; ++c) {
          total[c] += a[c];
          total[C + c] += b[c];
        }
      }
    }
  });
  for (int64_t part = 1; part < map.parts(); ++part)
    for (int64_t c = 0; c < 2 * C; ++c) sums[c] += sums[2 * C * part + c];
  sums.resize(2 * C);
  return sums;
}

template <typename V, typename F>
void for_pixels(const Map& map, const F& body) {
  at::parallel_for(0, map.parts(), 1, [&](int64_t begin, int64_t end) {
    V::run([&]() IOU_D2_INLINE_LAMBDA {
      for (int64_t p = begin * PART; p < std::min(end * PART, map.P); ++p) body(p * map.C);
    });
  });
}

// Numbers near those of each channel, about which sums lose few digits.
std::vector<float> rough_mean(const float* x, const Map& map) {
  const int64_t count = std::min(map.P, RUN);
  std::vector<float> mean(map.C);
  for (int64_t p = 0; p < count; ++p)
    for (int64_t c = 0; c < map.C; ++c) mean[c] += x[p * map.C + c] / count;
  return mean;
}

// y, and the mean and the variance of each channel, of at least one pixel.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_cpu(const at::Tensor& x,
                                                              const at::Tensor& weight,
                                                              const at::Tensor& bias, double eps,
                                                              double low, double high) {
  require(x, "x");
  const Map map(x);
  require_numbers(weight, map, "weight");
  require_numbers(bias, map, "bias");
  TORCH_CHECK_VALUE(map.P > 0, "batch_norm: x has no pixels, its shape is ", x.sizes(), ".");
  const int64_t C = map.C;
  const float* in = x.const_data_ptr<float>();
  at::Tensor y = at::empty_like(x), mean = at::empty({C}, weight.options()),
             variance = at::empty({C}, weight.options());
  float* out = y.mutable_data_ptr<float>();
  const Clamp ends{static_cast<float>(low), static_cast<float>(high)};
  const std::vector<float> origin = rough_mean(in, map);
  std::vector<float> s(C);
  const Scale scale{mean.const_data_ptr<float>(), s.data(), bias.const_data_ptr<float>()};
  with_widest<float>([&](auto simd) {
    using V = decltype(simd);
    const auto sums = sums_of<V>(map, [&](int64_t p, int64_t count, float* a, float* b)
                                          IOU_D2_INLINE_LAMBDA {
      for (int64_t k = p; k < p + count; ++k) add_moments(C, in + k * C, origin.data(), a, b);
    });
    for (int64_t c = 0; c < C; ++c) {
      const double shift = sums[c] / map.P;
      const double spread = std::max(sums[C + c] / map.P - shift * shift, 0.);
      mean.mutable_data_ptr<float>()[c] = origin[c] + shift;
      variance.mutable_data_ptr<float>()[c] = spread;
      s[c] = weight.const_data_ptr<float>()[c] / std::sqrt(spread + eps);
    }
    for_pixels<V>(map, [&](int64_t at) IOU_D2_INLINE_LAMBDA {
      normalize(C, in + at, scale, ends, out + at);
    });
  });
  return {y, mean, variance};
}

// Gradients of x, weight and bias.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_backward_cpu(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
    const at::Tensor& mean, const at::Tensor& variance, double eps, double low, double high) {
  require(x, "x");
  const Map map(x);
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), "batch_norm: a gradient of shape ", grad.sizes(),
                    " does not fit an output of ", x.sizes(), ".");
  const at::Tensor grads = grad.contiguous(at::MemoryFormat::ChannelsLast);
  require(grads, "the gradient");
  for (const at::Tensor& numbers : {weight, bias, mean, variance})
    require_numbers(numbers, map, "each of weight, bias, mean and variance");
  const int64_t C = map.C;
  const float *in = x.const_data_ptr<float>(), *of_y = grads.const_data_ptr<float>();
  at::Tensor of_x = at::empty_like(x), of_weight = at::empty_like(weight),
             of_bias = at::empty_like(bias);
  float* out = of_x.mutable_data_ptr<float>();
  const Clamp ends{static_cast<float>(low), static_cast<float>(high)};
  std::vector<float> s(C), slope(C), constant(C);
  std::vector<double> deviation(C);
  for (int64_t c = 0; c < C; ++c) {
    deviation[c] = std::sqrt(variance.const_data_ptr<float>()[c] + eps);
    s[c] = weight.const_data_ptr<float>()[c] / deviation[c];
  }
  const Scale scale{mean.const_data_ptr<float>(), s.data(), bias.const_data_ptr<float>()};
  with_widest<float>([&](auto simd) {
    using V = decltype(simd);
    const auto sums = sums_of<V>(map, [&](int64_t p, int64_t count, float* a, float* b)
                                          IOU_D2_INLINE_LAMBDA {
      for (int64_t k = p; k < p + count; ++k)
        add_gradients(C, in + k * C, of_y + k * C, scale, ends, a, b);
    });
    for (int64_t c = 0; c < C; ++c) {
      of_bias.mutable_data_ptr<float>()[c] = sums[c];
      of_weight.mutable_data_ptr<float>()[c] = sums[C + c] / deviation[c];
      slope[c] = -s[c] * sums[C + c] / (deviation[c] * deviation[c] * map.P);
      constant[c] = -s[c] * sums[c] / map.P;
    }
    for_pixels<V>(map, [&](int64_t at) IOU_D2_INLINE_LAMBDA {
      differentiate(C, in + at, of_y + at, scale, ends, slope.data(), constant.data(), out + at);
    });
  });
  return {of_x, of_weight, of_bias};
}

}  // namespace
}  // namespace iou_d2::cpu

TORCH_LIBRARY_FRAGMENT(iou_d2, m) {
  m.def(
      "batch_norm(Tensor x, Tensor weight, Tensor bias, float eps, float low, float high) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor "
      "variance, float eps, float low, float high) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(iou_d2, CPU, m) {
  m.impl("batch_norm", iou_d2::cpu::batch_norm_cpu);
  m.impl("batch_norm_backward", iou_d2::cpu::batch_norm_backward_cpu);
}
