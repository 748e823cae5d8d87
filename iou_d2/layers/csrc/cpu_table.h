// CPU kernels on a table of integrals: a cost per RoI that does not grow with its size, for many
// large RoIs.
//
// With S[i, j] the sum of the map above and left of pixel (i, j), the integral G(y, x) of the
// surface over everything above and left of a point is a sum of 3 x 3 entries of S, and a bin is
// the usual difference of G at its 4 corners. S is kept in float64 for LANES neighbouring channels
// at a time, and of its rows the last three, which stay in the nearest caches: a sweep over the map
// meets the edges of all bins in the order of their rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "prroi_pool.h"
#include "cpu_tile.h"
#include "cpu_wide.h"

namespace iou_d2::cpu {

// The 3 entries of S along one axis that give G at an edge, and G's slope there.
struct Corner {
  int32_t at[3];
  double value[3], slope[3];

  Corner(const Axis& axis, int64_t e) {
    const double x = clamp(axis.edge(e), -1, static_cast<double>(axis.size));
    const int64_t left = static_cast<int64_t>(std::floor(x));
    const double t = x - static_cast<double>(left), a = (1 - t) * (1 - t) / 2, b = t * t / 2;
    for (int64_t k = 0; k < 3; ++k)
      at[k] = static_cast<int32_t>(std::min(std::max<int64_t>(left + k, 0), axis.size));
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

// Some RoIs of one image, and their bins' horizontal edges by the last row of S that they need.
struct Group {
  static constexpr size_t SOON = 3;  // edges whose memory is worth fetching ahead
  struct Edge {
    int64_t row, k, p;  // edge p of the group's RoI k
  };
  int64_t image;
  std::vector<int64_t> rois;
  std::vector<Corners> corners;
  std::vector<Edge> edges;

  void add(int64_t r, const Roi& roi) {
    rois.push_back(r);
    corners.emplace_back(roi);
    for (int64_t p = 0; p <= roi.y.bins; ++p)
      edges.push_back({corners.back().y[p].at[2], static_cast<int64_t>(rois.size()) - 1, p});
  }
  void prefetch_x(const Edge& e) const {
    for (const Corner& x : corners[e.k].x) prefetch(&x);
  }
  void sort() {
    std::stable_sort(edges.begin(), edges.end(),
                     [](const Edge& a, const Edge& b) { return a.row < b.row; });
  }
};

// The last three rows of S, or of its gradient.
template <typename V>
struct Rows {
  using T = typename V::Number;
  static constexpr int64_t LANES = V::LANES;
  int64_t width;
  std::vector<Line<Doubles<V>>> values;  // (3 + 1, W + 1, LANES); the fourth is for sums

  explicit Rows(int64_t map_width)
      : width(map_width + 1), values(4 * width * LANES / Doubles<V>::LANES) {}

  IOU_D2_INLINE double* row(int64_t i) {
    return values.data()->lane + i % 3 * width * LANES;
  }
  IOU_D2_INLINE double* sums() {
    return values.data()->lane + 3 * width * LANES;
  }
  IOU_D2_INLINE void clear(int64_t i) {
    std::fill_n(row(i), width * LANES, 0.0);
  }
  // Row i of S from the one above and row i - 1 of the map.
  IOU_D2_INLINE void append(int64_t i, const Grid<const T>& pixels) {
    const double* above = row(i - 1);
    double* here = row(i);
    Wide<V> line;
    for (int64_t j = 1; j < width; ++j) {
      prefetch(pixels.at(1, j - 1));
      line.add(pixels.at(0, j - 1), 1);
      Wide<V> entry = line;
      entry.add_entry(1, above + j * LANES);
      entry.store(here + j * LANES);
    }
  }
  // The transpose of append, from the last row upwards: adds to row i - 1 of the map's gradient.
  IOU_D2_INLINE void drain(int64_t i, const Grid<T>& pixels) {
    const double* here = row(i);
    double* below = sums();
    Wide<V> line;
    for (int64_t j = width - 1; j > 0; --j) {
      line.add_entry(1, here + j * LANES);
      line.add_to_entry(1, below + j * LANES);
      Wide<V> entry;
      entry.add_entry(1, below + j * LANES);
      entry.add(pixels.at(0, j - 1), 1);
      entry.narrow(pixels.at(0, j - 1));
    }
    clear(i);
  }
  // Whether the map is down to row `last` of S: what is not finite makes all later sums so.
  bool finite(int64_t last) {
    const double* end = row(last) + (width - 1) * LANES;
    return std::all_of(end, end + LANES, [](double v) { return std::isfinite(v); });
  }
};

// The three rows of S around a horizontal edge.
template <typename V>
struct EdgeRows {
  double* row[3];

  IOU_D2_INLINE EdgeRows(Rows<V>& rows, const Corner& y) {
    for (int a = 0; a < 3; ++a) row[a] = rows.row(y.at[a]);
  }
  // G, or its slope along y, from the entries of one column of S.
  IOU_D2_INLINE Wide<V> down(const double* wy, int64_t column) const {
    Wide<V> total;
    for (int a = 0; a < 3; ++a) total.add_entry(wy[a], row[a] + column * Rows<V>::LANES);
    return total;
  }
  IOU_D2_INLINE Wide<V> read(const double* wy, const Corner& x) const {
    Wide<V> total;
    for (int b = 0; b < 3; ++b) total.add_scaled(x.value[b], down(wy, x.at[b]));
    return total;
  }
  IOU_D2_INLINE void add(const double* wy, const Corner& x, const Wide<V>& g) const {
    for (int a = 0; a < 3; ++a) {
      for (int b = 0; b < 3; ++b)
        g.add_to_entry(wy[a] * x.value[b], row[a] + x.at[b] * Rows<V>::LANES);
    }
  }
};

// out[p, q] = (G[p+1, q+1] - G[p, q+1] - G[p+1, q] + G[p, q]) / area, at edge p + 1. `above` has
// the Q differences G[p, q+1] - G[p, q] of the edge before, and gets those of this one.
template <typename V, typename T = typename V::Number>
IOU_D2_INLINE void pool_edge(Rows<V>& rows, const Corners& roi, int64_t p, const Grid<T>& out,
                             double* above) {
  const EdgeRows<V> edge(rows, roi.y[p]);
  const double* wy = roi.y[p].value;
  Wide<V> left = edge.read(wy, roi.x[0]);
  for (int64_t q = 0; q + 1 < static_cast<int64_t>(roi.x.size()); ++q, above += Rows<V>::LANES) {
    const Wide<V> right = edge.read(wy, roi.x[q + 1]);
    Wide<V> difference = right, bin;
    difference.add_scaled(-1, left);
    if (p > 0) {
      bin.add_scaled(1 / roi.area, difference);
      bin.add_entry(-1 / roi.area, above);
      bin.narrow(out.at(p - 1, q));
    }
    difference.store(above);
    left = right;
  }
}

// grad[p - 1, q] - grad[p, q], where those bins exist.
template <typename V, typename T = typename V::Number>
IOU_D2_INLINE Wide<V> step_down(const Corners& roi, int64_t p, int64_t q,
                                const Grid<const T>& grad) {
  Wide<V> total;
  if (p > 0) total.add(grad.at(p - 1, q), 1);
  if (p + 1 < static_cast<int64_t>(roi.y.size())) total.add(grad.at(p, q), -1);
  return total;
}

// The bins on both sides of edge p.
template <typename T>
IOU_D2_INLINE void prefetch_bins(const Corners& roi, int64_t p, const Grid<T>& bins) {
  const int64_t P = roi.y.size() - 1, Q = roi.x.size() - 1;
  for (int64_t i = std::max<int64_t>(p - 1, 0); i < std::min(p + 1, P); ++i) {
    for (int64_t q = 0; q < Q; ++q) prefetch(bins.at(i, q));
  }
}

// Calls body(q, d loss / d G[p, q] * area) for the corners of edge p.
template <typename V, typename F, typename T = typename V::Number>
IOU_D2_INLINE void corner_gradients(const Corners& roi, int64_t p, const Grid<const T>& grad,
                                    const F& body) {
  const int64_t Q = static_cast<int64_t>(roi.x.size()) - 1;
  Wide<V> left;
  for (int64_t q = 0; q <= Q; ++q) {
    Wide<V> right, g = left;
    if (q < Q) right = step_down<V>(roi, p, q, grad);
    g.add_scaled(-1, right);
    body(q, g);
    left = right;
  }
}

template <typename V, typename T = typename V::Number>
IOU_D2_INLINE void spread_edge(Rows<V>& rows, const Corners& roi, int64_t p,
                               const Grid<const T>& grad) {
  const EdgeRows<V> edge(rows, roi.y[p]);
  double wy[3];
  for (int a = 0; a < 3; ++a) wy[a] = roi.y[p].value[a] / roi.area;
  corner_gradients<V>(roi, p, grad, [&](int64_t q, const Wide<V>& g) IOU_D2_INLINE_LAMBDA {
    edge.add(wy, roi.x[q], g);
  });
}

// What the loss does when the edges of one RoI's bins move, summed for the two ends of each axis:
// the edge that lies the share t from start to end moves by 1 - t and t of their moves.
struct Ends {
  double y[2] = {}, x[2] = {};
  double inner = 0;  // sum of gradient * output
};

// Adds what edge p's corners give, with the bin areas kept; sum(gradient * output) is that of
// d loss / d G times G.
template <typename V, typename T = typename V::Number>
IOU_D2_INLINE void add_ends(Rows<V>& rows, const Corners& roi, int64_t p, const Grid<const T>& grad,
                            Ends& ends) {
  const EdgeRows<V> edge(rows, roi.y[p]);
  const Corner& y = roi.y[p];
  const double P = static_cast<double>(roi.y.size() - 1), Q = static_cast<double>(roi.x.size() - 1);
  Wide<V> inner, moved_y, moved_x, moved_right;
  corner_gradients<V>(roi, p, grad, [&](int64_t q, const Wide<V>& g) IOU_D2_INLINE_LAMBDA {
    const Corner& x = roi.x[q];
    Wide<V> value, slope_y, slope_x;
    for (int b = 0; b < 3; ++b) {
      const Wide<V> down = edge.down(y.value, x.at[b]);
      value.add_scaled(x.value[b], down);
      slope_x.add_scaled(x.slope[b], down);
      slope_y.add_scaled(x.value[b], edge.down(y.slope, x.at[b]));
    }
    inner.add_product(g, value);
    moved_y.add_product(g, slope_y);
    Wide<V> moved;
    moved.add_product(g, slope_x);
    moved_x.add_scaled(1, moved);
    moved_right.add_scaled(static_cast<double>(q) / Q, moved);
  });
  const double t = static_cast<double>(p) / P, all_y = moved_y.sum() / roi.area;
  const double all_x = moved_x.sum() / roi.area, right = moved_right.sum() / roi.area;
  ends.inner += inner.sum() / roi.area;
  ends.y[0] += (1 - t) * all_y, ends.y[1] += t * all_y;
  ends.x[0] += all_x - right, ends.x[1] += right;
}

// Calls visit(edge, one that comes soon) for the group's edges in order, when the three rows of S
// that each needs are there. False if a pixel that went into those is not finite.
template <typename V, typename F, typename T = typename V::Number>
IOU_D2_INLINE bool sweep_down(const Group& group, Rows<V>& rows, const Strided<const T>& map,
                              int64_t c0, int64_t lanes, Tile<V, 1>& line, const F& visit) {
  line.resize(1, rows.width - 1);
  rows.clear(0);
  const size_t count = group.edges.size();
  int64_t i = 0;
  for (size_t e = 0; e < count; ++e) {
    for (; i < group.edges[e].row; ++i) {
      const T* start = map.at(group.image, c0, i, 0);
      if (is_in_place<V>(map, lanes))
        rows.append(i + 1, map.grid(group.image, c0, i, 0));
      else
        rows.append(i + 1, line.gather(0, 1, map, start, lanes));
    }
    visit(group.edges[e], group.edges[std::min(e + Group::SOON, count - 1)]);
  }
  return rows.finite(i);
}

// The transpose of sweep_down: visit(edge, ...) adds to the gradient of S, and the map gets the sum
// of all that lies below and right of a pixel.
template <typename V, typename F, typename T = typename V::Number>
IOU_D2_INLINE void sweep_up(const Group& group, Rows<V>& rows, const Strided<T>& map, int64_t c0,
                            int64_t lanes, Tile<V, 1>& line, const F& visit) {
  line.resize(1, rows.width - 1);
  std::fill(rows.values.begin(), rows.values.end(), Line<Doubles<V>>{});
  size_t e = group.edges.size();
  for (int64_t i = group.edges.back().row; i > 0; --i) {
    for (; e > 0 && group.edges[e - 1].row == i; --e)
      visit(group.edges[e - 1], group.edges[e > Group::SOON ? e - 1 - Group::SOON : 0]);
    if (is_in_place<V>(map, lanes)) {
      rows.drain(i, map.grid(group.image, c0, i - 1, 0));
      continue;
    }
    line.clear(0, 1);
    rows.drain(i, line.grid());
    line.template scatter<true>(0, 1, map, map.at(group.image, c0, i - 1, 0), lanes);
  }
}

}  // namespace iou_d2::cpu
