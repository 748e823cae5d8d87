// The arithmetic of precise RoI pooling that the CPU and CUDA kernels share, and the checks of the
// op's arguments.
//
// A feature map is continued to the plane by a hat a pixel, hat(t) = max(0, 1 - |t|), centred at
// integers, and is 0 outside. A bin's value is the integral of that surface over the bin, divided
// by the bin's area. Both are products of one dimension at a time: out = Wy F Wx^T with W[k, i] =
// (integral of hat(t - i) over bin k) / (bin length).
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define IOU_D2_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define IOU_D2_HOST_DEVICE inline
#endif

namespace iou_d2 {

// Raises ValueError or TypeError.
void check_arguments(const at::Tensor& features, const at::Tensor& rois, double spatial_scale,
                     int64_t bins_y, int64_t bins_x);

// The same for a backward op on features of `size` (N, C, H, W).
void check_backward(const at::Tensor& grad, at::IntArrayRef size, const at::Tensor& rois);

// The memory format of features, outputs and gradients alike.
inline at::MemoryFormat format_of(const at::Tensor& t) {
  const auto last = at::MemoryFormat::ChannelsLast;
  return t.is_contiguous(last) && !t.is_contiguous() ? last : at::MemoryFormat::Contiguous;
}

// Of the features, the RoIs and the output.
struct Shape {
  int64_t N, C, H, W, R, P, Q;
};

IOU_D2_HOST_DEVICE double clamp(double x, double low, double high) {
  return x < low ? low : x > high ? high : x;
}

IOU_D2_HOST_DEVICE double hat(double t) {
  const double distance = t < 0 ? -t : t;
  return distance < 1 ? 1 - distance : 0;
}

// Integral of the hat over [a, b]: on each side of its top the length times the height in the
// middle, so that nothing cancels however short the interval is.
IOU_D2_HOST_DEVICE double hat_integral(double a, double b) {
  const double a0 = clamp(a, -1, 0), b0 = clamp(b, -1, 0);
  const double a1 = clamp(a, 0, 1), b1 = clamp(b, 0, 1);
  return (b0 - a0) * (1 + (a0 + b0) / 2) + (b1 - a1) * (1 - (a1 + b1) / 2);
}

// One axis of a RoI in feature pixels, cut into bins.
struct Axis {
  double start;
  double length;  // of the whole RoI; 0 marks a RoI whose output and gradients are 0
  int64_t bins;
  int64_t size;  // of the map

  IOU_D2_HOST_DEVICE double edge(int64_t k) const {
    return start + length * (static_cast<double>(k) / static_cast<double>(bins));
  }
  // Pixels [first, last) whose hat reaches into [a, b].
  IOU_D2_HOST_DEVICE int64_t first(double a) const {
    return static_cast<int64_t>(floor(clamp(a, 0, static_cast<double>(size))));
  }
  IOU_D2_HOST_DEVICE int64_t last(double b) const {
    return static_cast<int64_t>(ceil(clamp(b, -1, static_cast<double>(size - 1)))) + 1;
  }
  IOU_D2_HOST_DEVICE int64_t bin_first(int64_t k) const {
    return first(edge(k));
  }
  IOU_D2_HOST_DEVICE int64_t bin_last(int64_t k) const {
    return length > 0 ? last(edge(k + 1)) : bin_first(k);
  }
  // W[k, i]: the share of pixel i in bin k.
  IOU_D2_HOST_DEVICE double weight(int64_t k, int64_t i) const {
    const double center = static_cast<double>(i);
    return hat_integral(edge(k) - center, edge(k + 1) - center) /
           (length / static_cast<double>(bins));
  }
};

struct Roi {
  int64_t image;
  Axis y, x;
};

// `roi` is (batch index, x1, y1, x2, y2) in input pixels. A RoI with a coordinate that is not
// finite or a side of at most 1e-9 feature pixels (zero, inverted) gets length 0 on both axes.
IOU_D2_HOST_DEVICE Roi read_roi(const double* roi, double scale, double shift, int64_t bins_y,
                                int64_t bins_x, int64_t height, int64_t width) {
  const double x1 = roi[1] * scale - shift, y1 = roi[2] * scale - shift;
  const double w = roi[3] * scale - shift - x1, h = roi[4] * scale - shift - y1;
  const double least = 1e-9, limit = 1e300;  // comparisons are false for NaN
  const bool valid =
      w > least && h > least && w < limit && h < limit && fabs(x1) < limit && fabs(y1) < limit;
  return {static_cast<int64_t>(roi[0]),
          {valid ? y1 : 0, valid ? h : 0, bins_y, height},
          {valid ? x1 : 0, valid ? w : 0, bins_x, width}};
}

}  // namespace iou_d2
