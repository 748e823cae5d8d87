// 64-byte vectors for the CPU kernels, and the choice of instruction set at run time.
#pragma once

#include <algorithm>
#include <cstdint>

namespace iou_d2::cpu {

#if defined(__GNUC__)                     // GCC and Clang
#pragma GCC diagnostic ignored "-Wpsabi"  // nothing here is called across a binary interface
#define IOU_D2_INLINE __attribute__((always_inline)) inline
#define IOU_D2_INLINE_LAMBDA __attribute__((always_inline))

template <typename T>
struct Simd {
  static constexpr int64_t LANES = 64 / sizeof(T);
  typedef T Pack __attribute__((vector_size(64), aligned(alignof(T)), may_alias));
};
#else
#define IOU_D2_INLINE inline
#define IOU_D2_INLINE_LAMBDA

template <typename T>
struct Simd {
  static constexpr int64_t LANES = 64 / sizeof(T);
  struct Pack {
    T lane[LANES];
    T operator[](int64_t k) const {
      return lane[k];
    }
    Pack& operator+=(const Pack& b) {
      for (int64_t k = 0; k < LANES; ++k) lane[k] += b.lane[k];
      return *this;
    }
    friend Pack operator*(T a, Pack b) {
      for (int64_t k = 0; k < LANES; ++k) b.lane[k] *= a;
      return b;
    }
    friend Pack operator*(const Pack& a, Pack b) {
      for (int64_t k = 0; k < LANES; ++k) b.lane[k] *= a.lane[k];
      return b;
    }
    friend Pack operator-(const Pack& a, Pack b) {
      for (int64_t k = 0; k < LANES; ++k) b.lane[k] = a.lane[k] - b.lane[k];
      return b;
    }
  };
};
#endif

template <typename T>
IOU_D2_INLINE typename Simd<T>::Pack& pack(T* at) {
  return *reinterpret_cast<typename Simd<T>::Pack*>(at);
}
template <typename T>
IOU_D2_INLINE const typename Simd<T>::Pack& pack(const T* at) {
  return *reinterpret_cast<const typename Simd<T>::Pack*>(at);
}

template <typename T>
IOU_D2_INLINE double add_lanes(const typename Simd<T>::Pack& v) {
  double total = 0;
  for (int64_t k = 0; k < Simd<T>::LANES; ++k) total += v[k];
  return total;
}

// to[b * to_stride + a] = from[a * from_stride + b] for a 4 x 4 block, += if ADD.
template <bool ADD, typename T>
IOU_D2_INLINE void transpose4(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
  typedef T Quad __attribute__((vector_size(4 * sizeof(T)), aligned(alignof(T)), may_alias));
  Quad r[4];
  for (int k = 0; k < 4; ++k) r[k] = *reinterpret_cast<const Quad*>(from + k * from_stride);
  const Quad low01 = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5),
             low23 = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
  const Quad high01 = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7),
             high23 = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  const Quad turned[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                          __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                          __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                          __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int k = 0; k < 4; ++k) {
    Quad& place = *reinterpret_cast<Quad*>(to + k * to_stride);
    place = ADD ? place + turned[k] : turned[k];
  }
#else
  for (int a = 0; a < 4; ++a) {
    for (int b = 0; b < 4; ++b) {
      T& place = to[b * to_stride + a];
      place = ADD ? place + from[a * from_stride + b] : from[a * from_stride + b];
    }
  }
#endif
}

// The same for rows x columns numbers. The last blocks overlap those before where that is harmless.
template <bool ADD, typename T>
IOU_D2_INLINE void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns,
                             T* to, int64_t to_stride) {
  const bool overlap = !ADD && rows >= 4 && columns >= 4;
  const int64_t rows4 = overlap ? rows : rows / 4 * 4;
  const int64_t columns4 = overlap ? columns : columns / 4 * 4;
  for (int64_t i = 0; i < columns4; i += 4) {
    const int64_t b = std::min(i, columns4 - 4);
    for (int64_t j = 0; j < rows4; j += 4) {
      const int64_t a = std::min(j, rows4 - 4);
      transpose4<ADD>(from + a * from_stride + b, from_stride, to + b * to_stride + a, to_stride);
    }
  }
  for (int64_t a = 0; a < rows; ++a) {
    for (int64_t b = a < rows4 ? columns4 : 0; b < columns; ++b) {
      T& place = to[b * to_stride + a];
      place = ADD ? place + from[a * from_stride + b] : from[a * from_stride + b];
    }
  }
}

IOU_D2_INLINE void prefetch(const void* at) {
#if defined(__GNUC__)
  __builtin_prefetch(at);
#endif
}

// Runs `kernel`, an always-inline lambda, compiled for the widest vectors that this processor has:
// one binary serves every x86-64 machine without -march.
#if defined(__GNUC__) && defined(__x86_64__)
template <typename F>
__attribute__((target("avx512f,avx512vl,avx2,fma"))) void run_avx512(const F& kernel) {
  kernel();
}
template <typename F>
__attribute__((target("avx2,fma"))) void run_avx2(const F& kernel) {
  kernel();
}
template <typename F>
void run_widest(const F& kernel) {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
    return run_avx512(kernel);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return run_avx2(kernel);
  kernel();
}
#else
template <typename F>
void run_widest(const F& kernel) {
  kernel();
}
#endif

}  // namespace iou_d2::cpu
