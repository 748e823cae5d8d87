// CPU kernels on a table of integrals: a cost per RoI that does not grow with its size, for many
// large RoIs.
//
// With S[i, j] the sum of the map above and left of pixel (i, j), the integral G(y, x) of the
// surface over everything above and left of a point is a sum of 3 x 3 entries of S, and a bin is
// the usual difference of G at its 4 corners. S is kept in float64 for LANES neighbouring channels
// at a time.
#pragma once

#include <cmath>
#include <vector>

#include "prroi_pool.h"
#include "cpu_tile.h"

namespace iou_d2::cpu {

// The 3 entries of S along one axis that give G at an edge, and G's slope there.
struct Corner {
  int64_t at[3];
  double value[3], slope[3];

  Corner(const Axis& axis, int64_t e) {
    const double x = clamp(axis.edge(e), -1, static_cast<double>(axis.size));
    const int64_t left = static_cast<int64_t>(std::floor(x));
    const double t = x - static_cast<double>(left), a = (1 - t) * (1 - t) / 2, b = t * t / 2;
    for (int64_t k = 0; k < 3; ++k) at[k] = std::min(std::max<int64_t>(left + k, 0), axis.size);
    value[0] = a, value[1] = 1 - a - b, value[2] = b;
    slope[0] = t - 1, slope[1] = 1 - 2 * t, slope[2] = t;
  }
};

// The corners of all bins of a RoI.
struct Corners {
  std::vector<Corner> y, x;
  double area;  // of a bin

  explicit Corners(const Roi& roi)
      : area(roi.y.length * roi.x.length / static_cast<double>(roi.y.bins * roi.x.bins)) {
    for (int64_t e = 0; e <= roi.y.bins; ++e) y.emplace_back(roi.y, e);
    for (int64_t e = 0; e <= roi.x.bins; ++e) x.emplace_back(roi.x, e);
  }
};

struct Table {
  static constexpr int64_t LANES = Simd<double>::LANES;
  using Pack = Simd<double>::Pack;
  int64_t H, W;
  std::vector<double> values;  // (H + 1, W + 1, LANES)

  Table(int64_t height, int64_t width) : H(height), W(width), values((H + 1) * (W + 1) * LANES) {}

  IOU_D2_INLINE Pack& at(int64_t i, int64_t j) {
    return pack(values.data() + (i * (W + 1) + j) * LANES);
  }
  // Fills the table with S of the map's first `lanes` channels; false if the map is not finite.
  template <typename T>
  bool sum(const Strided<const T>& map, const T* start, int64_t lanes) {
    for (int64_t i = 0; i < H; ++i) {
      double line[LANES] = {};
      for (int64_t j = 0; j < W; ++j) {
        const T* pixel = start + i * map.row + j * map.column;
        for (int64_t k = 0; k < lanes; ++k) line[k] += static_cast<double>(pixel[k * map.channel]);
        double* entry = values.data() + ((i + 1) * (W + 1) + j + 1) * LANES;
        for (int64_t k = 0; k < LANES; ++k) entry[k] = entry[k - (W + 1) * LANES] + line[k];
      }
    }
    // One value that is not finite makes the last sum so.
    return std::all_of(values.end() - LANES, values.end(),
                       [](double v) { return std::isfinite(v); });
  }
  // The transpose of sum: adds to each pixel the entries below and right of it, and clears the
  // table.
  template <typename T>
  void add_transposed(const Strided<T>& map, T* start, int64_t lanes) {
    for (int64_t i = H - 1; i >= 0; --i) {
      double line[LANES] = {};
      for (int64_t j = W - 1; j >= 0; --j) {
        double* entry = values.data() + ((i + 1) * (W + 1) + j + 1) * LANES;
        T* pixel = start + i * map.row + j * map.column;
        for (int64_t k = 0; k < LANES; ++k) {
          line[k] += entry[k];
          if (i + 1 < H)
            entry[k] = line[k] + entry[k + (W + 1) * LANES];
          else
            entry[k] = line[k];
        }
        for (int64_t k = 0; k < lanes; ++k) pixel[k * map.channel] += static_cast<T>(entry[k]);
      }
    }
    std::fill(values.begin(), values.end(), 0.0);
  }
  // G, or its slope along one axis, at a corner.
  IOU_D2_INLINE Pack read(const Corner& y, const double* wy, const Corner& x, const double* wx) {
    Pack total = {};
    for (int a = 0; a < 3; ++a) {
      for (int b = 0; b < 3; ++b) total += (wy[a] * wx[b]) * at(y.at[a], x.at[b]);
    }
    return total;
  }
};

// out[p, q] = (G[p+1, q+1] - G[p, q+1] - G[p+1, q] + G[p, q]) / area
template <typename T>
IOU_D2_INLINE void pool(Table& table, const Corners& roi, const Strided<T>& out, T* start,
                        int64_t lanes, std::vector<double>& scratch) {
  constexpr int64_t LANES = Table::LANES;
  const int64_t columns = roi.x.size();
  scratch.resize(roi.y.size() * columns * LANES);
  for (int64_t p = 0; p < static_cast<int64_t>(roi.y.size()); ++p) {
    for (int64_t q = 0; q < columns; ++q) {
      const Corner &y = roi.y[p], &x = roi.x[q];
      double* here = scratch.data() + (p * columns + q) * LANES;
      pack(here) = table.read(y, y.value, x, x.value);
      if (p == 0 || q == 0) continue;
      const double* above = here - columns * LANES;
      T* bin = start + (p - 1) * out.row + (q - 1) * out.column;
      for (int64_t k = 0; k < lanes; ++k) {
        bin[k * out.channel] =
            static_cast<T>((here[k] - above[k] - here[k - LANES] + above[k - LANES]) / roi.area);
      }
    }
  }
}

// d loss / d G[p, q], from the gradients of the (up to) 4 bins around a corner.
template <typename T>
IOU_D2_INLINE void corner_gradient(const Corners& roi, int64_t p, int64_t q,
                                   const Strided<const T>& grad, const T* start, int64_t lanes,
                                   double* out) {
  const int64_t P = roi.y.size() - 1, Q = roi.x.size() - 1;
  std::fill_n(out, Table::LANES, 0.0);
  for (int64_t i = std::max<int64_t>(p - 1, 0); i < std::min(p + 1, P); ++i) {
    for (int64_t j = std::max<int64_t>(q - 1, 0); j < std::min(q + 1, Q); ++j) {
      const double sign = ((i == p) == (j == q) ? 1 : -1) / roi.area;
      const T* bin = start + i * grad.row + j * grad.column;
      for (int64_t k = 0; k < lanes; ++k)
        out[k] += sign * static_cast<double>(bin[k * grad.channel]);
    }
  }
}

template <typename T>
IOU_D2_INLINE void spread(Table& table, const Corners& roi, const Strided<const T>& grad,
                          const T* start, int64_t lanes) {
  alignas(64) double g[Table::LANES];
  for (int64_t p = 0; p < static_cast<int64_t>(roi.y.size()); ++p) {
    for (int64_t q = 0; q < static_cast<int64_t>(roi.x.size()); ++q) {
      const Corner &y = roi.y[p], &x = roi.x[q];
      corner_gradient(roi, p, q, grad, start, lanes, g);
      for (int a = 0; a < 3; ++a) {
        for (int b = 0; b < 3; ++b)
          table.at(y.at[a], x.at[b]) += (y.value[a] * x.value[b]) * pack(g);
      }
    }
  }
}

// Adds to edges_y[p] and edges_x[q] what moving an edge does to the loss while the bin areas stay.
template <typename T>
IOU_D2_INLINE void edge_sums(Table& table, const Corners& roi, const Strided<const T>& grad,
                             const T* start, int64_t lanes, double* edges_y, double* edges_x) {
  alignas(64) double g[Table::LANES];
  for (int64_t p = 0; p < static_cast<int64_t>(roi.y.size()); ++p) {
    for (int64_t q = 0; q < static_cast<int64_t>(roi.x.size()); ++q) {
      const Corner &y = roi.y[p], &x = roi.x[q];
      corner_gradient(roi, p, q, grad, start, lanes, g);
      edges_y[p] += add_lanes<double>(pack(g) * table.read(y, y.slope, x, x.value));
      edges_x[q] += add_lanes<double>(pack(g) * table.read(y, y.value, x, x.slope));
    }
  }
}

// sum of grad * out over bins and channels
template <typename T>
IOU_D2_INLINE double inner(const Strided<const T>& grad, const T* g, const Strided<const T>& out,
                           const T* o, int64_t P, int64_t Q, int64_t lanes) {
  double total = 0;
  for (int64_t p = 0; p < P; ++p) {
    for (int64_t q = 0; q < Q; ++q) {
      const T *a = g + p * grad.row + q * grad.column, *b = o + p * out.row + q * out.column;
      for (int64_t k = 0; k < lanes; ++k)
        total += static_cast<double>(a[k * grad.channel]) * static_cast<double>(b[k * out.channel]);
    }
  }
  return total;
}

}  // namespace iou_d2::cpu
