// Views of tensors with any strides, and the small blocks that channels-first tensors are worked on
// in.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu_simd.h"

namespace iou_d2::cpu {

// Whole numbers from begin to before end.
struct Span {
  int64_t begin, end;
};

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

// Whether kernels can work on `lanes` channels of a tensor where they are.
template <typename V, typename T>
bool is_in_place(const Strided<T>& t, int64_t lanes) {
  return t.channel == 1 && lanes % V::LANES == 0;
}

template <typename T>
Strided<T> strided(const at::Tensor& t) {
  return {const_cast<T*>(t.const_data_ptr<std::remove_const_t<T>>()), t.stride(0), t.stride(1),
          t.stride(2), t.stride(3)};
}

// LANES numbers in cache lines of their own: a vector that crosses two costs two loads.
template <typename V>
struct alignas(V::BYTES) Line {
  typename V::Number lane[V::LANES];
};

constexpr int64_t TILE = 2 * WIDEST;  // bytes of the channels that a tile has of a pixel

// A (rows, columns, LANES) block in cache, WIDTH vectors wide; missing channels are 0.
template <typename V, int64_t WIDTH = TILE / V::BYTES>
struct Tile {
  using T = typename V::Number;
  static constexpr int64_t LANES = WIDTH * V::LANES;
  std::vector<Line<V>> values;
  int64_t rows = 0, columns = 0;

  Tile& resize(int64_t h, int64_t w) {
    rows = h, columns = w;
    if (static_cast<int64_t>(values.size()) < h * w * WIDTH) values.resize(h * w * WIDTH);
    return *this;
  }
  IOU_D2_INLINE T* row(int64_t i) {
    return values.data()->lane + i * columns * LANES;
  }
  Grid<T> grid(int64_t i = 0) {
    return {row(i), columns * LANES, LANES};
  }
  void clear(int64_t i, int64_t count) {
    std::fill_n(row(i), count * columns * LANES, T(0));
  }
  // Rows that follow one another without a gap are as one.
  template <typename U>
  bool joined(const Strided<U>& t) const {
    return t.column == 1 && t.row == columns;
  }
  IOU_D2_INLINE void gather_row(int64_t i, const Strided<const T>& from, const T* line,
                                int64_t lanes, int64_t length) {
    T* to = row(i);
    if (lanes < LANES) std::fill_n(to, length * LANES, T(0));
    if (from.column == 1) return transpose<false>(line, from.channel, lanes, length, to, LANES);
    for (int64_t j = 0; j < length; ++j) {
      for (int64_t k = 0; k < lanes; ++k)
        to[j * LANES + k] = line[j * from.column + k * from.channel];
    }
  }
  // Rows [i, i + count) from a tensor, whose first number is at `start`.
  IOU_D2_INLINE Grid<const T> gather(int64_t i, int64_t count, const Strided<const T>& from,
                                     const T* start, int64_t lanes) {
    const Grid<const T> result{row(i), columns * LANES, LANES};
    if (joined(from)) {
      gather_row(i, from, start, lanes, count * columns);
      return result;
    }
    for (int64_t n = 0; n < count; ++n) {
      const T* line = start + n * from.row;
      for (int64_t k = 0; n + 2 < count && k < lanes; ++k) {  // each in a page of its own
        prefetch(line + 2 * from.row + k * from.channel);
        prefetch(line + 2 * from.row + k * from.channel + (columns - 1) * from.column);
      }
      gather_row(i + n, from, line, lanes, columns);
    }
    return result;
  }
  template <bool ADD>
  IOU_D2_INLINE void scatter_row(int64_t i, const Strided<T>& into, T* line, int64_t lanes,
                                 int64_t length) {
    const T* from = row(i);
    if (into.column == 1) return transpose<ADD>(from, LANES, length, lanes, line, into.channel);
    for (int64_t j = 0; j < length; ++j) {
      for (int64_t k = 0; k < lanes; ++k) {
        T& place = line[j * into.column + k * into.channel];
        place = (ADD ? place : T(0)) + from[j * LANES + k];
      }
    }
  }
  template <bool ADD>
  IOU_D2_INLINE void scatter(int64_t i, int64_t count, const Strided<T>& into, T* start,
                             int64_t lanes) {
    if (joined(into)) return scatter_row<ADD>(i, into, start, lanes, count * columns);
    for (int64_t n = 0; n < count; ++n)
      scatter_row<ADD>(i + n, into, start + n * into.row, lanes, columns);
  }
};

// A RoI's bins with their channels as neighbours, of a tensor that has them otherwise.
template <typename V>
struct GatheredBins {
  using T = typename V::Number;
  std::vector<Line<V>> values;

  // `lanes` channels from `start` on, in some rows; what is missing in the last vector is 0.
  IOU_D2_INLINE Grid<const T> gather(const Strided<const T>& from, const T* start, Span rows,
                                     int64_t columns, int64_t lanes) {
    int64_t vectors = (lanes + V::LANES - 1) / V::LANES;
    // Bins that are a large power of two apart share places of the nearest cache.
    if (vectors * V::BYTES > TILE) vectors += (CACHE_LINE + V::BYTES - 1) / V::BYTES;
    const int64_t bin = vectors * V::LANES, begin = rows.begin * columns, end = rows.end * columns;
    if (static_cast<int64_t>(values.size()) < end * vectors) values.resize(end * vectors);
    T* to = values.data()->lane;
    if (lanes % V::LANES != 0) std::fill_n(to + begin * bin, (end - begin) * bin, T(0));
    if (from.column == 1 && from.row == columns) {
      transpose<false>(start + begin, from.channel, lanes, end - begin, to + begin * bin, bin);
      return {to, columns * bin, bin};
    }
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const T* at = start + i * from.row + j * from.column;
        for (int64_t k = 0; k < lanes; ++k) to[(i * columns + j) * bin + k] = at[k * from.channel];
      }
    }
    return {to, columns * bin, bin};
  }
};

// Rows of one image in a tile, LANES channels wide, that moves down the map with the RoIs: those
// come in the order of their bands, so that each row is brought in once and left once.
template <typename V>
struct Strip {
  using T = typename V::Number;
  Tile<V> tile;
  int64_t base = 0, top = 0, bottom = 0;  // the map's row in the tile's first; rows [top, bottom)

  void start(int64_t capacity, int64_t width) {
    tile.resize(capacity, width);
    base = top = bottom = 0;
  }
  // The pixels from (i, j) of the map on.
  Grid<T> grid(int64_t i, int64_t j) {
    return {tile.row(i - base) + j * Tile<V>::LANES, tile.columns * Tile<V>::LANES,
            Tile<V>::LANES};
  }
  // Calls leave(row of the map, row of the tile) for all rows above `row`; the tile's is -1 for a
  // row that was never brought in.
  template <typename F>
  IOU_D2_INLINE void close(int64_t row, const F& leave) {
    for (; top < row; ++top) leave(top, top < bottom ? top - base : -1);
    bottom = std::max(bottom, top);
  }
  // Makes place for the rows from `first` to before `last`, and calls bring(row of the map, row of
  // the tile) for new ones.
  template <typename F, typename G>
  IOU_D2_INLINE void open(int64_t first, int64_t last, const F& bring, const G& leave) {
    close(first, leave);
    if (last - base > tile.rows) {
      if (top < bottom) std::copy(tile.row(top - base), tile.row(bottom - base), tile.row(0));
      base = top;
    }
    for (; bottom < last; ++bottom) bring(bottom, bottom - base);
  }
};

}  // namespace iou_d2::cpu
