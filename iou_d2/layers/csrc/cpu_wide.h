// Vectors of float64 for numbers of another type.
#pragma once

#include "cpu_simd.h"

namespace iou_d2::cpu {

// The numbers of a vector V in float64.
template <typename V>
struct Wide {
  using T = typename V::Number;
  using D = Doubles<V>;
  static constexpr int64_t PACKS = sizeof(double) / sizeof(T), PART = D::LANES;
  using Pack = typename D::Pack;
  Pack part[PACKS] = {};

#if defined(__GNUC__)
  typedef T Narrow __attribute__((vector_size(V::BYTES / PACKS), aligned(alignof(T)), may_alias));
  IOU_D2_INLINE void add(const T* at, double w) {
    for (int64_t k = 0; k < PACKS; ++k) {
      const Narrow& from = *reinterpret_cast<const Narrow*>(at + k * PART);
      part[k] += w * __builtin_convertvector(from, Pack);
    }
  }
  IOU_D2_INLINE void narrow(T* at) const {
    for (int64_t k = 0; k < PACKS; ++k)
      *reinterpret_cast<Narrow*>(at + k * PART) = __builtin_convertvector(part[k], Narrow);
  }
#else
  void add(const T* at, double w) {
    for (int64_t k = 0; k < PACKS * PART; ++k)
      part[k / PART].lane[k % PART] += w * static_cast<double>(at[k]);
  }
  void narrow(T* at) const {
    for (int64_t k = 0; k < PACKS * PART; ++k) at[k] = static_cast<T>(part[k / PART][k % PART]);
  }
#endif
  IOU_D2_INLINE void add_scaled(double w, const Wide& b) {
    for (int64_t k = 0; k < PACKS; ++k) part[k] += w * b.part[k];
  }
  IOU_D2_INLINE void add_product(const Wide& a, const Wide& b) {
    for (int64_t k = 0; k < PACKS; ++k) part[k] += a.part[k] * b.part[k];
  }
  IOU_D2_INLINE void add_entry(double w, const double* at) {
    for (int64_t k = 0; k < PACKS; ++k) part[k] += w * pack<D>(at + k * PART);
  }
  IOU_D2_INLINE void add_to_entry(double w, double* at) const {
    for (int64_t k = 0; k < PACKS; ++k) pack<D>(at + k * PART) += w * part[k];
  }
  IOU_D2_INLINE void store(double* at) const {
    for (int64_t k = 0; k < PACKS; ++k) pack<D>(at + k * PART) = part[k];
  }
  IOU_D2_INLINE double sum() const {
    double total = 0;
    for (int64_t k = 0; k < PACKS; ++k) total += add_lanes<D>(part[k]);
    return total;
  }
};

}  // namespace iou_d2::cpu
