// Vectors for the CPU kernels, as wide as the registers that this processor has.
//
// A kernel is a template of V, a Simd<number, bytes>, and does its work in V::run. A compiler takes
// wider vectors than the registers of its target apart by way of memory, so that 64 bytes with AVX2
// are 2 to 4 times as slow as 32.
#pragma once

#include <ATen/Version.h>

#include <algorithm>
#include <cstdint>
#include <string>

#if defined(__GNUC__)                     // GCC and Clang
#pragma GCC diagnostic ignored "-Wpsabi"  // nothing here is called across a binary interface
#define IOU_D2_INLINE __attribute__((always_inline)) inline
#define IOU_D2_INLINE_LAMBDA __attribute__((always_inline))
#else
#define IOU_D2_INLINE inline
#define IOU_D2_INLINE_LAMBDA
#endif

namespace iou_d2::cpu {

constexpr int64_t WIDEST = 64;      // bytes of a vector
constexpr int64_t CACHE_LINE = 64;  // bytes

// Runs `kernel`, an always-inline lambda, compiled for processors with vectors of BYTES: one binary
// serves every x86-64 machine without -march.
template <int64_t BYTES>
struct Registers {
  template <typename F>
  static void run(const F& kernel) {
    kernel();
  }
};
#if defined(__GNUC__) && defined(__x86_64__)
#define IOU_D2_HAS_AVX
template <>
struct Registers<32> {
  template <typename F>
  __attribute__((target("avx2,fma"))) static void run(const F& kernel) {
    kernel();
  }
};
template <>
struct Registers<64> {
  template <typename F>
  __attribute__((target("avx512f,avx512vl,avx2,fma"))) static void run(const F& kernel) {
    kernel();
  }
};
#endif

template <typename T, int64_t WIDTH>
struct Simd : Registers<WIDTH> {
  using Number = T;
  static constexpr int64_t BYTES = WIDTH, LANES = BYTES / sizeof(T);
#if defined(__GNUC__)
  typedef T Pack __attribute__((vector_size(WIDTH), aligned(alignof(T)), may_alias));
#else
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
    friend Pack operator-(Pack b) {
      for (int64_t k = 0; k < LANES; ++k) b.lane[k] = -b.lane[k];
      return b;
    }
    friend Pack operator+(Pack a, const Pack& b) {
      return a += b;
    }
  };
#endif
};

template <typename V>
using Doubles = Simd<double, V::BYTES>;

// Calls body(V()) with V the widest vectors of T that PyTorch, too, takes on this processor; the
// variable ATEN_CPU_CAPABILITY can hold both to "avx2" or "default".
template <typename T, typename F>
void with_widest(const F& body) {
#if defined(IOU_D2_HAS_AVX)
  static const std::string widest = at::get_cpu_capability();
  if (widest == "AVX512") return body(Simd<T, 64>());
  if (widest == "AVX2") return body(Simd<T, 32>());
#endif
  body(Simd<T, 16>());
}

template <typename V>
IOU_D2_INLINE typename V::Pack& pack(typename V::Number* at) {
  return *reinterpret_cast<typename V::Pack*>(at);
}
template <typename V>
IOU_D2_INLINE const typename V::Pack& pack(const typename V::Number* at) {
  return *reinterpret_cast<const typename V::Pack*>(at);
}

template <typename V>
IOU_D2_INLINE double add_lanes(const typename V::Pack& v) {
  double total = 0;
  for (int64_t k = 0; k < V::LANES; ++k) total += v[k];
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

template <typename V, int K>
IOU_D2_INLINE void prefetch_packs(const typename V::Number* at) {
  for (int64_t k = 0; k < K; k += std::max<int64_t>(CACHE_LINE / V::BYTES, 1))
    prefetch(at + k * V::LANES);
}

}  // namespace iou_d2::cpu
