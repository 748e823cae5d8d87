// RoIAlign (arXiv 1703.06870) on the CPU, number for number as torchvision defines it: a bin is the
// mean of samples of the bilinear surface. The samples of a bin are a grid, so that its value is
// sum_i wy[i] sum_j wx[j] pixel(i, j), where few rows i and columns j have a weight.
//
// The map is read, and its gradient written, channels-last; bins are channels-first, as Detectron2
// gathers them from the levels of a pyramid.
//
// N images, R RoIs, C channels; (H, W) map, (P, Q) bins.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu_direct.h"

namespace iou_d2::cpu {
namespace {

constexpr int64_t BAND = 8;  // rows of the gradient that one thread writes
constexpr double MOST = 1e9;  // samples along a side of a bin; a RoI that asks for more has none

template <typename T>
struct Tap {
  int64_t pixel;
  T weight;
};

// The pixels that each bin of one axis sees, in order.
template <typename T>
struct Taps {
  std::vector<int64_t> first;  // bin k has taps [first[k], first[k + 1])
  std::vector<Tap<T>> taps;

  // All in T and in the order of torchvision's operations, since where a sample falls beside the
  // map, and how many there are, changes at once.
  Taps(T start, T length, int64_t bins, int64_t ratio, int64_t size) : first(bins + 1) {
    const T bin = length / static_cast<T>(bins);
    const T count = ratio > 0 ? static_cast<T>(ratio) : std::ceil(bin);
    for (int64_t k = 0; k < bins; ++k) {
      if (std::isfinite(start) && std::isfinite(bin) && count > 0 && count < MOST)
        add_samples(start + static_cast<T>(k) * bin, bin, count, size, first[k]);
      first[k + 1] = static_cast<int64_t>(taps.size());
    }
  }

 private:
  // Those samples that may fall on the map, of `count`.
  void add_samples(T start, T bin, T count, int64_t size, int64_t since) {
    const double step = std::abs(static_cast<double>(bin)) / static_cast<double>(count);
    const double most = static_cast<double>(count), far = static_cast<double>(size) + 1;
    const double from = bin > 0 ? (-1 - static_cast<double>(start)) / step - 2 : 0;
    const double to = bin > 0 ? (far - static_cast<double>(start)) / step + 2 : most;
    const auto last = static_cast<int64_t>(std::clamp(to, 0., most));
    for (auto i = static_cast<int64_t>(std::clamp(from, 0., most)); i < last; ++i) {
      const T at = start + (static_cast<T>(i) + static_cast<T>(.5f)) * bin / count;
      if (at < -1 || at > static_cast<T>(size)) continue;
      const T inside = std::max(at, T(0));
      const auto low = std::min(static_cast<int64_t>(inside), size - 1);
      const T above = low == size - 1 ? T(0) : inside - static_cast<T>(low);
      add(low, (1 - above) / count, since);
      if (low < size - 1) add(low + 1, above / count, since);
    }
  }
  void add(int64_t pixel, T weight, int64_t since) {
    const auto count = static_cast<int64_t>(taps.size());
    for (int64_t k = count; k > std::max(since, count - 2); --k) {
      if (taps[k - 1].pixel != pixel) continue;
      taps[k - 1].weight += weight;
      return;
    }
    taps.push_back({pixel, weight});
  }
};

struct Pooling {
  double scale;
  int64_t P, Q, ratio;
  bool aligned;
};

template <typename T>
struct Samples {
  int64_t image;
  Taps<T> y, x;

  // `roi` is (batch index, x1, y1, x2, y2) in input pixels.
  static Samples of(const T* roi, const Pooling& pooling, int64_t H, int64_t W) {
    const T scale = static_cast<T>(pooling.scale), shift = pooling.aligned ? T(0.5) : T(0);
    const T x = roi[1] * scale - shift, y = roi[2] * scale - shift;
    T width = roi[3] * scale - shift - x, height = roi[4] * scale - shift - y;
    if (!pooling.aligned) width = std::max(width, T(1)), height = std::max(height, T(1));
    return {static_cast<int64_t>(roi[0]), Taps<T>(y, height, pooling.P, pooling.ratio, H),
            Taps<T>(x, width, pooling.Q, pooling.ratio, W)};
  }
  bool touches(int64_t image_, Span rows) const {
    if (image != image_) return false;
    return std::any_of(y.taps.begin(), y.taps.end(), [&](const Tap<T>& tap) {
      return rows.begin <= tap.pixel && tap.pixel < rows.end;
    });
  }
};

template <typename T>
std::vector<Samples<T>> samples_of(const at::Tensor& rois, const Pooling& pooling, int64_t N,
                                   int64_t H, int64_t W) {
  const int64_t R = rois.size(0);
  const T* roi = rois.const_data_ptr<T>();
  for (int64_t r = 0; r < R; ++r)
    TORCH_CHECK_INDEX(roi[5 * r] >= 0 && roi[5 * r] < static_cast<T>(N), "roi_align: rois[", r,
                      ", 0] = ", roi[5 * r], " is no index into a batch of ", N, " images.");
  std::vector<Samples<T>> samples;
  samples.reserve(R);
  for (int64_t r = 0; r < R; ++r)
    samples.push_back(Samples<T>::of(roi + 5 * r, pooling, H, W));
  return samples;
}

// One image, or what is added to it: pixel (i, j) has C channels from data + (i * W + j) * C on.
template <typename T>
struct Pixels {
  T* data;
  int64_t W, C;

  IOU_D2_INLINE T* at(int64_t i, int64_t j) const {
    return data + (i * W + j) * C;
  }
};

// The K vectors of channels from c on of the bin (p, q).
template <typename V, int K, typename T = typename V::Number>
IOU_D2_INLINE void align(const Samples<T>& s, const Pixels<const T>& map, int64_t p, int64_t q,
                         int64_t c, T* bin) {
  typename V::Pack sum[K] = {};
  for (int64_t a = s.y.first[p]; a < s.y.first[p + 1]; ++a) {
    typename V::Pack line[K] = {};
    for (int64_t b = s.x.first[q]; b < s.x.first[q + 1]; ++b) {
      const T* pixel = map.at(s.y.taps[a].pixel, s.x.taps[b].pixel) + c;
      for (int k = 0; k < K; ++k) line[k] += s.x.taps[b].weight * pack<V>(pixel + k * V::LANES);
    }
    for (int k = 0; k < K; ++k) sum[k] += s.y.taps[a].weight * line[k];
  }
  for (int k = 0; k < K; ++k) pack<V>(bin + c + k * V::LANES) = sum[k];
}

// Its gradient, for rows of the map alone.
template <typename V, int K, typename T = typename V::Number>
IOU_D2_INLINE void spread_bin(const Samples<T>& s, const Pixels<T>& map, Span rows, int64_t p,
                              int64_t q, int64_t c, const T* bin) {
  for (int64_t a = s.y.first[p]; a < s.y.first[p + 1]; ++a) {
    const Tap<T>& y = s.y.taps[a];
    if (y.pixel < rows.begin || y.pixel >= rows.end) continue;
    typename V::Pack line[K];
    for (int k = 0; k < K; ++k) line[k] = y.weight * pack<V>(bin + c + k * V::LANES);
    for (int64_t b = s.x.first[q]; b < s.x.first[q + 1]; ++b) {
      T* pixel = map.at(y.pixel, s.x.taps[b].pixel) + c;
      for (int k = 0; k < K; ++k) pack<V>(pixel + k * V::LANES) += s.x.taps[b].weight * line[k];
    }
  }
}

void check(const at::Tensor& map, const at::Tensor& rois) {
  TORCH_CHECK_VALUE(map.dim() == 4 && map.is_contiguous(at::MemoryFormat::ChannelsLast),
                    "roi_align: features must be (N, C, H, W) in channels-last, got shape ",
                    map.sizes(), " and strides ", map.strides(), ".");
  TORCH_CHECK_VALUE(map.size(2) > 0 && map.size(3) > 0, "roi_align: the feature map is empty: ",
                    map.sizes(), ".");
  TORCH_CHECK_VALUE(map.size(1) % 16 == 0, "roi_align: channels must be a multiple of 16, got ",
                    map.size(1), ".");
  TORCH_CHECK_VALUE(rois.dim() == 2 && rois.size(1) == 5 && rois.is_contiguous(),
                    "roi_align: rois must be contiguous, of shape (R, 5), got ", rois.sizes(), ".");
  TORCH_CHECK_TYPE(rois.scalar_type() == map.scalar_type(), "roi_align: rois are ",
                   rois.scalar_type(), " and features ", map.scalar_type(), ".");
}

at::Tensor roi_align_cpu(const at::Tensor& features, const at::Tensor& rois, double scale,
                         int64_t P, int64_t Q, int64_t ratio, bool aligned) {
  check(features, rois);
  TORCH_CHECK_VALUE(P > 0 && Q > 0, "roi_align: the output size must be positive, got ", P, " x ",
                    Q, ".");
  const int64_t N = features.size(0), C = features.size(1), H = features.size(2),
                W = features.size(3), R = rois.size(0);
  at::Tensor output = at::empty({R, C, P, Q}, features.options(), at::MemoryFormat::Contiguous);
  AT_DISPATCH_FLOATING_TYPES(features.scalar_type(), "roi_align", [&] {
    using T = scalar_t;
    const auto samples = samples_of<T>(rois, {scale, P, Q, ratio, aligned}, N, H, W);
    const T* map = features.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    with_widest<T>([&](auto simd) {
      using V = decltype(simd);
      at::parallel_for(0, R, 4, [&](int64_t begin, int64_t end) {
        std::vector<T> bins(P * Q * C);
        for (int64_t r = begin; r < end; ++r) {
          const Samples<T>& s = samples[r];
          const Pixels<const T> image{map + s.image * H * W * C, W, C};
          V::run([&]() IOU_D2_INLINE_LAMBDA {
            for (int64_t k = 0; k < P * Q; ++k) {
              for_packs<V>(C, [&](int64_t c, auto K) IOU_D2_INLINE_LAMBDA {
                align<V, K>(s, image, k / Q, k % Q, c, bins.data() + k * C);
              });
            }
            transpose<false>(bins.data(), C, P * Q, C, out + r * C * P * Q, P * Q);
          });
        }
      });
    });
  });
  return output;
}

// The gradient of features of `size`, in channels-last. Threads own rows of it, so that sums have
// one order.
at::Tensor roi_align_backward_cpu(const at::Tensor& grad, const at::Tensor& rois,
                                  at::IntArrayRef size, double scale, int64_t ratio,
                                  bool aligned) {
  TORCH_CHECK_VALUE(size.size() == 4 && rois.dim() == 2 && grad.dim() == 4 &&
                        grad.size(0) == rois.size(0) && grad.size(1) == size[1] &&
                        grad.is_contiguous() && grad.scalar_type() == rois.scalar_type(),
                    "roi_align: a gradient of shape ", grad.sizes(), " does not fit features of ",
                    size, " and rois of ", rois.sizes(), ".");
  const int64_t N = size[0], C = size[1], H = size[2], W = size[3], R = rois.size(0),
                P = grad.size(2), Q = grad.size(3);
  at::Tensor output = at::empty(size, grad.options(), at::MemoryFormat::ChannelsLast);
  check(output, rois);
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "roi_align_backward", [&] {
    using T = scalar_t;
    const auto samples = samples_of<T>(rois, {scale, P, Q, ratio, aligned}, N, H, W);
    const at::Tensor turned = at::empty({R, P * Q, C}, grad.options());
    const T* of_bins = grad.const_data_ptr<T>();
    T *bins = turned.mutable_data_ptr<T>(), *map = output.mutable_data_ptr<T>();
    with_widest<T>([&](auto simd) {
      using V = decltype(simd);
      at::parallel_for(0, R, 4, [&](int64_t begin, int64_t end) {
        V::run([&]() IOU_D2_INLINE_LAMBDA {
          for (int64_t r = begin; r < end; ++r)
            transpose<false>(of_bins + r * C * P * Q, P * Q, C, P * Q, bins + r * C * P * Q, C);
        });
      });
      const int64_t bands = (H + BAND - 1) / BAND;
      at::parallel_for(0, N * bands, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t n = task / bands, row = task % bands * BAND;
          const Span rows{row, std::min(row + BAND, H)};
          const Pixels<T> image{map + n * H * W * C, W, C};
          std::fill(image.at(rows.begin, 0), image.at(rows.end, 0), T(0));
          for (int64_t r = 0; r < R; ++r) {
            const Samples<T>& s = samples[r];
            if (!s.touches(n, rows)) continue;
            V::run([&]() IOU_D2_INLINE_LAMBDA {
              for (int64_t k = 0; k < P * Q; ++k) {
                for_packs<V>(C, [&](int64_t c, auto K) IOU_D2_INLINE_LAMBDA {
                  spread_bin<V, K>(s, image, rows, k / Q, k % Q, c, bins + (r * P * Q + k) * C);
                });
              }
            });
          }
        }
      });
    });
  });
  return output;
}

}  // namespace
}  // namespace iou_d2::cpu

TORCH_LIBRARY_FRAGMENT(iou_d2, m) {
  m.def(
      "roi_align(Tensor features, Tensor rois, float scale, int pooled_height, int pooled_width, "
      "int ratio, bool aligned) -> Tensor");
  m.def(
      "roi_align_backward(Tensor grad, Tensor rois, int[] size, float scale, int ratio, bool "
      "aligned) -> Tensor");
}

TORCH_LIBRARY_IMPL(iou_d2, CPU, m) {
  m.impl("roi_align", iou_d2::cpu::roi_align_cpu);
  m.impl("roi_align_backward", iou_d2::cpu::roi_align_backward_cpu);
}
