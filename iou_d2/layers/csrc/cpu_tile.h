// Views of tensors with any strides, and the small blocks that channels-first tensors are worked on
// in.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu_simd.h"

namespace iou_d2::cpu {

// A grid of channel vectors in memory; strides in elements.
template <typename T>
struct Grid {
  T* data;
  int64_t row, column;
  IOU_D2_INLINE T* at(int64_t i, int64_t j) const {
    return data + i * row + j * column;
  }
  IOU_D2_INLINE Grid turned() const {
    return {data, column, row};
  }
};

// A (N, C, H, W) or (R, C, P, Q) tensor with any strides.
template <typename T>
struct Strided {
  T* data;
  int64_t outer, channel, row, column;

  T* at(int64_t n, int64_t c, int64_t i, int64_t j) const {
    return data + n * outer + c * channel + i * row + j * column;
  }
  Grid<T> grid(int64_t n, int64_t c, int64_t i, int64_t j) const {
    return {at(n, c, i, j), row, column};
  }
};

template <typename T>
Strided<T> strided(const at::Tensor& t) {
  return {const_cast<T*>(t.const_data_ptr<std::remove_const_t<T>>()), t.stride(0), t.stride(1),
          t.stride(2), t.stride(3)};
}

// A (rows, columns, LANES) block in cache; missing channels are 0.
template <typename T>
struct Tile {
  static constexpr int64_t LANES = Simd<T>::LANES;
  std::vector<T> values;
  int64_t rows, columns;

  Tile& resize(int64_t h, int64_t w) {
    rows = h, columns = w;
    values.resize(h * w * LANES);
    return *this;
  }
  Grid<T> grid() {
    return {values.data(), columns * LANES, LANES};
  }
  IOU_D2_INLINE Grid<const T> gather(const Strided<const T>& from, const T* start, int64_t lanes) {
    if (lanes < LANES) std::fill(values.begin(), values.end(), T(0));
    for (int64_t i = 0; i < rows; ++i) {
      const T* line = start + i * from.row;
      T* to = values.data() + i * columns * LANES;
      for (int64_t k = 0; i + 2 < rows && k < lanes; ++k) {  // each in a page of its own
        prefetch(line + 2 * from.row + k * from.channel);
        prefetch(line + 2 * from.row + k * from.channel + (columns - 1) * from.column);
      }
      if (from.column == 1) {
        transpose<false>(line, from.channel, lanes, columns, to, LANES);
      } else {
        for (int64_t j = 0; j < columns; ++j) {
          for (int64_t k = 0; k < lanes; ++k)
            to[j * LANES + k] = line[j * from.column + k * from.channel];
        }
      }
    }
    return {values.data(), columns * LANES, LANES};
  }
  template <bool ADD>
  IOU_D2_INLINE void scatter(const Strided<T>& into, T* start, int64_t lanes) const {
    for (int64_t i = 0; i < rows; ++i) {
      T* line = start + i * into.row;
      const T* from = values.data() + i * columns * LANES;
      if (into.column == 1) {
        transpose<ADD>(from, LANES, columns, lanes, line, into.channel);
      } else {
        for (int64_t j = 0; j < columns; ++j) {
          for (int64_t k = 0; k < lanes; ++k) {
            T& place = line[j * into.column + k * into.channel];
            place = (ADD ? place : T(0)) + from[j * LANES + k];
          }
        }
      }
    }
  }
};

}  // namespace iou_d2::cpu
