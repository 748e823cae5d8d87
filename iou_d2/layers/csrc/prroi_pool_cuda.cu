// The op's CUDA implementation.
//
// A block handles one RoI and a group of channels. Its threads first put the RoI's weights into
// shared memory, once for all channels: a bin needs 5 numbers however long it is, since only the 2
// pixels at either end are partly covered. Where channels lie side by side a thread has 16 bytes of
// sums of them, and else one channel; where it pays, a map is put into that order first. Sums are
// in float32 for half precision. Nothing synchronises the stream or copies to the host.
#include "prroi_pool.h"

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "cuda_kernels.cuh"

namespace iou_d2::cuda {
namespace {

template <typename T>
Strided<T> strided(const at::Tensor& t) {
  return {static_cast<T*>(const_cast<void*>(t.const_data_ptr())), t.stride(0), t.stride(1),
          t.stride(2), t.stride(3)};
}

// Channels that a thread sums where it may have several.
template <typename A>
constexpr int WIDE = 16 / sizeof(A);

// Whether groups of `width` channels of t lie side by side, and start where one access may.
bool has_packs(const at::Tensor& t, int64_t width) {
  for (const int64_t axis : {0, 2, 3})
    if (t.size(axis) > 1 && t.stride(axis) % width != 0) return false;
  const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  return t.stride(1) == 1 && t.size(1) % width == 0 &&
         address % (width * t.element_size()) == 0;
}

// Calls run(width) with the channels a thread has, as a constant.
template <typename A, typename Run>
void with_width(std::initializer_list<at::Tensor> tensors, const Run& run) {
  const bool wide = std::all_of(tensors.begin(), tensors.end(),
                                [](const at::Tensor& t) { return has_packs(t, WIDE<A>); });
  if (wide)
    run(std::integral_constant<int, WIDE<A>>());
  else
    run(std::integral_constant<int, 1>());
}

// The order in which a map in `format` is worked on. Reordering moves it twice, and saves more where
// bins are not few beside its pixels.
at::MemoryFormat working_format(at::MemoryFormat format, const Shape& s) {
  const bool pays = s.C % WIDE<float> == 0 && 4 * s.R * s.P * s.Q >= s.N * s.H * s.W;
  return pays ? at::MemoryFormat::ChannelsLast : format;
}

at::Tensor reordered(const at::Tensor& t, at::MemoryFormat from, at::MemoryFormat to) {
  return from == to ? t : t.contiguous(to);
}

// One call's RoIs and how its kernels are launched: x counts RoIs, y groups of channels, enough of
// them to fill a GPU when RoIs are few and to count with 32 bits within one.
struct Launch {
  Shape shape;
  at::Tensor boxes;
  Boxes rois;
  double scale, shift;
  dim3 grid;
  cudaStream_t stream;

  Launch(const Shape& s, const at::Tensor& rois, double spatial_scale, bool aligned)
      : shape(s),
        boxes(rois.contiguous()),
        rois{boxes.const_data_ptr(), boxes.scalar_type() == at::kDouble},
        scale(spatial_scale),
        shift(aligned ? 0.5 : 0.0) {
    TORCH_CHECK_VALUE(
        s.P + s.Q <= 500 && s.H < INT32_MAX - 4 && s.W < INT32_MAX - 4 && s.R <= INT32_MAX,
        "prroi_pool: on CUDA the two output sizes may add up to 500 and map sides and RoIs to 2^31 "
        "- 5; got ",
        s.P, " x ", s.Q, " bins, a ", s.H, " x ", s.W, " map and ", s.R, " RoIs.");
    const int64_t enough = std::min((2048 + s.R - 1) / s.R, (s.C + 31) / 32);
    // Of what a kernel counts for each channel.
    const int64_t widest = std::max(s.W, (s.P + 1) * (s.Q + 1));
    const int64_t groups =
        std::min<int64_t>(std::max(enough, s.C / (INT32_MAX / 2 / widest) + 1), 65535);
    grid = dim3(static_cast<unsigned>(s.R), static_cast<unsigned>(groups));
    stream = c10::cuda::getCurrentCUDAStream();
  }
  template <typename A>
  size_t shared_bytes() const {
    return (shape.P + shape.Q) * sizeof(Bin<A>) + (shape.P + shape.Q + 2) * sizeof(Edge<A>);
  }
};

at::Tensor forward(const at::Tensor& features, const at::Tensor& rois, double spatial_scale,
                   int64_t P, int64_t Q, bool aligned) {
  check_arguments(features, rois, spatial_scale, P, Q);
  const c10::cuda::CUDAGuard guard(features.device());
  const Shape s{
      features.size(0), features.size(1), features.size(2), features.size(3), rois.size(0), P, Q};
  const auto format = format_of(features), work = working_format(format, s);
  at::Tensor out = at::empty({s.R, s.C, P, Q}, features.options().memory_format(work));
  if (out.numel() == 0) return out;
  const at::Tensor maps = reordered(features, format, work);
  const Launch launch(s, rois, spatial_scale, aligned);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, features.scalar_type(), "prroi_pool", [&] {
        using A = at::opmath_type<scalar_t>;
        with_width<A>({maps, out}, [&](auto width) {
          forward_kernel<scalar_t, A, decltype(width)::value>
              <<<launch.grid, THREADS, launch.shared_bytes<A>(), launch.stream>>>(
                  strided<const scalar_t>(maps), launch.rois, launch.scale, launch.shift, s,
                  maps.stride(1) == 1, strided<scalar_t>(out));
        });
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
  return out.contiguous(format);
}

at::Tensor backward_features(const at::Tensor& grad, const at::Tensor& rois, at::IntArrayRef size,
                             bool channels_last, double spatial_scale, bool aligned) {
  check_backward(grad, size, rois);
  at::globalContext().alertNotDeterministic(
      "prroi_pool_backward_features on CUDA, which adds atomically,");
  const c10::cuda::CUDAGuard guard(grad.device());
  const Shape s{size[0], size[1], size[2], size[3], rois.size(0), grad.size(2), grad.size(3)};
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const auto work = working_format(format, s);
  const auto sums = grad.options().dtype(at::toOpMathType(grad.scalar_type()));
  at::Tensor out = at::empty(size, sums.memory_format(work)).zero_();
  if (out.numel() > 0 && grad.numel() > 0) {
    const at::Tensor bins = grad.contiguous(work);
    const Launch launch(s, rois, spatial_scale, aligned);
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, grad.scalar_type(), "prroi_pool_backward_features", [&] {
          using A = at::opmath_type<scalar_t>;
          with_width<A>({bins, out}, [&](auto width) {
            backward_features_kernel<scalar_t, A, decltype(width)::value>
                <<<launch.grid, THREADS, launch.shared_bytes<A>(), launch.stream>>>(
                    strided<const scalar_t>(bins), launch.rois, launch.scale, launch.shift, s,
                    work == at::MemoryFormat::ChannelsLast, strided<A>(out));
          });
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        });
  }
  return out.to(grad.scalar_type()).contiguous(format);
}

at::Tensor backward_rois(const at::Tensor& grad, const at::Tensor& features,
                         const at::Tensor& output, const at::Tensor& rois, double spatial_scale,
                         bool aligned) {
  check_backward(grad, features.sizes(), rois);
  TORCH_CHECK_VALUE(output.sizes() == grad.sizes() && output.scalar_type() == grad.scalar_type(),
                    "prroi_pool: the output and its gradient differ in shape or dtype.");
  const c10::cuda::CUDAGuard guard(features.device());
  const Shape s{features.size(0), features.size(1), features.size(2), features.size(3),
                rois.size(0),     grad.size(2),     grad.size(3)};
  if (grad.numel() == 0) return at::zeros(rois.sizes(), rois.options());
  const auto format = format_of(features), work = working_format(format, s);
  const at::Tensor maps = reordered(features, format, work);
  const at::Tensor bins = grad.contiguous(work), values = output.contiguous(work);
  const Launch launch(s, rois, spatial_scale, aligned);
  at::Tensor partial = at::zeros({launch.grid.y, s.R, 5}, rois.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, features.scalar_type(), "prroi_pool_backward_rois", [&] {
        using A = at::opmath_type<scalar_t>;
        with_width<A>({bins, maps, values}, [&](auto width) {
          backward_rois_kernel<scalar_t, A, decltype(width)::value>
              <<<launch.grid, THREADS, launch.shared_bytes<A>(), launch.stream>>>(
                  strided<const scalar_t>(bins), strided<const scalar_t>(maps),
                  strided<const scalar_t>(values), launch.rois, launch.scale, launch.shift, s,
                  maps.stride(1) == 1, partial.mutable_data_ptr<double>());
        });
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
  return partial.sum(0).to(rois.scalar_type());
}

}  // namespace
}  // namespace iou_d2::cuda

TORCH_LIBRARY_IMPL(iou_d2, CUDA, m) {
  m.impl("prroi_pool", iou_d2::cuda::forward);
  m.impl("prroi_pool_backward_features", iou_d2::cuda::backward_features);
  m.impl("prroi_pool_backward_rois", iou_d2::cuda::backward_rois);
}
