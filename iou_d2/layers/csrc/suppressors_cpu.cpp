// Greedy non-maximum suppression that says which box suppresses which, on the CPU.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace iou_d2::cpu {
namespace {

struct Box {
  float x1, y1, x2, y2, area;
  int64_t index;
};

// Rounded and compared as in torchvision's `nms`, so that both suppress the same boxes.
bool suppresses(const Box& a, const Box& b, double threshold) {
  const float width = std::max(0.f, std::min(a.x2, b.x2) - std::max(a.x1, b.x1));
  const float height = std::max(0.f, std::min(a.y2, b.y2) - std::max(a.y1, b.y1));
  const float inner = width * height;
  return inner / (a.area + b.area - inner) > threshold;
}

// `left` are the boxes of one class by falling rank. The first is kept, those that it suppresses
// are taken out, and so on with the boxes that are left.
void suppress(std::vector<Box>& left, double threshold, int64_t* suppressors) {
  for (size_t count = left.size(); count > 0;) {
    const Box kept = left[0];
    suppressors[kept.index] = kept.index;
    size_t others = 0;
    for (size_t i = 1; i < count; ++i) {
      const Box box = left[i];
      if (suppresses(kept, box, threshold))
        suppressors[box.index] = kept.index;
      else
        left[others++] = box;
    }
    count = others;
  }
}

at::Tensor first_suppressors_cpu(const at::Tensor& boxes, const at::Tensor& classes,
                                 double threshold) {
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4 && classes.dim() == 1 &&
                        classes.size(0) == boxes.size(0),
                    "first_suppressors: boxes must have shape (R, 4) and classes (R,), got ",
                    boxes.sizes(), " and ", classes.sizes(), ".");
  TORCH_CHECK_TYPE(boxes.scalar_type() == at::kFloat && classes.scalar_type() == at::kLong,
                   "first_suppressors: boxes must be float32 and classes int64, got ",
                   boxes.scalar_type(), " and ", classes.scalar_type(), ".");
  const int64_t count = boxes.size(0);
  const at::Tensor sides = boxes.contiguous(), labels = classes.contiguous();
  const float* box = sides.const_data_ptr<float>();
  const int64_t* label = labels.const_data_ptr<int64_t>();
  at::Tensor suppressors = at::empty({count}, classes.options());
  int64_t* out = suppressors.mutable_data_ptr<int64_t>();

  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return label[i] < label[j]; });
  std::vector<Box> left;
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    left.clear();
    for (; end < count && label[order[end]] == label[order[begin]]; ++end) {
      const float* b = box + 4 * order[end];
      left.push_back({b[0], b[1], b[2], b[3], (b[2] - b[0]) * (b[3] - b[1]), order[end]});
    }
    suppress(left, threshold, out);
  }
  return suppressors;
}

}  // namespace
}  // namespace iou_d2::cpu

TORCH_LIBRARY_FRAGMENT(iou_d2, m) {
  m.def("first_suppressors(Tensor boxes, Tensor classes, float threshold) -> Tensor");
}

TORCH_LIBRARY_IMPL(iou_d2, CPU, m) {
  m.impl("first_suppressors", iou_d2::cpu::first_suppressors_cpu);
}
