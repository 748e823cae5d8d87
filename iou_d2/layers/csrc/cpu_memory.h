// Memory for large results.
#pragma once

#include <ATen/ops/empty.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace iou_d2::cpu {

// at::empty, in pages of 2 MB where the system gives such: allocators return tens of MB to the
// system and get them anew each time, and the first touch of each page of 4 KB would cost more than
// all that is computed for it.
inline at::Tensor empty(at::IntArrayRef size, const at::TensorOptions& options) {
  at::Tensor result = at::empty(size, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 1 << 21;
  const uintptr_t start = reinterpret_cast<uintptr_t>(result.const_data_ptr());
  const uintptr_t first = (start + PAGE - 1) / PAGE * PAGE;
  const uintptr_t last = (start + result.nbytes()) / PAGE * PAGE;
  // Advice: where it is not taken nothing is lost.
  if (first + 2 * PAGE <= last)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return result;
}

}  // namespace iou_d2::cpu
