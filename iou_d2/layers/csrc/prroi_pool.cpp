// The schemas of the operators and the argument checks of PrRoI pooling; the kernels are in the
// files that end in _cpu and _cuda.
#include "prroi_pool.h"

#include <Python.h>
#include <torch/library.h>

namespace iou_d2 {

void check_arguments(const at::Tensor& features, const at::Tensor& rois, double spatial_scale,
                     int64_t bins_y, int64_t bins_x) {
  TORCH_CHECK_VALUE(features.dim() == 4, "prroi_pool: features must have shape (N, C, H, W), got ",
                    features.sizes(), ".");
  TORCH_CHECK_TYPE(at::isFloatingType(features.scalar_type()),
                   "prroi_pool: features must be floating point, got ", features.scalar_type(),
                   ".");
  TORCH_CHECK_VALUE(features.size(2) > 0 && features.size(3) > 0,
                    "prroi_pool: the feature map is empty: ", features.sizes(), ".");
  TORCH_CHECK_VALUE(
      rois.dim() == 2 && rois.size(1) == 5,
      "prroi_pool: rois must have shape (R, 5), the batch index and x1, y1, x2, y2; got ",
      rois.sizes(), ".");
  TORCH_CHECK_TYPE(rois.scalar_type() == at::kFloat || rois.scalar_type() == at::kDouble,
                   "prroi_pool: rois must be float32 or float64, since half precision moves "
                   "coordinates by whole pixels; got ",
                   rois.scalar_type(), ".");
  TORCH_CHECK_VALUE(features.device() == rois.device(), "prroi_pool: features are on ",
                    features.device(), " and rois on ", rois.device(), ".");
  TORCH_CHECK_VALUE(bins_y > 0 && bins_x > 0, "prroi_pool: the output size must be positive, got ",
                    bins_y, " x ", bins_x, ".");
  TORCH_CHECK_VALUE(std::isfinite(spatial_scale) && spatial_scale > 0,
                    "prroi_pool: spatial_scale must be positive, got ", spatial_scale, ".");
}

void check_backward(const at::Tensor& grad, at::IntArrayRef size, const at::Tensor& rois) {
  TORCH_CHECK_VALUE(size.size() == 4 && rois.dim() == 2 && rois.size(1) == 5 && grad.dim() == 4 &&
                        grad.size(0) == rois.size(0) && grad.size(1) == size[1],
                    "prroi_pool: a gradient of shape ", grad.sizes(), " does not fit features of ",
                    size, " and rois of ", rois.sizes(), ".");
  TORCH_CHECK_VALUE(grad.device() == rois.device(), "prroi_pool: the gradient is on ",
                    grad.device(), " and rois on ", rois.device(), ".");
}

}  // namespace iou_d2

TORCH_LIBRARY(iou_d2, m) {
  m.def(
      "prroi_pool(Tensor features, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt "
      "pooled_width, bool aligned) -> Tensor");
  m.def(
      "prroi_pool_backward_features(Tensor grad, Tensor rois, SymInt[] size, bool channels_last, "
      "float spatial_scale, bool aligned) -> Tensor");
  m.def(
      "prroi_pool_backward_rois(Tensor grad, Tensor features, Tensor output, Tensor rois, float "
      "spatial_scale, bool aligned) -> Tensor");
  m.def(
      "deform_conv(Tensor x, Tensor offset, Tensor? mask, Tensor weight, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation) -> Tensor");
  m.def(
      "deform_conv_backward(Tensor grad, Tensor x, Tensor offset, Tensor? mask, Tensor weight, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
}

// `import iou_d2._C` runs the registrations above; the module itself is empty.
extern "C" PyObject* PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
